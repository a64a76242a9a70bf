"""Carries out `--sparsity lowrank:E`: large matrices become products of two narrow ones, where that saves time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.calibrate.screening import screening_of, tell_screened
from graphopt.ir import fingerprint
from graphopt.ir.build import Names
from graphopt.ir.model_file import model_to_bytes
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind
from graphopt.runtime.measure import measure
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt.runtime.specs import input_specs
from graphopt_passes.prune.layers import Array, Layer, Wide, find_layers
from graphopt_passes.prune.request import SparsityRequest
from graphopt_passes.prune.roots import ridge
from graphopt_passes.prune.samples import Feeds, batched, most_together, read_singles
from graphopt_passes.prune.weights import dense_moments

RULE = "low-rank"

LEAST_EXTENT = 128
"""Narrower matrices are bound by what a call costs, not by arithmetic."""

WORTH = 0.75
"""Two matrices are tried where together they have at most this share of the weights of the one."""

FASTER = 1.1
"""... and stay where the product then takes this much less CPU time."""

ROWS = 128
"""Rows of the product that is measured, where the model does not say how many there are."""

SECONDS = 0.3

HELD_OUT_OF = 5
LEAST_SAMPLES = 10

_BLIND = (
    "no samples were given, so that all inputs of a matrix count alike: give --calibration, with which directions that "
    "inputs never take cost nothing"
)


_FEW = (
    "too few samples to hold some out (fewer than 10): the error is that on the samples themselves, and may be far "
    "greater on others"
)


@dataclasses.dataclass(frozen=True)
class Factors:
    """A matrix [columns, rows] as a product.

    Attributes:
        first: [columns, rank].
        second: [rank, rows].
        error: of the outputs, RMS over RMS, about their means where a bias makes up for those.
        shift: what the product changes the mean of the outputs by, which a bias makes up for; None without.
    """

    first: Wide
    second: Wide
    error: float
    shift: Wide | None = None

    @property
    def rank(self) -> int:
        """Extent of the axis between the two."""
        return int(self.first.shape[1])

    @property
    def size(self) -> int:
        """Number of weights of both."""
        return self.first.size + self.second.size


def factorize(model: ir.Model, ctx: Context, request: SparsityRequest, text: str) -> bool:
    """Splits matrices of `model` in place; returns whether any was.

    Raises:
        DataError: the samples do not fit the model.
    """
    assert request.low_rank is not None
    layers = [layer for layer in find_layers(model.graph, request.dense) if _is_large(layer)]
    site = model.graph.name or "main"
    if not layers:
        reason = (
            f"no matrix of {LEAST_EXTENT} x {LEAST_EXTENT} or more: nothing to gain from factors"
        )
        ctx.remark(RemarkKind.WARNING, RULE, site, reason)
    if not layers or not ctx.permit(RULE, site, Numerics.LOSSY):
        return False
    key = f"{text}:{fingerprint.structural(model)}:{fingerprint.weights(model)}"
    known: dict[str, Factors] | None = ctx.cache.get(key)
    if known is None:
        known = _found(model, ctx, layers, request.low_rank)
        ctx.cache[key] = known
    names = Names.of(model)
    for layer in layers:
        if layer.name in known:
            _apply(layer, known[layer.name], names)
    ctx.refresh()
    _tell(ctx, site, layers, known)
    return bool(known)


def _is_large(layer: Layer) -> bool:
    return (
        layer.window is None
        and not layer.is_bound
        and min(layer.tensor.shape.numpy()) >= LEAST_EXTENT
    )


def _found(
    model: ir.Model, ctx: Context, layers: Sequence[Layer], error: float
) -> dict[str, Factors]:
    """The matrices for which two are better, by name."""
    fit, apart = _samples(model, ctx)
    moments = dense_moments(model, layers, fit) if fit else {}
    judged = dense_moments(model, layers, apart) if apart else {}
    found = {}
    for layer in layers:
        matrix = layer.matrix()[0].T
        made = _factors_of(layer, matrix, moments.get(layer.name), judged.get(layer.name), error)
        if made.size > WORTH * matrix.size:
            ctx.missed(
                RULE,
                layer.node,
                f"an error of {error:.1%}{' on samples held out' if apart else ''} takes rank {made.rank} of "
                f"{min(matrix.shape)}, with {made.size} weights in place of {matrix.size}",
            )
            continue
        ratio = _speed(matrix.astype(np.float32), made, _row_count(layer, ctx))
        if ratio < FASTER:
            ctx.missed(RULE, layer.node, f"rank {made.rank} is only {ratio:.2f} times as fast here")
            continue
        found[layer.name] = made
    return found


def _samples(model: ir.Model, ctx: Context) -> tuple[Feeds, Feeds]:
    """Samples to fit to, and every fifth to judge by; all are fitted to where there are fewer than ten.

    A few hundred inputs span few directions: what is best for them alone may lose all others.
    """
    if ctx.options.calibration is None:
        ctx.remark(RemarkKind.WARNING, RULE, model.graph.name or "main", _BLIND)
        return [], []
    specs, most = input_specs(model), most_together(model)
    singles = read_singles(ctx.options.calibration, specs, screening_of(ctx))
    tell_screened(ctx, RULE)
    if len(singles) < LEAST_SAMPLES:
        ctx.remark(RemarkKind.WARNING, RULE, model.graph.name or "main", _FEW)
        return batched(singles, specs, most=most), []
    fit = [each for index, each in enumerate(singles) if index % HELD_OUT_OF != HELD_OUT_OF - 1]
    apart = singles[HELD_OUT_OF - 1 :: HELD_OUT_OF]
    return batched(fit, specs, most=most), batched(apart, specs, most=most)


def _factors_of(
    layer: Layer, matrix: Wide, seen: Wide | None, judged: Wide | None, error: float
) -> Factors:
    """The factors of a layer; what a bias can make up for does not count as an error, nor as something to keep.

    Outputs far from zero that hardly vary would else hide how much of what does vary is lost.
    """
    if seen is None:
        return factors(matrix, None, error)
    mean = None
    if layer.bias_vector() is not None:
        mean = seen[0, :-1, -1].astype(np.float64) / float(seen[0, -1, -1])
    apart = None if judged is None else _about(judged[0], mean)
    made = factors(matrix, _about(seen[0], mean), error, apart)
    if mean is None:
        return made
    return dataclasses.replace(made, shift=mean @ matrix - mean @ made.first @ made.second)


def _about(seen: Wide, mean: Wide | None) -> Wide:
    """The second moment of inputs about a mean, or about zero, of what was summed of them with a 1 at the end."""
    wide = seen.astype(np.float64)
    moment, total, count = wide[:-1, :-1], wide[:-1, -1], float(wide[-1, -1])
    if mean is None:
        return moment
    crossed = np.outer(total, mean)
    return np.asarray(moment - crossed - crossed.T + count * np.outer(mean, mean))


def factors(matrix: Wide, moment: Wide | None, error: float, judged: Wide | None = None) -> Factors:
    """The product of least rank whose outputs differ by at most `error`, RMS over RMS, for inputs of that moment.

    With H = C C^T, |x (W - A B)|^2 sums to |C^T (W - A B)|^2: the truncated singular values of C^T W are best (Chen
    et al. 2021, DRONE).  The rows of B are orthogonal, so that the error on other inputs is a sum over them, too.

    Args:
        matrix: [columns, rows].
        moment: [columns, columns]; None where all inputs count alike.
        error: 0 to 1.
        judged: the moment of other inputs, for which the error shall hold as well.
    """
    root = np.eye(len(matrix)) if moment is None else _root(moment)
    left, values, right = np.linalg.svd(root.T @ matrix, full_matrices=False)
    first = np.linalg.solve(root.T, left * np.sqrt(values))
    lost = _lost(np.square(values))
    if judged is not None:
        lost = np.maximum(lost, _lost(values * np.einsum("ij,ij->j", first, judged @ first)))
    rank = max(int(np.argmax(lost <= error)), 1)
    second = np.sqrt(values[:rank])[:, None] * right[:rank]
    return Factors(np.ascontiguousarray(first[:, :rank]), second, float(lost[rank]))


def _lost(energy: Wide) -> Wide:
    """RMS over RMS of what is left out, by how many parts stay."""
    left = np.append(np.cumsum(energy[::-1])[::-1], 0.0)
    return np.asarray(np.sqrt(np.maximum(left, 0.0) / max(float(left[0]), 1e-300)))


def _root(moment: Wide) -> Wide:
    """The lower factor of a moment, with a little of the usual ridge, so that there is one."""
    return np.asarray(np.linalg.cholesky(moment + 0.01 * ridge(moment) * np.eye(len(moment))))


def _row_count(layer: Layer, ctx: Context) -> int:
    dims = ctx.shapes.dims(layer.source)
    return math.prod(dim.value or 1 for dim in dims[:-1]) if dims else ROWS


def _speed(matrix: Array, made: Factors, rows: int) -> float:
    """How many times as fast the two products are, in one thread."""
    x = np.ones((rows, len(matrix)), np.float32)
    pair = [made.first.astype(np.float32), made.second.astype(np.float32)]
    options = SessionOptions(threads=1)
    sessions = [
        Session(_chain(weights), level=OptimizationLevel.ALL, options=options)
        for weights in ([matrix], pair)
    ]
    _, narrow = measure(sessions, [{"x": x}, {"x": x}], seconds=SECONDS)
    return narrow.cpu_ratio


def _chain(weights: Sequence[Array]) -> bytes:
    """A model that multiplies x by some matrices in turn."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    x = ir.Value(name="x", shape=ir.Shape(["rows", len(weights[0])]), type=kind)
    value, nodes, held = x, [], []
    for index, weight in enumerate(weights):
        name = f"w{index}"
        own = ir.Value(
            name=name,
            shape=ir.Shape(weight.shape),
            type=kind,
            const_value=ir.Tensor(weight, name=name),
        )
        node = ir.Node("", "MatMul", [value, own], num_outputs=1)
        value = node.outputs[0]
        value.name, value.type = f"y{index}", kind
        value.shape = ir.Shape(["rows", weight.shape[1]])
        nodes.append(node)
        held.append(own)
    graph = ir.Graph(
        [x], [value], nodes=nodes, initializers=held, opset_imports={"": 17}, name="chain"
    )
    return model_to_bytes(ir.Model(graph, ir_version=8))


