"""load -> save -> onnx.load says the same as the original, on every model at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from graphopt.errors import ModelError
from graphopt.ir.model_file import ExternalData, load_model, model_to_bytes, save_model
from tests.conftest import find_zoo
from tests.ir.model_protos import normalized
from tests.sweep.backend_cases import disk_folders, light_files, node_cases


def zoo_models() -> list[Path]:
    zoo = find_zoo()
    return sorted(zoo.rglob("*.onnx")) if zoo else []


# What the zoo holds that is not valid ONNX, or not complete.
REFUSED = {
    "ir/external_data.onnx": "is missing",
    "models/ext_weights.onnx": "is missing",
    "model_with_external_initializer_come_from_user.onnx": "is missing",
    "icm-31000000518082.onnx": "data type -100 is not known",
    "test_arbitrary_external_file.onnx": "leads out of the model's folder",
    "gpt2_past.onnx": "'284' is defined twice",
    "bad_graph_with_dup_value_info.onnx": "'inp' is defined twice",
    "weightless": "the weights have been stripped",
}
# A branch that returns an outer value gets an Identity; an output listed twice, with two types, keeps one.
REPAIRED = {
    "ort_github_issue_11536.onnx",
    "fuse-conv-bn-mul-add-unsqueeze.onnx",
    "fuse-conv-bn-mul-add-unsqueeze.negative_axes.onnx",
}


def assert_round_trip(source: Path | bytes, expected: onnx.ModelProto, folder: Path) -> None:
    (path,) = save_model(load_model(source), folder / "m.onnx")
    assert normalized(onnx.load(path)) == normalized(expected)
    assert model_to_bytes(load_model(path)) == path.read_bytes()


@pytest.mark.parametrize("folder", disk_folders(), ids=lambda path: path.name)
def test_converted_models_come_back(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.onnx"
    assert_round_trip(path, onnx.load(path), tmp_path)


@pytest.mark.parametrize("path", light_files(), ids=lambda path: path.stem)
def test_light_models_come_back(path: Path, tmp_path: Path) -> None:
    assert_round_trip(path, onnx.load(path), tmp_path)


@pytest.mark.slow
def test_operator_models_come_back(tmp_path: Path) -> None:
    cases = node_cases()
    assert len(cases) > 1500
    for case in cases.values():
        assert_round_trip(case.model.SerializeToString(), case.model, tmp_path)


@pytest.mark.zoo
@pytest.mark.parametrize("path", zoo_models(), ids=lambda path: path.name)
def test_zoo_models_come_back(path: Path, tmp_path: Path) -> None:
    refusals = [says for name, says in REFUSED.items() if name in path.as_posix()]
    if refusals:
        with pytest.raises(ModelError, match=refusals[0]):
            load_model(path)
    elif path.name in REPAIRED:
        (saved,) = save_model(load_model(path), tmp_path / "m.onnx")
        assert model_to_bytes(load_model(saved)) == saved.read_bytes()
    else:
        assert_round_trip(path, onnx.load(path), tmp_path)


@pytest.mark.parametrize("external", [ExternalData.NEVER, ExternalData.SINGLE_FILE])
def test_sparse_models_run_as_before(tmp_path: Path, external: ExternalData) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[3,40] x) => (float[3,40] y, float[3,40] z)'
        " { y = MatMul (x, w)  c = Constant <value_int = 0> ()  z = MatMul (x, c) }"
    )
    rng = np.random.default_rng(0)
    linear, by_axis = np.arange(0, 1600, 4), np.stack([np.arange(0, 40, 2)] * 2, axis=1)
    tensors = [
        onnx.SparseTensorProto(
            values=onnx.numpy_helper.from_array(rng.standard_normal(len(i), np.float32), name),
            indices=onnx.numpy_helper.from_array(i, f"{name}_idx"),
            dims=[40, 40],
        )
        for i, name in ((linear, "w"), (by_axis, "c"))
    ]
    proto.graph.sparse_initializer.append(tensors[0])
    carrier = onnx.AttributeProto(name="sparse_value", sparse_tensor=tensors[1])
    carrier.type = onnx.AttributeProto.SPARSE_TENSOR
    proto.graph.node[1].attribute[0].CopyFrom(carrier)
    path = save_model(load_model(proto), tmp_path / "m.onnx", external=external)[0]
    feeds = {"x": rng.standard_normal((3, 40), np.float32)}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    before, after = (
        ort.InferenceSession(source, options, providers=["CPUExecutionProvider"]).run(None, feeds)
        for source in (proto.SerializeToString(), path)
    )
    for expected, found in zip(before, after, strict=True):
        np.testing.assert_array_equal(expected, found)
