"""Raising the opset: when, how far, and what each operator becomes on the way."""

from __future__ import annotations

import dataclasses

import onnx
import onnx.checker
import onnx_ir as ir
import pytest
from graphopt_passes import LIFT_OPSET, attention, conv, groupnorm, norm
from graphopt_passes.opset import LiftOpset, _apply, spell
from graphopt_passes.opset_changes import CHANGES, NEUTRAL

import graphopt
from graphopt.ir import operators
from graphopt.ir.shapes import Shapes
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind, Rule, Skip
from graphopt.targets import get_target
from tests.rewriting import apply, compare, make_feeds, parse, run

RMS = "s = Mul({0}, {0}) m = ReduceMean<axes=[-1]>(s) e = Add(m, eps) r = Sqrt(e) i = Reciprocal(r) n = Mul({0}, i)"


def lift(text: str, opset: int, target: str = "cpu") -> tuple[onnx.ModelProto, ir.Model, list[str]]:
    proto = parse(text, opset=opset)
    model = ir.from_proto(proto)
    ctx = apply((LIFT_OPSET,), model, target=target)
    assert ctx.numerics is Numerics.EXACT
    return proto, model, [r.reason for r in ctx.remarks if r.kind is RemarkKind.MISSED]


def test_raised_where_rms_norm_would_fuse() -> None:
    proto, model, said = lift(
        f"g (float[2,3,4] x) => (float[2,3,4] n) <float eps = {{1e-5}}> {{ {RMS.format('x')} }}", 13
    )
    assert model.opset_imports[""] == 23
    assert not said
    feeds = make_feeds(proto, 0)
    compare(run(proto, feeds), run(ir.to_proto(model), feeds), Numerics.EXACT, 0)
    ctx = apply(norm.RULES, model)
    assert [node.op_type for node in model.graph] == ["RMSNormalization"]
    assert ctx.rewrites
    assert not apply((LIFT_OPSET,), model).rewrites


@pytest.mark.parametrize(("opset", "raised"), [(17, 19), (19, None), (21, None)])
def test_wishes_are_for_newer_opsets_only(opset: int, raised: int | None) -> None:
    model = ir.from_proto(parse("g (float[2] x) => (float[2] y) { y = Relu(x) }", opset=opset))
    ctx = apply((LiftOpset(wishes=lambda _model, _ctx: (19,)),), model)
    assert model.opset_imports[""] == (raised or opset)
    assert bool(ctx.rewrites) is (raised is not None)


GELU = "d = Div(x, root) e = Erf(d) a = Add(e, one) b = Mul(x, a) y = Mul(b, half)"
NUMBERS = "float root = {1.4142135}, float one = {1.0}, float half = {0.5}"


def test_only_as_far_as_needed() -> None:
    """TensorRT has a Gelu from opset 20 on; the CPU has one of its own at any."""
    text = f"g (float[2,3] x) => (float[2,3] y) <{NUMBERS}> {{ {GELU} }}"
    assert lift(text, 17, "tensorrt")[1].opset_imports[""] == 20
    assert lift(text, 17, "cpu")[1].opset_imports[""] == 17


def test_left_alone_where_nothing_would_fuse() -> None:
    text = "g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }"
    assert lift(text, 13)[1].opset_imports[""] == 13


def test_left_alone_for_any_runtime() -> None:
    text = f"g (float[2,3,4] x) => (float[2,3,4] n) <float eps = {{1e-5}}> {{ {RMS.format('x')} }}"
    assert lift(text, 13, "portable")[1].opset_imports[""] == 13


def test_declines_and_names_the_operator() -> None:
    text = (
        f"g (float[2,3,4] x) => (float[2,3,4] y) <float eps = {{1e-5}}> {{ {RMS.format('x')}"
        " y = Softmax<axis=1>(n) }"
    )
    _, model, said = lift(text, 11)
    assert model.opset_imports[""] == 11
    assert any("Softmax" in reason and "several axes" in reason for reason in said)


def test_average_pool_is_summed_in_another_order() -> None:
    text = (
        f"g (float[1,2,4,4] x) => (float[1,2,3,3] y) <float eps = {{1e-5}}> {{ {RMS.format('x')}"
        " y = AveragePool<kernel_shape=[2,2]>(n) }"
    )
    model = ir.from_proto(parse(text, opset=13))
    assert apply((LIFT_OPSET,), model).numerics is Numerics.REORDERED