def _apply(layer: Layer, made: Factors, names: Names) -> None:
    """Makes y = (x A) B + b of y = x W + b."""
    node, dtype = layer.node, layer.tensor.dtype
    graph = node.graph
    assert graph is not None
    name = names.fresh(f"{layer.name}_first")
    first = ir.Value(
        name=name,
        shape=ir.Shape(made.first.shape),
        type=ir.TensorType(dtype),
        const_value=ir.Tensor(made.first.astype(dtype.numpy()), dtype, name=name),
    )
    graph.register_initializer(first)
    product = ir.Node(
        "", "MatMul", [layer.source, first], num_outputs=1, name=names.fresh(name + "_product")
    )
    output = product.outputs[0]
    output.name, output.type = names.fresh(f"{name}_output"), ir.TensorType(dtype)
    graph.insert_before(node, product)
    node.replace_input_with(0, output)
    second = made.second if layer.transposed else made.second.T
    stored = np.ascontiguousarray(second).astype(dtype.numpy())
    layer.weight.const_value = ir.Tensor(stored, dtype, name=layer.name)
    layer.weight.shape = ir.Shape(stored.shape)
    bias = layer.bias
    if made.shift is not None and bias is not None and bias.const_value is not None:
        like = bias.const_value
        moved = (like.numpy().astype(np.float64).reshape(-1) + made.shift).reshape(
            like.shape.numpy()
        )
        bias.const_value = ir.Tensor(moved.astype(like.dtype.numpy()), like.dtype, name=bias.name)


def _tell(ctx: Context, site: str, layers: Sequence[Layer], known: dict[str, Factors]) -> None:
    worst = max((each.error for each in known.values()), default=0.0)
    said = f"{len(known)} of {len(layers)} large matrices are products of two"
    if known:
        said += f", of rank {min(e.rank for e in known.values())} to {max(e.rank for e in known.values())}"
        said += f"; outputs of each differ by up to {worst:.1%} (RMS)"
    kind = RemarkKind.NOTE if known else RemarkKind.WARNING
    ctx.remark(
        kind, RULE, site, said if known else f"{said}: others gain nothing (--remarks says why)"
    )
