"""Samples as batches: joined along the leading axis where the models take that, one by one otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from graphopt.errors import DataError

Array: TypeAlias = npt.NDArray[Any]
Feed: TypeAlias = Mapping[str, Array]

LEAST = 5
MIXTURES = 4


@dataclasses.dataclass(frozen=True)
class Division:
    """Samples to train on and samples to judge on.

    Attributes:
        train: at least one.
        held_out: at least one.
        judged: what to judge by: made of those held out.
    """

    train: tuple[Feed, ...]
    held_out: tuple[Feed, ...]
    judged: tuple[Feed, ...] = ()


def divide(samples: Sequence[Feed], held_out: float, rng: np.random.Generator) -> Division:
    """The samples in two parts, by lot.

    Raises:
        DataError: there are too few.
    """
    if len(samples) < LEAST:
        raise DataError(
            f"{len(samples)} samples are too few to train on and to judge by: give {LEAST} or more, better 256"
        )
    order = rng.permutation(len(samples))
    count = min(max(round(held_out * len(samples)), 1), len(samples) - 1)
    return Division(
        tuple(samples[i] for i in order[count:]), tuple(samples[i] for i in order[:count])
    )


def join(samples: Sequence[Feed]) -> Feed:
    """One feed of several samples."""
    return {name: np.concatenate([each[name] for each in samples]) for name in samples[0]}


def can_join(samples: Sequence[Feed]) -> bool:
    """Whether all samples have the same shapes, with at least one axis each."""
    first = samples[0]
    return all(
        array.ndim > 0 and all(each[name].shape == array.shape for each in samples)
        for name, array in first.items()
    )


def grouped(samples: Sequence[Feed], size: int, *, joined: bool) -> list[Feed]:
    """Feeds of `size` samples each where they can be joined; of one each otherwise."""
    if not joined:
        return list(samples)
    return [join(samples[i : i + size]) for i in range(0, len(samples), size)]


def noisy(feed: Feed, spread: Mapping[str, float], rng: np.random.Generator) -> Feed:
    """A feed whose float inputs have noise of a standard deviation by name."""
    return {
        name: (array + rng.normal(0, spread[name], array.shape)).astype(array.dtype)
        if spread.get(name, 0.0) > 0
        else array
        for name, array in feed.items()
    }


def mixed(feed: Feed, share: float, rng: np.random.Generator) -> Feed:
    """A feed in which some samples are drawn a random part of the way to others.

    The teacher is asked about what comes out, so that a few samples teach as many do.  Only where all inputs are
    floats: there is nothing between two words.  After mixup (Zhang et al. 2018).
    """
    size = len(next(iter(feed.values())))
    if share <= 0 or size < 2 or any(array.dtype.kind != "f" for array in feed.values()):
        return feed
    other = rng.permutation(size)
    part = np.where(rng.random(size) < share, rng.random(size), 0.0)
    made = {}
    for name, array in feed.items():
        weight = part.reshape(-1, *[1] * (array.ndim - 1))
        made[name] = (array * (1 - weight) + array[other] * weight).astype(array.dtype)
    return made


def unseen(
    samples: Sequence[Feed], spread: Mapping[str, float], rng: np.random.Generator
) -> list[Feed]:
    """Samples to judge by that nobody can have learnt by heart: noisy mixtures of those given, several of each.

    What was pruned before was fitted to the very samples that are held out from training, which would make it look
    better than it is.  Where inputs are no floats, the samples themselves.
    """
    if any(array.dtype.kind != "f" for array in samples[0].values()) or not can_join(samples):
        return list(samples)
    made = [noisy(mixed(join(samples), 1.0, rng), spread, rng) for _ in range(MIXTURES)]
    return [*samples, *(each for feed in made for each in parted(feed, len(samples)))]


def parted(feed: Feed, count: int) -> list[dict[str, Array]]:
    """A feed of `count` samples as so many feeds."""
    parts = {name: np.split(array, count) for name, array in feed.items()}
    return [{name: parts[name][i] for name in parts} for i in range(count)]


def spreads(samples: Sequence[Feed], noise: float) -> dict[str, float]:
    """The standard deviation of the noise for each float input."""
    return {
        name: noise * float(np.mean([each[name].astype(np.float64).std() for each in samples[:64]]))
        for name, array in samples[0].items()
        if array.dtype.kind == "f"
    }
