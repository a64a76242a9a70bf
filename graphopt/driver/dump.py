"""The model as it was before a pass that failed, for whoever looks into it."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import onnx_ir as ir

from graphopt.driver.attempt import attempt
from graphopt.driver.request import Request
from graphopt.errors import GraphoptError, PassError
from graphopt.ir.model_file import load_model, skeleton_bytes
from graphopt.pipeline import PassRun
from graphopt.rewrite import Context, Gate


class _ReachedError(Exception):
    """The replay has come to the pass that failed."""


def dump_before(request: Request, gate: Gate, fault: PassError) -> Path | None:
    """Writes the model as the failed pass found it to a file in the system's folder for temporary ones.

    Large weights are left out, so that the file is small and can be shown around; Netron and `onnx.checker` read it.
    Runs are deterministic and the pass has spoilt its own copy, so the pipeline is replayed up to there.

    Returns:
        the file; None where the replay fails elsewhere or nothing can be written.
    """
    skeleton = _skeleton_before(request, gate, fault)
    if skeleton is None:
        return None
    prefix = f"graphopt-before-{Path(fault.pass_name).name}-"
    with (
        contextlib.suppress(OSError),
        tempfile.NamedTemporaryFile(prefix=prefix, suffix=".onnx", delete=False) as file,
    ):
        file.write(skeleton)
        return Path(file.name)
    return None


def _skeleton_before(request: Request, gate: Gate, fault: PassError) -> bytes | None:
    if not fault.runs_before:
        return skeleton_bytes(load_model(request.source))
    seen = 0
    skeleton: bytes | None = None

    def watch(_run: PassRun, model: ir.Model, _ctx: Context) -> None:
        nonlocal seen, skeleton
        seen += 1
        if seen == fault.runs_before:
            skeleton = skeleton_bytes(model)
            raise _ReachedError

    with contextlib.suppress(_ReachedError, GraphoptError):
        attempt(request, gate, watch=watch)
    return skeleton
