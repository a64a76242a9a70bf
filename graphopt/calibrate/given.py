"""Samples that Python code gives: mappings of arrays, tensors of other libraries, numbers; arrays of many samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.errors import DataError
from graphopt.runtime.specs import Kind, TensorSpec, name_list
from graphopt.verify.feed_files import Feed, check_feed
from graphopt.verify.metrics import is_float

Array: TypeAlias = "np.ndarray[Any, Any]"


def feed_of(name: str, given: object, specs: Sequence[TensorSpec]) -> Feed:
    """One sample as arrays by input name; what is given without names follows the order of the inputs.

    Raises:
        DataError: it is no mapping of arrays, or does not fit; the message names the sample and the input.
    """
    return check_feed(Feed(name, arrays_of(name, given, specs)), specs)


def arrays_of(name: str, given: object, specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """What is given as arrays by input name, as far as it can be read as that.

    Raises:
        DataError: it is no mapping, nor as many values as the model takes.
    """
    known = {spec.name: spec for spec in specs}
    named = _named(name, given, [spec for spec in specs if not spec.overridable])
    return {key: _array(name, key, value, known.get(key)) for key, value in named.items()}


def _named(name: str, given: object, required: Sequence[TensorSpec]) -> dict[str, Any]:
    if isinstance(given, Mapping):
        return dict(given)
    values = list(given) if isinstance(given, tuple | list) else [given]
    if len(values) == len(required) and not isinstance(given, str | bytes | None):
        return {spec.name: value for spec, value in zip(required, values, strict=True)}
    example = ", ".join(f"'{spec.name}': array" for spec in required) or "…"
    count = f" of {len(values)} values" if isinstance(given, tuple | list) else ""
    raise DataError(
        f"'{name}' is {type(given).__name__}{count}, and the model takes {name_list(required)}; give a mapping of "
        f"arrays by input name: {{{example}}}"
    )


def _array(name: str, key: str, value: Any, spec: TensorSpec | None) -> Any:  # noqa: ANN401
    """A value as an array: of NumPy's scalars and other libraries' tensors as it is, of numbers as the input wants."""
    if spec is None or spec.kind is not Kind.TENSOR or isinstance(value, np.ndarray):
        return value
    if not isinstance(value, bool | int | float | list | tuple) and not hasattr(value, "__array__"):
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"'{name}': the input '{key}' is {type(value).__name__}, which gives no array: {reason}; give a "
            "numpy array"
        ) from error
    return array if hasattr(value, "__array__") else _plain(array, spec)


def _plain(array: Array, spec: TensorSpec) -> Array:
    """Python numbers have no dtype of their own: they take that of the input, where none is lost."""
    if spec.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        return array
    wanted = spec.dtype.numpy()
    if array.dtype.kind in "iub" or (array.dtype.kind == "f" and is_float(wanted)):
        return array.astype(wanted)
    return array
