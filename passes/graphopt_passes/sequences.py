"""Sequences and optionals that need not exist: packed here, unpacked there.

Exporters wrap tensors into sequences for `split`, `chunk`, `unbind` and loops over lists, and into optionals for what
may be absent.  Once both ends are known, the tensors can go directly.  All rules are exact.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.build import Builder
from graphopt.rewrite import Match, Op, Rule, Skip, Var, exact

MAX_PIECES = 256
"""A sequence of more tensors than this is no hand-written split: it stays a sequence."""

READERS = frozenset({"SequenceAt", "SequenceLength", "ConcatFromSequence"})

x = Var()
_optional = Op("Optional", x, shared=True)
_get_packed = Op("OptionalGetElement", _optional)


@exact(_get_packed, benefit=2)
def unpack_optional(m: Match, g: Builder) -> ir.Value:
    """OptionalGetElement(Optional(x)) -> x; Identity(x) where an input of the model is its output.

    Source: ONNX Optional-15, OptionalGetElement-15, -18.
    """
    bound = m.out(_get_packed).is_graph_output() and m[x].producer() is None
    return g.op("Identity", m[x]) if bound else m[x]


_get = Op("OptionalGetElement", x)


@exact(_get)
def drop_get_element_of_present(m: Match, _g: Builder) -> ir.Value | None:
    """OptionalGetElement(x) -> x where x is a tensor or a sequence, not an optional.

    Source: ONNX OptionalGetElement-18.
    """
    return m[x] if _is_present(m[x]) else None


def _is_present(value: ir.Value) -> bool:
    return isinstance(value.type, (ir.TensorType, ir.SequenceType))


_maybe = Var(optional=True)
_has = Op("OptionalHasElement", _maybe)


@exact(_has)
def decide_has_element(m: Match, g: Builder) -> ir.Value | None:
    """OptionalHasElement(x) -> true where x is a tensor, a sequence or Optional(y); false for Optional() or nothing.

    Source: ONNX OptionalHasElement-15, -18.
    """
    value = m.get(_maybe)
    if value is None:
        return _true_or_false(g, present=False)
    if _is_present(value):
        return _true_or_false(g, present=True)
    maker = value.producer()
    if maker is None or maker.op_type != "Optional" or maker.domain:
        return None
    return _true_or_false(g, present=bool(maker.inputs and maker.inputs[0] is not None))


def _true_or_false(g: Builder, *, present: bool) -> ir.Value:
    return _as_output(g, np.array(present))


def _as_output(g: Builder, data: np.ndarray) -> ir.Value:
    """A `Constant` node rather than an initializer: the value may have to be a graph output."""
    return g.op("Constant", value=ir.tensor(data))


_packed = Op("SequenceConstruct", ..., shared=True)
_position = Var(const=True)
_at = Op("SequenceAt", _packed, _position)


@exact(_at)
def take_element_of_construct(m: Match, _g: Builder) -> ir.Value:
    """SequenceAt(SequenceConstruct(a, b, …), 1) -> b.

    Source: ONNX SequenceAt-11, SequenceConstruct-11.
    """
    items = m[_packed].inputs
    chosen = items[_index(m, _position, len(items))]
    if chosen is None:
        raise Skip("an element of the sequence is absent", m[_packed])
    return chosen


def _index(m: Match, position: Var, length: int, *, end: int = -1) -> int:
    """The position as an index of `length` elements (`end` = 0: the place after the last counts too).

    Raises:
        Skip: it lies outside.
    """
    at = values.scalar(m[position])
    if at is None or not -length <= at <= length + end:
        raise Skip(f"position {at} of a sequence of {length}", m[position])
    return int(at) % length if at < 0 else int(at)


_length = Op("SequenceLength", _packed)


@exact(_length)
def count_construct(m: Match, g: Builder) -> ir.Value:
    """SequenceLength(SequenceConstruct(a, b, …)) -> the number of tensors.

    Source: ONNX SequenceLength-11.
    """
    return _as_output(g, np.array(len(m[_packed].inputs), np.int64))


_concat = Op("ConcatFromSequence", _packed)


@exact(_concat)
def concat_construct(m: Match, g: Builder) -> ir.Value:
    """ConcatFromSequence(SequenceConstruct(a, b, …), axis) -> Concat(a, b, …, axis); new_axis: unsqueezed first.

    Source: ONNX ConcatFromSequence-11, Concat-11 .. 13.
    """
    axis = m.attr(_concat, "axis")
    items = [item for item in m[_packed].inputs if item is not None]
    if m.attr(_concat, "new_axis", 0):
        items = [_unsqueeze(m, g, item, axis) for item in items]
    return g.op("Concat", *items, axis=axis)


def _unsqueeze(m: Match, g: Builder, value: ir.Value, axis: int) -> ir.Value:
    if m.opset() < 13:
        return g.op("Unsqueeze", value, axes=(axis,))
    return g.op("Unsqueeze", value, g.ints((axis,)))


_new = Var()
_place = Var(const=True, optional=True)
_insert = Op("SequenceInsert", _packed, _new, _place)


@exact(_insert)
def insert_into_construct(m: Match, g: Builder) -> ir.Value:
    """SequenceInsert(SequenceConstruct(a, b), c, 1) -> SequenceConstruct(a, c, b); at the end by default.

    Source: ONNX SequenceInsert-11.
    """
    items = list(m[_packed].inputs)
    if len(items) >= MAX_PIECES:
        raise Skip(f"a sequence of more than {MAX_PIECES} tensors", m[_packed])
    where = len(items) if m.get(_place) is None else _index(m, _place, len(items), end=0)
    items.insert(where, m[_new])
    return g.op("SequenceConstruct", *items)


_empty = Op("SequenceEmpty", shared=True)
_insert_first = Op("SequenceInsert", _empty, _new, _place)


@exact(_insert_first)
def insert_into_empty(m: Match, g: Builder) -> ir.Value:
    """SequenceInsert(SequenceEmpty(), a) -> SequenceConstruct(a).

    Source: ONNX SequenceEmpty-11, SequenceInsert-11.
    """
    return g.op("SequenceConstruct", m[_new])


_erase = Op("SequenceErase", _packed, _place)


@exact(_erase)
def erase_from_construct(m: Match, g: Builder) -> ir.Value | None:
    """SequenceErase(SequenceConstruct(a, b, c), 1) -> SequenceConstruct(a, c); the last one by default.

    Source: ONNX SequenceErase-11.
    """
    items = list(m[_packed].inputs)
    if len(items) < 2:
        return None  # an empty sequence needs its element type spelt out
    del items[-1 if m.get(_place) is None else _index(m, _place, len(items))]
    return g.op("SequenceConstruct", *items)


_sizes = Var(const=True, optional=True)
_split = Op("SplitToSequence", x, _sizes)


@exact(_split)
def construct_split(m: Match, g: Builder) -> ir.Value | None:
    """SplitToSequence(x, split, axis) -> SequenceConstruct of the pieces, where only known positions are read.

    The pieces are a Split, or, with keepdims = 0, a Gather each; the sequence then dissolves into its readers.
    Needs: a known number of pieces.
    Source: ONNX SplitToSequence-11, -24; Split-11 .. 18.
    """
    if not _only_read(m[_split].outputs[0]):
        return None
    dims = m.known_dims(x)
    axis = m.attr(_split, "axis", 0)
    size = dims[axis]
    if m.get(_sizes) is None and not m.attr(_split, "keepdims", 1):
        return _rows(m, g, axis, None if not size.is_static else int(size))
    pieces = _pieces(m, None if not size.is_static else int(size))
    if len(pieces) == 1:
        return g.op("SequenceConstruct", m[x])
    return g.op("SequenceConstruct", *_split_into(m, g, pieces, axis))


def _only_read(sequence: ir.Value) -> bool:
    """Whether every use of a sequence dissolves with it."""
    uses = sequence.uses()
    return not sequence.is_graph_output() and all(
        use.node.op_type in READERS
        and not use.node.domain
        and (use.node.op_type != "SequenceAt" or values.is_constant(use.node.inputs[1]))
        for use in uses
    )


def _rows(m: Match, g: Builder, axis: int, size: int | None) -> ir.Value:
    if size is None or not 0 < size <= MAX_PIECES:
        raise Skip(f"splits into {size or 'an unknown number of'} tensors", m[_split])
    index = [g.const(np.array(i, np.int64), name="index") for i in range(size)]
    return g.op("SequenceConstruct", *[g.op("Gather", m[x], i, axis=axis) for i in index])


def _pieces(m: Match, size: int | None) -> Sequence[int]:
    """The size of each piece.

    Raises:
        Skip: their number is unknown, or too large.
    """
    given = m.get(_sizes)
    tensor = values.constant(given)
    if tensor is not None and tensor.size > MAX_PIECES:
        raise Skip(f"splits into {tensor.size} tensors", m[_split])
    if tensor is not None and len(tensor.shape) == 1:
        pieces = [int(piece) for piece in tensor.numpy()]
    else:
        step = 1 if tensor is None else int(tensor.numpy().reshape(()))
        if size is None or step < 1 or size > step * MAX_PIECES:
            raise Skip(f"splits a dim of {size or 'unknown size'} into pieces of {step}", m[_split])
        pieces = [min(step, size - at) for at in range(0, size, step)]
    if not pieces or (size is not None and sum(pieces) != size):
        raise Skip(f"pieces {pieces} do not make up a dim of {size}", m[_split])
    return pieces


def _split_into(m: Match, g: Builder, pieces: Sequence[int], axis: int) -> Sequence[ir.Value]:
    if m.opset() < 13:
        return g.ops("Split", m[x], outputs=len(pieces), split=pieces, axis=axis)
    return g.ops("Split", m[x], g.ints(pieces), outputs=len(pieces), axis=axis)


RULES: tuple[Rule, ...] = (
    unpack_optional,
    drop_get_element_of_present,
    decide_has_element,
    take_element_of_construct,
    count_construct,
    concat_construct,
    insert_into_construct,
    insert_into_empty,
    erase_from_construct,
    construct_split,
)
