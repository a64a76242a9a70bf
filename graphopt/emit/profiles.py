"""Ranges of dynamic dimensions: what an engine is built for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from graphopt.errors import OptionError
from graphopt.runtime.specs import TensorSpec


@dataclasses.dataclass(frozen=True)
class Range:
    """Smallest, usual and largest size of one dynamic dimension."""

    least: int
    usual: int
    most: int


@dataclasses.dataclass(frozen=True)
class InputProfile:
    """The three shapes of one dynamic input; of one that decides shapes, its three values."""

    name: str
    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]


def parse_profile(text: str) -> tuple[str, Range]:
    """`batch=1,8,32`: the name of a symbolic dimension, or `INPUT:AXIS`, and its range.

    Raises:
        OptionError: it is not of that form, or the sizes do not rise.
    """
    name, separator, sizes = text.rpartition("=")
    parts = sizes.split(",")
    if not separator or not name or len(parts) != 3 or not all(p.strip().isdigit() for p in parts):
        raise OptionError(
            f"--profile {text!r}: give a dimension and three sizes, as in batch=1,8,32 (least, usual, most)"
        )
    least, usual, most = (int(part) for part in parts)
    if not 0 < least <= usual <= most:
        raise OptionError(
            f"--profile {text!r}: sizes must rise from at least 1: least, usual, most"
        )
    return name, Range(least, usual, most)


def input_profiles(
    specs: Sequence[TensorSpec],
    ranges: Mapping[str, Range],
    feed: Mapping[str, Any],
    shape_tensors: Set[str] = frozenset(),
) -> tuple[InputProfile, ...]:
    """The profile of each input that has a dynamic dimension.

    A dimension without a range of its own goes from 1 to its size in `feed`, which a golden comparison needs.  A shape
    tensor has a range of values, by its name or as `INPUT:INDEX`; without one it keeps those in `feed`.

    Raises:
        OptionError: a range is for a dimension that no input has.
    """
    used: set[str] = set()
    found = []
    for spec in specs:
        if spec.name in shape_tensors and spec.name in feed:
            found.append(_valued(spec.name, feed[spec.name], ranges, used))
            continue
        if spec.shape is None or spec.overridable or all(isinstance(d, int) for d in spec.shape):
            continue
        fed = getattr(feed.get(spec.name), "shape", None)
        per_dim = []
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, int):
                per_dim.append(Range(dim, dim, dim))
                continue
            keys = (f"{spec.name}:{axis}", dim or "")
            key = next((k for k in keys if k in ranges), None)
            size = max(int(fed[axis]), 1) if fed is not None else 1
            used.update(() if key is None else (key,))
            per_dim.append(ranges[key] if key is not None else Range(1, size, size))
        found.append(
            InputProfile(
                spec.name,
                tuple(r.least for r in per_dim),
                tuple(r.usual for r in per_dim),
                tuple(r.most for r in per_dim),
            )
        )
    unknown = sorted(set(ranges) - used)
    if unknown:
        dims = sorted({str(d) for s in specs for d in s.shape or () if isinstance(d, str)})
        raise OptionError(
            f"--profile {unknown[0]}: no input has such a dynamic dimension; there are: {', '.join(dims) or 'none'}"
        )
    return tuple(found)


def _valued(
    name: str,
    fed: object,
    ranges: Mapping[str, Range],
    used: set[str],
) -> InputProfile:
    """The three values of an input that decides shapes."""
    held = []
    for index, value in enumerate(np.asarray(fed).reshape(-1).tolist()):
        key = next((k for k in (f"{name}:{index}", name) if k in ranges), None)
        used.update(() if key is None else (key,))
        held.append(Range(value, value, value) if key is None else ranges[key])
    return InputProfile(
        name,
        tuple(r.least for r in held),
        tuple(r.usual for r in held),
        tuple(r.most for r in held),
    )


def shape_text(dims: Sequence[int]) -> str:
    """`1x3x224x224`."""
    return "x".join(map(str, dims))


def shapes_text(profiles: Sequence[InputProfile], which: str) -> str:
    """`x:1x4,mask:1x4`, as trtexec and ONNX Runtime's TensorRT provider write shapes; `which` is an attribute."""
    return ",".join(f"{each.name}:{shape_text(getattr(each, which))}" for each in profiles)
