"""Quantisation without calibration: weights in 8 bits with activations quantised as they come, or in 4 bits alone.

Source: com.microsoft MatMulIntegerToFloat, MatMulNBits, GatherBlockQuantized, ONNX Runtime 1.31 (ContribOperators.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.calibrate.collect import by_row
from graphopt.calibrate.moments import Wanted, collect_moments
from graphopt.calibrate.samples import JUDGED, Samples, read_samples
from graphopt.calibrate.screening import screening_of, tell_screened
from graphopt.emit import finalize
from graphopt.errors import GraphoptError, OptionError
from graphopt.ir import fingerprint, operators, values
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model
from graphopt.numerics import Numerics
from graphopt.rewrite import Calibration, Context, RemarkKind, name_of
from graphopt.runtime.session import Session
from graphopt.runtime.specs import input_specs
from graphopt.targets import Precision
from graphopt.verify.budget import budget_for
from graphopt.verify.feed_files import Feed
from graphopt.verify.feeds import find_feeds
from graphopt_passes.opset import LiftOpset
from graphopt_passes.quantize.certificate import Judgement
from graphopt_passes.quantize.factors import broken, factor_of, why_not
from graphopt_passes.quantize.files import on_disk
from graphopt_passes.quantize.overrides import check_patterns, names_of
from graphopt_passes.quantize.quality import LEAST_SQNR_DB, NOT_TIMED
from graphopt_passes.quantize.single_blocks import (
    BITS,
    SCHEMES,
    SIZES,
    Rule,
    Settings,
    parse_rules,
    settings_of,
)
from graphopt_passes.quantize.styles import MICROSOFT
from graphopt_passes.quantize.whole import with_whole_blocks
from graphopt_passes.quantize.writers import Blocks, write_blocks, write_dynamic

FLOATS = (ir.DataType.FLOAT,)
HALVES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""What the kernels that decode weights multiply."""

GAIN = 1.02
Write = Callable[[ir.Model, frozenset[str], Names], None]


@dataclasses.dataclass(frozen=True)
class Writers:
    """How weights get into a model: `draft` writes what runs as fast as the final ones, and is made at once."""

    final: Write
    draft: Write | None = None


