"""What emission goes by, and what it tells of each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt.calibrate.formats import Format
from graphopt.calibrate.ranges import Chosen, choose, stated
from graphopt.calibrate.statistics import Statistics, empty
from graphopt_passes.quantize import weights
from graphopt_passes.quantize.kinds import BYTES
from graphopt_passes.quantize.mixed import Mixed
from graphopt_passes.quantize.overrides import Override, Overrides
from graphopt_passes.quantize.probing import Ranging
from graphopt_passes.quantize.styles import Style


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """What emission goes by; the same for every trial of a run.

    Attributes:
        style: of the runtime.
        statistics: of every value that may be quantised, by name.
        overrides: what the user said of methods, ranges and formats.
        mixed: what they say of layers of the graph.
        ranged: how to find the ranges of single values, where that was settled by what it does to the outputs.
        chosen: ranges found so far, by value, bits and element type.
        moments: second moments of what layers read, by name of the layer: [K, K]; of none, rounding is to nearest.
        refined: weights rounded by them so far, by name and scales.
    """

    style: Style
    statistics: Mapping[str, Statistics]
    overrides: Overrides = dataclasses.field(default_factory=Overrides)
    mixed: Mixed = dataclasses.field(default_factory=Mixed)
    ranged: Mapping[str, Ranging] = dataclasses.field(default_factory=dict)
    chosen: dict[tuple[str, int | None, ir.DataType | None], Chosen] = dataclasses.field(
        default_factory=dict
    )
    moments: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    refined: dict[tuple[str, bytes], weights.Packed] = dataclasses.field(default_factory=dict)

    def refine(self, name: str, rows: np.ndarray, packed: weights.Packed) -> weights.Packed:
        """A weight rounded by second moments where they are known."""
        moments = self.moments.get(name)
        if moments is None or moments.shape[0] != rows.shape[1]:
            return packed
        key = (name, packed.scales.tobytes())
        if key not in self.refined:
            self.refined[key] = weights.refined(rows, packed, moments)
        return self.refined[key]

    def said(self, name: str) -> Override:
        """What the user said of a value, or of layers that read or make it."""
        return self.mixed.values.get(name, Override()).with_stated(self.overrides.of(name))

    def kind(self, name: str) -> ir.DataType:
        """The element type in which a value is stored."""
        return self.said(name).dtype or self.style.activation

    def weight(self, name: str) -> ir.DataType:
        """The element type of the weight of a layer."""
        return self.mixed.weights.get(name, self.style.weight)

    def symmetric_weight(self, *names: str) -> bool:
        """Whether the weight of a layer of these names has no zero points."""
        said = self.overrides.of(*names).symmetric_weights
        return self.style.symmetric_weights if said is None else said

    def choice(
        self, name: str, bits: int | None = None, dtype: ir.DataType | None = None
    ) -> Chosen:
        """The range of a value, as it is stored or in another element type."""
        key = (name, bits, dtype)
        if key not in self.chosen:
            said, kind = self.said(name), dtype or self.kind(name)
            used = (said.bits or bits) if kind in BYTES else None
            symmetric = self.style.symmetric if said.symmetric is None else said.symmetric
            form = Format(kind, symmetric, used)
            found = self.statistics.get(name, empty())
            if said.ends is not None:
                self.chosen[key] = stated(found, said.ends, form)
            elif said.method is not None:
                self.chosen[key] = choose(found, form, said.method)
            else:
                each = self.ranged.get(name, Ranging(self.overrides.method))
                self.chosen[key] = choose(found, form, each.method, each.factor)
        return self.chosen[key]


@dataclasses.dataclass(frozen=True)
class Layer:
    """What was done to one node, for reports.

    Attributes:
        site: the name of its first output.
        op_type: the operator.
        method: how the range of its input was found, or of its output where that is what is stored anew.
        clipped: fraction of those values outside the range.
        input_noise: of them, relative to their power.
        weight_noise: of the weight, relative to its power.
        raised: rows of the weight whose scale was raised against saturation.
        refined: whether the weight was rounded by second moments of the input.
        activations: element type of its input, or of its output where that is what is stored anew.
        weights: element type of its weight; "" without one.
    """

    site: str
    op_type: str
    method: str = ""
    clipped: float = 0.0
    input_noise: float = 0.0
    weight_noise: float = 0.0
    raised: int = 0
    refined: bool = False
    activations: str = "uint8"
    weights: str = ""

    @property
    def noise(self) -> float:
        """How much of the output is noise, first order."""
        return self.input_noise + self.weight_noise
