"""Channels scaled so that one range serves them all: what a layer gains the next one takes back.

Before:  y = Conv2(Relu(Conv1(x, W1, b1)), W2)
After:   y = Conv2(Relu(Conv1(x, s W1, s b1)), W2 / s)

Relu, pooling and concatenation let a positive factor through, and so does the sum of a residual net where all of its
terms carry it.  A Clip lets it through up to the factor at which its bound is reached, because nothing beyond the
calibrated maximum is stored anyway.  Behind a normalisation the same is called SmoothQuant.

Source: Nagel et al. 2019 (Data-Free Quantization), Xiao et al. 2022 (SmoothQuant); the exponent by predicted noise.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibrate.statistics import Statistics
from graphopt.ir import operators, values
from graphopt.ir.build import Names
from graphopt.rewrite import name_of
from graphopt_passes.quantize.files import outside
from graphopt_passes.quantize.lanes import Lane, Reader, Space, trace
from graphopt_passes.quantize.reading import is_turned

Wide: TypeAlias = npt.NDArray[np.float64]

EXPONENTS = (0.25, 0.5, 0.75, 1.0)
"""How much of the difference between channels to take away: more helps activations, less helps weights."""

GAIN = 0.9
"""What the predicted noise must fall to for a space to be scaled: a prediction is not worth less than that."""

LARGEST = 1e4


class Measure(enum.StrEnum):
    """By what channels are compared."""

    PEAK = "peak"
    """The largest magnitude seen: what a range must hold."""

    POWER = "power"
    """The root of the mean square: it depends less on which samples were seen."""


@dataclasses.dataclass(frozen=True, eq=False)
class Scaling:
    """One constant operand to be multiplied.

    Attributes:
        node: name of the node that reads it.
        index: of the operand.
        factors: to multiply with, as an array that broadcasts.
    """

    node: str
    index: int
    factors: Wide


def plan(
    graph: ir.Graph, statistics: Mapping[str, Statistics], measure: Measure = Measure.PEAK
) -> tuple[Scaling, ...]:
    """The scalings that lower the noise of 8-bit layers, by what closed forms say of it."""
    lanes, spaces = trace(graph)
    factors: dict[Space, Wide] = {}
    for space in spaces:
        found = _factors(space, lanes, statistics, factors, measure)
        if found is not None:
            factors[space] = found
    return tuple(each for space, s in factors.items() for each in _scalings(space, s))


def apply(graph: ir.Graph, scalings: Sequence[Scaling], names: Names) -> None:
    """Multiplies the constants; a constant that others read too is copied."""
    by_node: dict[str, list[Scaling]] = {}
    for each in scalings:
        by_node.setdefault(each.node, []).append(each)
    for node in graph:
        for each in by_node.get(name_of(node), ()):
            value = node.inputs[each.index]
            array = values.array(value)
            assert array is not None
            assert value is not None
            scaled = (array.astype(np.float64) * each.factors).astype(array.dtype)
            tensor = outside(scaled, names.fresh(f"{value.name}_scaled"))
            held = ir.Value(
                name=tensor.name, type=value.type, shape=ir.Shape(scaled.shape), const_value=tensor
            )
            graph.register_initializer(held)
            node.replace_input_with(each.index, held)
            owner = value.graph
            if value.is_initializer() and not value.uses() and owner is not None:
                owner.initializers.pop(value.name or "")


def _factors(
    space: Space,
    lanes: Mapping[ir.Value, Lane],
    statistics: Mapping[str, Statistics],
    others: Mapping[Space, Wide],
    measure: Measure,
) -> Wide | None:
    """The factors of one space, or None where they would not pay."""
    peaks = _peaks(space, lanes, statistics, measure)
    if peaks is None or not space.readers:
        return None
    relative, limit = peaks
    readers = [Reading.of(reader, lanes, statistics, others) for reader in space.readers]
    known = [each for each in readers if each is not None]
    if len(known) < len(readers):
        return None
    return best_factors(space, known, relative, limit, GAIN)


def best_factors(
    space: Space, readers: Sequence[Reading], relative: Wide, limit: Wide, gain: float
) -> Wide | None:
    """The factors that lower the predicted noise of what reads a space the most; None if not to `gain` of what it is.

    Args:
        space: whose channels are scaled.
        readers: all that read them.
        relative: magnitude of each channel over that of the largest.
        limit: the largest factor of each.
        gain: the share of the noise that may be left.
    """
    plain = sum(each.noise(space, np.ones(space.size)) for each in readers)
    best, chosen = plain * gain, None
    for exponent in EXPONENTS:
        factors = np.where(relative > 0, np.maximum(relative, 1e-30) ** -exponent, 1.0)
        factors = np.minimum(np.minimum(factors, LARGEST), limit)
        noise = sum(each.noise(space, factors) for each in readers)
        if noise < best:
            best, chosen = noise, factors
    return chosen


def _peaks(
    space: Space,
    lanes: Mapping[ir.Value, Lane],
    statistics: Mapping[str, Statistics],
    measure: Measure,
) -> tuple[Wide, Wide] | None:
    """Of each channel its magnitude over that of the largest, and the largest factor that bounds let through."""
    relative, limit = np.zeros(space.size), np.full(space.size, np.inf)
    seen = False
    for value in space.values:
        found = statistics.get(value.name or "")
        ends = None if found is None else found.channel_ranges(lanes[value].axis)
        if ends is None or len(ends[0]) != space.size:
            if value in space.bounds:
                return None
            continue
        peak = np.maximum(-ends[0], ends[1])
        if peak.max(initial=0.0) <= 0:
            return None
        seen = True
        size = peak if measure is Measure.PEAK else _root(found, lanes[value].axis, peak)
        relative = np.maximum(relative, size / size.max())
        if value in space.bounds:
            bound = space.bounds[value]
            limit = np.minimum(limit, bound / np.maximum(peak, bound / LARGEST))
    return (relative, np.maximum(limit, 1.0)) if seen else None


def _root(found: Statistics | None, axis: int, peak: Wide) -> Wide:
    """Root mean squares of channels; their peaks where they are not known."""
    powers = None if found is None else found.channel_powers(axis)
    return peak if powers is None or powers.max(initial=0.0) <= 0 else np.sqrt(powers)


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """What the noise of one reader is predicted from.

    Attributes:
        lane: of the channels that it reads.
        peaks: largest magnitude of each: [channels].
        powers: mean square of each: [channels].
        columns: squared weights by channel, summed over rows and taps: [channels].
        weights: largest magnitudes of weights: [rows, channels]; of a depthwise convolution [channels, 1].
        depthwise: whether a channel has a scale of its own in the weight.
        already: factors of other spaces that are settled: [channels].
    """

    lane: Lane
    peaks: Wide
    powers: Wide
    columns: Wide
    weights: Wide
    depthwise: bool
    already: Wide

    @classmethod
    def of(
        cls,
        reader: Reader,
        lanes: Mapping[ir.Value, Lane],
        statistics: Mapping[str, Statistics],
        others: Mapping[Space, Wide],
    ) -> Reading | None:
        """What is known of a reader; None where something is not."""
        value = reader.node.inputs[0]
        assert value is not None
        lane, found = lanes[value], statistics.get(value.name or "")
        ends = None if found is None else found.channel_ranges(lane.axis)
        powers = None if found is None else found.channel_powers(lane.axis)
        if ends is None or powers is None:
            return None
        weight, depthwise = _by_channel(reader.node)
        size = sum(space.size for space in lane.spaces) * lane.repeat
        if len(ends[0]) != size or len(powers) != size or weight.shape[1] * weight.shape[0] == 0:
            return None
        already = np.concatenate(
            [np.repeat(others.get(s, np.ones(s.size)), lane.repeat) for s in lane.spaces]
        )
        peaks = np.maximum(-ends[0], ends[1])
        columns = (weight**2).sum(axis=(0, 2))
        return cls(lane, peaks, powers, columns, np.abs(weight).max(axis=2), depthwise, already)

    def noise(self, space: Space, factors: Wide) -> float:
        """Noise of the output over its power, were the space scaled so."""
        scaled = np.concatenate(
            [
                np.repeat(factors, self.lane.repeat) if s is space else part
                for s, part in zip(self.lane.spaces, self._parts(), strict=True)
            ]
        )
        step = (self.peaks * scaled).max() / 255
        activation = step**2 / 12 * (self.columns / scaled**2).sum()
        weight = 0.0
        if not self.depthwise:  # there a row is a channel, and its scale follows
            steps = (self.weights / scaled).max(axis=1) / 127
            weight = (steps**2).sum() / 12 * (scaled**2 * self.powers).sum()
        power = float((self.columns * self.powers).sum())
        return float(activation + weight) / power if power > 0 else 0.0

    def _parts(self) -> list[Wide]:
        sizes = [space.size * self.lane.repeat for space in self.lane.spaces]
        return np.split(self.already, np.cumsum(sizes)[:-1])


def _by_channel(node: ir.Node) -> tuple[Wide, bool]:
    """The weight as [rows, channels, taps], and whether each channel has rows of its own."""
    array = values.array(node.inputs[1])
    assert array is not None
    wide = array.astype(np.float64)
    if node.op_type == "Conv":
        group = operators.attribute(node, "group", 1)
        if group == 1:
            return wide.reshape(*wide.shape[:2], -1), False
        rows, width = wide.shape[:2]
        # One row for all: sums and maxima by channel are what is asked for.
        grouped = wide.reshape(group, rows // group, width, -1)
        turned = grouped.transpose(1, 3, 0, 2).reshape(1, -1, group * width)
        return turned.transpose(0, 2, 1), width == 1
    return (wide if is_turned(node) else wide.T)[:, :, None], False


def _scalings(space: Space, factors: Wide) -> list[Scaling]:
    """What to multiply so that a space carries its factors, and its readers take them back."""
    found = []
    for maker in space.makers:
        for index, axis in maker.operands:
            value = maker.node.inputs[index]
            assert value is not None
            assert value.const_value is not None or values.array(value) is not None
            found.append(Scaling(name_of(maker.node), index, _along(factors, value, axis)))
    for reader in space.readers:
        inverse = np.repeat(1 / factors, reader.repeat)
        found.append(Scaling(name_of(reader.node), 1, taken_back(reader, inverse)))
    return found


def _along(factors: Wide, value: ir.Value, axis: int) -> Wide:
    tensor = values.constant(value)
    assert tensor is not None
    shape = [1] * len(tensor.shape)
    if shape:
        shape[axis] = -1
    return factors.reshape(shape)


def taken_back(reader: Reader, inverse: Wide) -> Wide:
    """Factors for the columns of a weight that read one space; the others keep theirs."""
    node = reader.node
    tensor = values.constant(node.inputs[1])
    assert tensor is not None
    shape = tuple(tensor.shape.numpy())
    group = operators.attribute(node, "group", 1) if node.op_type == "Conv" else 1
    turned = is_turned(node)
    columns = shape[1] * group if node.op_type == "Conv" or turned else shape[0]
    whole = np.ones(columns)
    whole[reader.offset : reader.offset + len(inverse)] = inverse
    if node.op_type != "Conv":
        return whole[None, :] if turned else whole[:, None]
    rows = np.repeat(whole.reshape(group, shape[1]), shape[0] // group, axis=0)
    return rows.reshape(*rows.shape, *[1] * (len(shape) - 2))
