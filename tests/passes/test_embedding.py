"""Embeddings under a layer normalisation."""

from __future__ import annotations

import numpy as np
import pytest
from graphopt_passes import embedding

from tests.rewriting import check

MS = '<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>\n'
TABLES = "float[7,8] w, float[7,8] p, float[2,8] t, float[8] s, float[8] b"
IO = "g (int64[2,3] i, int64[1,3] j, int64[2,3] k) => (float[2,3,8] y)"
THREE = "x = Gather(w, i) z = Gather(p, j) u = Gather(t, k)"


def _check(
    before: str, after: str | None = None, *, target: str = "cuda", missed: str = ""
) -> None:
    rng = np.random.default_rng(0)
    feeds = [
        {
            name: rng.integers(0, high, shape)
            for name, high, shape in (("i", 7, (2, 3)), ("j", 5, (1, 3)), ("k", 2, (2, 3)))
            if f" {name}," in before or f" {name})" in before
        }
    ]
    check(
        embedding.RULES,
        before,
        after,
        target=target,
        missed=missed,
        feeds=feeds,
        tolerance=1e-5,
    )


ALL_CASTS = "ii = Cast<to=6>(i) jj = Cast<to=6>(j) kk = Cast<to=6>(k)"
CASTS = "ii = Cast<to=6>(i) kk = Cast<to=6>(k)"
KERNEL = "com.microsoft.EmbedLayerNormalization<epsilon=1e-5>"


@pytest.mark.parametrize(
    "total",
    ["a = Add(x, z) c = Add(a, u)", "a = Add(u, x) c = Add(z, a)", "c = Sum(x, z, u)"],
)
def test_three_embeddings(total: str) -> None:
    _check(
        f"{IO} <{TABLES}> {{ {THREE} {total} y = LayerNormalization(c, s, b) }}",
        f"{MS}{IO} <{TABLES}> {{ {ALL_CASTS} y, n = {KERNEL}(ii, kk, w, p, t, s, b, , jj) }}",
    )


def test_positions_that_are_folded() -> None:
    """For a sequence of known length, exporters leave the rows of the positions themselves."""
    io, tables = IO.replace("int64[1,3] j, ", ""), TABLES.replace("float[7,8] p", "float[1,3,8] p")
    _check(
        f"{io} <{tables}> {{ x = Gather(w, i) u = Gather(t, k) a = Add(x, u) c = Add(a, p)"
        " y = LayerNormalization(c, s, b) }",
        f"{MS}{io} <{tables.replace('1,3,8', '3,8')}> {{ {CASTS} y, n = {KERNEL}(ii, kk, w, p, t, s, b) }}",
    )


def test_places_that_are_repeated_for_the_batch() -> None:
    _check(
        f"{IO} <{TABLES}, int64[2] d = {{2, 1}}> {{ e = Expand(j, d) x = Gather(w, i) z = Gather(p, e)"
        " u = Gather(t, k) c = Sum(x, z, u) y = LayerNormalization(c, s, b) }",
        f"{MS}{IO} <{TABLES}> {{ ii = Cast<to=6>(i) jj = Cast<to=6>(j) kk = Cast<to=6>(k)"
        f" y, n = {KERNEL}(ii, kk, w, p, t, s, b, , jj) }}",
    )


def test_two_embeddings() -> None:
    io = IO.replace(", int64[2,3] k", "")
    _check(
        f"{io} <{TABLES}> {{ x = Gather(w, i) z = Gather(p, j) c = Add(x, z) y = LayerNormalization(c, s, b) }}",
        f"{MS}{io} <{TABLES}> {{ ii = Cast<to=6>(i) jj = Cast<to=6>(j)"
        f" y, n = {KERNEL}(ii, , w, p, , s, b, , jj) }}",
    )


@pytest.mark.parametrize(
    ("text", "target", "missed"),
    [
        (
            f"{IO} <{TABLES}> {{ {THREE} c = Sum(x, z, u) y = LayerNormalization(c, s, b) }}",
            "cpu",
            "",
        ),
        (
            f"{IO} <{TABLES}> {{ {THREE} c = Sum(x, z, u) y = LayerNormalization<axis=1>(c, s, b) }}".replace(
                "float[8] s, float[8] b", "float[3,8] s, float[3,8] b"
            ),
            "cuda",
            "last axis",
        ),
        (
            f"{IO} <{TABLES}> {{ x = Gather(w, i) z = Gather(p, i) c = Add(x, z) y = LayerNormalization(c, s, b) }}",
            "cuda",
            "of places alone",
        ),
        (
            f"{IO} <{TABLES}> {{ x = Gather(w, i) z = Relu(x) c = Add(x, z) y = LayerNormalization(c, s, b) }}",
            "cuda",
            "no embedding",
        ),
    ],
)
def test_what_stays(text: str, target: str, missed: str) -> None:
    _check(text, target=target, missed=missed)
