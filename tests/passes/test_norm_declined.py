"""Normalisations that stay as they are: what is not known, and what the target lacks."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from graphopt_passes import norm

from graphopt.numerics import Numerics
from tests.rewriting import apply, check, compare, make_feeds, parse, run


def test_factor_beside_a_scale_of_unknown_size_stays() -> None:
    check(
        norm.RULES,
        "g (float[N,K] x, float[K] s) => (float[N,K] y) <float[1] f = {2.0}>"
        "{ n = LayerNormalization(x, s) y = Mul(n, f) }",
        None,
        missed="the size of the scale is unknown",
    )


def test_casts_stay_around_a_norm_that_the_target_lacks_in_half_precision() -> None:
    """ONNX Runtime's RMSNormalization on a CPU knows no bfloat16."""
    model = ir.from_proto(
        parse(
            "g (bfloat16[N,2] x) => (bfloat16[N,2] y) <float[2] s = {1.0, 1.0}>"
            "{ c = Cast<to=1>(x) n = RMSNormalization(c, s) y = Cast<to=16>(n) }",
            opset=23,
        )
    )
    ctx = apply(norm.RULES, model, target="cpu")
    assert not ctx.rewrites
    assert [r.reason for r in ctx.remarks] == ["the target has no RMSNormalization for BFLOAT16"]


def test_norm_of_nothing_stays() -> None:
    """The mean of nothing is NaN; the operator's kernel refuses an empty scale."""
    check(
        norm.RULES,
        "g (float[2,3,0] x) => (float[2,3,0] y) <float e = {1e-5}>"
        "{ m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) q = Mul(d, d) v = ReduceMean<axes=[-1]>(q)"
        " l = Add(v, e) s = Sqrt(l) y = Div(d, s) }",
        missed="the normalised axes are empty",
        opset=17,
    )


@pytest.mark.parametrize(
    "body",
    [
        # the variance as a difference of two means: nothing is left of it where the mean is large
        "m = ReduceMean<axes=[-1]>(x) d = Sub(x, m) q = Mul(x, x) s = ReduceMean<axes=[-1]>(q) k = Mul(m, m)"
        " v = Sub(s, k) l = Add(v, e) r = Sqrt(l) y = Div(d, r)",
        # epsilon beside the root, not under it: near zero, another function
        "q = Mul(x, x) s = ReduceMean<axes=[-1]>(q) r = Sqrt(s) l = Add(r, e) y = Div(x, l)",
        "r = ReduceL2<axes=[-1]>(x) s = Mul(r, h) l = Add(s, e) y = Div(x, l)",
        # a length that is limited from below: as F.normalize
        "r = ReduceL2<axes=[-1]>(x) l = Clip(r, e) y = Div(x, l)",
    ],
)
def test_other_functions_stay(body: str) -> None:
    check(
        norm.RULES,
        f"g (float[2,3,8] x) => (float[2,3,8] y) <float e = {{1e-5}}, float h = {{0.35355339}}> {{ {body} }}",
        opset=17,
    )


@pytest.mark.parametrize(
    ("opset", "kind"), [(20, "InstanceNormalization"), (23, "LayerNormalization")]
)
def test_norm_of_images_on_a_target_whose_kernel_is_old(opset: int, kind: str) -> None:
    """CUDA's kernel of InstanceNormalization serves no version from opset 22 on."""
    proto = parse(
        "g (float[N,3,4,5] x) => (float[N,3,4,5] y) <int64[2] a = {2, 3}, float e = {1e-5}, float[1,3,1,1] s>"
        "{ m = ReduceMean(x, a) d = Sub(x, m) q = Mul(d, d) v = ReduceMean(q, a) l = Add(v, e) r = Sqrt(l)"
        " n = Div(d, r) y = Mul(n, s) }",
        opset=opset,
    )
    model = ir.from_proto(proto)
    apply(norm.RULES, model, target="cuda")
    assert kind in [node.op_type for node in model.graph]
    feed = make_feeds(proto, 0)
    compare(run(proto, feed), run(ir.to_proto(model), feed), Numerics.REORDERED, 1e-5)
