"""Which weights sparse tensor cores can read, along which axis, and what keeps them from the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser

import graphopt
from graphopt.report.html import run_html
from graphopt.report.markdown import run_markdown
from graphopt.report.patterns import Asked, PatternLayer, pattern_layers, patterns_asked
from graphopt.rewrite.context import Remark, RemarkKind


def halved(shape: tuple[int, ...], axis: int) -> np.ndarray[Any, Any]:
    """Ones, two of four zero along an axis."""
    place = np.arange(shape[axis]) % 4 < 2
    return np.broadcast_to(
        place.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape
    ).astype(np.float32)


def rows(
    node: str, weight: np.ndarray[Any, Any], *remarks: Remark, before: str = ""
) -> tuple[PatternLayer, ...]:
    """The table of a graph of one node that multiplies by `w`."""
    text = f"""
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[N] x) => (float[M] y) {{ {before} y = {node} }}
    """
    model = parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    return pattern_layers(ir.from_proto(model), [Asked((2, 4))], remarks)


@pytest.mark.parametrize(
    ("node", "shape", "axis", "about"),
    [
        ("Conv (x, w)", (8, 12, 3, 3), 1, ("C", 12, 8, 4)),
        ("com.microsoft.FusedConv (x, w)", (16, 32, 1, 1), 1, ("C", 32, 16, 32)),
        ("Gemm (x, w)", (16, 6), 0, ("K", 16, 6, 16)),
        ("Gemm <transB = 1> (x, w)", (6, 128), 1, ("K", 128, 6, 64)),
        ("MatMul (x, w)", (8, 6), 0, ("K", 8, 6, 8)),
        ("MatMul (x, w)", (3, 8, 5), 1, ("K", 8, 5, 8)),
    ],
)
def test_the_axis_is_what_a_product_sums_over(
    node: str, shape: tuple[int, ...], axis: int, about: tuple[str, int, int, int]
) -> None:
    (row,) = rows(node, halved(shape, axis))
    assert (row.axis, row.inputs, row.outputs, row.multiple) == about
    assert row.eligible
    assert row.following == 1.0
    assert row.why_not == ""


@pytest.mark.parametrize(
    ("node", "shape"), [("Conv (x, w)", (8, 12, 3, 3)), ("Gemm (x, w)", (16, 8))]
)
def test_zeros_along_another_axis_do_not_count(node: str, shape: tuple[int, ...]) -> None:
    (row,) = rows(node, halved(shape, 1 if node[0] == "G" else 0))
    assert not row.eligible
    assert row.following == 0.5
    assert row.why_not == "50.0% of its groups of 4 have at most 2 weights"


@pytest.mark.parametrize(
    ("node", "shape", "why"),
    [
        ("Conv <group = 2> (x, w)", (8, 4, 3, 3), "a convolution of 2 groups"),
        ("Conv (x, w)", (8, 3, 3, 3), "3 inputs are no multiple of 4"),
        ("MatMul (x, w)", (6, 8), "6 inputs are no multiple of 4"),
        ("ConvTranspose (x, w)", (8, 4, 3, 3), "not for ConvTranspose"),
        ("GRU <hidden_size = 4> (x, w, w)", (1, 12, 4), "not for GRU"),
    ],
)
def test_what_no_sparse_kernel_takes_says_why(node: str, shape: tuple[int, ...], why: str) -> None:
    for row in rows(node, np.zeros(shape, np.float32)):
        assert not row.eligible
        assert why in row.why_not


def test_a_dense_layer_says_why_it_stayed_so() -> None:
    stays = Remark(RemarkKind.MISSED, "prune", "weights", "y", "stays dense: it is narrow", "")
    other = Remark(RemarkKind.NOTE, "prune", "weights", "y", "of no interest", "")
    (row,) = rows("Gemm (x, w)", np.ones((8, 8), np.float32), stays, other)
    assert row.why_not == "0.0% of its groups of 4 have at most 2 weights: it is narrow"


def test_weights_are_seen_through_their_dequantisation() -> None:
    codes = halved((8, 4), 0).astype(np.int8)
    dequantised = "s = Constant <value_float = 0.5> () d = DequantizeLinear (w, s)"
    (row,) = rows("Gemm (x, d)", codes, before=dequantised)
    assert row.eligible
    assert (row.weight, row.note) == ("w", "fewer than 256 inputs; Q/DQ")
    shifted = """s = Constant <value_float = 0.5> () z = Constant <value = int8 {1}> ()
                 d = DequantizeLinear (w, s, z)"""
    assert rows("Gemm (x, d)", codes, before=shifted) == ()


@pytest.mark.parametrize(
    ("node", "shape", "note"),
    [
        ("Gemm (x, w)", (256, 4), ""),
        ("Gemm (x, w)", (252, 4), "fewer than 256 inputs"),
        ("MatMul (x, w)", (256, 4), "MatMul"),
    ],
)
def test_notes_say_what_keeps_kernels_from_being_picked(
    node: str, shape: tuple[int, ...], note: str
) -> None:
    assert rows(node, halved(shape, 0))[0].note == note


def test_computed_and_overridable_weights_have_no_row() -> None:
    assert rows("MatMul (x, x)", np.ones((4, 4), np.float32)) == ()
    text = """<ir_version: 10, opset_import: ["" : 21]>
              g (float[N, 4] x, float[4, 4] w) => (float[N, 4] y) { y = MatMul (x, w) }"""
    model = parser.parse_model(text)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "w"))
    assert pattern_layers(ir.from_proto(model), [Asked((2, 4))]) == ()


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["2:4"], [Asked((2, 4))]),
        (["4:8,method=wanda"], [Asked((4, 8))]),
        ([" 2:4 ", "2:4"], [Asked((2, 4))]),
        (["0.8", "1:4"], [Asked((1, 4))]),
        (["0.8,layer=^a:2:4"], [Asked((2, 4), "^a")]),
        (["2:4,layer=b:4:8,layer=c:0.5"], [Asked((2, 4)), Asked((4, 8), "b")]),
        (["0.8"], []),
        (["channels:0.5"], []),
        (["0.8,layer=^a:0.5"], []),
        (["", None], []),
    ],
)
def test_the_patterns_of_requests(texts: list[str | None], found: list[Asked]) -> None:
    assert patterns_asked(texts) == tuple(found)


def test_of_several_patterns_the_one_that_a_weight_follows_counts() -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
           g (float[N, 8] x) => (float[N, 8] y) { h = Gemm (x, a) i = Gemm (h, b) y = Gemm (i, c) }"""
    )
    thin = halved((8, 8), 0) * (np.arange(8) % 4 < 1)[:, None]
    for name, weight in (("a", thin), ("b", halved((8, 8), 0)), ("c", np.ones((8, 8)))):
        held = numpy_helper.from_array(weight.astype(np.float32), name)
        model.graph.initializer.append(held)
    asked = [Asked((2, 4)), Asked((1, 4), "a")]
    found = pattern_layers(ir.from_proto(model), asked)
    assert [(row.pattern, row.eligible) for row in found] == [
        ("1:4", True),
        ("2:4", True),
        ("2:4", False),
    ]
    others = pattern_layers(ir.from_proto(model), [Asked((1, 4), "a"), Asked((2, 4), "z")])
    assert [row.pattern for row in others] == ["1:4", "2:4", "2:4"]


