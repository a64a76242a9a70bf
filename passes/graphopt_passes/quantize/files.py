"""Models as files for sessions, for as long as it takes to make one."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from graphopt.ir.model_file import ExternalData, save_model


@contextlib.contextmanager
def on_disk(model: ir.Model) -> Iterator[Path]:
    """The path of the model with its weights in a file beside it, gone afterwards.

    The runtime maps such weights: they are not copied into memory, and the model may be of any size.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "model.onnx"
        save_model(model, path, external=ExternalData.SINGLE_FILE)
        yield path
