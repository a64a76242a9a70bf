"""What one rewrite costs, and whether the cost stays the same as graphs grow.

    python -m benchmarks.rewrites [--write FOLDER] [NODES …]

Two graphs of each size: a chain of Relu, every second of which one rule removes through the engine (matching, checks,
shapes, provenance included), and blocks as exporters write them (MatMul and Add, shape arithmetic, a Transpose there
and back, a Mul by one), which the whole default pipeline cleans.  `--write` leaves those graphs in a folder, for
`benchmarks.simplify` to race the simplifiers on.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import onnx_ir as ir

import graphopt
from graphopt.ir.build import Builder
from graphopt.ir.model_file import save_model
from graphopt.pipeline import RewritePass
from graphopt.rewrite import Context, Match, Op, Var, rule
from graphopt.targets import get_target

HEAD = '<ir_version: 9, opset_import: ["":18]>'

x = Var()
inner = Op("Relu", x)


@rule(Op("Relu", inner))
def drop_second_relu(m: Match, g: Builder) -> ir.Value:
    """Relu(Relu(x)) = Relu(x)."""
    return g.op("Relu", m[x])


def chain(nodes: int) -> ir.Model:
    """A chain of Relu."""
    lines = [f"v{i + 1} = Relu(v{i})" for i in range(nodes - 1)]
    lines.append(f"y = Relu(v{nodes - 1})")
    return ir.from_onnx_text(f"{HEAD} g (float[N] v0) => (float[N] y) {{ {' '.join(lines)} }}")


def exported(blocks: int) -> ir.Model:
    """Blocks of 14 nodes each, most of which a simplifier removes."""
    block = """
        m{i} = MatMul(x{i}, w) c{i} = Constant<value_floats = [{i}.0]>() a{i} = Add(m{i}, c{i})
        s{i} = Shape(a{i}) g{i} = Gather(s{i}, zero) d{i} = Concat<axis = 0>(g{i}, two_four) r{i} = Reshape(a{i}, d{i})
        t{i} = Transpose<perm = [0, 2, 1]>(r{i}) u{i} = Transpose<perm = [0, 2, 1]>(t{i}) o{i} = Mul(u{i}, one)
        e{i} = Concat<axis = 0>(g{i}, eight) f{i} = Reshape(o{i}, e{i}) y{i} = Relu(f{i}) x{n} = Add(y{i}, x{i})"""
    body = "".join(block.format(i=i, n=i + 1) for i in range(blocks))
    weight = ", ".join(f"{number / 64}" for number in range(64))
    return ir.from_onnx_text(
        f"{HEAD} g (float[N, 8] x0) => (float[N, 8] out)"
        "<int64[1] zero = {0}, int64[2] two_four = {2, 4}, int64[1] eight = {8}, float one = {1},"
        f" float[8, 8] w = {{{weight}}}>"
        f"{{ {body} out = Identity(x{blocks}) }}"
    )


def of_engine(nodes: int) -> tuple[float, int]:
    """CPU seconds of the engine on a chain, and how many rewrites it made."""
    model = chain(nodes)
    ctx = Context(model, get_target("cpu"))
    started = time.process_time()
    RewritePass("bench", (drop_second_relu,)).run(model, ctx)
    return time.process_time() - started, len(ctx.rewrites)


def of_pipeline(nodes: int) -> tuple[float, int]:
    """CPU seconds of the default pipeline on exporter-like blocks, and how many rewrites it made."""
    model = exported(nodes // 14)
    started = time.process_time()
    made = graphopt.optimize(model, verify="off")
    return time.process_time() - started, len(made.report.rewrites)


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("nodes", nargs="*", type=int, default=[2_000, 10_000, 50_000])
    parser.add_argument("--write", type=Path, help="folder for the graphs; nothing is measured")
    args = parser.parse_args()
    if args.write is not None:
        for nodes in args.nodes:
            save_model(exported(nodes // 14), args.write / f"exported_{nodes}.onnx")
        return
    print("| graph | nodes | rewrites | CPU s | ms a rewrite | ms a node |")
    print("|---|--:|--:|--:|--:|--:|")
    for nodes in args.nodes:
        for name, measure in (
            ("Relu chain, engine", of_engine),
            ("exported, pipeline", of_pipeline),
        ):
            gc.collect()
            seconds, rewrites = measure(nodes)
            print(
                f"| {name} | {nodes} | {rewrites} | {seconds:.2f} | {seconds / rewrites * 1e3:.3f} "
                f"| {seconds / nodes * 1e3:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
