"""Inputs from files: npz, folders of npz, ONNX `test_data_set_*` folders, JSON; everything checked by name."""

from __future__ import annotations

import dataclasses
import json
import re
import zipfile
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
from google.protobuf.message import (  # type: ignore[import-untyped, unused-ignore]
    DecodeError,
)

from graphopt.errors import DataError
from graphopt.runtime import marshal
from graphopt.runtime.specs import Kind, TensorSpec, dtype_name, name_list

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

Array: TypeAlias = "np.ndarray[Any, Any]"

FORMS = "an .npz file, a folder of .npz files, an ONNX test_data_set folder (input_0.pb …) or a .json file"


@dataclasses.dataclass(frozen=True)
class Feed:
    """Values for the inputs of a model, and where they come from.

    Attributes:
        name: for messages: "normal, typical (batch=2)", or the path of the file.
        values: arrays, lists of arrays, dicts or None, by input name.
    """

    name: str
    values: Mapping[str, Any]


def read_feeds(path: Path, specs: Sequence[TensorSpec]) -> list[Feed]:
    """Reads inputs from a file or folder; returns at least one feed, each complete and fitting.

    Args:
        path: an npz or JSON file (arrays by input name; JSON also as a list of such objects), a folder of
            npz files, an ONNX test data set, or a folder of those.
        specs: the inputs of the model.

    Raises:
        DataError: nothing is there or cannot be read, an input is missing, unknown, or of another dtype,
            rank or size, or two inputs disagree about a symbolic dimension.
    """
    feeds = [check_feed(feed, specs) for feed in _read(path, specs)]
    if not feeds:
        raise DataError(f"'{path}' holds no inputs; give {FORMS}.")
    return feeds


def _read(path: Path, specs: Sequence[TensorSpec]) -> Iterator[Feed]:
    if not path.exists():
        raise DataError(f"There is no file or folder '{path}'; give {FORMS}.")
    if path.is_dir():
        yield from _read_folder(path, specs)
    elif path.suffix == ".npz":
        yield Feed(str(path), read_npz(path))
    elif path.suffix == ".json":
        yield from _read_json(path, specs)
    else:
        raise DataError(f"'{path}' is not a form of inputs that can be read; give {FORMS}.")


def _read_folder(path: Path, specs: Sequence[TensorSpec]) -> Iterator[Feed]:
    if any(path.glob("input_*.pb")):
        yield Feed(str(path), _read_data_set(path, specs))
        return
    for entry in sorted(path.iterdir(), key=natural_order):
        if entry.is_dir() and any(entry.glob("input_*.pb")):
            yield Feed(str(entry), _read_data_set(entry, specs))
        elif entry.suffix == ".npz":
            yield Feed(str(entry), read_npz(entry))


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Orders input_2 before input_10."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


def read_npz(path: Path) -> dict[str, Any]:
    """The arrays of an npz file by name.

    Raises:
        DataError: it cannot be read as one.
    """
    try:
        # Opened here: np.load of NumPy 2.4 leaves its own handle open when the archive is broken.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise DataError(
                    f"'{path}' is a single array without a name. Write it with numpy.savez."
                )
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"'{path}' cannot be read as npz: {_reason(error)}. Write it with numpy.savez."
        ) from error
    except MemoryError as error:
        raise DataError(
            f"'{path}' promises arrays that do not fit into memory: {error}. Give smaller ones."
        ) from error


def _reason(error: Exception) -> str:
    # Of any file of another kind NumPy says so, and advises to load it unsafely.
    return "it is no archive of arrays" if "allow_pickle=` keyword" in str(error) else str(error)


def _read_json(path: Path, specs: Sequence[TensorSpec]) -> Iterator[Feed]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"'{path}' cannot be read as JSON: {error}.") from error
    dtypes = {spec.name: spec.dtype for spec in specs if spec.kind is Kind.TENSOR}
    for index, entry in enumerate(content if isinstance(content, list) else [content]):
        where = f"{path}[{index}]" if isinstance(content, list) else str(path)
        if not isinstance(entry, dict):
            raise DataError(
                f"'{where}' is {type(entry).__name__}; expected an object of lists by input name."
            )
        yield Feed(
            where,
            {
                name: _from_lists(value, dtypes.get(name), where, name)
                for name, value in entry.items()
            },
        )


def _from_lists(value: object, dtype: ir.DataType | None, where: str, name: str) -> object:
    if dtype is None or dtype is ir.DataType.UNDEFINED:
        return value
    target = np.dtype(object) if dtype is ir.DataType.STRING else dtype.numpy()
    try:
        return np.array(value, dtype=target)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError(
            f"'{where}': the input '{name}' is not an array of {dtype_name(dtype)}: {error}."
        ) from error


