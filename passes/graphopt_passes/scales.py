"""Scales of normalisations that are computed to be one number: as constants, which every rule of norms can read.

    Before:  y = RMSNormalization(x, ConstantOfShape<value=1>(Shape(x)))
    After:   y = RMSNormalization(x, [1, 1, …])

torch.export writes so the RMSNorm without weights at opset 23.  Changes numerics: reordered (ONNX Runtime 1.31 has
another kernel for scales that broadcast).
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule

x, shift = Var(), Var(optional=True)
filled = Op("ConstantOfShape", Var(), shared=True)
norm = Op("LayerNormalization|RMSNormalization", x, filled, shift)


@rule(norm, opset=(17, 10_000))
def name_constant_scale(m: Match, g: Builder) -> ir.Value | None:
    """`Norm(x, ConstantOfShape(s), b)` -> `Norm(x, c, b)`, c one number per element of the normalised axes.

    Also where s is the shape of all of x.  Source: LayerNormalization-17, RMSNormalization-23, ConstantOfShape-9.
    """
    node, dims, own = m[norm], m.known_dims(x), m.known_dims(filled)
    inner = dims[int(m.attr(node, "axis", -1)) % len(dims) :]
    if not all(d.is_static and d != 0 for d in inner):
        raise Skip("the size of the normalised axes is unknown", m[x])
    outside = zip(own[::-1], dims[::-1], strict=False)
    if len(node.outputs) > 1 or len(own) > len(dims) or any(a not in (1, b) for a, b in outside):
        return None
    tensor = m.attr(filled, "value", None)
    dtype = m.dtype(filled)
    if tensor is None or dtype is None:
        return None
    number = tensor.numpy().reshape(-1)[0]
    scale = g.const(np.full([int(d) for d in inner], number, dtype.numpy()), name="scale")
    return g.op(node.op_type, m[x], scale, m.get(shift), like=node)


RULES: tuple[Rule, ...] = (name_constant_scale,)
