"""The values of one input, made to suit what it is for and what one feed does differently from the plain one."""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.verify import draws
from graphopt.verify.domains import Domain
from graphopt.verify.roles import Role, Use

if TYPE_CHECKING:
    from collections.abc import Sequence

    from graphopt.runtime.specs import TensorSpec
    from graphopt.verify.draws import Array, Draws


class Masks(enum.Enum):
    """What masks hide."""

    NOTHING = "all ones"
    TAILS = "prefix masks"
    ONE_ROW = "one row masked"
    FUTURE = "causal masks"


class Spread(enum.Enum):
    """How plain numbers lie."""

    NORMAL = "N(0, 1), within what consumers can take"
    ANYWHERE = "N(0, 1), whatever consumers can take"
    UNIT = "uniform in [0, 1)"
    USUAL = "uniform where consumers expect them"
    SPARSE = "N(0, 1) in one of five places, else zero"
    TURNING = "around the constants that they are compared with"


@dataclasses.dataclass(frozen=True)
class Variation:
    """What one feed does differently from the plain one."""

    name: str = "normal"
    scale: float = 1.0
    masks: Masks = Masks.NOTHING
    choice: int = 0
    override: bool = False
    stream: int = 0
    spread: Spread = Spread.NORMAL
    shift: float = 0.0
    wide: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """What one array must be."""

    dtype: ir.DataType
    shape: tuple[int, ...]
    role: Role
    bound: int | None
    variation: Variation
    domain: Domain
    decides_sizes: bool


def make_array(request: Request, stream: Draws) -> Array:
    """The values of a tensor."""
    dtype, use = request.dtype, request.role.use
    if dtype is ir.DataType.STRING:
        return _strings(request, stream)
    if use is Use.FLAG or (dtype is ir.DataType.BOOL and not request.shape):
        return draws.cast(np.full(request.shape, request.variation.choice % 2 == 0), dtype)
    if use in {Use.MASK, Use.ADDITIVE_MASK} and request.shape:
        return _mask(request)
    if dtype is ir.DataType.BOOL:
        return np.asarray(stream.uniform(request.shape) < 0.5)
    if use is Use.NUMBER:
        return _numbers(request, stream)
    return draws.cast(_integers(request, stream), dtype)


