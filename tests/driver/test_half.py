"""Half precision through the whole way: emulated verification, budgets, refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.driver import half
from graphopt.driver.request import Request, VerifyMode
from graphopt.errors import OptionError, TargetError
from graphopt.ir.model_file import ExternalData
from graphopt.numerics import Numerics
from graphopt.rewrite import Gate, Options
from graphopt.targets import Precision, get_target
from graphopt.verify.feeds import LARGE, Feed
from graphopt.verify.verifier import ReferenceRun, VerifyOptions
from tests.rewriting import parse

MLP = (
    "g (float[4,16] x) => (float[4,8] y) <float[16,32] w, float[32,8] v>"
    "{ a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }"
)


def request(precision: Precision = Precision.FP16) -> Request:
    return Request(
        source=b"",
        output=None,
        target=get_target("cuda"),
        precision=precision,
        steps=(),
        gate=Gate(),
        options=Options(),
        verify=VerifyMode.FINAL,
        inputs=None,
        strict=False,
        external=ExternalData.AUTO,
    )


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_result_is_verified_in_true_half_precision(precision: str) -> None:
    made = graphopt.optimize(parse(MLP), target="cuda", precision=precision)
    verification = made.report.verification
    assert verification.passed
    assert verification.profile == "lossy"
    assert half.EMULATED in verification.reason
    assert not made.report.rolled_back
    dtypes = {v.dtype for v in made.model.graph.initializers.values()}
    assert dtypes == {ir.DataType.FLOAT16 if precision == "fp16" else ir.DataType.BFLOAT16}


def test_a_failure_that_the_cpu_would_have_hidden_is_told(tmp_path: Path) -> None:
    reference = parse(
        "g (float[4] x) => (float[4] y) { k = Constant<value_float=300.0>()"
        " t = Constant<value_float=0.001>() a = Mul(x, k) b = Mul(a, k) y = Mul(b, t) }"
    )
    cast = parse(
        "g (float[4] x) => (float[4] y) { kf = Constant<value_float=300.0>() k = Cast<to=10>(kf)"
        " tf = Constant<value_float=0.001>() t = Cast<to=10>(tf)"
        " h = Cast<to=10>(x) a = Mul(h, k) b = Mul(a, k) c = Mul(b, t) y = Cast<to=1>(c) }"
    )
    onnx.save(reference, tmp_path / "reference.onnx")
    onnx.save(cast, tmp_path / "cast.onnx")
    x = np.array([1.0, 2.0, 3.0, -1.0], np.float32)
    run = ReferenceRun(tmp_path / "reference.onnx", [Feed("given", {"x": x})])
    options = VerifyOptions(Numerics.LOSSY)
    found = half.verify(run, tmp_path / "cast.onnx", options, request(), tmp_path)
    assert found.passed is False
    assert "non-finite values differ" in found.reason
    assert half.HIDDEN in found.notes


def test_float32_results_are_run_as_they_are(tmp_path: Path) -> None:
    onnx.save(parse(MLP), tmp_path / "model.onnx")
    run = ReferenceRun(tmp_path / "model.onnx")
    options = VerifyOptions(Numerics.LOSSY)
    found = half.verify(run, tmp_path / "model.onnx", options, request(), tmp_path)
    assert found.passed
    assert half.EMULATED not in found.notes


def test_the_large_feed_is_left_out_for_halves_only(tmp_path: Path) -> None:
    onnx.save(parse(MLP), tmp_path / "model.onnx")
    names = [feed.name for feed in ReferenceRun(tmp_path / "model.onnx").feeds]
    assert LARGE in names
    run = half.usual(ReferenceRun(tmp_path / "model.onnx"), request())
    assert [feed.name for feed in run.feeds] == [name for name in names if name != LARGE]
    assert len(run.outputs) == len(run.feeds)
    kept = half.usual(ReferenceRun(tmp_path / "model.onnx"), request(Precision.FP32))
    assert [feed.name for feed in kept.feeds] == names


def test_the_budget_of_the_user_is_held() -> None:
    made = graphopt.optimize(parse(MLP), target="cuda", precision="fp16", budget="sqnr>=140")
    assert made.report.verification.passed
    assert {v.dtype for v in made.model.graph.initializers.values()} == {ir.DataType.FLOAT}


def test_a_budget_that_is_none_is_refused() -> None:
    with pytest.raises(OptionError, match="--budget 'little'"):
        graphopt.optimize(parse(MLP), target="cuda", precision="fp16", budget="little")


def test_the_cpu_is_refused_unless_forced() -> None:
    with pytest.raises(TargetError, match="no float16 arithmetic"):
        graphopt.optimize(parse(MLP), target="cpu", precision="fp16")
    made = graphopt.optimize(parse(MLP), target="cpu", precision="fp16", force=True)
    assert made.report.verification.passed
    assert any(v.dtype == ir.DataType.FLOAT16 for v in made.model.graph.initializers.values())
