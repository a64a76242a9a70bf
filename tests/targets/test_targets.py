"""Finding targets: ours, and those of other packages."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from graphopt import targets
from graphopt.errors import OptionError
from graphopt.targets import all_targets, get_target


@dataclasses.dataclass(frozen=True)
class Entry:
    name: str
    value: str
    held: Any

    def load(self) -> Any:
        return self.held


def install(monkeypatch: pytest.MonkeyPatch, *entries: Entry) -> None:
    monkeypatch.setattr(
        targets, "entry_points", lambda *, group: entries if group == "graphopt.targets" else ()
    )


def test_another_package_adds_a_target(monkeypatch: pytest.MonkeyPatch) -> None:
    board = dataclasses.replace(get_target("portable"), name="board")
    install(monkeypatch, Entry("board", "acme:BOARD", board))
    assert get_target("board") is board
    assert set(all_targets()) > {"cpu", "cuda", "tensorrt", "portable", "board"}


def test_another_package_replaces_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    false = dataclasses.replace(get_target("portable"), name="cuda")
    install(monkeypatch, Entry("cuda", "acme:CUDA", false))
    assert get_target("cuda") is not false


def test_what_is_no_target_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Entry("board", "acme:BOARD", 3))
    with pytest.raises(
        OptionError, match=r"'board' of group graphopt.targets \(acme:BOARD\) is a int, not a"
    ):
        all_targets()


def test_an_unknown_target_is_named_with_the_nearest() -> None:
    with pytest.raises(
        OptionError, match=r"unknown target 'cudda' \(did you mean 'cuda'\?\); known targets: cpu"
    ):
        get_target("cudda")
