"""How golden cases lie on disk: values as ONNX protobufs, large outputs as statistics and samples."""

from __future__ import annotations

import hashlib
import json
import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx.numpy_helper

from graphopt.errors import DataError
from graphopt.runtime.specs import Kind
from graphopt.verify import metrics
from graphopt.verify.compare import Hint, OutputReport, Profile, compare
from graphopt.verify.draws import Draws
from graphopt.verify.feed_files import read_value

if TYPE_CHECKING:
    from pathlib import Path

    from graphopt.runtime.specs import TensorSpec

Array: TypeAlias = "np.ndarray[Any, Any]"

MANIFEST = "golden.json"
STRUCTURE = "structure.txt"
SCHEMA = 2

MAX_STORED_BYTES = 1 << 16
"""Larger arrays are not put under version control: outputs are summarised, generated inputs made again."""

MAX_CASE_BYTES = 1 << 19
"""What all stored values of a case may take together; the rest is treated as if it were too large."""

SAMPLES = 64


def write_value(path: Path, name: str, value: object, kind: Kind) -> None:
    """Writes an input or output as the protobuf of its kind, as ONNX test data sets do.

    Raises:
        DataError: maps nested in sequences have no protobuf.
    """
    helper = onnx.numpy_helper
    if kind.optional:
        proto = helper.from_optional(value, name)
    elif isinstance(value, list):
        if value and not isinstance(value[0], np.ndarray):
            raise DataError(
                f"The value '{name}' is a sequence of {type(value[0]).__name__}, which '{path}' cannot hold."
            )
        proto = helper.from_list(value, name)
    elif isinstance(value, dict):
        proto = helper.from_dict(value, name)
    else:
        proto = helper.from_array(np.asarray(value), name)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def read_stored(path: Path, spec: TensorSpec) -> Any:  # noqa: ANN401
    """The value in a .pb file, read as the kind that the model states.

    Raises:
        DataError: the file is missing or not of that kind.
    """
    return read_value(path, spec)[1]


def value_hash(value: object) -> str:
    """SHA-256 over kinds, dtypes, shapes and bytes, the same on every machine."""
    digest = hashlib.sha256()
    _feed_hash(digest, value)
    return digest.hexdigest()


def _feed_hash(digest: Any, value: object) -> None:  # noqa: ANN401
    if isinstance(value, list):
        digest.update(f"list {len(value)};".encode())
        for item in value:
            _feed_hash(digest, item)
    elif isinstance(value, dict):
        digest.update(json.dumps(sorted((str(k), repr(v)) for k, v in value.items())).encode())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.name}{list(value.shape)};".encode())
        text = value.dtype.kind in "OUS"
        digest.update(json.dumps(value.tolist()).encode() if text else _little_endian(value))
    else:
        digest.update(repr(value).encode())


def _little_endian(array: Array) -> bytes:
    swapped = (
        array.astype(array.dtype.newbyteorder("<"), copy=False)
        if array.dtype.kind in "iufc"
        else array
    )
    return np.ascontiguousarray(swapped).tobytes()


def size_bytes(value: object) -> int:
    """Bytes of the arrays in a value."""
    if isinstance(value, list):
        return sum(size_bytes(item) for item in value)
    return value.nbytes if isinstance(value, np.ndarray) else 0


def summarise(name: str, array: Array) -> dict[str, Any]:
    """Statistics of the finite elements and 64 elements at places that the name decides; JSON without NaN."""
    flat = array.reshape(-1)
    numbers = flat.astype(np.float64)
    finite = numbers[np.isfinite(numbers)]
    picked = _places(name, flat.size)
    return {
        "dtype": array.dtype.name,
        "shape": list(array.shape),
        "finite": int(finite.size),
        "mean": float(finite.mean()) if finite.size else None,
        "rms": metrics.root_mean_square(finite),
        "min": float(finite.min()) if finite.size else None,
        "max": float(finite.max()) if finite.size else None,
        "samples": [_number(numbers[index]) for index in picked],
    }


def compare_summary(
    name: str, summary: dict[str, Any], array: object, profile: Profile
) -> OutputReport:
    """Compares an output with the summary of what was recorded: samples by the profile, then the statistics."""
    if not isinstance(array, np.ndarray):
        return OutputReport(
            name, passed=False, equal=False, why="recorded as an array, now something else"
        )
    for what, now in (("dtype", array.dtype.name), ("shape", list(array.shape))):
        if summary[what] != now:
            return OutputReport(
                name, passed=False, equal=False, why=f"{what} {now}, recorded {summary[what]}"
            )
    now = summarise(name, array)
    recorded = np.array([_parsed(sample) for sample in summary["samples"]])
    current = np.array([_parsed(sample) for sample in now["samples"]])
    report = compare(
        name,
        recorded.astype(array.dtype),
        current.astype(array.dtype),
        profile,
        Hint(floor=summary["rms"]),
    )
    # Means and extremes of reordered arithmetic move no further than the elements may.
    bound = max(profile.tolerance, 1e-12) * 2 * max(summary["rms"], abs(summary["max"] or 0.0))
    for what in ("finite", "mean", "rms", "min", "max"):
        was, is_ = summary[what], now[what]
        same = was == is_ or (was is not None and is_ is not None and abs(was - is_) <= bound)
        if report.passed and not same:
            return OutputReport(
                name, passed=False, equal=False, why=f"{what} {is_}, recorded {was}"
            )
    return report


def _places(name: str, size: int) -> Array:
    if size == 0:
        return np.zeros(0, np.int64)
    return np.sort(Draws(0, f"samples of {name}").integers((SAMPLES,), 0, size))


def _number(value: float) -> float | str:
    return float(value) if math.isfinite(value) else repr(float(value))


def _parsed(value: float | str) -> float:
    return float(value)
