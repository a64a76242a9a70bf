"""Memory of a process."""

from __future__ import annotations

import ctypes
import sys
import types
from pathlib import Path

import pytest

from graphopt.ir.mapped import MappedFile
from graphopt.ir.model_file import load_model, save_model
from graphopt.runtime.footprint import let_go, trim
from tests.rewriting import parse


@pytest.mark.skipif(sys.platform != "linux", reason="asks the C library of Linux")
def test_freed_memory_is_given_back_where_the_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    library = types.SimpleNamespace(malloc_trim=asked.append)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: library)
    trim()
    del library.malloc_trim
    trim()
    assert asked == [0]


def test_pages_of_mapped_weights_are_let_go_and_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "g (float[N,64] x) => (float[N,64] y) <float[64,64] w> { y = MatMul(x, w) }"
    file = save_model(load_model(parse(text)), tmp_path / "m.onnx")[0]
    tensor = load_model(file).graph.initializers["w"].const_value
    assert tensor is not None
    before = tensor.tobytes()
    advised: list[str] = []
    advise = MappedFile.advise

    def watched(self: MappedFile, name: str) -> None:
        advised.append(name)
        advise(self, name)

    monkeypatch.setattr(MappedFile, "advise", watched)
    let_go([tensor])
    assert advised == ["MADV_DONTNEED"]
    assert tensor.tobytes() == before
