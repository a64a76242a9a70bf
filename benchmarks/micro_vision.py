"""Attention as models of images and speech spell it: within windows, scaled by each head, masked twice, with biases."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.micro_patterns import Case

IN_WINDOWS = "float[1,64,2,49,32]"
"""[B, W, H, S, D]: 64 windows of 7 x 7 pixels, two heads of 32."""
AS_BATCH = "float[64,3,49,32]"
FRAMES = "float[1,4,200,64]"
"""Four heads of 64, 200 frames of speech."""


def vision() -> Iterator[Case]:
    """What the rules for such models fuse."""
    yield from _windows()
    yield _conformer()
    yield _segmentation()


def _windows() -> Iterator[Case]:
    scores = "a = MatMul(q, t) z = Mul(a, e) p = Softmax(z) y = MatMul(p, v)"
    kinds = f"({IN_WINDOWS} q, {IN_WINDOWS} k, {IN_WINDOWS} v) => ({IN_WINDOWS} y)"
    body = f"t = Transpose<perm=[0,1,2,4,3]>(k) {scores}"
    yield Case("SDPA in windows (Hiera, Twins; left)", kinds, body, "float e = {0.17}")
    kinds = f"({AS_BATCH} q, {AS_BATCH} k, {AS_BATCH} v) => ({AS_BATCH} y)"
    body = (
        "t = Transpose<perm=[0,1,3,2]>(k) a = MatMul(q, t) z = Mul(a, e) b = Add(z, m) p = Softmax(b)"
        " y = MatMul(p, v)"
    )
    held = "float[3,1,1] e = {10.0, 9.0, 11.0}, float[1,3,49,49] m"
    yield Case("SDPA, a scale for each head, bias (Swin 2)", kinds, body, held)


def _conformer() -> Case:
    body = (
        "t = Transpose<perm=[0,1,3,2]>(k) a = MatMul(q, t) d = MatMul(u, r) g = Slice(d, n, l, x) b = Add(a, g)"
        " s = Div(b, e) z = Where(hide, low, s) f = Softmax(z) o = Where(hide, none, f) y = MatMul(o, v)"
    )
    held = (
        "float e = {8.0}, float low = {-1e4}, float none = {0.0}, int64[1] n = {100}, int64[1] l = {300},"
        " int64[1] x = {3}"
    )
    io = (
        f"({FRAMES} q, {FRAMES} u, {FRAMES} k, {FRAMES} v, float[1,4,64,399] r, bool[1,1,1,200] hide)"
        f" => ({FRAMES} y)"
    )
    return Case("SDPA, relative scores, masked twice (Conformer)", io, body, held)


def _segmentation() -> Case:
    body = (
        "t = Transpose<perm=[0,2,1]>(k) a = MatMul(q, t) g = Reshape(a, grid) d = Add(g, down) b = Add(d, over)"
        " z = Reshape(b, flat) p = Softmax(z) y = MatMul(p, v)"
    )
    rows = "float[12,196,64]"
    io = (
        f"({rows} q, {rows} k, {rows} v, float[12,14,14,14,1] down, float[12,14,14,1,14] over)"
        f" => ({rows} y)"
    )
    held = "int64[5] grid = {12, 14, 14, 14, 14}, int64[3] flat = {12, 196, 196}"
    return Case("SDPA, biases of rows and columns (SAM)", io, body, held)
