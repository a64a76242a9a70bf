"""Attention whose axes are not those of the operator: the sequence last, or windows beside the batch.

    Before:  y = MatMul(v, Transpose(p))                       v: [B, H, E, L], p: [B, H, S, L]
    After:   y = Transpose(MatMul(p, Transpose(v)))

    Before:  y = Softmax(q kT) v                               q, k, v: [B, W, H, S, D]
    After:   y = Reshape(Softmax(q' k'T) v', [B, W, H, S, D])  q', k', v': [B W, H, S, D]

Before `lift-opset`, which sees the attention that they make.  Changes numerics: reordered.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Either, Lit, Match, Op, Rule, Skip, Var, exact, rule

OPSETS = (13, 10_000)
"""Opsets whose Softmax is over one axis."""

WEIGHTS_TAKEN = ("Softmax", "Where", "Cast")
"""What makes the weights of attention: the guard and a cast come after the Softmax."""

v, weights = Var(computed=True), Var(computed=True)
turned = Op("Transpose", weights)
columns = Op("MatMul", v, turned)


@rule(columns, opset=OPSETS)
def weigh_rows_instead_of_columns(m: Match, g: Builder) -> ir.Value | None:
    """`v pT` -> `(p vT)T`, p the weights of attention: as attention over the pixels of an image is spelled.

    v: [B, H, E, L] or [B, E, L], p: [..., S, L].  Values and results are transposed then, not the weights, which are
    more.  Source: MatMul-13, Transpose-13.
    """
    dims, given = m.dims(weights), m.dims(v)
    if dims is None or given is None or len(dims) not in (3, 4) or len(given) != len(dims):
        return None
    swap = (*range(len(dims) - 2), len(dims) - 1, len(dims) - 2)
    maker = _softmax_of(m[weights])
    if tuple(m.attr(turned, "perm", ())) != swap or maker is None:
        return None
    if int(m.attr(maker, "axis", -1)) not in (-1, len(dims) - 1):
        return None
    if not _may_be_attention(m, "sequence-last"):
        _refuse_where_it_is_slower(m, columns, "whose sequence is last")
        return None
    rows = g.op("Transpose", m[v], perm=swap)
    return g.op("Transpose", g.op("MatMul", m[weights], rows), perm=swap)


def _softmax_of(value: ir.Value) -> ir.Node | None:
    """The Softmax that made weights, behind a guard or a cast; None where none did."""
    node = value.producer()
    while node is not None and not node.domain and node.op_type in WEIGHTS_TAKEN:
        if node.op_type == "Softmax":
            return node
        source = node.inputs[-1]
        node = None if source is None else source.producer()
    return None


def _refuse_where_it_is_slower(m: Match, root: Op, kind: str) -> None:
    """Says why, on a target with Attention for which this kind of it does not pay.

    Raises:
        Skip: it is such a target.
    """
    if _may_be_attention(m, ""):
        raise Skip(f"the target gains nothing by attention {kind}", m[root])


def _may_be_attention(m: Match, form: str) -> bool:
    """Whether the target has such attention, if need be at a newer opset."""
    target = m.facts.target
    dtype = m.dtype(weights if weights in m.env else q)
    return target.emits("Attention", opset=target.opset[1], dtype=dtype, form=form)


q, k_t, values_of, scale = Var(), Var(), Var(), Var(const=True)
products = Op("MatMul", q, k_t)
scaled = Op("Mul|Div", products, scale)
softmax = Op("Softmax", Either(scaled, products))
guard = Op("Where", Op("IsNaN", softmax), Lit(0.0), softmax)
attended = Op("MatMul", Either(guard, softmax), values_of)


@exact(attended, opset=OPSETS)
def attend_with_windows_in_batch(m: Match, g: Builder) -> ir.Value | None:
    """`Softmax(q kT * c) v` of [B, W, H, S, D] -> the same of [B W, H, S, D], between views.

    As Hiera, Twins and NesT attend within windows.  The operator takes four axes.  Source: MatMul-13, Reshape-13.
    """
    sides = [m.dims(each) for each in (q, k_t, values_of)]
    if any(each is None or len(each) != 5 for each in sides):
        return None
    if not _may_be_attention(m, "windows"):
        _refuse_where_it_is_slower(m, attended, "within windows")
        return None
    dims, keys, held = (each for each in sides if each is not None)
    if m.has(scaled) and values.scalar(m[scale]) is None:
        raise Skip("the scale is not one number", m[scale])
    if int(m.attr(softmax, "axis", -1)) not in (-1, 4) or not dims[:2] == keys[:2] == held[:2]:
        return None
    lead = [dim.value for dim in dims[:2]]
    if None in (dim.value for each in sides for dim in (each or ())[2:]) or None in lead[1:]:
        raise Skip("the sizes of the windows are unknown", m[attended])
    made = g.op("MatMul", _joined(g, m[q], dims), _joined_keys(m, g, m[k_t], keys))
    if m.has(scaled):
        made = g.op(m[scaled].op_type, made, m[scale])
    made = g.op("Softmax", made, axis=-1)
    if m.has(guard):
        nothing = m[guard].inputs[1]
        made = g.op("Where", g.op("IsNaN", made), nothing, made)
    made = g.op("MatMul", made, _joined(g, m[values_of], held))
    first = -1 if lead[0] is None else lead[0]
    rest = (lead[1], dims[2].value, dims[3].value, held[4].value)
    return g.op("Reshape", made, g.ints([first, *(int(size or 0) for size in rest)]))


def _joined(g: Builder, value: ir.Value, dims: tuple[Dim, ...]) -> ir.Value:
    """[B, W, H, S, D] as [B W, H, S, D]; a scale of one number stays behind the view, where attention reads it."""
    node, inner = _scaled_from(value)
    if node is not None and inner is not None:
        return g.op(node.op_type, _joined(g, inner, dims), node.inputs[1])
    return g.op("Reshape", value, g.ints([-1, *(int(dim) for dim in dims[2:])]))


def _joined_keys(m: Match, g: Builder, value: ir.Value, dims: tuple[Dim, ...]) -> ir.Value:
    """The transposed keys of windows in the batch, transposed behind the view where they were at all."""
    scaling, inner = _scaled_from(value)
    if scaling is not None and inner is not None:
        return g.op(scaling.op_type, _joined_keys(m, g, inner, dims), scaling.inputs[1])
    node = value.producer()
    source = None if node is None or node.op_type != "Transpose" else node.inputs[0]
    perm = () if node is None else tuple(m.attr(node, "perm", ()))
    if source is None or len(perm) != 5 or perm[4] == 4:
        return _joined(g, value, dims)
    upright = (*perm[:3], perm[4], perm[3])
    stored = g.op("Transpose", source, perm=upright) if upright != (0, 1, 2, 3, 4) else source
    flat = _joined(g, stored, (*dims[:3], dims[4], dims[3]))
    return g.op("Transpose", flat, perm=(0, 1, 3, 2))


def _scaled_from(value: ir.Value) -> tuple[ir.Node | None, ir.Value | None]:
    """The node that multiplies or divides by one constant number, and what it does so to."""
    node = value.producer()
    if node is None or node.domain or node.op_type not in ("Mul", "Div"):
        return None, None
    return (node, node.inputs[0]) if values.scalar(node.inputs[1]) is not None else (None, None)


RULES: tuple[Rule, ...] = (weigh_rows_instead_of_columns, attend_with_windows_in_batch)
