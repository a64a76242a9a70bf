"""Passes that make a model fit a target."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir
import pytest
from graphopt_passes.convert import ConvertOpset
from graphopt_passes.legalize import CastDoubles, RenameBranchOutputs, WriteQuantizationAxes

from graphopt.ir import operators
from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, to_proto
from graphopt.numerics import Numerics
from graphopt.pipeline import Pass
from graphopt.rewrite import Context, Gate, Options, RemarkKind
from graphopt.targets import get_target
from tests.rewriting import apply, compare, make_feeds, parse, run

UPSAMPLE = """<ir_version: 4, opset_import: ["" : 8]>
g (float[1,1,2,2] x) => (float[1,1,4,4] y) { y = Upsample<scales = [1.0, 1.0, 2.0, 2.0]>(x) }"""
DOUBLES = """<ir_version: 9, opset_import: ["" : 18]>
g (double[N] x, bool c) => (double[N] y, float[N] z) <double two = {2}> {
  k = Constant<value = double {0.5}>()
  a = Mul(x, two)
  b = Mul(a, k)
  y = If(c) <then_branch = t () => (double[N] p) { p = Exp(b) }, else_branch = e () => (double[N] q) { q = Neg(b) }>
  z = Cast<to = 1>(b)
}"""
IF = """<ir_version: 9, opset_import: ["" : 18]>
g (bool c, float[N] x) => (float[N] y) { y = If(c) <
  then_branch = t () => (float[N] a) { a = Relu(x) }, else_branch = e () => (float[N] a) { a = Neg(x) }> }"""
SCALES = """<ir_version: 9, opset_import: ["" : {opset}]>
g () => (float[2,3] y) <int8[2,3] w = {{1, 2, 3, 4, 5, 6}}, float[3] s = {{1, 2, 3}}> {{
  y = DequantizeLinear(w, s) }}"""


def changed(step: Pass, text: str, target: str = "tensorrt") -> tuple[onnx.ModelProto, ir.Model]:
    """Before and after a pass that must change the model, both valid, with the same numbers."""
    proto = parse(text)
    model = load_model(proto)
    ctx = apply((step,), model, target=target)
    assert ctx.rewrites
    assert not list(violations(model))
    after = to_proto(model)
    onnx.checker.check_model(after, full_check=True)
    numerics = max(Numerics.REORDERED, ctx.numerics) if ctx.numerics else ctx.numerics
    for seed in range(2):
        feed = make_feeds(proto, seed)
        compare(run(proto, feed), run(after, feed), numerics, 1e-6)
    assert not apply((step,), model, target=target).rewrites
    return proto, model


def missed(step: Pass, text: str, target: str = "tensorrt") -> str:
    model = load_model(onnx.parser.parse_model(text))
    ctx = apply((step,), model, target=target)
    assert not ctx.rewrites
    return " ".join(r.reason for r in ctx.remarks if r.kind is RemarkKind.MISSED)


def test_an_old_opset_is_raised_to_the_least_that_is_taken() -> None:
    _, model = changed(ConvertOpset(), UPSAMPLE)
    assert model.opset_imports[""] == 9
    assert len(next(node for node in model.graph if node.op_type == "Upsample").inputs) == 2


def test_a_new_opset_is_lowered() -> None:
    text = """<ir_version: 9, opset_import: ["" : 21]>
    g (float[2,3] x) => (float[2,3] y) { y = Softmax<axis = 1>(x) }"""
    _, model = changed(ConvertOpset(), text, "tensorrt-10")
    assert model.opset_imports[""] == 20


def test_weights_survive_the_conversion() -> None:
    proto = parse(
        """<ir_version: 4, opset_import: ["" : 8]>
        g (float[2,64] x) => (float[2,64] y) { y = MatMul(x, w) }"""
    )
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = load_model(proto)
    assert apply((ConvertOpset(),), model, target="tensorrt").rewrites
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), weight)
    assert [value.name for value in model.graph.inputs] == ["x"]
    feed = make_feeds(proto, 0)
    compare(run(proto, feed), run(to_proto(model), feed), Numerics.EXACT, 0)


def test_opsets_within_the_range_stay() -> None:
    assert missed(ConvertOpset(), UPSAMPLE, "cpu") == ""


def test_subgraphs_are_raised_too() -> None:
    text = """<ir_version: 4, opset_import: ["" : 8]>
    g (float[1,1,2,2] x, bool c) => (float[1,1,4,4] y) { y = If(c) <
      then_branch = t () => (float[1,1,4,4] a) { a = Upsample<scales = [1.0, 1.0, 2.0, 2.0]>(x) },
      else_branch = e () => (float[1,1,4,4] b) { d = Concat<axis = 3>(x, x)  b = Concat<axis = 2>(d, d) }> }"""
    _, model = changed(ConvertOpset(), text)
    assert model.opset_imports[""] == 9
    inner = operators.subgraphs(next(iter(model.graph)))[0]
    assert len(next(node for node in inner if node.op_type == "Upsample").inputs) == 2


def test_functions_are_raised_too() -> None:
    """Their constants are nodes: a function has no initializers."""
    text = """<ir_version: 8, opset_import: ["" : 8, "local" : 1]>
    g (float[1,1,2,2] x) => (float[1,1,4,4] y) { y = local.up(x) }
    <domain: "local", opset_import: ["" : 8]>
    up (a) => (b) { b = Upsample<scales = [1.0, 1.0, 2.0, 2.0]>(a) }"""
    proto = onnx.parser.parse_model(text)
    model = load_model(proto)
    assert apply((ConvertOpset(),), model, target="tensorrt").rewrites
    (function,) = model.functions.values()
    assert function.opset_imports[""] == model.opset_imports[""] == 9
    assert [node.op_type for node in function] == ["Constant", "Upsample"]
    after = to_proto(model)
    onnx.checker.check_model(after)
    feed = make_feeds(proto, 0)
    compare(run(proto, feed), run(after, feed), Numerics.EXACT, 0)


def test_what_cannot_be_raised_node_by_node_is_left_to_the_converter() -> None:
    text = """<ir_version: 4, opset_import: ["" : 8]>
    g (float[2,3] x, bool c) => (float[2,3] y) { y = If(c) <
      then_branch = t () => (float[2,3] a) { a = BatchNormalization<spatial = 0>(x, x, x, x, x) },
      else_branch = e () => (float[2,3] b) { b = Neg(x) }> }"""
    said = missed(ConvertOpset(), text)
    assert "not those of channels" in said
    assert "does not enter subgraphs" in said


def test_subgraphs_are_not_lowered() -> None:
    said = missed(ConvertOpset(), IF.replace('"" : 18', '"" : 21'), "tensorrt-10")
    assert "does not enter subgraphs" in said


def test_what_the_converter_cannot_do_is_said() -> None:
    text = """<ir_version: 9, opset_import: ["" : 23]>
    g (float[1,2,3,8] q) => (float[1,2,3,8] y) { y = Attention(q, q, q) }"""
    assert "opset 23 to 20" in missed(ConvertOpset(), text, "tensorrt-10")


@pytest.mark.parametrize("step", [ConvertOpset(), CastDoubles(), RenameBranchOutputs()])
def test_a_gate_holds_them_back(step: Pass) -> None:
    texts = {"convert-opset": UPSAMPLE, "cast-doubles": DOUBLES, "rename-branch-outputs": IF}
    model = load_model(parse(texts[step.name]))
    ctx = Context(model, get_target("tensorrt"), Options(), Gate(limit=0))
    assert not step.run(model, ctx)


def test_float64_becomes_float32_inside() -> None:
    _, model = changed(CastDoubles(), DOUBLES)
    assert next(value.dtype for value in model.graph.inputs) == ir.DataType.DOUBLE
    assert model.graph.outputs[0].dtype == ir.DataType.DOUBLE
    inner = {
        value.dtype
        for node in model.graph.all_nodes()
        if node.op_type not in ("Cast", "If")
        for value in node.outputs
    }
    assert ir.DataType.DOUBLE not in inner


def test_functions_compute_in_float32_too() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (double[4] x) => (double[4] y) { y = local.f(x) }
    <domain: "local", opset_import: ["" : 17]>
    f (a) => (b) { t = Constant<value = double {2.0}>()  b = Mul(a, t) }"""
    proto = onnx.parser.parse_model(text)
    model = load_model(proto)
    assert apply((CastDoubles(),), model, target="tensorrt").rewrites
    after = to_proto(model)
    feed = make_feeds(proto, 0)
    compare(run(proto, feed), run(after, feed), Numerics.LOSSY, 1e-6)
    assert [node.op_type for node in model.graph] == ["Cast", "f", "Cast"]


