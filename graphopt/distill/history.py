"""What a training did, as facts for the report."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class History:
    """One training.

    Attributes:
        steps: how many were made.
        samples: how many were trained on.
        held_out: how many were judged on.
        parameters: how many numbers were trained.
        parity: greatest relative difference between the interpreter and ONNX Runtime before the first step.
        losses: of the steps, as (step, loss), thinned out.
        judged: of the held-out samples, as (step, loss); step 0 is before training.
        kept: the step whose weights are in the result; 0 where training made nothing better.
        measure: what the losses are: divergence of logits, or error over signal.
        transferred: constants taken from the teacher first; None where the student was nearer to it without.
        left_out: what is to be said of samples that hold no numbers.
    """

    steps: int
    samples: int
    held_out: int
    parameters: int
    parity: float
    losses: tuple[tuple[int, float], ...]
    judged: tuple[tuple[int, float], ...]
    kept: int
    measure: str
    transferred: int | None = 0
    left_out: tuple[str, ...] = ()

    @property
    def before(self) -> float:
        """Loss on the held-out samples before training."""
        return self.judged[0][1]

    @property
    def after(self) -> float:
        """Loss on the held-out samples of what was kept."""
        return dict(self.judged)[self.kept]

    def sentences(self) -> tuple[str, ...]:
        """What a user should know, in words."""
        return (*self.left_out, *self._beginning(), self._end())

    def _beginning(self) -> tuple[str, ...]:
        if self.transferred is None:
            return (
                "the weights of the original were not taken: the student is nearer to it with its own",
            )
        if not self.transferred:
            return ()
        return (
            f"{self.transferred} constants taken from the original, zeros of matrices left zero",
        )

    def _end(self) -> str:
        done = f"{self.parameters} weights trained for {self.steps} steps on {self.samples} unlabelled samples"
        if not self.kept:
            what = "nothing else" if self.transferred else "nothing"
            return f"{done}: no better on the {self.held_out} held out, so {what} was changed"
        return (
            f"{done}: {self.measure} on the {self.held_out} held out went from {self.before:.4g} to {self.after:.4g} "
            f"(best at step {self.kept})"
        )
