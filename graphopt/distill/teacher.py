"""The original model as teacher: what it gives for a batch, and how that is to be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.distill.batches import Array, Feed, can_join, join
from graphopt.distill.losses import logit_outputs
from graphopt.errors import DataError, ModelError
from graphopt.ir import values
from graphopt.ir.model_file import model_to_bytes
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions

THREADS = 2


class Teacher:
    """Runs the original in ONNX Runtime.

    Attributes:
        floats: outputs that are compared.
        logits: those of them that are scores of classes, with the operator that makes them.
        features: names of residual sums that teacher and student share, where they are asked for.
        joins: whether several samples make one feed.
    """

    def __init__(
        self, teacher: ir.Model, student: ir.Model, samples: Sequence[Feed], *, features: bool
    ) -> None:
        """Looks at a few samples.

        Raises:
            DataError: teacher and student have different inputs or outputs, or no output is a float.
        """
        check_same_interface(teacher, student)
        self.features = shared_sums(teacher, student) if features else ()
        options = SessionOptions(threads=THREADS, extra_outputs=self.features)
        self._session = Session(
            model_to_bytes(teacher), level=OptimizationLevel.EXTENDED, options=options
        )
        probe = Session(model_to_bytes(student), options=options)
        self.joins = can_join(samples[:64]) and _takes_batches((self._session, probe), samples)
        few = samples[: 8 if self.joins else 1]
        shown = self.outputs(join(few) if self.joins else few[0])
        self.features = _alike(self.features, (self._session, probe), few[0])
        own = [value.name or "" for value in teacher.graph.outputs]
        self.floats = tuple(name for name in own if shown[name].dtype.kind == "f")
        if not self.floats:
            raise DataError(
                f"no output of the teacher is a float tensor, among {own}: nothing can be distilled"
            )
        known = tails(teacher.graph)
        scores = logit_outputs({name: shown[name] for name in self.floats}, known)
        self.logits = {name: known[name] for name in self.floats if name in scores}

    def outputs(self, feed: Feed) -> Mapping[str, Array]:
        """Outputs and features by name."""
        return self._session.run(feed)


def check_same_interface(teacher: ir.Model, student: ir.Model) -> None:
    """Refuses models that cannot be compared.

    Raises:
        DataError: names of inputs or outputs differ; the message says which.
    """
    for kind in ("inputs", "outputs"):
        mine = {v.name for v in getattr(student.graph, kind)} - set(student.graph.initializers)
        theirs = {v.name for v in getattr(teacher.graph, kind)} - set(teacher.graph.initializers)
        if mine != theirs:
            raise DataError(
                f"teacher and student have different {kind}: {sorted(map(str, theirs))} and {sorted(map(str, mine))}; "
                "a student must take what its teacher takes and give what it gives, under the same names"
            )


def tails(graph: ir.Graph) -> dict[str, str]:
    """The operator that makes each output."""
    return {value.name or "": _maker(value) for value in graph.outputs}


def shared_sums(teacher: ir.Model, student: ir.Model) -> tuple[str, ...]:
    """Names of the sums of two activations that both models have, in the order of the teacher."""
    mine = set(_sums(student.graph))
    return tuple(name for name in _sums(teacher.graph) if name in mine)


def _alike(names: Sequence[str], sessions: Sequence[Session], feed: Feed) -> tuple[str, ...]:
    """Those of some values that have the same shape in both models: of a slimmed one, few do."""
    if not names:
        return ()
    one, other = (session.run(feed) for session in sessions)
    return tuple(name for name in names if one[name].shape == other[name].shape)


def _sums(graph: ir.Graph) -> list[str]:
    own = {value.name for value in graph.outputs}
    return [
        node.outputs[0].name or ""
        for node in graph
        if node.op_type in ("Add", "Sum")
        and len(node.inputs) == 2
        and not any(values.is_constant(value) for value in node.inputs)
        and node.outputs[0].name not in own
    ]


def _maker(value: ir.Value) -> str:
    node = value.producer()
    while node is not None and node.op_type == "Identity" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return "" if node is None else node.op_type


def _takes_batches(sessions: Sequence[Session], samples: Sequence[Feed]) -> bool:
    """Whether two joined samples give what they give one by one, in each model."""
    if len(samples) < 2:
        return False
    pair = samples[:2]
    for session in sessions:
        try:
            both = session.run(join(pair))
        except (DataError, ModelError):
            return False
        for name, array in session.run(pair[1]).items():
            if not isinstance(array, np.ndarray) or array.ndim == 0:
                return False
            if both[name].shape != (2 * len(array), *array.shape[1:]):
                return False
    return True
