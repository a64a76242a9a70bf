"""The pass that carries out `--sparsity`."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import ClassVar, TypeAlias

import onnx_ir as ir

from graphopt.calibrate.screening import screening_of, tell_screened
from graphopt.errors import OptionError
from graphopt.ir import fingerprint
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, RemarkKind
from graphopt.runtime.specs import input_specs
from graphopt_passes.prune.layers import FLOATS, PRUNABLE, Layer, find_layers, find_turned
from graphopt_passes.prune.lowrank import factorize
from graphopt_passes.prune.narrow import remove_channels
from graphopt_passes.prune.recurrent import RECURRENT, find_recurrent, hidden_states
from graphopt_passes.prune.request import (
    Allocation,
    Method,
    Pattern,
    SparsityRequest,
    Tune,
    parse_sparsity,
)
from graphopt_passes.prune.samples import Feeds, read_feeds, read_singles
from graphopt_passes.prune.solve import Goal
from graphopt_passes.prune.tables import (
    PrunedTable,
    find_tables,
    prune_tables,
    stored,
    table_size,
)
from graphopt_passes.prune.tuning import tuned
from graphopt_passes.prune.weights import (
    ADMM_FROM,
    Pruned,
    dense_moments,
    fitted,
    goals,
    method_for,
    prune_blind,
    prune_fitted,
    takes,
)

RULE = "weights"
BLIND = (
    "no samples were given, so that weights were chosen by magnitude alone and the rest could not make up for them: "
    "from 70 % zeros on this usually ruins a model that pruning with samples (--calibration) leaves as good as it was"
)


@dataclasses.dataclass(frozen=True)
class Prune:
    """Sets weights to zero and fits the others to what the original computed, where sparsity is asked for.

    Before:  y = Conv(x, W, b)                W: all of it
    After:   y = Conv(x, W', b')              W': mostly zero, W' x' + b' ~ W x + b for the inputs x' after pruning
    Changes numerics: lossy; every layer is fitted to the original given what was pruned before it.  Leaves alone:
    weights with other uses, small ones, depthwise convolutions, the first and the last layer, nodes in subgraphs and
    functions.  Sources: LAMP (Lee et al. 2021), ERK (Evci et al. 2020), Wanda (Sun et al. 2024), SparseGPT (Frantar and
    Alistarh 2023), ALPS (Meng et al. 2024).
    """

    name: ClassVar[str] = "prune"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    sparsity: str = ""
    """What to prune, as `--sparsity` says it; empty for what the run asks for."""

    early: bool = False
    """Whether to prune a part of the way, for distillation to recover before the rest goes; only at high ratios."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed.

        Raises:
            OptionError: the sparsity cannot be read.
            DataError: the samples do not fit the model.
        """
        text = self.sparsity or ctx.options.sparsity
        if not text:
            return False
        request = parse_sparsity(text)
        check_names(model.graph, request)
        known = ctx.options.calibration is not None
        if request.allocation is Allocation.MIXED and not (known and _is_high(request)):
            request = dataclasses.replace(request, allocation=Allocation.LAMP)
        if self.early:
            part = _early(request, ctx)
            if part is None:
                return False
            request, text = part, f"early:{text}"
        if request.channels is not None:
            return remove_channels(model, ctx, request, text)
        if request.low_rank is not None:
            return factorize(model, ctx, request, text)
        with hidden_states(model):
            return _prune(model, ctx, request, text)


def _prune(model: ir.Model, ctx: Context, request: SparsityRequest, text: str) -> bool:
    """Makes weights zero in place; returns whether any layer changed."""
    layers = _layers(model.graph, request.dense)
    wanted = goals(layers, request)
    _tell_dense(ctx, layers, wanted, request)
    if not wanted:
        ctx.remark(RemarkKind.WARNING, RULE, _site(model), _why_none(model, layers))
    if not wanted or not ctx.permit(RULE, _site(model), Numerics.LOSSY):
        return False
    tables: Sequence[PrunedTable] = prune_tables(
        find_tables(model.graph, request.dense), request.tables
    )
    done, tables = _solved(model, ctx, _Work(request, text, layers, wanted, tables))
    for each in done:
        _store(each)
    for table in tables:
        table.value.const_value = table.tensor
    _tell(model, ctx, layers, [each for each in done if each.layer in wanted], request, tables)
    return bool(done)


def _layers(graph: ir.Graph, dense: str) -> list[Layer]:
    """All layers whose weights can be pruned, in the order of the graph."""
    place = {node: index for index, node in enumerate(graph)}
    found = [*find_layers(graph, dense), *find_turned(graph, dense), *find_recurrent(graph, dense)]
    return sorted(found, key=lambda layer: place[layer.node])


def check_names(graph: ir.Graph, request: SparsityRequest) -> None:
    """Refuses patterns that no weight has.

    Raises:
        OptionError: one of them matches no constant of the graph.
    """
    names = list(graph.initializers)
    patterns = [("dense", request.dense)] if request.dense else []
    for key, pattern in [*patterns, *(("layer", each) for each, _ in request.own)]:
        if not any(re.search(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, 3, 0.3) or names[:3]
            raise OptionError(
                f"--sparsity: {key}={pattern} matches the name of no weight at the point where weights are pruned; "
                f"names near it are {', '.join(near)}"
            )


def _why_none(model: ir.Model, layers: Sequence[Layer]) -> str:
    """Why no weight can be pruned, and what to do."""
    if layers:
        return f"nothing was pruned: all {len(layers)} layers stay dense (--remarks says why)"
    open_ones = sum(
        1
        for node in model.graph
        if node.op_type in PRUNABLE
        and any(v is not None and v.is_initializer() and v.is_graph_input() for v in node.inputs)
    )
    if open_ones:
        return (
            f"nothing was pruned: the weights of {open_ones} nodes are inputs of the model that have defaults, so that "
            "whoever runs it may give others; --freeze-defaults makes constants of them"
        )
    known = ", ".join((*PRUNABLE, "ConvTranspose", *RECURRENT))
    return (
        f"nothing was pruned: no {known} of the main graph multiplies by a constant float matrix; "
        "weights that are quantised already stay as they are: prune the float model"
    )


HIGH = 0.9
"""From this share of zeros on they are spread half way, and training begins before all are there."""

EARLY_DENSITY = 2.4
"""At first so many times as many weights stay as in the end: 95 % zeros go by way of 88 %."""


def _early(request: SparsityRequest, ctx: Context) -> SparsityRequest | None:
    """What to prune first where training follows; None where one step is enough."""
    trained = bool(ctx.options.distill) and ctx.options.calibration is not None
    if not trained or request.ratio is None or not _is_high(request):
        return None
    return dataclasses.replace(request, ratio=1 - (1 - request.ratio) * EARLY_DENSITY)


def _is_high(request: SparsityRequest) -> bool:
    return request.ratio is not None and request.ratio >= HIGH


def _site(model: ir.Model) -> str:
    return model.graph.name or "main"


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is to be pruned.

    Attributes:
        request: what is asked for.
        text: the same as the user wrote it.
        layers: all whose weights can be pruned.
        wanted: zeros of those that are.
        tables: those that are pruned already.
    """

    request: SparsityRequest
    text: str
    layers: Sequence[Layer]
    wanted: dict[Layer, Goal]
    tables: Sequence[PrunedTable]


