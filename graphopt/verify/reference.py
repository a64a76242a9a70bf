"""The session of a reference: watches which way it goes, and gives it up where a loop of it does not end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError
from graphopt.ir.hazards import holds_endless
from graphopt.ir.model_file import load_model
from graphopt.runtime.emulate import emulate
from graphopt.runtime.footprint import make_room
from graphopt.runtime.in_memory import model_session
from graphopt.runtime.session import EndlessError, Session, SessionOptions
from graphopt.verify.kept import kept_values

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.runtime.specs import TensorSpec
    from graphopt.verify.branches import Conditions
    from graphopt.verify.feeds import Feed

LOOP_SECONDS = 30.0
"""How long a model with a loop of unknown length may take for one generated feed."""

MAX_STOPPED = 2
"""Feeds on which a loop does not end before no more are tried."""

LARGE_BYTES = 1 << 26
"""Weights from which on the reference makes room for the candidate."""

PATIENCE = 20.0
"""How many times as long as the reference a candidate with such a loop may take."""


class ReferenceSession:
    """A reference that is run feed by feed.

    Args:
        model: what to run.
        graph: the same, loaded.
        found: what decides which way it goes, to be shown with the outputs.
        taps: further values to show.
        limited: whether a run may be stopped: on inputs that nobody gave.
        kept: folder of values that earlier runs gave; None to keep none.

    Raises:
        ModelError: the runtime refuses the model.
    """

    def __init__(
        self,
        model: Path | bytes,
        graph: ir.Model,
        found: Conditions,
        taps: tuple[str, ...],
        *,
        limited: bool,
        kept: Path | None = None,
    ) -> None:
        self._seconds = LOOP_SECONDS if limited and holds_endless(graph) else None
        self._stopped = 0
        self._slowest = 0.0
        self._model = model
        self._is_large = stored_bytes(graph) >= LARGE_BYTES
        self._shown = tuple(dict.fromkeys((*taps, *found.outer)))
        self.conditions = found
        if self._is_large:
            make_room()
        self._session: Session | None = None
        self._emulated: Session | None = None
        names = (*self._shown, found.ways)
        self._kept = kept_values(kept, found.model or graph, names)
        # What graphs within nodes decide can only be told where the runtime takes the model that says it.
        if self._kept is None or not self._kept.is_known or found.inner:
            self._open()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the runtime takes."""
        return self._open().inputs

    def _open(self) -> Session:
        """The session, made when something has to be run."""
        if self._session is None:
            self._session = self._watched()
            if self._session is None:
                self.conditions = self.conditions.without_inner()
                self._session = open_session(self._model, self._shown, self._seconds)
        return self._session

    def _watched(self) -> Session | None:
        """The model that says what graphs within nodes decide; None where there is none, or it cannot be run."""
        if self.conditions.model is None:
            return None
        try:
            return model_session(self.conditions.model, self._shown, self._seconds)
        except GraphoptError:
            return None

    def run(self, feed: Feed) -> dict[str, Any]:
        """The outputs on a feed, and what else is shown.

        Raises:
            GraphoptError: the reference refuses it, or was stopped.
        """
        if self._stopped >= MAX_STOPPED:
            raise EndlessError("not tried: a loop did not end on the inputs before")
        held = None if self._kept is None else self._kept.find(feed.values)
        if held is not None:
            return held
        outputs = self.again(feed)
        if self._kept is not None:
            self._kept.keep(feed.values, outputs)
        return outputs

    def again(self, feed: Feed) -> dict[str, Any]:
        """The outputs of a run of its own, whatever is kept.

        Raises:
            GraphoptError: the reference refuses the inputs, or was stopped.
        """
        started = time.monotonic()
        try:
            return self._open().run(feed.values)
        except EndlessError:
            self._stopped += 1
            raise
        finally:
            self._slowest = max(self._slowest, time.monotonic() - started)

    def rounded(self, feed: Feed) -> dict[str, Any]:
        """The outputs in true half precision, by emulation: `run` computes in float32 and drops casts.

        Raises:
            GraphoptError: the emulation does not run.
        """
        if self._emulated is None:
            self._emulated = model_session(emulate(load_model(self._model)), (), self._seconds)
        return self._emulated.run(feed.values)

    def beside(
        self, candidate: Path | bytes | ir.Model, graph: ir.Model, taps: tuple[str, ...]
    ) -> Session:
        """A session of a candidate; where a loop could keep it from ending, it may take many times as long as this one.

        Args:
            candidate: what to run.
            graph: the same, loaded.
            taps: values to show besides the outputs.

        Raises:
            ModelError: the runtime refuses it.
        """
        if self._is_large:  # two of them at a time would take twice the memory; it is opened again when it is needed
            self._session = None
            make_room()
        patience = max(LOOP_SECONDS, PATIENCE * self._slowest)
        seconds = patience if holds_endless(graph) else None
        if isinstance(candidate, Path | bytes):
            return open_session(candidate, taps, seconds)
        return model_session(candidate, taps, seconds)


def stored_bytes(model: ir.Model) -> int:
    """Bytes of the initializers of the main graph."""
    held = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in held if tensor is not None)


def open_session(
    model: Path | bytes, taps: tuple[str, ...] = (), seconds: float | None = None
) -> Session:
    """A session of a file as references run: the runtime's optimisations and prepacking off.

    Raises:
        ModelError: the runtime refuses the model.
    """
    options = SessionOptions(prepack=False, in_order=True, extra_outputs=taps, seconds=seconds)
    return Session(model, options=options)
