"""Scaled dot-product attention: the guard against fully masked rows where no row can be, and the operator itself.

    Before:  p = Softmax(q kT * s + mask); y = Where(IsNaN(p), 0, p) v
    After:   y = p v, or y = Attention(q, k, v, mask, scale=s)

What a mask can hold decides: a row of -infinity makes Softmax return NaN, and ONNX Runtime's Attention return zeros,
also for a row of the lowest finite number, which Softmax spreads evenly.  Scores themselves are taken to be finite:
finite queries and keys of ordinary size.  Changes numerics: reordered.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim, is_cut_to
from graphopt.rewrite import Either, Lit, Match, Op, Rule, Skip, Var, rule
from graphopt_passes.bands import LOW, Band, visible
from graphopt_passes.constants import no_operator
from graphopt_passes.keys import (
    cast_below_views,
    first_with,
    shares,
    size_of,
    ungrouped,
    untransposed,
)
from graphopt_passes.masks import (
    HARMLESS,
    LIFTED,
    NEAR,
    SMALL,
    Hidden,
    Reach,
    apart,
    ends_in,
    lowest,
    narrowed,
    number_of,
    reach_of,
)

OPSETS = (7, 10_000)
"""Opsets of multidirectional broadcasting; before 13, Softmax over the last axis alone is the same."""

SMALL_MASK = 1 << 16
"""Elements of a constant mask that may be made of one for all queries."""


scores = Var()
softmax = Op("Softmax", scores)
guarded = Op("Where", Op("IsNaN", softmax), Lit(0.0), softmax)


@rule(guarded, opset=OPSETS)
def drop_guard_of_unmasked_rows(m: Match, g: Builder) -> ir.Value:
    """`Where(IsNaN(p), 0, p)` -> `p = Softmax(z)` where no row of z can be -infinity throughout.

    torch exports the guard with every scaled_dot_product_attention.  ONNX Runtime 1.31 CPU: 1.5x-1.9x on attention.
    A NaN in z comes out as NaN, no longer as 0.  Source: Softmax-13.
    """
    reach = reach_of(m[scores])
    if reach is None or reach.masked or reach.floor < lowest(m.dtype(scores)):
        raise Skip("a row may be masked throughout", m[scores])
    if m.dims(guarded) != m.dims(softmax):
        raise Skip("the zero broadens the result", m[guarded])
    return g.op("Softmax", m[scores], like=m[softmax])


q, k_t, v, mask = Var(), Var(), Var(), Var()
left_scale, right_scale, after_scale = Var(const=True), Var(const=True), Var(const=True)


left = Op("Mul|Div", q, left_scale)
right = Op("Mul|Div", k_t, right_scale)
products = Op("MatMul", Either(left, q), Either(right, k_t))
after = Op("Mul|Div", products, after_scale)
scaled_products = Either(after, products)
raised = Op("Cast", scaled_products)
score = Either(raised, scaled_products)
keep, drop, fill = Var(), Var(), Var(const=True)
kept = Op("Where", keep, score, fill)
dropped = Op("Where", drop, fill, score)
biased = Op("Add", score, mask)
raised_sum = Op("Cast", biased)
plain_weights = Op("Softmax", Either(raised_sum, biased, kept, dropped, score))
lowered = Op("Cast", plain_weights)
weights = Either(lowered, plain_weights)
guard = Op("Where", Op("IsNaN", weights), Lit(0.0), weights)
kept_alone = Op("Where", keep, weights, Lit(0.0))
dropped_again = Op("Where", drop, Lit(0.0), weights)
attention = Op("MatMul", Either(guard, kept_alone, dropped_again, weights), v)


@rule(attention, opset=OPSETS)
def fuse_attention(m: Match, g: Builder) -> ir.Value | None:
    """`Softmax(q kT * s + mask) v` -> `Attention(q, k, v, mask, scale=s)`; Where(cond, scores, low) likewise.

    q: [B, H, S, D], kT: [B, H, D, L], v: [B, H, L, E], mask: […, S, L], broadcasts to [B, H, S, L].  Without heads,
    [B, S, D], as one head.  With the guard, or where what is masked is zero behind the Softmax too (Conformer), rows
    masked throughout are zero in both; without it they are NaN before.  Source: Attention-23.
    """
    dims, dtype = [m.dims(value) for value in (q, k_t, v)], _type(m)
    ranks = {None if d is None else len(d) for d in dims}
    if ranks not in ({3}, {4}) or not _is_last_axis(m):
        return None
    if not _is_masked_alike(m):
        raise Skip("weights are made zero whose scores were not masked", m[attention])
    if any(dim == 0 for each in dims for dim in each or ()):
        raise Skip("there are no queries or no keys, which kernels refuse", m[attention])
    if not m.emits("Attention", dtype=dtype):
        raise Skip(no_operator(m, "Attention", dtype), m[q])
    scale = _scale(m)
    if scale is None:
        return None
    precision = _softmax_precision(m)
    hidden = _mask(m, g)
    if ranks == {3}:
        return _without_heads(m, g, hidden, scale, precision)
    key = untransposed(m, g, m[k_t], m[attention].graph)
    key, value = ungrouped(m, key, m[v])
    stored, served = m.known_dims(k_t)[:2], m.known_dims(q)[:2]
    heads = m.known_dims(value)[:2]
    if (value is m[v] and heads != stored) or not shares(served, heads):
        raise Skip("queries, keys and values differ in batch or heads", m[attention])
    if not m.emits("Attention", dtype=dtype, form="" if heads == served else "grouped"):
        raise Skip("the target gains nothing by Attention with shared keys", m[q])
    operands = _in_one_type(m, g, _queries(m, g), key, value)
    whole = g.op("Attention", *operands, hidden.mask, scale=scale, softmax_precision=precision)
    return hidden.zeroed(g, whole, _type(m))


def _type(m: Match) -> ir.DataType | None:
    """The type that attention is computed in.

    That of the queries; float32 where only scores are halves, as TorchScript writes a float32 mask beside them, and the
    target computes halves in float32 in any case.
    """
    own, wide = m.dtype(q), m.dtype(weights)
    if not m.has(raised) or own is None or wide != ir.DataType.FLOAT or m.dtype(v) != wide:
        return own
    return own if own.name in m.facts.target.floats.computes else wide


def _in_one_type(m: Match, g: Builder, *operands: ir.Value) -> tuple[ir.Value, ...]:
    """The operands in the type that attention is computed in."""
    dtype = _type(m)
    if dtype == m.dtype(q) or dtype is None:
        return operands
    return tuple(cast_below_views(g, each, dtype) for each in operands)


def _softmax_precision(m: Match) -> int | None:
    """In which type the softmax is computed, where it is not that of the scores.

    Raises:
        Skip: it is cast otherwise than up and down again.
    """
    if m.dtype(plain_weights) == _type(m):
        return None
    if m.dtype(plain_weights) != ir.DataType.FLOAT or m.dtype(weights) != m.dtype(q):
        raise Skip("the scores are cast to another type than float32 and back", m[q])
    if m.emits("Attention", dtype=m.dtype(q), form="always-in-float"):
        return None
    if not m.emits("Attention", dtype=m.dtype(q), form="softmax-in-float"):
        raise Skip("the target's Attention knows no softmax in float32 of halves", m[q])
    return int(ir.DataType.FLOAT)


def _without_heads(
    m: Match, g: Builder, hidden: Hidden, scale: float, precision: int | None
) -> ir.Value:
    """Attention of [B, S, D], [B, L, D] and [B, L, E]: one head each, side by side with none."""
    if len({m.known_dims(each)[0] for each in (q, k_t, v)}) > 1:
        raise Skip("queries, keys and values differ in batch", m[attention])
    maker, turn, stored = m[k_t].producer(), (0, 2, 1), None
    if maker is not None and maker.op_type == "Transpose" and m.attr(maker, "perm", ()) == turn:
        stored = maker.inputs[0]
    stored = stored or g.op("Transpose", m[k_t], perm=turn)
    added = hidden.mask
    if added is not None and len(_mask_dims(m)) == 3:
        added = g.op("Unsqueeze", added, g.ints([1]))
    whole = g.op(
        "Attention",
        *_in_one_type(m, g, _queries(m, g), stored, m[v]),
        added,
        scale=scale,
        softmax_precision=precision,
        q_num_heads=1,
        kv_num_heads=1,
    )
    return hidden.zeroed(g, whole, _type(m))


def _mask(m: Match, g: Builder) -> Hidden:
    """The mask of the operator: what is added to the scores, or which scores count.

    Raises:
        Skip: Attention would give another result than the parts.
    """
    if m.has(biased):
        return _added_mask(m, g, m[mask])
    if not (m.has(kept) or m.has(dropped)):
        return Hidden(None)
    which = m[keep] if m.has(kept) else m[drop]
    _refuse_shape(m, which)
    return _written_out(m, g, which, _chosen(m, g, which))


def _chosen(m: Match, g: Builder, which: ir.Value) -> Hidden:
    """The mask that does what choosing a number instead of scores does."""
    reach = _reach_of_choice(m, which)
    if reach is None or not _sees_itself(m, which):
        if reach is not None and not _is_kept(m, reach):
            return _instead_of_choice(m, g, which, reach)
        _refuse_masked_rows(m, which, reach)
        if reach is not None and reach.masked and not _is_trusted(m):
            return apart(g, _instead(m, g, which, number_of(g, -math.inf, _type(m))), _type(m))
    return Hidden(which if m.has(kept) else g.op("Not", which))


def _instead(m: Match, g: Builder, which: ir.Value, number: ir.Value) -> ir.Value:
    """An added mask of zero where scores are kept, and of a number elsewhere."""
    zero = number_of(g, 0.0, _type(m))
    return g.op("Where", which, *((zero, number) if m.has(kept) else (number, zero)))


def _instead_of_choice(m: Match, g: Builder, which: ir.Value, reach: Reach) -> Hidden:
    """An added mask that does what the choice does, also in rows of which nothing is kept.

    Raises:
        Skip: in half precision, one number may be chosen for a whole row, beside which scores do not vanish.
    """
    even = _may_be_even(m, reach)
    if not even and not reach.masked:
        raise Skip("a row may hold one number throughout", which)
    added = _instead(m, g, which, _floor(m, g) if even else number_of(g, -math.inf, _type(m)))
    return Hidden(added) if even else _steady(m, g, which, added)


def _floor(m: Match, g: Builder) -> ir.Value:
    """The number of `LIFTED`."""
    return number_of(g, LIFTED[_type(m) or ir.DataType.FLOAT], _type(m))


def _added_mask(m: Match, g: Builder, value: ir.Value) -> Hidden:
    """A mask that is added to the scores, as the operator takes it: [S, L] at its end, in the type of the queries."""
    reach = reach_of(value)
    even = reach is not None and _may_be_even(m, reach)
    _refuse_shape(m, value)
    if value.dtype != _type(m):
        value = narrowed(g, value, _type(m))
    hidden = Hidden(value)
    if even:  # beside such a number every score vanishes, as beside the lowest, and a row of it is spread evenly
        hidden = Hidden(g.op("Max", value, _floor(m, g)))
    elif not _sees_itself(m, value):
        if reach is None or not _is_kept(m, reach):
            hidden = _steady_where_unknown(m, g, m[mask], value, reach)
        else:
            _refuse_masked_rows(m, value, reach)
            hidden = apart(g, value, _type(m)) if reach.masked and not _is_trusted(m) else hidden
    return _written_out(m, g, m[mask], hidden)


def _is_trusted(m: Match) -> bool:
    """Whether the target's Attention is known to give zeros for queries that see no key."""
    return m.emits("Attention", dtype=_type(m), form="masked-rows")


