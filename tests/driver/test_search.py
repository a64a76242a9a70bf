"""The most sparsity within a budget."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.driver.request import Request
from graphopt.driver.search import _interval, _joined, _parted, consistent, highest, ladder, likely
from graphopt.errors import OptionError
from graphopt.ir.model_file import load_model
from graphopt.pipeline.recipe import Recipe
from graphopt.rewrite import Options
from graphopt.runtime.specs import TensorSpec
from tests.rewriting import parse

TEXT = """g (float[N,16] x) => (float[N,64] y) <float[16,64] w1, float[64,64] w2, float[64,64] w3> {
    a = MatMul(x, w1)  r = Relu(a)  b = MatMul(r, w2)  s = Relu(b)  y = MatMul(s, w3) }"""


def network() -> ir.Model:
    model = load_model(parse(TEXT))
    rng = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        shape = value.const_value.shape.numpy()
        value.const_value = ir.Tensor(rng.standard_normal(shape).astype(np.float32), name=name)
    return model


def samples(count: int = 64) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    return [{"x": rng.standard_normal((1, 16)).astype(np.float32)} for _ in range(count)]


def zeros(model: ir.Model) -> float:
    arrays = [v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value]
    return sum(int((a == 0).sum()) for a in arrays) / sum(a.size for a in arrays)


def test_max_is_a_ladder_and_carries_its_options() -> None:
    assert ladder("max,method=admm")[0] == "0.5,method=admm"
    assert ladder("channels:max")[-1] == "channels:0.9"
    assert ladder("0.8") == ladder(None) == ()


@pytest.mark.parametrize("last", range(6))
def test_bisection_finds_the_last_rung_that_holds(last: int) -> None:
    rungs = ("a", "b", "c", "d", "e")
    tried: list[str] = []

    def holds(rung: str) -> bool:
        tried.append(rung)
        return rungs.index(rung) < last

    assert highest(rungs, holds) == (rungs[last - 1] if last else None)
    assert len(tried) <= 3


@pytest.mark.parametrize(
    ("first", "second", "found"),
    [
        ("abcde", "abcde", "e"),
        ("abcde", "ab", "b"),  # what the second part refuses is left downwards
        ("abce", "abcde", "c"),  # d fails below e, which holds by luck
        ("abcde", "", None),
        ("", "abcde", None),
    ],
)
def test_what_holds_by_luck_is_left(first: str, second: str, found: str | None) -> None:
    parts = [lambda rung: rung in first, lambda rung: rung in second]
    assert consistent(("a", "b", "c", "d", "e"), parts) == found


def test_a_wider_budget_gives_more_zeros() -> None:
    made = [
        graphopt.optimize(
            network(), sparsity="max,tune=no", calibration=samples(200), budget=budget
        )
        for budget in ("sqnr>=8", "sqnr>=4")
    ]
    assert all(each.report.verification.passed for each in made)
    assert not any(each.report.rolled_back for each in made)
    assert 0.4 < zeros(made[0].model) < zeros(made[1].model)


def test_the_result_has_learnt_from_all_samples() -> None:
    found = graphopt.optimize(
        network(), sparsity="max", calibration=samples(), budget="sqnr>=6"
    ).model
    amount = min(ladder("max"), key=lambda rung: abs(float(rung) - zeros(found)))
    again = graphopt.optimize(network(), sparsity=amount, calibration=samples()).model
    for name, value in again.graph.initializers.items():
        mine = found.graph.initializers[name].const_value
        assert mine is not None
        assert value.const_value is not None
        assert np.array_equal(mine.numpy(), value.const_value.numpy())


@pytest.mark.parametrize(("said", "share"), [(None, 0.5), ("0.9", 0.9)])
def test_a_recipe_may_say_the_amount(tmp_path: Path, said: str | None, share: float) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('sparsity = "0.5,layer=^w2:0.75"')
    made = graphopt.optimize(network(), recipe=file, sparsity=said, calibration=samples()).model
    assert abs(zeros(made) - share) < 0.06
    held = made.graph.initializers["w2"].const_value
    assert held is not None
    assert said is not None or abs((held.numpy() == 0).mean() - 0.75) < 0.02


def test_a_recipe_may_say_the_budget() -> None:
    recipe = Recipe.from_table({"sparsity": "max", "budget": "sqnr>=200"})
    made = graphopt.optimize(network(), recipe=recipe, calibration=samples())
    assert any("stays within sqnr>=200" in w for w in made.report.warnings)


def test_says_when_nothing_stays_within_the_budget() -> None:
    made = graphopt.optimize(network(), sparsity="max", calibration=samples(), budget="sqnr>=200")
    assert zeros(made.model) == 0
    assert any("not even --sparsity 0.5 stays within sqnr>=200" in w for w in made.report.warnings)


def request_for(index: int = 0, **given: Any) -> Request:
    """The request that a search begins with."""
    seen: list[Request] = []

    def keep(request: Request, _say: object) -> tuple[Request, tuple[str, ...]]:
        seen.append(_parted(request, index))
        return dataclasses.replace(
            request, options=dataclasses.replace(request.options, sparsity=None)
        ), ()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["graphopt.driver.optimize"], "with_amount", keep)
        graphopt.optimize(network(), sparsity="max", budget="sqnr>=10", verify="off", **given)
    return seen[0]


def test_trials_are_judged_on_samples_that_they_do_not_learn_from() -> None:
    given = samples()
    parted = request_for(calibration=given)
    assert isinstance(parted.inputs, list)
    assert [feed["x"].shape for feed in parted.inputs] == [(12, 16)]
    calibration = parted.options.calibration
    assert calibration is not None
    assert not isinstance(calibration.source, Path)
    held = np.concatenate([given[i]["x"] for i in range(4, 64, 5)])
    assert np.array_equal(parted.inputs[0]["x"], held)
    rest = np.concatenate([feed["x"] for feed in calibration.source])
    assert len(rest) == 52
    assert not (rest[:, None] == held[None]).all(-1).any()


def test_each_part_holds_other_samples_out() -> None:
    given = samples()
    parts = [request_for(index, calibration=given).inputs for index in range(5)]
    rows = [row.tobytes() for part in parts if isinstance(part, list) for row in part[0]["x"]]
    assert len(rows) == len(set(rows)) == 64


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"calibration": samples(30)}, "too few samples to hold some out (fewer than 40)"),
        ({"calibration": samples(64)}, "chosen on 64 samples held out"),
        ({"calibration": samples(200)}, None),
        ({"calibration": samples(30), "inputs": samples(8)}, None),
    ],
)
def test_says_what_few_samples_are_worth(given: dict[str, Any], told: str | None) -> None:
    made = graphopt.optimize(network(), sparsity="max,refit=no", budget="sqnr>=0.1", **given)
    found = [w for w in made.report.warnings if w.startswith("--sparsity max")]
    assert len(found) == (told is not None)
    assert told is None or told in found[0]


@pytest.mark.parametrize(
    ("same", "count", "low", "high"),
    [(0, 10, 0.0, 0.278), (10, 10, 0.722, 1.0), (251, 256, 0.955, 0.992), (5, 10, 0.237, 0.763)],
)
def test_shares_of_few_samples_are_uncertain(
    same: int, count: int, low: float, high: float
) -> None:
    assert likely(same, count) == pytest.approx((low, high), abs=1e-3)


def test_says_between_what_an_agreement_lies_where_less_than_asked_for_is_possible() -> None:
    given: dict[str, Any] = {"calibration": samples(200)}
    made = graphopt.optimize(
        network(), sparsity="max,refit=no", budget="top1-agreement>=0.6", **given
    )
    said = [w for w in made.report.warnings if "95 % confidence" in w]
    assert len(said) <= 1
    asked = Options(sparsity="max", budget="top1-agreement>=0.9")
    request = dataclasses.replace(request_for(**given), options=asked)
    (told,) = _interval(request, "0.8", [(0.95, 40), (0.925, 40)])
    assert "0.8 agrees with the original on 75 of 80 samples held out" in told
    assert "86.2% to 97.3% agree, and less than 90.0% is possible" in told
    assert _interval(request, "0.8", [(1.0, 100)]) == ()
    assert _interval(request, "0.8", []) == ()
    plain = dataclasses.replace(request, options=Options(sparsity="max", budget="sqnr>=10"))
    assert _interval(plain, "0.8", [(0.95, 40)]) == ()


@pytest.mark.parametrize(
    "given", [{"calibration": samples()[:20]}, {"calibration": samples(), "inputs": samples()[:3]}]
)
def test_few_samples_and_inputs_of_the_users_are_left_alone(given: dict[str, Any]) -> None:
    parted = request_for(**given)
    assert parted.options.calibration is not None
    assert parted.options.calibration.source == given["calibration"]
    assert parted.inputs == given.get("inputs")


@pytest.mark.parametrize(("dim", "count"), [(None, 1), ("N", 1), (1, 2)])
def test_samples_are_joined_where_the_model_takes_any_number(dim: Any, count: int) -> None:
    specs = [TensorSpec("x", ir.DataType.FLOAT, (dim, 16))]
    assert len(_joined(samples()[:2], specs)) == count


@pytest.mark.parametrize("given", [{}, {"budget": "sqnr>=10", "verify": "off"}])
def test_needs_a_budget_to_look_for(given: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="give --budget"):
        graphopt.optimize(network(), sparsity="max", calibration=samples(), **given)
