"""Random arrays that are the same for ever: from the seed and the name, on every machine and NumPy version.

NumPy does not promise the streams of its distributions (NEP 19), so only the raw words of a counter-based
generator are taken from it; numbers are made of them by exact arithmetic, without transcendental functions.
"""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence

Array: TypeAlias = "np.ndarray[Any, Any]"

GENERATOR = "philox-sha256-1"
"""Names the streams below: change it with them."""

_BLOCK = 1 << 18  # normals made at a time: their raw words take 8 MB


class Draws:
    """A stream of random numbers for one input, independent of every other input.

    Philox keyed by SHA-256 of (seed, name): Salmon et al., Parallel Random Numbers, SC 2011.
    """

    def __init__(self, seed: int, name: str) -> None:
        digest = hashlib.sha256(f"{GENERATOR}:{seed}:{name}".encode()).digest()
        key = np.frombuffer(digest[:16], "<u8").astype(np.uint64)
        self._words = np.random.Philox(key=key)

    def uniform(self, shape: Sequence[int]) -> Array:
        """float64 in [0, 1), multiples of 2^-53."""
        raw = self._raw(math.prod(shape))
        return np.reshape((raw >> np.uint64(11)).astype(np.float64) * 2.0**-53, shape)

    def normal(self, shape: Sequence[int]) -> Array:
        """float64 of mean 0 and variance 1: the sum of twelve uniforms less six, within (-6, 6).

        Exact, unlike Box-Muller, whose logarithm and cosine differ between C libraries.
        """
        count = math.prod(shape)
        blocks = [self._normals(min(_BLOCK, count - start)) for start in range(0, count, _BLOCK)]
        return np.reshape(np.concatenate(blocks) if blocks else np.zeros(0), shape)

    def integers(self, shape: Sequence[int], low: int, high: int) -> Array:
        """int64 in [low, high); the ends come first, so that both are always tried."""
        spread: Array = np.floor(self.uniform(shape) * (high - low)).astype(np.int64) + low
        flat = spread.reshape(-1)
        flat[: min(2, flat.size)] = [high - 1, low][: min(2, flat.size)]
        return spread

    def _raw(self, count: int) -> Array:
        return np.asarray(self._words.random_raw(count), np.uint64).reshape(-1)

    def _normals(self, count: int) -> Array:
        raw = self._raw(4 * count).reshape(4, count)
        # Twelve lanes of sixteen bits carry the sum, the fourth word the digits below them. Lanes are
        # added in pairs of 32 bits, all words at once.
        low = np.uint64(0x0000FFFF0000FFFF)
        pairs = sum((word & low) + ((word >> np.uint64(16)) & low) for word in raw[:3])
        total = ((pairs & np.uint64(0xFFFFFFFF)) + (pairs >> np.uint64(32))).astype(np.float64)
        fine = (raw[3] >> np.uint64(32)).astype(np.float64) * 2.0**-32
        return np.asarray((total + 6 + fine - 0.5) * 2.0**-16 - 6)


def cast(array: Array, dtype: ir.DataType) -> Array:
    """The array in the NumPy (or `ml_dtypes`) form of an ONNX dtype; integers saturate, never wrap."""
    target = dtype.numpy()
    if dtype.is_floating_point() or target.kind in "cb":
        return array.astype(target)
    low, high = integer_range(dtype)
    # In float64 the greatest int64 rounds up to 2^63, which would wrap: stay one float below.
    top = np.nextafter(float(high), 0) if high >= 2**53 and array.dtype.kind == "f" else high
    return np.clip(array, low, top).astype(target)


def integer_range(dtype: ir.DataType) -> tuple[int, int]:
    """The least and the greatest number of an integer dtype, sub-byte ones included."""
    bits = dtype.bitwidth
    if dtype.is_signed():
        return -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    return 0, (1 << bits) - 1
