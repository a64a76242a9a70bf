"""Quantisation without calibration: weights in 8 bits with activations quantised as they come, or in 4 bits alone.

Source: com.microsoft MatMulIntegerToFloat and MatMulNBits, ONNX Runtime 1.31 (ContribOperators.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.calibrate.samples import read_samples
from graphopt.errors import GraphoptError, OptionError
from graphopt.ir import fingerprint, operators, values
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind, name_of
from graphopt.runtime.session import Session
from graphopt.runtime.specs import input_specs
from graphopt.targets import Precision
from graphopt.verify.budget import budget_for
from graphopt.verify.feed_files import Feed
from graphopt.verify.feeds import find_feeds
from graphopt_passes.quantize import weights
from graphopt_passes.quantize.certificate import Judgement

MICROSOFT = "com.microsoft"
GAIN = 1.02
JUDGED = 8
Write = Callable[[ir.Model, frozenset[str], Names], None]


@dataclasses.dataclass(frozen=True)
class QuantizeDynamic:
    """Multiplies in 8 bits with activations quantised as they come; needs no calibration.

    Before:  y = MatMul(x, W)
    After:   q, s, z = DynamicQuantizeLinear(x)   y = MatMulIntegerToFloat(q, Wq, s, ws, z)
    Changes numerics: lossy.  Leaves alone: convolutions, whose integer kernels are slower without static ranges, small
    weights, and everything where the result is not faster than float.

    Attributes:
        least: elements of a weight from which on it pays.
    """

    least: int = 1 << 14

    name: ClassVar[str] = "quantize-dynamic"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        if model.opset_imports.get("", 0) < 11:
            return _decline(ctx, "DynamicQuantizeLinear came with opset 11: export the model anew")
        return _run(model, ctx, Precision.INT8_DYNAMIC, self.least, write_dynamic)


@dataclasses.dataclass(frozen=True)
class QuantizeWeights:
    """Stores weights of matrix products in 4 bits, a scale a block: an eighth of the bytes to read.

    Before:  y = MatMul(x, W)
    After:   y = MatMulNBits(x, Wq, scales)
    Changes numerics: lossy.  Leaves alone: convolutions, small weights, and everything where the result is slower than
    float here and now: many rows at once favour float, single tokens 4 bits.

    Attributes:
        block: elements of a column that share a scale: a power of two from 16.
        least: elements of a weight from which on it pays.
    """

    block: int = 32
    least: int = 1 << 14

    name: ClassVar[str] = "quantize-weights"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed.

        Raises:
            OptionError: a block size that no kernel takes.
        """
        if self.block < 16 or self.block & (self.block - 1) or self.block > 256:
            raise OptionError(f"block size {self.block}: choose 16, 32, 64, 128 or 256")

        def write(changed: ir.Model, sites: frozenset[str], names: Names) -> None:
            write_blocks(changed, sites, names, self.block)

        return _run(model, ctx, Precision.INT4_WEIGHTS, self.least, write)


def _run(model: ir.Model, ctx: Context, precision: Precision, least: int, write: Write) -> bool:
    sites = frozenset(name_of(node) for node in model.graph if _is_matrix_product(node, least))
    if not sites:
        return _decline(
            ctx,
            f"nothing to quantise: no MatMul or Gemm with a constant weight of {least} elements or more",
        )
    if ctx.target.provider == "CPUExecutionProvider" and not _pays(
        model, sites, ctx, precision, write
    ):
        return False
    permitted = frozenset(
        name_of(node)
        for node in model.graph
        if name_of(node) in sites and ctx.permit("quantize", node, Numerics.LOSSY)
    )
    if permitted:
        write(model, permitted, ctx.names)
        ctx.refresh()
    return bool(permitted)


def _decline(ctx: Context, text: str) -> bool:
    ctx.remark(RemarkKind.WARNING, "quantize", "", text)
    return False


