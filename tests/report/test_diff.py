from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.report.diff import ModelDiff, diff_json, diff_models, grouped
from graphopt.report.outline import diff_outline

W = "float[16] w = {" + ", ".join(map(str, range(16))) + "}"
V = "float[16] v = {" + ", ".join(map(str, range(16, 32))) + "}"


def load(text: str, opset: int = 18) -> ir.Model:
    text = (
        text if text.startswith("<") else f'<ir_version: 9, opset_import: ["" : {opset}]>\n{text}'
    )
    return ir.from_proto(onnx.parser.parse_model(text))


def diff(a: str, b: str) -> ModelDiff:
    return diff_models(load(a), load(b))


BASE = f"""g (float[16] x) => (float[16] y) <{W}, {V}> {{
  a = Add(x, w)  b = Relu(a)  c = Mul(b, v)  y = Sigmoid(c)
}}"""


def test_a_model_equals_itself() -> None:
    found = diff(BASE, BASE)
    assert found.equal
    assert found.matched == 4
    assert diff_outline(found) == [("no difference: 4 nodes match", ())]


def test_names_storage_of_constants_and_order_of_operands_do_not_matter() -> None:
    other = f"""g (float[16] x) => (float[16] y) <{V}> {{
      k = Constant<value = float[16] {{{", ".join(map(str, range(16)))}}}>()
      q = Add(k, x)  r = Relu(q)  s = Mul(v, r)  y = Sigmoid(s)
    }}"""
    assert diff(BASE, other).equal


def test_the_default_of_an_attribute_may_be_spelled_out() -> None:
    a = "g (float[2,3] x) => (float[2,3] y) { y = Softmax(x) }"
    assert diff(a, a.replace("Softmax(", "Softmax<axis = -1>(")).equal


def test_a_removed_node_is_named_with_its_place() -> None:
    found = diff(BASE, BASE.replace("b = Relu(a)  c = Mul(b, v)", "c = Mul(a, v)"))
    (gone,) = found.replacements
    assert (gone.removed, gone.added, gone.at) == (("Relu",), (), "b")
    assert found.matched == 3
    assert found.operators == {"Relu": (1, 0)}
    assert not found.nodes
    assert not found.equal


def test_an_added_node_is_named() -> None:
    found = diff(BASE.replace("b = Relu(a)  c = Mul(b, v)", "c = Mul(a, v)"), BASE)
    assert [(r.removed, r.added) for r in found.replacements] == [((), ("Relu",))]


def test_a_fusion_is_one_replacement() -> None:
    a = f"""g (float[4,16] x) => (float[4,16] y) <{W}> {{
      p = Add(x, w)  s = Sigmoid(p)  m = Mul(p, s)  y = Neg(m)
    }}"""
    b = f"""g (float[4,16] x) => (float[4,16] y) <{W}> {{ p = Add(x, w)  m = Swish(p)  y = Neg(m) }}"""
    (change,) = diff_models(load(a, 24), load(b, 24)).replacements
    assert (change.removed, change.added) == (("Sigmoid", "Mul"), ("Swish",))


def layers(count: int, body: str) -> str:
    lines, weights, last = [], [], "x"
    for i in range(count):
        weights.append(f"float[16] w{i} = {{{', '.join(str(i * 16 + j) for j in range(16))}}}")
        lines.append(f"a{i} = Add({last}, w{i})")
        lines.append(body.format(i=i, x=f"a{i}", y=f"b{i}"))
        last = f"b{i}"
    return f"g (float[16] x) => (float[16] y) <{', '.join(weights)}> {{ {' '.join(lines)} y = Identity({last}) }}"


def test_fusions_in_every_layer_are_found_and_grouped() -> None:
    a = load(layers(6, "s{i} = Sigmoid({x}) {y} = Mul({x}, s{i})"), 24)
    b = load(layers(6, "{y} = Swish({x})"), 24)
    found = diff_models(a, b)
    assert found.matched == 7
    ((change, times),) = grouped(found.replacements)
    assert times == 6
    assert sorted(change.removed) == ["Mul", "Sigmoid"]
    heading, lines = next(part for part in diff_outline(found) if part[0].startswith("nodes"))
    assert heading == "nodes: 7 match, 12 removed, 6 added"
    assert lines[0].startswith("6 × Sigmoid, Mul → Swish   e.g. at ")  # noqa: RUF001


def test_a_changed_attribute_is_told_with_both_values() -> None:
    a = "g (float[2,3] x) => (float[2,3] y) { y = LeakyRelu<alpha = 0.5>(x) }"
    (change,) = diff(a, a.replace("0.5", "0.25")).nodes
    assert (change.kind, change.operator, change.what, change.before, change.after) == (
        "attribute", "LeakyRelu", "alpha", "0.5", "0.25",
    )  # fmt: skip


