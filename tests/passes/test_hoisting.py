"""Work that every turn of a loop repeats."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphopt_passes.hoisting import HoistInvariants

from graphopt.pipeline import Step
from graphopt.rewrite import Context, Gate
from graphopt.targets import get_target
from tests.rewriting import check, parse

STEPS: tuple[Step, ...] = (HoistInvariants(),)


def loop(
    body: str, *, ahead: str = "", count: str = "three", carried: str = "x", constants: str = ""
) -> str:
    return (
        "g (float[2] x, float[2] k, float[N] n, int64[2] j, int64 m) => (float[2] y)"
        f" <int64 three = {{3}}, int64 zero = {{0}} {constants}> {{ {ahead} y = Loop({count}, , {carried}) <body = b"
        f" (int64 i, bool c, float[2] p) => (bool d, float[2] q) {{ {body} d = Identity(c) }}> }}"
    )


@pytest.mark.parametrize("count", ["three", "m"])
def test_what_no_turn_changes_moves_ahead(count: str) -> None:
    check(
        STEPS,
        loop("s = Exp(k)  t = Add(s, k)  q = Add(p, t)", count=count),
        loop("q = Add(p, t)", ahead="s = Exp(k)  t = Add(s, k)", count=count),
    )


@pytest.mark.parametrize(
    "work",
    [
        "t = Add(k, p)",
        "u = RandomUniformLike(k)  v = Sub(u, u)  t = Add(v, p)",
        "u = Identity(k)  t = Add(u, p)",
    ],
    ids=["depends on the turn", "random", "free"],
)
def test_what_varies_or_costs_nothing_stays(work: str) -> None:
    check(STEPS, loop(f"{work}  q = Add(p, t)"))


def test_a_result_leaves_an_identity_behind() -> None:
    check(
        STEPS,
        loop("q = Exp(k)"),
        loop("q = Identity(t)", ahead="t = Exp(k)"),
    )


def test_a_view_that_is_a_result_stays() -> None:
    check(STEPS, loop("q = Reshape(k, two)", constants=", int64[1] two = {2}"))


@pytest.mark.parametrize(
    "work",
    ["t = Gather(k, j)", "u = Div(j, j)  t = Cast<to = 1>(u)"],
    ids=["index out of range", "division by zero"],
)
def test_what_may_fail_stays_where_no_turn_may_be_taken(work: str) -> None:
    check(
        STEPS,
        loop(f"{work}  q = Add(p, t)", count="m"),
        missed="may take no turn",
        feeds=(),
    )


def test_what_may_fail_moves_where_a_turn_is_taken() -> None:
    check(
        STEPS,
        loop("t = Gather(k, j)  q = Add(p, t)"),
        loop("q = Add(p, t)", ahead="t = Gather(k, j)"),
    )


def test_what_may_fail_stays_where_no_turn_is_taken() -> None:
    check(STEPS, loop("t = Gather(k, j)  q = Add(p, t)", count="zero"), missed="may take no turn")


def test_unknown_dims_may_not_fit() -> None:
    body = "u = Mul(k, n)  t = ReduceSum<keepdims = 0>(u)  q = Add(p, t)"
    check(STEPS, loop(body, count="m"), missed="may take no turn", feeds=())


def test_names_of_siblings_do_not_clash() -> None:
    """Both loops call it t; moved out of the first, it would be in sight of the second."""
    one, two = (
        f"{y} = Loop(three, , x) <body = b (int64 i{y}, bool c{y}, float[2] p{y}) => (bool d{y}, float[2] q{y})"
        f" {{ t = {op}(k)  q{y} = Add(p{y}, t) d{y} = Identity(c{y}) }}>"
        for y, op in (("y", "Exp"), ("z", "Neg"))
    )
    start = "g (float[2] x, float[2] k) => (float[2] y, float[2] z) <int64 three = {3}> {"
    bare = one.replace("t = Exp(k)", ""), two.replace("t = Neg(k)", "").replace(", t)", ", u)")
    check(
        STEPS,
        f"{start} {one} {two} }}",
        f"{start} t = Exp(k) {bare[0]} u = Neg(k) {bare[1]} }}",
    )


def test_out_of_two_loops() -> None:
    inner = (
        "q = Loop(three, , p) <body = e (int64 ii, bool cc, float[2] pp) => (bool dd, float[2] qq)"
        " { dd = Identity(cc) %s qq = Add(pp, t) }>"
    )
    check(
        STEPS,
        loop(inner % "t = Exp(k)"),
        loop(inner % "", ahead="t = Exp(k)"),
    )


@pytest.mark.parametrize(("size", "moves"), [("T", False), ("4", True)])
def test_scan(size: str, moves: bool) -> None:
    def text(ahead: str, body: str) -> str:
        return (
            f"g (float[2] s, float[2,{size}] x, float[2] k, int64[2] j) => (float[2] y, float[T,2] w) {{ {ahead} y, w ="
            " Scan<num_scan_inputs = 1, scan_input_axes = [1], body = b (float[2] a, float[2] i) =>"
            f" (float[2] c, float[2] p) {{ {body} c = Add(a, t)  p = Mul(c, i) }}>(s, x) }}"
        )

    work = "t = Gather(k, j)"
    check(
        STEPS,
        text("", work),
        text(work, "") if moves else None,
        missed="" if moves else "may take no turn",
    )


def test_gate_keeps_everything() -> None:
    model = ir.from_proto(parse(loop("t = Exp(k)  q = Add(p, t)")))
    assert not HoistInvariants().run(model, Context(model, get_target("cpu"), gate=Gate(limit=0)))
