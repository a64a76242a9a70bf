"""Rows that are masked throughout: attention stays half, because what meets the mask there is made zero."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from graphopt.rewrite import Options
from tests.passes.precision.casting import Array, cast, error, halves, normal

LOW = float(np.finfo(np.float32).min)
ATTENTION = (
    "g (bool[2,1,1,8] m, float[2,2,8,16] q, float[2,2,8,16] k) => (float[2,2,8,16] y)"
    "{ z = Where(m, zero, low) w = Expand(z, over) y = Attention(q, k, k, w) }"
)
WRITTEN_OUT = (
    "g (bool[2,1,1,8] m, float[2,2,8,16] q, float[2,2,8,16] k) => (float[2,2,8,16] y)"
    "{ z = Where(m, zero, low) t = Transpose<perm=[0,1,3,2]>(k) s = MatMul(q, t) a = Add(s, z)"
    "  p = Softmax<axis=-1>(a) y = MatMul(p, k) }"
)
FLAT = (
    "g (bool[2,1,1,8] m, float[2,8,32] q, float[2,8,32] k) => (float[2,8,32] y)"
    "{ z = Where(m, zero, low) w = Expand(z, over)"
    "  y = Attention<q_num_heads=2, kv_num_heads=2>(q, k, k, w) }"
)


def constants(low: float = -1e30) -> dict[str, Array]:
    numbers = {"zero": 0.0, "low": low}
    held = {name: np.array(number, np.float32) for name, number in numbers.items()}
    return held | {"over": np.array([8, 1])}


def feeds(*dims: int) -> dict[str, Array]:
    mask = np.array([[1] * 5 + [0] * 3, [0] * 8], bool).reshape(2, 1, 1, 8)
    return {"m": mask, "q": normal(*dims, scale=2), "k": normal(*dims)}


@pytest.mark.parametrize(("text", "reader"), [(ATTENTION, "Attention"), (WRITTEN_OUT, "Softmax")])
def test_scores_of_hidden_rows_become_zero(text: str, reader: str) -> None:
    model, ctx, proto = cast(text, opset=23, constants=constants())
    assert {reader, "ReduceMax", "Mul"} <= set(halves(model))
    assert any(rewrite.rule == "guard-masked-rows" for rewrite in ctx.rewrites)
    assert error(model, proto, feeds(2, 2, 8, 16)) < 0.01


def test_axes_of_an_older_opset_are_an_attribute() -> None:
    model, _, proto = cast(WRITTEN_OUT, opset=17, constants=constants())
    assert "ReduceMax" in halves(model)
    assert error(model, proto, feeds(2, 2, 8, 16)) < 0.01


def test_queries_without_an_axis_of_heads() -> None:
    model, _, proto = cast(FLAT, opset=23, constants=constants())
    assert {"Attention", "Mul"} <= set(halves(model))
    assert "Squeeze" in [node.op_type for node in model.graph]
    assert error(model, proto, feeds(2, 8, 32)) < 0.01


@pytest.mark.parametrize("low", [-1e4, -1e5])
def test_a_mask_that_swallows_nothing_needs_no_guard(low: float) -> None:
    model, _, _ = cast(ATTENTION, opset=23, constants=constants(low))
    assert halves(model) == ["Where", "Expand", "Attention"]


def test_bfloat16_swallows_by_itself() -> None:
    model, _, proto = cast(ATTENTION, precision="bf16", opset=23, constants=constants())
    assert halves(model) == ["Where", "Expand", "Attention"]
    assert error(model, proto, feeds(2, 2, 8, 16)) < 0.06


def test_a_mask_that_follows_from_sizes_hides_no_row() -> None:
    text = (
        "g (float[N,N] x, float[N,16] v) => (float[N,16] y)"
        "{ s = Shape(x) l = ConstantOfShape<value = float[1] {-1e30}>(s) c = Trilu<upper=1>(l, one)"
        "  a = Add(x, c) p = Softmax<axis=-1>(a) y = MatMul(p, v) }"
    )
    _, ctx, _ = cast(text, constants={"one": np.array(1)})
    assert not any(rewrite.rule == "guard-masked-rows" for rewrite in ctx.rewrites)


def test_a_mask_of_each_head_beside_flat_queries_is_left_alone() -> None:
    text = FLAT.replace("bool[2,1,1,8]", "bool[2,2,8,8]").replace(
        "w = Expand(z, over)", "w = Identity(z)"
    )
    _, ctx, _ = cast(text, opset=23, constants=constants())
    assert not any(rewrite.rule == "guard-masked-rows" for rewrite in ctx.rewrites)


def test_a_guard_goes_where_its_reader_stays_float32(tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    cast(ATTENTION, opset=23, constants=constants(), options=Options(save_plan=plan))
    body = json.loads(plan.read_text())
    entry = next(each for each in body["nodes"] if each["operator"] == "Attention")
    entry["dtype"] = "float32"
    plan.write_text(json.dumps(body))
    options = Options(plan=plan)
    model, _, proto = cast(ATTENTION, opset=23, constants=constants(), options=options)
    assert "Mul" not in [node.op_type for node in model.graph]
    assert error(model, proto, feeds(2, 2, 8, 16)) < 1e-5