Solved: TypeAlias = tuple[Sequence[Pruned], Sequence[PrunedTable]]


def _solved(model: ir.Model, ctx: Context, work: _Work) -> Solved:
    """The new weights; remembered over the replays of a run, in which the same model comes by again."""
    key = f"prune:{work.text}:{fingerprint.structural(model)}:{fingerprint.weights(model)}"
    known: Solved | None = ctx.cache.get(key)
    if known is not None and (again := _again(work, *known)) is not None:
        return again
    done, tables = _found(model, ctx, work)
    ctx.cache[key] = done, tables
    return done, tables


def _again(work: _Work, done: Sequence[Pruned], tables: Sequence[PrunedTable]) -> Solved | None:
    """What was found before, for the layers of this replay; None where one of them was left out then."""
    known = {each.layer.name: each for each in done}
    if not all(layer.name in known for layer in work.wanted):
        return None
    trained = {each.value.name: each for each in tables}
    return (
        [
            dataclasses.replace(known[each.name], layer=each)
            for each in work.layers
            if each.name in known
        ],
        [dataclasses.replace(trained[each.value.name], value=each.value) for each in work.tables],
    )


def _found(model: ir.Model, ctx: Context, work: _Work) -> Solved:
    feeds: Feeds = []
    if ctx.options.calibration is not None:
        feeds = read_feeds(model, ctx.options.calibration, screening_of(ctx))
        tell_screened(ctx, RULE)
    if not feeds:
        ctx.remark(RemarkKind.WARNING, RULE, _site(model), BLIND)
        if work.request.method not in (Method.AUTO, Method.MAGNITUDE):
            reason = f"method={work.request.method} needs samples; pruned by magnitude"
            ctx.remark(RemarkKind.WARNING, RULE, _site(model), reason)
        return prune_blind(work.wanted), work.tables
    return _fitted(model, ctx, work, feeds)