def test_element_types_that_are_parameters_stay() -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
    g (double[4] x) => (double[4] y) { z = Exp(x)  y = local.f<t = 11>(z) }
    <domain: "local", opset_import: ["" : 17]>
    f <t>(a) => (b) { b = Cast<to: int = @t>(a) }"""
    assert "are parameters" in missed(CastDoubles(), text)


def test_other_models_stay() -> None:
    assert missed(CastDoubles(), IF) == ""


def test_branches_get_names_of_their_own() -> None:
    _, model = changed(RenameBranchOutputs(), IF)
    node = next(iter(model.graph))
    first, second = operators.subgraphs(node)
    assert first.outputs[0].name != second.outputs[0].name


def test_the_axis_of_scales_is_written() -> None:
    _, model = changed(WriteQuantizationAxes(), SCALES.format(opset=18))
    assert next(iter(model.graph)).attributes["axis"].as_int() == 1


@pytest.mark.parametrize(
    "text",
    [
        SCALES.format(opset=18)
        .replace("(w, s)", "(w, one)")
        .replace("float[3] s = {1, 2, 3}", "float one = {2}"),
        SCALES.format(opset=18).replace("DequantizeLinear", "DequantizeLinear<axis = 1>"),
    ],
)
def test_scalars_and_written_axes_stay(text: str) -> None:
    assert missed(WriteQuantizationAxes(), text) == ""
