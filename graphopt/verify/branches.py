"""Which branches of `If` and which turns of `Loop` the feeds of a reference run take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.ir import scopes, values

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from graphopt.verify.feeds import Feed


def conditions(model: ir.Model) -> dict[str, str]:
    """Values of the main graph that decide which way control flow goes, and what they decide.

    Conditions that a subgraph or a function computes for itself cannot be seen from outside and are left out.
    """
    found: dict[str, str] = {}
    for node in scopes.all_nodes(model.graph):
        index = {"If": 0, "Loop": 1}.get(node.op_type)
        value = node.inputs[index] if index is not None and len(node.inputs) > index else None
        if value is None or node.domain or value.graph is not model.graph or not value.name:
            continue
        if values.is_constant(value) or value.is_initializer():
            continue
        found.setdefault(value.name, f"{node.op_type} '{node.name or node.outputs[0].name}'")
    return found


class Seen:
    """The ways that a model has gone on feeds so far.

    Args:
        conditions: what decides, by value; see `conditions`.
        run: runs a feed and returns the outputs, conditions among them; None where the model refuses it.
        keep: is given the outputs of feeds that go a new way.
    """

    def __init__(
        self,
        conditions: Mapping[str, str],
        run: Callable[[Feed], dict[str, Any] | None],
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self._conditions = conditions
        self._run = run
        self._keep = keep
        self._taken: set[tuple[str, bool]] = set()

    def note(self, outputs: Mapping[str, Any]) -> bool:
        """Notes which way each condition went; whether any went a new one."""
        before = len(self._taken)
        for name in self._conditions:
            held = outputs.get(name)
            if isinstance(held, np.ndarray) and held.size == 1:
                self._taken.add((name, bool(held.reshape(())[()])))
        return len(self._taken) > before

    def exist(self) -> bool:
        """Whether the model branches at all."""
        return bool(self._conditions)

    def missing(self) -> bool:
        """Whether some branch was never taken."""
        return len(self._taken) < 2 * len(self._conditions)

    def takes_new(self, feed: Feed) -> bool:
        """Whether a feed runs and goes a way that none before it went."""
        outputs = self._run(feed)
        if outputs is None or not self.note(outputs):
            return False
        self._keep(outputs)
        return True

    def untaken(self) -> list[str]:
        """The branches that no feed takes, in words."""
        return [
            f"{where} with a condition that is {str(way).lower()}"
            for name, where in self._conditions.items()
            for way in (True, False)
            if (name, way) not in self._taken
        ]
