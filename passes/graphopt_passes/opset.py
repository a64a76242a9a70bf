"""Raising the opset of a model, so that an operator can be used that is newer than the model.

Before:  opset 17: z = Mul(x, Reciprocal(Sqrt(ReduceMean<axes=[-1]>(Mul(x, x)) + eps)))
After:   opset 23: the same with ReduceMean(…, [-1]), ready to become RMSNormalization(x)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import onnx.defs
import onnx_ir as ir

from graphopt.ir import operators
from graphopt.ir.build import Builder
from graphopt.ir.scopes import all_graphs
from graphopt.ir.shapes import Shapes
from graphopt.numerics import Numerics
from graphopt.rewrite import Context, Remark, Rule, Skip, name_of
from graphopt.rewrite.probe import gains, newest, replacing
from graphopt.targets import Target
from graphopt.targets.kernels import KernelTable, packaged_kernels
from graphopt_passes.opset_changes import CHANGES, NEUTRAL, Spelling


@dataclasses.dataclass(frozen=True)
class LiftOpset:
    """Raises ai.onnx to the smallest opset at which everything fuses that the target has an operator for.

    A model in which no rule would put a newer operator is left alone; so is one with an operator whose meaning changed
    on the way in a manner that cannot be written down, or that the target has kernels for in the old version only, and
    that no later pass takes away: a remark names it.

    Before:  opset 17: …parts of an RMS normalisation…   y = Squeeze(x, axes)
    After:   opset 23: …parts of an RMS normalisation…   y = Squeeze(x, axes)
    Changes numerics: exact, but for AveragePool, which ONNX Runtime sums up in another order from version 19 on.
    Leaves alone: models with local functions; targets that ask for it.

    Attributes:
        name: of the pass.
        rules: what would use a newer operator.
        wishes: opsets that somebody else has a use for, asked of the model; None for none.
        use: what a newer opset would let more nodes do, in words.
        later: rules that run afterwards, and may replace what has no kernel.
        needed: whether what was asked for cannot be had otherwise: then targets are raised, too, that leave opsets be.
    """

    name: str = "lift-opset"
    rules: tuple[Rule, ...] = ()
    wishes: Callable[[ir.Model, Context], Iterable[int]] | None = None
    use: str = "fuse"
    later: tuple[Rule, ...] = ()
    needed: bool = False

    @property
    def numerics(self) -> Numerics:
        """Every node goes on meaning what it meant; one kernel adds in another order."""
        return Numerics.REORDERED

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        opset = model.opset_imports.get("", 0)
        if not (ctx.target.raises_opset or self.needed) or not opset or model.functions:
            return False
        declined: list[Remark] = []
        for wanted in self._asked(model, ctx, declined):
            if self._raise(model, wanted, ctx):
                return True
        for each in declined:
            reason = f"a newer opset would not let {each.rule} {self.use}: {each.reason}"
            ctx.missed("lift-opset", each.node, reason)
        return False

    def _asked(self, model: ir.Model, ctx: Context, declined: list[Remark]) -> Iterator[int]:
        """The opsets above the model's that something asks for, the highest first; looks no further than it must."""
        opset = model.opset_imports.get("", 0)
        wished = () if self.wishes is None else self.wishes(model, ctx)
        newer = {each for each in wished if each > opset}
        places = gains(self.rules, model, ctx, declined)
        highest = max((newest(model, ctx.target), *newer))
        while highest not in newer and (asked := next(places, 0)):
            newer.add(asked)
        if highest in newer:
            yield highest
        newer.update(places)
        yield from sorted(newer - {highest}, reverse=True)

    def _raise(self, model: ir.Model, wanted: int, ctx: Context) -> bool:
        """Raises the model to opset `wanted`, where that can be written and is permitted; returns whether."""
        plan, opset = self._plan(model, wanted, ctx), model.opset_imports[""]
        where = model.graph.name or "main"
        if plan is None or not ctx.permit("lift-opset", where, _numerics(plan, opset, wanted)):
            return False
        _apply(model, plan, wanted, ctx)
        return True

    def _plan(self, model: ir.Model, wanted: int, ctx: Context) -> list[Spelling] | None:
        """Each node as it is written at opset `wanted`; None, with a remark, where one cannot be."""
        opset = model.opset_imports[""]
        plan: list[Spelling] = []
        passing = replacing(self.later, wanted, ctx)
        for scope in all_graphs(model):
            for node in scope.graph:
                if node.domain:
                    continue
                try:
                    plan.append(spell(node, opset, wanted, ctx.shapes, ctx.target, passing))
                except Skip as skip:
                    where = f"{operators.describe(node)} stays at opset {opset}: {skip}"
                    reason = f"at opset {wanted} more would {self.use}, but {where}"
                    ctx.missed("lift-opset", node, reason)
                    return None
        return plan


