"""Calibration samples as feeds for pruning, several in one batch where the model takes any batch size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.calibrate.samples import read_samples
from graphopt.calibrate.screening import Screening
from graphopt.rewrite import Calibration
from graphopt.runtime.specs import Kind, TensorSpec, input_specs
from graphopt_passes.prune.layers import Array

BATCH, BATCH_OF_LARGE = 32, 8
"""Samples that run together: what a runtime needs for them grows with the model."""

LARGE_BYTES = 1 << 26
"""Weights of a large model."""

Feeds = list[dict[str, Array]]


def read_feeds(model: ir.Model, calibration: Calibration, screening: Screening) -> Feeds:
    """All samples that hold numbers, in batches.

    Raises:
        DataError: there are none, or one does not fit the model.
    """
    specs = input_specs(model)
    return batched(read_singles(calibration, specs, screening), specs, most=most_together(model))


def most_together(model: ir.Model) -> int:
    """How many samples run together."""
    held = sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value)
    return BATCH if held < LARGE_BYTES else BATCH_OF_LARGE


def read_singles(
    calibration: Calibration, specs: Sequence[TensorSpec], screening: Screening
) -> Feeds:
    """All samples that hold numbers, one by one: NaN in one of them would be in every moment.

    Raises:
        DataError: there are none, all hold NaN or infinities, or one does not fit the model.
    """
    return [dict(feed.values) for feed in screening.of(read_samples(calibration, specs))]


def batched(
    singles: Sequence[Mapping[str, Array]],
    specs: Sequence[TensorSpec],
    batches: int = 1,
    most: int = BATCH,
) -> Feeds:
    """Samples joined along the leading axis, where every input has an open one and all other dims agree.

    Args:
        singles: samples.
        specs: the inputs of the model.
        batches: how many to make at least, if there are as many samples.
        most: samples in one.
    """
    if not joinable(singles, specs):
        return [dict(single) for single in singles]
    size = min(most, max(len(singles) // batches, 1))
    groups = [singles[i : i + size] for i in range(0, len(singles), size)]
    return [{n: np.concatenate([s[n] for s in group]) for n in group[0]} for group in groups]


def joinable(singles: Sequence[Mapping[str, Array]], specs: Sequence[TensorSpec]) -> bool:
    """Whether every input has an open leading axis, and all other dims of the samples agree."""
    known = {spec.name: spec for spec in specs}
    first = singles[0]
    leads = set()
    for name, array in first.items():
        spec = known[name]
        if spec.kind is not Kind.TENSOR or not spec.shape or isinstance(spec.shape[0], int):
            return False
        leads.add(spec.shape[0])
        if array.ndim == 0 or any(each[name].shape != array.shape for each in singles):
            return False
    # Two inputs whose leading axes have different names need not be batches of the same thing.
    return len(leads) == 1 and (len(first) == 1 or None not in leads)
