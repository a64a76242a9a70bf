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


def _stft(q: Query) -> Sequence[Facts]:
    """[batch, frames, bins, 2]; onnx 1.23 infers two sides where the attribute is absent, the standard says one."""
    signal, window, length, step = q.dims(0), q.dims(2), q.elements(3), q.elements(1)
    size = length[0] if length else window[0] if window else None
    if signal is None or len(signal) != 3 or size is None:
        return [facts.tensor(q.dtype(0), None)]
    bins = size // 2 + 1 if q.attr("onesided", 1) else size
    known = step is not None and step[0].is_static
    frames = (signal[1] - size) // int(step[0].value or 1) + 1 if step and known else q.fresh(0, 1)
    return [facts.tensor(q.dtype(0), (signal[0], frames, bins, 2))]


RULES: Rules = {
    "STFT": _stft,
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
