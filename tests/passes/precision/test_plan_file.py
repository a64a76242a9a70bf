"""Precision plans: written, edited, read again on a model with other names."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import pytest
from graphopt_passes.precision import CastToHalf

from graphopt.errors import OptionError
from graphopt.pipeline import run_pipeline
from graphopt.rewrite import Context
from graphopt.targets import get_target
from tests.rewriting import parse

TEXT = (
    "g (float[N,16] x) => (float[N,16] y) <float[16,16] w, float[16,16] v>"
    "{ a = MatMul(x, w) b = Relu(a) y = MatMul(b, v) }"
)


def run(text: str, step: CastToHalf) -> dict[str, str]:
    """The dtype of each operator's output after the cast."""
    model = ir.from_proto(parse(text))
    run_pipeline(model, (step,), Context(model, get_target("cuda")))
    return {
        f"{node.op_type} {index}": node.outputs[0].dtype.name
        for index, node in enumerate(n for n in model.graph if n.op_type != "Cast")
        if node.outputs[0].dtype
    }


def test_an_edited_plan_is_followed_under_other_names(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    assert set(run(TEXT, CastToHalf(write_plan=str(path))).values()) == {"FLOAT16"}
    body = json.loads(path.read_text())
    assert [entry["operator"] for entry in body["nodes"]] == ["MatMul", "Relu", "MatMul"]
    body["nodes"][0]["dtype"] = "float32"
    path.write_text(json.dumps(body))
    renamed = TEXT.replace(" a ", " first ").replace("(a)", "(first)")
    made = run(renamed, CastToHalf(plan=str(path)))
    assert made == {"MatMul 0": "FLOAT", "Relu 1": "FLOAT", "MatMul 2": "FLOAT16"}


def test_nodes_can_be_kept_by_name() -> None:
    assert run(TEXT, CastToHalf(float32=("y",)))["MatMul 2"] == "FLOAT"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the precision plan"),
        ("{", "is no precision plan"),
        ('{"nodes": [{"key": "k", "dtype": "half"}]}', "written for another one"),
    ],
)
def test_what_is_no_plan_for_the_model_is_refused(
    tmp_path: Path, text: str | None, message: str
) -> None:
    path = tmp_path / "plan.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(OptionError, match=message):
        run(TEXT, CastToHalf(plan=str(path)))


def test_a_plan_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot write the precision plan"):
        run(TEXT, CastToHalf(write_plan=str(tmp_path / "none" / "plan.json")))
