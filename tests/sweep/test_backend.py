"""Every model of onnx's backend tests goes through the default pipeline: valid, and equal in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import DataError, ModelError, TargetError
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.numerics import Numerics
from graphopt.runtime.session import Session, SessionOptions
from graphopt.verify.compare import compare, profile_for
from graphopt.verify.origins import narrowest_float
from tests.sweep.backend_cases import (
    Case,
    as_feed,
    disk_case,
    disk_folders,
    light_files,
    node_cases,
)

LIMIT_BYTES = 4 << 20
"""A folded light model may be larger than its 10 kB original, but never by the size of its weights."""


def outputs(model: bytes, feeds: Mapping[str, Any]) -> dict[str, Any] | str:
    """Outputs with optimisations off, or why ONNX Runtime does not run the model on these inputs."""
    try:
        return Session(model, options=SessionOptions(prepack=False)).run(as_feed(dict(feeds)))
    except (ModelError, DataError) as fault:
        return str(fault)


def sweep(case: Case) -> None:
    before = case.model.SerializeToString()
    try:
        result = graphopt.optimize(case.model, verify="off", strict=True)
    except TargetError:  # an opset that the runtime does not know either
        assert all(isinstance(outputs(before, feeds), str) for feeds in case.feeds)
        return
    after = model_to_bytes(result.model)
    again = graphopt.optimize(case.model, verify="off", strict=True)
    assert model_to_bytes(again.model) == after, "not deterministic"
    numerics = max((r.numerics for r in result.report.rewrites), default=Numerics.EXACT)
    dtype = narrowest_float(load_model(case.model))
    if (
        dtype is not ir.DataType.FLOAT
    ):  # computed in float32 here: no two graphs round at the same places
        numerics = max(numerics, Numerics.REORDERED)
    for feeds in case.feeds:
        expected = outputs(before, feeds)
        if isinstance(expected, str):
            continue  # ONNX Runtime could not run the original: valid and deterministic is all there is to ask
        seen = outputs(after, feeds)
        assert not isinstance(seen, str), seen
        assert list(seen) == list(expected)
        profile = profile_for(numerics, depth=8, dtype=dtype)
        for name, value in expected.items():
            report = compare(name, value, seen[name], profile)
            assert report.passed or is_random(case.model), report


def is_random(model: onnx.ModelProto) -> bool:
    """Whether outputs are drawn anew in each run."""
    drawn = {"Bernoulli", "Multinomial"}
    found = {node.op_type for node in model.graph.node}
    found |= {node.op_type for function in model.functions for node in function.node}
    return any(op in drawn or op.startswith("Random") for op in found) or "Dropout" in found


@pytest.mark.parametrize("name", sorted(node_cases()))
def test_node_case(name: str) -> None:
    sweep(node_cases()[name])


@pytest.mark.parametrize(
    "folder", disk_folders(), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_converted_model(folder: Any) -> None:
    sweep(disk_case(folder))


@pytest.mark.parametrize("file", light_files(), ids=lambda path: path.stem)
def test_light_model_stays_light(file: Any) -> None:
    result = graphopt.optimize(file, verify="off", strict=True)
    assert len(model_to_bytes(result.model)) < LIMIT_BYTES
    assert result.report.output.nodes <= result.report.input.nodes
    assert load_model(file).graph.outputs[0].name == result.model.graph.outputs[0].name
