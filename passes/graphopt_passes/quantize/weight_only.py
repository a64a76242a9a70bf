"""Quantisation without calibration: weights in 8 bits with activations quantised as they come, or in 4 bits alone.

Source: com.microsoft MatMulIntegerToFloat, MatMulNBits, GatherBlockQuantized, ONNX Runtime 1.31 (ContribOperators.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.calibrate.moments import Wanted, collect_moments
from graphopt.calibrate.samples import read_samples
from graphopt.emit import finalize
from graphopt.errors import GraphoptError, OptionError
from graphopt.ir import fingerprint, operators, values
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind, name_of
from graphopt.runtime.session import Session
from graphopt.runtime.specs import input_specs
from graphopt.targets import Precision
from graphopt.verify.budget import budget_for
from graphopt.verify.feed_files import Feed
from graphopt.verify.feeds import find_feeds
from graphopt_passes.quantize import blocks, weights
from graphopt_passes.quantize.certificate import Judgement
from graphopt_passes.quantize.files import on_disk
from graphopt_passes.quantize.quality import LEAST_SQNR_DB

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
    """Stores weights of matrix products and tables in 4 or 8 bits, a scale a block: an eighth of the bytes to read.

    With calibration samples, weights of 4 bits are rounded by second moments of their inputs (GPTQ).

    Before:  y = MatMul(x, W)                 e = Gather(T, i)
    After:   y = MatMulNBits(x, Wq, scales)   e = GatherBlockQuantized(Tq, i, scales)
    Changes numerics: lossy.  Leaves alone: convolutions, small weights, and everything where the result is slower than
    float here and now: many rows at once favour float, single tokens 4 bits.

    Attributes:
        block: elements of a column that share a scale: a power of two from 16.
        bits: 4 or 8.
        form: contrib, or qdq: DequantizeLinear with blocks (opset 21), which other runtimes read too.
        tables: whether rows that are looked up (Gather) are stored so, too.
        least: elements of a weight from which on it pays.
    """

    block: int = 32
    bits: int = 4
    form: str = "contrib"
    tables: bool = True
    least: int = 1 << 14

    name: ClassVar[str] = "quantize-weights"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed.

        Raises:
            OptionError: a block size, number of bits or form that no kernel takes.
        """
        if self.block < 16 or self.block & (self.block - 1) or self.block > 256:
            raise OptionError(f"block size {self.block}: choose 16, 32, 64, 128 or 256")
        if self.bits not in (4, 8) or self.form not in ("contrib", "qdq"):
            raise OptionError(
                f"bits {self.bits}, form {self.form!r}: bits are 4 or 8, the form is contrib (MatMulNBits and "
                "GatherBlockQuantized) or qdq (DequantizeLinear with blocks, opset 21)"
            )
        if self.form == "qdq" and not _has_blocks(model, ctx):
            return False
        if ctx.target.provider == "CUDAExecutionProvider" and self.bits == 8:
            ctx.remark(RemarkKind.WARNING, "quantize", "", CUDA)
        tables = frozenset(
            name_of(node) for node in model.graph if self.tables and self._is_table(node)
        )
        how = Blocks(self.block, self.bits, self.form, self._moments(model, ctx))

        def write(changed: ir.Model, sites: frozenset[str], names: Names) -> None:
            write_blocks(changed, sites, names, how)

        return _run(model, ctx, Precision.INT4_WEIGHTS, self.least, write, tables)

    def _is_table(self, node: ir.Node) -> bool:
        """Whether the node looks rows up in a large constant matrix, whose rows are whole blocks."""
        if node.domain or node.op_type != "Gather" or operators.attribute(node, "axis", 0) != 0:
            return False
        table = values.constant(node.inputs[0])
        if table is None or table.dtype is not ir.DataType.FLOAT or len(table.shape) != 2:
            return False
        source = node.inputs[0]
        alone = source is not None and len(source.uses()) == 1
        fits = int(table.shape.numpy()[1]) % self.block == 0
        return table.size >= self.least and alone and fits

    def _moments(self, model: ir.Model, ctx: Context) -> dict[str, np.ndarray]:
        """Second moments of what products read, from calibration samples; none without."""
        if ctx.options.calibration is None or self.bits == 8:
            return {}
        wanted: dict[str, Wanted] = {}
        work = 0.0
        for node in model.graph:
            source = node.inputs[0] if node.inputs else None
            if source is None or not source.name or not _is_matrix_product(node, self.least):
                continue
            weight = values.constant(node.inputs[1])
            assert weight is not None
            columns = _columns(node, weight)
            work += float(weight.size) * columns
            if work <= WORK and columns <= WIDEST:
                wanted[name_of(node)] = Wanted(source.name)
        key = f"moments:{fingerprint.structural(model)}:{fingerprint.weights(model)}"
        if wanted and key not in ctx.cache:
            samples = read_samples(ctx.options.calibration, input_specs(model))
            each = list(dict.fromkeys(wanted.values()))
            with on_disk(model) as path:
                ctx.cache[key] = collect_moments(path, each, samples)
        found = ctx.cache.get(key, {})
        return {name: found[each] for name, each in wanted.items() if each in found}