def test_next_best_opset_where_the_best_is_out_of_reach() -> None:
    """RoiAlign has no kernel for its version 22 on the CPU: 23 is out of reach, 17 is not."""
    layer = "c = Sub(n, t) q = Mul(c, c) v = ReduceMean<axes=[-1]>(q) w = Add(v, eps) z = Sqrt(w) y = Div(c, z)"
    text = (
        "g (float[2,3,8,4] x, float[1,4] rois, int64[1] at) => (float[2,3,8,4] y, float[1,3,1,1] o)"
        f" <float eps = {{1e-5}}> {{ {RMS.format('x')} t = ReduceMean<axes=[-1]>(n) {layer}"
        " o = RoiAlign(x, rois, at) }"
    )
    proto, model, said = lift(text, 13)
    assert model.opset_imports[""] == 17
    assert any("RoiAlign" in reason and "no kernel" in reason for reason in said)
    assert next(n for n in model.graph if n.op_type == "RoiAlign").attributes
    feeds = make_feeds(proto, 0)
    feeds["rois"][:] = [[0, 0, 4, 3]]
    feeds["at"][:] = 0
    compare(run(proto, feeds), run(ir.to_proto(model), feeds), Numerics.EXACT, 0)


IMAGE = (
    "g (float[2,3,8] x, float[N,4,W] img, float[4] ga, float[4] be) => (float[2,3,8] n, float[N,4,W] o)"
    f" <float eps = {{1e-5}}> {{ {RMS.format('x')} o = InstanceNormalization(img, ga, be) }}"
)


@pytest.mark.parametrize("later", [(), groupnorm.RULES, conv.RULES])
def test_what_is_replaced_later_needs_no_kernel(later: tuple[Rule, ...]) -> None:
    """CUDA has an InstanceNormalization up to opset 21 alone; a rule that runs after lifting writes another norm."""
    model = ir.from_proto(parse(IMAGE, opset=17))
    lift = LiftOpset(rules=norm.RULES, later=later)
    ctx = apply((lift,), model, target="cuda")
    reached = later == groupnorm.RULES
    assert model.opset_imports[""] == (23 if reached else 17)
    assert any("no kernel" in r.reason for r in ctx.remarks) is not reached


def test_the_pipeline_looks_ahead() -> None:
    result = graphopt.optimize(parse(IMAGE, opset=17), target="cuda")
    kinds = {node.op_type for node in result.model.graph}
    assert {"RMSNormalization", "LayerNormalization"} <= kinds
    assert "InstanceNormalization" not in kinds


@pytest.mark.parametrize("owner", ["branch", "empty"])
def test_what_stays_later_needs_a_kernel(owner: str) -> None:
    """What no rule would replace as it is: an empty image, a node in a branch is judged where it is."""
    text = (
        IMAGE.replace("float[N,4,W]", "float[N,4,0]")
        if owner == "empty"
        else (
            "g (float[2,3,8] x, float[N,4,W] img, float[4] ga, float[4] be, bool c) => (float[2,3,8] n, float[N,4,W] o)"
            f" <float eps = {{1e-5}}> {{ {RMS.format('x')} o = If(c) <then_branch = t () => (float[N,4,W] p)"
            " { p = InstanceNormalization(img, ga, be) }, else_branch = e () => (float[N,4,W] q) { q = Relu(img) }> }"
        )
    )
    model = ir.from_proto(parse(text, opset=17))
    apply((LIFT_OPSET,), model, target="cuda")
    assert model.opset_imports[""] == (17 if owner == "empty" else 23)


def test_subgraphs_are_raised_too() -> None:
    text = (
        f"g (float[2,3,4] x, bool c) => (float[2,4] y) <float eps = {{1e-5}}> {{ {RMS.format('x')}"
        " y = If(c) <then_branch = t () => (float[2,4] a) { a = ReduceSum<axes=[1], keepdims=0>(n) },"
        " else_branch = f () => (float[2,4] b) { b = ReduceMax<axes=[1], keepdims=0>(n) }> }"
    )
    proto, model, _ = lift(text, 12)
    assert model.opset_imports[""] == 23
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    for seed in range(4):
        feeds = make_feeds(proto, seed)
        compare(run(proto, feeds), run(ir.to_proto(model), feeds), Numerics.EXACT, 0)


def test_local_functions_stay() -> None:
    text = (
        '<ir_version: 9, opset_import: ["" : 17, "my" : 1]>\n'
        f"g (float[2,3,4] x) => (float[2,3,4] y) <float eps = {{1e-5}}> {{ {RMS.format('x')} y = my.f(n) }}"
        '\n<domain: "my", opset_import: ["" : 17]> f (a) => (b) { b = Relu(a) }'
    )
    assert lift(text, 17)[1].opset_imports[""] == 17


