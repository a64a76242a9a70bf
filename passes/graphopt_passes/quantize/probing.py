"""Ranges of single values by what they do to the outputs of the model.

The squared error of a value says little of what an outlier is worth: one value of lprnet wants a range that clips a
thousandth of it, the last ones of a classifier want every extreme.  So each value is stored in 8 bits by itself, in a
model that is float elsewhere, and the range is kept that disturbs the outputs the least.  Only what lies behind the
value is run for that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibrate.formats import Parameters
from graphopt.calibrate.ranges import Method
from graphopt.verify.feed_files import Feed
from graphopt_passes.quantize.quality import leads_off, powers
from graphopt_passes.quantize.suffixes import Suffixes

Wide: TypeAlias = npt.NDArray[np.float64]

METHODS = (Method.BEST, Method.MIN_MAX, Method.PERCENTILE, Method.MOVING_AVERAGE)
"""Ranges that a search starts from."""

FACTORS = (0.5, 0.8, 1.25)
"""What the ends are multiplied with from one trial to the next: at first in strides, that chance does not hide."""

SEARCHED = 0.02
"""Share of all noise from which on a value is worth a search."""

STEPS = 6
"""How often the ends of one value are moved in one direction."""

SURE, LEAST = 1.5, 0.03
"""Standard errors, and share of what there was, by which noise must fall for another range to be taken."""

TRIALS = 3.0
"""How often each sample is run for each value, on average: what a probe takes."""


@dataclasses.dataclass(frozen=True)
class Ranging:
    """How the range of one value is found."""

    method: Method
    factor: float = 1.0


Resolve = Callable[[str, Ranging], Parameters]
"""The parameters of a value under a ranging."""


class Probe:
    """What the outputs lose when single values come back from the format in which they are stored."""

    def __init__(
        self, model: ir.Model, names: Sequence[str], feeds: Iterable[Feed], *, classes: bool
    ) -> None:
        self.classes = classes
        self.suffixes = Suffixes(model, names, [feed.values for feed in feeds])
        self.plain = self.suffixes.outputs

    def at(self, name: str) -> Callable[[Parameters], Wide]:
        """The amplitude of the noise of each sample, summed over the outputs, with this value stored so."""
        suffix = self.suffixes.behind(name)

        def noise(given: Parameters) -> Wide:
            found = [
                suffix.run(index, _stored(value, given))
                for index, value in enumerate(suffix.values)
            ]
            total = np.zeros(len(found))
            for output in found[0] if found else ():
                pairs = [
                    (ours[output], theirs[output])
                    for ours, theirs in zip(self.plain, found, strict=True)
                ]
                total += leads_off(pairs) if self.classes else _relative(pairs)
            return total

        return noise


def _stored(value: npt.NDArray[Any], given: Parameters) -> npt.NDArray[Any]:
    """A value as it comes back from integers, in its own precision."""
    first, last = given.format.codes
    with np.errstate(over="ignore"):  # masks are beyond any range
        codes = np.rint(value / np.float32(given.scale))
    codes += np.float32(given.zero_point)
    np.clip(codes, first, last, out=codes)
    codes -= np.float32(given.zero_point)
    codes *= np.float32(given.scale)
    return np.asarray(codes)


def _relative(pairs: Sequence[tuple[Any, Any]]) -> Wide:
    """Noise of each sample over the mean signal."""
    each = np.array([powers(*pair) for pair in pairs])
    signal = each[:, 0].mean()
    return np.sqrt(each[:, 1] / signal) if signal > 0 else np.zeros(len(each))


def search(probe: Probe, names: Sequence[str], resolve: Resolve) -> dict[str, Ranging]:
    """How to find the ranges of those values whose noise matters, where that lowers it."""
    start = Ranging(Method.BEST)
    noise = {name: probe.at(name)(resolve(name, start)) for name in names}
    least = SEARCHED * sum(each.sum() for each in noise.values())
    found: dict[str, Ranging] = {}
    for name in names:
        if noise[name].sum() <= least:
            continue
        stored = probe.at(name)

        def asked(
            each: Ranging, name: str = name, stored: Callable[[Parameters], Wide] = stored
        ) -> Wide:
            return stored(resolve(name, each))

        best = _line(asked, noise[name])
        if best != start:
            found[name] = best
    return found


def _line(noise: Callable[[Ranging], Wide], plain: Wide) -> Ranging:
    """The best method, then its ends moved inwards or outwards, as long as that helps beyond chance."""
    start = best = Ranging(Method.BEST)
    tried = {start: plain}
    for each in map(Ranging, METHODS[1:]):
        tried[each] = noise(each)
        if _is_less(tried[each], tried[start]) and tried[each].sum() < tried[best].sum():
            best = each
    for factor in FACTORS:
        for _ in range(STEPS):
            further = dataclasses.replace(best, factor=best.factor * factor)
            if further in tried:
                break
            tried[further] = noise(further)
            if not _is_less(tried[further], tried[best]):
                break
            best = further
    return best


def _is_less(noise: Wide, other: Wide) -> bool:
    """Whether noise is less, by more than chance: samples vary, and a range shall serve those to come."""
    saved = other - noise
    spread = float(np.sqrt(((saved - saved.mean()) ** 2).sum()))
    return float(saved.sum()) > max(SURE * spread, LEAST * float(other.sum()))
