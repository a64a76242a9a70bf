"""Whether a rewrite gains on this machine: both forms of the place in question, timed side by side.

What was measured is kept in a file, by structure (operators, attributes, shapes, element types), processor and version
of the runtime, so that a second run decides alike without measuring.  Weights are no part of the key.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.ir import operators, values
from graphopt.ir.model_file import model_to_bytes
from graphopt.rewrite import Context
from graphopt.rewrite.engine import ENOUGH
from graphopt.runtime import onnxruntime_api
from graphopt.runtime.machine import processor
from graphopt.runtime.measure import measure
from graphopt.runtime.session import OptimizationLevel, Session

SECONDS = 0.15
"""How long two forms are timed at first; a loss is timed again, four times as long, before it is believed."""

USUAL = {0: 1}
"""Size of an unknown axis, by place: a batch of one, else `OTHER`."""

OTHER = 64
KEPT = Path(".cache") / "graphopt" / "autotune.json"
"""Where results are kept, below the user's home."""


@dataclasses.dataclass(frozen=True)
class Autotuner:
    """Times forms of places in a graph.

    Attributes:
        file: where results are kept; made where it is not there.
        ctx: the run whose model, shapes and imports hold; its cache is shared by all replays.
    """

    file: Path
    ctx: Context

    @property
    def known(self) -> MutableMapping[str, float | None]:
        """Results so far, gains by key: what the file had, and what this run measured."""
        if "autotune" not in self.ctx.cache:
            self.ctx.cache["autotune"] = _read(self.file)
        found: MutableMapping[str, float | None] = self.ctx.cache["autotune"]
        return found

    def gain(
        self,
        before: Sequence[ir.Node],
        old: Sequence[ir.Value],
        after: Sequence[ir.Node],
        new: Sequence[ir.Value],
    ) -> float | None:
        """How many times as fast the new form is; None where the place cannot be run alone."""
        key = self._key(before, after)
        if key not in self.known:
            self.known[key] = self._timed(before, old, after, new)
            _write(self.file, self.known)
        return self.known[key]

    def _timed(
        self,
        before: Sequence[ir.Node],
        old: Sequence[ir.Value],
        after: Sequence[ir.Node],
        new: Sequence[ir.Value],
    ) -> float | None:
        sizes: dict[str, int] = {}
        models = [self._alone(*form, sizes) for form in ((before, old), (after, new))]
        if None in models:
            return None
        try:
            sessions = [
                Session(model_to_bytes(model), level=OptimizationLevel.ALL)
                for model in models
                if model
            ]
            feeds = [self._feeds(model, sizes) for model in models if model]
            found = measure(sessions, feeds, seconds=SECONDS, min_rounds=7)[1].cpu_ratio
            if found < ENOUGH:
                again = measure(sessions, feeds, seconds=4 * SECONDS, min_rounds=15)[1].cpu_ratio
                found = max(found, again)
        except GraphoptError:
            return None
        return round(found, 3)

    def _alone(
        self, nodes: Sequence[ir.Node], outputs: Sequence[ir.Value], sizes: MutableMapping[str, int]
    ) -> ir.Model | None:
        """Some nodes as a model of their own; None where they have subgraphs, or a type or rank is unknown."""
        if any(list(operators.subgraphs(node)) for node in nodes):
            return None
        made: dict[ir.Value, ir.Value] = {}
        inputs: list[ir.Value] = []
        held: list[ir.Value] = []
        produced = {out for node in nodes for out in node.outputs}
        for value in _read_by(nodes):
            if value in produced or value in made:
                continue
            tensor = _constant(value)
            copy = ir.Value(name=f"v{len(made)}", type=value.type, const_value=tensor)
            if tensor is None:
                copy.shape = self._shape(value, sizes)
                if copy.shape is None or value.dtype is None:
                    return None
                inputs.append(copy)
            else:
                copy.shape = ir.Shape(list(tensor.shape.numpy()))
                held.append(copy)
            made[value] = copy
        clones = [_cloned(node, made, number) for number, node in enumerate(nodes)]
        results = [made.get(value) for value in outputs]
        if not results or any(value is None for value in results):
            return None
        for old, result in zip(outputs, results, strict=True):
            if result is not None:
                result.type = old.type
        graph = ir.Graph(
            inputs,
            [value for value in results if value is not None],
            nodes=clones,
            initializers=held,
            opset_imports={"com.microsoft": 1, **self.ctx.model.opset_imports},
            name="place",
        )
        return ir.Model(graph, ir_version=self.ctx.model.ir_version)

    def _shape(self, value: ir.Value, sizes: MutableMapping[str, int]) -> ir.Shape | None:
        dims = self.ctx.shapes.dims(value)
        if dims is None:
            return None
        return ir.Shape(
            [
                d.value if d.value is not None else sizes.setdefault(str(d), USUAL.get(axis, OTHER))
                for axis, d in enumerate(dims)
            ]
        )

    def _feeds(self, model: ir.Model, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Ordinary numbers for every input; zeros where they may be indices."""
        rng = np.random.default_rng(len(sizes))
        feeds: dict[str, Any] = {}
        for value in model.graph.inputs:
            assert value.shape is not None
            assert value.dtype is not None
            dims, dtype = list(value.shape.numpy()), value.dtype
            kind = dtype.numpy()
            drawn = rng.standard_normal(dims) if dtype.is_floating_point() else np.zeros(dims)
            feeds[str(value.name)] = (np.ones(dims) if kind == np.bool_ else drawn).astype(kind)
        return feeds

    def _key(self, before: Iterable[ir.Node], after: Iterable[ir.Node]) -> str:
        lines = [onnxruntime_api.runtime().__version__, processor()]
        for nodes in (before, after):
            numbers: dict[ir.Value | None, int] = {None: 0}
            for node in nodes:
                shown = sorted(f"{a.name}={a.value}" for a in node.attributes.values())
                args = [
                    f"{numbers.setdefault(v, len(numbers))}:{None if v is None else self._said(v)}"
                    for v in (*node.inputs, *node.outputs)
                ]
                lines.append(f"{node.domain}.{node.op_type}({', '.join(args)}) {shown}")
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]

    def _said(self, value: ir.Value) -> str:
        dims = self.ctx.shapes.dims(value)
        return f"{value.dtype}{None if dims is None else [str(d) for d in dims]}"


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor of a constant, of one also that a rewrite has made and that is in no graph yet."""
    fresh = value.producer() is None and not value.is_graph_input()
    return values.constant(value) or (value.const_value if fresh else None)


def _read_by(nodes: Iterable[ir.Node]) -> Iterable[ir.Value]:
    return (value for node in nodes for value in node.inputs if value is not None)


def _cloned(node: ir.Node, made: MutableMapping[ir.Value, ir.Value], number: int) -> ir.Node:
    inputs = [None if value is None else made[value] for value in node.inputs]
    clone = ir.Node(
        node.domain,
        node.op_type,
        inputs,
        attributes=tuple(node.attributes.values()),
        num_outputs=len(node.outputs),
        name=f"n{number}",
    )
    for index, (old, new) in enumerate(zip(node.outputs, clone.outputs, strict=True)):
        new.name = f"n{number}_{index}"
        made[old] = new
    return clone


def _read(file: Path) -> dict[str, float | None]:
    """What an earlier run measured; nothing where the file is not there or not ours."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {str(k): float(v) for k, v in found.items() if isinstance(v, (int, float))}


def _write(file: Path, known: Mapping[str, float | None]) -> None:
    """Keeps what can be kept: a folder that cannot be written costs the next run its time, no more."""
    kept = {key: gain for key, gain in sorted(known.items()) if gain is not None}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(f".{hashlib.sha256(repr(kept).encode()).hexdigest()[:8]}")
        temporary.write_text(json.dumps(kept, indent=0))
        temporary.replace(file)
    except OSError:
        return
