"""What a recipe says of single weights in blocks, and of products that are quantised as they come."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graphopt_passes.quantize.single_blocks import Settings, parse_rules, settings_of
from graphopt_passes.quantize.weight_only import QuantizeDynamic, QuantizeWeights

from graphopt.errors import OptionError
from graphopt.ir.model_file import load_model
from graphopt.rewrite import Context
from graphopt.targets import get_target
from tests.passes.quantize.test_weight_only import changed, context, varied
from tests.rewriting import run

SHARED = """g (float[n,6,96] x) => (float[n,6,160] y, float[n,6,160] z) <float[96,160] w> {
 y = MatMul(x, w)  z = MatMul(x, w) }"""
PAIR = """g (float[n,6,96] x) => (float[n,6,160] y, float[n,6,128] z) <float[96,160] w, float[96,128] v> {
 y = MatMul(x, w)  z = MatMul(x, v) }"""
FEED = {"x": np.random.default_rng(0).normal(size=(2, 6, 96)).astype(np.float32)}


def test_later_rules_win_and_what_is_skipped_is_excluded() -> None:
    rules = parse_rules(("c",), ("a*: bits=8 block=64", "*b: dtype=int4"))
    assert settings_of(rules, "ab") == Settings(bits=4, block=64)
    assert settings_of(rules, "c") == Settings(exclude=True)
    assert settings_of(rules, "x", "y") == Settings()


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a: ",
        "a: bits=3",
        "a: block=48",
        "a: dtype=int16",
        "a: dtype=float8e4m3fn",
        "a: exclude=1",
        "a: scheme=both",
    ],
)
def test_what_no_kernel_takes_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="bits are 4 or 8"):
        parse_rules((), (text,))


def bits_of(proto: onnx.ModelProto) -> dict[str, tuple[str, int, int]]:
    found = {}
    for node in proto.graph.node:
        held = {each.name: each.i for each in node.attribute}
        found[node.output[0]] = (node.op_type, held.get("bits", 0), held.get("block_size", 0))
    return found


def test_one_weight_in_8_bits_among_those_in_4() -> None:
    proto = varied(PAIR)
    after = changed(proto, QuantizeWeights(least=1, overrides=("z: bits=8 block=64",)))
    assert bits_of(after) == {"y": ("MatMulNBits", 4, 32), "z": ("MatMulNBits", 8, 64)}
    noise = [
        ((ours - theirs) ** 2).sum() / (ours**2).sum()
        for ours, theirs in zip(run(proto, FEED), run(after, FEED), strict=True)
    ]
    assert noise[1] < noise[0] / 20


def test_blocks_for_every_runtime_take_them_too() -> None:
    after = changed(
        varied(PAIR),
        QuantizeWeights(least=1, form="qdq", scheme="symmetric", overrides=("z: bits=8",)),
    )
    kinds = {t.name: t.data_type for t in after.graph.initializer}
    decodes = [node for node in after.graph.node if node.op_type == "DequantizeLinear"]
    assert sorted(kinds[node.input[0]] for node in decodes) == [
        onnx.TensorProto.INT8,
        onnx.TensorProto.INT4,
    ]


def test_one_weight_with_zero_points_among_those_without() -> None:
    given = QuantizeWeights(least=1, scheme="symmetric", overrides=("z: scheme=asymmetric",))
    after = changed(varied(PAIR), given)
    assert [len(node.input) for node in after.graph.node] == [3, 4]


def test_tensorrt_refuses_zero_points_of_single_weights_too() -> None:
    model = load_model(varied(PAIR, 21))
    ctx = Context(model, get_target("tensorrt"), pass_name="quantize")
    given = QuantizeWeights(least=1, form="qdq", overrides=("z: scheme=asymmetric",))
    with pytest.raises(
        OptionError, match="the weight of 'z' zero points, and the target 'tensorrt'"
    ):
        given.run(model, ctx)


def test_a_shared_weight_is_stored_once_a_format() -> None:
    proto = varied(SHARED)
    after = changed(proto, QuantizeWeights(least=1, overrides=("z: bits=8",)))
    assert bits_of(after) == {"y": ("MatMulNBits", 4, 32), "z": ("MatMulNBits", 8, 32)}
    for ours, theirs in zip(run(proto, FEED), run(after, FEED), strict=True):
        assert ((ours - theirs) ** 2).sum() < 0.02 * (ours**2).sum()


@pytest.mark.parametrize("each", [
    QuantizeWeights(least=1, skip_nodes=("z",)), QuantizeWeights(least=1, overrides=("z: exclude",)),
    QuantizeDynamic(1, ("z",)),
])  # fmt: skip
def test_a_product_can_be_left_out(each: QuantizeDynamic | QuantizeWeights) -> None:
    found = bits_of(changed(varied(PAIR), each))
    assert found["z"][0] == "MatMul"
    assert found["y"][0] != "MatMul"


@pytest.mark.parametrize(
    "each", [QuantizeWeights(least=1, overrides=("nix: bits=8",)), QuantizeDynamic(1, ("nix",))]
)
def test_a_name_that_nothing_has_is_refused(each: QuantizeDynamic | QuantizeWeights) -> None:
    model = load_model(varied(PAIR))
    with pytest.raises(OptionError, match="'nix' is the name of no node"):
        each.run(model, context(model))
