"""ONNX Runtime, imported on first use: it costs a quarter of a second that `graphopt --help` need not pay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType


def runtime() -> ModuleType:
    """The module `onnxruntime`."""
    import onnxruntime as ort  # noqa: PLC0415

    module: ModuleType = ort
    return module


def version() -> str:
    """The version of ONNX Runtime in use."""
    return str(runtime().__version__)


def errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises: its own types derive from Exception directly, the rest are built in."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state  # noqa: PLC0415

    own = ("EPFail", "EngineError", "Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf")
    more = ("ModelLoaded", "NoModel", "NoSuchFile", "NotImplemented", "RuntimeException")
    known: Any = [getattr(state, name) for name in own + more if hasattr(state, name)]
    return (*known, RuntimeError, ValueError, TypeError)
