"""Samples that hold no numbers: NaN and infinities leave a sample out, masks of -inf do not; all are told by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import chain
from typing import Any

import numpy as np

from graphopt.calibrate.samples import Samples
from graphopt.errors import DataError
from graphopt.rewrite import Context, RemarkKind
from graphopt.verify.feed_files import Feed
from graphopt.verify.metrics import is_float

TOLD = 3
"""Samples that are named; of others it is said how many there are."""


@dataclasses.dataclass(frozen=True)
class Screening:
    """What was seen in samples while they were read.

    Attributes:
        found: elements that are NaN or inf, and those that are -inf, by sample and input.
        empty: samples without any element.
        notes: what else was left out while samples were read.
    """

    found: dict[tuple[str, str], tuple[int, int]] = dataclasses.field(default_factory=dict)
    empty: dict[str, None] = dataclasses.field(default_factory=dict)
    notes: list[Mapping[str, None]] = dataclasses.field(default_factory=list)

    def of(self, samples: Samples) -> Samples:
        """The samples without those that hold NaN or inf, or nothing: they say nothing of ranges or noise.

        Raises:
            DataError: all of them do; the message names the first, and its input.
        """
        screened = dataclasses.replace(samples, sound=self._is_sound)
        self.notes.append(samples.notes)
        if not screened.first(1):
            raise DataError(self._why_none())
        return screened

    def _why_none(self) -> str:
        if not self.found:
            return (
                f"no calibration sample holds any element: '{next(iter(self.empty))}' has inputs of size 0 only; give "
                "samples with at least one row"
            )
        sample, name = next(iter(self.found))
        return f"every calibration sample holds NaN or infinities, first '{sample}' in the input '{name}'"

    def told(self) -> tuple[str, ...]:
        """Sentences of samples left out, of masks of -inf, and of rows too few for a batch; where there are any."""
        texts = (
            (0, "NaN or infinite", "the sample is left out", "these samples are left out"),
            (
                1,
                "-inf",
                "taken for a mask, ranges leave it out",
                "taken for masks, ranges leave them out",
            ),
        )
        found = []
        for index, what, one, many in texts:
            seen = [(key, counts[index]) for key, counts in self.found.items() if counts[index]]
            named = ", ".join(
                f"{count} in the input '{name}' of '{sample}'"
                for (sample, name), count in seen[:TOLD]
            )
            rest = f" and in {len(seen) - TOLD} more" if len(seen) > TOLD else ""
            if seen:
                found.append(
                    f"elements of calibration samples are {what}: {named}{rest}; {one if len(seen) == 1 else many}"
                )
        if self.empty:
            rest = f" and {len(self.empty) - 1} more" if len(self.empty) > 1 else ""
            found.append(
                f"calibration sample '{next(iter(self.empty))}'{rest} left out: no element in any input"
            )
        return (*found, *dict.fromkeys(chain.from_iterable(self.notes)))

    def _is_sound(self, feed: Feed) -> bool:
        if feed.values and all(map(_is_empty, feed.values.values())):
            self.empty[feed.name] = None
            return False
        counts = _counts(feed.values)
        self.found.update({(feed.name, name): each for name, each in counts.items()})
        return not any(broken for broken, _ in counts.values())


def screening_of(ctx: Context) -> Screening:
    """What all passes of a run saw in the samples: read again, they are told of once."""
    found: Screening = ctx.cache.setdefault("screened samples", Screening())
    return found


def tell_screened(ctx: Context, rule: str) -> None:
    """Warns of what was seen, unless a pass did so before."""
    known = {remark.reason for remark in ctx.remarks}
    for text in screening_of(ctx).told():
        if text not in known:
            ctx.remark(RemarkKind.WARNING, rule, "", text)


def _counts(values: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """How many elements are NaN or inf and how many -inf, of the inputs where any is."""
    found = {}
    for name, value in values.items():
        if not isinstance(value, np.ndarray) or not is_float(value.dtype):
            continue
        others = int(value.size - np.isfinite(value).sum())
        if others:
            masked = int((value == -np.inf).sum())
            found[name] = others - masked, masked
    return found


def _is_empty(value: object) -> bool:
    return isinstance(value, np.ndarray) and value.size == 0
