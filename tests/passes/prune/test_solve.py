"""Masks, allocation and least squares, on arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.helper as oh
import onnxruntime as ort
import pytest
from graphopt_passes.prune import solve as solving
from graphopt_passes.prune.allocate import (
    allocate,
    allocate_large,
    lamp_scores,
    smallest,
    smallest_about,
)
from graphopt_passes.prune.layers import Wide, Window, find_layers
from graphopt_passes.prune.moments import inputs, output_size, patches
from graphopt_passes.prune.request import Allocation, Method
from graphopt_passes.prune.roots import inverse, inverse_root, ridge
from graphopt_passes.prune.solve import Goal, dense_target, pattern_mask, refit, solve

from graphopt.ir.model_file import load_model


def problem(rows: int = 24, columns: int = 48) -> tuple[Wide, Wide]:
    """A weight, and inputs [columns, n] whose elements depend on one another."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((columns, columns)) @ rng.standard_normal((columns, 600))
    return rng.standard_normal((rows, columns)), np.maximum(mixed, 0)


def error(weight: Wide, found: Wide, x: Wide) -> float:
    return float(np.linalg.norm((weight - found) @ x) / np.linalg.norm(weight @ x))


@pytest.mark.parametrize("how", [Allocation.LAMP, Allocation.GLOBAL])
def test_allocation_layer_by_layer_is_the_same_but_for_rounding(how: Allocation) -> None:
    rng = np.random.default_rng(0)
    weights = [scale * rng.standard_normal((50, 60)) for scale in (0.1, 1.0, 3.0)]
    want = allocate(weights, 6000, how)
    found = allocate_large(iter(weights), [3000] * 3, 6000, how)
    assert abs(sum(found) - 6000) <= 3
    assert np.abs(np.array(found) - want).max() < 30


