"""Statistics of static quantisation: kept and used again, and the same however samples are shared out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from graphopt_passes.quantize.static import QuantizeStatic

from graphopt.errors import OptionError
from graphopt.ir.model_file import load_model, to_proto
from graphopt.rewrite import Calibration, Context, Options
from graphopt.targets import get_target
from tests.passes.quantize.test_static import (
    BLOCK,
    IMAGES,
    RESIDUAL,
    TOKENS,
    context,
    varied,
)


def test_statistics_are_kept_and_used_again(tmp_path: Path) -> None:
    file = tmp_path / "statistics.npz"
    each = QuantizeStatic(statistics=str(file))
    model, again = load_model(varied(RESIDUAL)), load_model(varied(RESIDUAL))
    assert each.run(model, context(model, budget="sqnr>=0"))
    kept = file.read_bytes()
    ctx = context(again, budget="sqnr>=0")
    told: list[str] = []
    ctx.progress = lambda stage, _part: told.append(stage)
    assert each.run(again, ctx)
    assert to_proto(again) == to_proto(model)
    assert file.read_bytes() == kept
    assert not any("sample" in stage for stage in told[:1])


def test_statistics_of_another_model_are_collected_anew(tmp_path: Path) -> None:
    file = tmp_path / "statistics.npz"
    other = varied(
        RESIDUAL.replace("m, float[5] n", "m, float[5] n").replace(
            "Flatten(q)", "Flatten<axis=1>(q)"
        )
    )
    other.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(np.ones((8, 8, 3, 3), np.float32), "w")
    )
    first = load_model(other)
    QuantizeStatic(statistics=str(file)).run(first, context(first, budget="sqnr>=0"))
    model = load_model(varied(RESIDUAL))
    ctx = context(model, budget="sqnr>=0")
    QuantizeStatic(statistics=str(file)).run(model, ctx)
    assert any("another model" in remark.reason for remark in ctx.remarks)


def test_the_same_samples_give_the_same_bytes() -> None:
    made = []
    for _ in range(2):
        model = load_model(varied(RESIDUAL))
        options = Options(calibration=Calibration(IMAGES * 4), force=True, budget="sqnr>=0")
        assert QuantizeStatic().run(
            model, Context(model, get_target("cpu"), options, pass_name="q")
        )
        made.append(to_proto(model).SerializeToString(deterministic=True))
    assert made[0] == made[1]


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_and_workers_do_not_show(size: int, workers: int) -> None:
    text = RESIDUAL.replace("float[1,8,10,10]", "float[n,8,10,10]").replace("[1,5]", "[n,5]")
    rows = np.random.default_rng(3).normal(size=(16, 8, 10, 10)).astype(np.float32)
    made = []
    for step, pool in ((size, ThreadPoolExecutor(workers) if workers else None), (1, None)):
        feeds = [{"x": rows[i : i + step]} for i in range(0, 16, step)]
        model = load_model(varied(text))
        options = Options(calibration=Calibration(feeds, executor=pool), force=True)
        ctx = Context(model, get_target("cpu"), options, pass_name="q")
        assert QuantizeStatic().run(model, ctx)
        made.append(to_proto(model).SerializeToString(deterministic=True))
    assert made[0] == made[1]


def test_processes_that_share_the_samples_do_not_show() -> None:
    made = []
    for workers in (1, 2):
        model = load_model(varied(BLOCK))
        options = Options(calibration=Calibration(TOKENS * 3), force=True, budget="sqnr>=0")
        ctx = Context(model, get_target("cpu"), options, pass_name="q")
        assert QuantizeStatic(workers=workers).run(model, ctx)
        made.append(to_proto(model).SerializeToString(deterministic=True))
    assert made[0] == made[1]


def test_fewer_workers_than_one_are_refused() -> None:
    model = load_model(varied(BLOCK))
    ctx = Context(model, get_target("cpu"), Options(calibration=Calibration(TOKENS)))
    with pytest.raises(OptionError, match="workers 0"):
        QuantizeStatic(workers=0).run(model, ctx)
