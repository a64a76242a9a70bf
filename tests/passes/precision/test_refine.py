"""Refinement on experiments that are arithmetic, and on a model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graphopt_passes.precision import CastToHalf
from graphopt_passes.precision.refine import MAX_PRUNED, MAX_RUNS, TARGET, Trait, refine

from graphopt.pipeline import run_pipeline
from graphopt.rewrite import Calibration, Context, Options
from graphopt.targets import get_target
from tests.rewriting import parse


@dataclasses.dataclass
class Errors:
    """Independent errors, and nodes that overflow."""

    errors: Sequence[float]
    overflows: frozenset[int] = frozenset()
    runs: int = 0

    def badness(self, low: Sequence[bool]) -> float:
        """A root of a sum of squares; inf where one overflows."""
        self.runs += 1
        if any(low[index] for index in self.overflows):
            return math.inf
        return math.sqrt(sum(e * e for e, flag in zip(self.errors, low, strict=True) if flag))

    def survey(self, low: Sequence[bool]) -> float:
        """The same: there is one feed."""
        return self.badness(low)

    def words(self) -> str:
        """A budget, in words."""
        return "max<=1"


def test_within_the_budget_nothing_is_raised() -> None:
    experiment = Errors([0.01] * 100)
    found = refine(100, experiment)
    assert not found.raised
    assert experiment.runs == 1


def test_an_overflow_is_found_by_bisection() -> None:
    experiment = Errors([0.01] * 338, frozenset({217}))
    found = refine(338, experiment)
    assert list(found.raised) == [217]
    assert math.isinf(found.before)
    assert found.after < TARGET
    assert experiment.runs < 20


def test_several_overflows_are_all_raised() -> None:
    found = refine(64, Errors([0.01] * 64, frozenset({3, 40, 41})))
    assert set(found.raised) == {3, 40, 41}
    assert set(found.raised.values()) == {"overflow: found by bisection"}


def test_the_nodes_that_err_most_are_raised_and_no_others() -> None:
    errors = [0.01] * 200
    errors[17] = errors[150] = 2.0
    found = refine(200, Errors(errors))
    assert set(found.raised) == {17, 150}
    assert found.after <= TARGET
    assert "sensitivity" in found.raised[17]


def test_a_kind_that_errs_is_found_at_once() -> None:
    """Twelve of one kind, spread over a model of 149: fewer experiments than places."""
    errors = [0.02] * 149
    errors[5::12] = [5.0] * 12
    kinds = [
        "Attention" if error > 1 else ("MatMul", "Add")[i % 2] for i, error in enumerate(errors)
    ]
    experiment = Errors(errors)
    found = refine(149, experiment, traits=[Trait(1.0, kind) for kind in kinds])
    assert set(found.raised) == set(range(5, 149, 12))
    assert experiment.runs <= MAX_RUNS


def test_raising_what_did_not_matter_is_taken_back() -> None:
    @dataclasses.dataclass
    class Pair(Errors):
        """Node 0 errs alone only; node 1 errs always."""

        def badness(self, low: Sequence[bool]) -> float:
            self.runs += 1
            return 2.0 if low[1] else (1.9 if low[0] and sum(low) == 1 else 0.1)

    assert set(refine(8, Pair([0.0] * 8)).raised) == {1}


def test_hopeless_models_end_within_a_bound() -> None:
    experiment = Errors([1.0] * 1000)
    found = refine(1000, experiment)
    assert len(found.raised) == 1000
    assert found.amplified
    assert found.accepting == "max<=1"
    assert experiment.runs <= MAX_RUNS + MAX_PRUNED


def test_parts_that_fit_stay_half_where_the_rest_amplifies() -> None:
    found = refine(80, Errors([9.0] * 60 + [0.01] * 20))
    assert set(found.raised) == set(range(60))
    assert found.after <= TARGET


def test_what_is_raised_from_the_start_stays_raised() -> None:
    found = refine(8, Errors([0.1] * 8), raised={3: "cost"})
    assert found.raised == {3: "cost"}


@pytest.mark.parametrize(("budget", "expected"), [("max<=0.05", 2), ("sqnr>=120", 0)])
def test_the_budget_of_the_user_decides(budget: str, expected: int) -> None:
    proto = parse(
        "g (float[4,16] x) => (float[4,16] y) <float[16,16] w, float[16,16] v>"
        "{ a = MatMul(x, w) y = MatMul(a, v) }"
    )
    model = ir.from_proto(proto)
    x = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    options = Options(budget=budget, calibration=Calibration([{"x": x}]))
    ctx = Context(model, get_target("cuda"), options)
    run_pipeline(model, (CastToHalf(),), ctx)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    low = [
        n
        for n in model.graph
        if n.op_type == "MatMul" and n.outputs[0].dtype == ir.DataType.FLOAT16
    ]
    assert len(low) == expected
    if not expected:
        assert any("sensitivity" in remark.reason for remark in ctx.remarks)
