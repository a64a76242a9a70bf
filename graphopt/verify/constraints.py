"""What a user knows of a model's inputs, in TOML: sizes of dimensions, ranges and values of elements.

[dims]
batch = [1, 4]            # one run of feeds with 1, one with 4
seq = 128                 # always

[inputs.input_ids]
min = 0                   # both ends included
max = 30521

[inputs.image]
mean = 0.48
std = 0.22

[inputs.mode]
values = [0, 2]           # one of these, each element by itself

[outputs]                 # limits for single outputs, as `--gate` takes them
logits = "sqnr>=40,cosine>=0.999"
debug = "ignore"
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError, GraphoptError
from graphopt.ir.model_file import load_model
from graphopt.runtime.session import Session, SessionOptions
from graphopt.runtime.specs import input_specs
from graphopt.verify import draws, metrics
from graphopt.verify.draws import Array, Draws
from graphopt.verify.feeds import Feed, find_feeds


class Elements(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What the elements of one input may be: a range, a distribution or a choice."""

    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    values: list[float] | None = None

    def draw(self, shape: tuple[int, ...], stream: Draws, *, integers: bool) -> Array:
        """Numbers as stated; a distribution is cut off at the range, if both are given."""
        if self.values is not None:
            return np.asarray(self.values)[stream.integers(shape, 0, len(self.values))]
        if self.mean is not None or self.std is not None:
            mean, std = self.mean or 0.0, 1.0 if self.std is None else self.std
            drawn = mean + std * stream.normal(shape)
            return np.clip(drawn, self.min, self.max) if self._bounded else drawn
        assert self.min is not None  # see `fault`
        assert self.max is not None
        low, high = self.min, self.max
        if integers:
            return stream.integers(shape, int(low), int(high) + 1)
        return low + (high - low) * stream.uniform(shape)

    @property
    def fault(self) -> str:
        """Why nothing can be drawn; "" where something can."""
        if self.values is not None:
            return "" if self.values else "values is empty"
        if self.min is not None and self.max is not None and self.min > self.max:
            return f"min {self.min:g} is above max {self.max:g}"
        is_spread = self.mean is not None or self.std is not None
        if not is_spread and (self.min is None or self.max is None):
            return "give min and max, mean and std, or values"
        return ""

    @property
    def _bounded(self) -> bool:
        return self.min is not None or self.max is not None


class Constraints(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Sizes by dimension, elements by input, limits by output."""

    dims: dict[str, int | list[int]] = {}
    inputs: dict[str, Elements] = {}
    outputs: dict[str, str] = {}

    def sizes(self) -> Iterator[dict[str, int]]:
        """Each set of sizes in turn: the first of every list, then the second, the last of the shorter ones again."""
        lists = {
            name: given if isinstance(given, list) else [given] for name, given in self.dims.items()
        }
        for index in range(max(map(len, lists.values()), default=1)):
            yield {name: sizes[min(index, len(sizes) - 1)] for name, sizes in lists.items()}


def read_constraints(path: Path) -> Constraints:
    """What a TOML file says of inputs.

    Raises:
        DataError: it cannot be read, or says something else.
    """
    try:
        found = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Constraints)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    except msgspec.ValidationError as error:
        raise DataError(
            f"{path}: {error}. An input takes min and max, mean and std, or values; dims a size or a list of sizes"
        ) from error
    for name, given in found.inputs.items():
        if reason := given.fault:
            raise DataError(f"{path}: input '{name}': {reason}")
    if any(sizes == [] for sizes in found.dims.values()):
        raise DataError(f"{path}: a dimension without sizes")
    return found


def constrained_feeds(model: Path, given: Constraints, *, seed: int = 0) -> list[Feed]:
    """Generated feeds that keep to what is given and that the model runs with.

    Raises:
        DataError: a name is no input or dimension of the model, or no such feed runs.
        ModelError: the runtime refuses the model.
    """
    graph = load_model(model)
    _check_names(graph, given, model)
    session = Session(model, options=SessionOptions(prepack=False))

    def refuses(feed: Feed) -> str | None:
        try:
            session.run(feed.values)
        except GraphoptError as error:
            return str(error)
        return None

    feeds: list[Feed] = []
    reasons: list[str] = []
    for sizes in given.sizes():
        found = find_feeds(
            graph, refuses, seed=seed, dims=sizes, amend=lambda feed: _amended(feed, given, seed)
        )
        told = ", ".join(f"{name}={size}" for name, size in sizes.items())
        feeds += [dataclasses.replace(f, name=f"{f.name} [{told}]") for f in found.feeds]
        reasons += [dropped.reason for dropped in found.dropped]
    if not feeds:
        raise DataError(f"no inputs as constrained run: {reasons[0] if reasons else 'none found'}")
    return feeds


def _check_names(graph: ir.Model, given: Constraints, model: Path) -> None:
    known = [spec.name for spec in input_specs(graph)]
    for name in given.inputs:
        if name not in known:
            raise DataError(f"'{model}' has no input '{name}'; its inputs are {', '.join(known)}")


def _amended(feed: Feed, given: Constraints, seed: int) -> Feed:
    """The feed with the elements of constrained inputs drawn anew; shapes and dtypes stay."""
    values: Mapping[str, Any] = {
        name: _drawn(value, given.inputs[name], Draws(seed, f"{name}@{feed.name}"))
        if name in given.inputs and isinstance(value, np.ndarray)
        else value
        for name, value in feed.values.items()
    }
    return Feed(feed.name, dict(values))


def _drawn(like: Array, elements: Elements, stream: Draws) -> Array:
    integers = not metrics.is_float(like.dtype)
    drawn = elements.draw(like.shape, stream, integers=integers)
    return draws.cast(drawn, ir.DataType.from_numpy(like.dtype))
