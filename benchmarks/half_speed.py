"""What half precision costs to find: one overflowing node among 338, the whole conversion, a model of more than 2 GB.

    python -m benchmarks.half_speed [--layers N] [--large GIB]

The model is a transformer written out as exporters of old did (24 nodes a layer and more, no fused operator); one
product in its middle overflows float16 on the way and comes back into range, as `x * 300 * 300 / 1000` does.  CPU
seconds are of the whole process group, peaks are resident memory of the process, weights that are mapped included.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from graphopt_passes.precision.flow import flow_of
from graphopt_passes.precision.gates import Gates
from graphopt_passes.precision.legality import Legality
from graphopt_passes.precision.plan import decide_all, gather
from graphopt_passes.precision.refine import refine
from onnx import TensorProto, helper, numpy_helper

from graphopt.ir.model_file import load_model
from graphopt.ir.scopes import sort
from graphopt.rewrite import Context
from graphopt.targets import Precision, get_target
from graphopt.verify.budget import budget_for

WIDTH, HEADS, TOKENS = 256, 4, 64


class Transformer:
    """Builds the model node by node.

    Args:
        layers: how many.
        trap: the layer in which a value overflows float16; -1 for none.
    """

    def __init__(self, layers: int, trap: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(0)
        value = "x"
        for layer in range(layers):
            value = self._layer(value, trap=layer == trap)
        self.op("Identity", value, out="y")

    def proto(self) -> onnx.ModelProto:
        """The model."""
        shape = [1, TOKENS, WIDTH]
        graph = helper.make_graph(
            self.nodes,
            "transformer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            self.weights,
        )
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])

    def op(self, op_type: str, *inputs: str, out: str = "", **attributes: Any) -> str:  # noqa: ANN401
        """Adds a node; returns its output."""
        out = out or f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, list(inputs), [out], **attributes))
        return out

    def weight(self, *shape: int, scale: float = 1.0) -> str:
        """Adds a weight of normal numbers."""
        return self.constant((self._rng.standard_normal(shape) * scale).astype(np.float32))

    def constant(self, array: Any) -> str:  # noqa: ANN401
        """Adds a constant."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def _linear(self, value: str, inner: int, outer: int) -> str:
        product = self.op("MatMul", value, self.weight(inner, outer, scale=inner**-0.5))
        return self.op("Add", product, self.weight(outer, scale=0.1))

    def _norm(self, value: str) -> str:
        mean = self.op("ReduceMean", value, axes=[-1])
        apart = self.op("Sub", value, mean)
        square = self.op("Mul", apart, apart)
        variance = self.op("ReduceMean", square, axes=[-1])
        shifted = self.op("Add", variance, self.constant(np.float32(1e-5)))
        unit = self.op("Div", apart, self.op("Sqrt", shifted))
        return self.op("Mul", unit, self.constant(np.ones(WIDTH, np.float32)))

    def _heads(self, value: str, *, turned: bool) -> str:
        shape = self.constant(np.array([1, TOKENS, HEADS, WIDTH // HEADS]))
        split = self.op("Reshape", self._linear(value, WIDTH, WIDTH), shape)
        return self.op("Transpose", split, perm=[0, 2, 3, 1] if turned else [0, 2, 1, 3])

    def _layer(self, value: str, *, trap: bool) -> str:
        normed = self._norm(value)
        query = self._heads(normed, turned=False)
        key = self._heads(normed, turned=True)
        scores = self.op("MatMul", query, key)
        scaled = self.op("Mul", scores, self.constant(np.float32((WIDTH // HEADS) ** -0.5)))
        if trap:
            for factor in (300.0, 300.0, 1 / 90000):
                scaled = self.op("Mul", scaled, self.constant(np.float32(factor)))
        shares = self.op("Softmax", scaled, axis=-1)
        mixed = self.op("MatMul", shares, self._heads(normed, turned=False))
        joined = self.op("Transpose", mixed, perm=[0, 2, 1, 3])
        flat = self.op("Reshape", joined, self.constant(np.array([1, TOKENS, WIDTH])))
        value = self.op("Add", value, self._linear(flat, WIDTH, WIDTH))
        hidden = self._linear(self._norm(value), WIDTH, 4 * WIDTH)
        curve = self.op("Mul", hidden, self.op("Sigmoid", hidden))
        return self.op("Add", value, self._linear(curve, 4 * WIDTH, WIDTH))


def main() -> int:
    """Prints the three figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--large", type=float, default=2.5, help="GiB of weights; 0 for none")
    options = parser.parse_args()
    built = Transformer(options.layers, options.layers // 2)
    proto = built.proto()
    print(f"model: {len(proto.graph.node)} nodes, {options.layers} layers, one overflow inside")
    _localise(proto)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.onnx"
        onnx.save(proto, file)
        _convert(file, "whole conversion with refinement and verification")
        if options.large:
            large = Path(scratch) / "large.onnx"
            _save_large(large, options.large)
            _convert(
                large, f"{options.large} GiB of weights, without verification", "--verify", "off"
            )
            _convert(large, f"{options.large} GiB of weights, with verification")
    return 0


def _localise(proto: onnx.ModelProto) -> None:
    """Finds the overflow by experiment alone: no range was seen, so that no rule knows of it."""
    started = time.process_time()
    model = load_model(proto)
    sort(model.graph)
    target = get_target("cuda")
    ctx = Context(model, target)
    _ = ctx.shapes
    legality = Legality(target, ir.DataType.FLOAT16, model.opset_imports)
    facts = gather(model, legality, {}, flow_of(model))
    for node in model.graph:
        facts.forced = {**facts.forced, node.outputs[0].name or "": "half"}
    feed = {"x": np.random.default_rng(1).standard_normal((1, TOKENS, WIDTH)).astype(np.float32)}
    budget = budget_for(Precision.FP16, None)
    assert budget is not None
    gates = Gates.of(model, decide_all(model, facts), facts.half, facts.masks, [feed], budget)
    found = refine(len(gates.nodes), gates)
    seconds = time.process_time() - started
    where = [
        gates.nodes[index].outputs[0].name
        for index, why in found.raised.items()
        if "overflow" in why
    ]
    print(
        f"localised {where} among {len(gates.nodes)} gates: {found.runs} experiments, {seconds:.1f} s CPU, "
        f"error after {found.after:.2f} of the budget"
    )


def _save_large(path: Path, gib: float) -> None:
    """A chain of large products, its weights beside it, written one at a time."""
    side = 8192
    count = max(1, round(gib * 2**30 / (4 * side * side)))
    rng = np.random.default_rng(0)
    nodes, weights, value = [], [], "x"
    with path.with_suffix(".data").open("wb") as data:
        for index in range(count):
            array = rng.standard_normal((side, side), np.float32) * np.float32(side**-0.5)
            tensor = TensorProto(name=f"w{index}", data_type=TensorProto.FLOAT, dims=[side, side])
            tensor.data_location = TensorProto.EXTERNAL
            for key, held in (
                ("location", path.with_suffix(".data").name),
                ("offset", str(data.tell())),
                ("length", str(array.nbytes)),
            ):
                tensor.external_data.add(key=key, value=held)
            data.write(array.tobytes())
            weights.append(tensor)
            nodes.append(helper.make_node("MatMul", [value, f"w{index}"], [f"m{index}"]))
            nodes.append(helper.make_node("Tanh", [f"m{index}"], [f"t{index}"]))
            value = f"t{index}"
    nodes.append(helper.make_node("Identity", [value], ["y"]))
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, side]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "large", info[:1], info[1:], weights)
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    path.write_bytes(proto.SerializeToString())


def _convert(path: Path, what: str, *options: str) -> None:
    """Runs the command; prints CPU seconds and peak memory."""
    command = [sys.executable, "-m", "graphopt", "optimize", str(path)]
    command += ["-o", str(path.with_name("out.onnx")), "--target", "cuda", "--precision", "fp16"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    script = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module('graphopt', run_name='__main__')\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"
    )
    done = subprocess.run(
        [command[0], "-c", script, "graphopt", *command[3:], "--quiet", *options],
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    peak = done.stderr.strip().splitlines()[-1]
    status = "" if done.returncode == 0 else f", status {done.returncode}: {done.stderr[-300:]}"
    print(f"{what}: {seconds:.1f} s CPU, {int(peak) / 1024:.0f} MiB peak{status}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
