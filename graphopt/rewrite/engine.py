"""The worklist driver: rules indexed by root operator, applied until none fires.

The engine alone mutates.  Every check comes before the first mutation; what a rule builds stays on its tape until
then.  Nodes that lose their last use are removed on the way, so that "no other use" is judged on what is alive.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from graphopt.errors import PassError
from graphopt.ir import collector
from graphopt.ir.build import Builder
from graphopt.rewrite.commit import Site, commit, discard, is_dead, remove
from graphopt.rewrite.context import Context, Tuner
from graphopt.rewrite.index import UNSEEN, Look, Looks, RuleIndex
from graphopt.rewrite.pattern import Binding, Op, Trace, least, walk
from graphopt.rewrite.rules import Facts, Match, Replacement, Rule, Skip

ENOUGH = 0.95
"""A measured gain from which a fusion is made: what lies between this and 1 is noise, and the graph is smaller."""

BETWEEN = 4
"""How many nodes at most lie between a match and what its replacement reads."""

NEAR_MISS_NODES = 2
"""How many nodes of a pattern must be bound before its failure is worth a remark."""

NEAR_MISS_SHARE = 0.5
"""The same as a share of its shortest spelling: two products are no near miss of a normalisation."""

TELLING = 3
"""How many nodes must be bound where all of them are operators that any model is full of."""

COMMON = frozenset(
    {"Add", "Cast", "Concat", "Div", "Gather", "Gemm", "Identity", "MatMul", "Mul", "Reshape"}
    | {"Shape", "Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze"}
)
"""Operators two of which in a row are no near miss of anything."""


@dataclasses.dataclass
class Worklist:
    """First in, first out, each node at most once, with its look where that is known.

    Args:
        looks: the nodes that wait from the start, in order, and how they look; None of a dead one.
        idle: those of them that need no visit, unless they are pushed before it is their turn.
    """

    looks: Mapping[ir.Node, Look | None] = dataclasses.field(default_factory=dict)
    idle: Iterable[ir.Node] = ()

    def __post_init__(self) -> None:
        self._queue = collections.deque(self.looks)
        self._queued = set(self._queue)
        self._looks = dict(self.looks)
        self._idle = set(self.idle)

    def push(self, nodes: Sequence[ir.Node]) -> None:
        """Adds the nodes that are not waiting already; each is to be looked at anew."""
        queued, append, looks = self._queued, self._queue.append, self._looks
        self._idle.difference_update(nodes)
        for node in nodes:
            looks.pop(node, None)
            if node not in queued:
                queued.add(node)
                append(node)

    def __iter__(self) -> Iterator[tuple[ir.Node, Look | None]]:
        queue, queued, idle, looks = self._queue, self._queued, self._idle, self._looks
        while queue:
            node = queue.popleft()
            queued.discard(node)
            if node not in idle and node.graph is not None:
                yield node, looks.pop(node, UNSEEN)


class Rewriter:
    """Applies rules to every graph of a model until none fires."""

    def __init__(self, rules: Sequence[Rule], ctx: Context, *, budget: int = 1_000_000) -> None:
        self._ctx = ctx
        self._budget = budget
        self._index = RuleIndex(rules, keep_near_misses=ctx.options.trace_misses)
        self._sites: dict[ir.Graph | None, tuple[Site, int]] = {}
        self._work = Worklist()
        self._traces = ctx.options.trace_misses

    def run(self, model: ir.Model) -> bool:
        """Rewrites `model` in place; returns whether anything changed, dead nodes included.

        Raises:
            PassError: the rules do not come to an end.
        """
        start = len(self._ctx.rewrites)
        changed = False
        # What a change enables may lie beyond its neighbours: further down a deep pattern, beside a use that died, or
        # wherever a shape became known.  So the graphs are gone through again until a whole turn changes nothing.
        with collector.off():
            while self._turn(model, start):
                changed = True
        return changed

    def _turn(self, model: ir.Model, start: int) -> bool:
        """Visits every node, and what the changes on the way call for; returns whether anything changed."""
        self._sites.clear()
        if not model.graph.outputs:  # all of it would be dead, and no runtime takes an empty graph
            return False
        shapes, looks = self._ctx.shapes, self._looks(model)  # inferred even where no rule will ask
        calling = looks.calling(self._index)
        if not any(calling):
            return False
        for scope, _ in looks.census.parts:
            facts = Facts(shapes, self._ctx.target, scope.opsets)
            body = scope.function is not None and scope.owner is None
            site = Site(scope.graph, facts, is_function=body)
            self._sites[scope.graph] = (site, scope.opsets.get("", 0))
        self._work = Worklist(looks.known(), looks.idle(calling))
        return self._drain(start)

    def _looks(self, model: ir.Model) -> Looks:
        """The model's nodes and how they look; what changes a node's look pushes it, so the rest can be relied on."""
        census, kept = self._ctx.walk(model), self._ctx.looks
        if kept is None or kept.census is not census:
            kept = self._ctx.looks = Looks(census)
        return kept

    def _drain(self, start: int) -> bool:
        """Visits the waiting nodes until none waits; returns whether anything changed."""
        changed = False
        for node, look in self._work:
            # Who loses a use is pushed, so that the others are as they looked; a dead node may be read by now.
            if (look is None or look is UNSEEN) and is_dead(node):
                self._ctx.census = None
                self._work.push(remove(node, self._ctx))
                changed = True
                continue
            fired = self._visit(node, look or UNSEEN)
            if fired is None:
                continue
            changed = True
            if len(self._ctx.rewrites) - start > self._budget:
                raise PassError(
                    f"no fixed point within {self._budget} rewrites; the last rule was {fired.name} at "
                    f"{self._ctx.rewrites[-1].site!r}: leave it out with --disable {self._ctx.pass_name}/{fired.name}",
                    pass_name=self._ctx.pass_name,
                )
        return changed

    def _visit(self, node: ir.Node, look: Look) -> Rule | None:
        """Applies the first rule that fires at `node`, which looks like that; returns it, or None."""
        place = self._sites.get(node.graph)
        if place is None:  # a graph that came with a rewrite: the next turn knows where it is
            return None
        site, opset = place
        index = self._index
        seen = look is not UNSEEN
        for rule in index.fitting(look, opset) if seen else index.candidates(node, opset):
            if self._apply(rule, node, site):
                return rule
        return None

    def _apply(self, rule: Rule, root: ir.Node, site: Site) -> bool:
        env = self._bound(rule, root) if self._traces else rule.pattern.first(root)
        if env is None:
            return False
        tape, ctx = Builder(), self._ctx
        new = self._built(rule, env, root, tape, site)
        if new is not None and ctx.tuner is not None:
            new = None if self._loses(rule, env, root, new, tape, ctx.tuner) else new
        if new is None or not ctx.permit(rule.name, root, rule.numerics):
            discard(tape, ctx)
            return False
        self._work.push(commit(rule.name, root, new, tape, site, ctx))
        return True

    def _bound(self, rule: Rule, root: ir.Node) -> Binding | None:
        """What the pattern binds at `root`; None where it does not match, which may be a near miss."""
        trace = Trace()
        env = next(rule.pattern.match_node(root, {}, trace), None)
        if env is None:
            self._near_miss(rule, root, trace)
        return env

    def _built(
        self, rule: Rule, env: Binding, root: ir.Node, tape: Builder, site: Site
    ) -> Sequence[ir.Value | None] | None:
        """What shall replace the outputs of `root`, checked; None where the rule declines or must not."""
        try:
            made = rule.build(Match(env, site.facts), tape)
            if made is None:
                return None
            new = _aligned(made, root)
            _check_uses(rule.pattern, env, root, tape)
            site.check(root, new, tape, self._ctx)
        except Skip as skip:
            if str(skip):
                self._ctx.near_miss(rule.name, root, str(skip), skip.culprit)
            return None
        return new

    def _loses(
        self,
        rule: Rule,
        env: Binding,
        root: ir.Node,
        new: Sequence[ir.Value | None],
        tape: Builder,
        tuner: Tuner,
    ) -> bool:
        """Whether an operator that the target has for its speed was measured to be slower here."""
        fused = {(each.domain, each.op_type) for each in self._ctx.target.fused}
        if not any((n.domain, n.op_type) in fused for n in tape.nodes):
            return False
        pairs = [(a, b) for a, b in zip(root.outputs, new, strict=True) if b is not None]
        before = _replaced(env, tape)
        gain = tuner.gain(before, [a for a, _ in pairs], tape.nodes, [b for _, b in pairs])
        if gain is None or gain >= ENOUGH:
            return False
        self._ctx.missed(rule.name, root, f"measured on this machine: {gain:.2f} times as fast")
        return True

    def _near_miss(self, rule: Rule, root: ir.Node, trace: Trace) -> None:
        if trace.depth < NEAR_MISS_NODES:
            return
        if trace.depth < NEAR_MISS_SHARE * len(least(rule.pattern)):
            return
        kinds = {bound.op_type for bound in trace.env.values() if isinstance(bound, ir.Node)}
        if trace.depth < TELLING and kinds <= COMMON:
            return
        total = max(trace.depth, len(least(rule.pattern, trace.env)))
        seen = "an absent input" if trace.culprit is None else _origin(trace.culprit)
        self._ctx.near_miss(
            rule.name,
            root,
            f"matched {trace.depth} of {total} nodes; stopped at {seen} where {trace.wanted} was wanted",
        )


def _replaced(env: Binding, tape: Builder) -> list[ir.Node]:
    """The matched nodes, and those between them and what the new nodes read, in order."""
    ends = {value for node in tape.nodes for value in node.inputs}
    bound = [node for node in env.values() if isinstance(node, ir.Node)]
    found = dict.fromkeys(bound)

    def leads(value: ir.Value | None, depth: int) -> bool:
        node = None if value is None else value.producer()
        if value in ends or node in found:
            return True
        if node is None or depth == 0:
            return False
        ways = [leads(v, depth - 1) for v in node.inputs]  # each may bring nodes of its own
        if not any(ways):
            return False
        found[node] = None
        return True

    for node in bound:
        for value in node.inputs:
            leads(value, BETWEEN)
    graph = bound[0].graph
    return [node for node in graph or () if node in found]


def _origin(value: ir.Value) -> str:
    producer = value.producer()
    return f"{'input' if producer is None else producer.op_type} {value.name!r}"


def _aligned(made: Replacement, root: ir.Node) -> Sequence[ir.Value | None]:
    """One replacement per output of `root`."""
    new = (made,) if isinstance(made, ir.Value) else tuple(made or ())
    return (*new, *[None] * (len(root.outputs) - len(new)))


def _check_uses(pattern: Op, env: Binding, root: ir.Node, tape: Builder) -> None:
    """Interior nodes must die with the root, unless they may be shared, or what is new reads them.

    Raises:
        Skip: an interior node is used elsewhere, or lies in another graph.
    """
    if pattern.flat is not None:
        return
    bound: Mapping[ir.Node, Op] = {
        node: op for op in walk(pattern) if isinstance(node := env.get(op), ir.Node)
    }
    expected = {*bound, *tape.nodes}
    for node, op in bound.items():
        if node is root or op.shared:
            continue
        if node.graph is not root.graph:
            raise Skip("the match crosses a subgraph boundary", node)
        for value in node.outputs:
            if value.is_graph_output():
                raise Skip(f"interior value {value.name!r} is a graph output", node)
            if any(use.node not in expected for use in value.uses()):
                raise Skip(f"interior value {value.name!r} has other uses", node)
