"""Whether graphopt finds what ONNX Runtime's and other projects' own test models of fusions exercise.

    python -m benchmarks.fusion_tests FUSION_TESTS [--targets cpu,cuda,tensorrt,portable] [--verify final] [--models]

FUSION_TESTS holds `index.json`, which says of each model what the project's own test runs on it.  A model counts as
found where a rule of the family that answers that pass fired, or where nothing of what the test counts is left to
fuse.  For passes that graphopt has no rule for on purpose, the reason stands beside it.  With `--models`, every model
that was not found is listed with the remark that came furthest.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import graphopt
from graphopt.driver.result import Result
from graphopt.errors import GraphoptError
from graphopt.rewrite.context import RemarkKind

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "AttentionFusion": ("fuse-attention",),
    "BiasGeluFusion": ("fuse-residuals", "fuse-activation", "lift-opset"),
    "BiasDropoutFusion": (),
    "BiasSoftmaxDropoutFusion": (),
    "BitmaskDropoutReplacement": (),
    "CastChainElimination": ("simplify-shapes", "tidy"),
    "CastElimination": ("tidy", "simplify-shapes"),
    "CommonSubexpressionElimination": ("merge-common-subexpressions", "merge-duplicate-constants"),
    "ConcatSliceElimination": ("simplify-shapes",),
    "ConstantFolding": ("fold-constants",),
    "ConvActivationFusion": (),
    "ConvAddActivationFusion": (),
    "ConvAddFusion": ("fuse-conv",),
    "ConvBNFusion": ("fuse-conv",),
    "ConvMulFusion": ("fuse-conv",),
    "DivMulFusion": ("simplify-algebra",),
    "DoubleQDQPairsRemover": ("tidy",),
    "DynamicQuantizeMatMulFusion": (),
    "EliminateDropout": ("tidy",),
    "EliminateIdentity": ("tidy",),
    "EliminateSlice": ("tidy", "simplify-shapes"),
    "EmbedLayerNormFusion": ("fuse-norm", "evade-runtime-fusions", "fuse-residuals"),
    "ExpandElimination": ("tidy", "simplify-shapes"),
    "FastGeluFusion": ("fuse-activation",),
    "FuseReluClip": ("simplify-algebra",),
    "GeluApproximation": (),
    "GeluFusion": ("fuse-activation",),
    "GemmActivationFusion": (),
    "GemmSumFusion": ("fuse-gemm",),
    "GemmTransposeFusion": ("fuse-gemm", "simplify-shapes", "fold-constants"),
    "LayerNormFusion": ("fuse-norm",),
    "MatMulAddFusion": ("fuse-gemm",),
    "MatMulIntegerToFloatFusion": (),
    "MatMulScaleFusion": ("fuse-gemm", "simplify-algebra"),
    "MatmulBNFusion": ("fuse-gemm", "fuse-conv"),
    "MatmulTransposeFusion": ("fuse-gemm", "cancel-transposes"),
    "NoopElimination": ("tidy", "simplify-algebra"),
    "NotWhereFusion": ("simplify-algebra",),
    "PadFusion": ("fuse-conv",),
    "PropagateCastOps": (),
    "PreShapeNodeElimination": ("rebuild-shapes", "simplify-shapes", "tidy"),
    "ReshapeFusion": ("rebuild-shapes", "simplify-shapes"),
    "SimplifiedLayerNormFusion": ("fuse-norm",),
    "SkipLayerNormFusion": ("fuse-residuals", "evade-runtime-fusions"),
    "UnsqueezeElimination": ("fold-constants", "simplify-shapes", "tidy"),
}
"""Our passes that answer for one of ONNX Runtime's; none where there is none on purpose."""

