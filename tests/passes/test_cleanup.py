"""IR version, lifted constants, dead parts."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from graphopt_passes import tidy
from graphopt_passes.cleanup import (
    FreezeDefaults,
    LiftConstants,
    LiftSubgraphConstants,
    RemoveDeadCode,
    UpgradeIr,
)
from graphopt_passes.dedupe import MergeDuplicateConstants
from graphopt_passes.naming import NameNodes

from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model
from graphopt.pipeline import Pass, RewritePass, Step, run_pipeline
from graphopt.rewrite import Context, Gate, RemarkKind
from graphopt.targets import get_target
from tests.rewriting import apply, check, make_feeds, parse, run

REMOVERS: tuple[Step, ...] = (RewritePass("tidy", tidy.RULES), RemoveDeadCode())

IR3 = """<ir_version: 3, opset_import: ["" : 9]>
g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Add(x, w) }"""


def load(text: str) -> ir.Model:
    return ir.from_proto(parse(text))


def save(model: ir.Model) -> onnx.ModelProto:
    assert not list(violations(model))
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def test_upgrade_ir_makes_initializers_constant() -> None:
    model = load(IR3)
    apply([UpgradeIr()], model)
    assert model.ir_version == 4
    assert [v.name for v in model.graph.inputs] == ["x"]
    feed = {"x": np.array([3, 4], np.float32)}
    np.testing.assert_array_equal(run(save(model), feed)[0], run(parse(IR3), feed)[0])


def test_upgrade_ir_keeps_overridable_initializers() -> None:
    model = load(IR3.replace("ir_version: 3", "ir_version: 4"))
    ctx = apply([UpgradeIr()], model)
    assert not ctx.rewrites
    assert [v.name for v in model.graph.inputs] == ["x", "w"]
    (remark,) = ctx.remarks
    assert remark.kind is RemarkKind.NOTE
    assert remark.reason.startswith("1 initializers are graph inputs too")


def test_freeze_defaults_makes_overridable_initializers_constant() -> None:
    model = load(IR3.replace("ir_version: 3", "ir_version: 4"))
    ctx = apply([FreezeDefaults()], model)
    assert [(r.rule, r.site) for r in ctx.rewrites] == [("freeze-default", "w")]
    assert [r.reason.split(":")[0] for r in ctx.remarks] == [
        "1 overridable defaults became constants"
    ]
    assert [v.name for v in model.graph.inputs] == ["x"]
    feed = {"x": np.array([3, 4], np.float32)}
    np.testing.assert_array_equal(run(save(model), feed)[0], run(parse(IR3), feed)[0])
    assert not apply([FreezeDefaults()], model).rewrites


def test_freeze_defaults_leaves_each_where_the_gate_says_so() -> None:
    model = load(IR3.replace("ir_version: 3", "ir_version: 4"))
    ctx = Context(model, get_target("cpu"), gate=Gate(limit=0))
    assert not run_pipeline(model, [FreezeDefaults()], ctx)[0].changed
    assert [v.name for v in model.graph.inputs] == ["x", "w"]


def test_upgrade_ir_imports_the_implied_opset() -> None:
    proto = parse(IR3)
    proto.ir_version = 2
    del proto.opset_import[:]
    model = ir.from_proto(proto)
    apply([UpgradeIr()], model)
    assert dict(model.opset_imports) == {"": 1}


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ("value = float[2] {1.0, 2.0}", ir.DataType.FLOAT),
        ("value_floats = [1.0, 2.0]", ir.DataType.FLOAT),
        ("value_float = 1.0", ir.DataType.FLOAT),
    ],
)
def test_lift_float_constant(spelling: str, dtype: ir.DataType) -> None:
    model = load(f"g (float[2] x) => (float[2] y) {{ c = Constant<{spelling}>()  y = Add(x, c) }}")
    apply([LiftConstants()], model)
    assert list(model.graph.initializers) == ["c"]
    assert model.graph.initializers["c"].dtype == dtype
    assert len(model.graph) == 1
    save(model)


@pytest.mark.parametrize("spelling", ["value_int = 3", "value_ints = [3, 4]"])
def test_lift_integer_constant(spelling: str) -> None:
    check(
        [LiftConstants()],
        f"g (int64[2] x) => (int64[2] y) {{ c = Constant<{spelling}>()  y = Add(x, c) }}",
        "g (int64[2] x) => (int64[2] y) <int64 c = {3}> { y = Add(x, c) }"
        if "ints" not in spelling
        else "g (int64[2] x) => (int64[2] y) <int64[2] c = {3, 4}> { y = Add(x, c) }",
    )


@pytest.mark.parametrize("spelling", ['value_string = "a"', 'value_strings = ["a", "b"]'])
def test_lift_string_constant(spelling: str) -> None:
    model = load(
        f"g (string[2] x) => (string[2] y) {{ c = Constant<{spelling}>()  y = StringConcat(x, c) }}".replace(
            "g (", '<ir_version: 9, opset_import: ["": 20]> g ('
        )
    )
    apply([LiftConstants()], model)
    assert len(model.graph) == 1
    proto = save(model)
    assert run(proto, {"x": np.array(["x", "y"], object)})[0][0] == "xa"


def test_lift_sparse_constant() -> None:
    proto = parse(
        "g (float[3] x) => (float[3] y) { c = Constant<value_float = 1.0>()  y = Add(x, c) }"
    )
    sparse = onnx.helper.make_sparse_tensor(
        onnx.numpy_helper.from_array(np.array([5], np.float32)),
        onnx.numpy_helper.from_array(np.array([1])),
        [3],
    )
    del proto.graph.node[0].attribute[:]
    proto.graph.node[0].attribute.append(onnx.helper.make_attribute("sparse_value", sparse))
    model = load_model(proto)
    apply([LiftConstants()], model)
    tensor = model.graph.initializers["c"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), [0, 5, 0])


def test_lift_constants_in_subgraphs() -> None:
    check(
        [LiftConstants()],
        """g (bool c, float[2] x) => (float[2] y) {
            y = If(c) <then_branch = t () => (float[2] a) { k = Constant<value_float = 1.0>()  a = Add(x, k) },
                       else_branch = e () => (float[2] b) { b = Neg(x) }> }""",
        """g (bool c, float[2] x) => (float[2] y) {
            y = If(c) <then_branch = t () => (float[2] a) <float k = {1.0}> { a = Add(x, k) },
                       else_branch = e () => (float[2] b) { b = Neg(x) }> }""",
    )


def test_constant_that_is_an_output_keeps_its_producer() -> None:
    check(
        [LiftConstants()],
        "g (float[2] x) => (float[2] y, float c) { c = Constant<value_float = 1.0>()  y = Add(x, c) }",
    )


def test_constants_of_functions_stay() -> None:
    text = """<ir_version: 9, opset_import: ["": 18, "l": 1]> g (float[2] x) => (float[2] y) { y = l.f(x) }
    <domain: "l", opset_import: ["": 18]> f (a) => (b) { c = Constant<value_float = 1.0>()  b = Add(a, c) }"""
    model = load(text)
    assert not apply([LiftConstants()], model).rewrites


def test_dead_nodes_and_initializers_go() -> None:
    check(
        [RemoveDeadCode()],
        "g (float[2] x) => (float[2] y) <float[2] w> { a = Exp(x)  b = Add(a, w)  y = Neg(x) }",
        "g (float[2] x) => (float[2] y) { y = Neg(x) }",
    )


def test_dead_code_in_subgraphs_frees_outer_values() -> None:
    check(
        [RemoveDeadCode()],
        """g (bool c, float[2] x) => (float[2] y) { o = Exp(x)
            y = If(c) <then_branch = t () => (float[2] a) { d = Neg(o)  a = Abs(x) },
                       else_branch = e () => (float[2] b) { b = Neg(x) }> }""",
        """g (bool c, float[2] x) => (float[2] y) {
            y = If(c) <then_branch = t () => (float[2] a) { a = Abs(x) },
                       else_branch = e () => (float[2] b) { b = Neg(x) }> }""",
    )


def test_dead_control_flow_frees_what_it_captured() -> None:
    check(
        [RemoveDeadCode()],
        """g (bool c, float[2] x) => (float[2] y) { o = Exp(x)
            z = If(c) <then_branch = t () => (float[2] a) { a = Abs(o) },
                       else_branch = e () => (float[2] b) { b = Neg(o) }>
            y = Neg(x) }""",
        "g (bool c, float[2] x) => (float[2] y) { y = Neg(x) }",
    )


def test_unused_graph_inputs_stay() -> None:
    model = load("g (float[2] x, float[3] unused) => (float[2] y) { y = Neg(x) }")
    assert not apply([RemoveDeadCode()], model).rewrites
    assert len(model.graph.inputs) == 2


def test_unused_overridable_initializer_stays() -> None:
    text = """<ir_version: 8, opset_import: ["": 18]> g (float[2] x, float[1] w) => (float[2] y)
        <float[1] w = {1.0}> { y = Neg(x) }"""
    model = load(text)
    assert not apply([RemoveDeadCode()], model).rewrites


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("y, mask = Dropout(x)", "y = Dropout(x)"),
        ("y, m = MaxPool<kernel_shape = [1, 1]>(x)", "y = MaxPool<kernel_shape = [1, 1]>(x)"),
        ("s = Constant<value = float[4] {1.0, 1.0, 1.0, 1.0}>() y, m, v = LayerNormalization(x, s)",
         "s = Constant<value = float[4] {1.0, 1.0, 1.0, 1.0}>() y = LayerNormalization(x, s)"),
    ],
)  # fmt: skip
def test_unused_optional_outputs_are_omitted(before: str, after: str) -> None:
    header = "g (float[1,2,4,4] x) => (float[1,2,4,4] y) "
    check([RemoveDeadCode()], header + "{" + before + "}", header + "{" + after + "}")


def test_unused_output_in_the_middle_loses_its_name() -> None:
    text = """g (float[3,1,4] x) => (float[1,1,5] c) <float[1,20,4] w, float[1,20,5] r>
        { y, h, c = LSTM<hidden_size = 5>(x, w, r) }"""
    model = load(text)
    apply([RemoveDeadCode()], model)
    node = model.graph[0]
    assert [v.name for v in node.outputs] == ["", "", "c"]
    feed = make_feeds(parse(text), 0)
    np.testing.assert_array_equal(run(save(model), feed)[0], run(parse(text), feed)[0])


def test_unused_outputs_of_split_stay() -> None:
    check([RemoveDeadCode()], "g (float[4] x) => (float[2] y) { y, z = Split<num_outputs = 2>(x) }")


def test_training_outputs_of_old_batch_normalization_stay() -> None:
    model = load(
        """<ir_version: 8, opset_import: ["": 9]> g (float[1,2,3] x) => (float[1,2,3] y)
        <float[2] s, float[2] b, float[2] m, float[2] v> { y, mo, vo, sm, sv = BatchNormalization(x, s, b, m, v) }"""
    )
    apply([RemoveDeadCode()], model)
    assert [v.name for v in model.graph[0].outputs] == ["y", "mo", "vo", "sm", "sv"]


def test_unused_functions_and_imports_go() -> None:
    text = """<ir_version: 9, opset_import: ["": 18, "l": 1, "other": 3]>
    g (float[2] x) => (float[2] y) { y = l.f(x) }
    <domain: "l", opset_import: ["": 18, "l": 1, "far": 2]> f (a) => (b) { b = l.g(a) }
    <domain: "l", opset_import: ["": 18]> g (a) => (b) { b = Neg(a) }
    <domain: "l", opset_import: ["": 18]> h (a) => (b) { b = Exp(a) }"""
    model = load(text)
    apply([RemoveDeadCode()], model)
    assert [key[1] for key in model.functions] == ["f", "g"]
    assert dict(model.opset_imports) == {"": 18, "l": 1}
    assert dict(model.functions["l", "f", ""].opset_imports) == {"": 18, "l": 1}
    save(model)


def test_tensors_that_annotations_name_stay() -> None:
    proto = parse("g (float[2] x) => (float[2] y) <float[1] scale> { y = Neg(x) }")
    note = proto.graph.quantization_annotation.add(tensor_name="y")
    note.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="scale")
    model = ir.from_proto(proto)
    apply([RemoveDeadCode()], model)
    assert list(model.graph.initializers) == ["scale"]


def test_the_gate_keeps_a_dead_node() -> None:
    model = load("g (float[2] x) => (float[2] y) { a = Exp(x)  b = Abs(x)  y = Neg(x) }")
    ctx = Context(model, get_target("cpu"), gate=Gate(limit=1))
    run_pipeline(model, [RemoveDeadCode()], ctx)
    assert [n.op_type for n in model.graph] == ["Exp", "Neg"]


def test_custom_operator_without_outputs_stays() -> None:
    text = """<ir_version: 9, opset_import: ["": 18, "c": 1]>
        g (float[2] x) => (float[2] y) { t = Exp(x) y = Neg(x) }"""
    proto = parse(text)
    proto.graph.node.append(onnx.helper.make_node("Print", ["t"], [], domain="c"))
    model = ir.from_proto(proto)
    apply(REMOVERS, model)
    assert [node.op_type for node in model.graph] == ["Exp", "Neg", "Print"]


def test_model_without_outputs_is_left_alone() -> None:
    proto = parse("g (float[2] x) => (float[2] y) { y = Exp(x) }")
    del proto.graph.output[:]
    model = ir.from_proto(proto)
    apply(REMOVERS, model)
    assert len(model.graph) == 1


def nested(first: str, second: str) -> str:
    return (
        "g (float[2] x, bool c) => (float[2] y) <float[2] u = {5, 6}> { h = Add(x, u)  y = If(c)"
        f" <then_branch = t () => (float[2] a) {first}, else_branch = e () => (float[2] b) {second}> }}"
    )


def test_initializers_of_subgraphs_move_to_the_main_graph() -> None:
    """Both branches call theirs w: one of them gets another name."""
    model = load(
        nested("<float[2] w = {1, 2}> { a = Add(h, w) }", "<float[2] w = {3, 4}> { b = Add(h, w) }")
    )
    before = save(model)
    assert LiftSubgraphConstants().run(model, Context(model, get_target("cpu")))
    assert list(model.graph.initializers) == ["u", "w_1", "w"]
    after = save(model)
    for truth in (True, False):
        feed = {"x": np.ones(2, np.float32), "c": np.array(truth)}
        np.testing.assert_array_equal(run(before, feed)[0], run(after, feed)[0])
    assert not LiftSubgraphConstants().run(model, Context(model, get_target("cpu")))


def test_an_initializer_that_hides_an_outer_one_stays() -> None:
    """ONNX Runtime 1.31 reads the outer one in its place, because the other branch does."""
    check(
        (LiftSubgraphConstants(),),
        nested("<float[2] u = {1, 2}> { a = Add(h, u) }", "{ b = Sub(h, u) }"),
    )


def test_initializers_that_a_branch_returns_stay() -> None:
    check(
        (LiftSubgraphConstants(),),
        nested("<float[2] a = {1, 2}> { }", "{ b = Sub(h, u) }"),
    )


def test_initializers_stay_where_the_gate_says_so() -> None:
    model = load(nested("<float[2] w = {1, 2}> { a = Add(h, w) }", "{ b = Sub(h, u) }"))
    ctx = Context(model, get_target("cpu"), gate=Gate(limit=0))
    assert not LiftSubgraphConstants().run(model, ctx)


SEARCH = """<ir_version: 9, opset_import: ["": 18, "my": 1]> g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
    h = Add(x, w)
    y = my.Search<decoder = b (float[2] x) => (float[2] q) <float[2] v = {1, 2}> { q = Add(x, v) }>(h) }"""


@pytest.mark.parametrize("step", [LiftSubgraphConstants(), MergeDuplicateConstants(), NameNodes()])
def test_graphs_of_custom_operators_keep_their_weights_and_names(step: Pass) -> None:
    """BeamSearch of ONNX Runtime looks for its inputs by name, and for weights in its graphs."""
    model = load(SEARCH)
    step.run(model, Context(model, get_target("cpu")))
    decoder = model.graph[1].attributes["decoder"].as_graph()
    assert list(decoder.initializers) == ["v"]
    assert [value.name for value in decoder.inputs] == ["x"]
