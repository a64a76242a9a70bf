"""Small models on disk, and the command line called in process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest

from graphopt.cli import main

# Sizes of tables follow the terminal: 100 columns, whatever runs the tests.
COLUMNS = "100"

TIDY = """<ir_version: 9, opset_import: ["" : 18]>
tidy (float[N, 4] x) => (float[N, 4] y) <float[4] w = {1, 2, 3, 4}, float[4] spare = {5, 6, 7, 8}> {
  a = Identity(x)
  b = Add(a, w)
  c = Identity(b)
  y = Relu(c)
}"""


@dataclasses.dataclass(frozen=True)
class Ran:
    """What a command line gave."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        body = json.loads(self.out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        assert isinstance(body, dict)
        return body

    @property
    def message(self) -> str:
        """The error as one line."""
        return " ".join(self.err.split())


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Calls `main` with arguments."""
    monkeypatch.setenv("COLUMNS", COLUMNS)

    def call(*args: object) -> Ran:
        capsys.readouterr()
        status = main([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return call


def save(path: Path, text: str) -> Path:
    """Writes a model given in ONNX text as a protobuf."""
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with two identities and a constant that nothing uses."""
    return save(tmp_path / "model.onnx", TIDY)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where to write."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "result.onnx"
