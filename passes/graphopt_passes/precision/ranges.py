"""How values spread over real inputs: one instrumented float32 run, a chunk of values at a time."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir import fingerprint, operators
from graphopt.ir.model_file import ExternalData, save_model
from graphopt.ir.scopes import all_graphs
from graphopt.rewrite import Context
from graphopt.runtime.session import Session, SessionOptions
from graphopt.runtime.specs import input_specs
from graphopt.verify.feeds import Feed, find_feeds, read_feeds
from graphopt_passes.precision.bodies import Bodies, wanted_of
from graphopt_passes.precision.flow import MASKED
from graphopt_passes.precision.legality import is_float
from graphopt_passes.precision.units import units

Array = np.ndarray[Any, Any]
Feeds = Sequence[Mapping[str, Any]]

GENERATED = "generated inputs"
"""Whose samples they were, where the user gave none."""

FLOOR = 2.0**-10
"""Scale below which a value is noise, over its scale on the first, plain input; the verifier's own."""

_WEIGHTS = 1 << 28
"""Bytes of weights up to which they may be held several times: packed for kernels, rounded for gates."""

_FIRST_CHUNK = 24
_CHUNK_BYTES = 1 << 28
_MAX_FEEDS = 8
_MAX_USUAL = 12
MANY = 8
"""Feeds from which on the worst of them tells what the next one may be."""