def _fitted(model: ir.Model, ctx: Context, work: _Work, feeds: Feeds) -> Solved:
    seed, request, wanted = ctx.options.seed, work.request, work.wanted
    if request.allocation is Allocation.SENSITIVITY:
        moments = dense_moments(model, list(wanted), feeds, seed)
        wanted = goals(work.layers, request, moments)
    every = fitted(work.layers, wanted) if request.refit else wanted
    method = method_for(request, samples=True)
    given = stored(work.tables)
    done = prune_fitted(model, every, feeds, method, fit=request.refit, seed=seed, given=given)
    return _tuned(model, ctx, work, done) if _is_tuned(request, ctx) else (done, work.tables)


def _is_tuned(request: SparsityRequest, ctx: Context) -> bool:
    """Whether what stays shall be trained; not where PyTorch will do so."""
    if request.tune is not Tune.AUTO or not request.refit:
        return request.tune is Tune.YES
    high = request.ratio is not None and request.ratio >= ADMM_FROM
    shares = [request.pattern, *(share for _, share in request.own)]
    return (high or any(isinstance(each, tuple) for each in shares)) and not ctx.options.distill


def _tuned(model: ir.Model, ctx: Context, work: _Work, done: list[Pruned]) -> Solved:
    assert ctx.options.calibration is not None
    samples = read_singles(ctx.options.calibration, input_specs(model), screening_of(ctx))
    asked = work.request.tune is Tune.YES
    found = tuned(model, done, samples, ctx.options.seed, long=asked, tables=work.tables)
    if isinstance(found, str):
        kind = RemarkKind.WARNING if asked else RemarkKind.NOTE
        ctx.remark(kind, RULE, "", f"what stays was not trained together: {found}")
        return done, work.tables
    said = f"distance of the outputs on mixtures of samples held out {found.before:.4g}, {found.after:.4g} after"
    ctx.remark(RemarkKind.NOTE, RULE, "", f"{found.steps} steps of training what stays: {said}")
    return found.done, found.tables


def _store(done: Pruned) -> None:
    layer = done.layer
    layer.weight.const_value = done.weight
    if done.bias is not None and layer.bias is not None:
        dtype = layer.bias.const_value.dtype if layer.bias.const_value else layer.tensor.dtype
        layer.bias.const_value = ir.Tensor(done.bias, dtype, name=layer.bias.name)


def _tell_dense(
    ctx: Context, layers: Sequence[Layer], wanted: dict[Layer, Goal], request: SparsityRequest
) -> None:
    for layer in layers:
        if layer in wanted:
            _tell_unfit(ctx, layer, wanted[layer], request)
            continue
        reason = layer.dense
        if not reason and request.pattern is not None:
            reason = _why_unfit(layer, request.pattern)
        ctx.missed(RULE, layer.node, f"stays dense: {reason}")


