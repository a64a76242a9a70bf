"""The part of a model behind one value, as a model of its own: what a change of that value does, without the rest.

What lies before is run once a sample; the part behind then reads the value as it is stored, and whatever else it needs
as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.ir import values
from graphopt.ir.scopes import dependencies
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions
from graphopt_passes.quantize.files import on_disk

Array: TypeAlias = "np.ndarray[Any, Any]"
Feed: TypeAlias = Mapping[str, Any]

KEPT_BYTES = 1 << 28
"""What values in the middle may take that are kept; those of further samples are computed again for each value."""


class Suffixes:
    """Parts of one model behind single values.

    Attributes:
        outputs: of the whole model, for each sample.
    """

    def __init__(self, model: ir.Model, names: Sequence[str], samples: Sequence[Feed]) -> None:
        self._model, self._samples = model, samples
        self._needs = [(node, dependencies(node)) for node in model.graph]
        inputs = {value.name for value in model.graph.inputs}
        sides = dict.fromkeys(side for name in names for side in self._behind(name)[0])
        options = SessionOptions(extra_outputs=tuple(each for each in sides if each not in inputs))
        with on_disk(model) as path:
            self._whole = Session(path, level=OptimizationLevel.ALL, options=options)
        wanted = [value.name or "" for value in model.graph.outputs]
        self.outputs: list[dict[str, Any]] = []
        self._kept: list[dict[str, Any]] = []
        room = KEPT_BYTES
        for sample in samples:
            made = self._whole.run(sample)
            self.outputs.append({name: made[name] for name in wanted})
            room -= sum(value.nbytes for value in made.values() if isinstance(value, np.ndarray))
            if room > 0:
                self._kept.append(made)

    def behind(self, name: str) -> Suffix:
        """What lies behind a value, ready to run."""
        sides, changed = self._behind(name)
        known = {spec.name for spec in self._whole.outputs}
        feeds = []
        for index, sample in enumerate(self._samples):
            wanted = [side for side in sides if side in known]
            if index < len(self._kept):
                made = {side: self._kept[index][side] for side in wanted}
            else:
                made = self._whole.run(sample, wanted) if wanted else {}
            feeds.append({side: sample[side] for side in sides if side in sample} | made)
        is_output = name in changed
        outputs = [output for output in changed if output != name]
        part = None
        if outputs:
            graph = ir.convenience.extract(self._model.graph, list(feeds[0]), outputs)
            for value in graph.inputs:
                if value.type is None:
                    dtype = ir.DataType.from_numpy(feeds[0][value.name or ""].dtype)
                    value.type = ir.TensorType(dtype)
            part = ir.Model(
                graph,
                ir_version=self._model.ir_version,
                functions=list(self._model.functions.values()),
            )
        return Suffix(part, name, feeds, is_output=is_output)

    def _behind(self, name: str) -> tuple[list[str], list[str]]:
        """What the part behind a value reads that is no constant, the value first; and the outputs that it changes."""
        behind = {name}
        found = {name: None}
        for node, needs in self._needs:
            if any(value.name in behind for value in needs):
                behind.update(value.name or "" for value in node.outputs)
                others = (v for v in needs if v.name not in behind and not values.is_constant(v))
                found.update((value.name or "", None) for value in others)
        outputs = (value.name or "" for value in self._model.graph.outputs)
        return list(found), [output for output in outputs if output in behind]


class Suffix:
    """A part of a model behind a value.

    Attributes:
        values: the value, for each sample.
    """

    def __init__(
        self, model: ir.Model | None, name: str, feeds: Sequence[Feed], *, is_output: bool
    ) -> None:
        self._name, self._feeds, self._is_output = name, feeds, is_output
        self.values: list[Array] = [feed[name] for feed in feeds]
        self._session: Session | None = None
        if model is not None:
            with on_disk(model) as path:
                self._session = Session(path, level=OptimizationLevel.ALL)

    def run(self, index: int, value: Array) -> dict[str, Any]:
        """The outputs that depend on the value, for a sample in which it is another."""
        itself = {self._name: value} if self._is_output else {}
        if self._session is None:
            return itself
        return self._session.run({**self._feeds[index], self._name: value}) | itself
