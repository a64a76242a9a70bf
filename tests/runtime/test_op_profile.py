"""Where the time goes, on made-up events and on a real profile; memory of a model in a process of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

from graphopt.errors import ModelError
from graphopt.runtime.footprint import peak_bytes
from graphopt.runtime.op_profile import _summed, profile_ops

TEXT = """<ir_version: 8, opset_import: ["" : 17]>
g (float[n] x) => (float[n] y) { a = Exp(x)  b = Exp(a)  y = Add(a, b) }"""
CPU = "CPUExecutionProvider"


def kernel(name: str, op: str, ts: int, dur: int) -> dict[str, Any]:
    args = {"op_name": op, "provider": CPU}
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur, "args": args}


def run_of(ts: int, dur: int) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur}


def test_runs_after_the_first_are_added_up_and_their_median_taken() -> None:
    events = [run_of(100 * i, 90) for i in range(4)]
    events += [
        kernel("a", "Exp", 100 * i + 10, dur) for i, dur in enumerate((80, 1000, 2000, 9000))
    ]
    # Durations beyond the run would belong to a later one: keep them within.
    events = [e if e["dur"] <= 90 else {**e, "dur": e["dur"] // 200} for e in events]
    events += [kernel("b", "Exp", 100 * i + 60, 5) for i in range(4)]
    events += [{"cat": "Node", "name": "a_fence_before", "ts": 110, "dur": 1}]
    found = _summed(events)
    (op,) = found.operators
    assert (op.operator, op.provider, op.count, op.share) == ("Exp", CPU, 2, 1)
    assert [(each.name, each.ms) for each in found.nodes] == [("a", 0.01), ("b", 0.005)]
    assert found.kernels_ms == pytest.approx(0.015)


def test_nothing_ran() -> None:
    assert _summed([]).nodes == ()


def test_a_real_profile_names_the_nodes() -> None:
    model = onnx.parser.parse_model(TEXT).SerializeToString()
    found = profile_ops(model, {"x": np.ones(1000, np.float32)}, runs=3)
    assert {each.operator for each in found.operators} == {"Exp", "Add"}
    assert len(found.nodes) == 3
    assert sum(each.share for each in found.operators) == pytest.approx(1)


def test_memory_grows_with_what_a_run_holds() -> None:
    model = onnx.parser.parse_model(TEXT).SerializeToString()
    peak = peak_bytes(model, {"x": np.ones(1 << 22, np.float32)}, level="DISABLED")
    if peak is None:
        pytest.skip("this system does not tell the memory of a process")
    assert peak > 2 * 4 << 22


def test_a_process_that_fails_is_an_error() -> None:
    model = onnx.parser.parse_model(TEXT.replace("Exp(x)", "my.Op(x)")).SerializeToString()
    with pytest.raises(ModelError, match="memory of the model cannot be measured"):
        peak_bytes(model, {"x": np.ones(4, np.float32)}, level="DISABLED")
