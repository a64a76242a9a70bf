"""What a pass is."""

from __future__ import annotations

import pytest

from graphopt.numerics import Numerics
from graphopt.pipeline import Pass, Repeat, RewritePass
from graphopt.rewrite import Op, Rule, Var


def rule(numerics: Numerics) -> Rule:
    return Rule(numerics.name.lower(), Op("Relu", Var()), lambda _m, _g: None, numerics)


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ((), Numerics.EXACT),
        ((Numerics.EXACT,), Numerics.EXACT),
        ((Numerics.EXACT, Numerics.REORDERED), Numerics.REORDERED),
        ((Numerics.LOSSY, Numerics.EXACT), Numerics.LOSSY),
    ],
)
def test_a_family_is_as_loose_as_its_loosest_rule(
    classes: tuple[Numerics, ...], expected: Numerics
) -> None:
    assert RewritePass("family", tuple(map(rule, classes))).numerics is expected


def test_a_rewrite_pass_is_a_pass_and_a_group_is_none() -> None:
    assert isinstance(RewritePass("family", ()), Pass)
    assert not isinstance(Repeat(()), Pass)
