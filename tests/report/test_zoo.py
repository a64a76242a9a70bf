"""Real models: every one can be inspected, and equals itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graphopt.ir.model_file import load_model
from graphopt.report.diff import diff_models
from graphopt.report.inspect import inspect_model, inspection_json
from tests.conftest import find_zoo

ZOO = find_zoo()
MODELS = sorted(path.stem for path in (ZOO / "models").glob("*.onnx")) if ZOO else ["absent"]


@pytest.mark.zoo
@pytest.mark.parametrize("name", MODELS)
def test_a_real_model_is_inspected_and_equals_itself(zoo: Path, name: str) -> None:
    path = zoo / "models" / f"{name}.onnx"
    found = inspect_model(load_model(path), path)
    json.dumps(inspection_json(found), allow_nan=False)
    assert found.inputs
    assert found.model.size_bytes == path.stat().st_size
    assert sum(each.count for each in found.operators) == found.model.nodes
    assert diff_models(load_model(path), load_model(path)).equal
