"""Shapes of normalisations, recurrent layers and quantisation."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphopt.ir.shapes import facts
from graphopt.ir.shapes.dim import Dim
from graphopt.ir.shapes.facts import Facts
from graphopt.ir.shapes.query import Query, Rules

_FLOAT, _UINT8 = ir.DataType.FLOAT, ir.DataType.UINT8


def _same(q: Query) -> Sequence[Facts]:
    return [q.same(0)]


def _batch_normalization(q: Query) -> Sequence[Facts] | None:
    if len(q.node.outputs) > 1:
        return None
    return [q.same(0)]


def _layer_normalization(q: Query) -> Sequence[Facts]:
    given = q.facts(0)
    dtype = ir.DataType(q.attr("stash_type", int(_FLOAT)))
    reduced = None
    if given.dims is not None:
        rank = len(given.dims)
        axis = q.axis("axis", -1, rank)
        reduced = (*given.dims[:axis], *(Dim.of(1),) * (rank - axis))
    # Before opset 17 the operator is ONNX Runtime's own, whose result has the type of the scale.
    result = q.same(0, q.dtype(1) if q.version < 17 else None)
    return [result, facts.tensor(dtype, reduced), facts.tensor(dtype, reduced)]


def _recurrent(q: Query) -> Sequence[Facts]:
    given, recurrence = q.dims(0), q.dims(2)
    dtype = q.dtype(0)
    directions = Dim.of(2 if q.attr("direction", "forward") == "bidirectional" else 1)
    hidden = Dim.of(q.attr("hidden_size", 0))
    if not int(hidden):
        hidden = recurrence[-1] if recurrence else q.fresh(0, 3)
    if given is None or len(given) != 3:
        given = q.unknown_dims(3)  # the operator takes no other rank
    batch_first = bool(q.attr("layout", 0))
    length, batch = given[1::-1] if batch_first else given[:2]
    if batch_first:
        sequence, state = (batch, length, directions, hidden), (batch, directions, hidden)
    else:
        sequence, state = (length, directions, batch, hidden), (directions, batch, hidden)
    return [facts.tensor(dtype, sequence), *[facts.tensor(dtype, state)] * 2]


def _quantize(q: Query) -> Sequence[Facts]:
    given = q.attr("output_dtype", 0)
    dtype = ir.DataType(given) if given else q.dtype(2) if q.has(2) else _UINT8
    return [facts.tensor(dtype, q.dims(0))]


def _dequantize(q: Query) -> Sequence[Facts]:
    given = q.attr("output_dtype", 0)
    dtype = ir.DataType(given) if given else q.dtype(1)
    return [facts.tensor(dtype, q.dims(0))]


def _dynamic_quantize(q: Query) -> Sequence[Facts]:
    return [facts.tensor(_UINT8, q.dims(0)), facts.tensor(_FLOAT, ()), facts.tensor(_UINT8, ())]


RULES: Rules = {
    "BatchNormalization": _batch_normalization,
    "InstanceNormalization": _same,
    "GroupNormalization": _same,
    "RMSNormalization": _same,
    "LayerNormalization": _layer_normalization,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
}
