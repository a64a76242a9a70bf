"""What is added to the scores of attention, brought together: two masks, a choice and a mask, a mask of a view.

    Before:  z = Reshape(Reshape(q kT + a, [B, W, H, S, L]) + b, [B W, H, S, L])     b: [1, W, 1, S, L]
    After:   z = q kT + (a + Tile(b, [B, 1, 1, 1]))

Then it is attention with one mask, which `fuse-attention` takes, and for which the opset is raised: these rules come
before.  Changes numerics: reordered.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.ir.shapes import Dim, is_cut_to
from graphopt.rewrite import Either, Lit, Match, Op, Rule, Skip, Var, exact, rule
from graphopt_passes.bands import LOW
from graphopt_passes.constants import live_uses
from graphopt_passes.masks import ends_in

VANISHING = -1e30
"""In float32, a number beside which any score vanishes."""

scores, mask = Var(), Var()
parted = Op("Reshape", scores, ...)
added = Op("Add", parted, mask)
joined = Op("Reshape", added, ...)


@exact(joined, opset=(13, 10_000))
def mask_windows_in_place(m: Match, g: Builder) -> ir.Value | None:
    """`Reshape(Reshape(s, [B, W, H, S, L]) + mask, [B W, H, S, L])` -> `s + mask of each window`, before a Softmax.

    s: [B W, H, S, L]; mask: [1, W, 1 or H, S, L], as [B W, 1 or H, S, L].  Only where the target has Attention, which
    then takes scores, mask and Softmax together.  Source: Reshape-13, Tile-13; arXiv:2103.14030.
    """
    whole, view, dims = m.dims(scores), m.dims(parted), m.dims(mask)
    users = live_uses(m.out(joined))
    if not _may_be_attention(m, m.dtype(scores)) or not _weighs(users):
        return None
    if whole is None or view is None or dims is None or len(whole) != 4 or len(view) != 5:
        return None
    back = m.dims(joined)
    # Both views have all elements, so that the first size follows from the others.
    if back is None or back[1:] != whole[1:] or view[2:] != whole[1:] or len(dims) not in (4, 5):
        return None
    windows = view[1].value
    each = (*[Dim.of(1)] * (5 - len(dims)), *dims)
    if windows is None or each[0] != 1 or each[1] != windows or each[3:] != whole[2:]:
        return None
    if each[2] not in (1, whole[1]):
        return None
    flat = g.op("Squeeze", m[mask], g.ints([0])) if len(dims) == 5 else m[mask]
    return g.op("Add", m[scores], _for_each(m, g, flat, windows))


first_bias, second_bias = Var(), Var()
summed = Op("Add", Op("Add", parted, first_bias), second_bias)
flat_again = Op("Reshape", summed, ...)


@rule(flat_again, opset=(13, 10_000))
def add_biases_of_rows_and_columns(m: Match, g: Builder) -> ir.Value | None:
    """`Reshape(Reshape(s, [B, H, W, H, W]) + a + b, [B, H W, H W])` -> `s + Reshape(a + b)`, before a Softmax.

    a: [B, H, W, H, 1], b: [B, H, W, 1, W], as Segment Anything and MViT add biases of relative rows and columns: one
    mask of attention.  s: [B, H W, H W] or with heads.  Source: Add-14, Reshape-13; arXiv:2304.02643.
    """
    whole, dims, view = m.dims(scores), m.dims(flat_again), m.dims(parted)
    sides = [m.dims(each) for each in (first_bias, second_bias)]
    if whole is None or whole != dims or view is None or len(whole) not in (3, 4):
        return None
    if not _weighs(live_uses(m.out(flat_again))) or not _is_plain_product(m[scores]):
        return None
    if not _may_be_attention(m, m.dtype(scores)) or None in sides:
        return None
    pairs = zip(*((each or ())[::-1] for each in sides), strict=False)
    largest = [b if a == 1 else a for a, b in pairs]
    if tuple(largest[::-1]) != view:
        raise Skip("what is added is not of every score", m[flat_again])
    both = g.op("Add", m[first_bias], m[second_bias])
    return g.op("Add", m[scores], g.op("Reshape", both, *m[flat_again].inputs[1:]))


def _for_each(m: Match, g: Builder, value: ir.Value, windows: int) -> ir.Value:
    """The mask [W, …] for each image of the batch, [B W, …]."""
    images = m.known_dims(parted)[0].value
    if images == 1:
        return value
    if images is not None:
        return g.op("Tile", value, g.ints([images, 1, 1, 1]))
    rows = g.op("Shape", m[scores])
    first = g.op("Slice", rows, g.ints([0]), g.ints([1]))
    times = g.op("Concat", g.op("Div", first, g.ints([windows])), g.ints([1, 1, 1]), axis=0)
    return g.op("Tile", value, times)


x, one, other = Var(), Var(), Var()
once = Op("Add", x, one)
twice = Op("Add", once, other)


@rule(twice, opset=(7, 10_000))
def join_masks(m: Match, g: Builder) -> ir.Value | None:
    """`q kT + a + b` -> `q kT + (a + b)`, before a Softmax: one mask, which all layers may share.

    As T5 adds the bias of relative positions and a mask.  Source: Add-7, Softmax-13.
    """
    if not _weighs(live_uses(m.out(twice))) or len(m.dims(twice) or ()) != 4:  # few sums do
        return None
    if not _may_be_attention(m, m.dtype(x)) or m.dims(x) != m.dims(twice):
        return None
    if not _is_product(m[x]) or _is_product(m[one]) or _is_product(m[other]):
        return None
    return g.op("Add", m[x], g.op("Add", m[one], m[other]))


condition, low = Var(), Var(const=True)
kept = Op("Where", condition, scores, low)
dropped = Op("Where", condition, low, scores)
chosen = Either(kept, dropped)
masked_choice = Op("Add", chosen, mask)


@rule(masked_choice, opset=(9, 10_000))
def join_choice_and_mask(m: Match, g: Builder) -> ir.Value | None:
    """`Where(c, q kT, low) + b` -> `q kT + (Where(c, 0, low) + b)`, before a Softmax.

    As eager GPT-2 chooses the past, and adds a mask of padding.  low is -infinity, or so low in float32 that any score
    vanishes beside it; a b above 1e30 would bring it back.  Leaves alone: -1e4, beside which scores count in a row
    that both mask, and half precision.  Source: Where-9, Add-7.
    """
    if not _weighs(live_uses(m.out(masked_choice))) or len(m.dims(scores) or ()) != 4:
        return None
    if not _is_product(m[scores]) or not _may_be_attention(m, m.dtype(scores)):
        return None
    if _is_plain_product(m[mask]):  # those are the scores, and what was chosen is a bias
        return None
    broad = next((each for each in (m[condition], m[mask]) if not _broadcasts(m, each)), None)
    if broad is not None:
        raise Skip("it is not known to broadcast to the scores", broad)
    dtype = m.dtype(scores)
    if values.fill(m[low]) is None or dtype is None:
        return None
    _refuse_mixing(m, m[masked_choice])
    zero = g.const(np.zeros((), dtype.numpy()))
    branches = (zero, m[low]) if m.has(kept) else (m[low], zero)
    return g.op("Add", m[scores], g.op("Add", g.op("Where", m[condition], *branches), m[mask]))


factor = Var(const=True)
biased = Op("Add", scores, mask)
late = Op("Mul|Div", Either(biased, kept, dropped), factor)


@rule(late, opset=(9, 10_000))
def scale_before_mask(m: Match, g: Builder) -> ir.Value | None:
    """`(q kT + b) * c` -> `q kT * c + b * c`, likewise `Where(m, q kT, low) * c`, before a Softmax; also with Div.

    As CodeGen scales what is masked.  The scale goes into the queries then, or into attention, and the mask is scaled
    once for all layers.  c: one positive number.  Source: Mul-14, Div-14, Where-9.
    """
    users = live_uses(m.out(late))
    choices = [use for user in users if user.op_type == "Where" for use in user.outputs[0].uses()]
    onward = [user for user in users if user.op_type != "Where"] + [use.node for use in choices]
    if not _weighs(onward) or not _is_product(m[scores]):
        return None
    number, dims = values.scalar(m[factor]), m.dims(late)
    if number is None or not 0 < number < math.inf or dims is None or m.dims(scores) != dims:
        return None
    kind = m[late].op_type
    if kind == "Div" and m[late].inputs[1] is not m[factor]:
        return None
    inner = g.op(kind, m[scores], m[factor])
    if not m.has(biased):
        branches = [g.op(kind, m[low], m[factor]), inner]
        return g.op("Where", m[condition], *(branches[::-1] if m.has(kept) else branches))
    if m.dims(mask) is None or (m.dims(mask) == dims and not _may_be_attention(m, m.dtype(scores))):
        raise Skip("the mask is as large as the scores", m[mask])
    return g.op("Add", inner, g.op(kind, m[mask], m[factor]))


kept_sum = Op("Where", condition, biased, low)
dropped_sum = Op("Where", condition, low, biased)


@rule(kept_sum, opset=(9, 10_000))
def join_bias_and_choice(m: Match, g: Builder) -> ir.Value | None:
    """`Where(c, q kT + b, low)` -> `q kT + Where(c, b, low)`, before a Softmax.

    As MPT adds a bias of distances, and then masks: what all layers share is done once.  low as in
    `join_choice_and_mask`.  Source: Where-9, Add-7.
    """
    return _bias_of_choice(m, g, m[kept_sum])


@rule(dropped_sum, opset=(9, 10_000))
def join_bias_and_dropping(m: Match, g: Builder) -> ir.Value | None:
    """As `join_bias_and_choice`, for `Where(c, low, q kT + b)`."""
    return _bias_of_choice(m, g, m[dropped_sum])


def _bias_of_choice(m: Match, g: Builder, root: ir.Node) -> ir.Value | None:
    """The sum of scores and a choice of what is added to them."""
    if not _weighs(live_uses(root.outputs[0])) or len(m.dims(scores) or ()) != 4:
        return None
    sides = _scores_and_bias(m)
    if sides is None or not _may_be_attention(m, m.dtype(scores)):
        return None
    _refuse_mixing(m, root)
    own, bias = sides
    branches = (bias, m[low]) if root.inputs[2] is m[low] else (m[low], bias)
    return g.op("Add", own, g.op("Where", m[condition], *branches))


def _scores_and_bias(m: Match) -> tuple[ir.Value, ir.Value] | None:
    """Which addend is q kT, and which a bias: also scores of relative positions, which are moved about (Conformer)."""
    pairs = ((m[scores], m[mask]), (m[mask], m[scores]))
    plain = [
        pair for pair in pairs if _is_plain_product(pair[0]) and not _is_plain_product(pair[1])
    ]
    if len(plain) == 1 and m.dims(plain[0][0]) == m.dims(biased):
        return plain[0]
    return pairs[0] if _is_product(m[scores]) and not _is_product(m[mask]) else None


def _is_plain_product(value: ir.Value) -> bool:
    """Whether a value is a product, perhaps scaled, whose elements stay where they are."""
    node = value.producer()
    if node is not None and node.op_type in ("Mul", "Div") and values.scalar(node.inputs[1]):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    return node is not None and node.op_type == "MatMul"


def _refuse_mixing(m: Match, node: ir.Node) -> None:
    """Declines a number beside which scores count.

    Raises:
        Skip: it is no number so low that scores vanish beside it.
    """
    number = values.fill(m[low])
    vanishing = number is not None and number <= VANISHING and m.dtype(scores) == ir.DataType.FLOAT
    if number != -math.inf and not vanishing:
        raise Skip("a row that both choice and mask hide would mix them", node)


first = Op("Where", condition, low, scores)
hidden = Op("Where", condition, Lit(0.0), Op("Softmax", first))


@rule(hidden, opset=(9, 10_000))
def hide_what_is_made_zero(m: Match, g: Builder) -> ir.Value | None:
    """`Where(c, 0, Softmax(Where(c, low, z)))` -> the same with -infinity for a low number.

    As Conformers mask scores and weights: a row that is masked throughout is zero in the end whatever low is, and low
    vanishes beside any other score.  A choice of -infinity then goes with a bias.  Source: Where-9, Softmax-13.
    """
    number, dtype = values.fill(m[low]), m.dtype(scores)
    if number is None or not -math.inf < number <= LOW or not _may_be_attention(m, dtype):
        return None
    node, dims = m[hidden], m.dims(first)
    soft = node.inputs[2].producer() if node.inputs[2] is not None else None
    if dtype is None or soft is None or dims is None or m.dims(hidden) != dims:
        return None
    if int(m.attr(soft, "axis", -1)) not in (-1, len(dims) - 1):
        return None
    lowest = g.const(np.asarray(-math.inf, dtype.numpy()))
    inner = g.op("Where", m[condition], lowest, m[scores])
    return g.op("Where", m[condition], node.inputs[1], g.op("Softmax", inner, like=soft))


floored = Op("Max", biased, low)
floored_behind = Op("Max", low, biased)


@rule(floored, opset=(12, 10_000))
def limit_mask_instead_of_scores(m: Match, g: Builder) -> ir.Value | None:
    """`Max(q kT + b, low)` -> `q kT + Max(b, low)`, before a Softmax: scores vanish beside low, in float32.

    As OPT and XGLM keep two masks from overflowing.  Source: Max-13.
    """
    return _limited(m, g, m[floored])


@rule(floored_behind, opset=(12, 10_000))
def limit_mask_instead_of_scores_behind(m: Match, g: Builder) -> ir.Value | None:
    """As `limit_mask_instead_of_scores`, for `Max(low, q kT + b)`."""
    return _limited(m, g, m[floored_behind])


def _limited(m: Match, g: Builder, root: ir.Node) -> ir.Value | None:
    """The sum of scores and what is added to them, at least so much."""
    number = values.scalar(m[low])
    if number is None or len(root.inputs) != 2 or not _weighs(live_uses(root.outputs[0])):
        return None
    if not _is_product(m[scores]) or _is_product(m[mask]):
        return None
    if not _may_be_attention(m, m.dtype(scores)):
        return None
    if not -math.inf < number <= VANISHING or m.dtype(scores) != ir.DataType.FLOAT:
        raise Skip("the number that scores are limited to is not so low that they vanish", root)
    return g.op("Add", m[scores], g.op("Max", m[mask], m[low]))


def _broadcasts(m: Match, value: ir.Value) -> bool:
    """Whether a value goes to the scores' shape, perhaps out of a table that is cut to their length."""
    own, whole = m.dims(value), m.dims(scores)
    if own is None or whole is None or len(own) > len(whole):
        return False
    if ends_in(own, *whole[-2:]):
        own, whole = own[:-2], whole[:-2]
    return all(a == 1 or is_cut_to(a, b) for a, b in zip(own[::-1], whole[::-1], strict=False))


