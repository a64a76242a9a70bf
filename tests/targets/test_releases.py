"""What the installed runtime takes, without loading it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator

import onnx
import onnxruntime as ort
import pytest

from graphopt.targets import releases
from tests.rewriting import parse


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    releases._release.cache_clear()
    yield
    releases._release.cache_clear()


@pytest.mark.parametrize(
    ("found", "limits"),
    [("1.31.1", (26, 13)), ("1.32.0", (28, 14)), ("1.33.0.dev1", (28, 14)), ("new", (26, 13))],
)
def test_limits_of_a_release(
    monkeypatch: pytest.MonkeyPatch, found: str, limits: tuple[int, int]
) -> None:
    monkeypatch.setattr(releases, "version", lambda _wheel: found)
    assert (releases.newest_opset(), releases.newest_ir()) == limits


def test_limits_without_a_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(wheel: str) -> str:
        raise importlib.metadata.PackageNotFoundError(wheel)

    monkeypatch.setattr(releases, "version", absent)
    assert (releases.newest_opset(), releases.newest_ir()) == (26, 13)


def test_the_installed_runtime_takes_what_is_said_of_it() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Abs(x) }")
    model.opset_import[0].version = min(releases.newest_opset(), onnx.defs.onnx_opset_version())
    model.ir_version = min(releases.newest_ir(), onnx.IR_VERSION)
    assert ort.InferenceSession(model.SerializeToString()).get_outputs()[0].name == "y"
