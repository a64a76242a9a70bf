"""The casting pass: what becomes half, what does not and why; judged in emulated half precision."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes import PREPARE
from graphopt_passes.precision import CastToHalf

from graphopt.driver import optimize
from graphopt.errors import TargetError
from graphopt.pipeline import run_pipeline
from graphopt.rewrite import Calibration, Context, Gate, Options
from graphopt.specialize import Specialization
from graphopt.targets import get_target
from tests.passes.precision.casting import Array, cast, casts, error, halves, normal, reasons
from tests.rewriting import parse

MLP = (
    "g (float[N,16] x) => (float[N,8] y) <float[16,32] w, float[32,8] v>"
    "{ a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }"
)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("target", ["cuda", "tensorrt", "portable"])
def test_a_network_is_half_between_two_casts(target: str, precision: str) -> None:
    model, _, proto = cast(MLP, target=target, precision=precision)
    assert halves(model) == ["MatMul", "Relu", "MatMul"]
    assert casts(model) == 2
    assert all(v.dtype != ir.DataType.FLOAT for v in model.graph.initializers.values())
    assert error(model, proto, {"x": normal(3, 16)}) < (0.01 if precision == "fp16" else 0.06)


def test_a_second_run_changes_nothing() -> None:
    model, _, _ = cast(MLP)
    before = ir.to_proto(model)
    ctx = Context(model, get_target("cuda"))
    run_pipeline(model, (CastToHalf(),), ctx)
    assert not ctx.rewrites
    assert ir.to_proto(model).graph.node == before.graph.node


def test_the_cpu_refuses_unless_forced() -> None:
    with pytest.raises(TargetError, match=r"no float16 arithmetic.*--force"):
        cast(MLP, target="cpu")
    model, _, _ = cast(MLP, target="cpu", options=Options(force=True))
    assert halves(model)


def test_operators_without_a_half_kernel_stay() -> None:
    text = (
        "g (float[1,4,6,6] x, float[1,5,5,2] grid) => (float[1,4,5,5] y) <float[4,4,1,1] w>"
        "{ c = Conv(x, w) y = GridSample(c, grid) }"
    )
    model, ctx, _ = cast(text)
    assert "no float16 kernel" in reasons(ctx)["y"]
    assert halves(model) == ["Conv"]


def test_the_schema_decides_by_opset() -> None:
    text = "g (float[1,4,6,6] x) => (float[1,4,6,6] y) <float[4,4,1,1] w> { y = Conv(x, w) }"
    _, ctx, _ = cast(text, precision="bf16", target="tensorrt", opset=18)
    assert reasons(ctx)["y"] == "Conv: schema: bfloat16 from opset 22 on, the model imports 18"
    model, _, _ = cast(text, precision="bf16", target="tensorrt", opset=22)
    assert halves(model) == ["Conv"]


def test_statistics_of_a_norm_stay_float32() -> None:
    text = (
        "g (float[N,16] x) => (float[N,16] y, float[N,1] m) <float[16,16] w, float[16] s, float[16] b>"
        "{ h = MatMul(x, w) y, m = LayerNormalization(h, s, b) }"
    )
    model, _, proto = cast(text)
    norm = next(n for n in model.graph if n.op_type == "LayerNormalization")
    assert [v.dtype for v in norm.outputs] == [ir.DataType.FLOAT16, ir.DataType.FLOAT]
    assert error(model, proto, {"x": normal(3, 16)}) < 0.01


def test_overflow_in_the_middle_stays_float32() -> None:
    text = (
        "g (float[N,64] x) => (float[N,8] y) <float[64,64] w, float[64,8] v>"
        "{ a = MatMul(x, w) b = Mul(a, big) c = Mul(b, small) y = MatMul(c, v) }"
    )
    constants = {"big": np.array(3e4, np.float32), "small": np.array(1e-5, np.float32)}
    model, ctx, proto = cast(text, constants=constants)
    assert "range: |b| reaches" in reasons(ctx)["b"]
    assert "range: |b| reaches" in reasons(ctx)["c"]
    assert halves(model) == ["MatMul", "MatMul"]
    assert error(model, proto, {"x": normal(3, 64)}) < 0.01


def test_calibration_samples_decide_where_given() -> None:
    text = "g (float[N,16] x) => (float[N,16] y) <float[16,16] w> { a = MatMul(x, w) y = Exp(a) }"
    calm = Options(calibration=Calibration([{"x": normal(3, 16, scale=0.01)}]))
    assert halves(cast(text, options=calm)[0]) == ["MatMul", "Exp"]
    wild = Options(calibration=Calibration([{"x": normal(3, 16, scale=2.0)}]))
    model, ctx, _ = cast(text, options=wild)
    assert "Exp" not in halves(model)
    assert "range: |y| reaches" in reasons(ctx)["y"]


def test_without_data_the_plan_is_conservative() -> None:
    text = (
        "g (float[N,16] x, int64[2] s) => (float[P,Q] y) <float[16,16] w>"
        "{ a = MatMul(x, w) e = Exp(a) b = MatMul(e, w) y = Reshape(b, s) }"
    )
    # No feed suits a shape that nobody knows: the samples given do not fit on purpose.
    options = Options(calibration=Calibration([{"x": normal(3, 16), "s": np.array([7, 7])}]))
    model, ctx, _ = cast(text, options=options)
    assert any("without data" in r.reason and "--calibration" in r.reason for r in ctx.remarks)
    assert reasons(ctx)["e"] == "Exp: without data its range is not known"
    assert "MatMul" in halves(model)


MASKED = (
    "g (float[4,16] x, bool[4,16] m) => (float[4,16] y) <float[16,16] w>"
    "{ s = MatMul(x, w) k = Where(m, s, low) y = Softmax <axis = -1> (k) }"
)


@pytest.mark.parametrize("low", [np.finfo(np.float32).min, -1e9, -np.inf])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_masks_hide_and_a_masked_row_stays_finite(low: float, precision: str) -> None:
    constants = {"low": np.array(low, np.float32)}
    rough = Options(budget="max<=0.2")
    model, _, proto = cast(MASKED, precision=precision, constants=constants, options=rough)
    assert halves(model) == ["MatMul", "Where", "Softmax"]
    mask = np.tri(4, 16, 3, dtype=bool)
    mask[2] = False
    feeds = {"x": normal(4, 16, scale=0.3), "m": mask}
    assert error(model, proto, feeds) < (0.01 if precision == "fp16" else 0.06)


def test_a_mask_that_stays_float32_is_bounded_before_it_becomes_half() -> None:
    gate = Gate(sites=frozenset({("cast-to-half", "cast", "k")}))
    constants = {"low": np.array(np.finfo(np.float32).min, np.float32)}
    model, _, proto = cast(MASKED, gate=gate, constants=constants)
    assert halves(model) == ["MatMul", "Softmax"]
    assert [node.op_type for node in model.graph].count("Max") == 1
    feeds = {"x": normal(4, 16, scale=0.3), "m": np.zeros((4, 16), bool)}
    assert error(model, proto, feeds) < 0.01


def test_a_mask_in_float32_that_infinities_go_into_keeps_its_softmax_there() -> None:
    text = (
        "g (float[4,16] x, bool[4,16] m, bool[4,16] n) => (float[4,16] y) <float[16,16] w>"
        "{ s = MatMul(x, w) k = Where(m, s, low) l = Where(n, k, lowest) y = Softmax <axis = -1> (l) }"
    )
    gate = Gate(sites=frozenset(("cast-to-half", "cast", site) for site in ("k", "l")))
    low = np.array(np.finfo(np.float32).min, np.float32)
    constants = {"low": low, "lowest": np.array(-np.inf, np.float32)}
    model, ctx, proto = cast(text, gate=gate, constants=constants)
    assert halves(model) == ["MatMul"]
    assert any("a mask that it reads stays float32" in remark.reason for remark in ctx.remarks)
    feeds = {"x": normal(4, 16, scale=0.3), "m": np.ones((4, 16), bool)}
    assert error(model, proto, {**feeds, "n": np.tri(4, 16, 3, dtype=bool)}) < 0.01


def test_a_large_negative_constant_that_is_no_mask_stays_float32() -> None:
    text = (
        "g (float[4,16] x) => (float[4,16] y) <float[16,16] w> { s = MatMul(x, w) y = Add(s, low) }"
    )
    _, ctx, _ = cast(text, constants={"low": np.array(-1e6, np.float32)})
    assert "|low| reaches 1e+06" in reasons(ctx)["y"]


def test_weights_that_a_half_does_not_hold_are_scaled_by_a_power_of_two() -> None:
    text = (
        "g (float[4,16] x) => (float[4,16] y) <float[16,16] v>"
        "{ a = MatMul(x, w) b = Mul(a, k) y = MatMul(b, v) }"
    )
    constants = {"w": normal(16, 16, scale=1e-8), "k": np.array(1e8, np.float32)}
    model, _, proto = cast(text, constants=constants)
    assert halves(model) == ["MatMul", "MatMul"]
    scaled = next(v for n, v in model.graph.initializers.items() if n.startswith("w_"))
    assert scaled.const_value is not None
    ratio = scaled.const_value.numpy().astype(np.float64) / constants["w"]
    assert float(np.median(np.log2(ratio))) == pytest.approx(
        round(np.median(np.log2(ratio))), abs=1e-3
    )
    assert error(model, proto, {"x": normal(4, 16)}) < 0.01


def test_a_product_beyond_a_half_is_scaled_too() -> None:
    text = "g (float[4,3,8,8] x) => (float[4,4,8,8] y) { c = Conv<pads=[1,1,1,1]>(x, w, b) y = Mul(c, k) }"
    constants = {
        "w": normal(4, 3, 3, 3, scale=3e4),
        "b": normal(4, scale=3e4),
        "k": np.array(1e-5, np.float32),
    }
    model, ctx, proto = cast(text, constants=constants)
    assert halves(model) == ["Conv"]
    assert "range" in reasons(ctx)["y"]
    assert error(model, proto, {"x": normal(4, 3, 8, 8)}) < 0.01


def test_weights_of_every_size_are_not_scaled() -> None:
    text = "g (float[4,16] x) => (float[4,16] y) { a = MatMul(x, w) y = Mul(a, k) }"
    sizes = np.where(np.arange(16) % 2, 1e-12, 1.0).astype(np.float32)
    constants = {"w": normal(16, 16) * sizes, "k": (1 / sizes).astype(np.float32)}
    model, _, proto = cast(text, constants=constants)
    assert error(model, proto, {"x": normal(4, 16)}) < 0.01


def test_a_small_epsilon_stays_what_it_is() -> None:
    text = (
        "g (float[4,16] x) => (float[4,16] y) <float[16,16] w>"
        "{ a = MatMul(x, w) q = Mul(a, a) e = Add(q, eps) y = Sqrt(e) }"
    )
    options = Options(calibration=Calibration([{"x": normal(4, 16)}]))
    _, ctx, _ = cast(text, options=options, constants={"eps": np.array(1e-12, np.float32)})
    assert "rounding eps" in reasons(ctx)["e"]


def test_shapes_computed_in_floats_stay_exact() -> None:
    text = (
        "g (float[B,L] x) => (float[P,Q] y) <float[3000,3000] w>"
        "{ h = MatMul(x, w) s = Shape(h) i = Constant<value_int=1>() d = Gather(s, i) f = Cast<to=1>(d)"
        " o = Constant<value_float=1.0>() g = Mul(f, o) t = Cast<to=7>(g) z = Constant<value_ints=[0]>()"
        " u = Unsqueeze(t, z) m = Constant<value_ints=[-1]>() p = Concat<axis=0>(m, u) y = Reshape(h, p) }"
    )
    options = Options(calibration=Calibration([{"x": normal(2, 3000)}]))
    model, ctx, _ = cast(text, options=options)
    assert "shape path" in reasons(ctx)["g"]
    assert "MatMul" in halves(model)


def test_positions_stay_float32_through_sine() -> None:
    text = (
        "g (int64[1,L] ids, float[L,8] x) => (float[L,8] y) <float[1,8] freq, float[8,8] w>"
        "{ f = Cast<to=1>(ids) c = Constant<value_ints=[1,0]>() t = Transpose(f) a = MatMul(t, freq)"
        " s = Sin(a) h = MatMul(x, w) y = Mul(h, s) }"
    )
    ids = np.arange(5000, 5010)[None]
    options = Options(calibration=Calibration([{"ids": ids, "x": normal(10, 8)}]))
    model, ctx, proto = cast(text, options=options)
    assert "counts" in reasons(ctx)["a"]
    assert "counts" in reasons(ctx)["s"]
    assert "MatMul" in halves(model)
    assert error(model, proto, {"ids": ids, "x": normal(10, 8)}) < 0.01


def test_user_round_trips_keep_their_rounding() -> None:
    text = (
        "g (float[4,16] x) => (float[4,16] y, float[4,16] z) <float[16,16] w>"
        "{ h = MatMul(x, w) n = Cast<to=10>(h) r = Cast<to=1>(n) z = Cast<to=1>(n) y = MatMul(r, w) }"
    )
    model, _, proto = cast(text, precision="bf16")
    assert any(
        node.attributes["to"].as_int() == 10 for node in model.graph if node.op_type == "Cast"
    )
    assert error(model, proto, {"x": normal(4, 16)}) < 0.06


def test_one_cast_serves_every_reader_inside_bodies_too() -> None:
    text = (
        "g (float[4,16] x, bool c) => (float[4,16] y) <float[16,16] w, float[16,16] v>"
        "{ h = MatMul(x, w) g = MatMul(x, v)"
        " o = If(c) <then_branch = t () => (float[4,16] a) { a = MatMul(x, w) },"
        "           else_branch = e () => (float[4,16] b) { b = MatMul(x, v) }>"
        " s = Add(h, g) y = Add(s, o) }"
    )
    model, _, proto = cast(text)
    assert casts(model) == 2
    assert halves(model) == ["MatMul", "MatMul", "If", "Add", "Add"]
    for choice in (True, False):
        assert error(model, proto, {"x": normal(4, 16), "c": np.array(choice)}) < 0.01


def test_loop_state_stays_float32_at_the_boundary() -> None:
    text = (
        "g (float[4,16] x, int64 n, bool c) => (float[4,16] y) <float[16,16] w>"
        "{ y = Loop(n, c, x) <body = l (int64 i, bool p, float[4,16] s) => (bool o, float[4,16] t)"
        "      { o = Identity(p) m = MatMul(s, w) t = Tanh(m) }> }"
    )
    model, _, proto = cast(text, options=Options(budget="max<=0.2"))
    loop = next(node for node in model.graph if node.op_type == "Loop")
    body = loop.attributes["body"].as_graph()
    assert any(node.outputs[0].dtype == ir.DataType.FLOAT16 for node in body)
    assert body.outputs[1].dtype == ir.DataType.FLOAT
    feeds = {"x": normal(4, 16), "n": np.array(3), "c": np.array(True)}
    assert error(model, proto, feeds) < 0.05


def test_shared_weights_are_duplicated_where_one_reader_stays() -> None:
    text = (
        "g (float[16,16] x, int64[1] i) => (float[16,16] y, float[?,16] z) <float[16,16] w>"
        "{ y = MatMul(x, w) l = SequenceConstruct(w, w) z = ConcatFromSequence<axis = 0>(l) }"
    )
    model, ctx, _ = cast(text)
    dtypes = sorted(v.dtype.name for v in model.graph.initializers.values() if v.dtype)
    assert dtypes == ["FLOAT", "FLOAT16"]
    assert "sequence" in reasons(ctx)["z"]


def test_quantised_arithmetic_stays_as_written() -> None:
    text = (
        "g (float[4,16] x) => (float[4,16] y) <float[16,16] w>"
        "{ q = QuantizeLinear(x, s, p) d = DequantizeLinear(q, s, p) e = DequantizeLinear(v, s, p)"
        " h = MatMul(d, e) y = MatMul(h, w) }"
    )
    constants: dict[str, Array] = {
        "s": np.array(1e-2, np.float32),
        "v": np.eye(16, dtype=np.int8),
        "p": np.array(0, np.int8),
    }
    model, ctx, _ = cast(text, constants=constants)
    assert "scales stay float32" in reasons(ctx)["q"]
    assert "quantised operands" in reasons(ctx)["h"]
    assert halves(model) == ["MatMul"]


def test_a_product_of_dequantised_values_and_float_weights_is_no_integer_kernel() -> None:
    text = (
        "g (float[4,16] x) => (float[4,16] y) <float[16,16] w>"
        "{ q = QuantizeLinear(x, s, p) d = DequantizeLinear(q, s, p) y = MatMul(d, w) }"
    )
    constants: dict[str, Array] = {"s": np.array(0.1, np.float32), "p": np.array(0, np.int8)}
    model, _, _ = cast(text, constants=constants)
    assert halves(model) == ["MatMul"]


def test_what_is_quantised_next_keeps_its_steps() -> None:
    text = (
        "g (float[4,16] x) => (int8[4,16] q) <float[16,16] w>"
        "{ h = MatMul(x, w) q = QuantizeLinear(h, s, p) }"
    )
    constants: dict[str, Array] = {"s": np.array(0.1, np.float32), "p": np.array(0, np.int8)}
    model, ctx, _ = cast(text, constants=constants)
    assert halves(model) == []
    assert "quantised next" in reasons(ctx)["h"]


def test_cheap_islands_are_not_worth_their_casts() -> None:
    _, ctx, _ = cast("g (float[N] x, float[N] z) => (float[N] y) { y = Add(x, z) }")
    assert reasons(ctx)["y"] == "Add: cost: 3 casts around 1 cheap nodes would not pay"


def test_overridable_defaults_stay_inputs_of_their_dtype() -> None:
    text = "g (float[4,16] x, float[16,16] w) => (float[4,16] y) { y = MatMul(x, w) }"
    model, ctx, proto = cast(text, constants={"w": normal(16, 16)})
    assert halves(model) == ["MatMul"]
    assert any("1 weights are inputs with defaults" in remark.reason for remark in ctx.remarks)
    assert error(model, proto, {"x": normal(4, 16), "w": normal(16, 16, scale=2)}) < 0.01


def test_old_opsets_have_no_bfloat16() -> None:
    _, ctx, _ = cast(MLP, precision="bf16", opset=12)
    assert not ctx.rewrites
    assert any("from opset 13 on" in remark.reason for remark in ctx.remarks)


def test_bfloat16_sentinel_is_a_bfloat16() -> None:
    model, _, _ = cast(
        MASKED, precision="bf16", constants={"low": np.array(np.finfo(np.float32).min, np.float32)}
    )
    value = next(v for n, v in model.graph.initializers.items() if n.startswith("low"))
    assert value.const_value is not None
    assert value.const_value.numpy().dtype == ml_dtypes.bfloat16
    assert float(value.const_value.numpy()) == pytest.approx(-1e38, rel=0.01)


def test_every_precision_hazard_is_right_in_true_half_precision(zoo: Any) -> None:
    for folder in sorted((zoo / "precision").iterdir()):
        proto = onnx.load(folder / "model.onnx")
        model = ir.from_proto(proto)
        run_pipeline(model, (*PREPARE, CastToHalf()), Context(model, get_target("cuda")))
        onnx.checker.check_model(ir.to_proto(model), full_check=True)
        feeds = {
            info.name: onnx.numpy_helper.to_array(
                onnx.load_tensor(str(folder / "test_data_set_0" / f"input_{index}.pb"))
            )
            for index, info in enumerate(proto.graph.input)
        }
        assert error(model, proto, feeds) < 0.01, folder.name


def test_a_mask_that_a_product_adds_is_a_mask() -> None:
    text = (
        "g (float[4,8] x, float[4,16] m) => (float[4,16] y) <float[8,16] w>"
        "{ o = Mul(m, low) s = Gemm(x, w, o) y = Softmax<axis=-1>(s) }"
    )
    hidden = np.tri(4, 16, dtype=np.float32)
    constants = {"low": np.array(np.finfo(np.float32).min, np.float32)}
    samples = Calibration([{"x": normal(4, 8), "m": hidden}])
    model, _, proto = cast(text, constants=constants, options=Options(calibration=samples))
    assert halves(model) == ["Mul", "Gemm", "Softmax"]
    feeds = {"x": normal(4, 8, scale=0.1), "m": np.ones((4, 16), np.float32)}
    assert error(model, proto, feeds) < 0.01


def test_what_is_divided_by_keeps_what_a_half_would_make_zero() -> None:
    text = (
        "g (float[4,16] x) => (float[4,16] y) <float[16,16] w>"
        "{ a = MatMul(x, w) e = Mul(a, tiny) y = Div(a, e) }"
    )
    constants = {"tiny": np.array(3e-7, np.float32)}
    samples = Calibration([{"x": np.abs(normal(4, 16))}])
    model, ctx, proto = cast(text, constants=constants, options=Options(calibration=samples))
    assert "divided by" in reasons(ctx)["y"] or "rounding" in reasons(ctx)["y"]
    assert error(model, proto, {"x": np.abs(normal(4, 16))}) < 0.01


def test_branches_and_loops_keep_to_the_ranges_seen_inside() -> None:
    text = (
        "g (float[4,16] x, bool c) => (float[4,16] y) <float[16,16] w>"
        "{ h = MatMul(x, w) y = If(c) <then_branch = t () => (float[4,16] a)"
        "   { e = Mul(h, big) f = Mul(e, e) r = Sqrt(f) a = Div(r, big) },"
        "   else_branch = e () => (float[4,16] b) { b = Identity(h) }> }"
    )
    model, ctx, proto = cast(text, constants={"big": np.array(2000, np.float32)})
    assert "range: |e| reaches" in reasons(ctx)["f"]
    for choice in (True, False):
        assert error(model, proto, {"x": normal(4, 16), "c": np.array(choice)}) < 0.01


def test_the_type_of_each_input_and_output_can_be_chosen() -> None:
    made = optimize(
        parse(MLP),
        target="cuda",
        precision="fp16",
        specialize=Specialization(dtypes={"x": "float16"}),
    )
    assert [v.dtype for v in (*made.model.graph.inputs, *made.model.graph.outputs)] == [
        ir.DataType.FLOAT16,
        ir.DataType.FLOAT,
    ]
    assert casts(made.model) == 1