_CHEAP = 1 << 17
_UNJUDGED = ("large", "huge")
"""Generated feeds that count for ranges, not for errors; the verifier leaves them out too."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """What one value was seen to be.

    Attributes:
        absmax: greatest finite magnitude.
        mean: greatest mean magnitude of any feed.
        error: greatest relative error, root-mean-square, of rounding it to the half; inf where it overflows.
        integers: every element is an integer.
        exact: every element is exactly a half.
        flushed: some element that is not zero becomes zero.
        size: elements of the largest.
        usual: greatest finite magnitude on feeds that are no stress.
    """

    absmax: float = 0.0
    mean: float = 0.0
    error: float = 0.0
    integers: bool = True
    exact: bool = True
    flushed: bool = False
    size: int = 0
    usual: float = 0.0

    def merged(self, other: Spread) -> Spread:
        """The worst of both."""
        return Spread(
            max(self.absmax, other.absmax),
            max(self.mean, other.mean),
            max(self.error, other.error),
            self.integers and other.integers,
            self.exact and other.exact,
            self.flushed or other.flushed,
            max(self.size, other.size),
            max(self.usual, other.usual),
        )


@dataclasses.dataclass(frozen=True)
class Observed:
    """Spreads by name of value, the feeds that showed them, and why there are none.

    Attributes:
        spreads: by name.
        usual: the feeds to judge errors on: those that are no stress.
        source: in words: whose samples they were.
        why: why nothing was observed, or "".
    """

    spreads: Mapping[str, Spread]
    usual: Feeds = ()
    source: str = ""
    why: str = ""


def is_small(model: ir.Model) -> bool:
    """Whether the weights are few enough to be held in memory several times."""
    graphs = [scope.graph for scope in all_graphs(model)]
    held = [v.const_value for graph in graphs for v in graph.initializers.values()]
    return sum(tensor.nbytes for tensor in held if tensor is not None) <= _WEIGHTS


def observe(model: ir.Model, ctx: Context, half: ir.DataType, masked: set[str]) -> Observed:
    """The spread of every float value, bodies of control flow included, on calibration samples or on generated inputs.

    Args:
        model: in float32.
        ctx: the run; what was observed is kept in its cache.
        half: the dtype to round to.
        masked: names of values that carry a mask.
    """
    names = [v.name for node in model.graph for v in node.outputs if is_float(v) and v.name]
    key = (
        f"precision-ranges {half.name} {fingerprint.structural(model)} {fingerprint.weights(model)}"
    )
    if key not in ctx.cache:
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            file = save_model(
                model, Path(folder) / "float.onnx", external=ExternalData.SINGLE_FILE
            )[0]
            ctx.cache[key] = _observe(model, file, names, ctx, half, masked)
    found: Observed = ctx.cache[key]
    return found


def _observe(
    model: ir.Model, file: Path, names: list[str], ctx: Context, half: ir.DataType, masked: set[str]
) -> Observed:
    try:
        feeds, usual, source = samples(model, _session(model, file), ctx)
        if not feeds:
            return Observed({}, why="no input could be generated that the model runs with")
        spreads = _of_inputs(model, feeds, half)
        look = _Look(half, masked, {id(feed) for feed in usual})
        start, count = 0, _FIRST_CHUNK
        while start < len(names):
            chunk = names[start : start + count]
            session = _session(model, file, chunk)
            found, size = _measure(session, chunk, feeds, look)
            spreads |= found
            start += len(chunk)
            # Later values may be larger than these: leave room for four times as much.
            count = max(_FIRST_CHUNK, int(_CHUNK_BYTES / max(4 * size / len(chunk), 1)))
        spreads |= _of_bodies(model, file, feeds, look)
    except GraphoptError as error:
        return Observed({}, why=str(error))
    return Observed(spreads, usual, source)


def _session(model: ir.Model, file: Path, taps: Sequence[str] = ()) -> Session:
    """Large weights stay where they are mapped: packing would copy them."""
    return Session(file, options=SessionOptions(prepack=is_small(model), extra_outputs=tuple(taps)))


def samples(model: ir.Model, session: Session, ctx: Context) -> tuple[Feeds, Feeds, str]:
    """Feeds to decide on, those among them to judge errors on, and whose they are."""
    given = ctx.options.calibration
    if given is not None:
        if isinstance(given.source, Path):
            feeds: Feeds = [f.values for f in read_feeds(given.source, input_specs(model))]
        else:
            feeds = list(given.source)
        feeds = feeds[: given.limit]
        return feeds, feeds[:_MAX_USUAL], "calibration samples"

    def refuses(feed: Feed) -> str | None:
        try:
            session.run(feed.values)
        except GraphoptError as error:
            return str(error)
        return None

    found = find_feeds(model, refuses, seed=ctx.options.seed, specs=session.inputs)
    usual = [feed.values for feed in found.feeds if feed.name.split(",")[0] not in _UNJUDGED]
    hinted = _in_their_units(usual[0], units(model)) if usual else []
    usual = usual[: _MAX_USUAL - len(hinted)]
    further = _further(model, session, refuses, ctx) if is_cheap(model, usual) else []
    return (
        [*(feed.values for feed in found.feeds[:_MAX_FEEDS]), *hinted],
        [*usual, *hinted, *further],
        GENERATED,
    )


def is_cheap(model: ir.Model, feeds: Feeds) -> bool:
    """Whether weights and inputs are so few that some runs more cost nothing."""
    sizes = [np.size(array) for feed in feeds[:1] for array in feed.values()]
    held = [v.const_value for v in model.graph.initializers.values()]
    weights = sum(tensor.size for tensor in held if tensor is not None)
    return bool(sizes) and sum(sizes) <= _CHEAP and weights <= 16 * _CHEAP


def _further(
    model: ir.Model,
    session: Session,
    refuses: Callable[[Feed], str | None],
    ctx: Context,
) -> list[Mapping[str, Any]]:
    """Plain feeds of further seeds: the worst element of one draw tells little of the next."""
    found = []
    for number in range(1, MANY + 1):
        drawn = find_feeds(
            model, lambda _: None, seed=ctx.options.seed + 1000 * number, specs=session.inputs
        )
        feed = next(iter(drawn.feeds), None)
        if feed is not None and refuses(feed) is None:
            found.append(feed.values)
    return found


def _in_their_units(feed: Mapping[str, Any], known: Mapping[str, float]) -> list[dict[str, Any]]:
    """The feed with inputs as large as the constants say that they are divided by; none where none are."""
    scaled = {
        name: (feed[name] * np.float32(unit)).astype(np.float32)
        for name, unit in known.items()
        if name in feed and feed[name].dtype == np.float32
    }
    return [{**feed, **scaled}] if scaled else []


@dataclasses.dataclass(frozen=True)
class _Look:
    """How values are looked at: the half, names of those that carry a mask, identities of feeds that are no stress."""

    half: ir.DataType
    masked: set[str]
    usual: set[int]


def _measure(
    session: Session, names: list[str], feeds: Feeds, look: _Look
) -> tuple[dict[str, Spread], int]:
    """The spread of some values over all feeds, and the bytes that they took at most."""
    found: dict[str, Spread] = {}
    floors: dict[str, float] = {}
    size = 0
    for feed in feeds:
        results = session.run(feed, names)
        size = max(size, sum(array.nbytes for array in results.values() if _is_tensor(array)))
        for name in names:
            _add(found, floors, name, results.pop(name), look, usual=id(feed) in look.usual)
    return found, size


def _add(
    found: dict[str, Spread],
    floors: dict[str, float],
    name: str,
    array: Any,  # noqa: ANN401
    look: _Look,
    *,
    usual: bool,
) -> None:
    """Merges one more array into what is known of a value."""
    if not _is_tensor(array) or array.dtype != np.float32:
        return
    floor, masked = floors.get(name, 0.0), name in look.masked
    spread, norm = spread_of(array, look.half, floor=floor, masked=masked)
    if usual:
        spread = dataclasses.replace(spread, usual=spread.absmax)
    if np.isposinf(array).any():  # beyond float32 already: where a half overflows, nobody saw
        spread = dataclasses.replace(spread, absmax=math.inf)
    floors.setdefault(name, norm * FLOOR)
    found[name] = found.get(name, Spread()).merged(spread)


def _of_bodies(model: ir.Model, file: Path, feeds: Feeds, look: _Look) -> dict[str, Spread]:
    """The spreads of values inside control flow, every turn of every body."""
    found: dict[str, Spread] = {}
    if not any(operators.has_subgraph(node) for node in model.graph):
        return found
    outer = wanted_of(model.graph)
    session = _session(model, file, outer)
    bodies, floors = Bodies(model), dict[str, float]()
    for feed in feeds:
        known = {**feed, **session.run(feed)}
        for turn in bodies.turns(model.graph, known):
            names = [v.name or "" for node in turn.graph for v in node.outputs if is_float(v)]
            for name in names:
                held = turn.values.get(name)
                _add(found, floors, name, held, look, usual=id(feed) in look.usual)
    return found


def _is_tensor(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, np.ndarray)


def spread_of(
    array: Array, half: ir.DataType, *, floor: float = 0.0, masked: bool = False
) -> tuple[Spread, float]:
    """The spread of one array and the root mean square of its finite elements.

    Args:
        array: float32.
        half: the dtype to round to.
        floor: root mean square below which the array is noise.
        masked: whether elements below `MASKED` stand for minus infinity.
    """
    sums, flags = _Sums(), Spread()
    flat = array.reshape(-1)
    for start in range(0, flat.size, _STEP):
        flags = sums.add(flat[start : start + _STEP], half, flags, masked=masked)
    if not sums.count:
        return Spread(size=flat.size), 0.0
    norm = math.sqrt(sums.squares / sums.count)
    noise = math.sqrt(sums.noise / sums.count)
    error = noise / max(norm, floor) if noise else 0.0
    return dataclasses.replace(
        flags, mean=sums.magnitude / sums.count, error=error, size=flat.size
    ), norm


_STEP = 1 << 22
"""Elements looked at together: a large weight is never held in float64."""


@dataclasses.dataclass
class _Sums:
    """What adds up over the parts of an array."""

    count: int = 0
    squares: float = 0.0
    magnitude: float = 0.0
    noise: float = 0.0

    def add(self, part: Array, half: ir.DataType, so_far: Spread, *, masked: bool) -> Spread:
        """Adds one part; returns what is true of all parts so far."""
        seen = np.isfinite(part) & (part > MASKED) if masked else np.isfinite(part)
        kept = part[seen]
        if kept.size == 0:
            return so_far
        wide = kept.astype(np.float64)
        with np.errstate(over="ignore"):
            rounded = kept.astype(half.numpy()).astype(np.float64)
        magnitude = np.abs(wide)
        self.count += kept.size
        self.squares += float(np.sum(wide * wide))
        self.magnitude += float(magnitude.sum())
        overflows = not np.isfinite(rounded).all()
        self.noise += math.inf if overflows else float(np.sum((wide - rounded) ** 2))
        return so_far.merged(
            Spread(
                absmax=float(magnitude.max()),
                integers=bool((kept == np.rint(kept)).all()),
                exact=bool((rounded == wide).all()),
                flushed=bool(((rounded == 0) & (wide != 0)).any()),
            )
        )


def _of_inputs(model: ir.Model, feeds: Feeds, half: ir.DataType) -> dict[str, Spread]:
    found: dict[str, Spread] = {}
    for value in model.graph.inputs:
        floor = 0.0
        for feed in feeds:
            array = feed.get(value.name or "")
            if is_float(value) and isinstance(array, np.ndarray) and array.size:
                spread, norm = spread_of(array, half, floor=floor)
                floor = floor or norm * FLOOR
                found[value.name or ""] = found.get(value.name or "", Spread()).merged(spread)
    return found