def _may_be_even(m: Match, reach: Reach) -> bool:
    """Whether rows may hold one low number throughout, which Softmax spreads evenly: in float32, that can be kept."""
    single = _type(m) == ir.DataType.FLOAT
    return single and not reach.masked and reach.floor <= _least(m)


def _least(m: Match) -> float:
    """What some number of each row of a mask must exceed, for the row to be left as it is."""
    return lowest(ir.DataType.FLOAT) if _type(m) == ir.DataType.FLOAT else NEAR


def _sees_itself(m: Match, hidden: ir.Value) -> bool:
    """Whether each query sees the key at its own place, so that no row is masked throughout."""
    band, square = visible(m, hidden), m.known_dims(q)[-2] == m.known_dims(k_t)[-1]
    if band is not None and m.has(dropped):
        band = band.outside()
    return square and band is not None and band.within(Band(0, 0)) == Band(0, 0)


def _is_masked_alike(m: Match) -> bool:
    """Whether weights are made zero, if at all, where scores were chosen away, or a mask is -infinity."""
    for zeroed, chosen, which, low in (
        (kept_alone, kept, keep, 2),
        (dropped_again, dropped, drop, 1),
    ):
        if m.has(zeroed) and not m.has(chosen):
            maker = m[mask].producer() if m.has(biased) else None
            alike = maker is not None and maker.op_type == "Where" and maker.inputs[0] is m[which]
            return maker is not None and alike and values.fill(maker.inputs[low]) == -math.inf
    return True


