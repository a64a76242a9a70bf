"""The share of rows whose greatest element is the same: of all feeds together, since one may hold a single row."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from graphopt.verify.compare import OutputReport, Profile


def share_of(reports: Iterable[OutputReport]) -> float | None:
    """The share over all rows that reports on one output ranked; None where they ranked none."""
    known = [(r.argmax_agreement, r.rows) for r in reports if r.argmax_agreement is not None]
    rows = sum(count for _, count in known)
    return sum(share * count for share, count in known) / rows if rows else None


def without_share(profile: Profile) -> Profile:
    """The gate of a single feed: all but the share."""
    if profile.budget is None or profile.budget.argmax_agreement is None:
        return profile
    budget = dataclasses.replace(profile.budget, argmax_agreement=None)
    return dataclasses.replace(profile, budget=budget)


def held(reports: Sequence[OutputReport], profile: Profile) -> list[OutputReport]:
    """The reports on one output, one a feed; the worst of them failed where the share of all is below the gate's."""
    found, share = list(reports), share_of(reports)
    least = None if profile.budget is None else profile.budget.argmax_agreement
    if least is None or share is None or share >= least:
        return found
    ranked = [index for index, r in enumerate(found) if r.argmax_agreement is not None]
    worst = min(ranked, key=lambda index: found[index].argmax_agreement or 0.0)
    rows = sum(found[index].rows for index in ranked)
    why = f"argmax agreement {share:.4g} < {least:g} over {rows} rows"
    found[worst] = dataclasses.replace(found[worst], passed=False, why=found[worst].why or why)
    return found
