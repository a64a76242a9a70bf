"""Whether a model's outputs are what it declares: a stale shape misleads whoever reads the file and does not run it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from graphopt.runtime.specs import Dim, TensorSpec


def broken_promises(
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    feed: Mapping[str, Any],
    results: Mapping[str, Any],
) -> dict[tuple[str, int], str]:
    """Axes of outputs whose size is not the one declared, by output and axis, in words.

    Args:
        inputs: as the model declares them.
        outputs: likewise.
        feed: what it was run with; decides what its symbols stand for.
        results: what it returned.
    """
    symbols = _symbols(inputs, feed)
    found = {}
    for spec in outputs:
        result = results.get(spec.name)
        if spec.shape is None or not isinstance(result, np.ndarray):
            continue
        if len(spec.shape) != result.ndim:
            found[spec.name, -1] = f"rank {result.ndim}, declared {len(spec.shape)}"
            continue
        for axis, (dim, size) in enumerate(zip(spec.shape, result.shape, strict=True)):
            declared = symbols.get(dim) if isinstance(dim, str) else dim
            if declared is not None and declared != size:
                found[spec.name, axis] = f"size {size}, declared {_told(dim, declared)}"
    return found


def _symbols(inputs: Sequence[TensorSpec], feed: Mapping[str, Any]) -> dict[str, int]:
    found: dict[str, int] = {}
    for spec in inputs:
        value = feed.get(spec.name)
        if spec.shape is None or not isinstance(value, np.ndarray):
            continue
        for dim, size in zip(spec.shape, value.shape, strict=False):
            if isinstance(dim, str):
                found.setdefault(dim, size)
    return found


def _told(dim: Dim, size: int) -> str:
    return f"{dim} = {size}" if isinstance(dim, str) else str(size)