REASONS: Mapping[str, str] = {
    "AttentionFusion": "the models that stay have a causal choice and an added mask of -1e4 both: a row that both mask "
    "mixes them; portable does not raise opsets",
    "BiasDropoutFusion": "training: Dropout of inference is removed",
    "BiasGeluFusion": "the CPU's Gelu is as fast; CUDA's BiasGelu is of erf; portable does not raise opsets",
    "BiasSoftmaxDropoutFusion": "training",
    "BitmaskDropoutReplacement": "training",
    "CommonSubexpressionElimination": "the model that stays has none left: its casts are taken out first",
    "ConstantFolding": "the models that stay are negative, or their shape is fed",
    "ConvAddFusion": "the model that stays is negative: the addend is no constant",
    "ConvActivationFusion": "ONNX Runtime does it at load for its own layout; in a file it would fix the CPU kernel",
    "ConvAddActivationFusion": "as ConvActivationFusion",
    "DoubleQDQPairsRemover": "the models that stay have scales in half precision",
    "DynamicQuantizeMatMulFusion": "left to the runtime, which matches the standard operators",
    "EliminateIdentity": "the model that stays needs one: two outputs of a body are the same value",
    "EmbedLayerNormFusion": "com.microsoft EmbedLayerNormalization on CUDA alone",
    "FastGeluFusion": "portable does not raise opsets, and the models are older than Gelu",
    "GeluApproximation": "tanh for erf changes the numbers: only on request in ONNX Runtime, never here",
    "GemmActivationFusion": "FusedGemm is no faster, and CUDA has no kernel",
    "MatMulAddFusion": "matrices only: of higher rank a Reshape more, no faster; the runtime takes the bias at load",
    "MatMulIntegerToFloatFusion": "left to the runtime, which matches the standard operators",
    "MatmulTransposeFusion": "FusedMatMul gains nothing (1.0) unless it spares a copy of a tied weight",
    "PropagateCastOps": "moves casts over arithmetic: other numbers; --precision decides where halves are",
    "GeluFusion": "the models that stay take the number 1 or the root of 2 from outside",
    "GemmSumFusion": "the models that stay are negative: broadcasting, computed C, other uses",
    "MatmulBNFusion": "the models that stay are negative, or normalise one channel by the numbers of five",
    "SimplifiedLayerNormFusion": "portable does not raise opsets, and the models are older than RMSNormalization",
    "LayerNormFusion": "the models that stay have a normalised axis of unknown size, or casts that do not come back",
    "PadFusion": "the models that stay are negative, or a window would see padding alone",
    "ReshapeFusion": "the models that stay are negative or have two dims to compute; three state an output that is "
    "not theirs, so that the checker refuses whatever makes it plain",
    "SkipLayerNormFusion": "0.16-0.22 on the CPU: there it is evaded; on CUDA, where both operands are [B, S, D]",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, and the pass that its test runs.

    Attributes:
        path: of the model in the folder.
        operation: the pass.
        gone: operators of which the test says that none is left.
    """

    path: str
    operation: str
    gone: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Finding:
    """What one target made of a case.

    Attributes:
        case: the case.
        state: found, kept (nothing fired), refused (cannot be read or run), or rolled back (found not equal or valid).
        reason: the remark that came furthest, or the error.
    """

    case: Case
    state: str
    reason: str = ""


def cases(folder: Path) -> Iterator[Case]:
    """The models whose tests name a pass of a runtime."""
    index = json.loads((folder / "index.json").read_text())
    for model in index["models"]:
        named = [p for test in model.get("tests", ()) for p in test.get("passes", ())]
        known = [name for name in named if name in FAMILIES or name in REASONS]
        if known:
            yield Case(model["path"], known[0], _gone(model["tests"], known[0]))


def _gone(tests: Sequence[Mapping[str, Any]], operation: str) -> frozenset[str]:
    """What the tests of a pass count to none at the end, and never to anything else."""
    counts = [each.split("==") for t in tests if operation in t["passes"] for each in t["asserts"]]
    last = {pair[0]: pair[1] for pair in counts if len(pair) == 2}
    return frozenset(name for name, count in last.items() if count == "0" and "." not in name)


def judge(case: Case, folder: Path, target: str, verify: str) -> Finding:
    """What `target`'s pipeline makes of a case."""
    try:
        made = graphopt.optimize(folder / case.path, target=target, verify=verify, remarks=True)
    except GraphoptError as fault:
        return Finding(case, "refused", str(fault).splitlines()[0][:110])
    report = made.report
    if report.rolled_back:
        return Finding(case, "rolled back", report.rolled_back[0].reason[:110])
    wanted = FAMILIES.get(case.operation, ())
    if any(each.pass_name in wanted for each in report.rewrites):
        return Finding(case, "found")
    left = {node.op_type for node in made.model.graph}
    if wanted and case.gone and left.isdisjoint(case.gone):
        return Finding(case, "found")
    return Finding(case, "kept", _closest(made, wanted))


def _closest(made: Result, wanted: Sequence[str]) -> str:
    """The first remark of the passes that could have answered."""
    missed = [each for each in made.report.remarks if each.kind is RemarkKind.MISSED]
    ours = [each for each in missed if each.pass_name in wanted]
    first = next(iter(ours), None)
    return "" if first is None else f"{first.rule}: {first.reason}"


def table(found: Mapping[str, Sequence[Finding]]) -> Iterator[str]:
    """Markdown: a row for each pass, how many of its models each target found, and why not the others."""
    targets = list(found)
    yield f"| pass of the runtime's test | models | {' | '.join(targets)} | where absent |"
    yield "|---|--:|" + "--:|" * len(targets) + "---|"
    names = sorted({each.case.operation for rows in found.values() for each in rows})
    for name in names:
        cells = []
        for target in targets:
            states = collections.Counter(
                each.state for each in found[target] if each.case.operation == name
            )
            cells.append(_cell(states))
        total = sum(each.case.operation == name for each in found[targets[0]])
        yield f"| {name} | {total} | {' | '.join(cells)} | {REASONS.get(name, '')} |"


def _cell(states: Mapping[str, int]) -> str:
    extra = [f"{count} {state}" for state, count in states.items() if state == "rolled back"]
    return ", ".join([str(states.get("found", 0)), *extra])


def main() -> int:
    """Prints the table; exits with 1 where the result of a rewrite was not equal."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--targets", default="cpu,cuda,tensorrt,portable")
    parser.add_argument("--verify", default="off")
    parser.add_argument("--only", default="", help="one pass of the runtime")
    parser.add_argument("--models", action="store_true", help="list what was not found")
    args = parser.parse_args()
    chosen = [c for c in cases(args.folder) if args.only in c.operation]
    found = {
        target: [judge(case, args.folder, target, args.verify) for case in chosen]
        for target in args.targets.split(",")
    }
    print("\n".join(table(found)))
    if args.models:
        for target, rows in found.items():
            for each in rows:
                if each.state != "found" and FAMILIES.get(each.case.operation):
                    print(
                        f"{target}: {each.case.operation}: {each.case.path}: {each.state} {each.reason}"
                    )
    wrong = [each for rows in found.values() for each in rows if each.state == "rolled back"]
    return 1 if any("checker" not in each.reason for each in wrong) else 0


if __name__ == "__main__":
    raise SystemExit(main())