def _is_guarded(m: Match) -> bool:
    """Whether queries that see no key are made zero behind the Softmax."""
    return m.has(guard) or m.has(kept_alone) or m.has(dropped_again)


def _is_kept(m: Match, reach: Reach) -> bool:
    """Whether rows that are masked throughout are none, or come out of Attention as they did of the parts."""
    return reach.floor > _least(m) and (not reach.masked or _is_guarded(m))


def _steady_where_unknown(
    m: Match, g: Builder, given: ir.Value, added: ir.Value, reach: Reach | None
) -> Hidden:
    """As `_steady`; of a small bias for every head and an unknown mask for all, the mask alone, which absorbs the bias.

    As T5 adds them.
    """
    maker = given.producer()
    if given is added and maker is not None and maker.op_type == "Add" and not maker.domain:
        for bias, unknown in (maker.inputs, maker.inputs[::-1]):
            small = reach_of(bias)
            if unknown is None or small is None or small.masked or small.low < -SMALL:
                continue
            dims = m.known_dims(unknown)
            if len(dims) < 3 or dims[-3] == 1:
                steady = _steady(m, g, unknown, unknown)
                return dataclasses.replace(steady, mask=g.op("Add", bias, steady.mask))
    return _steady(m, g, given, added, masked=reach is None or reach.masked)


