"""Zero points of weights in blocks: what runtimes decode, when they are taken, and what takes none."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graphopt_passes.quantize import blocks, rounding
from graphopt_passes.quantize.weight_only import QuantizeWeights
from graphopt_passes.quantize.writers import Blocks, write_blocks

from graphopt.errors import OptionError
from graphopt.ir.build import Names
from graphopt.ir.check import violations
from graphopt.ir.model_file import load_model, to_proto
from graphopt.rewrite import Calibration, Context
from graphopt.targets import get_target
from tests.passes.quantize.test_weight_only import (
    GEMM,
    PAIR,
    TABLE,
    X,
    changed,
    context,
    sqnr,
    varied,
)
from tests.rewriting import parse, run

IDS = {"i": np.array([0, 7, 299, 7], np.int64)}
RNG = np.random.default_rng(5)


def shifted(text: str, opset: int = 21, dtype: Any = np.float32) -> onnx.ModelProto:
    """Weights that lie more on one side of 0."""
    proto = parse(text, opset=opset)
    rng = np.random.default_rng(1)
    for tensor in proto.graph.initializer:
        drawn = rng.normal(size=tuple(tensor.dims), loc=0.8, scale=0.3).astype(dtype)
        tensor.CopyFrom(onnx.numpy_helper.from_array(drawn, tensor.name))
    return proto


def written(proto: onnx.ModelProto, how: Blocks) -> onnx.ModelProto:
    """All products and look-ups in blocks, whether or not that pays."""
    model = load_model(proto)
    write_blocks(model, frozenset("ey"), Names.of(model), how)
    assert not list(violations(model))
    return to_proto(model)


def rounded(proto: onnx.ModelProto, block: int, bits: int) -> onnx.ModelProto:
    """The float model with what comes back of its weights."""
    found = onnx.ModelProto()
    found.CopyFrom(proto)
    for tensor in found.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor)
        rows = array if tensor.name == "t" or "transB" in str(proto) else array.T
        back = blocks.encode(rows, block, bits, zero_points=True).decoded(rows.shape[1])
        back = back if rows is array else back.T
        tensor.CopyFrom(onnx.numpy_helper.from_array(back.astype(array.dtype), tensor.name))
    return found


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("form", ["contrib", "qdq"])
@pytest.mark.parametrize("block", [16, 32])  # 96 columns: an even and an odd number of blocks
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_runtimes_decode_what_was_encoded(bits: int, form: str, block: int, dtype: Any) -> None:
    proto = shifted(
        TABLE if dtype is np.float32 else TABLE.replace("float[", "float16["), dtype=dtype
    )
    after = written(proto, Blocks(block, bits, form, "asymmetric"))
    assert len([t for t in after.graph.initializer if t.name.endswith("_zeros")]) == 2
    expected, got = run(rounded(proto, block, bits), IDS)[0], run(after, IDS)[0]
    lost = ((expected.astype(np.float64) - got) ** 2).sum()
    assert lost <= 1e-4 * (expected.astype(np.float64) ** 2).sum()
    wide = run(proto, IDS)[0].astype(np.float64)
    assert sqnr(wide, got.astype(np.float64)) > (25 if bits == 4 else 40)


@pytest.mark.parametrize("form", ["contrib", "qdq"])
def test_columns_that_are_no_whole_blocks(form: str) -> None:
    text = "g (float[n,100] x) => (float[n,160] y) <float[100,160] w> { y = MatMul(x, w) }"
    proto = shifted(text)
    after = written(proto, Blocks(32, 4, form, "asymmetric"))
    feed = {"x": RNG.normal(size=(5, 100)).astype(np.float32)}
    assert sqnr(run(proto, feed)[0], run(after, feed)[0]) > 20


def test_a_transposed_gemm_has_them_along_its_columns() -> None:
    proto = varied(GEMM, 21)
    after = written(proto, Blocks(32, 4, "qdq", "asymmetric"))
    kinds = {t.name: t.data_type for t in after.graph.initializer}
    node = after.graph.node[0]
    assert [kinds[name] for name in node.input] == [
        onnx.TensorProto.UINT4,
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.UINT4,
    ]
    feed = {"x": X.reshape(-1, 96)[:4]}
    assert sqnr(run(proto, feed)[0], run(after, feed)[0]) > 15


def zeros_of(proto: onnx.ModelProto) -> list[str]:
    return [t.name for t in proto.graph.initializer if t.name.endswith("_zeros")]


def test_they_are_taken_where_they_pay() -> None:
    proto = shifted(PAIR, 18)
    # One matrix lies on the codes of blocks without zero points.
    exact = RNG.integers(-8, 8, size=(96, 128)).astype(np.float32)
    exact[::32] = -8
    proto.graph.initializer[1].CopyFrom(onnx.numpy_helper.from_array(exact, "v"))
    assert zeros_of(changed(proto, QuantizeWeights(least=1))) == ["w_zeros"]
    assert not zeros_of(changed(proto, QuantizeWeights(least=1, scheme="symmetric")))
    found = zeros_of(changed(proto, QuantizeWeights(least=1, scheme="asymmetric")))
    assert found == ["w_zeros", "v_zeros"]


@pytest.mark.parametrize(("bits", "gain"), [(4, 1.08), (8, 1.3)])
def test_they_lose_less_of_weights_on_both_sides_too(bits: int, gain: float) -> None:
    rows = RNG.normal(size=(64, 256)).astype(np.float32)
    lost = [
        ((blocks.encode(rows, 32, bits, zero_points=each).decoded(256) - rows) ** 2).sum()
        for each in (False, True)
    ]
    assert lost[0] > gain * lost[1]
    assert blocks.wants_zero_points(rows, 32, bits)


@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-42])
def test_blocks_of_one_number(value: float) -> None:
    rows = np.full((4, 64), value, np.float32)
    made = blocks.encode(rows, 32, 4, zero_points=True)
    assert np.isfinite(made.scales).all()
    assert (made.scales > 0).all()
    np.testing.assert_allclose(made.decoded(64), rows, rtol=1e-6, atol=1e-37)


def test_second_moments_decide_where_they_are_known() -> None:
    rows = 5 + RNG.normal(size=(48, 64)).astype(np.float32)
    rows[:, 32:] = np.clip(np.rint((rows[:, 32:] - 5) * 2), -8, 6)
    rows[:, 32] = -8  # no zero point does better here, and almost all that is read is here
    power = np.diag(np.repeat([1e-6, 1.0], 32))
    assert blocks.wants_zero_points(rows, 32, 4)
    assert not blocks.wants_zero_points(rows, 32, 4, rounding.Moments.of(power + 1e-9))


def test_rounding_by_second_moments_knows_zero_points() -> None:
    rows = RNG.normal(size=(24, 64), loc=0.5).astype(np.float32)
    inputs = RNG.normal(size=(300, 6)) @ RNG.normal(size=(6, 64))
    inputs += 0.1 * RNG.normal(size=inputs.shape)
    moments = rounding.Moments.of(inputs.T @ inputs / len(inputs))
    nearest = blocks.encode(rows, 32, 4, zero_points=True)
    made = blocks.encode(rows, 32, 4, moments, zero_points=True)
    assert made.codes.min() >= -8
    assert made.codes.max() <= 7
    lost = [rounding.error(rows - each.decoded(64), moments.damped) for each in (nearest, made)]
    assert lost[1] < lost[0] / 3


def test_samples_and_zero_points_together() -> None:
    proto = shifted("g (float[n,96] x) => (float[n,160] y) <float[96,160] w> { y = MatMul(x, w) }")
    mix = RNG.normal(size=(6, 96))
    feeds = [{"x": (RNG.normal(size=(64, 6)) @ mix).astype(np.float32)} for _ in range(6)]
    found = []
    for scheme in ("symmetric", "asymmetric"):
        model = load_model(proto)
        ctx = context(model, calibration=Calibration(feeds[1:]))
        assert QuantizeWeights(least=1, scheme=scheme).run(model, ctx)
        found.append(sqnr(run(proto, feeds[0])[0], run(to_proto(model), feeds[0])[0]))
    assert found[1] > found[0] + 1


def test_a_target_without_zero_points() -> None:
    model = load_model(varied(PAIR, 21))
    ctx = Context(model, get_target("tensorrt"), pass_name="quantize")
    with pytest.raises(
        OptionError, match="the weight of 'y' zero points, and the target 'tensorrt'"
    ):
        QuantizeWeights(least=1, form="qdq", scheme="asymmetric").run(model, ctx)
    overrides = ("z: scheme=auto",)
    assert QuantizeWeights(least=1, form="qdq", overrides=overrides).run(model, ctx)
    assert not zeros_of(to_proto(model))


def test_an_unknown_scheme_is_refused() -> None:
    model = load_model(varied(PAIR))
    with pytest.raises(OptionError, match="scheme 'both': choose one of auto, symmetric"):
        QuantizeWeights(scheme="both").run(model, context(model))
