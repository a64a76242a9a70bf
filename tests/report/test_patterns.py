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
from graphopt.report.patterns import PatternLayer, pattern_layers, pattern_of
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
    return pattern_layers(ir.from_proto(model), (2, 4), remarks)


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
    assert pattern_layers(ir.from_proto(model), (2, 4)) == ()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("2:4", (2, 4)),
        ("4:8,method=wanda", (4, 8)),
        (" 2:4 ", (2, 4)),
        ("0.8", None),
        ("channels:0.5", None),
        ("0.8,layer=^a:0.5", None),
        ("", None),
        (None, None),
    ],
)
def test_the_pattern_of_a_request(text: str | None, found: tuple[int, int] | None) -> None:
    assert pattern_of(text) == found


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