def test_unknown_rules_ask_for_nothing() -> None:
    assert not LiftOpset().rules
    assert not apply(
        (LiftOpset(),),
        ir.from_proto(
            parse(
                f"g (float[2,3,4] x) => (float[2,3,4] n) <float eps> {{ {RMS.format('x')} }}",
                opset=13,
            )
        ),
    ).rewrites
    assert set(attention.RULES) <= set(LIFT_OPSET.rules)


STEPS = [
    (8, "g (float[2,3] x) => (float[2,3] y) { y = Clip<min=-0.5, max=0.5>(x) }"),
    (8, "g (float[2,3] x) => (float[2,3] y) { y = Clip<max=0.5>(x) }"),
    (8, "g (float[2,3] x) => (float[4,3] y) { y = Pad<pads=[1,0,1,0], value=2.0>(x) }"),
    (8, 'g (float[2,3] x) => (float[2,5] y) { y = Pad<mode="reflect", pads=[0,1,0,1]>(x) }'),
    (8, "g (float[2,3] x) => (float[2,2] y, int64[2,2] i) { y, i = TopK<k=2>(x) }"),
    (8, "g (float[2,3] x) => (float[1,3] y) { y = Slice<axes=[0], starts=[1], ends=[2]>(x) }"),
    (8, "g (float[2,3] x) => (float[1,2] y) { y = Slice<starts=[1,0], ends=[2,2]>(x) }"),
    (8, "g (float[2,1,3] x) => (float[2,3] y) { y = Squeeze<axes=[1]>(x) }"),
    (8, "g (float[2,1,3] x) => (float[2,3] y) { y = Squeeze(x) }"),
    (8, "g (float[2,3] x) => (float[2,1,3] y) { y = Unsqueeze<axes=[1]>(x) }"),
    (8, "g (float[2,4] x) => (float[2,1] y, float[2,3] z) { y, z = Split<axis=1, split=[1,3]>(x) }"),
    (8, "g (float[2,4] x) => (float[2,2] y, float[2,2] z) { y, z = Split<axis=1>(x) }"),
    (8, "g (float[2,3] x) => (float[2,1] y) { y = ReduceSum<axes=[1]>(x) }"),
    (8, "g (float[2,3] x) => (float[1,1] y) { y = ReduceL2(x) }"),
    (8, "g (float[2,3] x) => (float[2] y) { y = ReduceLogSumExp<axes=[1], keepdims=0>(x) }"),
    (8, "g (float[2,3] x) => (float[2,3] y) { y = Dropout<ratio=0.3>(x) }"),
    (8, "g (float[2,3] x) => (float[2,3] y) { y = Softmax(x) }"),
    (8, "g (float[2,3,1,1] x) => (float[2,3,1,1] y) { y = LogSoftmax<axis=1>(x) }"),
    (8, "g (float[2,3] x) => (float[2,3] y) { y = Hardmax(x) }"),
    (8, 'g (float[1,1,2,3] x) => (float[1,1,4,6] y) { y = Upsample<mode="nearest", scales=[1.0,1.0,2.0,2.0]>(x) }'),
    (8, 'g (float[1,1,2,3] x) => (float[1,1,4,6] y) { y = Upsample<mode="linear", scales=[1.0,1.0,2.0,2.0]>(x) }'),
    (8, "g (float[2,3,4] x) => (float[2,3,4] y) <float[3] a, float[3] b, float[3] c, float[3] d>"
        " { y = BatchNormalization(x, a, b, c, d) }"),
    (8, "g (float[1,2,4,4] x) => (float[1,2,2,2] y) { y = AveragePool<kernel_shape=[2,2], strides=[2,2]>(x) }"),
    (8, "g (float[1,2,4,4] x) => (float[1,2,2,2] y) { y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(x) }"),
    (8, "g (float[1,2,4,4] x) => (float[1,3,5,5] y) <float[2,3,2,2] w> { y = ConvTranspose(x, w) }"),
    (8, "g (float[2,3] x) => (float[2,4] y) <float[3,4] w, float[4] b> { y = Gemm(x, w, b) }"),
    (8, "g (float[2,3] x) => (int64[2,1] y) { y = ArgMax<axis=1>(x) }"),
    (8, "g (float[2,3] x) => (float[3,2] y) <int64[2] s = {3, 2}> { y = Reshape(x, s) }"),
    (10, 'g (float[1,1,2,3] x) => (float[1,1,4,6] y) <float[4] s = {1.0, 1.0, 2.0, 2.0}>'
         ' { y = Resize<mode="nearest">(x, s) }'),
    (10, "g (float[2,3] x, int64[2,3] i, float[2,3] u) => (float[2,3] y) { y = Scatter(x, i, u) }"),
    (10, "g (float[1,2,6,6] x, float[1,4] rois, int64[1] i) => (float[1,2,1,1] y) { y = RoiAlign(x, rois, i) }"),
    (16, 'g (float[1,1,3,3] x, float[1,2,2,2] q) => (float[1,1,2,2] y) { y = GridSample<mode="bicubic">(x, q) }'),
    (16, "g (float[1,1,3,3] x, float[1,2,2,2] q) => (float[1,1,2,2] y) { y = GridSample(x, q) }"),
    (17, "g (float[1,4,1] x) => (float[1,4,2] y) { y = DFT(x) }"),
    (17, "g (float[1,4,4,1] x) => (float[1,4,4,2] y) { y = DFT<axis=2>(x) }"),
]  # fmt: skip


