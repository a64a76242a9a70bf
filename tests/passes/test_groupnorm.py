"""GroupNormalization as instance normalisation."""

from __future__ import annotations

import pytest
from graphopt_passes import groupnorm

from tests.rewriting import check


def _check(before: str, after: str | None = None, **options: object) -> None:
    check(groupnorm.RULES, before, after, tolerance=1e-5, **options)  # type: ignore[arg-type]


def test_per_channel_scale() -> None:
    _check(
        "g (float[2,4,3,5] x) => (float[2,4,3,5] y) <float[4] s, float[4] b>"
        " { y = GroupNormalization<num_groups=2, epsilon=0.001>(x, s, b) }",
        "g (float[2,4,3,5] x) => (float[2,4,3,5] y) <float[4] s, float[4] b, int64[3] f = {0, 2, -1},"
        " int64[4] d = {2, 4, 3, 5}, float[2] o, float[2] z, int64[2] a = {1, 2}> {"
        " r = Reshape(x, f) n = InstanceNormalization<epsilon=0.001>(r, o, z) t = Reshape(n, d)"
        " w = Unsqueeze(s, a) v = Unsqueeze(b, a) m = Mul(t, w) y = Add(m, v) }",
        opset=21,
    )


def test_unknown_sizes_and_computed_scale() -> None:
    _check(
        "g (float[N,4,W] x, float[4] s, float[4] b) => (float[N,4,W] y)"
        " { y = GroupNormalization<num_groups=2>(x, s, b) }",
        "g (float[N,4,W] x, float[4] s, float[4] b) => (float[N,4,W] y) <int64[3] f = {0, 2, -1},"
        " float[2] o, float[2] z, int64[1] a = {1}> {"
        " r = Reshape(x, f) n = InstanceNormalization<epsilon=0.00001>(r, o, z) d = Shape(x) t = Reshape(n, d)"
        " w = Unsqueeze(s, a) v = Unsqueeze(b, a) m = Mul(t, w) y = Add(m, v) }",
        opset=21,
    )


@pytest.mark.parametrize("target", ["tensorrt", "portable"])
def test_targets_that_have_it_keep_it(target: str) -> None:
    _check(
        "g (float[2,4,3] x) => (float[2,4,3] y) <float[4] s, float[4] b>"
        " { y = GroupNormalization<num_groups=2>(x, s, b) }",
        opset=21,
        target=target,
    )


def test_statistics_in_another_type_stay() -> None:
    _check(
        "g (float[2,4,3] x) => (float[2,4,3] y) <float[4] s, float[4] b>"
        " { y = GroupNormalization<num_groups=2, stash_type=11>(x, s, b) }",
        opset=21,
        missed="another type",
    )


IMAGE = "g (float[N,4,3,5] x) => (float[N,4,3,5] y)"
GROUPS = "int64[3] part = {0, 2, -1}, int64[4] whole = {0, 4, 3, 5}, float[4,1,1] s, float[4,1,1] b"
NORMS = {
    "instance": (
        "n = InstanceNormalization<epsilon=0.01>(r, i, o)",
        "float[2] i = {1.0, 1.0}, float[2] o = {0.0, 0.0}",
    ),
    "layer": (
        "n = LayerNormalization<axis=-1, epsilon=0.01>(r, i)",
        "float[30] i = {" + ", ".join(["1.0"] * 30) + "}",
    ),
}


