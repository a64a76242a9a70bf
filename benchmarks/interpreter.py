"""Whether the interpreter of distillation computes what ONNX Runtime does: `python -m benchmarks.interpreter MODELS`.

Each model is tried as it is and as `graphopt optimize` leaves it, which is what is trained.  Prints one line a model:
the greatest difference over the RMS of the outputs, or what is refused.  Needs PyTorch.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import onnx_ir as ir

import graphopt
from graphopt.distill.interpret import Interpreter
from graphopt.distill.train import parity
from graphopt.errors import GraphoptError
from graphopt.ir.model_file import load_model
from graphopt.runtime.in_memory import model_session
from graphopt.verify.feeds import make_feeds


def verdict(model: ir.Model, seed: int) -> str:
    """How far apart the two are, or why the model is refused."""
    try:
        interpreter = Interpreter(model)
        feeds = [dict(feed.values) for feed in make_feeds(model, seed=seed)][:2]
        return f"{parity(model, interpreter, feeds, model_session(model).run):.1e}"
    except GraphoptError as error:
        return f"refused: {error}"


def main() -> None:
    """Prints the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for path in args.models:
        plain = load_model(path)
        count = len({node.op_type for node in plain.graph})
        made = graphopt.optimize(path, verify="off").model
        kinds = (verdict(plain, args.seed), verdict(made, args.seed))
        sys.stdout.write(f"{path.name} | {count} | {kinds[0]} | {kinds[1]}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
