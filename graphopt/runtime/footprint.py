"""Memory that a model takes: its peak in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import json
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.ir.mapped import MappedTensor

RUNS = 2
"""The first run fills the runtime's arena, the second shows that it is full."""

SECONDS = 600


def peak_bytes(
    model: Path | bytes,
    feed: Mapping[str, Any],
    *,
    level: str,
    threads: int = 1,
    providers: tuple[str, ...] = ("CPUExecutionProvider",),
) -> int | None:
    """By how many bytes loading and running the model raises the memory of a fresh process at its peak.

    None where the system does not tell: the figures are those of /proc/self/status.

    Args:
        model: the model.
        feed: inputs.
        level: name of an `OptimizationLevel`.
        threads: inside an operator.
        providers: execution providers in order of preference.

    Raises:
        ModelError: the process fails.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-memory-") as scratch:
        task = Path(scratch) / "task"
        about = {"model": model, "feed": dict(feed), "level": level, "threads": threads}
        task.write_bytes(pickle.dumps({**about, "providers": providers}))
        line = [sys.executable, "-m", "graphopt.runtime.footprint", str(task)]
        ran = subprocess.run(  # noqa: S603  our own module
            line, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    if ran.returncode:
        last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"the memory of the model cannot be measured: {last}")
    found: int | None = json.loads(ran.stdout)
    return found


def trim() -> None:
    """Gives memory that was freed back to the system, where the C library has a way to (glibc).

    Arrays of up to 32 MiB come from its heap, which otherwise keeps what a few hundred of them have taken.
    """
    if sys.platform == "linux":
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:
            give_back(0)


def make_room() -> None:
    """Gives everything back that nobody holds any more, before much is asked for: cycles of Python objects, too.

    Python looks for cycles when objects have become many, however large they are: dropped graphs hold on to weights.
    """
    gc.collect()
    trim()


def let_go(tensors: Iterable[ir.TensorProtocol]) -> None:
    """Lets go of the pages of the files that some tensors are mapped from, and of memory that was freed."""
    mapped = [t.mapping for t in tensors if isinstance(t, MappedTensor) and t.mapping is not None]
    for file in {mapping[0] for mapping in mapped}:
        file.advise("MADV_DONTNEED")
    trim()


def _status(field: str) -> int | None:
    """VmHWM or VmRSS of this process in bytes; unlike getrusage's, they begin anew with the program."""
    try:
        text = Path("/proc/self/status").read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def main(path: Path) -> int | None:
    """What the process of `peak_bytes` does."""
    from graphopt.runtime import onnxruntime_api  # noqa: PLC0415
    from graphopt.runtime.session import OptimizationLevel, Session  # noqa: PLC0415

    onnxruntime_api.runtime()
    task = pickle.loads(path.read_bytes())  # noqa: S301  written by `peak_bytes` a moment ago
    before = _status("VmRSS")
    session = Session(
        task["model"],
        level=OptimizationLevel[task["level"]],
        threads=task["threads"],
        providers=task["providers"],
    )
    for _ in range(RUNS):
        session.run(task["feed"])
    peak = _status("VmHWM")
    return None if peak is None or before is None else peak - before


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]))))