def test_a_changed_constant_is_measured() -> None:
    found = diff(BASE, BASE.replace("w = {0, 1,", "w = {0, 3,"))
    (change,) = found.constants
    assert (change.name, change.changed) == ("w", 1 / 16)
    assert change.max_abs == pytest.approx(2.0)
    assert change.sqnr_db == pytest.approx(10 * np.log10(sum(i * i for i in range(16)) / 4))
    assert not found.replacements
    assert any("max|d| 2, SQNR" in line for _, lines in diff_outline(found) for line in lines)


def test_a_constant_of_another_dtype_is_told_by_its_type() -> None:
    a = "g (float[2] x) => (float[2] y) <int64[1] s = {2}> { y = Reshape(x, s) }"
    found = diff(a, a.replace("int64[1] s = {2}", "int64[2] s = {2, 1}").replace("y = R", "z = R"))
    assert [(c.before, c.after, c.max_abs) for c in found.constants] == [
        ("int64[1]", "int64[2]", None)
    ]


def test_changed_strings_are_no_numbers() -> None:
    a = 'g (string[1] x) => (bool[1] y) { c = Constant<value_strings = ["a"]>() y = Equal(x, c) }'
    (change,) = diff_models(load(a, 19), load(a.replace('"a"', '"b"'), 19)).constants
    assert (change.max_abs, change.changed) == (None, None)


def test_inputs_and_outputs_are_compared_by_name_order_and_type() -> None:
    a = "g (float[N] x, float[N] z) => (float[N] y) { y = Add(x, z) }"
    b = "g (float[N] z, float[M] x) => (float[N] q) { q = Add(x, z) }"
    told = {(p.side, p.name, p.before, p.after) for p in diff(a, b).ports}
    assert told == {
        ("input", "x", "float[N]", "float[M]"),
        ("input", "order", "x, z", "z, x"),
        ("output", "y", "float[N]", None),
        ("output", "q", None, "float[N]"),
    }


def test_a_renamed_input_is_matched_by_position() -> None:
    found = diff(BASE, BASE.replace("float[16] x", "float[16] in").replace("Add(x", "Add(in"))
    assert found.matched == 4
    assert {p.name for p in found.ports} == {"x", "in"}
    assert not found.nodes


def test_a_node_that_takes_another_value_is_told() -> None:
    a = "g (float[2] x, float[2] z) => (float[2] y) { a = Exp(x) b = Log(z) y = Sub(a, b) }"
    found = diff(a, a.replace("Sub(a, b)", "Sub(b, a)"))
    assert {(c.what, c.before, c.after) for c in found.nodes} == {
        ("input 0", "'a' of Exp", "'b' of Log"),
        ("input 1", "'b' of Log", "'a' of Exp"),
    }


def test_outputs_that_come_from_elsewhere_are_told() -> None:
    a = "g (float[2] x) => (float[2] y, float[2] z) { y = Exp(x) z = Log(x) }"
    b = "g (float[2] x) => (float[2] y, float[2] z) { z = Exp(x) y = Log(x) }"
    assert {c.what for c in diff(a, b).nodes} == {"output 0", "output 1"}


def test_a_folded_region_is_told_as_removed() -> None:
    a = f"g (float[16] x) => (float[16] y) <{W}> {{ k = Exp(w) n = Neg(k) y = Add(x, n) }}"
    b = f"g (float[16] x) => (float[16] y) <{W}> {{ y = Add(x, w) }}"
    found = diff(a, b)
    assert [(r.removed, r.added) for r in found.replacements] == [(("Exp", "Neg"), ())]


def test_types_opsets_and_functions() -> None:
    a = """<ir_version: 9, opset_import: ["" : 18, "f" : 1]>
    g (float[N] x) => (float[N] y) <float[N] a> { a = f.h(x) y = Neg(a) }
    <domain: "f", opset_import: ["" : 18]> h (u) => (v) { v = Exp(u) }"""
    b = """<ir_version: 9, opset_import: ["" : 20, "f" : 1]>
    g (float[N] x) => (float[N] y) <float[4] a> { a = f.h(x) y = Neg(a) }
    <domain: "f", opset_import: ["" : 18]> h (u) => (v) { v = Log(u) }
    <domain: "f", opset_import: ["" : 18]> k (u) => (v) { v = Log(u) }"""
    found = diff(a, b)
    assert found.opsets == {"ai.onnx": (18, 20)}
    assert found.functions == {"f::k": 1}
    assert [(c.kind, c.before, c.after) for c in found.nodes if c.kind == "type"] == [
        ("type", "float[N]", "float[4]")
    ]
    assert [(r.graph, r.removed, r.added) for r in found.replacements] == [
        ("function f::h", ("Exp",), ("Log",))
    ]


