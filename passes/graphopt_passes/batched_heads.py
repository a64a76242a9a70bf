"""Heads that count as rows of the batch while scores are computed, taken out of it, so that attention is seen.

    Before:  s = Reshape(MatMul(Reshape(q, [B H, S, D]), Reshape(kT, [B H, D, L])), [B, H, S, L])
             y = MatMul(Reshape(p, [B H, S, L]), Reshape(v, [B H, L, E]))
    After:   s = MatMul(q, kT), y = Reshape(MatMul(p, v), [B H, S, E])

As `bmm` and `baddbmm` need three axes, and masks four (BLOOM, OPT, XGLM).  The views were there already: none is added
but where one leaves.  Before `lift-opset`, which sees the attention that they make.  Changes numerics: exact.
"""

from __future__ import annotations

import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim
from graphopt.rewrite import Either, Match, Op, Rule, Skip, Var, exact
from graphopt_passes.constants import live_uses

OPSETS = (13, 10_000)
"""Opsets whose Squeeze takes its axes as input."""

FLIPPED, TURNED = (0, 2, 1), (0, 1, 3, 2)
"""The last two axes changed, of three and of four."""

q, k_t, factor, bias = Var(), Var(), Var(const=True), Var()
product = Op("MatMul", q, k_t)
scaled = Op("Mul|Div", product, factor)
biased = Op("Add", Either(scaled, product), bias)
parted = Op("Reshape", Either(biased, scaled, product), ...)


@exact(parted, opset=OPSETS)
def part_scores_of_heads(m: Match, g: Builder) -> ir.Value | None:
    """`Reshape(q kT * c + b, [B, H, S, L])` -> `q kT * c + b` of four axes, q and k views of [B, H, ., D].

    q: [B H, S, D], kT: [B H, D, L], c: a number, b: [B H, 1 or S, L].  Source: MatMul-13, Reshape-13.
    """
    dims, merged = m.dims(parted), m.dims(product)
    if dims is None or merged is None or len(dims) != 4 or dims[2:] != merged[1:]:
        return None
    heads = (dims[0], dims[1])
    sides = [_apart(m, g, m[side], heads) for side in (q, k_t)]
    if sides[0] is None or sides[1] is None:
        return None
    made = g.op("MatMul", *sides)
    if m.has(scaled):
        made = _scaled(m, g, made)
    return g.op("Add", made, _part_bias(m, g, heads)) if m.has(biased) else made


def _scaled(m: Match, g: Builder, made: ir.Value) -> ir.Value:
    """Scores times a number.

    Raises:
        Skip: the factor is none.
    """
    if m.known_dims(factor) not in ((), (Dim.of(1),)) or m[scaled].inputs[0] is not m.out(product):
        raise Skip("the scores are not multiplied by a number", m[factor])
    return g.op(m[scaled].op_type, made, m[factor])


def _part_bias(m: Match, g: Builder, heads: tuple[Dim, Dim]) -> ir.Value:
    """What is added to scores [B H, S, L], as [B, H, ., L].

    Raises:
        Skip: it is not of every row of the batch, or the number of heads is unknown.
    """
    own = m.known_dims(bias)
    if len(own) != 3 or own[0] != heads[0] * heads[1] or heads[1].value is None:
        raise Skip("what is added is not of every head", m[bias])
    return g.op(
        "Reshape", g.op("Unsqueeze", m[bias], g.ints([0])), g.ints([-1, heads[1].value, 0, 0])
    )


def _apart(
    m: Match, g: Builder, value: ir.Value, heads: tuple[Dim, Dim], *, flipped: bool = False
) -> ir.Value | None:
    """[B, H, R, C] of which a value [B H, R, C] is a view, perhaps with R and C changed; None where it is none."""
    node = value.producer()
    source = None if node is None or node.domain or not node.inputs else node.inputs[0]
    if node is None or source is None:
        return None
    if node.op_type == "Transpose" and tuple(m.attr(node, "perm", ())) == FLIPPED and not flipped:
        inner = _apart(m, g, source, heads, flipped=True)
        return None if inner is None else g.op("Transpose", inner, perm=TURNED)
    dims, own = m.dims(source), m.dims(value)
    if node.op_type != "Reshape" or dims is None or own is None or len(dims) != 4:
        return None
    return source if dims == (*heads, *own[1:]) else None


x = Var()
merged_scores = Op("Reshape", x, ...)
softmax = Op("Softmax", Either(Op("Cast", merged_scores), merged_scores))


@exact(softmax, opset=OPSETS)
def weigh_heads_apart(m: Match, g: Builder) -> ir.Value | None:
    """`Softmax(Reshape(s, [B H, S, L]))` -> `Reshape(Softmax(s), [B H, S, L])`, s: [B, H, S, L].

    Where a product follows, from which `attend_with_heads_apart` moves it on.  Source: Softmax-13.
    """
    if not _merges_heads(m, x, merged_scores) or int(m.attr(softmax, "axis", -1)) not in (-1, 2):
        return None
    users = live_uses(m.out(softmax))
    if not users or not all(user.op_type in ("MatMul", "Cast") for user in users):
        return None
    inner = m[softmax].inputs[0]
    cast = None if inner is None else inner.producer()
    held = g.op("Cast", m[x], like=cast) if cast is not None and cast.op_type == "Cast" else m[x]
    return _merged(g, g.op("Softmax", held, axis=-1))


weights, v = Var(), Var()
reshaped = Op("Reshape", weights, ...)
squeezed = Op("Squeeze", reshaped, ...)
merged_weights = Either(squeezed, reshaped)
lowered = Op("Cast", merged_weights)
attended = Op("MatMul", Either(lowered, merged_weights), v)


@exact(attended, opset=OPSETS)
def attend_with_heads_apart(m: Match, g: Builder) -> ir.Value | None:
    """`MatMul(Reshape(p, [B H, S, L]), v)` -> `Reshape(MatMul(p, v), [B H, S, E])`, v a view of [B, H, L, E].

    p: [B, H, S, L].  Source: MatMul-13.
    """
    maker = m[weights].producer()
    if maker is None or maker.op_type not in ("Softmax", "Cast", "Where"):
        return None
    if not _merges_heads(m, weights, squeezed if m.has(squeezed) else reshaped):
        return None
    dims = m.known_dims(weights)
    values_apart = _apart(m, g, m[v], (dims[0], dims[1]))
    if values_apart is None:
        return None
    held = g.op("Cast", m[weights], like=m[lowered]) if m.has(lowered) else m[weights]
    return _merged(g, g.op("MatMul", held, values_apart))


def _merges_heads(m: Match, whole: Var, view: Op) -> bool:
    """Whether a view makes [B H, S, L] of [B, H, S, L], and the target may have attention."""
    dims, own = m.dims(whole), m.dims(view)
    if dims is None or own is None or len(dims) != 4 or own != (dims[0] * dims[1], *dims[2:]):
        return False
    target = m.facts.target
    return target.emits("Attention", opset=target.opset[1], dtype=m.dtype(whole))


def _merged(g: Builder, value: ir.Value) -> ir.Value:
    """[B, H, S, L] as [B H, S, L]."""
    return g.op("Squeeze", g.op("Reshape", value, g.ints([1, -1, 0, 0])), g.ints([0]))


RULES: tuple[Rule, ...] = (part_scores_of_heads, weigh_heads_apart, attend_with_heads_apart)
