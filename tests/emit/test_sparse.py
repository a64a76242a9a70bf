"""Weights stored as values and indices: where that pays, how it reads back, and what it leaves alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.checker
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnx_ir as ir
import onnxruntime as ort
import pytest

import graphopt
from graphopt.cli.entry import main
from graphopt.emit import check_model, sparse
from graphopt.emit.artefacts import is_two_of_four
from graphopt.emit.sparse import SparseFacts, as_coo, densify, sparse_form
from graphopt.ir.model_file import ExternalData, load_model, model_to_bytes, save_model
from graphopt.ir.sparse import CooTensor
from graphopt.targets import SparseStyle

SPARSE = (SparseStyle.INITIALIZER, SparseStyle.CONSTANT)


def weight(
    zeros: float, shape: tuple[int, ...] = (96, 64), dtype: str = "float32"
) -> npt.NDArray[Any]:
    """A weight of which exactly the share `zeros` is zero, with a NaN and a negative zero among the others."""
    rng = np.random.default_rng(0)
    flat = rng.uniform(1, 2, int(np.prod(shape)))
    flat[rng.permutation(flat.size)[: round(zeros * flat.size)]] = 0
    return flat.reshape(shape).astype(dtype)


def product(
    w: npt.NDArray[Any], *, as_output: bool = False, as_input: bool = False
) -> onnx.ModelProto:
    """y = x @ w."""
    kind = oh.np_dtype_to_tensor_dtype(w.dtype)
    node = oh.make_node("MatMul", ["x", "w"], ["y"])
    x = oh.make_tensor_value_info("x", kind, [2, w.shape[0]])
    y = oh.make_tensor_value_info("y", kind, [2, w.shape[1]])
    own = oh.make_tensor_value_info("w", kind, w.shape)
    graph = oh.make_graph(
        [node],
        "g",
        [x, own] if as_input else [x],
        [y, own] if as_output else [y],
        [nh.from_array(w, "w")],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9)


def encoded(proto: onnx.ModelProto, style: SparseStyle) -> tuple[ir.Model, SparseFacts | None]:
    return sparse_form(load_model(proto), style)


def run(data: bytes, x: npt.NDArray[Any]) -> bytes:
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return bytes(np.asarray(session.run(["y"], {"x": x})[0]).tobytes())


class TestForm:
    @pytest.mark.parametrize("style", SPARSE)
    def test_runs_to_the_bit_as_the_dense_model(self, style: SparseStyle) -> None:
        w = weight(0.9)
        w[0, :3] = np.nan, -0.0, np.inf
        dense = product(w)
        made, facts = encoded(dense, style)
        data = model_to_bytes(made)
        onnx.checker.check_model(onnx.ModelProto.FromString(data))
        x = np.random.default_rng(1).standard_normal((2, 96)).astype(np.float32)
        assert run(data, x) == run(dense.SerializeToString(), x)
        assert len(data) < 0.4 * len(dense.SerializeToString())
        assert facts is not None
        assert (facts.tensors, facts.style) == (1, style)

    @pytest.mark.parametrize(
        "dtype",
        [
            "int8",
            "uint8",
            "int16",
            "uint16",
            "int32",
            "uint32",
            "int64",
            "uint64",
            "float16",
            "bfloat16",
            "double",
            "float8e4m3fn",
            "float8e4m3fnuz",
            "float8e5m2",
            "float8e5m2fnuz",
        ],
    )
    @pytest.mark.parametrize("style", SPARSE)
    def test_every_type_that_the_runtime_loads(self, style: SparseStyle, dtype: str) -> None:
        kind = onnx.TensorProto.DataType.Value(dtype.upper())
        w = weight(0.96).astype(oh.tensor_dtype_to_np_dtype(kind))
        dense = oh.make_model(
            oh.make_graph(
                [oh.make_node("Identity", ["w"], ["v"]), oh.make_node("Cast", ["v"], ["y"], to=1)],
                "g",
                [oh.make_tensor_value_info("x", 1, [1])],
                [oh.make_tensor_value_info("y", 1, [96, 64])],
                [nh.from_array(w, "w")],
            ),
            opset_imports=[oh.make_opsetid("", 21)],
            ir_version=10,
        )
        made, facts = encoded(dense, style)
        assert facts is not None
        assert facts.tensors == 1
        x = np.zeros(1, np.float32)
        assert run(model_to_bytes(made), x) == run(dense.SerializeToString(), x)
        back = densify(load_model(model_to_bytes(made)))
        assert run(model_to_bytes(back), x) == run(dense.SerializeToString(), x)

    def test_reads_back_to_the_bytes_of_the_dense_model(self) -> None:
        w = weight(0.9)
        w[0, 0] = -0.0
        dense = model_to_bytes(load_model(product(w)))
        made, _ = encoded(product(w), SparseStyle.INITIALIZER)
        assert model_to_bytes(densify(load_model(model_to_bytes(made)))) == dense

    @pytest.mark.parametrize("place", list(ExternalData))
    def test_dense_weights_may_lie_beside_the_model(
        self, tmp_path: Path, place: ExternalData
    ) -> None:
        """The file, its dense form, and what `densify` makes of it: the same bits, the last two the same bytes."""
        proto = product(weight(0.95))
        other = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
        proto.graph.initializer.insert(0, nh.from_array(other, "other"))
        proto.graph.initializer.append(nh.from_array(other, "another"))
        for name, y in (("other", "y2"), ("another", "y3")):
            proto.graph.node.append(oh.make_node("MatMul", ["y", name], [y]))
            proto.graph.output.append(oh.make_tensor_value_info(y, 1, ["N", 32]))
        model = load_model(proto)
        form, facts = sparse_form(model, SparseStyle.INITIALIZER)
        assert facts is not None
        assert facts.tensors == 1
        made, plain, back = (tmp_path / folder / "m.onnx" for folder in "abc")
        for path in (made, plain, back):
            path.parent.mkdir()
        save_model(form, made, external=place)
        save_model(sparse_form(model, SparseStyle.DENSE)[0], plain, external=place)
        save_model(densify(load_model(made)), back, external=place)
        onnx.checker.check_model(str(made))
        x = np.random.default_rng(1).standard_normal((2, 96)).astype(np.float32)
        got, want = (ort.InferenceSession(str(path)).run(None, {"x": x}) for path in (made, plain))
        assert [a.tobytes() for a in got] == [a.tobytes() for a in want]
        for one, two in zip(
            sorted(plain.parent.iterdir()), sorted(back.parent.iterdir()), strict=True
        ):
            assert one.read_bytes() == two.read_bytes()

    def test_leaves_the_model_itself_dense_and_valid(self) -> None:
        model = load_model(product(weight(0.9)))
        made, _ = sparse_form(model, SparseStyle.INITIALIZER)
        assert made is not model
        assert not isinstance(model.graph.initializers["w"].const_value, CooTensor)
        assert check_model(model) is None

    def test_constant_carrier_passes_the_full_check(self) -> None:
        made, _ = encoded(product(weight(0.9)), SparseStyle.CONSTANT)
        onnx.checker.check_model(onnx.ModelProto.FromString(model_to_bytes(made)), full_check=True)

    def test_stores_a_weight_of_nothing_but_zeros(self) -> None:
        made, facts = encoded(product(np.zeros((96, 64), np.float32)), SparseStyle.INITIALIZER)
        data = model_to_bytes(made)
        assert facts is not None
        assert facts.tensors == 1
        assert run(data, np.ones((2, 96), np.float32)) == bytes(2 * 64 * 4)

    def test_indices_are_flat_ascending_int64(self) -> None:
        coo = as_coo(ir.Tensor(weight(0.9), name="w"), "w")
        assert coo.indices.dtype == ir.DataType.INT64
        assert coo.indices.shape.rank() == 1
        assert (np.diff(coo.indices.numpy()) > 0).all()

    def test_indices_take_a_byte_for_every_seven_bits(self) -> None:
        made, _ = encoded(product(weight(0.95)), SparseStyle.INITIALIZER)
        proto = onnx.ModelProto.FromString(model_to_bytes(made))
        indices = proto.graph.sparse_initializer[0].indices
        assert not indices.HasField("raw_data")
        assert list(indices.int64_data) == np.flatnonzero(weight(0.95)).tolist()
        assert len(model_to_bytes(made)) < 0.11 * len(product(weight(0.95)).SerializeToString())

    def test_form_of_indices_is_kept(self) -> None:
        made, _ = encoded(product(weight(0.95)), SparseStyle.INITIALIZER)
        data = model_to_bytes(made)
        assert model_to_bytes(load_model(data)) == data
        plain = onnx.ModelProto.FromString(data)
        indices = plain.graph.sparse_initializer[0].indices
        indices.raw_data = np.array(indices.int64_data).tobytes()
        indices.ClearField("int64_data")
        raw = onnx.ModelProto.FromString(model_to_bytes(load_model(plain)))
        assert raw.graph.sparse_initializer[0].indices.HasField("raw_data")

    def test_reaches_into_subgraphs(self) -> None:
        inner = product(weight(0.9)).graph
        inner.ClearField("input")
        branch = oh.make_graph([oh.make_node("Identity", ["y"], ["other"])], "else", [], [])
        branch.node[0].input[0] = "x0"
        branch.output.append(oh.make_tensor_value_info("other", 1, [2, 64]))
        graph = oh.make_graph(
            [oh.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=branch)],
            "outer",
            [
                oh.make_tensor_value_info(n, k, s)
                for n, k, s in (("c", 9, []), ("x", 1, [2, 96]), ("x0", 1, [2, 64]))
            ],
            [oh.make_tensor_value_info("z", 1, [2, 64])],
        )
        proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9)
        made, facts = encoded(proto, SparseStyle.INITIALIZER)
        assert facts is not None
        assert facts.tensors == 1
        feeds = {
            "c": np.array(True),
            "x": np.ones((2, 96), np.float32),
            "x0": np.ones((2, 64), np.float32),
        }
        got, want = (
            ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
            for data in (model_to_bytes(made), proto.SerializeToString())
        )
        assert got.tobytes() == want.tobytes()


class TestWhatStaysDense:
    @pytest.mark.parametrize(
        ("dtype", "below", "above"),
        [("float32", 0.66, 0.72), ("float16", 0.79, 0.84), ("float64", 0.5, 0.6)],
    )
    def test_weights_below_break_even(self, dtype: str, below: float, above: float) -> None:
        for zeros, expected in ((below, 0), (above, 1)):
            _, facts = encoded(product(weight(zeros, dtype=dtype)), SparseStyle.INITIALIZER)
            assert facts is not None
            assert facts.tensors == expected

    @pytest.mark.parametrize("place", ["as_output", "as_input"])
    def test_graph_inputs_and_outputs(self, place: str) -> None:
        made, facts = encoded(product(weight(0.9), **{place: True}), SparseStyle.INITIALIZER)
        assert facts is not None
        assert facts.tensors == 0
        assert not isinstance(made.graph.initializers["w"].const_value, CooTensor)

    @pytest.mark.parametrize(("size", "expected"), [(127, 0), (128, 1)])
    def test_small_weights(self, size: int, expected: int) -> None:
        made, facts = encoded(product(weight(0.9, (size, 1))), SparseStyle.INITIALIZER)
        assert (facts.tensors if facts else 0) == expected
        kept = made.graph.initializers["w"].const_value
        assert isinstance(kept, CooTensor) == bool(expected)

    @pytest.mark.parametrize("shape", [(128, 1), (16, 16), (60, 60)])
    def test_no_weights_that_would_be_larger(self, shape: tuple[int, int]) -> None:
        """Of all shares of zeros: what is written is never larger than it was dense, and smaller where it is sparse."""
        for hundredth in range(50, 100):
            proto = product(weight(hundredth / 100, shape))
            made, facts = encoded(proto, SparseStyle.INITIALIZER)
            assert facts is not None
            dense = model_to_bytes(sparse_form(load_model(proto), SparseStyle.DENSE)[0])
            assert len(model_to_bytes(made)) < len(dense) or not facts.tensors

    def test_everything_where_the_target_reads_no_sparse_weights(self) -> None:
        sparse, _ = encoded(product(weight(0.9)), SparseStyle.INITIALIZER)
        made, facts = sparse_form(sparse, SparseStyle.DENSE)
        assert not isinstance(made.graph.initializers["w"].const_value, CooTensor)
        assert facts is not None
        assert facts.stored_bytes == facts.dense_bytes

    def test_constants_of_a_model_whose_opset_has_no_sparse_value(self) -> None:
        proto = product(weight(0.9))
        proto.opset_import[0].version = 10
        made, facts = encoded(proto, SparseStyle.CONSTANT)
        assert facts is not None
        assert (facts.tensors, "from opset 11" in facts.reason) == (0, True)
        assert not any(node.op_type == "Constant" for node in made.graph)

    def test_more_than_a_model_holds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sparse, "MAX_BYTES", 1000)
        _, facts = encoded(product(weight(0.9)), SparseStyle.INITIALIZER)
        assert facts is not None
        assert (facts.tensors, "too many to lie in the model" in facts.reason) == (0, True)

    def test_files_that_would_hardly_shrink(self) -> None:
        proto = product(weight(0.9))
        other = np.random.default_rng(0).standard_normal(1 << 18).astype(np.float32)
        proto.graph.initializer.append(nh.from_array(other, "other"))
        _, facts = encoded(proto, SparseStyle.INITIALIZER)
        assert facts is not None
        assert "95 %" in facts.reason

    def test_four_bit_weights(self) -> None:
        proto = product(weight(0.9))
        packed = oh.make_tensor("q", onnx.TensorProto.INT4, [8192], bytes(4096), raw=True)
        proto.graph.initializer.append(packed)
        made, _ = encoded(proto, SparseStyle.INITIALIZER)
        assert not isinstance(made.graph.initializers["q"].const_value, CooTensor)


class TestFacts:
    def test_sizes(self) -> None:
        _, facts = encoded(product(weight(0.9)), SparseStyle.INITIALIZER)
        assert facts is not None
        assert (facts.elements, facts.zeros) == (6144, 5530)
        assert facts.dense_bytes == 6144 * 4
        index_bytes = 614 + int((np.flatnonzero(weight(0.9)) > 127).sum())
        assert facts.stored_bytes == 614 * 4 + index_bytes
        assert facts.compressed_bytes < facts.dense_bytes

    def test_says_that_zeros_save_no_time(self) -> None:
        _, facts = encoded(product(weight(0.9)), SparseStyle.INITIALIZER)
        assert facts is not None
        assert any("not the model faster" in sentence for sentence in facts.sentences())

    def test_says_what_the_file_is_made_of(self) -> None:
        proto = product(weight(0.9))
        proto.graph.initializer.append(nh.from_array(np.ones(1000, np.float32), "table"))
        proto.graph.initializer.append(nh.from_array(np.ones(10, np.float32), "small"))
        _, facts = encoded(proto, SparseStyle.INITIALIZER)
        assert facts is not None
        assert (facts.dense_left, facts.largest, facts.largest_bytes) == (4040, "table", 4000)
        assert facts.stored_bytes > facts.dense_left
        assert len(facts.sentences()) == 2  # not written yet
        sparse_bytes = facts.stored_bytes - 4040
        told = dataclasses.replace(facts, file_bytes=10 * sparse_bytes).sentences()[1]
        whole = f"{10 * sparse_bytes} bytes of the file 10% are constants stored sparse"
        assert whole in told
        assert "that stay dense (the largest, 'table', 4000 bytes)" in told
        assert told.endswith("% the graph itself")

    def test_a_dense_file_is_not_taken_apart(self) -> None:
        _, facts = encoded(product(weight(0.9)), SparseStyle.DENSE)
        assert facts is not None
        assert facts.dense_left == facts.dense_bytes
        assert len(dataclasses.replace(facts, file_bytes=50_000).sentences()) == 2

    def test_a_run_knows_the_size_of_its_file(self, tmp_path: Path) -> None:
        path = tmp_path / "s.onnx"
        report = graphopt.optimize(
            product(weight(0.9)), output=path, sparse="sparse_initializer", verify="off"
        ).report
        assert report.sparse is not None
        assert report.sparse.file_bytes == path.stat().st_size
        assert report.to_json()["sparse"]["file_bytes"] == path.stat().st_size


class TestDensify:
    def test_command_writes_the_dense_model(self, tmp_path: Path) -> None:
        made, _ = encoded(product(weight(0.9)), SparseStyle.INITIALIZER)
        save_model(made, tmp_path / "s.onnx")
        assert (
            main(["densify", str(tmp_path / "s.onnx"), "-o", str(tmp_path / "d.onnx"), "-q"]) == 0
        )
        assert (tmp_path / "d.onnx").read_bytes() == model_to_bytes(
            load_model(product(weight(0.9)))
        )

    def test_command_refuses_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        save_model(load_model(product(weight(0.9))), tmp_path / "s.onnx")
        assert (
            main(["densify", str(tmp_path / "s.onnx"), "-o", str(tmp_path / "no" / "d.onnx")]) == 2
        )


class TestKept:
    def test_what_came_dense_stays_dense_and_what_came_sparse_stays_sparse(self) -> None:
        dense = load_model(product(weight(0.9)))
        assert sparse_form(dense, SparseStyle.KEPT) == (dense, None)
        sparse, _ = encoded(product(weight(0.9)), SparseStyle.INITIALIZER)
        made, facts = sparse_form(sparse, SparseStyle.KEPT)
        assert isinstance(made.graph.initializers["w"].const_value, CooTensor)
        assert facts is not None
        assert facts.tensors == 1

    def test_what_came_in_constant_nodes_stays_in_them(self) -> None:
        made, _ = encoded(product(weight(0.9)), SparseStyle.CONSTANT)
        again = load_model(model_to_bytes(made))
        node = next(node for node in again.graph if node.op_type == "Constant")
        value = ir.Value(name="w2", const_value=node.attributes["value"].as_tensor())
        node.outputs[0].replace_all_uses_with(value)  # as passes that lift constants do
        again.graph.remove(node, safe=True)
        again.graph.register_initializer(value)
        kept, _ = sparse_form(again, SparseStyle.KEPT)
        held = [node for node in kept.graph if node.op_type == "Constant"]
        assert isinstance(held[0].attributes["value"].as_tensor(), CooTensor)
        onnx.checker.check_model(onnx.load_from_string(model_to_bytes(kept)), full_check=True)
        other, _ = encoded(product(weight(0.9)), SparseStyle.INITIALIZER)
        read, _ = sparse_form(load_model(model_to_bytes(other)), SparseStyle.KEPT)
        assert isinstance(read.graph.initializers["w"].const_value, CooTensor)


@pytest.mark.parametrize(
    ("style", "patterns", "pays"),
    [
        (SparseStyle.DENSE, [(2, 4)], True),
        (SparseStyle.DENSE, [(1, 4), (2, 4)], True),
        (SparseStyle.DENSE, [(2, 40)], False),
        (SparseStyle.DENSE, [], False),
        (SparseStyle.INITIALIZER, [(2, 4)], False),
    ],
)
def test_sparse_tensor_cores_are_asked_for_where_two_of_four_were(
    style: SparseStyle, patterns: list[tuple[int, int]], *, pays: bool
) -> None:
    assert is_two_of_four(style, patterns) is pays
