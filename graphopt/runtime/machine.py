"""What this machine is, as far as the last bits of results depend on it."""

from __future__ import annotations

import platform
from pathlib import Path


def processor() -> str:
    """The name of the processor, as the system has it."""
    return _said("model name") or platform.processor()


def arithmetic() -> str:
    """The processor and what it can: kernels are chosen by that, and round differently."""
    return "; ".join((platform.machine(), processor(), _said("flags") or _said("Features")))


def _said(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(key))
    return next(named, "")