def _is_matrix_product(node: ir.Node, least: int) -> bool:
    if node.domain or node.op_type not in ("MatMul", "Gemm"):
        return False
    weight = values.constant(node.inputs[1])
    if weight is None or weight.dtype is not ir.DataType.FLOAT or len(weight.shape) != 2:
        return False
    if weight.size < least or values.is_constant(node.inputs[0]):
        return False
    if node.op_type == "MatMul":
        return True
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    tensor = values.constant(bias)
    columns = weight.shape[0] if operators.attribute(node, "transB", 0) else weight.shape[1]
    plain = operators.attribute(node, "alpha", 1.0) == operators.attribute(node, "beta", 1.0) == 1.0
    fits = bias is None or (tensor is not None and tensor.size == columns)
    return plain and fits and not operators.attribute(node, "transA", 0)


def _pays(
    model: ir.Model, sites: frozenset[str], ctx: Context, precision: Precision, write: Write
) -> bool:
    """Whether the quantised model is faster than float here, and within the budget; said where it is not."""
    key = f"{precision}:{fingerprint.structural(model)}:{fingerprint.weights(model)}:{len(sites)}"
    if key not in ctx.cache:
        ctx.cache[key] = _measured(model, sites, ctx, precision, write)
    ratio, passed, sqnr = ctx.cache[key]
    if not passed:
        return _decline(
            ctx,
            f"stays float: the worst output would be at {sqnr:.1f} dB, outside the budget; relax it with --budget",
        )
    if ratio < GAIN and not ctx.options.force:
        return _decline(
            ctx,
            f"stays float: quantised it would run at {ratio:.2f}x the speed of float here; --force emits it",
        )
    ctx.remark(
        RemarkKind.NOTE,
        "quantize",
        "",
        f"{ratio:.2f}x the speed of float on this machine; worst output {sqnr:.1f} dB",
    )
    return True


def _measured(
    model: ir.Model, sites: frozenset[str], ctx: Context, precision: Precision, write: Write
) -> tuple[float, bool, float]:
    """Speed over float, whether the budget is met, and signal to noise of the worst output."""
    clone = load_model(model)
    write(clone, sites, Names.of(clone))
    budget = budget_for(precision, ctx.options.budget)
    assert budget is not None
    judge = Judgement(model, _feeds(model, ctx))
    try:
        found = judge.accuracy(clone, budget)
        return judge.speed(clone), found.passed, found.sqnr_db
    finally:
        judge.close()


def _feeds(model: ir.Model, ctx: Context) -> list[Feed]:
    """Samples if the user gave some, else generated inputs."""
    if ctx.options.calibration is not None:
        return read_samples(ctx.options.calibration, input_specs(model)).first(JUDGED)
    session = Session(model_to_bytes(model))

    def refuses(feed: Feed) -> str | None:
        try:
            session.run(feed.values)
        except GraphoptError as error:
            return str(error)
        return None

    found = find_feeds(model, refuses, seed=ctx.options.seed, specs=session.inputs)
    return list(found.feeds[:1])


def write_dynamic(model: ir.Model, sites: frozenset[str], names: Names) -> None:
    """Replaces the products named by integer ones; each input is quantised once, however many read it."""
    encoded: dict[ir.Value, ir.Node] = {}
    for node in [n for n in model.graph if name_of(n) in sites]:
        source = node.inputs[0]
        assert source is not None
        if source not in encoded:
            encoder = ir.Node("", "DynamicQuantizeLinear", [source], num_outputs=3)
            encoder.name = names.fresh(f"{source.name}_quantize")
            for value, part in zip(encoder.outputs, ("q", "scale", "zero"), strict=True):
                value.name = names.fresh(f"{source.name}_{part}")
            model.graph.insert_before(node, encoder)
            encoded[source] = encoder
        _integer_product(node, encoded[source], names)
    model.opset_imports.setdefault(MICROSOFT, 1)


def _integer_product(node: ir.Node, encoder: ir.Node, names: Names) -> None:
    array = _matrix(node)
    # 255: the whole range of bytes is in use, and pairs of products must not saturate 16 bits.
    packed = weights.pack(array.T, top_code=255)
    base = node.inputs[1].name if node.inputs[1] is not None else "weight"
    graph = node.graph
    assert graph is not None
    codes = _held(graph, names.fresh(f"{base}_q"), np.ascontiguousarray(packed.codes.T))
    scales = _held(graph, names.fresh(f"{base}_scale"), packed.scales)
    values_in = [encoder.outputs[0], codes, encoder.outputs[1], scales, encoder.outputs[2], None]
    _replace(node, "MatMulIntegerToFloat", [*values_in, _bias(node, names)], {}, names)


