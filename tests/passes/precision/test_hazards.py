"""Every trap, with the whole pipeline: valid, same inputs and outputs, right in true half precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.driver import optimize
from graphopt.ir.model_file import model_to_bytes
from graphopt.ir.scopes import all_graphs, is_sorted
from graphopt.runtime.emulate import emulate
from graphopt.runtime.session import Session
from tests.passes.precision.hazards import (
    HAZARDS,
    Array,
    shared_by_blocked_and_free,
    unnamed,
)

TOLERANCE = {"fp16": 0.01, "bf16": 0.06}
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
STAY = {
    "softmax_written_out",
    "a_sum_of_many",
    "a_table_of_large_embeddings",
    "qdq_with_a_small_scale",
}
"""What a half cannot hold on inputs as large as those generated, or gains nothing."""


def contract(proto: onnx.ModelProto) -> list[tuple[str, bytes]]:
    return [(v.name, v.type.SerializeToString()) for v in (*proto.graph.input, *proto.graph.output)]


def check(proto: onnx.ModelProto, feeds: dict[str, Array], precision: str) -> ir.Model:
    """The model in half: valid, sorted, with the same inputs and outputs, and within the tolerance."""
    made = optimize(proto, target="cuda", precision=precision, verify="off").model
    written = ir.to_proto(made)
    onnx.checker.check_model(written, full_check=True)
    assert all(is_sorted(scope.graph) for scope in all_graphs(made))
    assert contract(written) == contract(proto)
    reference = Session(proto.SerializeToString()).run(feeds)
    got = Session(model_to_bytes(emulate(made))).run(feeds)
    for name, expected in reference.items():
        compare(name, expected, got[name], TOLERANCE[precision])
    return made


def compare(name: str, expected: Any, found: Any, tolerance: float) -> None:
    if expected.dtype.kind != "f":
        assert np.array_equal(expected, found), name
        return
    finite = np.isfinite(expected)
    assert np.array_equal(finite, np.isfinite(found)), name
    scale = float(np.sqrt(np.mean(np.square(expected[finite], dtype=np.float64)))) or 1.0
    assert float(np.abs(expected - found)[finite].max()) <= tolerance * scale, name


def has_halves(model: ir.Model) -> bool:
    return any(
        value.dtype in HALVES
        for scope in all_graphs(model)
        for node in scope.graph
        for value in node.outputs
        if node.op_type != "Cast"
    )


@pytest.mark.parametrize("name", HAZARDS)
def test_every_trap_in_float16(name: str) -> None:
    hazard = HAZARDS[name]
    made = check(hazard.proto(), hazard.feeds, "fp16")
    assert has_halves(made) == (name not in STAY)


@pytest.mark.parametrize("name", HAZARDS)
def test_every_trap_in_bfloat16(name: str) -> None:
    hazard = HAZARDS[name]
    check(hazard.proto(), hazard.feeds, "bf16")


def test_nodes_without_names() -> None:
    made = check(unnamed(), HAZARDS["a_constant_of_a_shape"].feeds, "fp16")
    names = [node.name for scope in all_graphs(made) for node in scope.graph if node.name]
    assert len(names) == len(set(names))


def test_a_weight_that_both_kinds_of_nodes_read() -> None:
    proto, feeds = shared_by_blocked_and_free()
    assert has_halves(check(proto, feeds, "fp16"))
