"""Fresh names, and a tape on which rewrites build nodes before anything in the graph changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.ir.scopes import all_graphs

Constant: TypeAlias = ir.TensorProtocol | npt.NDArray[Any] | np.generic


class Names:
    """Hands out names that no value, node or graph of a model uses.

    ONNX forbids a subgraph to redefine a name that an outer scope has, so names are unique over the whole model.
    The same sequence of requests gives the same names: output bytes depend on it.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)
        self._counters: dict[str, int] = {}

    @classmethod
    def of(cls, model: ir.Model) -> Names:
        """The names of `model`, subgraphs and functions included."""
        names = cls()
        for scope in all_graphs(model):
            names.reserve(scope.graph)
        return names

    def reserve(self, graph: ir.Graph) -> None:
        """Marks the names that `graph` itself (not its subgraphs) uses as taken."""
        self._taken.update(v.name for v in graph.inputs if v.name)
        self._taken.update(graph.initializers)
        for node in graph:
            if node.name:
                self._taken.add(node.name)
            self._taken.update(v.name for v in node.outputs if v.name)

    def fresh(self, base: str) -> str:
        """`base` itself where it is free, otherwise `base_1`, `base_2` and so on."""
        name = base
        while not name or name in self._taken:
            count = self._counters.get(base, 0) + 1
            self._counters[base] = count
            name = f"{base}_{count}"
        self._taken.add(name)
        return name


class Builder:
    """Collects new nodes and constants; nothing touches a graph until the engine commits them."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        domain: str = "",
        like: ir.Node | None = None,
        **attributes: Any,  # noqa: ANN401  whatever onnx_ir turns into an attribute
    ) -> ir.Value:
        """The single output of a new node.

        Args:
            op_type: operator name.
            inputs: values, or None for an omitted optional input.
            domain: operator domain.
            like: a node whose attributes are copied first.
            attributes: attributes to set; None leaves one out.
        """
        return self.ops(op_type, *inputs, outputs=1, domain=domain, like=like, **attributes)[0]

    def ops(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        outputs: int,
        domain: str = "",
        like: ir.Node | None = None,
        **attributes: Any,  # noqa: ANN401
    ) -> Sequence[ir.Value]:
        """All outputs of a new node that has `outputs` of them; otherwise as `op`."""
        node = ir.Node(
            domain,
            op_type,
            _trim(inputs),
            attributes=_attributes(like, attributes),
            num_outputs=outputs,
            version=like.version if like is not None and like.domain == domain else None,
        )
        self.nodes.append(node)
        return node.outputs

    def const(self, data: Constant, *, name: str = "const") -> ir.Value:
        """A constant value; `name` is a hint that the engine makes unique."""
        tensor = ir.Tensor(np.asarray(data)) if isinstance(data, (np.ndarray, np.generic)) else data
        value = ir.Value(
            name=name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=tensor,
        )
        self.constants.append(value)
        return value

    def ints(self, numbers: Sequence[int], *, name: str = "ints") -> ir.Value:
        """A 1-D int64 constant: axes, shapes, permutations given as inputs."""
        return self.const(np.asarray(numbers, np.int64), name=name)


def _trim(inputs: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Drops omitted optional inputs at the end: ONNX writes them as nothing, not as empty names."""
    kept = list(inputs)
    while kept and kept[-1] is None:
        kept.pop()
    return kept


def _attributes(like: ir.Node | None, given: Mapping[str, Any]) -> list[ir.Attr]:
    copied = {} if like is None else {a.name: a for a in like.attributes.values()}
    for name, value in given.items():
        copied.pop(name, None)
        if value is not None:
            copied[name] = (
                value
                if isinstance(value, ir.Attr)
                else ir.convenience.convert_attribute(name, value)
            )
    return list(copied.values())