@pytest.mark.parametrize(("norm", "held"), NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("target", ["tensorrt", "portable"])
def test_group_norm_of_parts(norm: str, held: str, target: str) -> None:
    check(
        groupnorm.RULES,
        f"{IMAGE} <{GROUPS}, {held}> {{ r = Reshape(x, part) {norm} w = Reshape(n, whole) t = Mul(w, s)"
        " y = Add(t, b) }",
        f"{IMAGE} <float[4] s, float[4] b> {{ y = GroupNormalization<num_groups=2, epsilon=0.01>(x, s, b) }}",
        opset=21,
        target=target,
        tolerance=1e-5,
    )


@pytest.mark.parametrize(
    ("text", "new", "missed"),
    [
        ("{1.0, 1.0}", "{1.0, 2.0}", ""),  # a scale per group
        ("Mul(w, s)", "Mul(w, rows)", "per channel"),
        ("part = {0, 2, -1}", "part = {0, -1, 15}", ""),
    ],
)
def test_group_norm_of_other_parts_stays(text: str, new: str, missed: str) -> None:
    norm, held = NORMS["instance"]
    if "15" in new:
        held = held.replace("[2]", "[4]").replace("{1.0, 1.0}", "{1.0, 1.0, 1.0, 2.0}")
        held = held.replace("{0.0, 0.0}", "{0.0, 0.0, 0.0, 0.0}")
    before = (
        f"{IMAGE} <{GROUPS}, {held}, float[3,1] rows> {{ r = Reshape(x, part) {norm} w = Reshape(n, whole)"
        " t = Mul(w, s) y = Add(t, b) }"
    )
    check(groupnorm.RULES, before.replace(text, new), opset=21, target="tensorrt", missed=missed)


@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_groups_on_cuda_below_opset_22(dtype: str) -> None:
    """Its kernel of InstanceNormalization is of versions up to 21."""
    head = f"g ({dtype}[2,4,3] x, {dtype}[4] s, {dtype}[4] b) => ({dtype}[2,4,3] y)"
    check(
        groupnorm.RULES,
        f"{head} {{ y = GroupNormalization<num_groups=2>(x, s, b) }}",
        f"{head} <int64[3] f = {{0, 2, -1}}, int64[3] d = {{2, 4, 3}}, {dtype}[2] o, {dtype}[2] z, int64[1] a = {{1}}>"
        " { r = Reshape(x, f) n = InstanceNormalization<epsilon=0.00001>(r, o, z) t = Reshape(n, d)"
        " w = Unsqueeze(s, a) v = Unsqueeze(b, a) m = Mul(t, w) y = Add(m, v) }",
        opset=21,
        target="cuda",
        feeds=None if dtype == "float" else (),  # no kernel for halves on a CPU
        tolerance=1e-5,
    )


def test_groups_on_cuda_from_opset_22() -> None:
    head = "g (float[N,4,3] x, float[4] s, float[4] b) => (float[N,4,3] y)"
    check(
        groupnorm.RULES,
        f"{head} {{ y = GroupNormalization<num_groups=2>(x, s, b) }}",
        f"{head} <int64[3] f = {{0, 2, -1}}, float[6] o, int64[1] a = {{1}}> {{ r = Reshape(x, f)"
        " n = LayerNormalization<axis=-1, epsilon=0.00001>(r, o) d = Shape(x) t = Reshape(n, d)"
        " w = Unsqueeze(s, a) v = Unsqueeze(b, a) m = Mul(t, w) y = Add(m, v) }",
        opset=23,
        target="cuda",
        tolerance=1e-5,
    )


def test_groups_of_unknown_size_on_cuda_from_opset_22() -> None:
    """The scale is written out for as many numbers as there turn out to be."""
    head = "g (float[N,4,W] x, float[4] s, float[4] b) => (float[N,4,W] y)"
    check(
        groupnorm.RULES,
        f"{head} {{ y = GroupNormalization<num_groups=2>(x, s, b) }}",
        f"{head} <int64[3] f = {{0, 2, -1}}, float[1] one, int64[1] a = {{1}}> {{ r = Reshape(x, f)"
        " k = Shape<start=2>(r) o = Expand(one, k) n = LayerNormalization<axis=-1, epsilon=0.00001>(r, o)"
        " d = Shape(x) t = Reshape(n, d) w = Unsqueeze(s, a) v = Unsqueeze(b, a) m = Mul(t, w) y = Add(m, v) }",
        opset=23,
        target="cuda",
        tolerance=1e-5,
    )


def test_empty_images_stay() -> None:
    check(
        groupnorm.RULES,
        "g (float[1,4,0] x, float[4] s, float[4] b) => (float[1,4,0] y)"
        " { y = GroupNormalization<num_groups=2>(x, s, b) }",
        opset=23,
        target="cuda",
        feeds=(),
        missed="empty",
    )


SINGLE = "{ y = InstanceNormalization<epsilon=0.001>(x, s, b) }"


def test_instance_norm_on_cuda_from_opset_22() -> None:
    head = "g (float[N,4,3,5] x, float[4] s, float[4] b) => (float[N,4,3,5] y)"
    check(
        groupnorm.RULES,
        f"{head} {SINGLE}",
        f"{head} <float[3,5] o, int64[2] a = {{1, 2}}> {{ n = LayerNormalization<axis=2, epsilon=0.001>(x, o)"
        " w = Unsqueeze(s, a) v = Unsqueeze(b, a) m = Mul(n, w) y = Add(m, v) }",
        opset=23,
        target="cuda",
        tolerance=1e-5,
    )


def test_instance_norm_of_unknown_size_on_cuda_from_opset_22() -> None:
    head = "g (float[N,4,H,5] x, float[4] s, float[4] b) => (float[N,4,H,5] y)"
    check(
        groupnorm.RULES,
        f"{head} {SINGLE}",
        f"{head} <float[1,1] one, int64[2] a = {{1, 2}}> {{ k = Shape<start=2>(x) o = Expand(one, k)"
        " n = LayerNormalization<axis=2, epsilon=0.001>(x, o) w = Unsqueeze(s, a) v = Unsqueeze(b, a)"
        " m = Mul(n, w) y = Add(m, v) }",
        opset=23,
        target="cuda",
        tolerance=1e-5,
    )


@pytest.mark.parametrize(
    ("sizes", "opset", "target", "missed"),
    [
        ("N,4,0,5", 23, "cuda", "empty"),
        ("N,4,3,5", 21, "cuda", ""),
        ("N,4,3,5", 23, "cpu", ""),
        ("N,4,3,5", 23, "tensorrt", ""),
    ],
)
def test_instance_norm_stays(sizes: str, opset: int, target: str, missed: str) -> None:
    check(
        groupnorm.RULES,
        f"g (float[{sizes}] x, float[4] s, float[4] b) => (float[{sizes}] y) {SINGLE}",
        opset=opset,
        target=target,
        missed=missed,
    )