IF = """g (bool c, float[2] x) => (float[2] y) {
  z = Exp(x)
  y = If(c) <then_branch = t () => (float[2] a) { a = Neg(z) }, else_branch = e () => (float[2] b) { b = Abs(z) }>
}"""


def test_subgraphs_are_compared() -> None:
    assert diff(IF, IF.replace(" z ", " q ").replace("(z)", "(q)")).equal
    found = diff(IF, IF.replace("Abs(z)", "Sqrt(z)"))
    (change,) = found.replacements
    assert change.graph == "main/If (-> y)"
    assert (change.removed, change.added) == (("Abs",), ("Sqrt",))


def test_a_capture_of_another_value_is_told() -> None:
    found = diff(IF, IF.replace("Neg(z)", "Neg(x)"))
    assert [(c.graph, c.operator, c.what) for c in found.nodes] == [
        ("main/If (-> y)", "Neg", "input 0")
    ]


def test_an_initializer_that_was_an_input_is_the_same_constant() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 3, opset_import: ["" : 9]> g (float[2] x, float[2] w) => (float[2] y) { y = Add(x, w) }'
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(2, np.float32), "w"))
    new = onnx.ModelProto()
    new.CopyFrom(proto)
    new.ir_version = 9
    del new.graph.input[1]
    found = diff_models(ir.from_proto(proto), ir.from_proto(new))
    assert (found.matched, found.nodes, found.constants, found.replacements) == (1, (), (), ())


def test_json_is_complete() -> None:
    body = diff_json(diff(BASE, BASE.replace("b = Relu(a)", "b = Tanh(a)")))
    assert body["equal"] is False
    assert body["operators"] == {"Relu": [1, 0], "Tanh": [0, 1]}
    assert body["replacements"][0]["removed"] == ["Relu"]


def test_long_parts_are_cut_and_say_so() -> None:
    a = load(layers(5, "s{i} = Sigmoid({x}) {y} = Mul({x}, s{i})"))
    b = load(layers(5, "{y} = Tanh({x})").replace("w = {", "w = {"))
    outline = diff_outline(diff_models(a, b), top=1)
    lines = next(lines for heading, lines in outline if heading.startswith("operators"))
    assert lines[-1] == "… and 2 more"


ATTRIBUTES = """<ir_version: 9, opset_import: ["" : 18, "my" : 1]> g (float[2,3] x) => (float[2,3] y)
<float[3] w = {1, 2, 3}> { h = Add(x, w)  y = Softmax<axis = 1>(h) }"""
BRANCH = """g (bool c, float[2] x) => (float[2] y) { y = If(c) <then_branch = t () => (float[2] p)
{ p = Elu<alpha = 0.5>(x) }, else_branch = e () => (float[2] q) { q = Neg(x) }> }"""
WORDS = """g (string[1] x) => (bool[1] y) <string[1] w = {"a"}> { y = Equal(x, w) }"""
RELU = "g (float[2] x) => (float[2] y) { y = Relu(x) }"


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        (ATTRIBUTES, ATTRIBUTES.replace('"my"', '"your"'), ["my: 1 removed", "your: added, 1"]),
        (ATTRIBUTES, ATTRIBUTES.replace("axis = 1", "axis = 0"), ["Softmax 'y' axis: 1 → 0"]),
        (ATTRIBUTES, ATTRIBUTES.replace("[3] w = {1, 2, 3}", "[1] w = {1}"),
         ["'w' of Add: float[3] → float[1]"]),
        (BRANCH, BRANCH.replace("0.5", "0.25"), ["Elu 'p' in main/If (-> y) alpha: 0.5 → 0.25"]),
        (WORDS, WORDS.replace('"a"', '"b"'), ["'w' of Equal: string[1], other contents"]),
        (RELU, RELU.replace("y = Relu(x)", "a = Relu(x)  y = Neg(a)"), ["added: Neg   at 'y'"]),
        (RELU.replace("y = Relu(x)", "a = Relu(x)  y = Neg(a)"), RELU, ["removed: Neg   at 'y'"]),
    ],
)  # fmt: skip
def test_the_outline_says_what_changed_where(before: str, after: str, lines: list[str]) -> None:
    told = [line for _, part in diff_outline(diff(before, after)) for line in part]
    assert [line for line in told if line in lines] == lines


def test_an_attribute_that_is_absent_is_shown_as_its_default() -> None:
    text = "g (float[2, 4] x) => (float[2, 4] y) { y = Softmax{}(x) }"
    models = [load(text.replace("{}", how)) for how in ("", "<axis = 0>")]
    (change,) = diff_models(*models).nodes
    assert (change.what, change.before, change.after) == ("axis", "-1 (default)", "0")
    (back,) = diff_models(*reversed(models)).nodes
    assert (back.before, back.after) == ("0", "-1 (default)")
