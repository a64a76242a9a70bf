"""Whether a model's values are what it declares: a stale shape misleads whoever reads the file and does not run it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from graphopt.ir.model_file import load_model
from graphopt.ir.shapes import Shapes
from graphopt.runtime.specs import input_specs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import onnx_ir as ir

    from graphopt.runtime.specs import Dim, TensorSpec
    from graphopt.verify.feeds import Feed

Shape: TypeAlias = "tuple[int | None, ...]"


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


def stated_shapes(model: ir.Model) -> dict[str, Shape]:
    """What a model says of the shapes of the values within its main graph, by name."""
    return {
        value.name: tuple(dim if isinstance(dim, int) else None for dim in value.shape)
        for node in model.graph
        for value in node.outputs
        if value.name and value.shape is not None and not value.is_graph_output()
    }


def stale_shape(model: ir.Model, known: Mapping[str, Shape], feeds: Sequence[Feed]) -> str:
    """The first value within a model whose declared size is not what follows from the inputs, in words; "" for none.

    Runtimes plan memory and choose kernels by what is declared of values within, too.

    Args:
        model: a candidate.
        known: what the original says; its own lapses are forgiven.
        feeds: inputs with sizes that differ.
    """
    inputs = input_specs(model)
    suspects = {
        name: shape
        for name, shape in stated_shapes(model).items()
        if any(dim is not None for dim in shape) and known.get(name) != shape
    }
    if not suspects or all(isinstance(dim, int) for spec in inputs for dim in spec.shape or ()):
        return ""
    bare = load_model(model)
    for node in bare.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    facts = Shapes(bare)
    values = {v.name: v for node in bare.graph for v in node.outputs if v.name in suspects}
    sizes = {feed.name: _symbols(inputs, feed.values) for feed in feeds}
    for name, value in values.items():
        for axis, (dim, stated) in enumerate(
            zip(facts.dims(value) or (), suspects[name or ""], strict=False)
        ):
            if stated is None:
                continue
            for feed, symbols in sizes.items():
                size = dim.evaluate(symbols)
                if size not in (None, stated):
                    return (
                        f"'{name}' has size {size} on axis {axis} on feed '{feed}', declared {stated}: the declared "
                        "shape is wrong"
                    )
    return ""


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
