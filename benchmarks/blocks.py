"""Weights in blocks, by tool: what is left of the outputs, and what the kernels take with and without zero points.

    python -m benchmarks.blocks MODEL [MODEL …] [--block 32 128] [--bits 4 8] [--level 0 4] [--inc PYTHON]
    python -m benchmarks.blocks NAME [NAME …] --zoo ZOO [--made FOLDER] …
    python -m benchmarks.blocks --kernels

NAME: a model of the zoo, on the first of its own samples; then graphopt rounds by eight further ones, too.
Models are simplified first, the same for every tool; only MatMul is quantised (no Gather, no Gemm), nothing is judged
or timed.  dB: of the first output, by signal to noise, over generated inputs (of 32 tokens), by the kernels at each
accuracy level (4: activations are rounded to 8 bits, a scale a block; 0: not).  MB: of all that is stored.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from graphopt_passes.quantize.weight_only import products_of
from graphopt_passes.quantize.writers import Blocks, write_blocks
from onnxruntime.quantization import matmul_nbits_quantizer as nbits

import graphopt
from benchmarks.labelled import Task
from graphopt.calibrate.moments import Wanted, collect_moments
from graphopt.errors import GraphoptError
from graphopt.ir.build import Names
from graphopt.ir.model_file import load_model, save_model
from graphopt.runtime.session import Session, SessionOptions
from graphopt.verify.feed_files import Feed

LEAST = 1
TOKENS, COUNT = 32, 8
_INC = """
import sys, onnx
from onnx_neural_compressor.quantization import matmul_nbits_quantizer as q
source, target, bits, block, symmetric = sys.argv[1:]
kind = q.RTNWeightOnlyQuantConfig()
found = q.MatMulNBitsQuantizer(source, block_size=int(block), is_symmetric=symmetric == "1",
    algo_config=kind, n_bits=int(bits))
found.process()
onnx.save(found.model if isinstance(found.model, onnx.ModelProto) else found.model.model, target)
"""


def feeds(model: Path) -> list[dict[str, np.ndarray]]:
    """Some inputs: ids below 1000, masks of ones, normal numbers."""
    rng, found = np.random.default_rng(0), []
    for _ in range(COUNT):
        feed = {}
        for spec in Session(model).inputs:
            shape = [
                d if isinstance(d, int) else (TOKENS if i else 1)
                for i, d in enumerate(spec.shape or ())
            ]
            if "mask" in spec.name:
                feed[spec.name] = np.ones(shape, spec.dtype.numpy())
            elif spec.dtype.is_integer():
                most = 1 if "type" in spec.name else 1000
                feed[spec.name] = rng.integers(0, most, size=shape).astype(spec.dtype.numpy())
            else:
                feed[spec.name] = rng.normal(size=shape).astype(spec.dtype.numpy())
        found.append(feed)
    return found


def ours(
    source: Path, target: Path, bits: int, block: int, scheme: str, further: list[dict[str, Any]]
) -> None:
    """Products as graphopt stores them."""
    model = load_model(source)
    sites = frozenset(
        node.outputs[0].name or ""
        for node in model.graph
        if node.op_type == "MatMul"
        and (node.outputs[0].name or "") in products_of(model.graph, LEAST)
    )
    moments = {}
    if scheme == "samples":
        wanted = {
            node.outputs[0].name or "": Wanted(node.inputs[0].name or "")
            for node in model.graph
            if (node.outputs[0].name or "") in sites and node.inputs[0] is not None
        }
        samples = [Feed(str(index), feed) for index, feed in enumerate(further)]
        found = collect_moments(source, list(dict.fromkeys(wanted.values())), samples)
        moments = {name: found[each] for name, each in wanted.items() if each in found}
        scheme = "auto"
    how = Blocks(block, bits, scheme=scheme, moments=moments)
    write_blocks(model, sites, Names.of(model), how)
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
    save_model(model, target)


def theirs(source: Path, target: Path, bits: int, block: int, scheme: str) -> None:
    """The same by onnxruntime's quantiser."""
    if scheme == "k-quant":
        config = nbits.KQuantWeightOnlyQuantConfig(
            customized_weight_config={}, quant_format=nbits.QuantFormat.QOperator
        )
        made = nbits.MatMulNBitsQuantizer(
            str(source), bits=bits, block_size=block, algo_config=config, accuracy_level=4
        )
    else:
        made = nbits.MatMulNBitsQuantizer(
            str(source),
            bits=bits,
            block_size=block,
            is_symmetric=scheme == "symmetric",
            accuracy_level=4,
            op_types_to_quantize=("MatMul",),
        )
    made.process()
    onnx.save(made.model.model, target)


def inc(python: str, source: Path, target: Path, bits: int, block: int, scheme: str) -> None:
    """The same by neural-compressor, in its own environment."""
    given = [str(source), str(target), str(bits), str(block), str(int(scheme == "symmetric"))]
    subprocess.run([python, "-c", _INC, *given], check=True, capture_output=True, text=True)


def outputs(path: Path, given: list[dict[str, np.ndarray]], level: int) -> list[np.ndarray]:
    """The first output of each, by the kernels of this accuracy level."""
    model = onnx.load(path)
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            kept = [each for each in node.attribute if each.name != "accuracy_level"]
            del node.attribute[:]
            node.attribute.extend([*kept, onnx.helper.make_attribute("accuracy_level", level)])
    session = Session(model.SerializeToString(), options=SessionOptions(threads=1))
    return [np.asarray(next(iter(session.run(feed).values())), np.float64) for feed in given]