def write_blocks(model: ir.Model, sites: frozenset[str], names: Names, block: int) -> None:
    """Replaces the products named by ones with 4-bit weights."""
    for node in [n for n in model.graph if name_of(n) in sites]:
        array = _matrix(node)
        rows, columns = array.shape
        codes, scales = pack_blocks(array, block)
        base = node.inputs[1].name if node.inputs[1] is not None else "weight"
        held = [
            _held(model.graph, names.fresh(f"{base}_q4"), codes),
            _held(model.graph, names.fresh(f"{base}_scales"), scales),
        ]
        attributes = {"K": rows, "N": columns, "bits": 4, "block_size": block, "accuracy_level": 4}
        inputs = [node.inputs[0], *held, None, None, _bias(node, names)]
        _replace(node, "MatMulNBits", inputs, attributes, names)
    model.opset_imports.setdefault(MICROSOFT, 1)


def pack_blocks(matrix: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix [K, N] in 4 bits: uint8 [N, ceil(K / block), block / 2], scales [N * ceil(K / block)].

    Each block takes, of a few clips, the one with the least squared error; code 8 is zero, the low half comes first.
    """
    rows, columns = matrix.shape
    count = -(-rows // block)
    padded = np.zeros((columns, count * block), np.float32)
    padded[:, :rows] = matrix.T
    blocks = padded.reshape(columns * count, block)
    peak = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    best = np.full((len(blocks), 1), np.inf, np.float32)
    scales = np.ones_like(best)
    for clip in (1.0, 0.925, 0.85, 0.775):
        tried = peak * np.float32(clip / -8)  # the greatest in magnitude becomes -8, the longer end
        tried[tried == 0] = 1
        error = ((_codes(blocks, tried) * tried - blocks) ** 2).sum(axis=1, keepdims=True)
        better = error < best
        best, scales = np.where(better, error, best), np.where(better, tried, scales)
    shifted = (_codes(blocks, scales) + 8).astype(np.uint8)
    packed = shifted[:, 0::2] | (shifted[:, 1::2] << 4)
    return packed.reshape(columns, count, block // 2), scales.reshape(-1).astype(np.float32)


def _codes(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(np.rint(blocks / scales), -8, 7))


def _matrix(node: ir.Node) -> np.ndarray:
    """The weight as [K, N]."""
    array = values.array(node.inputs[1])
    assert array is not None
    turned = node.op_type == "Gemm" and operators.attribute(node, "transB", 0)
    return array.T if turned else array


def _bias(node: ir.Node, names: Names) -> ir.Value | None:
    """The bias of a Gemm as a vector."""
    value = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
    array = values.array(value)
    if array is None or value is None or array.ndim == 1:
        return value
    assert node.graph is not None
    return _held(node.graph, names.fresh(f"{value.name}_flat"), array.reshape(-1))


def _held(graph: ir.Graph | ir.Function, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(np.ascontiguousarray(array))
    value = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        const_value=tensor,
    )
    assert isinstance(graph, ir.Graph)
    graph.register_initializer(value)
    return value


def _replace(
    node: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None],
    attributes: dict[str, int],
    names: Names,
) -> None:
    """Puts another operator in the place of a node; its output keeps name, type and shape."""
    while inputs[-1] is None:
        inputs.pop()
    given = [ir.AttrInt64(name, number) for name, number in attributes.items()]
    made = ir.Node(MICROSOFT, op_type, inputs, given, num_outputs=1)
    made.name = names.fresh(f"{name_of(node)}_{op_type}")
    old, new = node.outputs[0], made.outputs[0]
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    new.type, new.shape = old.type, old.shape
    graph.insert_before(node, made)
    for user, index in old.uses():
        user.replace_input_with(index, new)
    for position, output in enumerate(graph.outputs):
        if output is old:
            graph.outputs[position] = new
    name, old.name = old.name, None
    graph.remove(node, safe=True)
    new.name = name
