"""Packages of passes that are installed for one test: a module, and the metadata that an installer would write."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from importlib.metadata import EntryPoints, distributions
from pathlib import Path
from typing import Protocol

import pytest

from graphopt.pipeline import registry


class Install(Protocol):
    """Installs module `<dist>_rules` with `source`, as distribution `dist` 1.0."""

    def __call__(self, dist: str, source: str, *, value: str | None = None) -> None: ...


SOURCE = '''
import dataclasses
from typing import ClassVar, Literal
from graphopt.numerics import Numerics
from graphopt.pipeline import Repeat
@dataclasses.dataclass(frozen=True)
class Fold:
    """Folds what is constant."""
    name: ClassVar[str] = "fold"
    numerics: ClassVar[Numerics] = Numerics.EXACT
    limit: int = 3
    ratio: float = 0.5
    mode: Literal["fast", "thorough"] = "fast"
    ops: tuple[str, ...] = ()
    tag: str | None = None
    def __post_init__(self):
        if self.limit < 0:
            raise ValueError(f"limit {self.limit} is negative")
    def run(self, model, ctx):
        return False
@dataclasses.dataclass(frozen=True)
class Cut:
    name: ClassVar[str] = "cut"
    numerics: ClassVar[Numerics] = Numerics.LOSSY
    def run(self, model, ctx):
        return False
PASSES = {"fold": Fold, "cut": Cut()}
PIPELINES = {("portable", "fp32"): (Repeat((Fold(), Cut())), Fold(limit=7)), ("cpu", "fp32"): (Fold(),)}
'''


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs packages of passes in an empty world, without graphopt's own."""
    modules: list[str] = []

    def entry_points(*, group: str) -> EntryPoints:
        found = distributions(path=[str(tmp_path)])
        return EntryPoints(e for d in found for e in d.entry_points.select(group=group))

    def put(dist: str, source: str, *, value: str | None = None) -> None:
        module = f"{dist}_rules"
        modules.append(module)
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{dist}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[graphopt.passes]\nown = {value or module}\n")

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "entry_points", entry_points)
    yield put
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def acme(install: Install) -> Install:
    """The package `acme` with the passes `fold` and `cut`."""
    install("acme", SOURCE)
    return install
