"""Sessions of models in memory: weights stay where they are mapped from, nothing is written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.ir import scopes, values
from graphopt.ir.encode import encode_model
from graphopt.ir.message import Location, Role
from graphopt.ir.sparse import CooTensor
from graphopt.runtime.session import Session, SessionOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

_LEAST_BYTES = 1 << 12
"""Smaller weights travel in the model: a loan costs more than a copy."""

_LENT = frozenset(
    (
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT16,
        ir.DataType.INT8,
        ir.DataType.UINT8,
    )
)


def model_session(
    model: ir.Model, extra_outputs: Sequence[str] = (), seconds: float | None = None
) -> Session:
    """A session of a model as a reference runs: the runtime's optimisations and prepacking off.

    Args:
        model: the model; its weights must stay alive as long as the session.
        extra_outputs: names of values of the main graph to return besides the outputs.
        seconds: after which a run is stopped; None for never.

    Raises:
        ModelError: the runtime refuses the model.
    """
    inner = _held_elsewhere(model)
    lent = {
        name: value.const_value
        for name, value in model.graph.initializers.items()
        if _is_lent(value) and id(value.const_value) not in inner
    }
    tensors = {id(tensor) for tensor in lent.values()}

    def elsewhere(tensor: ir.TensorProtocol, _role: Role) -> Location | None:
        return Location("lent", 0) if id(tensor) in tensors else None

    data = b"".join(encode_model(model, elsewhere).chunks())
    arrays: dict[str, np.ndarray[Any, Any]] = {
        name: np.ascontiguousarray(tensor.numpy())
        for name, tensor in lent.items()
        if tensor is not None
    }
    options = SessionOptions(
        prepack=False,
        in_order=True,
        extra_outputs=tuple(extra_outputs),
        lent=arrays,
        seconds=seconds,
    )
    return Session(data, options=options)


def _is_lent(value: ir.Value) -> bool:
    tensor = value.const_value
    if tensor is None or isinstance(tensor, CooTensor) or value.is_graph_input():
        return False
    if not value.uses():
        return False  # the runtime drops it before it is lent
    return tensor.dtype in _LENT and tensor.nbytes >= _LEAST_BYTES


def _held_elsewhere(model: ir.Model) -> set[int]:
    """Tensors that nodes or inner graphs hold, which only the main graph's initializers could borrow."""
    found = set()
    for scope in scopes.all_graphs(model):
        if scope.graph is not model.graph:
            found |= {id(value.const_value) for value in scope.graph.initializers.values()}
        found |= {
            id(values.constant(node.outputs[0]))
            for node in scope.graph
            if node.op_type == "Constant"
        }
    return found