@dataclasses.dataclass(frozen=True, eq=False)
class Blocks:
    """How weights are written in blocks.

    Attributes:
        block: elements that share a scale.
        bits: of each, 4 or 8.
        form: contrib or qdq.
        moments: second moments of the input of a product, by name of its output; of none, rounding is to nearest.
    """

    block: int
    bits: int = 4
    form: str = "contrib"
    moments: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


CUDA = (
    "ONNX Runtime on CUDA has no integer kernels for Q and DQ: weights of matrix products are stored in 8 bits, "
    "activations and convolutions stay float"
)

WIDEST, WORK = 4096, float(1 << 36)
"""Columns of a weight, and multiplications in all, up to which weights are rounded by second moments."""


def _has_blocks(model: ir.Model, ctx: Context) -> bool:
    """Whether the model is at opset 21 or can be brought there, where DequantizeLinear has blocks."""
    if model.opset_imports.get("", 0) < 21:
        finalize(model, dataclasses.replace(ctx.target, opset=(21, max(ctx.target.opset[1], 21))))
        ctx.refresh()
    if model.opset_imports.get("", 0) >= 21:
        model.ir_version = max(model.ir_version, 10)
        return True
    return _decline(
        ctx,
        "DequantizeLinear has blocks from opset 21 on, where operators of this model mean something else",
    )


def _columns(node: ir.Node, weight: ir.TensorProtocol) -> int:
    turned = node.op_type == "Gemm" and operators.attribute(node, "transB", 0)
    return int(weight.shape.numpy()[1 if turned else 0])


def _run(
    model: ir.Model,
    ctx: Context,
    precision: Precision,
    least: int,
    write: Write,
    tables: frozenset[str] = frozenset(),
) -> bool:
    sites = products_of(model.graph, least) | tables
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


def products_of(graph: ir.Graph, least: int) -> frozenset[str]:
    """Names of the matrix products with a constant weight of `least` elements or more."""
    return frozenset(name_of(node) for node in graph if _is_matrix_product(node, least))


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
    found = judge.accuracy(clone, budget)
    stated = ctx.options.budget is not None or precision is not Precision.INT8_DYNAMIC
    passed = found.passed and (stated or found.sqnr_db >= LEAST_SQNR_DB)
    return judge.speed(clone), passed, found.sqnr_db


def _feeds(model: ir.Model, ctx: Context) -> list[Feed]:
    """Samples if the user gave some, else generated inputs."""
    if ctx.options.calibration is not None:
        return read_samples(ctx.options.calibration, input_specs(model)).first(JUDGED)
    with on_disk(model) as path:
        session = Session(path)

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