def _read_data_set(path: Path, specs: Sequence[TensorSpec]) -> dict[str, Any]:
    """An ONNX test data set: by the names in the files where those are the model's, else by order."""
    files = sorted(path.glob("input_*.pb"), key=natural_order)
    required = [spec for spec in specs if not spec.overridable]
    ordered = [*required, *(spec for spec in specs if spec.overridable)]
    if len(files) > len(ordered):
        raise DataError(
            f"'{path}' has {len(files)} inputs; the model takes {len(ordered)}: {name_list(ordered)}."
        )
    by_name = {spec.name: spec for spec in specs}
    loaded = [read_value(file, spec) for file, spec in zip(files, ordered, strict=False)]
    stated = [name for name, _ in loaded]
    if len(set(stated)) == len(stated) and all(name in by_name for name in stated):
        return {
            name: read_value(file, by_name[name])[1]
            for file, name in zip(files, stated, strict=True)
        }
    return {spec.name: value for spec, (_, value) in zip(ordered, loaded, strict=False)}


def read_value(path: Path, spec: TensorSpec) -> tuple[str, Any]:
    """The name and the value that a .pb file states, read as the kind that the input or output is.

    Raises:
        DataError: the file cannot be read as that kind.
    """
    kinds = {
        Kind.SEQUENCE: onnx.SequenceProto,
        Kind.TENSOR: onnx.TensorProto,
        Kind.MAP: onnx.MapProto,
    }
    proto = kinds.get(spec.kind, onnx.OptionalProto if spec.kind.optional else onnx.TensorProto)()
    try:
        proto.ParseFromString(path.read_bytes())
        return proto.name, _value_of(proto)
    except (OSError, DecodeError, ValueError, TypeError) as error:
        raise DataError(
            f"'{path}' cannot be read as {type(proto).__name__} for '{spec.name}' ({spec}): {error}."
        ) from error


def _value_of(proto: Any) -> Any:  # noqa: ANN401
    if isinstance(proto, onnx.TensorProto):
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            raise ValueError("it points to another file, which is not followed")
        return onnx.numpy_helper.to_array(proto)
    if isinstance(proto, onnx.SequenceProto):
        return onnx.numpy_helper.to_list(proto)
    if isinstance(proto, onnx.MapProto):
        return onnx.numpy_helper.to_dict(proto)
    return onnx.numpy_helper.to_optional(proto)


def check_feed(feed: Feed, specs: Sequence[TensorSpec]) -> Feed:
    """The feed with arrays in the dtypes of the model.

    Raises:
        DataError: an input is missing, unknown, or does not fit; the message names feed and input.
    """
    known = {spec.name: spec for spec in specs}
    for name in feed.values:
        if name not in known:
            raise DataError(
                f"'{feed.name}' has the input '{name}', which the model lacks; it takes {name_list(specs)}."
            )
    for spec in specs:
        if spec.name not in feed.values and not spec.overridable:
            given = ", ".join(f"'{name}'" for name in feed.values) or "nothing"
            raise DataError(
                f"'{feed.name}' lacks the input '{spec.name}' ({spec}); it has {given}."
            )
    sizes: dict[str, tuple[int, str]] = {}
    checked = {
        name: _fitted(feed, known[name], value, sizes) for name, value in feed.values.items()
    }
    return Feed(feed.name, checked)


def _fitted(feed: Feed, spec: TensorSpec, value: Any, sizes: dict[str, tuple[int, str]]) -> Any:  # noqa: ANN401
    if spec.kind is not Kind.TENSOR or not isinstance(value, np.ndarray):
        if spec.kind is Kind.TENSOR:
            raise DataError(
                f"'{feed.name}': the input '{spec.name}' must be an array ({spec}), not {type(value).__name__}."
            )
        return value
    array = _with_dtype(feed, spec, value)
    if spec.shape is None:
        return array
    fits = array.ndim == len(spec.shape)
    if not fits or any(
        isinstance(d, int) and d != n for d, n in zip(spec.shape, array.shape, strict=True)
    ):
        raise DataError(
            f"'{feed.name}': the input '{spec.name}' must be {spec}; its shape is {list(array.shape)}. Reshape it."
        )
    for dim, size in zip(spec.shape, array.shape, strict=True):
        if isinstance(dim, str):
            first, where = sizes.setdefault(dim, (size, spec.name))
            if first != size:
                raise DataError(
                    f"'{feed.name}': the dimension '{dim}' is {first} in the input '{where}' and {size} in "
                    f"'{spec.name}'; give them the same size."
                )
    return array


def _with_dtype(feed: Feed, spec: TensorSpec, array: Array) -> Array:
    if spec.dtype is ir.DataType.UNDEFINED:
        return array
    if spec.dtype is ir.DataType.STRING:
        if array.dtype.kind in "OUS":
            return array.astype(object)
    elif array.dtype == spec.dtype.numpy():
        return array
    elif (
        spec.dtype in marshal.EXOTIC
        and array.dtype.kind in "Vu"
        and array.dtype.itemsize == spec.dtype.itemsize
    ):
        # npz has no bfloat16 or float8: NumPy writes their bits as void.
        return array.view(spec.dtype.numpy())
    raise DataError(
        f"'{feed.name}': the input '{spec.name}' must be {spec}; its dtype is {array.dtype}. "
        f"Convert it to {dtype_name(spec.dtype)}."
    )