@pytest.mark.parametrize(("opset", "text"), STEPS, ids=[t.split("= ")[-1][:28] for _, t in STEPS])
def test_each_step_keeps_the_numbers(opset: int, text: str) -> None:
    """Every operator, written at opset 21, gives bit for bit what it gave: also on infinities and signed zeros."""
    proto = parse(text, opset=opset)
    model = ir.from_proto(proto)
    free = dataclasses.replace(get_target("cpu"), kernels=())
    node = next(n for n in model.graph if n.op_type != "Constant")
    assert spell(node, opset, 21, Shapes(model), free).op_type
    raised = _raise(model)
    feeds = make_feeds(proto, 1)
    if "rois" in feeds:
        feeds["rois"][:], feeds["i"][:] = [[0, 0, 5, 5]], 0
    onnx.checker.check_model(raised, full_check=True)
    assert raised.opset_import[0].version == 21
    pools = node.op_type == "AveragePool"
    numerics = Numerics.REORDERED if pools else Numerics.EXACT
    compare(run(proto, feeds), run(raised, feeds), numerics, 1e-6)


def _raise(model: ir.Model) -> onnx.ModelProto:
    """The model at opset 21, whether or not anything would fuse there."""
    ctx = Context(model, get_target("cpu"))
    before = model.opset_imports[""]
    plan = [spell(node, before, 21, ctx.shapes, ctx.target) for node in model.graph]
    _apply(model, plan, 21, ctx)
    return ir.to_proto(model)


@pytest.mark.parametrize(
    ("opset", "text", "reason"),
    [
        (8, "g (float[2,3,4] x) => (float[2,3,4] y) { y = Softmax<axis=1>(x) }", "several axes"),
        (8, "g (float[N,3] x) => (float[M,2] y) { y = Softmax(x) }", ""),
        (8, "g (float[2,3] x) => (float[2,3] y, float[2,3] m) { y, m = Dropout(x) }", "mask"),
        (8, "g (float[1,2,4,4] x) => (float[1,3,8,8] y) <float[2,3,2,2] w>"
            ' { y = ConvTranspose<auto_pad="SAME_UPPER", strides=[2,2]>(x, w) }', "auto_pad"),
        (10, "g (float[1,1,4,6] x) => (float[1,1,2,3] y) <float[4] s = {1.0, 1.0, 0.5, 0.5}> { y = Resize(x, s) }",
         "below 1"),
        (18, "g (float[2,4,3] x) => (float[2,4,3] y) <float[2] s, float[2] b>"
             " { y = GroupNormalization<num_groups=2>(x, s, b) }", "changed"),
        (10, "g (float[1,1,5] x) => (float[1,1,3] y)"
             " { y = AveragePool<kernel_shape=[2], strides=[2], ceil_mode=1>(x) }", "rounds"),
    ],
)  # fmt: skip
def test_steps_that_cannot_be_made(opset: int, text: str, reason: str) -> None:
    proto = parse(text, opset=opset)
    model = ir.from_proto(proto)
    node = next(iter(model.graph))
    if not reason:
        assert spell(node, opset, 22, Shapes(model), get_target("portable")).op_type
        return
    with pytest.raises(Skip, match=reason):
        spell(node, opset, 22, Shapes(model), get_target("portable"))