@dataclasses.dataclass(frozen=True)
class QuantizeDynamic:
    """Multiplies in 8 bits with activations quantised as they come; needs no calibration.

    Before:  y = MatMul(x, W)
    After:   q, s, z = DynamicQuantizeLinear(x)   y = MatMulIntegerToFloat(q, Wq, s, ws, z)
    Changes numerics: lossy.  Leaves alone: convolutions, whose integer kernels are slower without static ranges, small
    weights, and everything where the result is not faster than float.

    Attributes:
        least: elements of a weight from which on it pays.
        skip_nodes: patterns of names of nodes, or of their first outputs, that stay float.
    """

    least: int = 1 << 14
    skip_nodes: tuple[str, ...] = ()

    name: ClassVar[str] = "quantize-dynamic"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed.

        Raises:
            OptionError: a pattern that matches nothing.
        """
        if model.opset_imports.get("", 0) < 11:
            return _decline(ctx, "DynamicQuantizeLinear came with opset 11: export the model anew")
        qdq = ctx.target.qdq
        if qdq is not None and not qdq.integer_operators and not ctx.options.force:
            return _decline(
                ctx,
                f"stays float: '{ctx.target.name}' has no kernels for MatMulInteger, and computes in float what it "
                "rounds first; int8 with samples and int4-weights have them (--force emits it)",
            )
        rules = _rules(self.skip_nodes, (), model, ctx)
        nodes = [node for node in everywhere(model) if not _said(rules, node).exclude]
        sites = products_of(_sound(nodes, self.least, FLOATS, ctx), self.least)
        return _run(model, ctx, Precision.INT8_DYNAMIC, self, Writers(write_dynamic), sites)


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
        scheme: symmetric, asymmetric (each block has a zero point), or auto: what loses less of each weight, where the
            target takes zero points.
        tables: whether rows that are looked up (Gather) are stored so, too.
        least: elements of a weight from which on it pays.
        skip_nodes: patterns of names of nodes, or of their first outputs, that stay float.
        overrides: what holds for single weights: "PATTERN: exclude", "PATTERN: bits=8 block=64
            scheme=symmetric".
    """

    block: int = 32
    bits: int = 4
    form: str = "contrib"
    scheme: str = "auto"
    tables: bool = True
    least: int = 1 << 14
    skip_nodes: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    name: ClassVar[str] = "quantize-weights"
    numerics: ClassVar[Numerics] = Numerics.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed.

        Raises:
            OptionError: a block size, number of bits, form or scheme that no kernel takes, or not that of the target.
        """
        self._check()
        if self.form == "qdq" and self._finds_any(model) and not _has_blocks(model, ctx):
            return False
        if ctx.target.provider == "CUDAExecutionProvider" and self.bits == 8:
            ctx.remark(RemarkKind.WARNING, "quantize", "", CUDA)
        rules = _rules(self.skip_nodes, self.overrides, model, ctx)
        said = {name_of(node): _said(rules, node) for node in everywhere(model)}
        allowed = [node for node in everywhere(model) if not said[name_of(node)].exclude]
        nodes = _sound(allowed, self.least, HALVES, ctx)
        blocks_of = {name: given.block or self.block for name, given in said.items()}
        tables = self._tables(nodes, blocks_of, model, ctx)
        sites = products_of(nodes, self.least, HALVES) | tables
        scheme = self.scheme
        if ctx.target.qdq is not None and not ctx.target.qdq.zero_points:
            scheme = "symmetric"
            said = self._without_zero_points(sites, said, ctx)
        if ctx.target.qdq is not None and ctx.target.qdq.whole_blocks:
            products = [node for node in nodes if name_of(node) in sites - tables]
            said = with_whole_blocks(products, self.block, self.bits, said, ctx)
            sites = frozenset(name for name in sites if not said[name].exclude)
        signed = ctx.target.has_domain(MICROSOFT)
        how = Blocks(self.block, self.bits, self.form, scheme, single=said, signed=signed)

        def draft(changed: ir.Model, sites: frozenset[str], names: Names) -> None:
            write_blocks(changed, sites, names, how)

        def write(changed: ir.Model, sites: frozenset[str], names: Names) -> None:
            rounded = dataclasses.replace(how, moments=self._moments(model, ctx))
            write_blocks(changed, sites, names, rounded)

        return _run(model, ctx, Precision.INT4_WEIGHTS, self, Writers(write, draft), sites)

    def _finds_any(self, model: ir.Model) -> bool:
        """Whether there is a weight, or a table, of the size that is stored in blocks."""
        if products_of(everywhere(model), self.least, HALVES):
            return True
        tables = (node.inputs[0] for node in everywhere(model) if node.op_type == "Gather")
        found = (values.constant(each) for each in tables) if self.tables else ()
        return any(table is not None and table.size >= self.least for table in found)

    def _check(self) -> None:
        if self.block not in SIZES:
            raise OptionError(f"block size {self.block}: choose 16, 32, 64, 128 or 256")
        if self.bits not in BITS or self.form not in ("contrib", "qdq"):
            raise OptionError(
                f"bits {self.bits}, form {self.form!r}: bits are 4 or 8, the form is contrib (MatMulNBits and "
                "GatherBlockQuantized) or qdq (DequantizeLinear with blocks, opset 21)"
            )
        if self.scheme not in SCHEMES:
            raise OptionError(f"scheme {self.scheme!r}: choose one of {', '.join(SCHEMES)}")

    def _without_zero_points(
        self, sites: frozenset[str], said: Mapping[str, Settings], ctx: Context
    ) -> dict[str, Settings]:
        """What is said of single weights, for a target without zero points."""
        for name in sorted(sites):
            if (said[name].scheme or self.scheme) == "asymmetric":
                raise OptionError(
                    f"scheme asymmetric gives the weight of '{name}' zero points, and the target '{ctx.target.name}' "
                    'takes none: write scheme = "symmetric", or leave it out'
                )
        return {name: dataclasses.replace(each, scheme=None) for name, each in said.items()}

    def _tables(
        self, nodes: list[ir.Node], blocks_of: Mapping[str, int], model: ir.Model, ctx: Context
    ) -> frozenset[str]:
        """Names of the nodes that look rows up in large constant matrices; says of others why they stay float."""
        found = set()
        for node in nodes if self.tables else ():
            reason = self._no_table(node, blocks_of[name_of(node)], model)
            if reason is None:
                found.add(name_of(node))
            elif reason:
                ctx.missed("quantize", node, f"stays float: {reason}")
        return frozenset(found)

    def _no_table(self, node: ir.Node, block: int, model: ir.Model) -> str | None:
        """What keeps a table from being stored in blocks; "" for what is none or too small to tell."""
        if node.domain or node.op_type != "Gather":
            return ""
        table = values.constant(node.inputs[0])
        if table is None or table.dtype not in HALVES or table.size < self.least:
            return ""
        if len(table.shape) != 2 or operators.attribute(node, "axis", 0) != 0:
            return "it looks up no rows of a matrix"
        if node.graph is not model.graph:
            return "its table is looked up within a branch or a loop"
        width = int(table.shape.numpy()[1])
        if width % block:
            return f"rows of {width} are no whole number of blocks of {block}"
        return None if self._is_given_up(node.inputs[0]) else "others read its table as it is"

    def _is_given_up(self, table: ir.Value | None) -> bool:
        """Whether nobody reads the table as it is: others look rows up too, or multiply with it (tied embeddings)."""
        assert table is not None
        if table.is_graph_output():
            return False
        return all(self._gives_up(user, index) for user, index in table.uses())

    def _gives_up(self, user: ir.Node, index: int) -> bool:
        """Whether what reads a table at an input will read it in blocks."""
        if user.op_type == "Gather" and index == 0:
            return not operators.attribute(user, "axis", 0)
        if user.op_type == "Transpose" and not user.outputs[0].is_graph_output():
            behind = user.outputs[0].uses()
            return all(_is_matrix_product(node, self.least, HALVES) for node, _ in behind)
        return index == 1 and _is_matrix_product(user, self.least, HALVES)

    def _moments(self, model: ir.Model, ctx: Context) -> dict[str, np.ndarray]:
        """Second moments of what products read, from calibration samples; none without."""
        if ctx.options.calibration is None or self.bits == 8:
            return {}
        wanted: dict[str, Wanted] = {}
        work = 0.0
        for node in model.graph:
            source = node.inputs[0] if node.inputs else None
            if source is None or not source.name:
                continue
            if not _is_matrix_product(node, self.least, HALVES):
                continue
            factor = factor_of(node)
            assert factor is not None
            columns, rows = factor.matrix.shape
            work += float(columns) * columns * rows
            if work <= WORK and columns <= WIDEST:
                wanted[name_of(node)] = Wanted(source.name)
        key = f"moments:{fingerprint.structural(model)}:{fingerprint.weights(model)}"
        if wanted and key not in ctx.cache:
            # Batches do not show in moments; to be timed, the user's are what will be run.
            given = read_samples(ctx.options.calibration, input_specs(model))
            samples = screening_of(ctx).of(by_row(lambda: on_disk(model), given))
            each = list(dict.fromkeys(wanted.values()))
            with on_disk(model) as path:
                ctx.cache[key] = collect_moments(path, each, samples)
        found = ctx.cache.get(key, {})
        return {name: found[each] for name, each in wanted.items() if each in found}


CUDA = (
    "ONNX Runtime on CUDA has no integer kernels for Q and DQ: weights of matrix products are stored in 8 bits, "
    "activations and convolutions stay float"
)

WIDEST, WORK = 4096, float(1 << 37)
"""Columns of a weight, and multiplications in all, up to which weights are rounded by second moments."""


_LIFT = LiftOpset(wishes=lambda _model, _ctx: (21,), use="store weights in blocks", needed=True)
"""What rewrites operators whose meaning changed; nothing where the opset is new enough."""


def _has_blocks(model: ir.Model, ctx: Context) -> bool:
    """Whether the model is at opset 21 or can be brought there, where DequantizeLinear has blocks."""
    if model.opset_imports.get("", 0) < 21:
        finalize(model, dataclasses.replace(ctx.target, opset=(21, max(ctx.target.opset[1], 21))))
        ctx.refresh()
        _LIFT.run(model, ctx)
    if model.opset_imports.get("", 0) >= 21:
        model.ir_version = max(model.ir_version, 10)
        return True
    return _decline(
        ctx,
        "DequantizeLinear has blocks from opset 21 on, where operators of this model mean something else",
    )


def _run(
    model: ir.Model,
    ctx: Context,
    precision: Precision,
    how: QuantizeDynamic | QuantizeWeights,
    writers: Writers,
    sites: frozenset[str],
) -> bool:
    if not sites:
        return _decline(
            ctx,
            f"nothing to quantise: no MatMul or Gemm with a constant weight of {how.least} elements or more that the "
            "kernels take (--remarks says why of each)",
        )
    if not _is_worth_it(model, sites, ctx, precision, how, writers):
        return False
    permitted = frozenset(
        name_of(node)
        for node in everywhere(model)
        if name_of(node) in sites and ctx.permit("quantize", node, Numerics.LOSSY)
    )
    if permitted:
        writers.final(model, permitted, ctx.names)
        ctx.refresh()
    return bool(permitted)


def _is_worth_it(
    model: ir.Model,
    sites: frozenset[str],
    ctx: Context,
    precision: Precision,
    how: QuantizeDynamic | QuantizeWeights,
    writers: Writers,
) -> bool:
    worth = _pays(model, sites, ctx, precision, how, writers)
    tell_screened(ctx, "quantize")
    return worth


def _rules(
    skipped: tuple[str, ...], overrides: tuple[str, ...], model: ir.Model, ctx: Context
) -> tuple[Rule, ...]:
    """What the recipe says of single weights; all of it is about something that there is."""
    rules = parse_rules(skipped, overrides)
    if rules:
        check_patterns((pattern for pattern, _ in rules), names_of(model, ctx))
    return rules


def _said(rules: tuple[Rule, ...], node: ir.Node) -> Settings:
    return settings_of(rules, node.name or "", name_of(node))


def everywhere(model: ir.Model) -> Iterator[ir.Node]:
    """Nodes of the main graph and of the bodies of If, Loop and Scan."""
    return (node for graph in model.graphs() for node in graph)


def products_of(
    nodes: Iterable[ir.Node], least: int, dtypes: Collection[ir.DataType] = FLOATS
) -> frozenset[str]:
    """Names of the matrix products with a constant weight of `least` elements or more.

    Branches may use one name twice; what a name does not tell apart is left alone.
    """
    known = list(nodes)
    counts = Counter(name_of(node) for node in known)
    found = (name_of(node) for node in known if _is_matrix_product(node, least, dtypes))
    return frozenset(name for name in found if counts[name] == 1)


def _decline(ctx: Context, text: str) -> bool:
    ctx.remark(RemarkKind.WARNING, "quantize", "", text)
    return False


def _is_matrix_product(node: ir.Node, least: int, dtypes: Collection[ir.DataType]) -> bool:
    return why_not(node, least, dtypes) is None


def _sound(
    nodes: Iterable[ir.Node], least: int, dtypes: Collection[ir.DataType], ctx: Context
) -> list[ir.Node]:
    """The nodes whose weights a scale can hold; says of the other products with large weights why they stay float."""
    kept = []
    for node in nodes:
        reason, factor = why_not(node, least, dtypes), factor_of(node)
        if reason is None and factor is not None:
            reason = broken(factor)
        if not reason:
            kept.append(node)
        else:
            ctx.missed("quantize", node, f"stays float: {reason}")
    return kept


def _pays(
    model: ir.Model,
    sites: frozenset[str],
    ctx: Context,
    precision: Precision,
    how: QuantizeDynamic | QuantizeWeights,
    writers: Writers,
) -> bool:
    """Whether the quantised model is faster than float here, and within the budget; said where it is not."""
    known = f"{fingerprint.structural(model)}:{fingerprint.weights(model)}"
    key = f"{how}:{known}:{sorted(sites)}"  # other bits and blocks are another answer
    if key not in ctx.cache:
        ctx.cache[key] = _measured(model, sites, ctx, precision, writers)
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
    speed = NOT_TIMED if ratio == math.inf else f"{ratio:.2f}x the speed of float on this machine"
    ctx.remark(RemarkKind.NOTE, "quantize", "", f"{speed}; worst output {sqnr:.1f} dB")
    return True


def _measured(
    model: ir.Model,
    sites: frozenset[str],
    ctx: Context,
    precision: Precision,
    writers: Writers,
) -> tuple[float, bool, float]:
    """Speed over float, whether the budget is met, and signal to noise of the worst output; NaN where speed decides.

    For a runtime that does not run here the speed is infinite: nobody can time it.
    """
    budget = budget_for(precision, ctx.options.budget)
    assert budget is not None
    on_host = ctx.target.provider == "CPUExecutionProvider"
    judge = Judgement(model, _feeds(model, ctx), stated=not on_host)
    drafted = _written(model, sites, writers.draft or writers.final)
    ratio = judge.race(drafted)() if on_host else math.inf
    if ratio < GAIN and not ctx.options.force:
        return ratio, True, math.nan
    clone = drafted if writers.draft is None else _written(model, sites, writers.final)
    found = judge.accuracy(clone, budget)
    stated = ctx.options.budget is not None or precision is not Precision.INT8_DYNAMIC
    passed = found.passed and (stated or found.sqnr_db >= LEAST_SQNR_DB)
    return ratio, passed, found.sqnr_db


def _written(model: ir.Model, sites: frozenset[str], write: Write) -> ir.Model:
    """A copy with the weights as `write` stores them."""
    clone = load_model(model)
    write(clone, sites, Names.of(clone))
    return clone


def _samples(calibration: Calibration, model: ir.Model, ctx: Context) -> Samples:
    """The samples that hold numbers."""
    return screening_of(ctx).of(read_samples(calibration, input_specs(model)))


def _feeds(model: ir.Model, ctx: Context) -> list[Feed]:
    """Samples if the user gave some, else generated inputs."""
    if ctx.options.calibration is not None:
        return _samples(ctx.options.calibration, model, ctx).first(JUDGED)
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
