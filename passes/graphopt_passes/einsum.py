"""Einsum where it is a Transpose or a MatMul, with views and Transposes where it needs some."""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Sequence

import onnx_ir as ir

from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim, product
from graphopt.rewrite import Match, Op, Skip, Var, exact, rule

a, b = Var(), Var()
alone = Op("Einsum", a)
pair = Op("Einsum", a, b)


def without_ellipsis(text: str, ranks: Sequence[int]) -> str:
    """The equation with labels of their own for the axes that `...` stands for; aligned at the end, as they broadcast.

    Source: ONNX Einsum-12.
    """
    text = text.replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    free = [c for c in string.ascii_uppercase + string.ascii_lowercase if c not in text]
    counts = [
        rank - len(term.replace("...", "")) if "..." in term else 0
        for term, rank in zip(terms, ranks, strict=False)
    ]
    most = max(counts, default=0)
    if most == 0 and "..." not in right:
        return text.replace("...", "") if arrow else text
    if not arrow or min(counts) < 0 or most > len(free):
        return text
    pool = "".join(free[:most])
    named = [t.replace("...", pool[most - n :]) for t, n in zip(terms, counts, strict=False)]
    return ",".join(named) + arrow + right.replace("...", pool)


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
    """`Einsum("ij->ji", x)`, `Einsum("...ij->...ji", x)` -> `Transpose(x)`.  Source: ONNX Einsum-12."""
    found = read_equation(without_ellipsis(m.attr(alone, "equation"), [len(m.known_dims(a))]))
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
    found = _terms(m)
    how = None if found is None else find_product(*found)
    if found is None or how is None:
        return None
    left, right, _ = found
    dims = m.known_dims(a)[left.index(how.contracted)]
    if dims != m.known_dims(b)[right.index(how.contracted)]:
        raise Skip(f"the dims of {how.contracted!r} may differ", m[b])
    operands = [(m[a], len(left)), (m[b], len(right))]
    (first, rank1), (second, rank2) = operands[::-1] if how.swapped else operands
    return g.op(
        "MatMul",
        _flipped(g, first, rank1, flip=how.flip_left),
        _flipped(g, second, rank2, flip=how.flip_right),
    )


def _terms(m: Match) -> tuple[str, str, str] | None:
    """The labels of both operands and of the result.

    Raises:
        Skip: the operands are bfloat16.  ONNX Runtime 1.32 has a CPU kernel of Einsum for it and none of MatMul.
    """
    if m.dtype(a) is ir.DataType.BFLOAT16:
        raise Skip("not every runtime multiplies matrices of bfloat16", m[a])
    ranks = [len(m.known_dims(each)) for each in (a, b)]
    found = read_equation(without_ellipsis(m.attr(pair, "equation"), ranks))
    if found is None or [len(term) for term in found[0]] != ranks:
        return None
    left, right = found[0]
    return left, right, found[1]


@dataclasses.dataclass(frozen=True)
class Contraction:
    """The roles of labels in a product of matrices for each of a batch, each in the order of the result.

    Attributes:
        batch: in both operands and the result.
        rows: in the first operand and the result.
        summed: in both operands alone, in the order of the first.
        columns: in the second operand and the result.
    """

    batch: str
    rows: str
    summed: str
    columns: str


def read_contraction(left: str, right: str, result: str) -> Contraction | None:
    """The roles of the labels; None where one is summed within an operand, or no matrices are multiplied."""
    batch = "".join(c for c in result if c in left and c in right)
    rows = "".join(c for c in result if c not in right)
    summed = "".join(c for c in left if c in right and c not in result)
    columns = "".join(c for c in result if c not in left)
    whole = len(left) == len(batch + rows + summed) and len(right) == len(batch + summed + columns)
    return (
        Contraction(batch, rows, summed, columns) if whole and rows and summed and columns else None
    )


@rule(pair)
def contract_instead_of_einsum(m: Match, g: Builder) -> ir.Value | None:
    """`Einsum("bqhd,bkhd->bhqk", q, k)` -> `MatMul(Transpose(q), Transpose(k))`, `"bsd,dhk->bshk"` with Reshapes.

    Any contraction of two operands: batch, rows and columns are brought in order, several labels of one role into one
    axis.  ONNX Runtime 1.31 CPU: 1.1-3.9x, as its Einsum moves the same elements more slowly and packs no constant.
    Source: ONNX Einsum-12, MatMul-1.
    """
    found = _terms(m)
    if found is None:
        return None
    left, right, result = found
    swapped = result[-1:] in left and result[-1:] not in right
    first, second = (right, left) if swapped else (left, right)
    roles = read_contraction(first, second, result)
    if roles is None:
        return None
    sizes = _sizes(m, left, right)
    one, other = (m[b], m[a]) if swapped else (m[a], m[b])
    apart = [*roles.batch, roles.rows] if roles.batch else [*roles.rows]
    made = g.op(
        "MatMul",
        _arranged(g, one, first, [*apart, roles.summed], sizes),
        _arranged(g, other, second, [*roles.batch, roles.summed, roles.columns], sizes),
    )
    order = roles.batch + roles.rows + roles.columns
    if len(apart) + 1 != len(order):
        merged = roles.batch and len(roles.rows) > 1
        kept = len(roles.batch) if merged else len(apart)
        made = g.op("Reshape", made, g.ints(_view([*order], sizes, kept=kept)))
    return _turned(g, made, order, result)


def _sizes(m: Match, left: str, right: str) -> dict[str, Dim]:
    """The size of each label.

    Raises:
        Skip: a label may have another size in the other operand, or there is nothing to multiply.
    """
    sizes = dict(zip(left, m.known_dims(a), strict=True))
    for label, dim in zip(right, m.known_dims(b), strict=True):
        if sizes.setdefault(label, dim) != dim:
            raise Skip(f"the dims of {label!r} may differ", m[b])
    if any(dim == 0 for dim in sizes.values()):
        raise Skip("an operand is empty", m[b])
    return sizes


def _arranged(
    g: Builder, value: ir.Value, term: str, groups: Sequence[str], sizes: dict[str, Dim]
) -> ir.Value:
    """An operand with an axis for each group of labels, in that order."""
    value = _turned(g, value, term, "".join(groups))
    if all(len(group) == 1 for group in groups):
        return value
    kept = next(i for i, group in enumerate(groups) if len(group) != 1)
    return g.op("Reshape", value, g.ints(_view(groups, sizes, kept=kept)))


def _view(groups: Sequence[str], sizes: dict[str, Dim], *, kept: int) -> list[int]:
    """The shape with an axis for each group, of which the first `kept` axes stay as they are.

    Raises:
        Skip: more than one size is unknown.
    """
    known = [product(sizes[label] for label in group).value for group in groups[kept:]]
    if known.count(None) > 1:
        raise Skip("more than one size is unknown")
    return [0] * kept + [-1 if size is None else size for size in known]


def _turned(g: Builder, value: ir.Value, term: str, order: str) -> ir.Value:
    return value if term == order else g.op("Transpose", value, perm=[term.index(c) for c in order])


RULES = (transpose_instead_of_einsum, multiply_instead_of_einsum, contract_instead_of_einsum)
