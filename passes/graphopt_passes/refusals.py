"""Shared reading of what a target refuses, for rewrites that are made only where it does."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.emit.legality import refusal
from graphopt.emit.sites import Site
from graphopt.ir import operators
from graphopt.ir.scopes import Scope
from graphopt.rewrite import Match, Op
from graphopt.rewrite.rules import Facts


def site_of(m: Match, node: ir.Node) -> Site:
    """The matched node with what legality rules ask about it."""
    return _site(m.facts, node)


def refused(m: Match, root: Op) -> bool:
    """Whether the target of the run can do nothing with the node that `root` matched."""
    return refusal(_site(m.facts, m[root]), m.facts.target) is not None


def _site(facts: Facts, node: ir.Node) -> Site:
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    domain = "" if node.domain == "ai.onnx" else node.domain
    scope = Scope(graph, facts.opsets)
    return Site(node, scope, facts.shapes, domain, operators.opset(node, facts.opsets) or 0)
