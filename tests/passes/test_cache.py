"""Keys and values of earlier steps in the attention operator."""

from __future__ import annotations

import pytest
from graphopt_passes.cache import FuseCache

from tests.rewriting import check

INS = "float[B,4,S,8] q, float[B,2,S,8] k, float[B,2,S,8] v, float[B,2,P,8] pk, float[B,2,P,8] pv"
OUTS = "float[B,4,S,8] y, float[B,2,T,8] nk, float[B,2,T,8] nv"
JOIN = "nk = Concat<axis=2>(pk, k) nv = Concat<axis=-2>(pv, v)"


def _check(before: str, after: str | None = None, **options: object) -> None:
    check((FuseCache(),), before, after, opset=23, tolerance=1e-5, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("dims", [(3, 1), (0, 2)])
def test_past_goes_into_attention(dims: tuple[int, ...]) -> None:
    """An empty past too: the first step."""
    sizes = INS.replace("[B", "[2").replace(",S,", ",3,")
    outs = OUTS.replace("[B", "[2").replace(",S,", ",3,")
    check(
        (FuseCache(),),
        f"g ({sizes}) => ({outs}) {{ {JOIN} y = Attention<scale=0.5>(q, nk, nv) }}",
        f"g ({sizes}) => ({outs}) {{ y, nk, nv = Attention<scale=0.5>(q, k, v, , pk, pv) }}",
        opset=23,
        dims=dims,
        tolerance=1e-5,
    )


def test_past_goes_into_attention_beside_a_mask() -> None:
    sizes = INS.replace("[B", "[1").replace(",S,", ",3,").replace(",P,", ",2,") + ", float[3,5] m"
    outs = OUTS.replace("[B", "[1").replace(",S,", ",3,").replace(",T,", ",5,")
    _check(
        f"g ({sizes}) => ({outs}) {{ {JOIN} y = Attention(q, nk, nv, m) }}",
        f"g ({sizes}) => ({outs}) {{ y, nk, nv = Attention(q, k, v, m, pk, pv) }}",
    )


def test_past_that_is_no_output() -> None:
    sizes = INS.replace("[B", "[1")
    _check(
        f"g ({sizes}) => (float[1,4,S,8] y) {{ {JOIN} y = Attention(q, nk, nv) }}",
        f"g ({sizes}) => (float[1,4,S,8] y) {{ y, nk, nv = Attention(q, k, v, , pk, pv) }}",
    )


@pytest.mark.parametrize(
    ("body", "missed"),
    [
        (f"{JOIN} y = Attention<is_causal=1>(q, nk, nv)", "causal"),
        (f"{JOIN} a = Attention(q, nk, nv) s = ReduceSum(nk, last) y = Mul(a, s)", "elsewhere"),
        (f"{JOIN} y = Attention(q, nk, nk)", ""),
        ("nk = Concat<axis=1>(pk, k) nv = Concat<axis=1>(pv, v) y = Attention(q, nk, nv)", ""),
        (
            "nk = Concat<axis=2>(pk, k, k) nv = Concat<axis=2>(pv, v, v) y = Attention(q, nk, nv)",
            "",
        ),
    ],
)
def test_past_that_stays(body: str, missed: str) -> None:
    ins = (
        "float[1,4,3,8] q, float[1,2,3,8] k, float[1,2,3,8] v, float[1,2,3,8] pk, float[1,2,3,8] pv"
    )
    last = "int64[3] last = {1, 2, 3}"
    _check(f"g ({ins}) => (float[1,4,3,8] y) <{last}> {{ {body} }}", missed=missed)


def test_past_stays_where_it_gains_nothing() -> None:
    text = f"g ({INS}) => ({OUTS}) {{ {JOIN} y = Attention(q, nk, nv) }}"
    check((FuseCache(),), text, opset=23, target="portable", dims=(2,), tolerance=1e-5)
