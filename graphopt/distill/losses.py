"""How far outputs are from the teacher's.  Pure functions of arrays, in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

MAX_CLASSES = 1_000_000
MIN_CLASSES = 2


def logit_outputs(outputs: Mapping[str, Array], tails: Mapping[str, str]) -> frozenset[str]:
    """The outputs that are scores of classes, to be compared as distributions.

    Args:
        outputs: what the teacher gives for a batch of samples, by name.
        tails: the operator that makes each output.  A Gemm or MatMul of two axes, or a Softmax, makes scores; images,
            boxes and embeddings are compared by their values.
    """
    found = set()
    for name, array in outputs.items():
        tail = tails.get(name, "")
        if not 2 <= array.ndim <= 3 or not MIN_CLASSES < array.shape[-1] <= MAX_CLASSES:
            continue
        flat = array.ndim == 2 and tail in ("Gemm", "MatMul", "Add", "FusedGemm", "Sum")
        if flat or tail in ("Softmax", "LogSoftmax"):
            found.add(name)
    return frozenset(found)


def as_logits(array: Array, tail: str) -> Array:
    """Scores of which the softmax is meant; probabilities become their logarithms."""
    wide = array.astype(np.float64)
    return np.log(np.maximum(wide, 1e-12)) if tail == "Softmax" else wide


def log_softmax(logits: Array) -> Array:
    """Along the last axis, without overflow."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def divergence(teacher: Array, student: Array, temperature: float) -> float:
    """Mean of T^2 KL(softmax(teacher / T) || softmax(student / T)) over all rows (Hinton et al. 2015)."""
    want, got = (log_softmax(each / temperature) for each in (teacher, student))
    rows = (np.exp(want) * (want - got)).sum(axis=-1)
    return float(temperature**2 * rows.mean())


def normalized_error(teacher: Array, student: Array) -> float:
    """Sum of squared differences over the sum of squares of the teacher about its mean."""
    want, got = teacher.astype(np.float64), student.astype(np.float64)
    scale = float(np.square(want - want.mean()).sum())
    return float(np.square(got - want).sum()) / max(scale, 1e-12)


def distance(
    teacher: Sequence[Mapping[str, Array]],
    student: Sequence[Mapping[str, Array]],
    logits: Mapping[str, str],
    temperature: float,
) -> float:
    """The sum over outputs of divergence (of those in `logits`, by what makes them) or normalised error."""
    total = 0.0
    for name, array in teacher[0].items():
        if array.dtype.kind != "f":
            continue
        want = np.concatenate([each[name].reshape(-1, *_row(array)) for each in teacher])
        got = np.concatenate([each[name].reshape(-1, *_row(array)) for each in student])
        if name in logits:
            tail = logits[name]
            total += divergence(as_logits(want, tail), as_logits(got, tail), temperature)
        else:
            total += normalized_error(want, got)
    return total


def _row(array: Array) -> tuple[int, ...]:
    """Rows of classes are compared one by one, whatever axes lie before; their lengths may differ by sample."""
    return array.shape[-1:]


def rate_at(step: int, steps: int, schedule: str) -> float:
    """The learning rate at a step, over that of the first."""
    part = step / max(steps, 1)
    least = 0.05
    if schedule == "cosine":
        return float(least + (1 - least) * 0.5 * (1 + np.cos(np.pi * part)))
    if schedule == "linear":
        return 1 - (1 - least) * part
    if schedule == "step":
        return 1.0 if part < 2 / 3 else 0.1
    return 1.0