def _decibels(exact: list[np.ndarray], found: list[np.ndarray]) -> str:
    power = sum(float((each**2).sum()) for each in exact)
    lost = sum(float(((a - b) ** 2).sum()) for a, b in zip(exact, found, strict=True))
    return f"{10 * np.log10(power / lost):.2f}" if lost else "exact"


def ways(arguments: argparse.Namespace, bits: int) -> Iterator[tuple[str, str]]:
    """Tools and schemes."""
    yield from (("graphopt", each) for each in ("symmetric", "asymmetric", "auto"))
    if arguments.zoo and bits == 4:
        yield "graphopt", "samples"
    yield from (("onnxruntime", each) for each in ("symmetric", "asymmetric", "k-quant"))
    if arguments.inc:
        yield from (("neural-compressor", each) for each in ("symmetric", "asymmetric"))


def compare(path: Path, folder: Path, arguments: argparse.Namespace) -> None:
    """A table of one model."""
    source = folder / "source.onnx"
    model = (
        Task(arguments.zoo, path.name, made=arguments.made).float_model if arguments.zoo else path
    )
    graphopt.optimize(model, output=source, verify="off")
    given, further = feeds(source), []
    if arguments.zoo:
        recorded = Task(arguments.zoo, path.name, made=arguments.made).record(2 * COUNT)
        half = max(len(recorded) // 2, 1)
        given, further = recorded[:half], recorded[half:]
    exact = outputs(source, given, 0)
    levels = arguments.level
    for bits in arguments.bits:
        for block in arguments.block:
            for tool, scheme in ways(arguments, bits):
                target = folder / "target.onnx"
                started = time.process_time()
                try:
                    if tool == "graphopt":
                        ours(source, target, bits, block, scheme, further)
                    elif tool == "onnxruntime":
                        theirs(source, target, bits, block, scheme)
                    else:
                        inc(arguments.inc, source, target, bits, block, scheme)
                    spent = time.process_time() - started
                    found = [_decibels(exact, outputs(target, given, each)) for each in levels]
                except (GraphoptError, ValueError, subprocess.CalledProcessError) as error:
                    print(
                        f"| {path.stem} | {bits} | {block} | {tool} | {scheme} | {str(error).splitlines()[0][:60]} |"
                    )
                    continue
                size = target.stat().st_size / 1e6
                numbers = f"{' | '.join(found)} | {size:.1f} | {spent:.2f}"
                print(
                    f"| {path.stem} | {bits} | {block} | {tool} | {scheme} | {numbers} |",
                    flush=True,
                )


def product(columns: int, bits: int, block: int, *, zeros: bool, level: int) -> bytes:
    """A model of one square MatMulNBits."""
    rng, count = np.random.default_rng(0), columns // block
    arrays: dict[str, np.ndarray] = {
        "w": rng.integers(0, 256, size=(columns, count, block * bits // 8)).astype(np.uint8),
        "s": (0.01 + 0.01 * rng.random(columns * count)).astype(np.float32),
        "z": rng.integers(0, 256, size=columns * -(-count * bits // 8)).astype(np.uint8),
    }
    kept = {name: array for name, array in arrays.items() if zeros or name != "z"}
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", *kept],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=columns,
        bits=bits,
        block_size=block,
        accuracy_level=level,
    )
    ends = [onnx.helper.make_tensor_value_info(n, 1, ["m", columns]) for n in "xy"]
    held = [onnx.numpy_helper.from_array(array, name) for name, array in kept.items()]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], held)
    versions = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("com.microsoft", 1)]
    made = onnx.helper.make_model(graph, opset_imports=versions, ir_version=10)
    return bytes(made.SerializeToString())


def kernels(columns: int = 1024) -> None:
    """Milliseconds of one product, without and with zero points, one thread, least of 15, one after the other."""
    print("| bits | block | accuracy level | rows | without, ms | with, ms | with / without |")
    for bits, block, level in ((4, 32, 4), (4, 128, 4), (8, 32, 4), (8, 128, 4), (4, 32, 0)):
        pair = [
            Session(
                product(columns, bits, block, zeros=zeros, level=level),
                options=SessionOptions(threads=1),
            )
            for zeros in (False, True)
        ]
        for rows in (1, 4, 16, 128):
            given = {"x": np.random.default_rng(1).normal(size=(rows, columns)).astype(np.float32)}
            least = [float("inf")] * 2
            for _ in range(15):
                for index, session in enumerate(pair):
                    started = time.process_time()
                    for _ in range(max(64 // rows, 1)):
                        session.run(given)
                    spent = (time.process_time() - started) / max(64 // rows, 1) * 1e3
                    least[index] = min(least[index], spent)
            cells = (*(f"{each:.3f}" for each in least), f"{least[1] / least[0]:.2f}")
            print("|", " | ".join(map(str, (bits, block, level, rows, *cells))), "|", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Runs what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--block", nargs="+", type=int, default=[32])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--level", nargs="+", type=int, default=[0, 4], choices=range(5))
    parser.add_argument("--inc", help="a python that has neural-compressor's ONNX package")
    parser.add_argument("--zoo", type=Path)
    parser.add_argument("--made", type=Path, help="where models lie that are too large for the zoo")
    parser.add_argument("--kernels", action="store_true")
    arguments = parser.parse_args(argv)
    if arguments.kernels:
        kernels()
    for path in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            compare(path, Path(folder), arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
