"""The text of a structure: the same under other names and weights, another under another graph."""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir

from graphopt.verify.structure import op_histogram, structure

HEAD = '<ir_version: 10, opset_import: ["my" : 1, "" : 17]>'
TEXT = """g (float[n,4] x, bool c) => (float[n,4] y) <float[3] k = {1, 2, 3}, float[9] w = {1,2,3,4,5,6,7,8,9}>
   { a = Add(x, k) b = my.f<alpha = 0.5, axes = [1, 2]>(a, , w)
     y = If (c) <then_branch = t () => (float[n,4] p) { p = Neg(b) },
                 else_branch = e () => (float[n,4] q) { q = Clip(b, , k) }> }
   <domain: "my", opset_import: ["" : 17]> f <alpha, axes> (u, v, w) => (z)
   { d = Constant<value_float = 2.0>() h = LeakyRelu<alpha: float = @alpha>(u) z = Mul(h, d) }"""


def text(source: str) -> str:
    return structure(ir.from_proto(onnx.parser.parse_model(HEAD + source)))


def test_a_structure_reads_as_a_program() -> None:
    assert text(TEXT).splitlines() == [
        "opset ai.onnx 17",
        "opset my 1",
        "main ('x' float[n,4], 'c' bool[])",
        "  %3 = Add('x', float[3]{1, 2, 3})",
        "  %4 = my::f<alpha=0.5, axes=(1, 2)>(%3, , float[9])",
        "  'y' = If('c')",
        "    body ()",
        "      %5 = Neg(%4)",
        "      return %5",
        "    body ()",
        "      %6 = Clip(%4, , float[3]{1, 2, 3})",
        "      return %6",
        "  return 'y'",
        "function my::f (%0 undefined[?], %1 undefined[?], %2 undefined[?])",
        "  %3 = LeakyRelu<alpha=@alpha>(%0)",
        "  %4 = Mul(%3, float[]{2})",
        "  return %4",
    ]


def test_names_and_large_weights_do_not_show() -> None:
    renamed = (
        TEXT.replace("a = Add", "other = Add").replace("(a, ,", "(other, ,").replace("9}", "0}")
    )
    assert text(renamed) == text(TEXT)
    assert text(TEXT.replace("Neg", "Abs")) != text(TEXT)
    assert text(TEXT.replace("{1, 2, 3}", "{1, 2, 4}")) != text(TEXT)


def test_operators_are_counted_everywhere() -> None:
    counts = op_histogram(ir.from_proto(onnx.parser.parse_model(HEAD + TEXT)))
    assert counts == {
        "Add": 1, "Clip": 1, "Constant": 1, "If": 1, "LeakyRelu": 1, "Mul": 1, "Neg": 1, "my::f": 1,
    }  # fmt: skip


def test_attributes_of_every_sort_are_written() -> None:
    source = """g (float[4] x) => (float[4] y)
              { a = Scaler<scale = [0.1, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]>(x)
                b = Named<name = "text", long = "LONG">(a)
                y = ConstantOfShape<value = int64[1] {7}>(b) }"""
    lines = text(source.replace("LONG", 81 * "x")).splitlines()
    assert "scale=[0.1, 1, 2, 3, 4, 5, 6, 7, …]" in lines[3]
    assert "name=text" in lines[4]
    assert "…" in lines[4]
    assert "value=int64[1]{7}" in lines[5]
