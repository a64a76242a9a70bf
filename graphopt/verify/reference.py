"""The session of a reference: watches which way it goes, and gives it up where a loop of it does not end."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError
from graphopt.ir.hazards import holds_endless
from graphopt.runtime.in_memory import model_session
from graphopt.runtime.session import EndlessError, Session, SessionOptions

if TYPE_CHECKING:
    import onnx_ir as ir

    from graphopt.verify.branches import Conditions
    from graphopt.verify.feeds import Feed

LOOP_SECONDS = 30.0
"""How long a model with a loop of unknown length may take for one generated feed."""

MAX_STOPPED = 2
"""Feeds on which a loop does not end before no more are tried."""

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
    ) -> None:
        self._seconds = LOOP_SECONDS if limited and holds_endless(graph) else None
        self._stopped = 0
        self._slowest = 0.0
        shown = tuple(dict.fromkeys((*taps, *found.outer)))
        watched = self._watched(found, shown)
        self.conditions = found.without_inner() if watched is None else found
        self._session = watched or open_session(model, shown, self._seconds)
        self.inputs = self._session.inputs

    def _watched(self, found: Conditions, shown: tuple[str, ...]) -> Session | None:
        """The model that says what graphs within nodes decide; None where there is none, or it cannot be run."""
        if found.model is None:
            return None
        try:
            return model_session(found.model, shown, self._seconds)
        except GraphoptError:
            return None

    def run(self, feed: Feed) -> dict[str, Any]:
        """The outputs on a feed, and what else is shown.

        Raises:
            GraphoptError: the reference refuses it, or was stopped.
        """
        if self._stopped >= MAX_STOPPED:
            raise EndlessError("not tried: a loop did not end on the inputs before")
        started = time.monotonic()
        try:
            return self._session.run(feed.values)
        except EndlessError:
            self._stopped += 1
            raise
        finally:
            self._slowest = max(self._slowest, time.monotonic() - started)

    def patience(self, candidate: ir.Model) -> float | None:
        """How many seconds a candidate may take for one feed; None where no loop could keep it from ending."""
        return max(LOOP_SECONDS, PATIENCE * self._slowest) if holds_endless(candidate) else None


def open_session(
    model: Path | bytes, taps: tuple[str, ...] = (), seconds: float | None = None
) -> Session:
    """A session of a file as references run: the runtime's optimisations and prepacking off.

    Raises:
        ModelError: the runtime refuses the model.
    """
    options = SessionOptions(prepack=False, extra_outputs=taps, seconds=seconds)
    return Session(model, options=options)
