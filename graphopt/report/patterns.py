"""The table of N:M patterns: along which axis each weight is read by sparse tensor cores, and whether they can take it.

Sources: TensorRT's samples/common/sampleUtils.cpp (`sparsify`) and Polygraphy's tools/sparse.py read the input
channels of a convolution, for each place of the kernel, and the axis that a product sums over; NVIDIA/TensorRT#4065
(256 channels), #2271 (MatMul), #4694 (explicit Q/DQ).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.ir import operators, values
from graphopt.rewrite.context import Remark, name_of

LEAST_INPUTS = 256
"""Below, TensorRT seldom picks a sparse kernel (NVIDIA/TensorRT#4065)."""

CAVEATS = (
    f"TensorRT seldom picks sparse kernels below {LEAST_INPUTS} inputs, and picks them for Gemm and Conv rather than "
    "for MatMul; 8.6 picked none between Q/DQ nodes"
)

_PRODUCTS = frozenset(("Gemm", "MatMul", "FusedGemm", "FusedMatMul"))
_CONVOLUTIONS = frozenset(("Conv", "FusedConv"))
_OTHERS = frozenset(("ConvTranspose", "GRU", "LSTM", "RNN"))
_MULTIPLES = (64, 32, 16, 8, 4, 2, 1)
_DENSE = "stays dense: "


@dataclasses.dataclass(frozen=True)
class PatternLayer:
    """A weight, and whether sparse tensor cores can read it.

    Attributes:
        node: the name of the node's first output.
        operator: its operator.
        weight: the name of its weight.
        axis: what the pattern runs along: C, the input channels, of a convolution; K, what is summed over, of a
            product; "" of what sparse tensor cores do not read.
        inputs: extent of that axis, in one group.
        outputs: rows that the weight makes.
        groups: of a convolution; 1 of all others.
        multiple: the greatest power of two up to 64 that divides `inputs`.
        following: share of the groups of M weights that have at most N that are not zero.
        eligible: whether a sparse kernel can take the weight.
        why_not: what keeps it from that; "" where it is eligible.
        note: what may keep the kernel from being picked, or from being faster.
        pattern: N:M, the one that it was compared with: of several the last one asked for that it follows.
    """

    node: str
    operator: str
    weight: str
    axis: str
    inputs: int
    outputs: int
    groups: int
    multiple: int
    following: float
    eligible: bool
    why_not: str = ""
    note: str = ""
    pattern: str = ""


@dataclasses.dataclass(frozen=True)
class Asked:
    """A pattern that a run asks for.

    Attributes:
        pattern: (N, M): at most N of M weights are not zero.
        names: of the weights that it is for, as a regular expression; "" for all.
    """

    pattern: tuple[int, int]
    names: str = ""


def patterns_asked(sparsities: Iterable[str | None]) -> tuple[Asked, ...]:
    """The patterns that some `--sparsity` texts ask for, of the run or of its passes, each once.

    `2:4` asks for one of all weights, `layer=REGEX:2:4` of some.
    """
    found: list[Asked] = []
    for text in sparsities:
        first, *rest = (text or "").split(",")
        if whole := re.fullmatch(r"\s*(\d+):(\d+)\s*", first):
            found.append(Asked((int(whole[1]), int(whole[2]))))
        matches = (re.fullmatch(r"\s*layer=(.+):(\d+):([1-9]\d*)\s*", each) for each in rest)
        found.extend(Asked((int(own[2]), int(own[3])), own[1]) for own in matches if own)
    return tuple(dict.fromkeys(found))


def pattern_layers(
    model: ir.Model, asked: Sequence[Asked], remarks: Iterable[Remark] = ()
) -> tuple[PatternLayer, ...]:
    """A row for every weight of the main graph that is multiplied, in the order of the file; none without a pattern.

    What is said is read from the weights as they are, through DequantizeLinear, whoever pruned them.

    Args:
        model: the result.
        asked: the patterns that the run asks for.
        remarks: of the run; say why a layer stays dense.
    """
    if not asked:
        return ()
    dense = {
        remark.node: remark.reason.removeprefix(_DENSE)
        for remark in remarks
        if remark.reason.startswith(_DENSE)
    }
    return tuple(
        _nearest(
            [
                _row(node, weight, held, pattern, dense.get(name_of(node), ""))
                for pattern in _patterns_of(_name(weight), asked)
            ]
        )
        for node, weight, held in _weights(model)
    )


def _patterns_of(name: str, asked: Sequence[Asked]) -> list[tuple[int, int]]:
    """Those asked for of one weight, the last word first; all where none is."""
    own = [each.pattern for each in asked if re.search(each.names, name)]
    return [*dict.fromkeys(reversed(own or [each.pattern for each in asked]))]


def _nearest(rows: Sequence[PatternLayer]) -> PatternLayer:
    """Of the rows of one weight the first whose pattern it follows."""
    return next((row for row in rows if row.eligible), rows[0])


def _weights(model: ir.Model) -> Iterator[tuple[ir.Node, ir.Value, ir.TensorProtocol]]:
    known = _PRODUCTS | _CONVOLUTIONS | _OTHERS
    for node in model.graph:
        if node.op_type not in known or node.domain not in ("", operators.MICROSOFT):
            continue
        for weight in node.inputs[1 : 3 if node.op_type in ("GRU", "LSTM", "RNN") else 2]:
            held = _stored(weight)
            if weight is not None and held is not None and len(held.shape) >= 2 and held.size:
                yield node, weight, held


def _stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant behind a value, seen through its dequantisation."""
    producer = None if value is None else value.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        point = producer.inputs[2] if len(producer.inputs) > 2 else None
        zero = values.array(point)
        shifted = point is not None and (zero is None or bool(np.asarray(zero).astype(int).any()))
        return None if shifted else values.constant(producer.inputs[0])
    return values.constant(value)


def _row(
    node: ir.Node,
    weight: ir.Value,
    held: ir.TensorProtocol,
    pattern: tuple[int, int],
    dense: str,
) -> PatternLayer:
    n, m = pattern
    axis, place, rows = _axes(node, len(held.shape))
    shape = held.shape.numpy()
    groups = int(operators.attribute(node, "group", 1)) if axis == "C" else 1
    inputs = shape[place] if axis else 0
    following = _following(held, place, n, m) if axis and inputs % m == 0 else 0.0
    why = _why_not(node, (inputs, groups), following, pattern, dense)
    return PatternLayer(
        node=name_of(node),
        operator=node.op_type,
        weight=_name(weight),
        axis=axis,
        inputs=inputs,
        outputs=shape[rows] if axis else 0,
        groups=groups,
        multiple=next(each for each in _MULTIPLES if inputs % each == 0) if axis else 0,
        following=following,
        eligible=not why,
        why_not=why,
        note="" if why else _note(node, weight, inputs),
        pattern=f"{n}:{m}",
    )


def _name(weight: ir.Value) -> str:
    producer = weight.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        return (producer.inputs[0].name if producer.inputs[0] is not None else None) or ""
    return weight.name or ""


def _axes(node: ir.Node, rank: int) -> tuple[str, int, int]:
    """What the hardware reads the weight along, and which axes of the stored weight are that and the outputs."""
    if node.op_type in _CONVOLUTIONS:
        return "C", 1, 0
    if node.op_type not in _PRODUCTS:
        return "", 0, 0
    last, before = rank - 1, rank - 2
    return ("K", last, before) if operators.attribute(node, "transB", 0) else ("K", before, last)


def _following(held: ir.TensorProtocol, axis: int, n: int, m: int) -> float:
    """Share of the groups of M consecutive weights along an axis that have at most N that are not zero."""
    array = np.moveaxis(held.numpy() != 0, axis, -1)
    counts = array.reshape(-1, m).sum(-1)
    return float((counts <= n).mean())


def _why_not(
    node: ir.Node,
    extent: tuple[int, int],
    following: float,
    pattern: tuple[int, int],
    dense: str,
) -> str:
    (inputs, groups), (n, m) = extent, pattern
    if node.op_type in _OTHERS:
        return f"sparse kernels are for Conv and matrix products, not for {node.op_type}"
    if groups != 1:
        return f"a convolution of {groups} groups, which sparse kernels do not take"
    if inputs % m:
        return f"{inputs} inputs are no multiple of {m}"
    if following == 1.0:
        return ""
    told = f"{following:.1%} of its groups of {m} have at most {n} weights"
    return f"{told}: {dense}" if dense else told


def _note(node: ir.Node, weight: ir.Value, inputs: int) -> str:
    notes = []
    if inputs < LEAST_INPUTS:
        notes.append(f"fewer than {LEAST_INPUTS} inputs")
    if node.op_type in ("MatMul", "FusedMatMul"):
        notes.append("MatMul")
    producer = weight.producer()
    if producer is not None and producer.op_type == "DequantizeLinear":
        notes.append("Q/DQ")
    return "; ".join(notes)
