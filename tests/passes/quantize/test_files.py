"""Large models beside sessions: where their weights are, and that this changes nothing but memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.quantize import files
from graphopt_passes.quantize.certificate import Judgement
from graphopt_passes.quantize.files import on_disk, outside

import graphopt
from graphopt.ir import values
from graphopt.ir.mapped import MappedTensor
from graphopt.ir.model_file import load_model
from graphopt.verify.feed_files import Feed
from tests.passes.quantize.test_static import BLOCK, TOKENS, varied


def in_memory() -> ir.Model:
    """A model whose weights are arrays, as passes leave them."""
    model = load_model(varied(BLOCK))
    for value in model.graph.initializers.values():
        array = values.array(value)
        assert array is not None
        value.const_value = ir.tensor(array.copy(), name=value.name)
    return model


def test_a_model_is_on_disk_for_as_long_as_it_is_asked_for() -> None:
    with on_disk(in_memory()) as path:
        assert load_model(path).graph.name
        folder = path.parent
    assert not folder.exists()


def test_many_elements_lie_in_a_file_that_has_no_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    array = np.arange(1 << 15, dtype=np.float32).reshape(2, -1)
    monkeypatch.setattr(files, "HEAVY", array.nbytes)
    found = outside(array.T, "w")
    assert isinstance(found, MappedTensor)
    assert found.mapping is not None
    assert not list(tmp_path.iterdir())
    assert (found.name, found.dtype) == ("w", ir.DataType.FLOAT)
    np.testing.assert_array_equal(found.numpy(), array.T)
    found.mapping[0].advise("MADV_DONTNEED")
    np.testing.assert_array_equal(found.numpy(), array.T)


def test_few_elements_and_those_without_room_stay_in_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    array = np.arange(8, dtype=np.float32)
    assert isinstance(outside(array, "w"), ir.Tensor)
    monkeypatch.setattr(files, "HEAVY", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    found = outside(array, "w")
    assert isinstance(found, ir.Tensor)
    np.testing.assert_array_equal(found.numpy(), array)


def test_large_models_keep_no_session_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    feeds = [Feed("0", TOKENS[0])]
    assert Judgement(in_memory(), feeds).kept is not None
    monkeypatch.setattr(files, "LARGE", 1)
    judge = Judgement(in_memory(), feeds)
    assert judge.kept is None
    assert judge.race(in_memory(), seconds=0.01)() > 0


def test_being_large_does_not_show_in_the_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(varied(BLOCK).SerializeToString())
    found = []
    for least in (files.LARGE, 1):
        monkeypatch.setattr(files, "LARGE", least)
        monkeypatch.setattr(files, "HEAVY", least)
        output = tmp_path / f"{least}.onnx"
        graphopt.optimize(
            source, output=output, precision="int8", calibration=TOKENS, force=True, verify="off"
        )
        found.append(output.read_bytes())
    assert found[0] == found[1]
    assert b"QuantizeLinear" in found[0]