def _numerics(plan: Iterable[Spelling], opset: int, wanted: int) -> Numerics:
    """ONNX Runtime 1.31 has another kernel for AveragePool-19 and later: as fast, not equal in every bit."""
    pools = any(spelling.op_type == "AveragePool" for spelling in plan)
    return Numerics.REORDERED if pools and opset < 19 <= wanted else Numerics.EXACT


VERIFYING = "ort-cpu"
"""Whose kernels run what is verified: without them nobody could tell whether the result is right."""

UNLISTED = {"LayerNormalization": 17, "SimplifiedLayerNormalization": 1}
"""What ONNX Runtime takes below the opset that defines it, or at any, and means the same by."""


def _stays(_node: ir.Node) -> bool:
    return False


def spell(
    node: ir.Node,
    opset: int,
    wanted: int,
    shapes: Shapes,
    target: Target,
    passing: Callable[[ir.Node], bool] = _stays,
) -> Spelling:
    """`node` as it is written at opset `wanted`; without a kernel there only if it is `passing`, replaced afterwards.

    Raises:
        Skip: it cannot be written there, or the target has no kernel for it there.
    """
    spelling, version = Spelling.of(node), node.version or opset
    if not _stays_as_it_is(node.op_type, version, wanted):
        spelling = _spelled_anew(spelling, version, wanted, shapes)
    kernels = (*target.kernels, VERIFYING)
    lost = _loses_kernel((node.op_type, opset), (spelling.op_type, wanted), kernels)
    if lost and (spelling.is_new() or not passing(node)):
        raise Skip(f"target {target.name} has no kernel for its version at {wanted}", node)
    return spelling


@functools.lru_cache(maxsize=1024)
def _stays_as_it_is(op_type: str, version: int, wanted: int) -> bool:
    """Whether no version of the operator up to opset `wanted` is written in another way."""
    reached = 0
    while reached < wanted:
        before = operators.find_schema(op_type, version, "")
        if before is None:
            return wanted >= UNLISTED.get(op_type, wanted + 1)
        reached = _next_version(op_type, version, wanted)
        if reached > wanted:
            return True
        if (op_type, reached) in CHANGES or not _is_neutral(op_type, before, reached):
            return False
        version = reached
    return True


def _is_neutral(op_type: str, before: onnx.defs.OpSchema, version: int) -> bool:
    """Whether a version of an operator means by the text of the one before what that did."""
    after = operators.find_schema(op_type, version, "")
    return (op_type, version) in NEUTRAL or _same_text(before, after)


def _spelled_anew(spelling: Spelling, version: int, wanted: int, shapes: Shapes) -> Spelling:
    """A spelling of an opset as it is at `wanted`, one change after the other."""
    node, reached = spelling.node, 0
    while reached < wanted:
        schema = operators.find_schema(spelling.op_type, version, "")
        if schema is None and wanted >= UNLISTED.get(spelling.op_type, wanted + 1):
            break
        if schema is None:
            raise Skip("the standard does not define it", node)
        reached = _next_version(spelling.op_type, version, wanted)
        if reached > wanted:
            break
        step = CHANGES.get((spelling.op_type, reached))
        if step is not None:
            spelling = step(spelling, shapes)
        elif not _is_neutral(spelling.op_type, schema, reached):
            raise Skip(f"version {reached} of the operator changed", node)
        version = reached
    return spelling


