"""Facts of ways to slim a model: how channels are chosen, what a trial knows, what comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import onnx_ir as ir

from graphopt_passes.prune.branches import Aims, Branch
from graphopt_passes.prune.channels import HELD_OUT, Costs, Group
from graphopt_passes.prune.clock import Clock
from graphopt_passes.prune.labels import Labels
from graphopt_passes.prune.layers import Array, Layer
from graphopt_passes.prune.request import Importance, SparsityRequest
from graphopt_passes.prune.samples import Feeds
from graphopt_passes.prune.slim import Keep

FEW = 2
"""Batches that ways are tried on at least."""


class Way(NamedTuple):
    """How channels are chosen: by which importance, and how much what they save counts beside it."""

    importance: Importance
    thrift: float
    haste: float = 0.0


@dataclasses.dataclass(frozen=True)
class Slimming:
    """One way to slim a model, and how far its outputs then are from the original's.

    Attributes:
        way: how channels were chosen.
        keep: which indices stay.
        classes: how many channels went.
        model: the slimmed clone, fitted.
        error: of the outputs on every `HELD_OUT`-th batch, which no fit has seen; 0 without samples.
        left: share of the arithmetic.
        time: share of the time, as the clock tells it.
        rounds: in how many the channels went.
        saved_time: share of the latency, where it was measured.
        branches: of residual sums that went before any channel.
        aims: what the values stand for from which branches went.
    """

    way: Way
    keep: Keep
    classes: int
    model: ir.Model
    error: float
    left: float
    time: float = 1.0
    rounds: int = 1
    saved_time: float = 0.0
    branches: tuple[Branch, ...] = ()
    aims: Aims = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Job:
    """What stays the same over all trials."""

    model: ir.Model
    request: SparsityRequest
    feeds: Feeds
    singles: Feeds
    share: float
    total: float
    time: float
    seed: int
    wanted: Sequence[Mapping[str, Array]]
    is_large: bool

    @property
    def unseen(self) -> Feeds:
        """What judges, and what no trial is fitted to."""
        return unseen(self.feeds)

    @property
    def seen(self) -> Feeds:
        """What trials are fitted to."""
        rest = [f for i, f in enumerate(self.feeds) if i % HELD_OUT != HELD_OUT - 1]
        return rest or self.feeds

    @property
    def few(self) -> Feeds:
        """What all ways are tried on, before the nearest of them are tried on all."""
        return self.seen[: max(len(self.seen) // 3, FEW)]


@dataclasses.dataclass(frozen=True)
class Stage:
    """A model on its way, and what is known of its channels."""

    model: ir.Model
    labels: Labels
    groups: list[Group]
    layers: list[Layer]
    costs: Costs
    clock: Clock
    scores: Mapping[Importance, Mapping[int, float]]
    branches: tuple[Branch, ...] = ()
    aims: Aims = dataclasses.field(default_factory=dict)


def unseen(feeds: Feeds) -> Feeds:
    """The samples that judge."""
    return feeds[HELD_OUT - 1 :: HELD_OUT] or feeds
