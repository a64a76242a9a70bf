"""The whole of it: samples, parity, training, and the better of before and after."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from graphopt.distill.batches import Division, Feed, divide, grouped, spreads, unseen
from graphopt.distill.history import History
from graphopt.distill.losses import distance
from graphopt.distill.settings import Mode, Settings
from graphopt.distill.teacher import Teacher
from graphopt.distill.transfer import head_start
from graphopt.distill.weights import Array, Weight, find_weights
from graphopt.errors import DataError, ModelError, OptionError
from graphopt.ir.model_file import model_to_bytes
from graphopt.runtime.session import Session, SessionOptions

if TYPE_CHECKING:
    from graphopt.distill.train import Trained

POINTS = 200
"""Points of the loss plot."""

PROVEN_ON = 4
"""Feeds on which the interpreter must agree with ONNX Runtime."""

Progress = Callable[[str, float | None], None]


def distill(
    teacher: ir.Model,
    student: ir.Model,
    samples: Sequence[Feed],
    settings: Settings,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> History:
    """Trains the weights of `student` in place; returns what happened.

    Labels are not needed: the teacher's outputs are what is learnt.  Zeros of matrices stay zero.  Where training does
    not lower the loss on the samples held out, measured in ONNX Runtime, the student stays as it was.

    Args:
        teacher: the original.
        student: takes and gives the same, under the same names.
        samples: feeds by input name.
        settings: how to train.
        seed: of the division of the samples, their order and the noise.
        progress: called with "distill" and the share that is done.

    Raises:
        OptionError: torch is not installed.
        DataError: too few samples, or different inputs or outputs.
        ModelError: an operator that the interpreter does not know, or computes otherwise than ONNX Runtime.
    """
    require_torch()
    train: Any = importlib.import_module("graphopt.distill.train")
    interpret: Any = importlib.import_module("graphopt.distill.interpret")
    rng = np.random.default_rng(seed)
    division = divide(samples, settings.held_out, rng)
    pupil = _taught(teacher, student, samples, settings)
    spread = spreads(division.train, settings.noise)
    division = dataclasses.replace(division, judged=tuple(unseen(division.held_out, spread, rng)))
    exam = _Exam.of(pupil, division, settings)
    taken = head_start(teacher, student, exam.loss) if settings.transfer else 0
    interpreter = interpret.Interpreter(student)
    shown = grouped(samples[: PROVEN_ON * 4], 4, joined=pupil.joins)[:PROVEN_ON]
    session = _session(student)
    off = train.parity(student, interpreter, shown, session.run)
    weights = find_weights(student.graph)
    if not weights:
        raise ModelError(
            "the student has no weights that can be trained: all its constants are bounds or masks"
        )
    say = progress or (lambda _stage, _part: None)
    done: Trained = train.Trainer(interpreter, weights, pupil, settings).run(
        division, seed, lambda part: say("distill", part)
    )
    kept = done.kept if _adopt(student, weights, done, exam) else 0
    return History(
        steps=done.steps,
        samples=len(division.train),
        held_out=len(division.held_out),
        parameters=sum(
            each.start.size if each.mask is None else int(each.mask.sum()) for each in weights
        ),
        parity=off,
        losses=_thinned(done.losses),
        judged=done.judged,
        kept=kept,
        measure="divergence of the outputs"
        if pupil.logits
        else "error of the outputs over their spread",
        transferred=taken,
    )


def _taught(
    teacher: ir.Model, student: ir.Model, samples: Sequence[Feed], settings: Settings
) -> Teacher:
    """The teacher, with the values inside that the student is to match besides.

    Raises:
        DataError: such values are wanted, and the two share none.
    """
    wants_features = settings.mode is Mode.BLOCKS or settings.features > 0
    pupil = Teacher(teacher, student, samples, features=wants_features)
    if wants_features and not pupil.features:
        raise DataError(
            "teacher and student share no residual sums by name and shape, so that blocks cannot be told; use "
            "mode=whole and features=0"
        )
    return pupil


def require_torch() -> None:
    """Refuses where torch is absent.

    Raises:
        OptionError: with what to install.
    """
    if importlib.util.find_spec("torch") is None:
        raise OptionError(
            "distillation needs PyTorch, which is not installed: pip install 'graphopt[distill]'"
        )


@dataclasses.dataclass(frozen=True)
class _Exam:
    """What ONNX Runtime judges a student by: samples that nothing has learnt from, and what the teacher says."""

    feeds: Sequence[Feed]
    wanted: Sequence[dict[str, Array]]
    logits: Mapping[str, str]
    temperature: float

    @classmethod
    def of(cls, teacher: Teacher, division: Division, settings: Settings) -> _Exam:
        feeds = grouped(division.judged, settings.batch, joined=teacher.joins)
        told = [teacher.outputs(feed) for feed in feeds]
        wanted = [{n: a for n, a in each.items() if n in teacher.floats} for each in told]
        return cls(feeds, wanted, teacher.logits, settings.temperature)

    def loss(self, student: ir.Model) -> float:
        """How far the student's outputs are from the teacher's."""
        session = _session(student)
        made = [session.run(feed) for feed in self.feeds]
        return distance(self.wanted, made, self.logits, self.temperature)


def _adopt(student: ir.Model, weights: Sequence[Weight], done: Trained, exam: _Exam) -> bool:
    """Stores the trained numbers if ONNX Runtime says that the student is better with them."""
    if not done.kept:
        return False
    old = [each.value.const_value for each in weights]
    before = exam.loss(student)
    for weight, numbers in zip(weights, done.numbers, strict=True):
        weight.store(numbers)
    if exam.loss(student) < before:
        return True
    for weight, tensor in zip(weights, old, strict=True):
        weight.value.const_value = tensor
    return False


def _session(model: ir.Model) -> Session:
    return Session(model_to_bytes(model), options=SessionOptions(threads=2))


def _thinned(losses: Sequence[tuple[int, float]]) -> tuple[tuple[int, float], ...]:
    """Means over equal stretches of steps, at most `POINTS`."""
    width = max(-(-len(losses) // POINTS), 1)
    parts = [losses[i : i + width] for i in range(0, len(losses), width)]
    return tuple((part[-1][0], float(np.mean([loss for _, loss in part]))) for part in parts)
