"""Weights of recurrent operators: zeros, fitted to what the operator returned before."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.helper as oh
import onnx.numpy_helper as nh
import onnxruntime as ort
import pytest
from graphopt_passes.prune import Prune
from graphopt_passes.prune.recurrent import find_recurrent

from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.rewrite import Calibration, Context, Gate, Options
from graphopt.targets import get_target

HIDDEN, INPUTS = 40, 16
GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}


def recurrent(
    op: str = "GRU", directions: int = 1, outputs: str = "Y h", **more: Any
) -> onnx.ModelProto:
    """x -> a recurrent operator -> a product."""
    rng = np.random.default_rng(0)
    gates = GATES[op] * HIDDEN

    def weight(*shape: int) -> np.ndarray[Any, Any]:
        array = rng.standard_normal(shape) / np.sqrt(shape[-1])
        return np.asarray(array, np.float32)

    held = {
        "W": 2 * weight(directions, gates, INPUTS),
        "R": weight(directions, gates, HIDDEN),
        "B": 0.3 * weight(directions, 2 * gates),
        "v": weight(directions * HIDDEN, 20),
        "shape": np.array([0, 0, -1]),
    }
    way = "bidirectional" if directions == 2 else "forward"
    names = outputs.replace("-", "").split(" ")
    nodes = [
        oh.make_node(op, ["x", "W", "R", "B"], names, hidden_size=HIDDEN, direction=way, **more),
        oh.make_node("Transpose", [names[0] or names[1]], ["t"], perm=[0, 2, 1, 3])
        if names[0]
        else oh.make_node("Unsqueeze", ["h", "zero"], ["t"]),
        oh.make_node("Reshape", ["t", "shape"], ["f"]),
        oh.make_node("MatMul", ["f", "v"], ["y"]),
    ]
    if not names[0]:
        held["zero"] = np.array([2])
    graph = oh.make_graph(
        nodes,
        "g",
        [oh.make_tensor_value_info("x", 1, ["T", "N", INPUTS])],
        [oh.make_tensor_value_info("y", 1, None)],
        [nh.from_array(array, name) for name, array in held.items()],
    )
    return oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)


def feeds(count: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    mixed = np.random.default_rng(9).standard_normal((5, INPUTS))
    steps = (np.cumsum(rng.standard_normal((12, 2, 5)), 0) for _ in range(count))
    return [{"x": (np.tanh(0.4 * each) @ mixed).astype(np.float32)} for each in steps]


def context(model: Any, sparsity: str, *, blind: bool = False) -> Context:
    calibration = None if blind else Calibration(feeds(24, 0))
    ctx = Context(
        model, get_target("cpu"), Options(sparsity=sparsity, calibration=calibration), Gate()
    )
    ctx.pass_name = "prune"
    return ctx


def pruned(proto: onnx.ModelProto, *, blind: bool = False) -> tuple[float, dict[str, float]]:
    """Error on other inputs, RMS over RMS, and the share of zeros of each weight."""
    model = load_model(proto)
    assert Prune().run(model, context(model, "0.75", blind=blind))
    before, after = (
        np.concatenate([ort.InferenceSession(data).run(None, feed)[0] for feed in feeds(8, 1)])
        for data in (proto.SerializeToString(), model_to_bytes(model))
    )
    held = model.graph.initializers
    zeros = {
        n: float(np.mean(v.const_value.numpy() == 0)) for n, v in held.items() if v.const_value
    }
    return float(np.sqrt(np.mean((after - before) ** 2) / np.mean(before**2))), zeros


@pytest.mark.parametrize("op", list(GATES))
@pytest.mark.parametrize("directions", [1, 2])
def test_both_weights_lose_most_and_are_fitted(op: str, directions: int) -> None:
    proto = recurrent(op, directions)
    error, zeros = pruned(proto)
    blind, _ = pruned(proto, blind=True)
    assert zeros["R"] > 0.5
    assert op == "RNN" or zeros["W"] > 0.5  # of an RNN it is small
    assert error < 0.85 * blind


@pytest.mark.parametrize("op", list(GATES))
def test_hidden_states_that_nobody_gets_are_looked_at_all_the_same(op: str) -> None:
    proto = recurrent(op, outputs="- h")
    error, zeros = pruned(proto)
    blind, _ = pruned(proto, blind=True)
    assert zeros["R"] > 0.5
    assert error < 0.85 * blind


def test_what_was_not_returned_is_not_returned_afterwards() -> None:
    model = load_model(recurrent(outputs="- h"))
    assert Prune().run(model, context(model, "0.5"))
    (node,) = [node for node in model.graph if node.op_type == "GRU"]
    assert [value.name for value in node.outputs] == ["", "h"]
    assert node.outputs[0].type is None


def test_what_is_shared_or_named_stays_dense() -> None:
    proto = recurrent()
    layers = find_recurrent(load_model(proto).graph, "^W$")
    assert {layer.name: layer.dense for layer in layers} == {"W": "asked for", "R": ""}
    proto.graph.node.add().CopyFrom(oh.make_node("Identity", ["R"], ["other"]))
    proto.graph.output.add().CopyFrom(oh.make_tensor_value_info("other", 1, None))
    named = {layer.name: layer.dense for layer in find_recurrent(load_model(proto).graph)}
    assert named == {"W": "", "R": "its weight has other uses"}


def test_batches_on_the_first_axis_are_left_alone() -> None:
    proto = recurrent(layout=1)
    assert find_recurrent(load_model(proto).graph) == []


def test_patterns_are_for_products_and_convolutions_alone() -> None:
    model = load_model(recurrent())
    ctx = context(model, "2:4")
    Prune().run(model, ctx)
    held = model.graph.initializers
    assert all(np.all(held[name].const_value.numpy() != 0) for name in "WR")  # type: ignore[union-attr]
