"""Proofs on the deployed runtime: what it fused, how far the numbers are off, how long it takes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.numerics import Numerics
from graphopt.runtime.measure import measure
from graphopt.runtime.session import OptimizationLevel, Session
from graphopt.verify import compare as comparison
from graphopt.verify.compare import Budget, OutputReport
from graphopt.verify.feed_files import Feed
from graphopt.verify.shares import share_of, without_share
from graphopt_passes.quantize.files import is_large, on_disk
from graphopt_passes.quantize.quality import (
    Change,
    Quality,
    class_rows,
    decibels,
    expected_change,
    leads_off,
    powers,
)

Wide: TypeAlias = npt.NDArray[np.float64]


_PROBE = """
<ir_version: 9, opset_import: ["" : 13]>
probe (uint8[1,64,1,1] x) => (uint8[1,1,1,1] y)
<float s = {1.0}, uint8 z = {0}, float t = {16384.0}, float[1] u = {1.0}, int8[1] o = {0}> {
 d = DequantizeLinear (x, s, z)
 e = DequantizeLinear <axis = 0> (w, u, o)
 c = Conv (d, e)
 y = QuantizeLinear (c, t, z)
}
"""


def host_saturates() -> bool:
    """Whether integer convolutions of this machine add pairs of products in 16 bits: x86 without VNNI."""
    model = load_model(_PROBE.replace("int8[1] o", "int8[1,64,1,1] w = {" + _TOPS + "}, int8[1] o"))
    session = Session(model_to_bytes(model), level=OptimizationLevel.ALL)
    found = session.run({"x": np.full((1, 64, 1, 1), 255, np.uint8)})["y"]
    return bool(found.item() != round(64 * 255 * 127 / 16384))


_TOPS = ", ".join(["127"] * 64)


class Judgement:
    """The float model on some samples, to be compared with quantised ones; of further ones, its outputs."""

    def __init__(
        self,
        model: ir.Model,
        feeds: Sequence[Feed],
        threads: int = 1,
        further: Iterable[Feed] = (),
        *,
        stated: bool = False,
    ) -> None:
        """`stated`: by what Q and DQ say, for a runtime that does not run here; else as this one deploys it."""
        self.level = OptimizationLevel.DISABLED if stated else OptimizationLevel.ALL
        self.feeds = tuple(feeds)
        self.threads = threads
        self.model = model
        session = self._session(model)
        self.outputs = [session.run(feed.values) for feed in self.feeds]
        self.classes = bool(self.outputs) and all(
            class_rows(value) is not None for value in self.outputs[0].values()
        )
        self.others = tuple(further) if self.classes else ()
        self.further = [session.run(feed.values) for feed in self.others]
        self.kept = None if is_large(model) else session

    def _session(
        self, model: ir.Model, level: OptimizationLevel = OptimizationLevel.ALL
    ) -> Session:
        with on_disk(model) as path:
            return Session(path, level=level, threads=self.threads)

    def accuracy(self, model: ir.Model, budget: Budget) -> Quality:
        """How far `model`, as deployed, is from float on the samples."""
        session = self._session(model, self.level)
        profile = without_share(comparison.profile_for(Numerics.LOSSY, budget=budget))
        reports: dict[str, list[OutputReport]] = {name: [] for name in self.outputs[0]}
        sums: dict[str, list[float]] = {}
        outputs = []
        for feed, expected in zip(self.feeds, self.outputs, strict=True):
            found = session.run(feed.values)
            outputs.append(found)
            for name, value in expected.items():
                hint = comparison.Hint(floor=_floor(self.outputs[0][name]))
                reports[name].append(comparison.compare(name, value, found[name], profile, hint))
                power = sums.setdefault(name, [0.0, 0.0])
                for index, part in enumerate(powers(value, found[name])):
                    power[index] += part
        worst = min((decibels(*each) for each in sums.values()), default=np.inf)
        passed = all(report.passed for found in reports.values() for report in found)
        metric = None
        if budget.metric is not None:
            metric = budget.metric.of(outputs, [feed.values for feed in self.feeds])
            passed &= metric >= budget.metric.least
        change = self._change(outputs)
        if passed and budget.argmax_agreement is not None:
            passed = self._keeps(session, reports, budget.argmax_agreement, change)
        return Quality(worst, passed, change, metric, self._leads(outputs))

    def _leads(self, outputs: Sequence[Mapping[str, object]]) -> tuple[float, ...]:
        """How far leads are off in each sample, of the output where they are the most; empty without classes."""
        if not self.classes:
            return ()
        each = [
            leads_off(
                [
                    (ours[name], found[name])
                    for ours, found in zip(self.outputs, outputs, strict=True)
                ]
            )
            for name in self.outputs[0]
        ]
        return tuple(max(each, key=lambda found: float(found.mean())).tolist())

    def _keeps(
        self,
        session: Session,
        reports: Mapping[str, list[OutputReport]],
        least: float,
        change: Change | None,
    ) -> bool:
        """Whether enough rows keep their greatest element: of all samples known, and by what is expected of others.

        Of two hundred rows two may differ by chance or not; how far leads are off says more.
        """
        profile = comparison.profile_for(Numerics.LOSSY, budget=comparison.Budget())
        for feed, expected in zip(self.others, self.further, strict=True):
            found = session.run(feed.values)
            for name, value in expected.items():
                reports[name].append(comparison.compare(name, value, found[name], profile))
        known = [share for each in reports.values() if (share := share_of(each)) is not None]
        if change is None:
            return min(known, default=1.0) >= least
        rows = max(sum(report.rows for report in each) for each in reports.values())
        return min(known, default=1.0) >= least and change.flips <= 1 - least + 0.5 / max(rows, 1)

    def _change(self, outputs: Sequence[Mapping[str, object]]) -> Change | None:
        """What becomes of classes, of the output where most of them change."""
        found = []
        for name in self.outputs[0]:
            rows = [class_rows(each[name]) for each in self.outputs]
            known = [row for row in rows if row is not None]
            if len(known) < len(rows) or len({row.shape[1] for row in known}) != 1:
                return None  # with outputs of other kinds, this one is rather an embedding
            others = [class_rows(each[name]) for each in outputs]
            theirs = [row for row in others if row is not None]
            ours = np.concatenate(known)
            extra = [row for each in self.further if (row := class_rows(each[name])) is not None]
            fits = [row for row in extra if row.shape[1] == ours.shape[1]]
            more = np.concatenate(fits) if fits else None
            change = expected_change(ours, np.concatenate(theirs), more)
            found += [] if change is None else [change]
        return max(found, key=lambda change: change.flips, default=None)

    def noise(self, model: ir.Model, count: int) -> float:
        """Noise over signal of the worst output on `count` samples at most; of classes, how far their leads are off.

        Of leads, the square of what they are off by on average: one sample far off is one change of class.
        """
        session = self._session(model, self.level)
        feeds, outputs = (*self.feeds, *self.others), (*self.outputs, *self.further)
        found = [session.run(feed.values) for feed in feeds[:count]]
        worst = 0.0
        for name in self.outputs[0]:
            pairs = [
                (ours[name], theirs[name]) for ours, theirs in zip(outputs, found, strict=False)
            ]
            if self.classes:
                worst = max(worst, float(leads_off(pairs).mean()) ** 2)
                continue
            power, error = np.sum([powers(*pair) for pair in pairs], axis=0)
            worst = max(worst, float(error / power) if power > 0 else 0.0)
        return worst

    def agreement(self, model: ir.Model) -> float:
        """Signal to noise in dB of what the kernels compute against what Q and DQ say: what saturation costs."""
        deployed, stated = self._session(model), self._session(model, OptimizationLevel.DISABLED)
        power = error = 0.0
        for feed in self.feeds:
            ours, theirs = stated.run(feed.values), deployed.run(feed.values)
            for name, value in ours.items():
                more = powers(value, theirs[name])
                power, error = power + more[0], error + more[1]
        return decibels(power, error)

    def race(self, model: ir.Model, seconds: float = 0.6) -> Callable[[], float]:
        """A function that says how many times faster than float `model` is, interleaved on the first sample.

        One pair of sessions may be off by several percent however often it is timed, so that each call makes new ones,
        now the one first and now the other; of large models they are made once.
        """
        values = [self.feeds[0].values] * 2
        if self.kept is None:
            held = [self._session(self.model), self._session(model)]
            return lambda: measure(held, values, seconds=seconds)[1].cpu_ratio
        turns = itertools.count()

        def fresh() -> float:
            swapped = next(turns) % 2 == 1
            pair = [model, self.model] if swapped else [self.model, model]
            found = measure([self._session(each) for each in pair], values, seconds=seconds)
            return 1 / found[1].cpu_ratio if swapped else found[1].cpu_ratio

        return fresh


def _floor(plain: object) -> float:
    """A thousandth of the scale of an output on the first sample: below it, an output is noise."""
    if not isinstance(plain, np.ndarray) or plain.dtype.kind != "f" or plain.size == 0:
        return 0.0
    return float(np.sqrt(np.mean(plain.astype(np.float64) ** 2))) * 2.0**-10