def test_mixed_lies_half_way() -> None:
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal(shape) for shape in ((8, 16), (32, 64), (4, 100))]
    hows = (Allocation.LAMP, Allocation.ERK, Allocation.MIXED)
    lamp, erk, mixed = (allocate(weights, 2000, how) for how in hows)
    assert lamp != erk
    assert mixed == [(one + two) // 2 for one, two in zip(lamp, erk, strict=True)]


class TestMasks:
    def test_drops_as_many_as_asked_for_among_equal_scores(self) -> None:
        keep = smallest(np.ones((4, 5)), 7)
        assert keep.sum() == 13
        assert not keep.reshape(-1)[:7].any()

    @pytest.mark.parametrize(("count", "kept"), [(0, 6), (6, 0), (9, 0)])
    def test_drops_nothing_or_all(self, count: int, kept: int) -> None:
        assert smallest(np.arange(6.0), count).sum() == kept

    def test_about_so_many_of_many_by_a_sample(self) -> None:
        scores = np.random.default_rng(0).standard_normal((500, 1200))
        keep = smallest_about(scores, 480_000)
        assert abs(int(keep.sum()) - 120_000) < 3_000
        assert scores[keep].min() > scores[~keep].max()

    @pytest.mark.parametrize(("count", "kept"), [(0, 300_000), (300_000, 0), (299_999, 1)])
    def test_about_none_or_all(self, count: int, kept: int) -> None:
        assert abs(smallest_about(np.arange(300_000.0), count).sum() - kept) < 6

    def test_pattern_keeps_the_greatest_of_each_group(self) -> None:
        scores = np.array([[1.0, 4, 3, 2, 5, 5, 5, 5]])
        assert pattern_mask(scores, 2, 4).tolist() == [
            [False, True, True, False, True, True, False, False]
        ]


class TestAllocation:
    @pytest.mark.parametrize("how", list(Allocation))
    def test_adds_up(self, how: Allocation) -> None:
        rng = np.random.default_rng(0)
        weights = [rng.standard_normal(shape) for shape in ((8, 16), (32, 64), (4, 100))]
        zeros = allocate(weights, 2000, how)
        assert abs(sum(zeros) - 2000) <= 3
        assert all(zero < weight.size for zero, weight in zip(zeros, weights, strict=True))

    def test_lamp_gives_the_greatest_weight_of_a_layer_the_score_one(self) -> None:
        scores = lamp_scores(np.array([3.0, -5, 1]))
        assert scores[1] == 1.0
        np.testing.assert_allclose(scores, [9 / 34, 1, 1 / 35])

    def test_a_scaled_layer_loses_no_more_with_lamp_but_all_with_global(self) -> None:
        rng = np.random.default_rng(0)
        weights = [rng.standard_normal((30, 30)), 1e-3 * rng.standard_normal((30, 30))]
        lamp, pooled = (allocate(weights, 900, how) for how in (Allocation.LAMP, Allocation.GLOBAL))
        assert abs(lamp[0] - lamp[1]) < 100
        assert pooled[1] == 891


class TestSolving:
    def test_refit_reaches_the_exact_least_squares_of_each_row(self) -> None:
        weight, x = problem()
        moment = x @ x.T
        mask = Goal(800).mask(np.abs(weight))
        found = refit(mask, weight, weight, moment, weight @ moment)
        damp = ridge(moment)
        for row, keep in enumerate(mask):
            system = moment[np.ix_(keep, keep)] + damp * np.eye(keep.sum())
            right = (weight[row] @ moment + damp * weight[row])[keep]
            exact = np.linalg.solve(system, right)
            assert np.linalg.norm(found[row, keep] - exact) < 0.02 * np.linalg.norm(exact)
            assert not found[row, ~keep].any()

    def test_dense_target_makes_up_for_wrong_inputs(self) -> None:
        weight, x = problem()
        wrong = 0.5 * x
        target = dense_target(weight, weight @ x @ wrong.T, inverse_root(wrong @ wrong.T))
        assert np.linalg.norm(target @ wrong - weight @ x) < 0.1 * np.linalg.norm(weight @ x)

    def test_each_method_beats_the_one_before(self) -> None:
        weight, x = problem()
        moment, goal = x @ x.T, Goal(800)

        def made(method: Method, *, fit: bool) -> float:
            return error(
                weight, solve(weight, moment, weight @ moment, goal, method, fit=fit)[0], x
            )

        plain = made(Method.MAGNITUDE, fit=False)
        refitted = made(Method.MAGNITUDE, fit=True)
        best = made(Method.ADMM, fit=True)
        assert best < 1.02 * refitted
        assert refitted < plain
        assert made(Method.SPARSEGPT, fit=True) < made(Method.SPARSEGPT, fit=False) < plain
        assert made(Method.WANDA, fit=True) < plain

    @pytest.mark.parametrize("method", [m for m in Method if m is not Method.AUTO])
    def test_keeps_the_bias_and_the_number_of_zeros(self, method: Method) -> None:
        weight, x = problem()
        found, mask = solve(weight, x @ x.T, weight @ x @ x.T, Goal(800, fixed=1), method, fit=True)
        assert mask[:, -1].all()
        assert abs((found == 0).sum() - 800) <= 2

    @pytest.mark.parametrize("method", [m for m in Method if m is not Method.AUTO])
    def test_follows_a_pattern(self, method: Method) -> None:
        weight, x = problem(columns=49)
        goal = Goal(pattern=(2, 4), fixed=1)
        found, _ = solve(weight, x @ x.T, weight @ x @ x.T, goal, method, fit=True)
        assert ((found[:, :48].reshape(24, 12, 4) != 0).sum(-1) <= 2).all()

    def test_rough_masks_on_the_way_end_in_the_exact_number(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        weight, x = problem()
        moment, goal = x @ x.T, Goal(900)
        exact, _ = solving.admm(weight, moment, goal)
        monkeypatch.setattr(solving, "ROUGH_FROM", 1)
        monkeypatch.setattr("graphopt_passes.prune.allocate._SAMPLED", 200)
        found, mask = solving.admm(weight, moment, goal)
        assert mask.sum() == weight.size - 900
        assert error(weight, found, x) < 1.1 * error(weight, exact, x)

    def test_survives_inputs_that_are_never_on(self) -> None:
        weight = problem()[0]
        zero = np.zeros((48, 48))
        for method in (Method.SPARSEGPT, Method.ADMM, Method.WANDA):
            found, _ = solve(weight, zero, weight @ zero, Goal(800), method, fit=True)
            assert np.isfinite(found).all()


class TestRoots:
    @pytest.mark.parametrize("size", [1, 40, 256, 300, 700])
    def test_multiply_to_the_inverse(self, size: int) -> None:
        x = np.random.default_rng(0).standard_normal((size, 2 * size))
        moment = x @ x.T
        root = inverse_root(moment)
        assert not np.tril(root.upper, -1).any()
        damped = moment + root.damp * np.eye(size)
        np.testing.assert_allclose(root.upper.T @ root.upper @ damped, np.eye(size), atol=1e-9)
        right = x[:, :3].T
        np.testing.assert_allclose(root.solve(right) @ damped, right, atol=1e-9)

    @pytest.mark.parametrize("size", [1, 255, 256, 700])
    def test_inverse_is_made_in_place(self, size: int) -> None:
        rng = np.random.default_rng(0)
        half = rng.standard_normal((size, 2 * size))
        moment = half @ half.T + np.eye(size)
        work = moment.copy()
        assert inverse(work) is work
        assert np.allclose(work @ moment, np.eye(size), atol=1e-8)

    def test_what_is_not_positive_has_no_inverse(self) -> None:
        with pytest.raises(np.linalg.LinAlgError):
            inverse(-np.eye(3))

    def test_leave_the_moment_as_it_is(self) -> None:
        moment = np.eye(300)
        inverse_root(moment)
        np.testing.assert_array_equal(moment, np.eye(300))

    def test_are_damped_until_they_exist(self) -> None:
        moment = np.diag([1.0, -0.1])
        root = inverse_root(moment)
        assert root.damp > 0.1
        assert np.isfinite(root.upper).all()

    def test_exist_for_what_is_no_moment(self) -> None:
        assert np.isfinite(inverse_root(np.diag([1.0, -3000.0])).upper).all()


def convolve(
    x: npt.NDArray[np.float64], w: npt.NDArray[np.float64], window: Window
) -> npt.NDArray[np.float64]:
    """A convolution by patches."""
    size = output_size(x.shape[2:], window)
    cols = patches(x, window, np.arange(len(x) * int(np.prod(size))))
    blocks = np.moveaxis(w, 1, -1).reshape(window.group, len(w) // window.group, -1)
    out = np.concatenate([c @ b.T for c, b in zip(cols, blocks, strict=True)], axis=1)
    return np.moveaxis(out.reshape(len(x), *size, len(w)), -1, 1)


class TestPatches:
    @pytest.mark.parametrize(
        ("shape", "kernel", "attributes"),
        [
            ((2, 4, 7, 6), (6, 4, 3, 2), {"pads": [1, 0, 2, 1], "strides": [2, 1]}),
            ((2, 4, 9, 9), (6, 2, 3, 3), {"group": 2, "dilations": [2, 2]}),
            ((1, 3, 7, 8), (2, 3, 3, 3), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
            ((1, 3, 7, 8), (2, 3, 2, 2), {"auto_pad": "SAME_UPPER"}),
            ((2, 3, 11), (4, 3, 5), {"strides": [3]}),
        ],
    )
    def test_multiply_to_the_convolution_of_onnx_runtime(
        self, shape: tuple[int, ...], kernel: tuple[int, ...], attributes: dict[str, Any]
    ) -> None:
        rng = np.random.default_rng(0)
        x, w = (rng.standard_normal(s).astype(np.float32) for s in (shape, kernel))
        node = oh.make_node("Conv", ["x", "w"], ["y"], **attributes)
        graph = oh.make_graph(
            [node],
            "g",
            [oh.make_tensor_value_info("x", 1, shape)],
            [oh.make_tensor_value_info("y", 1, None)],
            [oh.make_tensor("w", 1, kernel, w.tobytes(), raw=True)],
        )
        model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=9)
        session = ort.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        want = session.run(None, {"x": x})[0]
        (layer,) = find_layers(load_model(model).graph)
        assert layer.window is not None
        np.testing.assert_allclose(
            convolve(x.astype(float), w.astype(float), layer.window), want, atol=1e-4
        )
        np.testing.assert_array_equal(layer.stored(layer.matrix()), w)

    def test_matrix_products_read_rows_with_a_one_for_the_bias(self) -> None:
        got = inputs(np.arange(12.0).reshape(2, 3, 2), None, np.array([0, 5]))
        assert got.tolist() == [[[0, 1, 1], [10, 11, 1]]]
