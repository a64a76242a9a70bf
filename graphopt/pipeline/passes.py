"""What a pass is, and the pass that applies rules."""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import onnx_ir as ir

from graphopt.numerics import Numerics
from graphopt.rewrite import Context, Rewriter, Rule


@runtime_checkable
class Pass(Protocol):
    """Rewrites a model in place.  Valid before implies valid after; anything goes in between.

    A pass is a frozen dataclass: its fields are its options (`name{option=value}` in a recipe), its docstring shows
    before and after.
    """

    @property
    def name(self) -> str:
        """Kebab-case name, as in recipes and reports."""

    @property
    def numerics(self) -> Numerics:
        """The most that the pass may do to the numbers."""

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""


def drops_defaults(step: Pass) -> bool:
    """Whether a pass declares, by an attribute of that name, that it makes overridable defaults constants."""
    return bool(getattr(step, "drops_defaults", False))


@dataclasses.dataclass(frozen=True)
class RewritePass:
    """Applies the rules of a family until none fires."""

    name: str
    rules: tuple[Rule, ...]

    @property
    def numerics(self) -> Numerics:
        """The loosest class among the rules."""
        return max((rule.numerics for rule in self.rules), default=Numerics.EXACT)

    def run(self, model: ir.Model, ctx: Context) -> bool:
        """Rewrites `model`; returns whether anything changed."""
        return Rewriter(self.rules, ctx).run(model)


@dataclasses.dataclass(frozen=True)
class Repeat:
    """Runs passes in turn until a whole turn changes nothing, at most `limit` turns.

    Folding exposes identities, identities expose folds: the order inside a turn matters for speed only.
    """

    passes: tuple[Pass, ...]
    limit: int = 12
    name: str = "repeat"


@dataclasses.dataclass(frozen=True)
class PassRun:
    """What one execution of a pass did.

    Attributes:
        name: the pass.
        changed: whether it changed the model.
        rewrites: how many rewrites it made.
        seconds: CPU time of this process.
        nodes_after: nodes of the model after it, subgraphs and functions included.
    """

    name: str
    changed: bool
    rewrites: int
    seconds: float
    nodes_after: int