def _steady(
    m: Match, g: Builder, given: ir.Value, added: ir.Value, *, masked: bool = True
) -> Hidden:
    """A mask of which nothing is known, z, as `z + (max(r, low) - r)`, r the largest number of each row.

    A row of -infinity, if there can be one (`masked`), becomes NaN, which is what Softmax made of it, and a row of the
    lowest number is spread as it was; other rows are as they were, bit for bit.  Where the guard would say 0, such a
    row is -infinity again, or told apart if the target's Attention is not known to give 0 for it: so are rows with
    infinity or NaN, whose lift is no number either.  Once for all layers that share the mask.

    Raises:
        Skip: it is not of the type of the queries, or of every head: more work than it saves.
    """
    dims = m.known_dims(given)
    if _type(m) not in LIFTED or added.dtype not in (None, _type(m)):
        raise Skip("a row may be masked throughout", given)
    if len(dims) > 2 and len(m.known_dims(q)) == 4 and dims[-3] != 1:
        raise Skip("a row of a mask for every head may be masked throughout", given)
    best = g.op("ReduceMax", added, g.ints([-1]))
    lift = g.op("Sub", g.op("Max", best, _floor(m, g)), best)
    steady = g.op("Add", added, lift)
    if not (masked and _is_guarded(m)):
        return Hidden(steady)
    if _is_trusted(m):
        return Hidden(
            g.op("Where", g.op("IsNaN", steady), number_of(g, -math.inf, _type(m)), steady)
        )
    seen = g.op("Less", lift, number_of(g, math.inf, _type(m)))
    return Hidden(g.op("Where", seen, steady, number_of(g, 0.0, _type(m))), seen)


def _written_out(m: Match, g: Builder, given: ir.Value, hidden: Hidden) -> Hidden:
    """What was made of a mask [..., 1, L] as [..., S, L]: ONNX Runtime 1.31 does not broadcast it.

    Likewise of [..., S, X] of which nobody knows whether X is L or 1.
    """
    dims, queries, keys = m.known_dims(given), m.known_dims(q)[-2], _columns(m, given)
    once, open_end = dims[-2] == 1 and queries != 1, not is_cut_to(dims[-1], keys)
    if not (once or open_end):
        return hidden
    rows = columns = g.ints([1])
    if once:  # of the mask itself, if possible: then it is done once for all layers, and needs nothing of theirs
        own = (given, len(dims) - 1) if dims[-1] == queries else first_with(m, m[q], queries)
        rows = size_of(g, queries, *own)
    if open_end:
        columns = size_of(g, keys, *first_with(m, m[v], keys))
    if once and not open_end and queries.value is not None:
        sizes = g.ints([queries.value, 1])
    else:
        sizes = g.op("Concat", rows, columns, axis=0)
    return dataclasses.replace(hidden, mask=g.op("Expand", hidden.mask, sizes))


def _reach_of_choice(m: Match, which: ir.Value) -> Reach | None:
    """What a mask is that puts a number where `which` says; with a constant, rows that keep something are unmasked."""
    number, data = values.scalar(m[fill]), values.array(which)
    if number is None or number > LOW:
        return None
    if data is not None:
        rows = (data if m.has(kept) else ~data.astype(bool)).any(axis=-1)
        if rows.all():
            return HARMLESS
    # A row of one finite number is spread evenly, whatever the number, but where it is zero afterwards.
    zeroed = m.has(kept_alone) or m.has(dropped_again)
    return (
        Reach(0.0, masked=True) if number == -math.inf or zeroed else Reach(-math.inf, masked=False)
    )


