"""Plants one wrong rewrite among many in a model and measures what finding it costs.

    python -m benchmarks.bisection [--rewrites 200] [--mode final|each] [--wrong 137] MODEL.onnx

A user pass asks leave for as many rewrites as asked for, all harmless but one: that one takes the cosine of a value.
CPU seconds are of this process: loading, optimising, verifying, bisecting and verifying again; `without` is the same
run with all of them harmless, `bisect` the difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import onnx_ir as ir

from graphopt import Numerics, optimize
from graphopt.rewrite import Context


@dataclasses.dataclass(frozen=True)
class Many:
    """Changes the notes of many nodes, and the numbers of one."""

    count: int
    wrong: int
    name: str = "many"
    numerics: Numerics = Numerics.REORDERED

    def run(self, model: ir.Model, ctx: Context) -> bool:
        nodes = [n for n in model.graph if n.outputs[0].dtype is ir.DataType.FLOAT]
        for number in range(self.count):
            node, turn = nodes[number % len(nodes)], number // len(nodes)
            if ctx.permit(f"touch-{turn}", node, Numerics.REORDERED):
                node.metadata_props["touched"] = str(turn)
                if number == self.wrong:
                    self._spoil(node, ctx)
        return True

    def _spoil(self, node: ir.Node, ctx: Context) -> None:
        out = node.outputs[0]
        uses = list(out.uses())
        readers = {use.node for use in uses}
        assert node.graph is not None
        first = next(n for n in node.graph if n in readers)
        made = ir.Node("", "Cos", [out], name=ctx.names.fresh("spoilt"))
        made.outputs[0].name = ctx.names.fresh("spoilt")
        node.graph.insert_before(first, [made])
        for use in uses:
            use.node.replace_input_with(use.idx, made.outputs[0])
        ctx.refresh()


def timed(model: Path, asked: argparse.Namespace, wrong: int) -> tuple[float, list[str], int]:
    started = time.process_time()
    report = optimize(model, passes=[Many(asked.rewrites, wrong)], verify=asked.mode).report
    seconds = time.process_time() - started
    blamed = [f"{each.pass_name}/{each.rule} at {each.site}" for each in report.rolled_back]
    return seconds, blamed, sum(each.pass_name == "many" for each in report.rewrites)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rewrites", type=int, default=200)
    parser.add_argument("--wrong", type=int, default=137)
    parser.add_argument("--mode", default="final", choices=["final", "each"])
    parser.add_argument("model", type=Path)
    asked = parser.parse_args()
    plain, none, _ = timed(asked.model, asked, -1)
    spoilt, blamed, made = timed(asked.model, asked, asked.wrong)
    said = {"rewrites": made + len(blamed), "without": round(plain, 2), "with": round(spoilt, 2)}
    print(json.dumps({**said, "bisect": round(spoilt - plain, 2), "blamed": blamed, "false": none}))
    return 0 if len(blamed) == 1 and not none else 1


if __name__ == "__main__":
    sys.exit(main())
