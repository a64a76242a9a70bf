"""GroupNormalization as the instance normalisation that it is, where the target would compute it in its parts.

    Before:  y = GroupNormalization<num_groups = G>(x, scale, bias)
    After:   y = Reshape(InstanceNormalization(Reshape(x, [0, G, -1]), 1, 0), Shape(x)) * scale + bias

ONNX Runtime has no kernel for GroupNormalization: it expands the operator into 29 nodes.  Changes numerics: reordered.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule

x, scale, bias = Var(), Var(), Var()
grouped = Op("GroupNormalization", x, scale, bias)


@rule(grouped, opset=(21, 10_000))
def lower_group_norm(m: Match, g: Builder) -> ir.Value | None:
    """`GroupNormalization(x, s, b)` -> `InstanceNormalization` over [N, G, -1], and `* s + b`.

    x: [N, C, …], s, b: [C].  Source: GroupNormalization-21 (18, with numbers per group, is deprecated),
    InstanceNormalization-6.
    """
    dtype, groups = m.dtype(x), int(m.attr(grouped, "num_groups"))
    if not m.emits("InstanceNormalization", dtype=dtype, form="groups"):
        return None
    dims = m.known_dims(x)
    if dtype != ir.DataType.FLOAT or m.attr(grouped, "stash_type", 1) != 1:
        raise Skip("its statistics are kept in another type than x", m[x])
    ones, zeros = (g.const(np.full(groups, number, np.float32), name="group") for number in (1, 0))
    flat = g.op("Reshape", m[x], g.ints([0, groups, -1]))
    epsilon = float(m.attr(grouped, "epsilon", 1e-5))
    normal = g.op("InstanceNormalization", flat, ones, zeros, epsilon=epsilon)
    back = g.op("Reshape", normal, _shape(m, g, dims))
    axes = g.ints(range(1, len(dims) - 1))
    weight, shift = (g.op("Unsqueeze", m[v], axes) for v in (scale, bias))
    return g.op("Add", g.op("Mul", back, weight), shift)


def _shape(m: Match, g: Builder, dims: tuple[Dim, ...]) -> ir.Value:
    if all(d.is_static for d in dims):
        return g.ints([int(d) for d in dims])
    return g.op("Shape", m[x])


RULES: tuple[Rule, ...] = (lower_group_norm,)
