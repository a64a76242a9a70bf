"""Writes a model as ONNX Runtime stores it, in a process of its own: `python -m graphopt.emit.ort_writer`.

ONNX Runtime fills hash tables whose seed is an address, and writes them in the order that they have in memory: where
the system puts libraries at random addresses, each run gives other bytes.  The process asks the system to leave that
off for itself (ADDR_NO_RANDOMIZE), and starts anew.  Some containers forbid it; then the bytes differ.
Source: abseil, absl/hash/internal/hash.h (`Seed`); onnxruntime/core/framework/kernel_type_str_resolver.cc.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

ADDR_NO_RANDOMIZE = 0x0040000
_AGAIN = "--again"
_KEPT = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
"""Of the environment: what else is in it would only move memory about."""


def fixed_addresses() -> bool:
    """Asks for fixed addresses from the next program on; whether the system grants it."""
    try:
        personality = ctypes.CDLL(None, use_errno=True).personality
    except (OSError, AttributeError, TypeError):
        return False  # no Linux
    held = int(personality(ctypes.c_ulong(0xFFFFFFFF)))
    return held != -1 and int(personality(ctypes.c_ulong(held | ADDR_NO_RANDOMIZE))) != -1


def write(model: str, output: str, form: str) -> str:
    """Writes `model` at the runtime's basic level in `form` (ORT or ONNX); returns what is wrong, or ""."""
    from graphopt.runtime import onnxruntime_api  # noqa: PLC0415  after the program has started anew

    ort = onnxruntime_api.runtime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = output
    options.add_session_config_entry("session.save_model_format", form)
    options.log_severity_level = 4
    options.intra_op_num_threads = options.inter_op_num_threads = 1  # threads allocate in any order
    try:
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except onnxruntime_api.errors() as error:
        return " ".join(str(error).split())[:300]
    return ""


def main(arguments: list[str]) -> None:
    """What the process does: `[--again] MODEL OUTPUT FORM`; prints whether addresses were fixed, and what is wrong."""
    again = arguments[0] == _AGAIN
    if not again and fixed_addresses():
        module = [sys.executable, "-P", "-m", "graphopt.emit.ort_writer", _AGAIN]
        # Python's own hash seed decides what is allocated, and so where the runtime's objects lie.
        told = {name: os.environ[name] for name in _KEPT if name in os.environ}
        told |= {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
        os.execve(sys.executable, [*module, *arguments], told)  # noqa: S606  ourselves
    model, output, form = arguments[-3:]
    fault = write(model, output, form)
    sys.stdout.write(json.dumps({"reproducible": again, "fault": fault}))


if __name__ == "__main__":
    main(sys.argv[1:])
