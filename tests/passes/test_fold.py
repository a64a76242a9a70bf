"""Constant folding: what folds, what must not, and how large a result may be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.cleanup import RemoveDeadCode
from graphopt_passes.fold import FoldConstants, reshaped, stored_bytes

from graphopt.ir.check import violations
from graphopt.ir.mapped import MappedTensor
from graphopt.ir.model_file import load_model
from graphopt.ir.sparse import CooTensor
from graphopt.pipeline import Step, run_pipeline
from graphopt.rewrite import Context, Gate, Options
from graphopt.targets import get_target
from tests.rewriting import apply, check, parse, run

STEPS: tuple[Step, ...] = (FoldConstants(), RemoveDeadCode())


def fold(text: str, *, limit: int = 1 << 20) -> tuple[ir.Model, Context]:
    proto = parse(text)
    model = ir.from_proto(proto)
    ctx = apply(STEPS, model, options=Options(fold_limit_bytes=limit))
    assert not list(violations(model))
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    assert not apply(STEPS, model, options=Options(fold_limit_bytes=limit)).rewrites
    return model, ctx


def kinds(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_region_folds_in_one_sweep() -> None:
    ctx = check(
        STEPS,
        "g (float[2] x) => (float[2] y) <float[2] a = {1, 4}> { b = Sqrt(a) c = Neg(b) d = Mul(c, b) y = Add(x, d) }",
        "g (float[2] x) => (float[2] y) <float[2] d = {-1, -4}> { y = Add(x, d) }",
    )
    assert [r.site for r in ctx.rewrites if r.rule == "fold-constant"] == ["d"]


def test_static_shape_arithmetic_folds() -> None:
    check(
        STEPS,
        """g (float[2,3] x) => (float[A,B] y) <int64[1] two = {2}>
        { s = Shape(x) k = Mul(s, two) t = Tile(x, two_two) y = Reshape(t, k) }""".replace(
            "two_two)", "two_two)"
        ).replace("<int64[1] two = {2}>", "<int64[1] two = {2}, int64[2] two_two = {2, 2}>"),
        """g (float[2,3] x) => (float[A,B] y) <int64[2] two_two = {2, 2}, int64[2] k = {4, 6}>
        { t = Tile(x, two_two) y = Reshape(t, k) }""",
    )


def test_known_part_of_a_dynamic_shape_folds() -> None:
    check(
        STEPS,
        """g (float[N,3] x, int64 z) => (int64 y) <int64 one = {1}>
        { s = Shape(x) d = Gather(s, one) y = Add(z, d) }""",
        "g (float[N,3] x, int64 z) => (int64 y) <int64 d = {3}> { y = Add(z, d) }",
    )


def test_unknown_part_stays() -> None:
    check(
        STEPS,
        """g (float[N,3] x, int64 z) => (int64 y) <int64 zero = {0}>
        { s = Shape(x) d = Gather(s, zero) y = Add(z, d) }""",
    )


def test_shape_with_bounds() -> None:
    check(
        STEPS,
        "g (float[N,3,4] x, int64[2] z) => (int64[2] y) { s = Shape<start = 1>(x) y = Add(z, s) }",
        "g (float[N,3,4] x, int64[2] z) => (int64[2] y) <int64[2] s = {3, 4}> { y = Add(z, s) }",
    )


def test_producers_that_only_their_shape_needed_go() -> None:
    check(
        STEPS,
        "g (float[2,3] x, int64[2] z) => (int64[2] y) { t = Transpose(x) s = Shape(t) y = Add(z, s) }",
        "g (float[2,3] x, int64[2] z) => (int64[2] y) <int64[2] s = {3, 2}> { y = Add(z, s) }",
    )


def test_output_that_becomes_constant_keeps_its_name_and_a_producer() -> None:
    model, _ = fold("g (float[2,3] x) => (int64[K] s, float[2,3] y) { s = Shape(x) y = Neg(x) }")
    assert kinds(model) == ["Constant", "Neg"]
    assert [v.name for v in model.graph.outputs] == ["s", "y"]
    assert str(model.graph.outputs[0].shape) == "[K]"
    got = run(ir.to_proto(model), {"x": np.zeros((2, 3), np.float32)})
    np.testing.assert_array_equal(got[0], [2, 3])


def test_output_of_a_node_that_stays_keeps_a_name() -> None:
    """StringSplit insists on its second output, even where only the first is read."""
    model, _ = fold(
        '<ir_version: 9, opset_import: ["": 20]> g (string[0] x) => (string[0,K] y, int64[0] n)'
        " { y, n = StringSplit(x) }"
    )
    assert kinds(model) == ["Constant", "StringSplit"]
    assert all(value.name for value in model.graph[1].outputs)


@pytest.mark.parametrize(
    "body",
    [
        "t = RandomUniformLike(w)",
        "t = Bernoulli(w)",
        "t = RandomNormal<shape = [2]>()",
    ],
)
def test_random_values_stay_random(body: str) -> None:
    model, ctx = fold(
        f"g (float[2] x) => (float[2] y) <float[2] w = {{1, 2}}> {{ {body} y = Add(x, t) }}"
    )
    assert not [r for r in ctx.rewrites if r.rule == "fold-constant"]
    assert len(model.graph) == 2


def test_training_dropout_is_not_folded() -> None:
    _, ctx = fold(
        """g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, float r = {0.5}, bool t = {1}>
        { d = Dropout(w, r, t) y = Add(x, d) }"""
    )
    assert not ctx.rewrites


def test_overridable_initializer_is_not_folded() -> None:
    _, ctx = fold(
        """<ir_version: 8, opset_import: ["": 18]> g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}>
        { t = Neg(w) y = Add(x, t) }"""
    )
    assert not ctx.rewrites


@pytest.mark.parametrize(
    "body",
    [
        "t = DequantizeLinear(q, s)",
        "r = QuantizeLinear(w, s) t = Cast<to = 1>(r)",
        "r, rs, rz = DynamicQuantizeLinear(w) t = Cast<to = 1>(r)",
    ],
)
def test_quantization_is_not_folded(body: str) -> None:
    _, ctx = fold(
        "g (float[2] x) => (float[2] y) <float[2] w = {1, 2}, int8[2] q = {1, 2}, float s = {0.5}>"
        f" {{ {body} y = Add(x, t) }}"
    )
    assert not [r for r in ctx.rewrites if r.rule == "fold-constant"]


def test_custom_operators_and_calls_are_not_folded() -> None:
    model = ir.from_proto(
        parse(
            """<ir_version: 9, opset_import: ["": 18, "l": 1, "c": 1]>
        g (float[2] x) => (float[2] y) <float[2] w = {1, 2}>
        { a = l.f(w) b = c.op(w) y = Sum(x, a, b) }
        <domain: "l", opset_import: ["": 18]> f (a) => (b) { b = Neg(a) }"""
        )
    )
    assert not apply([FoldConstants()], model).rewrites


def test_folding_in_branches_and_bodies() -> None:
    check(
        STEPS,
        """g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 4}> {
            v = Sqrt(w)
            y = If(c) <then_branch = t () => (float[2] a) { k = Neg(v) a = Add(x, k) },
                       else_branch = e () => (float[2] b) { b = Exp(v) }> }""",
        """g (bool c, float[2] x) => (float[2] y) {
            y = If(c) <then_branch = t () => (float[2] a) <float[2] k = {-1, -2}> { a = Add(x, k) },
                       else_branch = e () => (float[2] b)
                           { b = Constant<value = float[2] {2.7182817, 7.389056}>() }> }""",
    )


def test_folding_in_function_bodies_makes_constant_nodes() -> None:
    model = ir.from_proto(
        parse(
            """<ir_version: 9, opset_import: ["": 18, "l": 1]> g (float[2] x) => (float[2] y) { y = l.f(x) }
            <domain: "l", opset_import: ["": 18]> f (a) => (b)
            { c = Constant<value_floats = [1.0, 4.0]>() d = Sqrt(c) b = Add(a, d) }"""
        )
    )
    apply(STEPS, model)
    body = model.functions["l", "f", ""].graph
    assert [n.op_type for n in body] == ["Constant", "Add"]
    assert not list(violations(model))


def test_parameters_of_functions_are_not_folded() -> None:
    model = ir.from_proto(
        parse(
            """<ir_version: 9, opset_import: ["": 18, "l": 1]> g (float[2] x) => (float[2] y) { y = l.f<p = 0.5>(x) }
            <domain: "l", opset_import: ["": 18]> f <p> (a) => (b)
            { c = Constant<value_floats = [-1.0, 4.0]>() d = LeakyRelu<alpha: float = @p>(c) b = Add(a, d) }"""
        )
    )
    assert not apply([FoldConstants()], model).rewrites


def test_control_flow_with_constant_inputs_folds() -> None:
    check(
        STEPS,
        """g (float[2] x) => (float[2] y) <int64 n = {3}, bool c = {1}, float[2] w = {1, 2}> {
            t = Loop(n, c, w) <body = b (int64 i, bool ci, float[2] v) => (bool co, float[2] u)
                { co = Identity(ci) u = Add(v, w) }>
            y = Add(x, t) }""",
        "g (float[2] x) => (float[2] y) <float[2] t = {4, 8}> { y = Add(x, t) }",
    )


def test_control_flow_with_random_bodies_stays() -> None:
    _, ctx = fold(
        """g (float[2] x) => (float[2] y) <int64 n = {3}, bool c = {1}, float[2] w = {1, 2}> {
            t = Loop(n, c, w) <body = b (int64 i, bool ci, float[2] v) => (bool co, float[2] u)
                { co = And(ci, ci) u = RandomNormalLike(v) }>
            y = Add(x, t) }"""
    )
    assert {r.site for r in ctx.rewrites} <= {"co"}


def test_control_flow_over_a_feed_stays() -> None:
    _, ctx = fold(
        """g (float[2] x) => (float[2] y) <int64 n = {3}, bool c = {1}, float[2] w = {1, 2}> {
            y = Loop(n, c, w) <body = b (int64 i, bool ci, float[2] v) => (bool co, float[2] u)
                { co = Identity(ci) u = Add(v, x) }> }"""
    )
    assert {r.site for r in ctx.rewrites} <= {"co"}


def test_sequences_fold_on_the_way_but_are_not_stored() -> None:
    check(
        STEPS,
        """g (float[2] x) => (float[2] y) <float[4] w = {1, 2, 3, 4}, int64 two = {2}, int64 one = {1}>
        { s = SplitToSequence(w, two) t = SequenceAt(s, one) y = Add(x, t) }""",
        "g (float[2] x) => (float[2] y) <float[2] t = {3, 4}> { y = Add(x, t) }",
    )


def test_sequence_that_is_read_stays() -> None:
    _, ctx = fold(
        """g (int64 p) => (float[K] y) <float[4] w = {1, 2, 3, 4}, int64 two = {2}>
        { s = SplitToSequence(w, two) y = SequenceAt(s, p) }"""
    )
    assert not ctx.rewrites
    assert "no tensor" in ctx.remarks[0].reason


def test_strings_fold() -> None:
    model, _ = fold(
        """<ir_version: 9, opset_import: ["": 20]> g (string[2] x) => (string[2] y)
        { a = Constant<value_strings = ["p", "q"]>() b = StringConcat(a, a) y = StringConcat(x, b) }"""
    )
    assert kinds(model) == ["StringConcat"]
    got = run(ir.to_proto(model), {"x": np.array(["1", "2"], object)})
    assert list(got[0]) == ["1pp", "2qq"]


GROW = "g (float[N,1] x) => (float[N,K] y) <int64[1] n = {1000}> { t = ConstantOfShape(n) y = Add(x, t) }"


def test_result_within_the_limit_folds() -> None:
    model, _ = fold(GROW, limit=4000)
    assert kinds(model) == ["Add"]


def test_result_beyond_the_limit_stays() -> None:
    model, ctx = fold(GROW, limit=3000)
    assert kinds(model) == ["ConstantOfShape", "Add"]
    assert "3992 bytes larger" in ctx.remarks[0].reason


def test_large_value_that_shrinks_again_folds_through() -> None:
    model, _ = fold(
        """g (float[N,2] x) => (float[N,2] y) <int64[1] n = {100000}, int64[1] a = {5}, int64[1] b = {7}>
        { t = ConstantOfShape<value = float[1] {3.0}>(n) s = Slice(t, a, b) y = Add(x, s) }""",
        limit=100,
    )
    assert kinds(model) == ["Add"]


def test_value_too_large_to_make_is_not_tried() -> None:
    model, ctx = fold(
        """g (float[N,2] x) => (float[N,2] y)
        <int64[2] n = {1000000, 1000000}, int64[2] a = {0, 5}, int64[2] b = {1, 7}>
        { t = ConstantOfShape<value = float[1] {3.0}>(n) s = Slice(t, a, b) y = Add(x, s) }"""
    )
    assert kinds(model) == ["ConstantOfShape", "Slice", "Add"]
    assert "MiB" in ctx.remarks[0].reason


def test_many_growing_results_are_declined_together() -> None:
    nodes = " ".join(
        f"t{i} = ConstantOfShape<value = float[1] {{{i}.0}}>(n) u{i} = Exp(t{i})" for i in range(8)
    )
    names = ", ".join(f"u{i}" for i in range(8))
    text = f"g (float[N,1] x) => (float[N,K] y) <int64[1] n = {{10000}}> {{ {nodes} y = Sum(x, {names}) }}"
    model, ctx = fold(text, limit=100_000)
    assert kinds(model).count("ConstantOfShape") == 8
    assert any("8 such results" in remark.reason for remark in ctx.remarks)
    model, _ = fold(text, limit=1_000_000)
    assert kinds(model) == ["Sum"]


WEIGHT = "<float[40,40] w>"


def test_transposed_weight_folds() -> None:
    model, _ = fold(
        f"g (float[N,40] x) => (float[N,40] y) {WEIGHT} {{ t = Transpose(w) y = MatMul(x, t) }}"
    )
    assert kinds(model) == ["MatMul"]


@pytest.mark.parametrize("op", ["Transpose", "Cast<to = 1>", "Identity"])
def test_tied_weight_is_not_copied(op: str) -> None:
    model, ctx = fold(
        f"g (float[N,40] x) => (float[N,40] y) {WEIGHT} {{ t = {op}(w) a = MatMul(x, t) y = MatMul(a, w) }}"
    )
    assert len(model.graph) == 3
    assert "other uses" in ctx.remarks[0].reason


def test_widened_weight_is_not_stored() -> None:
    model, ctx = fold(
        f"g (double[N,40] x) => (double[N,40] y) {WEIGHT} {{ t = Cast<to = 11>(w) y = MatMul(x, t) }}",
        limit=5000,
    )
    assert kinds(model) == ["Cast", "MatMul"]
    assert "6400 bytes larger" in ctx.remarks[0].reason


@pytest.mark.parametrize("limit", [100, 5000, 7000])
def test_transposed_weight_with_several_readers_folds_once(limit: int) -> None:
    """The readers of the transposed weight would each be as large: the weight makes room for one of them."""
    model, _ = fold(
        f"""g (float[N,40] x) => (float[N,40] y, float[40,40] z, float[N,39] u) {WEIGHT}
        {{ t = Transpose(w) k = Exp(t) l = Neg(t) y = MatMul(x, k) q = MatMul(x, l) z = MatMul(l, k)
           a = Constant<value_ints = [0]>() b = Constant<value_ints = [39]>() c = Constant<value_ints = [1]>()
           u = Slice(q, a, b, c) }}""",
        limit=limit,
    )
    assert "Transpose" not in kinds(model)
    total = sum(
        v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
    )
    assert total <= 6400 + limit + 800


def test_view_of_a_mapped_weight_stays_in_the_file(tmp_path: Path) -> None:
    proto = parse(
        "g (float[N,50] x) => (float[N,40] y) <float[2000] w, int64[2] s = {50, 40}>"
        " { t = Reshape(w, s) y = MatMul(x, t) }"
    )
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    model = load_model(path)
    apply(STEPS, model)
    (value,) = model.graph.initializers.values()
    tensor = value.const_value
    assert isinstance(tensor, MappedTensor)
    assert tensor.mapping is not None
    assert list(tensor.shape.numpy()) == [50, 40]
    np.testing.assert_array_equal(
        tensor.numpy().reshape(-1), onnx.numpy_helper.to_array(proto.graph.initializer[1])
    )


def test_reshaped_declines_what_takes_a_copy() -> None:
    data = np.arange(6, dtype=np.float32)
    seen = reshaped(ir.tensor(data), [2, 3])
    assert seen is not None
    assert np.shares_memory(seen.numpy(), data)
    assert reshaped(ir.tensor(data.reshape(2, 3).T), [6]) is None
    assert reshaped(ir.StringTensor([b"a"], shape=ir.Shape([1])), [1, 1]) is None


def test_sparse_constant_counts_what_it_stores() -> None:
    sparse = CooTensor(ir.tensor(np.ones(1, np.float32)), ir.tensor(np.array([3])), [1000])
    assert stored_bytes(sparse) == 12
    model = ir.from_proto(
        parse("g (float[1000] x) => (float[1000] y) <float[1000] w> { t = Neg(w) y = Add(x, t) }")
    )
    model.graph.initializers["w"].const_value = sparse
    ctx = apply(STEPS, model, options=Options(fold_limit_bytes=3000))
    assert not ctx.rewrites
    assert "3988 bytes larger" in ctx.remarks[0].reason


def test_node_that_fails_stays_and_the_rest_folds() -> None:
    model = ir.from_proto(
        parse(
            """g (float[2] x) => (float[2] y) <float[2] w = {1, 4}, int64[1] i = {7}, float[1] o = {1.0}>
            { a = Gather(w, i) b = Add(a, o) c = Sqrt(w) y = Sum(x, b, c) }"""
        )
    )
    ctx = apply(STEPS, model)
    assert kinds(model) == ["Gather", "Add", "Sum"]
    assert [r.site for r in ctx.rewrites if r.rule == "fold-constant"] == ["c"]
    assert any("indices" in remark.reason for remark in ctx.remarks)


def test_result_of_unknown_size_is_measured() -> None:
    text = """g (float[K] x) => (float[K] y) <int64[1] n = {2000}>
        { m = ConstantOfShape<value = float[1] {1.0}>(n) i = NonZero(m)
          f = Cast<to = 1>(i) r = ReduceSum<keepdims = 0>(f, ax) y = Add(x, r) }"""
    text = text.replace("{2000}", "{2000}, int64[1] ax = {0}")
    model, _ = fold(text, limit=100_000)
    assert kinds(model) == ["Add"]
    model, ctx = fold(text, limit=1000)
    assert "Add" in kinds(model)
    assert len(model.graph) > 1
    assert any("bytes larger" in remark.reason for remark in ctx.remarks)


def test_several_outputs_of_one_node() -> None:
    check(
        STEPS,
        """g (float[2] x) => (float[2] y) <float[4] w = {3, 1, 2, 4}, int64[1] k = {2}>
        { v, i = TopK(w, k) f = Cast<to = 1>(i) y = Sum(x, v, f) }""",
        "g (float[2] x) => (float[2] y) <float[2] v = {4, 3}, float[2] f = {3, 0}> { y = Sum(x, v, f) }",
    )


def test_the_gate_leaves_out_a_fold() -> None:
    model = ir.from_proto(
        parse(
            "g (float[2] x) => (float[2] y) <float[2] w = {1, 4}> { a = Sqrt(w) b = Neg(w) y = Sum(x, a, b) }"
        )
    )
    gate = Gate(sites=frozenset({("fold-constants", "fold-constant", "a")}))
    ctx = Context(model, get_target("cpu"), gate=gate)
    run_pipeline(model, [FoldConstants()], ctx)
    assert kinds(model) == ["Sqrt", "Sum"]


def test_long_chain_folds_at_once() -> None:
    nodes = " ".join(f"t{i + 1} = Neg(t{i})" for i in range(600))
    model, ctx = fold(
        f"g (float[2] x) => (float[2] y) <float[2] t0 = {{1, 4}}> {{ {nodes} y = Add(x, t600) }}"
    )
    assert kinds(model) == ["Add"]
    assert len([r for r in ctx.rewrites if r.rule == "fold-constant"]) == 1
