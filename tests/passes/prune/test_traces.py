"""Notes of the exporter, left out of a model that is to be small."""

from __future__ import annotations

import onnx_ir as ir
from graphopt_passes.prune.traces import DropTraces

from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.rewrite import Context, Options
from graphopt.targets import get_target
from tests.rewriting import parse

TEXT = "g (float[2] x) => (float[2] y) { h = Relu(x) y = Neg(h) }"


def noted() -> ir.Model:
    model = load_model(parse(TEXT))
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.stack_trace"] = "File model.py, line 1"
        node.metadata_props["namespace"] = "block.0"
        node.metadata_props["own"] = "kept"
        node.outputs[0].metadata_props["pkg.torch.onnx.original_node_name"] = "relu"
    return model


def context(model: ir.Model, sparsity: str | None) -> Context:
    return Context(model, get_target("cpu"), options=Options(sparsity=sparsity))


def test_drops_traces_and_nothing_else() -> None:
    model = noted()
    ctx = context(model, "0.9")
    assert DropTraces().run(model, ctx)
    assert all(dict(node.metadata_props) == {"own": "kept"} for node in model.graph)
    assert not any(node.outputs[0].metadata_props for node in model.graph)
    assert any("bytes of notes" in remark.reason for remark in ctx.remarks)
    assert not DropTraces().run(model, context(model, "0.9"))


def test_leaves_them_where_no_small_file_is_asked_for() -> None:
    model = noted()
    before = model_to_bytes(model)
    assert not DropTraces().run(model, context(model, None))
    assert model_to_bytes(model) == before
    assert DropTraces(always=True).run(model, context(model, None))
