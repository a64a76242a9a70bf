"""Sums taken into the operator that they feed: residual connections into norms, biases into GELU.

    Before:  a = Add(x, z)   y = LayerNormalization(a, s, b)
    After:   y = SkipLayerNormalization(x, z, s, b)

Where the sum goes on, as the stream of a pre-norm block does, it stays beside: nothing would be spared.  Only
where the target says that its kernels gain by it: on the CPU, ONNX Runtime loses.  Changes numerics: reordered.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule

MS = "com.microsoft"

x, z, scale, bias = Var(), Var(), Var(), Var(optional=True)
total = Op("Add", x, z)
layer_norm = Op("LayerNormalization", total, scale, bias)
rms_norm = Op("RMSNormalization", total, scale)


@rule(layer_norm, opset=(17, 10_000))
def fuse_skip_layer_norm(m: Match, g: Builder) -> ir.Value | None:
    """`LayerNormalization(x + z, s, b)` -> `SkipLayerNormalization(x, z, s, b)`, x and z [B, S, D].

    Source: com.microsoft SkipLayerNormalization-1.
    """
    return _skip(m, g, layer_norm, "SkipLayerNormalization", m.get(bias))


@rule(rms_norm, opset=(23, 10_000))
def fuse_skip_rms_norm(m: Match, g: Builder) -> ir.Value | None:
    """`RMSNormalization(x + z, s)` -> `SkipSimplifiedLayerNormalization(x, z, s)`, x and z [B, S, D].

    Source: com.microsoft SkipSimplifiedLayerNormalization-1.
    """
    return _skip(m, g, rms_norm, "SkipSimplifiedLayerNormalization", None)


def _skip(m: Match, g: Builder, norm: Op, op_type: str, shift: ir.Value | None) -> ir.Value | None:
    if not m.emits(op_type, MS, m.dtype(x)):
        return None
    dims, node = m.known_dims(total), m[norm]
    if len(dims) != 3 or m.dims(x) != dims or m.dims(z) != dims or len(m.known_dims(scale)) != 1:
        raise Skip("the operands are not both [B, S, D]", m[total])
    if int(m.attr(norm, "axis", -1)) not in (-1, 2) or len(node.outputs) > 1:
        raise Skip("it is not over the last axis alone, or its statistics are used", node)
    epsilon = float(m.attr(norm, "epsilon", 1e-5))
    return g.op(op_type, m[x], m[z], m[scale], shift, domain=MS, epsilon=epsilon)


addend = Var()
summed = Op("Add", x, addend)
standard_gelu = Op("Gelu", summed)
contrib_gelu = Op("Gelu", summed, domain=MS)


@rule(standard_gelu, opset=(20, 10_000))
def fuse_bias_gelu(m: Match, g: Builder) -> ir.Value | None:
    """`Gelu(x + b)` -> `BiasGelu(x, b)`, b [D] for x […, D], erf alone.  Source: com.microsoft BiasGelu-1."""
    if m.attr(standard_gelu, "approximate", "none") != "none":
        return None
    return _bias_gelu(m, g)


@rule(contrib_gelu)
def fuse_contrib_bias_gelu(m: Match, g: Builder) -> ir.Value | None:
    """`com.microsoft Gelu(x + b)` -> `BiasGelu(x, b)`, b [D] for x […, D].  Source: com.microsoft BiasGelu-1."""
    return _bias_gelu(m, g)


def _bias_gelu(m: Match, g: Builder) -> ir.Value | None:
    if not m.emits("BiasGelu", MS, m.dtype(x)):
        return None
    pairs = ((m[x], m[addend]), (m[addend], m[x]))
    for value, shift in pairs:
        dims, own = m.dims(value), m.dims(shift)
        if dims and own and len(own) == 1 and len(dims) > 1 and dims[-1] == own[0]:
            return g.op("BiasGelu", value, shift, domain=MS)
    return None


RULES: tuple[Rule, ...] = (
    fuse_skip_layer_norm,
    fuse_skip_rms_norm,
    fuse_bias_gelu,
    fuse_contrib_bias_gelu,
)
