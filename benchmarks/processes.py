"""Runs Python code in fresh processes and says what it cost: CPU time, peak memory, and what went wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

# `ru_maxrss` will not do: it survives exec, so that a child starts with the peak of whoever started it.
_PRELUDE = """
import atexit, json, sys, time
marks = {}
def mark(name): marks[name] = time.process_time()
def _report(path=sys.argv.pop()):
    with open("/proc/self/status") as status:
        peak = next(line.split()[1] for line in status if line.startswith("VmHWM"))
    with open(path, "w") as file:
        json.dump({"peak_mb": int(peak) / 1024, "marks": marks}, file)
atexit.register(_report)
"""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one process took.

    Attributes:
        cpu_seconds: user and system time of all its threads, imports included.
        peak_mb: the most memory it had resident at once, mapped files included.
        marks: CPU seconds at each `mark(name)` of its code.
        failure: the last line that it wrote to stderr, if it failed; else "".
    """

    cpu_seconds: float
    peak_mb: float
    marks: Mapping[str, float]
    failure: str


def run(python: str, code: str, arguments: Sequence[str | Path], *, timeout: float = 900) -> Cost:
    """What `code` costs in a fresh process of the interpreter `python`, with `arguments` in `sys.argv[1:]`.

    Bytecode is cached, as it is where packages are installed: without, small runs would measure Python's compiler.
    """
    with tempfile.NamedTemporaryFile(suffix=".json") as report, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [python, "-c", _PRELUDE + code, *map(str, arguments), report.name],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=_environment(),
        )
        watch = threading.Timer(timeout, process.kill)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        watch.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
        told = json.loads(report.read() or b"{}")
        errors.seek(0)
        failure = _failure(process.returncode, errors.read().decode(errors="replace"))
    cpu = usage.ru_utime + usage.ru_stime
    return Cost(cpu, told.get("peak_mb", 0.0), told.get("marks", {}), failure)


def least(
    python: str, code: str, arguments: Sequence[str | Path], *, repeat: int, timeout: float = 900
) -> Cost:
    """The cheapest of some runs of the same code; the first failure, if there is one."""
    costs: list[Cost] = []
    for _ in range(repeat):
        costs.append(run(python, code, arguments, timeout=timeout))
        if costs[-1].failure:
            return costs[-1]
    cheapest = min(costs, key=lambda cost: cost.cpu_seconds)
    return dataclasses.replace(cheapest, peak_mb=min(cost.peak_mb for cost in costs))


def _environment() -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return {**kept, "PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir()) / "graphopt-bytecode")}


def _failure(code: int, errors: str) -> str:
    if code == 0:
        return ""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {code}"