def _is_product(value: ir.Value, depth: int = 4) -> bool:
    """Whether a value is scores itself, as those of relative positions are."""
    node = value.producer()
    if node is None or depth == 0 or node.op_type == "MatMul":
        return node is not None and node.op_type == "MatMul"
    arithmetic = node.op_type in ("Add", "Mul", "Div", "Cast", "Reshape", "Slice")
    return arithmetic and any(_is_product(v, depth - 1) for v in node.inputs if v is not None)


def _weighs(users: list[ir.Node]) -> bool:
    """Whether scores go to a Softmax alone, in whatever type."""
    return bool(users) and all(user.op_type in ("Softmax", "Cast") for user in users)


def _may_be_attention(m: Match, dtype: ir.DataType | None) -> bool:
    """Whether the target has Attention, if need be at a newer opset."""
    target = m.facts.target
    return target.emits("Attention", opset=target.opset[1], dtype=dtype)


RULES: tuple[Rule, ...] = (
    mask_windows_in_place,
    add_biases_of_rows_and_columns,
    join_masks,
    join_choice_and_mask,
    join_bias_and_choice,
    join_bias_and_dropping,
    scale_before_mask,
    hide_what_is_made_zero,
    limit_mask_instead_of_scores,
    limit_mask_instead_of_scores_behind,
)
