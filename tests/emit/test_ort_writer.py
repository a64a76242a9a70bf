"""The process that writes the .ort format: what it says, with and without fixed addresses."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import onnx.parser
import pytest

from graphopt.emit import ort_writer

TEXT = '<ir_version: 9, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) { y = Relu(x) }'


def test_a_model_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "m.onnx")
    ort_writer.main(["--again", str(tmp_path / "m.onnx"), str(tmp_path / "m.ort"), "ORT"])
    assert json.loads(capsys.readouterr().out) == {"reproducible": True, "fault": ""}
    assert (tmp_path / "m.ort").read_bytes()[4:8] == b"ORTM"


def test_without_fixed_addresses_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "m.onnx")
    monkeypatch.setattr(ort_writer, "fixed_addresses", lambda: False)
    ort_writer.main([str(tmp_path / "m.onnx"), str(tmp_path / "m.ort"), "ORT"])
    assert json.loads(capsys.readouterr().out)["reproducible"] is False


def test_a_system_without_the_call_grants_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_named: object) -> None:
        raise OSError("no such library")

    monkeypatch.setattr("ctypes.CDLL", refuse)
    assert not ort_writer.fixed_addresses()


def test_what_the_runtime_says_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ort_writer.main(["--again", str(tmp_path / "none.onnx"), str(tmp_path / "m.ort"), "ORT"])
    assert "none.onnx" in json.loads(capsys.readouterr().out)["fault"]