def _next_version(op_type: str, version: int, limit: int) -> int:
    """The opset that changed an operator next after `version`; beyond `limit` where none up to there did."""
    before = operators.find_schema(op_type, version, "")
    for later in range(version + 1, limit + 1):
        schema = operators.find_schema(op_type, later, "")
        if schema is None or before is None or schema.since_version != before.since_version:
            return later
    return limit + 1


def _same_text(before: onnx.defs.OpSchema, after: onnx.defs.OpSchema | None) -> bool:
    """Whether two versions differ in element types at most."""
    return after is not None and not after.deprecated and _text(before) == _text(after)


def _text(schema: onnx.defs.OpSchema) -> tuple[object, ...]:
    formals = [(f.name, f.option) for f in (*schema.inputs, *schema.outputs)]
    attributes = sorted((n, a.required, str(a.default_value)) for n, a in schema.attributes.items())
    return (schema.doc, formals, attributes)


@functools.lru_cache(maxsize=1024)
def _loses_kernel(before: tuple[str, int], after: tuple[str, int], tables: tuple[str, ...]) -> bool:
    """Whether a provider, of the target or the one that verifies, registers the old version of an operator only."""
    old, new = (operators.find_schema(*each, "") for each in (before, after))
    found = map(packaged_kernels, dict.fromkeys(tables))
    return any(_serves(t, before[0], old) and not _serves(t, after[0], new) for t in found)


def _serves(table: KernelTable, op_type: str, schema: onnx.defs.OpSchema | None) -> bool:
    kernels = table.find("", op_type)
    return schema is not None and any(kernel.serves(schema.since_version) for kernel in kernels)


def _apply(model: ir.Model, plan: Sequence[Spelling], wanted: int, ctx: Context) -> None:
    write([Written(spelling) for spelling in plan], ctx)
    model.opset_imports[""] = wanted
    ctx.refresh()


@dataclasses.dataclass(frozen=True)
class Written:
    """A node as it shall be written, and whether a function holds it, which cannot hold initializers."""

    spelling: Spelling
    in_function: bool = False


def write(plan: Iterable[Written], ctx: Context) -> None:
    """Writes each node of a plan so; the imports are for the caller to raise."""
    for each in plan:
        node = each.spelling.node
        node.version = None  # the imports count, not what a file said of the node
        if each.spelling.is_new():
            _rewrite(node, each, ctx)


def _rewrite(node: ir.Node, written: Written, ctx: Context) -> None:
    tape, spelling = Builder(), written.spelling
    inputs = [
        value if value is None or isinstance(value, ir.Value) else tape.const(value)
        for value in spelling.inputs
    ]
    if written.in_function:
        inputs = _as_nodes(inputs, tape.constants, node, ctx)
    else:
        _register(tape.constants, node, ctx)
    node.op_type = spelling.op_type
    node.resize_inputs(len(inputs))
    for index, value in enumerate(inputs):
        node.replace_input_with(index, value)
    for name in [n for n in node.attributes if n not in spelling.attributes]:
        del node.attributes[name]
    for name, attribute in spelling.attributes.items():
        node.attributes[name] = attribute


def _as_nodes(
    inputs: Sequence[ir.Value | None], made: Sequence[ir.Value], node: ir.Node, ctx: Context
) -> list[ir.Value | None]:
    """The inputs, with a `Constant` node for each constant that was made."""
    assert node.graph is not None
    found: dict[ir.Value, ir.Value] = {}
    for value in made:
        tensor = value.const_value
        assert tensor is not None
        constant = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
        constant.name = ctx.names.fresh(f"{name_of(node)}_{value.name}")
        out = constant.outputs[0]
        out.name, out.shape, out.type = constant.name, value.shape, value.type
        node.graph.insert_before(node, constant)
        found[value] = out
    return [None if value is None else found.get(value, value) for value in inputs]


def _register(constants: Iterable[ir.Value], node: ir.Node, ctx: Context) -> None:
    assert node.graph is not None
    for value in constants:
        value.name = ctx.names.fresh(f"{name_of(node)}_{value.name}")
        node.graph.register_initializer(value)
