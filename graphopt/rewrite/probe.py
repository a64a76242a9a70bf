"""What rules would do at a newer opset: asked without changing anything."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.ir.scopes import all_graphs
from graphopt.rewrite.commit import Site, discard
from graphopt.rewrite.context import Context, Remark
from graphopt.rewrite.engine import Rewriter
from graphopt.rewrite.rules import Facts, Rule
from graphopt.targets import FusedOp, Target


def gains(
    rules: Sequence[Rule], model: ir.Model, ctx: Context, declined: list[Remark] | None = None
) -> Iterator[int]:
    """The opset that each place in `model` asks for where a rule would put an operator newer than the model.

    A place that has a replacement at the model's own opset asks for none.  What rules would still say against a place
    at a newer opset, and do not say now, goes to `declined` in the end.
    """
    newer = _newer(ctx.target, model.opset_imports.get("", 0))
    if newer:
        probe = _Probe(rules, ctx, newer)
        yield from probe.walk(model)
        if declined is not None:
            declined.extend(probe.declined)


def replacing(rules: Sequence[Rule], opset: int, ctx: Context) -> Callable[[ir.Node], bool]:
    """Tells of a node whether one of `rules` would replace it in a model of opset `opset`, written as it is."""
    probe = _Probe(rules, ctx, {})
    facts = Facts(ctx.shapes, ctx.target, {"": opset})
    return lambda node: probe.replaces(node, facts)


def newest(model: ir.Model, target: Target) -> int:
    """The greatest opset that `gains` could ask for; 0 if none."""
    newer = _newer(target, model.opset_imports.get("", 0))
    return max((each.since for each in newer.values()), default=0)


def _newer(target: Target, opset: int) -> dict[str, FusedOp]:
    """The operators that the target has from an opset above `opset` on."""
    ahead = [each for each in target.fused if opset < each.since <= target.opset[1]]
    ahead.sort(
        key=lambda each: -each.since
    )  # of an operator's forms and types, the first to come counts
    return {each.op_type: each for each in ahead if not each.domain}


class _Probe(Rewriter):
    """Goes through a model as the driver does, for a target that has its newer operators at any opset."""

    def __init__(self, rules: Sequence[Rule], ctx: Context, newer: dict[str, FusedOp]) -> None:
        _ = ctx.shapes  # inferred once, for both
        super().__init__(rules, ctx.aside())
        self.declined: list[Remark] = []
        self._newer = newer
        self._target = ctx.target
        self._ahead = _without_since(ctx.target, newer)

    def walk(self, model: ir.Model) -> Iterator[int]:
        """The opsets asked for."""
        for scope in all_graphs(model):
            now, ahead = (
                Site(
                    scope.graph,
                    Facts(self._ctx.shapes, target, scope.opsets),
                    is_function=scope.function is not None and scope.owner is None,
                )
                for target in (self._target, self._ahead)
            )
            for node in scope.graph:
                self._ctx.take_remarks()
                wanted = self._wanted(node, ahead)
                if not wanted and self._ctx.remarks:
                    self._note(node, now)
                if wanted and all(self._ops(r, node, now) is None for r in self._rules(node, now)):
                    yield wanted

    def replaces(self, node: ir.Node, facts: Facts) -> bool:
        """Whether a rule fires at `node` under `facts`."""
        if not isinstance(node.graph, ir.Graph):
            return False
        site = Site(node.graph, facts, is_function=False)
        return any(self._ops(rule, node, site) is not None for rule in self._rules(node, site))

    def _note(self, node: ir.Node, now: Site) -> None:
        """Keeps what was said against `node`, but for what is said of it now as well."""
        ahead = self._ctx.take_remarks()
        self._wanted(node, now)
        reasons = {each.reason for each in self._ctx.take_remarks()}
        self.declined += [each for each in ahead if each.reason not in reasons]

    def _rules(self, node: ir.Node, site: Site) -> Sequence[Rule]:
        return self._index.candidates(node, site.facts.opsets.get("", 0))

    def _wanted(self, node: ir.Node, site: Site) -> int:
        """The opset of the newest operator that the first rule to fire at `node` would put; 0 if none is newer."""
        for rule in self._rules(node, site):
            found = self._ops(rule, node, site)
            if found is not None:
                return max((self._newer[op].since for op in found if op in self._newer), default=0)
        return 0

    def _ops(self, rule: Rule, root: ir.Node, site: Site) -> frozenset[str] | None:
        """The ai.onnx operators that `rule` would put in place of `root`; None where it does not fire."""
        env = next(rule.pattern.match_node(root, {}), None)
        if env is None:
            return None
        tape = Builder()
        made = self._built(rule, env, root, tape, site)
        found = frozenset(node.op_type for node in tape.nodes if not node.domain)
        discard(tape, self._ctx)
        return found if made is not None else None


def _without_since(target: Target, newer: dict[str, FusedOp]) -> Target:
    fused = tuple(
        dataclasses.replace(each, since=1) if each.op_type in newer else each
        for each in target.fused
    )
    return dataclasses.replace(target, fused=fused)
