"""What is no signal is left out of ranges, and that is said."""

from __future__ import annotations

import numpy as np
from graphopt_passes.quantize.static import QuantizeStatic

from graphopt.ir.model_file import load_model
from graphopt.rewrite import Calibration, Context, Options, RemarkKind
from graphopt.targets import get_target
from tests.rewriting import parse

MASKED = """g (float[n,4,8] x, float[n,4,1] m) => (float[n,4,16] y) <float[8,16] w, float big = {-3.4e38}> {
 e = Mul(m, big)  s = Add(x, e)  y = MatMul(s, w) }"""


def remarks(masked: int) -> list[str]:
    rng = np.random.default_rng(0)
    feeds = []
    for index in range(4):
        mask = np.zeros((1, 4, 1), np.float32)
        mask[0, :masked] = index == 2
        feeds.append({"x": rng.normal(size=(1, 4, 8)).astype(np.float32), "m": mask})
    model = load_model(parse(MASKED))
    options = Options(calibration=Calibration(feeds), force=True, budget="sqnr>=-1000")
    ctx = Context(model, get_target("cpu"), options, pass_name="quantize-static")
    QuantizeStatic().run(model, ctx)
    return [remark.reason for remark in ctx.remarks if "leaves them out" in remark.reason]


def test_masks_are_left_out_and_told() -> None:
    (told,) = remarks(masked=2)
    assert told.startswith("16 of 128 elements of 's' are NaN, infinite or beyond 1e+09")


def constant(value: float | None) -> list[tuple[str, str]]:
    """What is told where an input is of one number in all samples but for one."""
    rng = np.random.default_rng(0)
    feeds = [
        {"x": np.full((1, 4, 8), 2.0, np.float32), "m": np.zeros((1, 4, 1), np.float32)}
        for _ in range(15)
    ]
    if value is not None:
        feeds[1]["x"][0, 0, 0] = value
    feeds = [{**feed, "m": rng.random((1, 4, 1)).astype(np.float32) * 1e-38} for feed in feeds]
    text = MASKED.replace(
        "y = MatMul(s, w)", "r = Relu(x)  z = MatMul(r, w)  t = MatMul(s, w)  y = Add(z, t)"
    )
    model = load_model(parse(text))
    options = Options(calibration=Calibration(feeds), force=True, budget="sqnr>=-1000")
    ctx = Context(model, get_target("cpu"), options, pass_name="quantize-static")
    QuantizeStatic().run(model, ctx)
    return [(r.kind, r.node) for r in ctx.remarks if "throughout the samples" in r.reason]


def test_what_the_samples_do_not_vary_is_told_once() -> None:
    assert constant(None) == [(RemarkKind.NOTE, "r")]
    assert constant(3.0) == []


def warned(broken: float) -> list[str]:
    rng = np.random.default_rng(0)
    feeds = [
        {"x": rng.normal(size=(1, 4, 8)).astype(np.float32), "m": np.zeros((1, 4, 1), np.float32)}
        for _ in range(15)
    ]
    feeds[5]["x"][0, 1, 2] = broken
    model = load_model(parse(MASKED))
    options = Options(calibration=Calibration(feeds), force=True, budget="sqnr>=20")
    ctx = Context(model, get_target("cpu"), options, pass_name="quantize-static")
    assert QuantizeStatic().run(model, ctx)
    return [remark.reason for remark in ctx.remarks if remark.kind is RemarkKind.WARNING]


def test_one_broken_sample_does_not_keep_the_model_in_float() -> None:
    (told,) = warned(np.nan)
    assert told.startswith(
        "elements of calibration samples are NaN or infinite: 1 in the input 'x' of 'sample 5'"
    )
    assert len(warned(np.inf)) == 1
    assert warned(0.5) == []


def test_without_masks_nothing_is_told() -> None:
    assert remarks(masked=0) == []
