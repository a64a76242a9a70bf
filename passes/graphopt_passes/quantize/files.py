"""Models as files for sessions, for as long as it takes to make one; and what keeps large ones out of memory."""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.ir.mapped import MappedFile, MappedTensor, Notes
from graphopt.ir.model_file import ExternalData, save_model

LARGE, HEAVY = 1 << 30, 1 << 24
"""Bytes of all weights, and of one, from which on none are held in memory that need not be."""


@contextlib.contextmanager
def on_disk(model: ir.Model) -> Iterator[Path]:
    """The path of the model with its weights in a file beside it, gone afterwards.

    The runtime maps such weights: they are not copied into memory, and the model may be of any size.  Pages of its
    own files that were read are let go of: beside a session they are not needed.
    """
    rest(model)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path, external=ExternalData.SINGLE_FILE, durable=False)
        yield path


def is_large(model: ir.Model) -> bool:
    """Whether weights take so much that a session of their own, or a copy, is not kept for later."""
    return sum(value.const_value.nbytes for value in _held(model) if value.const_value) >= LARGE


def outside(array: np.ndarray[Any, Any], name: str) -> ir.TensorProtocol:
    """A tensor whose elements lie in a file without a name, where they are many; else, or without room, in memory.

    The file is gone with the tensor, or with the process, however that ends.
    """
    if array.nbytes >= HEAVY:
        with contextlib.suppress(OSError), tempfile.NamedTemporaryFile(prefix="graphopt-") as file:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            file.flush()
            dtype = ir.DataType.from_numpy(array.dtype)
            return MappedTensor(MappedFile(file.name), dtype, array.shape, notes=Notes(name=name))
    return ir.tensor(array, name=name)


def rest(model: ir.Model) -> None:
    """Lets go of the pages of mapped weights that were read; they are read again when they are needed.

    Where weights are large, of models that nobody knows any more too: their nodes and values know each other.
    """
    if is_large(model):
        gc.collect()
    for file in {file for value in _held(model) if (file := _file_of(value)) is not None}:
        file.advise("MADV_DONTNEED")


def _held(model: ir.Model) -> Iterator[ir.Value]:
    return (value for graph in model.graphs() for value in graph.initializers.values())


def _file_of(value: ir.Value) -> MappedFile | None:
    tensor = value.const_value
    mapping = tensor.mapping if isinstance(tensor, MappedTensor) else None
    return None if mapping is None else mapping[0]
