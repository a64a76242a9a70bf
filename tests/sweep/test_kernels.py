"""The kernels that fold constants, on the inputs of ONNX's own backend tests: the bits of ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from graphopt.ir import kernels
from graphopt.ir.evaluate import numpy_kernel
from tests.sweep.backend_cases import Case, node_cases


def candidates() -> list[str]:
    return [
        name
        for name, case in node_cases().items()
        if len(case.model.graph.node) == 1
        and not case.model.graph.node[0].domain
        and case.model.graph.node[0].op_type in kernels.KERNELS
        and case.feeds
    ]


def computed(case: Case, feed: dict[str, Any]) -> Any:
    """What the kernel gives; None where it declines, as it may."""
    model = ir.from_proto(case.model)
    kernel = numpy_kernel(model.graph[0], model.opset_imports)
    inputs = [feed.get(name) if name else None for name in case.model.graph.node[0].input]
    if kernel is None or any(isinstance(value, list) for value in inputs):
        return None
    try:
        return kernel(*[None if value is None else np.asarray(value) for value in inputs])
    except kernels.REFUSALS:
        return None


def reference(model: onnx.ModelProto, feed: dict[str, Any]) -> list[Any]:
    """What ONNX Runtime gives; skips where it has no kernel for the type or version."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    given = {name: np.asarray(value) for name, value in feed.items() if value is not None}
    try:
        session = ort.InferenceSession(model.SerializeToString(), options)
        return list(session.run(None, given))
    except Exception as error:  # noqa: BLE001  the runtime has no common class for what it refuses
        pytest.skip(f"ONNX Runtime does not run it: {str(error)[:80]}")


@pytest.mark.parametrize("name", candidates())
def test_a_kernel_gives_the_bits_of_the_runtime_or_declines(name: str) -> None:
    case = node_cases()[name]
    for feed in case.feeds:
        results = computed(case, feed)
        if results is None:
            continue
        for seen, expected in zip(results, reference(case.model, feed), strict=False):
            array = np.asarray(seen)
            assert (array.dtype, array.shape) == (expected.dtype, expected.shape)
            if array.dtype == object:
                assert array.tolist() == expected.tolist()
            else:
                assert array.tobytes() == expected.tobytes()


def test_the_kernels_are_really_run() -> None:
    ran = [n for n in candidates() for f in node_cases()[n].feeds if computed(node_cases()[n], f)]
    assert len(ran) > 200
