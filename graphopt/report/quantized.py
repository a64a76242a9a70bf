"""The table of quantised layers: how each was stored in 8 bits and what that costs, or why it stays float."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TypeAlias

from graphopt.rewrite.context import Remark, RemarkKind

Fact: TypeAlias = str | float | bool | None

_PASS, _FLOAT = "quantize-static", "stays float: "


@dataclasses.dataclass(frozen=True)
class QuantizedLayer:
    """One layer that runs on integers, or that could have.

    Attributes:
        node: the name of its first output.
        operator: its operator; "" where it stays float.
        kernel: what the runtime made of it; "" where it stays float.
        method: how the range of its input followed from the samples, or of its output where that is stored.
        clipped: fraction of those values outside the range.
        sqnr_db: signal to noise of its output, first order; None where it was not asked.
        input_sqnr_db: what the input alone costs.
        weight_sqnr_db: what the weight alone costs; None without one.
        refined: whether its weight was rounded by second moments of the input.
        raised_channels: channels whose scale was raised against saturation.
        activations: element type of its input, or of its output where that is what is stored anew; "" in float.
        weights: element type of its weight; "" without one.
        why_float: why it stays float; "" where it runs on integers.
    """

    node: str
    operator: str = ""
    kernel: str = ""
    method: str = ""
    clipped: float | None = None
    sqnr_db: float | None = None
    input_sqnr_db: float | None = None
    weight_sqnr_db: float | None = None
    refined: bool = False
    raised_channels: int = 0
    activations: str = ""
    weights: str = ""
    why_float: str = ""


def quantized_layers(remarks: Iterable[Remark]) -> tuple[QuantizedLayer, ...]:
    """A row for every layer that the pass for static integers spoke of, those on integers first."""
    found: dict[str, QuantizedLayer] = {}
    left: dict[str, QuantizedLayer] = {}
    for remark in remarks:
        if remark.pass_name != _PASS:
            continue
        if remark.facts:
            found[remark.node] = QuantizedLayer(remark.node, **dict(remark.facts))  # type: ignore[arg-type]
        elif remark.kind is RemarkKind.MISSED and remark.reason.startswith(_FLOAT):
            why = remark.reason.removeprefix(_FLOAT)
            left[remark.node] = QuantizedLayer(remark.node, why_float=why)
    return (*found.values(), *(row for name, row in left.items() if name not in found))
