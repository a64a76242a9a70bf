"""Which versions of ONNX the installed ONNX Runtime takes."""

from __future__ import annotations

import functools
import re
from importlib.metadata import PackageNotFoundError, version

WHEELS = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-training", "onnxruntime-directml")
"""Distributions that provide the module `onnxruntime`."""

RELEASES = (((1, 32), 28, 14), ((0, 0), 26, 13))
"""From which release on which opset of ai.onnx and which IR version are taken, the newest first.

Tried with models of one node under each: 1.31.1 refuses opset 27 and IR 14, 1.32.0 takes opset 28 and IR 14.
"""


def newest_opset() -> int:
    """The newest opset of ai.onnx that is taken without a warning."""
    return _limits(_release())[0]


def newest_ir() -> int:
    """The newest IR version that is taken."""
    return _limits(_release())[1]


def _limits(release: tuple[int, int]) -> tuple[int, int]:
    return next((opset, ir) for since, opset, ir in RELEASES if release >= since)


@functools.cache
def _release() -> tuple[int, int]:
    """Major and minor version of the installed wheel, without importing it; (0, 0) where there is none."""
    for wheel in WHEELS:
        try:
            found = re.match(r"(\d+)\.(\d+)", version(wheel))
        except PackageNotFoundError:
            continue
        if found:
            return int(found[1]), int(found[2])
    return 0, 0