def test_a_pattern_that_a_pass_is_given_is_listed_too() -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
           g (float[N, 64] x) => (float[N, 64] y) { h = Gemm (x, a) r = Relu (h) y = Gemm (r, b) }"""
    )
    rng = np.random.default_rng(0)
    for name in "ab":
        weight = rng.normal(size=(64, 64)).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    report = graphopt.optimize(model, passes=["prune{sparsity=2:4}"], verify="off").report
    assert [(row.pattern, row.eligible) for row in report.pattern_layers] == [("2:4", True)] * 2
    assert "100.0% of 2:4" in run_markdown(report)
    assert "100.0 % of 2:4" in run_html(report)


def test_a_run_lists_the_layers_in_json_and_in_markdown(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["" : 21]>
           g (float[N, 64] x) => (float[N, 10] y)
           { h = Gemm (x, a) r = Relu (h) i = Gemm (r, b) s = Relu (i) y = Gemm (s, c) }"""
    )
    for name, shape in (("a", (64, 64)), ("b", (64, 64)), ("c", (64, 10))):
        weight = rng.normal(size=shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weight, name))
    np.savez(tmp_path / "s.npz", x=rng.normal(size=(32, 64)).astype(np.float32))
    report = graphopt.optimize(
        model, sparsity="2:4", calibration=tmp_path / "s.npz", verify="off", target="tensorrt"
    ).report
    table = {row["weight"]: row for row in report.to_json()["pattern_layers"]}
    assert [table[name]["eligible"] for name in "abc"] == [True, True, False]
    assert "weights" in table["c"]["why_not"]
    assert "## Weights for sparse tensor cores" in run_markdown(report)
    assert "Weights for sparse tensor cores (2 of 3)" in run_html(report)
    plain = graphopt.optimize(model, sparsity="0.5", verify="off").report
    assert plain.pattern_layers == ()
    assert "sparse tensor cores" not in run_markdown(plain) + run_html(plain)