def test_tables_name_real_versions() -> None:
    """Each step leads to a version in which the operator did change, and is in one table only."""
    assert not NEUTRAL & set(CHANGES)
    for op, version in [*NEUTRAL, *CHANGES]:
        schema = operators.find_schema(op, version, "")
        assert schema is not None
        assert schema.since_version == version, (op, version)


@pytest.mark.parametrize(
    ("opset", "text", "reason"),
    [
        (8, "g (float[1,2,3] x) => (float[1,2,3] y) <float[2,3] a, float[2,3] b, float[2,3] c, float[2,3] d>"
            " { y = BatchNormalization<spatial=0>(x, a, b, c, d) }", "not those of channels"),
        (9, "g (float[1,2,3] x) => (float[1,2,3] y) <float[2] a, float[2] b, float[2] c, float[2] d>"
            " { y, m, v, s, t = BatchNormalization(x, a, b, c, d) }", "training mode"),
        (12, "g (float[1,2,3] x) => (float[2,3] y) { y = Squeeze<axes: ints = []>(x) }", "empty list of axes"),
        (8, "g (float[N] x) => (float[N] y) { h = Frobnicate(x) y = Relu(h) }", "does not define it"),
    ],
)  # fmt: skip
def test_nodes_that_mean_something_else_or_nothing(opset: int, text: str, reason: str) -> None:
    node = next(iter(ir.from_proto(parse(text, opset=opset)).graph))
    model = ir.from_proto(parse(text, opset=opset))
    with pytest.raises(Skip, match=reason):
        spell(node, opset, 22, Shapes(model), get_target("portable"))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = Softmax(h)", "axes are not known"),
        ("y = Pad<pads = [1, 1], value = 2.0>(h)", "element type is not known"),
    ],
)
def test_what_cannot_be_written_without_types(body: str, reason: str) -> None:
    text = (
        '<ir_version: 8, opset_import: ["" : 8, "my" : 1]>'
        f"g (float[N] x) => (float[M] y) {{ h = my.Op(x) {body} }}"
    )
    model = ir.from_proto(parse(text))
    with pytest.raises(Skip, match=reason):
        spell(model.graph[1], 8, 22, Shapes(model), get_target("portable"))


def test_an_operator_that_the_runtime_takes_at_any_opset_does_not_stop_it() -> None:
    """ONNX Runtime has LayerNormalization in the default domain before opset 17, which defines it."""
    text = """<ir_version: 8, opset_import: ["" : 11]>
        g (float[2,3,4,8] q, float[2,3,4,8] k, float[2,3,4,8] v) => (float[2,3,4,8] y) <float[8] s, float[8] b> {
        n = LayerNormalization<axis=-1>(q, s, b) t = Transpose<perm=[0,1,3,2]>(k) z = MatMul(n, t)
        p = Softmax<axis=-1>(z) y = MatMul(p, v) }"""
    made = graphopt.optimize(parse(text), verify="final")
    assert "Attention" in {node.op_type for node in made.model.graph}
    assert not made.report.rolled_back


def test_what_a_newer_opset_would_not_help_is_told() -> None:
    """The rule itself only says that its operator is newer."""
    text = (
        "g (float[1,2,3,4] q, float[1,2,5,4] k, float[1,2,5,4] v, float[2,1,3,5] m) => (float[2,2,3,4] y)"
        " { t = Transpose<perm=[0,1,3,2]>(k) a = MatMul(q, t) z = Add(a, m) p = Softmax(z) y = MatMul(p, v) }"
    )
    model = ir.from_proto(parse(text, opset=17))
    ctx = apply((LiftOpset(rules=attention.RULES),), model)
    assert model.opset_imports[""] == 17
    assert [(r.rule, r.reason) for r in ctx.remarks] == [
        (
            "lift-opset",
            "a newer opset would not let fuse-attention fuse: the mask broadens the scores",
        )
    ]


def test_the_first_form_of_an_operator_counts() -> None:
    """CUDA wants LayerNormalization-17, and from opset 22 on for groups as well: 17 is enough for a norm."""
    text = (
        "g (float[N,8] x) => (float[N,8] y) <float e = {1e-5}> { m = ReduceMean<axes=[-1]>(x) d = Sub(x, m)"
        " q = Mul(d, d) v = ReduceMean<axes=[-1]>(q) l = Add(v, e) r = Sqrt(l) y = Div(d, r) }"
    )
    model = ir.from_proto(parse(text, opset=13))
    apply((LIFT_OPSET,), model, target="cuda")
    assert model.opset_imports[""] == 17