def _numbers(request: Request, stream: Draws) -> Array:
    """Plain numbers: floats by the spread; small integer dtypes over their whole range, others near zero or far off."""
    dtype, scale = request.dtype, request.variation.scale
    if dtype in {ir.DataType.COMPLEX64, ir.DataType.COMPLEX128}:
        parts = stream.normal((2, *request.shape)) * scale
        return np.asarray(parts[0] + 1j * parts[1]).astype(dtype.numpy())
    if dtype.is_floating_point():
        made = _floats(request, stream)
        shift = request.variation.shift
        return draws.cast(made + shift if shift else made, dtype)  # -0 + 0 would be +0
    low, high = draws.integer_range(dtype)
    if dtype.bitwidth <= 8:
        return draws.cast(stream.integers(request.shape, low, high + 1), dtype)
    if request.variation.wide and not request.decides_sizes:
        far = min(_FAR, high // 2)
        return draws.cast(stream.integers(request.shape, max(low, -far), far), dtype)
    return draws.cast(stream.integers(request.shape, max(low, -8), 9), dtype)


_FAR = 12_345_678_901
"""Magnitude of wide 64-bit integers: more than 32 bits, and than the digits of a half, can hold."""


def _floats(request: Request, stream: Draws) -> Array:
    spread, domain = request.variation.spread, request.domain
    if spread is Spread.UNIT:
        return np.clip(stream.uniform(request.shape), domain.low, domain.high)
    if spread is Spread.USUAL:
        low, high = domain.usual or (0.0, 1.0)
        return low + (high - low) * stream.uniform(request.shape)
    normal = stream.normal(request.shape)
    if spread is Spread.SPARSE:
        held = domain.place(normal, request.variation.scale)
        return np.where(stream.uniform(request.shape) < 0.2, held, 0.0)
    if spread is Spread.ANYWHERE:
        return normal * request.variation.scale
    if spread is Spread.TURNING and request.role.choices:
        # Elements at a threshold, and on both sides of it, in turn.
        at = np.resize(np.asarray(request.role.choices), request.shape)
        return at + np.where(stream.uniform(request.shape) < 0.25, 0.0, normal)
    return domain.place(normal, request.variation.scale)


def _integers(request: Request, stream: Draws) -> Array:
    """Numbers that mean something to the model: ids, counts, constants it compares with."""
    shape, role = request.shape, request.role
    if role.use in {Use.SHAPE, Use.RESHAPE}:
        # Ones suit every Expand; with one free axis, every Reshape.
        target = np.ones(shape, np.int64)
        if role.use is Use.RESHAPE and shape:
            target.reshape(-1)[:1] = -1
        return target
    if role.use is Use.AXIS:
        return np.arange(math.prod(shape)).reshape(shape)
    if role.use is Use.POSITIVE:
        return (
            0.5 + stream.uniform(shape)
            if request.dtype.is_floating_point()
            else np.ones(shape, np.int64)
        )
    if role.use is Use.INDEX:
        return _sprinkled(stream.integers(shape, 0, max(request.bound or 1, 1)), request)
    if role.use is Use.LENGTH:
        return stream.integers(shape, 1, max(request.bound or 1, 1) + 1)
    if role.choices and math.prod(shape) > 1:
        # Elements of a table compared one by one (padding, bytes): numbers around the constants, and those.
        low, high = int(min(0, *role.choices)), int(max(role.choices))
        return _sprinkled(stream.integers(shape, low, high + 1), request)
    if role.choices:
        return np.full(shape, role.choices[request.variation.choice % len(role.choices)])
    return stream.integers(shape, 1, 4) if math.prod(shape) > 1 else np.full(shape, 2)


def _sprinkled(array: Array, request: Request) -> Array:
    """The array with the constants that the model looks for (padding ids, say) put in at the end of rows."""
    choices = [c for c in request.role.choices if c < (request.bound or math.inf)]
    if request.role.use is Use.INDEX:
        choices = [c for c in choices if c >= 0]
    if choices and array.ndim and array.shape[-1] > 2:
        array[..., -1] = choices[request.variation.choice % len(choices)]
    return array


def _mask(request: Request) -> Array:
    """One keeps and zero hides; in an additive mask zero keeps and a large negative number hides."""
    keep = _kept(request.shape, request.variation.masks)
    if request.role.use is Use.MASK:
        return draws.cast(keep, request.dtype)
    return draws.cast(np.where(keep, 0.0, -1e4), request.dtype)


def _kept(shape: tuple[int, ...], masks: Masks) -> Array:
    keep = np.ones(shape, np.bool_)
    width = shape[-1]
    if masks is Masks.FUTURE and len(shape) >= 2:
        return keep & np.tril(np.ones(shape[-2:], np.bool_))
    if masks is Masks.ONE_ROW:
        keep[0 if len(shape) > 1 else slice(0, 1)] = False
    if masks is Masks.TAILS:
        # Row r keeps a prefix: half of the width, then three quarters, then all but one …
        rows = np.arange(shape[0]) if len(shape) > 1 else np.zeros(1, np.int64)
        lengths = np.maximum(1, width - width // (rows + 2))
        kept = np.arange(width) < lengths.reshape(-1, *[1] * (len(shape) - 1))
        keep &= kept.reshape(width) if len(shape) == 1 else kept
    return keep


_WORDS = ("", "a", "B", "the quick brown fox", "über", "0", "-1.5", "日本")


def _strings(request: Request, stream: Draws) -> Array:
    words = (*request.role.words, *_WORDS)
    picks = stream.integers(request.shape, 0, len(words))
    return np.array([words[pick] for pick in picks.reshape(-1)], object).reshape(request.shape)


def make_map(spec: TensorSpec, stream: Draws) -> dict[int | str, Any]:
    """The values of a map."""
    keys: Sequence[int | str] = _WORDS[1:4] if spec.key is ir.DataType.STRING else (0, 1, 2)
    if spec.dtype is ir.DataType.STRING:
        return dict(zip(keys, _WORDS[1:], strict=False))
    numbers = draws.cast(stream.normal((len(keys),)), spec.dtype).tolist()
    return dict(zip(keys, numbers, strict=True))
