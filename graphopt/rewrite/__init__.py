"""The rewrite engine: patterns as data, rules that only build, one driver that mutates."""

from graphopt.rewrite.commit import ORIGIN_KEY, RULE_KEY, is_dead, remove
from graphopt.rewrite.context import (
    Calibration,
    Context,
    Gate,
    Options,
    Remark,
    RemarkKind,
    Rewrite,
    name_of,
)
from graphopt.rewrite.engine import Rewriter
from graphopt.rewrite.pattern import Either, Lit, Op, Var
from graphopt.rewrite.rules import Facts, Match, Rule, Skip, exact, rule

__all__ = [
    "ORIGIN_KEY",
    "RULE_KEY",
    "Calibration",
    "Context",
    "Either",
    "Facts",
    "Gate",
    "Lit",
    "Match",
    "Op",
    "Options",
    "Remark",
    "RemarkKind",
    "Rewrite",
    "Rewriter",
    "Rule",
    "Skip",
    "Var",
    "exact",
    "is_dead",
    "name_of",
    "remove",
    "rule",
]