def write_blocks(model: ir.Model, sites: frozenset[str], names: Names, how: Blocks) -> None:
    """Replaces the products and look-ups named by ones with weights in blocks."""
    for node in [n for n in model.graph if name_of(n) in sites]:
        if node.op_type == "Gather":
            _block_gather(node, names, how)
        elif how.form == "qdq":
            _block_decoded(node, names, how)
        else:
            _block_product(node, names, how)
    if how.form != "qdq":
        model.opset_imports.setdefault(MICROSOFT, 1)


def _block_product(node: ir.Node, names: Names, how: Blocks) -> None:
    array, graph = _matrix(node), node.graph
    assert isinstance(graph, ir.Graph)
    codes, scales = blocks.pack_blocks(array, how.block, how.bits, how.moments.get(name_of(node)))
    base = _weight_name(node, 1)
    held = [
        _held(graph, names.fresh(f"{base}_q{how.bits}"), codes),
        _held(graph, names.fresh(f"{base}_scales"), scales),
    ]
    attributes = {
        "K": array.shape[0],
        "N": array.shape[1],
        "bits": how.bits,
        "block_size": how.block,
        "accuracy_level": 4,
    }
    inputs = [node.inputs[0], *held, None, None, _bias(node, names)]
    _replace(node, "MatMulNBits", inputs, attributes, names)


def _block_gather(node: ir.Node, names: Names, how: Blocks) -> None:
    table, graph = values.array(node.inputs[0]), node.graph
    assert table is not None
    assert isinstance(graph, ir.Graph)
    codes, scales = blocks.encode(table, how.block, how.bits)
    base = _weight_name(node, 0)
    if how.form == "qdq":
        decoded = _decoded(graph, base, codes, scales, 1, node, names, how)
        node.replace_input_with(0, decoded)
        return
    held = _held(graph, names.fresh(f"{base}_q{how.bits}"), blocks.packed(codes, how.bits))
    held_scales = _held(graph, names.fresh(f"{base}_scales"), scales)
    attributes = {
        "gather_axis": 0,
        "quantize_axis": 1,
        "block_size": how.block,
        "bits": how.bits,
    }
    _replace(node, "GatherBlockQuantized", [held, node.inputs[1], held_scales], attributes, names)


def _block_decoded(node: ir.Node, names: Names, how: Blocks) -> None:
    """A DequantizeLinear with blocks in front of the product, as ai.onnx 21 has it."""
    array, graph = _matrix(node), node.graph
    assert isinstance(graph, ir.Graph)
    rows = np.ascontiguousarray(array.T)
    codes, scales = blocks.encode(rows, how.block, how.bits, how.moments.get(name_of(node)))
    turned = node.op_type == "Gemm" and operators.attribute(node, "transB", 0)
    axis = 1 if turned else 0
    codes = codes[:, : array.shape[0]]
    laid = (codes, scales) if turned else (codes.T, scales.T)
    decoded = _decoded(graph, _weight_name(node, 1), *laid, axis, node, names, how)
    node.replace_input_with(1, decoded)


def _decoded(  # noqa: PLR0913, PLR0917  the parts of one node
    graph: ir.Graph,
    base: str,
    codes: np.ndarray,
    scales: np.ndarray,
    axis: int,
    before: ir.Node,
    names: Names,
    how: Blocks,
) -> ir.Value:
    dtype = ml_dtypes.int4 if how.bits == 4 else np.int8
    held = [
        _held(graph, names.fresh(f"{base}_q{how.bits}"), codes.astype(dtype)),
        _held(graph, names.fresh(f"{base}_scales"), scales),
    ]
    given = [ir.AttrInt64("axis", axis), ir.AttrInt64("block_size", how.block)]
    decode = ir.Node("", "DequantizeLinear", held, given, num_outputs=1)
    decode.name = names.fresh(f"{base}_decode")
    value = decode.outputs[0]
    value.name = names.fresh(f"{base}_decoded")
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(codes.shape)
    graph.insert_before(before, decode)
    return value


def _weight_name(node: ir.Node, index: int) -> str:
    value = node.inputs[index]
    return (value.name if value is not None else None) or "weight"


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