def _tell_unfit(ctx: Context, layer: Layer, goal: Goal, request: SparsityRequest) -> None:
    """Says that a layer has not got the pattern that the user gave it."""
    for name, share in request.own:
        fits = isinstance(share, float) or goal.pattern is not None or takes(layer, share)
        if not fits and re.search(name, layer.name):
            assert not isinstance(share, float)
            said = f"layer={name}:{share[0]}:{share[1]} does not fit: {_why_unfit(layer, share)}"
            ctx.missed(RULE, layer.node, f"{said}; it has its part of the other zeros")


def _why_unfit(layer: Layer, pattern: Pattern) -> str:
    n, m = pattern
    if layer.node.op_type not in PRUNABLE:
        return f"no hardware reads {n}:{m} in the weights of a {layer.node.op_type}"
    return f"{layer.inner} inputs in {layer.blocks} groups are no multiple of the {m} that {n}:{m} takes"


def _tell(
    model: ir.Model,
    ctx: Context,
    layers: Sequence[Layer],
    done: Sequence[Pruned],
    request: SparsityRequest,
    tables: Sequence[PrunedTable],
) -> None:
    """Says what share became zero, and warns where it is less than asked for."""
    total = sum(layer.size for layer in layers)
    zeros = sum(each.zeros * each.layer.size for each in done) / max(total, 1)
    said = f"{zeros:.1%} of the {total} weights of {len(layers)} layers are zero, in {len(done)} layers"
    ctx.remark(RemarkKind.NOTE, RULE, "", f"{said}; {_over_all(model, zeros * total, tables)}")
    if request.ratio is not None and zeros < request.ratio - 0.005:
        why = "because the other layers stay dense or have shares of their own (--remarks)"
        reason = f"{said}: short of {request.ratio:.1%}, {why}"
        ctx.remark(RemarkKind.WARNING, RULE, "", reason)
    if request.pattern == (2, 4):
        large = sum(1 for each in done if each.layer.inner >= TENSORRT_CHANNELS)
        reason = (
            f"{len(done)} of {len(layers)} layers follow 2:4 along the input channels, as sparse tensor cores read it; "
            f"{large} of them have the {TENSORRT_CHANNELS} inputs from which TensorRT's sparse kernels pay. Build with "
            "--sparsity=enable; elsewhere 2:4 saves no time"
        )
        ctx.remark(RemarkKind.NOTE, RULE, "", reason)


def _over_all(model: ir.Model, zeros: float, tables: Sequence[PrunedTable]) -> str:
    """What share of all float constants of the main graph that is, and what reads most of the others."""
    held = [v for v in model.graph.initializers.values() if v.const_value is not None]
    floats = {
        v: v.const_value.size for v in held if v.const_value and v.const_value.dtype in FLOATS
    }
    others: dict[str, int] = {}
    picked = {each.value: floats.pop(each.value) for each in tables}
    for value, size in floats.items():
        readers = {node.op_type for node, _ in value.uses()} - {*PRUNABLE, *RECURRENT}
        if readers:
            others[min(readers)] = others.get(min(readers), 0) + size
    most = sorted(others.items(), key=lambda each: -each[1])[:3]
    count = sum(floats.values()) + sum(picked.values())
    zeros += sum(each.zeros for each in tables)
    told = ", ".join(f"{name} {size}" for name, size in most) or "none"
    share = f"{zeros / max(count, 1):.1%} of all {count} float constants"
    found = sum(each.zeros for each in tables) / max(sum(picked.values()), 1)
    more = f", {found:.1%} of the {sum(picked.values())} in tables" if tables else ""
    return f"{share}{more} (not pruned, by what reads them: {told}){_hint(model, count, tables)}"


def _hint(model: ir.Model, count: int, tables: Sequence[PrunedTable]) -> str:
    """How tables can be pruned, where they are much of the model and were not."""
    left = 0 if tables else sum(table_size(each) for each in find_tables(model.graph))
    if left < TABLES_SHARE * count:
        return ""
    return f"; tables=0.8 would prune those that Gather reads, {left / count:.0%} of the constants"


TABLES_SHARE = 0.1
"""Of all constants, from which on tables are worth a word."""

TENSORRT_CHANNELS = 256
"""NVIDIA/TensorRT#4065: sparse tactics are seldom picked below."""
