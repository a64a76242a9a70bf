"""Samples that hold no numbers: what learns from samples leaves them out, and says so."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from graphopt_passes.prune import Prune
from graphopt_passes.prune.samples import read_feeds

from graphopt.calibrate.screening import Screening, tell_screened
from graphopt.errors import DataError
from graphopt.ir import values
from graphopt.rewrite import Calibration, Context, Options, RemarkKind
from graphopt.targets import get_target
from tests.passes.prune.test_prune import network, samples


def broken(count: int, at: int) -> list[dict[str, Any]]:
    """Samples, one more among them that is NaN."""
    found = samples(count)
    return [*found[:at], {"x": np.full((1, 8, 6, 6), np.nan, np.float32)}, *found[at:]]


def test_what_holds_no_numbers_is_left_out() -> None:
    screening = Screening()
    (found,) = read_feeds(network(), Calibration(broken(6, 2)), screening)
    assert len(found["x"]) == 6
    assert not np.isnan(found["x"]).any()
    assert "of 'sample 2'; the sample is left out" in screening.told()[0]


def test_nothing_but_such_samples_is_refused() -> None:
    with pytest.raises(DataError, match="every calibration sample holds NaN or infinities"):
        read_feeds(network(), Calibration(broken(0, 0)), Screening())


def pruned(feeds: list[dict[str, Any]], sparsity: str) -> tuple[list[Any], list[str]]:
    """The weights afterwards, and the warnings."""
    model = network()
    options = Options(calibration=Calibration(feeds), sparsity=sparsity)
    ctx = Context(model, get_target("cpu"), options)
    assert Prune().run(model, ctx)
    arrays = [values.array(value) for value in model.graph.initializers.values()]
    told = [each.reason for each in ctx.remarks if each.kind is RemarkKind.WARNING]
    tell_screened(ctx, "again")
    assert len([each for each in ctx.remarks if "NaN" in each.reason]) == len(
        [t for t in told if "NaN" in t]
    )
    return arrays, told


def test_pruning_does_not_learn_from_them() -> None:
    plain, said = pruned(samples(12), "0.5,tune=no")
    found, told = pruned(broken(12, 5), "0.5,tune=no")
    assert not any("NaN" in each for each in said)
    assert any("of 'sample 5'; the sample is left out" in each for each in told)
    for ours, theirs in zip(plain, found, strict=True):
        np.testing.assert_array_equal(ours, theirs)