def _is_last_axis(m: Match) -> bool:
    return int(m.attr(plain_weights, "axis", -1)) % len(m.known_dims(q)) == len(m.known_dims(q)) - 1


def _scale(m: Match) -> float | None:
    """The product of all scales that are one number, None where one is not positive."""
    total = 1.0
    for operator, constant in ((left, left_scale), (right, right_scale), (after, after_scale)):
        if not m.has(operator) or _is_spread(m, operator, constant):
            continue
        number = values.scalar(m[constant])
        if number is None or not 0 < number < math.inf:
            return None
        total *= 1 / float(number) if m[operator].op_type == "Div" else float(number)
    return total


def _is_spread(m: Match, operator: Op, constant: Var) -> bool:
    """Whether a scale is many finite numbers that queries can have: any of them, or one for each head of the scores."""
    if operator is right or values.scalar(m[constant]) is not None:
        return False
    sizes = m.known_dims(constant)
    of_heads = len(sizes) > 2 and all(size == 1 for size in sizes[-2:])
    fits = m.dims(operator) == m.dims(q if operator is left else products)
    return fits and (operator is left or of_heads) and bool(np.isfinite(m.wide(constant)).all())


def _queries(m: Match, g: Builder) -> ir.Value:
    """The queries, times what is not one number: as cosines are scaled by what each head has learnt (Swin 2, XCiT)."""
    found = m[q]
    for operator, constant in ((left, left_scale), (after, after_scale)):
        if m.has(operator) and _is_spread(m, operator, constant):
            found = g.op(m[operator].op_type, found, m[constant])
    return found


def _mask_dims(m: Match) -> tuple[Dim, ...]:
    return m.known_dims(mask if m.has(biased) else keep if m.has(kept) else drop)


def _refuse_shape(m: Match, value: ir.Value) -> None:
    """Declines a mask that the operator does not broadcast.

    Raises:
        Skip: it does not end in [S, L], or broadens the scores.
    """
    shape = m.known_dims(value)
    whole = (*m.known_dims(q)[:-1], _columns(m, value))
    # The operator's text lets the last two broadcast as well; ONNX Runtime 1.31 refuses that.
    once = len(shape) > 1 and shape[-2] == 1 and _may_expand(m, value)
    rows = whole[-2] if once or len(shape) < 2 else shape[-2]
    same = m.known_dims(v)[-2] == m.known_dims(k_t)[-1]
    open_end = same and shape and shape[-1].value is None and whole[-1].value is None
    known = not open_end or is_cut_to(shape[-1], whole[-1])
    ends = (rows, shape[-1] if known else whole[-1]) if shape else ()
    if len(shape) not in (2, 3, 4) or not ends_in(ends, *whole[-2:]):
        own, wanted = (", ".join(map(str, dims)) for dims in (shape, whole[-2:]))
        raise Skip(f"the mask [{own}] does not end in [S, L] = [{wanted}]", value)
    pairs = zip(shape[-3::-1], whole[-3::-1], strict=False)
    if len(shape) > len(whole) or any(a != 1 and not is_cut_to(a, b) for a, b in pairs):
        raise Skip("the mask broadens the scores", value)


def _columns(m: Match, given: ir.Value) -> Dim:
    """How many keys there are: as many as values, or the product of both is refused."""
    dims, keys = m.known_dims(given), m.known_dims(k_t)[-1]
    same = m.known_dims(v)[-2] == keys and dims and not is_cut_to(dims[-1], keys)
    broad = m.known_dims(weights)[-1]
    return broad if same and is_cut_to(dims[-1], broad) else keys


def _may_expand(m: Match, value: ir.Value) -> bool:
    """Whether a mask for all queries may be written out for each: no large constant comes of it."""
    sizes = (m.known_dims(q)[-2].value, m.known_dims(k_t)[-1].value)
    small = None not in sizes and math.prod(size or 0 for size in sizes) <= SMALL_MASK
    return small or values.constant(value) is None


def _refuse_masked_rows(m: Match, value: ir.Value, reach: Reach | None) -> None:
    """Declines a mask for which Attention gives another result than the parts.

    Raises:
        Skip: a row may be masked throughout.
    """
    if reach is None or (reach.masked and not _is_guarded(m)):
        raise Skip("a row may be masked throughout", value)
    if reach.floor <= _least(m):
        raise Skip("a row may hold the lowest number throughout", value)


RULES: tuple[Rule, ...] = (fuse_attention, drop_guard_of_unmasked_rows)
