"""Reductions in chains, with and without their axes."""

from __future__ import annotations

import pytest
from graphopt_passes.reductions import RULES

from graphopt.numerics import Numerics
from tests.rewriting import check

AXES = "<int64[1] a1 = {1}, int64[1] a2 = {2}, int64[2] a12 = {1, 2}, int64[1] last = {-1}, int64[1] none = {0}>"


@pytest.mark.parametrize(
    "kind",
    [
        "ReduceSum",
        "ReduceMean",
        "ReduceProd",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSumExp",
        "ReduceMax",
        "ReduceMin",
    ],
)
@pytest.mark.parametrize(
    ("keep", "second"), [(1, "last"), (0, "a1")], ids=["axes kept", "axes dropped"]
)
def test_reduction_of_reduction_joins(kind: str, keep: int, second: str) -> None:
    dims = "N,1,1" if keep else "N"
    head = f"g (float[N,4,5] x) => (float[{dims}] y) {AXES}"
    ctx = check(
        RULES,
        before=f"{head} {{ t = {kind}<keepdims = {keep}>(x, a1)  y = {kind}<keepdims = {keep}>(t, {second}) }}",
        after=f"{head} {{ y = {kind}<keepdims = {keep}>(x, a12) }}",
        tolerance=2e-5,
    )
    exact = kind in ("ReduceMax", "ReduceMin")
    assert ctx.numerics is (Numerics.EXACT if exact else Numerics.REORDERED)


def test_reduction_of_reduction_joins_by_attribute() -> None:
    check(
        RULES,
        before="""g (float[N,4,5] x) => (float[N,1,1] y)
            { t = ReduceSum<axes = [1]>(x)  y = ReduceSum<axes = [2]>(t) }""",
        after="g (float[N,4,5] x) => (float[N,1,1] y) { y = ReduceSum<axes = [1, 2], keepdims = 1>(x) }",
        opset=11,
    )


@pytest.mark.parametrize(
    "body",
    [
        "t = ReduceSum(x, a1)  y = ReduceMean(t, a2)",
        "t = ReduceSum<keepdims = 0>(x, a1)  y = ReduceSum(t, a1)",
        "t = ReduceSum(x, a1)  y = ReduceSum<keepdims = 0>(t, a2)",
        "t = ReduceSumSquare(x, a1)  y = ReduceSumSquare(t, a2)",
    ],
)
def test_other_reductions_of_reductions_stay(body: str) -> None:
    check(
        RULES,
        before=f"g (float[3,4,5] x) => (float[A,B,C] y) {AXES} {{ {body} }}".replace(
            "float[A,B,C] y", "float[3,1] y" if "keepdims = 0" in body else "float[3,1,1] y"
        ),
    )


def test_joined_reduction_with_other_use_stays() -> None:
    check(
        RULES,
        before=f"g (float[N,4,5] x) => (float[N,1,1] y, float[N,1,5] t) {AXES}"
        "{ t = ReduceMax(x, a1)  y = ReduceMax(t, a2) }",
        missed="graph output",
    )


def test_axes_at_run_time_stay() -> None:
    check(
        RULES,
        before="""g (float[N,4,5] x, int64[1] a) => (float[N,A,B] y) <int64[1] a2 = {2}>
            { t = ReduceMax(x, a)  y = ReduceMax(t, a2) }""",
        missed="computed at run time",
    )


@pytest.mark.parametrize(
    ("before", "after", "dims"),
    [
        (
            "t = ReduceMean<keepdims = 0>(x, last)  y = Unsqueeze(t, last)",
            "ReduceMean<keepdims = 1>(x, a2)",
            "N,4,1",
        ),
        (
            "t = ReduceMax<keepdims = 1>(x, last)  y = Squeeze(t, a2)",
            "ReduceMax<keepdims = 0>(x, a2)",
            "N,4",
        ),
        ("t = ReduceL2(x, a12)  y = Squeeze(t, a12)", "ReduceL2<keepdims = 0>(x, a12)", "N"),
        (
            "t = ReduceSum<keepdims = 0>(x, a2)  y = Reshape(t, s)",
            "ReduceSum<keepdims = 1>(x, a2)",
            "N,4,1",
        ),
        (
            "t = ArgMax<axis = -1>(x)  y = Squeeze(t, a2)",
            "ArgMax<axis = -1, keepdims = 0>(x)",
            "N,4",
        ),
        (
            "t = ArgMin<axis = 1, keepdims = 0>(x)  y = Unsqueeze(t, a1)",
            "ArgMin<axis = 1, keepdims = 1>(x)",
            "N,1,5",
        ),
    ],
)
def test_axes_are_kept_or_dropped_by_the_reduction(before: str, after: str, dims: str) -> None:
    dtype = "int64" if "Arg" in before else "float"
    head = f"g (float[N,4,5] x) => ({dtype}[{dims}] y) {AXES[:-1]}, int64[3] s = {{-1, 4, 1}}>"
    ctx = check(RULES, before=f"{head} {{ {before} }}", after=f"{head} {{ y = {after} }}")
    assert ctx.numerics is Numerics.EXACT


def test_view_of_another_axis_stays() -> None:
    check(
        RULES,
        before=f"g (float[N,4,5] x) => (float[N,1,4] y) {AXES} "
        "{ t = ReduceMean<keepdims = 0>(x, a2)  y = Unsqueeze(t, a1) }",
    )


@pytest.mark.parametrize("kind", ["ReduceMax", "ReduceMean"])
def test_reduction_over_axes_of_size_one_goes(kind: str) -> None:
    check(
        RULES,
        before=f"g (float[N,1,5] x) => (float[N,1,5] y) {AXES} {{ t = {kind}(x, a1)  y = Neg(t) }}",
        after="g (float[N,1,5] x) => (float[N,1,5] y) { y = Neg(x) }",
    )
    check(
        RULES,
        before=f"g (float[N,1,5] x) => (float[N,5] y) {AXES} {{ y = {kind}<keepdims = 0>(x, a1) }}",
        after=f"g (float[N,1,5] x) => (float[N,5] y) {AXES} {{ y = Squeeze(x, a1) }}",
    )


def test_reduction_over_nothing_goes() -> None:
    check(
        RULES,
        before="g (float[N,2] x) => (float[N,2] y) <int64[0] e = {}>"
        "{ t = ReduceSum<noop_with_empty_axes = 1>(x, e)  y = Neg(t) }",
        after="g (float[N,2] x) => (float[N,2] y) { y = Neg(x) }",
    )


def test_l2_norm_over_axes_of_size_one_stays() -> None:
    check(RULES, before=f"g (float[N,1] x) => (float[N,1] y) {AXES} {{ y = ReduceL2(x, a1) }}")


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
def test_softmax_of_one_element_is_constant(kind: str) -> None:
    check(
        RULES,
        before=f"g (float[2,1] x) => (float[2,1] y) {{ t = {kind}(x)  y = Neg(t) }}",
        after="g (float[2,1] x) => (float[2,1] y) <float[2,1] c> { y = Neg(c) }",
    )


def test_softmax_of_one_element_of_unknown_shape_stays() -> None:
    check(
        RULES,
        before="g (float[N,1] x) => (float[N,1] y) { y = Softmax(x) }",
        missed="not small and static",
    )


def test_softmax_that_flattens_stays() -> None:
    check(
        RULES,
        before="g (float[2,1,3] x) => (float[2,1,3] y) { y = Softmax<axis = 1>(x) }",
        opset=11,
    )
