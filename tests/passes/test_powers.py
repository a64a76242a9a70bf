"""Powers spelled as products, roots and reciprocals."""

from __future__ import annotations

import pytest
from graphopt_passes.powers import LOWERING, RULES

from tests.rewriting import check

HEAD = "g (float[N,4] x) => (float[N,4] y)"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("y = Pow(x, two)", "y = Mul(x, x)"),
        ("y = Pow(x, minus)", "y = Reciprocal(x)"),
        ("t = Mul(x, x)  y = Pow(t, half)", "t = Mul(x, x)  y = Sqrt(t)"),
        ("t = Exp(x)  y = Pow(t, root)", "t = Exp(x)  s = Sqrt(t)  y = Reciprocal(s)"),
        (
            "s = Pow(x, two)  r = ReduceMean<axes = [-1]>(s)  a = Add(r, eps)  y = Pow(a, root)",
            "s = Mul(x, x)  r = ReduceMean<axes = [-1]>(s)  a = Add(r, eps)  q = Sqrt(a)  y = Reciprocal(q)",
        ),
        ("t = Abs(x)  u = Sqrt(t)  y = Pow(u, half)", "t = Abs(x)  u = Sqrt(t)  y = Sqrt(u)"),
        ("t = Max(x, eps)  y = Pow(t, half)", "t = Max(x, eps)  y = Sqrt(t)"),
    ],
)
def test_power_is_spelled_out(before: str, after: str) -> None:
    constants = "<float two = {2.0}, float half = {0.5}, float root = {-0.5}, float minus = {-1.0}, float eps = {1e-5}>"
    head = HEAD.replace("float[N,4] y", "float[N,M] y")
    check(
        RULES,
        before=f"{head} {constants} {{ {before} }}",
        after=f"{head} {constants} {{ {after} }}",
        opset=13,
        tolerance=2e-5,
    )


@pytest.mark.parametrize("exponent", ["0.5", "-0.5"])
@pytest.mark.parametrize(
    "base", ["t = Identity(x)", "t = Max(x, zero)", "t = Neg(x)", "t = Sub(x, x)"]
)
def test_root_of_what_may_be_negative_stays(exponent: str, base: str) -> None:
    check(
        RULES,
        before=f"{HEAD} <float e = {{{exponent}}}, float zero = {{-0.0}}> {{ {base}  y = Pow(t, e) }}",
        missed="may be negative",
    )


def test_integer_power_stays() -> None:
    check(RULES, before="g (int64[N] x) => (int64[N] y) <int64 e = {2}> { y = Pow(x, e) }")


def test_exponent_that_broadens_stays() -> None:
    check(
        RULES,
        before="g (float[4] x) => (float[2,4] y) <float[2,1] e = {2.0, 2.0}> { y = Pow(x, e) }",
    )


def test_cube_is_lowered_last() -> None:
    before = f"{HEAD} <float e = {{3.0}}> {{ y = Pow(x, e) }}"
    check(RULES, before=before)
    check(LOWERING, before=before, after=f"{HEAD} {{ t = Mul(x, x)  y = Mul(t, x) }}")
