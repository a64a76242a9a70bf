"""Whether a candidate's output may stand for the reference's: gates by numerics class, reports in numbers."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import OptionError
from graphopt.numerics import Numerics
from graphopt.verify import metrics, shares

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from graphopt.verify.metrics import Array, Metrics


@dataclasses.dataclass(frozen=True)
class Metric:
    """A measure of the user's.

    Attributes:
        name: as the user wrote it, `module:function`.
        value: from outputs, one mapping by name a sample, and feeds, the same, to a number: more is better.
        least: what it must reach.
    """

    name: str
    value: Callable[[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]], float]
    least: float

    def of(self, outputs: Sequence[Mapping[str, Any]], feeds: Sequence[Mapping[str, Any]]) -> float:
        """What the function says of these outputs.

        Raises:
            OptionError: it fails or returns no number.
        """
        try:
            found = float(self.value(outputs, feeds))
        except Exception as error:  # the user's function may raise anything
            known = ", ".join(map(repr, outputs[0])) if outputs else "none"
            raise OptionError(
                f"--budget: the metric {self.name} fails: {type(error).__name__}: {error}; it is given outputs and "
                f"feeds, one mapping by name a sample each (outputs: {known}), and returns a number"
            ) from error
        if math.isnan(found):
            raise OptionError(
                f"--budget: the metric {self.name} gives NaN on {len(feeds)} samples, which is neither enough nor too "
                "little: does it divide by how many samples have a label?"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Budget:
    """How much a LOSSY result may differ; None does not gate.

    Attributes:
        max_over_rms: greatest difference over the RMS of the reference.
        sqnr_db: least signal to quantisation noise ratio.
        cosine: least cosine.
        argmax_agreement: least fraction of rows whose greatest element is the same; of all feeds together.
        agreement: least fraction of equal elements in integer, bool and string outputs.
        metric: a function of the user's and what it must reach; asked by passes that decide by samples.
    """

    max_over_rms: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    argmax_agreement: float | None = None
    agreement: float | None = 0.99
    metric: Metric | None = None


FP16 = Budget(max_over_rms=1e-2, sqnr_db=40, cosine=0.9999)
BF16 = Budget(max_over_rms=6e-2, sqnr_db=25, cosine=0.999)
INT8 = Budget(sqnr_db=20, cosine=0.99, argmax_agreement=0.99)


@dataclasses.dataclass(frozen=True)
class Profile:
    """The gate for every output of one verification.

    EXACT: equal dtype, shape and bits; -0 and +0 differ, every NaN equals every NaN.
    REORDERED: each element within tolerance * (RMS of the reference + |reference|); integers equal,
        except where the graph makes them by rounding or ranking (see `Origin`).
    LOSSY: the budget; `tolerance` then serves ranks and what is reported as outside.
    """

    name: str
    numerics: Numerics
    tolerance: float
    budget: Budget | None = None


_STEP = {ir.DataType.FLOAT16: (1e-3, 1e-2), ir.DataType.BFLOAT16: (8e-3, 6e-2)}
"""Tolerance at depth 1 and its cap: about one unit in the last place for the half-width floats."""


def profile_for(
    numerics: Numerics,
    *,
    depth: int = 1,
    dtype: ir.DataType = ir.DataType.FLOAT,
    budget: Budget | None = None,
) -> Profile:
    """The gate of a numerics class.

    Args:
        numerics: what the passes declared.
        depth: arithmetic nodes on the longest path: REORDERED tolerates 1e-5 * sqrt(depth), at most
            1e-4, because independent roundings add up as a random walk.
        dtype: the narrowest float dtype that the model computes in; sets the step of REORDERED.
        budget: of LOSSY; `FP16` by default.
    """
    if numerics is Numerics.EXACT:
        return Profile("exact", numerics, 0.0)
    step, cap = _STEP.get(dtype, (1e-5, 1e-4))
    tolerance = min(step * math.sqrt(max(depth, 1)), cap)
    if numerics is Numerics.REORDERED:
        return Profile("reordered", numerics, tolerance)
    budget = budget or FP16
    return Profile("lossy", numerics, budget.max_over_rms or cap, budget)


class Origin(enum.Enum):
    """How a graph makes an output, where that decides what equality means."""

    VALUE = "value"
    RANK = "rank"  # positions chosen by score: ArgMax, ArgMin, TopK
    ROUNDED = "rounded"  # integers rounded from floats: QuantizeLinear, Round, Cast
    BOXES = "boxes"  # rows in an order that ties decide: NonMaxSuppression


@dataclasses.dataclass(frozen=True)
class Hint:
    """What is known of an output besides its value.

    Attributes:
        origin: how it is made.
        scores: for RANK: what the reference ranked.
        axis: for RANK: along which axis.
        floor: least scale of the output: keeps rounding noise around zero from being read as signal.
    """

    origin: Origin = Origin.VALUE
    scores: Array | None = None
    axis: int = 0
    floor: float = 0.0


@dataclasses.dataclass(frozen=True)
class OutputReport:
    """One output compared; every number is finite or None, so that it can be written as JSON.

    Attributes:
        name: of the output.
        passed: whether the profile accepts it.
        equal: whether every bit is the same.
        elements: compared in all.
        max_abs, max_over_rms, sqnr_db, cosine: see `metrics.Metrics`; None where they say nothing
            (not numeric; sqnr_db also where nothing differs).
        ulp_p99, ulp_max: distance in units in the last place of the output's dtype.
        outside: fraction of elements outside the tolerance of the profile.
        agreement: fraction of equal elements of an integer, bool or string output.
        argmax_agreement, topk_agreement: of rows as `metrics.ranked_rows` has them; the latter of the worst feed.
        rows: how many.
        nonfinite_equal: NaN, +inf and -inf sit in the same places.
        why: what failed or was forgiven; empty where nothing is to be said.
        feed: the feed that the worst case came from.
    """

    name: str
    passed: bool
    equal: bool
    elements: int = 0
    max_abs: float | None = None
    max_over_rms: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    ulp_p99: int | None = None
    ulp_max: int | None = None
    outside: float | None = None
    agreement: float | None = None
    argmax_agreement: float | None = None
    topk_agreement: float | None = None
    rows: int = 0
    nonfinite_equal: bool = True
    why: str = ""
    feed: str = ""


def compare(
    name: str,
    reference: object,
    candidate: object,
    profile: Profile,
    hint: Hint | None = None,
) -> OutputReport:
    """Compares one output: arrays directly, sequences, maps and optionals element by element."""
    hint = hint or Hint()
    pairs = list(_leaves("", reference, candidate))
    reports = [_compare_leaf(path, ref, cand, profile, hint) for path, ref, cand in pairs]
    if not reports:
        return OutputReport(name, passed=True, equal=True)
    return dataclasses.replace(merge(reports), name=name)


def merge(reports: Sequence[OutputReport]) -> OutputReport:
    """The worst of several reports on one output: each number at its worst, the words of the first failure."""
    first = next((r for r in reports if not r.passed), None)
    told = first or next((r for r in reports if r.why), reports[0])
    return OutputReport(
        told.name,
        passed=first is None,
        equal=all(r.equal for r in reports),
        elements=sum(r.elements for r in reports),
        max_abs=_worst(max, (r.max_abs for r in reports)),
        max_over_rms=_worst(max, (r.max_over_rms for r in reports)),
        sqnr_db=_worst(min, (r.sqnr_db for r in reports)),
        cosine=_worst(min, (r.cosine for r in reports)),
        ulp_p99=_worst(max, (r.ulp_p99 for r in reports)),
        ulp_max=_worst(max, (r.ulp_max for r in reports)),
        outside=_worst(max, (r.outside for r in reports)),
        agreement=_worst(min, (r.agreement for r in reports)),
        argmax_agreement=shares.share_of(reports),
        topk_agreement=_worst(min, (r.topk_agreement for r in reports)),
        rows=sum(r.rows for r in reports),
        nonfinite_equal=all(r.nonfinite_equal for r in reports),
        why=told.why,
        feed=told.feed if told.why else _worst_feed(reports),
    )


def _worst(pick: Any, values: Iterable[Any]) -> Any:  # noqa: ANN401
    known = [value for value in values if value is not None]
    return pick(known) if known else None


def _worst_feed(reports: Sequence[OutputReport]) -> str:
    return max(reports, key=lambda r: (r.max_over_rms or 0.0, -(r.agreement or 1.0))).feed


def _leaves(path: str, reference: Any, candidate: Any) -> Iterator[tuple[str, Any, Any]]:  # noqa: ANN401
    """Pairs of arrays (or of whatever does not correspond), with their place in the nested value."""
    if (
        isinstance(reference, list)
        and isinstance(candidate, list)
        and len(reference) == len(candidate)
    ):
        for index, (ref, cand) in enumerate(zip(reference, candidate, strict=True)):
            yield from _leaves(f"{path}[{index}]", ref, cand)
    elif (
        isinstance(reference, dict)
        and isinstance(candidate, dict)
        and list(reference) == list(candidate)
    ):
        yield from _leaves(
            f"{path}.values", np.array([*reference.values()]), np.array([*candidate.values()])
        )
    elif reference is None and candidate is None:
        return
    else:
        yield path, reference, candidate


def _compare_leaf(
    path: str, reference: object, candidate: object, profile: Profile, hint: Hint
) -> OutputReport:
    if not (isinstance(reference, np.ndarray) and isinstance(candidate, np.ndarray)):
        return _mismatch(
            f"{path}: {_describe(reference)} against {_describe(candidate)}".lstrip(": ")
        )
    if reference.dtype != candidate.dtype:
        return _mismatch(f"dtype {candidate.dtype}, the reference has {reference.dtype}")
    if hint.origin is Origin.BOXES and reference.ndim == 2:
        return _compare_rows(reference, candidate, profile)
    if reference.shape != candidate.shape:
        return _mismatch(
            f"shape {list(candidate.shape)}, the reference has {list(reference.shape)}"
        )
    differs_at = metrics.same_bits(reference, candidate)
    if differs_at is None:
        return _identical(reference)
    if metrics.is_float(reference.dtype):
        return _compare_floats(reference, candidate, profile, hint)
    return _compare_discrete(reference, candidate, profile, hint, differs_at)


def _mismatch(why: str) -> OutputReport:
    return OutputReport("", passed=False, equal=False, nonfinite_equal=False, why=why)


def _describe(value: Any) -> str:  # noqa: ANN401
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, list):
        return f"a sequence of {len(value)}"
    if isinstance(value, dict):
        return f"a map with keys {list(value)[:8]}"
    return "nothing" if value is None else type(value).__name__


def _identical(array: Array) -> OutputReport:
    if array.dtype.kind in "OUSb":
        return OutputReport("", passed=True, equal=True, elements=array.size, agreement=1.0)
    is_float = metrics.is_float(array.dtype)
    rows = metrics.ranked_rows(array) if is_float and array.dtype.kind != "c" else 0
    return OutputReport(
        "",
        passed=True,
        equal=True,
        elements=array.size,
        max_abs=0.0,
        max_over_rms=0.0,
        cosine=1.0,
        ulp_p99=0 if is_float else None,
        ulp_max=0 if is_float else None,
        outside=0.0,
        agreement=None if is_float else 1.0,
        argmax_agreement=1.0 if rows else None,
        rows=rows,
    )


def _compare_floats(
    reference: Array, candidate: Array, profile: Profile, hint: Hint
) -> OutputReport:
    measured = metrics.measure(reference, candidate, tolerance=profile.tolerance, floor=hint.floor)
    ulps = metrics.ulps(reference, candidate)
    is_complex = reference.dtype.kind == "c"
    argmax, top = (None, None) if is_complex else metrics.rank_agreement(reference, candidate)
    why = _float_failure(reference, candidate, measured, profile, hint.floor)
    if not why and profile.budget is not None and profile.budget.argmax_agreement is not None:
        least = profile.budget.argmax_agreement
        low = argmax is not None and argmax < least
        why = f"argmax agreement {argmax:.4g} < {least:g}" if low else ""
    return OutputReport(
        "",
        passed=not why,
        equal=False,
        elements=reference.size,
        max_abs=_finite(measured.max_abs),
        max_over_rms=_finite(measured.max_over_rms),
        sqnr_db=_finite(measured.sqnr_db),
        cosine=_finite(measured.cosine),
        ulp_p99=ulps[0] if ulps else None,
        ulp_max=ulps[1] if ulps else None,
        outside=measured.outside,
        argmax_agreement=argmax,
        topk_agreement=top,
        rows=0 if argmax is None else metrics.ranked_rows(reference),
        nonfinite_equal=measured.nonfinite_at is None,
        why=why,
    )


def _float_failure(
    reference: Array, candidate: Array, m: Metrics, profile: Profile, floor: float
) -> str:
    """Why the profile refuses a float output; empty where it does not."""
    parts = 2 if reference.dtype.kind == "c" else 1  # complex arrays are measured as pairs of reals
    if m.nonfinite_at is not None:
        return _at("non-finite values differ", m.nonfinite_at // parts, reference, candidate)
    if profile.numerics is Numerics.EXACT:
        index = metrics.same_bits(reference, candidate)
        return _at("not bit-equal", index or 0, reference, candidate)
    if profile.budget is not None:
        return _budget_failure(m, profile.budget, floor)
    if m.outside == 0:
        return ""
    what = f"{m.outside:.3g} of the elements are outside {profile.tolerance:.2g} * (RMS {m.rms:.3g} + |reference|)"
    return _at(what, (m.worst_at or 0) // parts, reference, candidate)


def _budget_failure(m: Metrics, budget: Budget, floor: float) -> str:
    scale = max(m.rms, floor)
    ratio = 0.0 if m.max_abs == 0 else m.max_abs / scale if scale > 0 else math.inf
    if budget.max_over_rms is not None and ratio > budget.max_over_rms:
        return f"max|d|/RMS {ratio:.3g} > {budget.max_over_rms:g}"
    sqnr = metrics.decibels(scale, m.error_rms)
    if budget.sqnr_db is not None and sqnr < budget.sqnr_db:
        return f"SQNR {sqnr:.1f} dB < {budget.sqnr_db:g} dB"
    # Below the floor the direction of the vector is noise.
    if budget.cosine is not None and m.rms >= floor and m.cosine < budget.cosine:
        return f"cosine {m.cosine:.6f} < {budget.cosine:g}"
    return ""


def _compare_discrete(
    reference: Array, candidate: Array, profile: Profile, hint: Hint, differs_at: int
) -> OutputReport:
    agreement = float(np.count_nonzero(reference == candidate)) / reference.size
    numeric = reference.dtype.kind not in "OUSb"
    measured = metrics.measure(reference, candidate, tolerance=0.0, floor=0.0) if numeric else None
    forgiven = ""
    if profile.numerics is not Numerics.EXACT:
        forgiven = _forgiven(reference, candidate, profile, hint, agreement)
    where = _at(f"{1 - agreement:.3g} of the elements differ", differs_at, reference, candidate)
    return OutputReport(
        "",
        passed=bool(forgiven),
        equal=False,
        elements=reference.size,
        max_abs=_finite(measured.max_abs) if measured else None,
        max_over_rms=_finite(measured.max_over_rms) if measured else None,
        sqnr_db=_finite(measured.sqnr_db) if measured else None,
        cosine=_finite(measured.cosine) if measured else None,
        agreement=agreement,
        why=forgiven or where,
    )


ROUNDED_FLIPS = 0.01
"""Fraction of rounded integers that REORDERED lets differ by one: values on the edge between two codes."""


def _forgiven(
    reference: Array, candidate: Array, profile: Profile, hint: Hint, agreement: float
) -> str:
    """Why integers that differ are accepted; empty where they are not."""
    if (
        hint.origin is Origin.RANK
        and hint.scores is not None
        and _ties(reference, candidate, profile, hint)
    ):
        return f"{1 - agreement:.3g} of the positions differ, all between scores equal within the tolerance"
    if hint.origin is Origin.ROUNDED and reference.dtype.kind in "iuV":
        step = np.abs(reference.astype(np.float64) - candidate.astype(np.float64)).max(initial=0.0)
        if step <= 1 and 1 - agreement <= ROUNDED_FLIPS:
            return f"{1 - agreement:.3g} of the rounded integers differ by one"
    budget = profile.budget
    if budget is None:
        return ""
    if hint.origin is Origin.ROUNDED and reference.dtype.kind in "iuV":
        measured = metrics.measure(reference, candidate, tolerance=0.0, floor=0.0)
        return (
            "" if _budget_failure(measured, budget, 0.0) else "rounded integers within the budget"
        )
    if budget.agreement is not None and agreement >= budget.agreement:
        return f"agreement {agreement:.4g} >= {budget.agreement:g}"
    return ""


def _ties(reference: Array, candidate: Array, profile: Profile, hint: Hint) -> bool:
    """Whether the candidate chose positions whose reference scores equal the reference's choice."""
    scores = np.atleast_1d(np.asarray(hint.scores))
    axis = hint.axis % scores.ndim
    width = scores.shape[axis]
    others = scores.size // max(width, 1)
    shape = list(scores.shape)
    shape[axis] = reference.size // max(others, 1)
    if math.prod(shape) != reference.size or ((candidate < 0) | (candidate >= width)).any():
        return False
    ref, cand = (a.reshape(shape).astype(np.int64) for a in (reference, candidate))
    ordered = np.sort(cand, axis=axis)
    if (np.diff(ordered, axis=axis) == 0).any():
        return False
    a, b = (np.take_along_axis(scores, i, axis=axis).astype(np.float64) for i in (ref, cand))
    bound = profile.tolerance * (metrics.root_mean_square(scores) + np.abs(a))
    return bool(((np.abs(a - b) <= bound) | (a == b) | (np.isnan(a) & np.isnan(b))).all())


def _compare_rows(reference: Array, candidate: Array, profile: Profile) -> OutputReport:
    """Rows in any order (REORDERED); EXACT keeps the order."""
    ordered = profile.numerics is Numerics.EXACT
    ref, cand = ([tuple(row) for row in a.tolist()] for a in (reference, candidate))
    common = len(set(ref) & set(cand)) if reference.size else 0
    agreement = 1.0 if not ref and not cand else common / max(len(ref), len(cand))
    equal = ref == cand
    passed = equal if ordered else set(ref) == set(cand) and len(ref) == len(cand)
    why = (
        ""
        if equal
        else "the same rows in another order"
        if passed
        else f"{agreement:.3g} of the rows are common"
    )
    return OutputReport(
        "", passed=passed, equal=equal, elements=reference.size, agreement=agreement, why=why
    )


def _at(what: str, flat: int, reference: Array, candidate: Array) -> str:
    shape = reference.shape
    index = (
        [int(i) for i in np.unravel_index(min(flat, reference.size - 1), shape)] if shape else []
    )
    ref, cand = reference[tuple(index)], candidate[tuple(index)]
    return f"{what}; at {index} the reference has {ref}, the candidate {cand}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
