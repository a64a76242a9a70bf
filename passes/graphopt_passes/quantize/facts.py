"""What emission goes by, and what it tells of each layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from graphopt.calibrate.formats import Format
from graphopt.calibrate.ranges import Chosen, choose, stated
from graphopt.calibrate.statistics import Statistics, empty
from graphopt_passes.quantize import weights
from graphopt_passes.quantize.overrides import Overrides
from graphopt_passes.quantize.probing import Ranging
from graphopt_passes.quantize.styles import Style


@dataclasses.dataclass(frozen=True, eq=False)
class Facts:
    """What emission goes by; the same for every trial of a run.

    Attributes:
        style: of the runtime.
        statistics: of every value that may be quantised, by name.
        overrides: what the user said of methods, ranges and formats.
        ranged: how to find the ranges of single values, where that was settled by what it does to the outputs.
        chosen: ranges found so far, by value and bits.
        moments: second moments of what layers read, by name of the layer: [K, K]; of none, rounding is to nearest.
        refined: weights rounded by them so far, by name and scales.
    """

    style: Style
    statistics: Mapping[str, Statistics]
    overrides: Overrides = dataclasses.field(default_factory=Overrides)
    ranged: Mapping[str, Ranging] = dataclasses.field(default_factory=dict)
    chosen: dict[tuple[str, int | None], Chosen] = dataclasses.field(default_factory=dict)
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

    def choice(self, name: str, bits: int | None = None) -> Chosen:
        """The range of a value."""
        if (name, bits) not in self.chosen:
            said = self.overrides.of(name)
            dtype = said.dtype or self.style.activation
            form = Format(dtype, self.style.symmetric, said.bits or bits)
            found = self.statistics.get(name, empty())
            if said.ends is not None:
                self.chosen[name, bits] = stated(found, said.ends, form)
            elif said.method is not None:
                self.chosen[name, bits] = choose(found, form, said.method)
            else:
                each = self.ranged.get(name, Ranging(self.overrides.method))
                self.chosen[name, bits] = choose(found, form, each.method, each.factor)
        return self.chosen[name, bits]


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
    """

    site: str
    op_type: str
    method: str = ""
    clipped: float = 0.0
    input_noise: float = 0.0
    weight_noise: float = 0.0
    raised: int = 0
    refined: bool = False

    @property
    def noise(self) -> float:
        """How much of the output is noise, first order."""
        return self.input_noise + self.weight_noise
