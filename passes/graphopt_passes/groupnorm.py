"""GroupNormalization as the instance normalisation that it is, where the target computes it in its parts; else itself.

    Before:  y = GroupNormalization<num_groups = G>(x, scale, bias)
    After:   y = Reshape(InstanceNormalization(Reshape(x, [0, G, -1]), 1, 0), Shape(x)) * scale + bias

ONNX Runtime has no kernel for GroupNormalization: it expands the operator into 29 nodes; on CUDA, it has none for
InstanceNormalization of opset 22 and later.  Changes numerics: reordered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Match, Op, Rule, Skip, Var, rule
from graphopt_passes.constants import along, narrow
from graphopt_passes.means import filled, scale_of_ones

x, scale, bias = Var(), Var(), Var()
grouped = Op("GroupNormalization", x, scale, bias)


@rule(grouped, opset=(21, 10_000))
def lower_group_norm(m: Match, g: Builder) -> ir.Value | None:
    """`GroupNormalization(x, s, b)` -> a normalisation of [N, G, -1], and `* s + b`.

    x: [N, C, …], s, b: [C].  An instance normalisation, or, where the target has that for older opsets alone, a layer
    normalisation.  Source: GroupNormalization-21 (18, with numbers per group, is deprecated),
    InstanceNormalization-6, LayerNormalization-17.
    """
    kind = _kind(m)
    if kind is None:
        return None
    dims = m.known_dims(x)
    if m.attr(grouped, "stash_type", 1) != 1:
        raise Skip("its statistics are kept in another type than float32", m[x])
    back = g.op("Reshape", _normal_groups(m, g, kind, dims), _shape(m, g, dims))
    return _affine(m, g, back, len(dims))


single = Op("InstanceNormalization", x, scale, bias)


@rule(single, opset=(22, 10_000))
def lower_instance_norm(m: Match, g: Builder) -> ir.Value | None:
    """`InstanceNormalization(x, s, b)` -> `LayerNormalization` over all behind the channels, and `* s + b`.

    x: [N, C, …], s, b: [C].  Where the target has the one for older opsets alone.
    Source: InstanceNormalization-22, LayerNormalization-17.
    """
    dtype = m.dtype(x)
    if m.emits("InstanceNormalization", dtype=dtype) or _kind(m) != "LayerNormalization":
        return None
    dims, epsilon = m.known_dims(x), float(m.attr(single, "epsilon", 1e-5))
    ones = _ones(g, dtype, [each.value for each in dims[2:]], m[x])
    normal = g.op("LayerNormalization", m[x], ones, axis=2, epsilon=epsilon)
    return _affine(m, g, normal, len(dims))


def _kind(m: Match) -> str | None:
    """The normalisation that the target takes groups to."""
    kinds = ("InstanceNormalization", "LayerNormalization")
    return next((each for each in kinds if m.emits(each, dtype=m.dtype(x), form="groups")), None)


def _normal_groups(m: Match, g: Builder, kind: str, dims: tuple[Dim, ...]) -> ir.Value:
    """The normalisation of [N, G, K] over K, without scale."""
    dtype, groups = m.dtype(x), int(m.attr(grouped, "num_groups"))
    epsilon = float(m.attr(grouped, "epsilon", 1e-5))
    flat = g.op("Reshape", m[x], g.ints([0, groups, -1]))
    if kind == "InstanceNormalization":
        ones = filled(g, 1.0, dtype, [Dim.of(groups)], m[x])
        zeros = filled(g, 0.0, dtype, [Dim.of(groups)], m[x])
        return g.op(kind, flat, ones, zeros, epsilon=epsilon)
    known = all(each.is_static for each in dims[1:])
    size = math.prod(int(each) for each in dims[1:]) // groups if known else None
    ones = _ones(g, dtype, [size], flat)
    return g.op(kind, flat, ones, axis=-1, epsilon=epsilon)


def _ones(
    g: Builder, dtype: ir.DataType | None, sizes: Sequence[int | None], normalised: ir.Value
) -> ir.Value:
    """The scale of a layer normalisation over all behind the second axis that leaves it as it is, written out.

    Raises:
        Skip: it is empty, or of no known type.
    """
    known = [size for size in sizes if size is not None]
    if dtype is None or len(known) == len(sizes):
        return scale_of_ones(g, dtype, [Dim.of(size) for size in known], normalised)
    one = g.const(np.ones([1] * len(sizes), dtype.numpy()), name="scale")
    return g.op("Expand", one, g.op("Shape", normalised, start=2))


def _affine(m: Match, g: Builder, normal: ir.Value, rank: int) -> ir.Value:
    axes = g.ints(range(1, rank - 1))
    weight, shift = (g.op("Unsqueeze", m[v], axes) for v in (scale, bias))
    return g.op("Add", g.op("Mul", normal, weight), shift)


def _shape(m: Match, g: Builder, dims: tuple[Dim, ...]) -> ir.Value:
    if all(d.is_static for d in dims):
        return g.ints([int(d) for d in dims])
    return g.op("Shape", m[x])


plain_scale, plain_shift = Var(const=True), Var(const=True, optional=True)
parted = Op("Reshape", x, ...)
normal = Op("InstanceNormalization|LayerNormalization", parted, plain_scale, plain_shift)
restored = Op("Reshape", normal, ...)
factor, addend = Var(const=True), Var(const=True)
shifted = Op("Add", Op("Mul", restored, factor), addend)


@rule(shifted, opset=(21, 10_000))
def fuse_group_norm(m: Match, g: Builder) -> ir.Value | None:
    """`Reshape(Norm(Reshape(x, [N, G, -1]))) * s + b` -> `GroupNormalization(x, s, b, num_groups=G)`.

    x: [N, C, …], s, b: one number per channel; Norm an instance or layer normalisation without scale of its own.
    Source: GroupNormalization-21.
    """
    dims, inner = m.known_dims(x), m.known_dims(parted)
    if len(dims) < 3 or len(inner) < 3 or inner[0] != dims[0] or m.dims(restored) != dims:
        return None
    channels, groups = dims[1].value, inner[1].value
    if not channels or not groups or channels % groups or not _is_bare(m, len(inner)):
        return None
    if not m.emits("GroupNormalization", dtype=m.dtype(x)):
        return None
    held = [along(m.array(each), len(dims), 1, channels) for each in (factor, addend)]
    if held[0] is None or held[1] is None:
        raise Skip("scale or bias are not one number per channel", m[shifted])
    numbers = [g.const(narrow(each, m.dtype(x), m[factor])) for each in held if each is not None]
    epsilon = float(m.attr(normal, "epsilon", 1e-5))
    return g.op("GroupNormalization", m[x], *numbers, num_groups=groups, epsilon=epsilon)


def _is_bare(m: Match, rank: int) -> bool:
    """Whether the inner normalisation is over everything behind the groups, and neither scales nor shifts."""
    shift = m.get(plain_shift)
    plain = values.is_filled_with(m[plain_scale], 1.0)
    plain = plain and (shift is None or values.is_filled_with(shift, 0.0))
    if m[normal].op_type == "InstanceNormalization":
        return plain
    return plain and int(m.attr(normal, "axis", -1)) % rank == 2 and len(m[normal].outputs) == 1


RULES: tuple[Rule, ...] = (lower_group_norm, lower_instance_norm, fuse_group_norm)
