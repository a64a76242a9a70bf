"""Golden cases of runs that lose precision: what their recipes say besides, and by which gate they are judged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.driver.golden import golden_optimizer, read_recipe
from graphopt.errors import OptionError, VerifyError
from graphopt.ir.model_file import load_model, save_model
from graphopt.numerics import Numerics
from graphopt.verify.golden import check_case, record
from tests.rewriting import parse

WIDE = 'target = "cpu-vnni"\nprecision = "int8-dynamic"\n\n[golden]\nforce = true\n'


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """One product large enough to be worth eight bits."""
    model = ir.from_proto(parse("g (float[n, 128] x) => (float[n, 128] y) { y = MatMul(x, w) }".replace(
        "(float[n, 128] y)", "(float[n, 128] y) <float[1] w = {0}>")))  # fmt: skip
    weight = np.random.default_rng(0).standard_normal((128, 128)).astype(np.float32)
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    model.graph.initializers["w"].shape = ir.Shape(weight.shape)
    return save_model(model, tmp_path / "wide.onnx")[0]


def test_a_case_in_eight_bits_is_judged_by_their_budget(tmp_path: Path, source: Path) -> None:
    case = tmp_path / "case"
    made = record(case, source, golden_optimizer(), recipe=WIDE)
    (change,) = made.errors
    assert change.now is not None
    assert 1e-4 < change.now < 0.5
    manifest = json.loads((case / "golden.json").read_text())
    assert any("Integer" in op for op in manifest["ops"])
    assert manifest["numerics"] == "lossy"
    assert check_case(case, golden_optimizer()).passed


def test_a_budget_of_the_case_holds_for_the_run_and_for_its_result(
    tmp_path: Path, source: Path
) -> None:
    strict = WIDE + 'budget = "sqnr>=90"\n'

    def careless(model: Path, output: Path, _: str) -> Numerics:
        return golden_optimizer()(model, output, WIDE)

    with pytest.raises(VerifyError, match=re.escape("< 90 dB")):
        record(tmp_path / "case", source, careless, recipe=strict)
    kept = record(tmp_path / "case", source, golden_optimizer(), recipe=strict)
    assert not kept.errors[0].now


def test_bfloat16_is_judged_as_it_would_run(tmp_path: Path, source: Path) -> None:
    case = tmp_path / "case"
    made = record(case, source, golden_optimizer(), recipe='target = "cuda"\nprecision = "bf16"\n')
    assert made.errors[0].now is not None
    assert 1e-4 < made.errors[0].now < 6e-2
    assert check_case(case, golden_optimizer()).passed


def test_calibration_lies_relative_to_the_source(tmp_path: Path, source: Path) -> None:
    samples = np.random.default_rng(1).standard_normal((4, 128)).astype(np.float32)
    np.savez(source.parent / "samples.npz", x=samples)
    text = 'target = "cpu-vnni"\nprecision = "int8"\n[golden]\nforce = true\ncalibration = "samples.npz"\n'
    text += 'budget = "sqnr>=30"\n'  # by default the likeliest class counts, and random ones lie close together
    out = tmp_path / "out.onnx"
    golden_optimizer()(source, out, text)
    assert "QuantizeLinear" in {node.op_type for node in load_model(out).graph}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[golden]\nforced = true", "forced"),
        ('[golden]\nforce = "yes"', "force"),
        ("target = ", "is no TOML"),
        ("[other]\nx = 1", "other"),
    ],
)
def test_what_is_no_recipe_is_refused(text: str, told: str) -> None:
    with pytest.raises(OptionError, match=told):
        read_recipe(text, "here")
