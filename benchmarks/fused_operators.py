"""Which fused operators others make of test models of fusions, and whether graphopt has them, or why not.

    python -m benchmarks.fused_operators FUSION_TESTS [--peers FOLDER] [--models]

Every model of FUSION_TESTS whose own test names a pass of a runtime is loaded by ONNX Runtime with all its fusions
that no layout depends on (ORT_ENABLE_EXTENDED), and its optimised graph is read back; `--peers` is the folder that
`benchmarks.peers_on_zoo` keeps (models.txt and a folder a tool).  An operator counts as made where there are more of
it than before.  graphopt's result for the CPU and for CUDA must hold it, or what stands for it (`SAME`); otherwise
`ABSENT` says why.  What neither has is printed, and makes the exit status 1.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import onnx

import graphopt
from benchmarks.fusion_tests import cases
from graphopt.errors import GraphoptError
from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions

SAME: Mapping[str, tuple[str, ...]] = {
    "Attention": ("Attention", "MultiHeadAttention", "GroupQueryAttention"),
    "BiasGelu": ("BiasGelu", "Gelu"),
    "EmbedLayerNormalization": ("EmbedLayerNormalization",),
    "FastGelu": ("FastGelu", "Gelu"),
    "FusedMatMul": ("FusedMatMul", "Gemm", "Attention"),
    "Gelu": ("Gelu", "FastGelu"),
    "Gemm": ("Gemm", "MatMul"),
    "LayerNormalization": ("LayerNormalization", "SkipLayerNormalization"),
    "MultiHeadAttention": ("Attention", "MultiHeadAttention", "GroupQueryAttention"),
    "QuickGelu": ("QuickGelu", "Swish"),
    "RMSNormalization": (
        "RMSNormalization",
        "SkipSimplifiedLayerNormalization",
        "LayerNormalization",
    ),
    "SimplifiedLayerNormalization": (
        "RMSNormalization",
        "SkipSimplifiedLayerNormalization",
        "SimplifiedLayerNormalization",
        "LayerNormalization",  # what the tests' models say: they have casts around, a mean and a bias
    ),
    "SkipLayerNormalization": ("SkipLayerNormalization",),
}
"""Operators that stand for one that another tool makes; any other stands for itself."""

ABSENT: Mapping[str, str] = {
    "DynamicQuantizeMatMul": "made at load from the standard operators; the file stays standard",
    "EmbedLayerNormalization": "CUDA alone; the models that stay repeat places in ways of their own",
    "FusedConv": "made at load, in the runtime's own layout; in a file it fixes the CPU kernel",
    "FusedGemm": "no faster, and CUDA has no kernel",
    "FusedMatMul": "1.0x; only where it spares a copy of a tied weight",
    "Gemm": "of higher rank than matrices a Reshape more, and no faster",
    "MatMulIntegerToFloat": "made at load from the standard operators; the file stays standard",
    "QLinearAdd": "made at load from QuantizeLinear pairs, which other runtimes need",
    "QLinearConv": "made at load from QuantizeLinear pairs, which other runtimes need",
    "SkipLayerNormalization": "0.16-0.22x on the CPU, where it is evaded",
}
"""Why graphopt does not make what another tool makes."""

OF_MODEL: Mapping[str, str] = {
    "attention_past_no_unidir": "a causal choice and an added mask, -1e4 both: a row that both mask mixes them",
    "attention_past_unidir": "a causal choice and an added mask, -1e4 both: a row that both mask mixes them",
    "gpt2_past_mask_one_layer": "a causal choice and an added mask, -1e4 both: a row that both mask mixes them",
    "layer_norm": "scale and bias are inputs, and the length of the axis is not known: the kernel wants them as long",
}
"""The same, where it is a matter of one model."""

PLAIN = frozenset(
    {
        "Add",
        "Cast",
        "Concat",
        "Constant",
        "Div",
        "Dropout",
        "Expand",
        "Gather",
        "Identity",
        "MatMul",
        "Memcpy",
        "Mul",
    }
    | {
        "ReduceSum",
        "Reshape",
        "Shape",
        "Slice",
        "Split",
        "Squeeze",
        "Sub",
        "Transpose",
        "Unsqueeze",
        "Where",
        "Pow",
    }
    | {
        "Sqrt",
        "Clip",
        "Relu",
        "Max",
        "Min",
        "Sum",
        "ConstantOfShape",
        "Range",
        "Flatten",
        "QuantizeLinear",
        "Conv",
    }
    | {"DequantizeLinear", "ReduceMean", "Softmax", "Reciprocal"}
)
"""Operators that are no fusion where a tool happens to write more of them."""


@dataclasses.dataclass(frozen=True)
class Finding:
    """One model.

    Attributes:
        path: of the model in the folder.
        others: what each tool makes.
        missing: operators that graphopt makes for neither target, with the reason or "".
    """

    path: str
    others: Mapping[str, frozenset[str]]
    missing: Mapping[str, str]


def operators(model: onnx.ModelProto) -> collections.Counter[str]:
    """How many there are of each, local functions included."""
    found = collections.Counter(node.op_type for node in model.graph.node)
    for function in model.functions:
        found.update(node.op_type for node in function.node)
    return found


def made(before: collections.Counter[str], path: Path) -> frozenset[str]:
    """The fused operators that a result has more of."""
    after = operators(onnx.load(path, load_external_data=False))
    return frozenset(name for name in after - before if name not in PLAIN)


def by_runtime(model: Path, before: collections.Counter[str]) -> frozenset[str]:
    """What ONNX Runtime makes on the CPU when it loads a model."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "optimized.onnx"
        try:
            Session(
                model, level=OptimizationLevel.EXTENDED, options=SessionOptions(optimized_path=out)
            )
        except GraphoptError:
            return frozenset()
        return made(before, out) if out.exists() else frozenset()


def ours(model: Path) -> frozenset[str]:
    """Every operator of what graphopt makes for the CPU and for CUDA."""
    found: set[str] = set()
    for target in ("cpu", "cuda"):
        try:
            result = graphopt.optimize(model, target=target, verify="off")
        except GraphoptError:
            continue
        found.update(node.op_type for node in result.model.graph)
    return frozenset(found)


def judge(folder: Path, path: str, peers: Mapping[str, Path]) -> Finding:
    """What the others make of a model, and what of that graphopt has not."""
    model = folder / path
    before = operators(onnx.load(model, load_external_data=False))
    others = {"ONNX Runtime": by_runtime(model, before)}
    others |= {tool: made(before, out) for tool, out in peers.items() if out.exists()}
    wanted = frozenset().union(*others.values())
    held = ours(model) if wanted else frozenset()
    missing = {
        name: OF_MODEL.get(model.stem, ABSENT.get(name, ""))
        for name in sorted(wanted)
        if held.isdisjoint(SAME.get(name, (name,)))
    }
    return Finding(path, others, missing)


def results_of(peers: Path | None, model: Path) -> dict[str, Path]:
    """Where each tool's result for a model lies."""
    if peers is None:
        return {}
    listed = (peers / "models.txt").read_text().splitlines()
    tools = [each for each in sorted(peers.iterdir()) if each.is_dir()]
    if str(model) not in listed:
        return {}
    return {tool.name: tool / f"{listed.index(str(model))}.onnx" for tool in tools}


def table(found: Iterable[Finding]) -> Iterator[str]:
    """Markdown: a row for each operator that another tool makes."""
    rows = [each for each in found if any(each.others.values())]
    names = sorted(
        {name for each in rows for made_ones in each.others.values() for name in made_ones}
    )
    yield "| operator | made by (models) | graphopt has it | why not in the others |"
    yield "|---|---|--:|---|"
    for name in names:
        counts = collections.Counter(
            tool for each in rows for tool, those in each.others.items() if name in those
        )
        models = [each for each in rows if any(name in those for those in each.others.values())]
        has = sum(name not in each.missing for each in models)
        why = "; ".join(sorted({each.missing[name] for each in models if name in each.missing}))
        by = ", ".join(f"{tool} {count}" for tool, count in sorted(counts.items()))
        yield f"| {name} | {by} | {has} of {len(models)} | {why} |"


def main() -> int:
    """Prints the table; exits with 1 where something is neither had nor explained."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peers", type=Path)
    parser.add_argument("--models", action="store_true", help="a line for each model as well")
    args = parser.parse_args()
    found = [
        judge(args.folder, case.path, results_of(args.peers, args.folder / case.path))
        for case in cases(args.folder)
    ]
    print("\n".join(table(found)))
    for each in found:
        if args.models and any(each.others.values()):
            made_by = "; ".join(f"{t}: {', '.join(sorted(o))}" for t, o in each.others.items() if o)
            lacks = "; ".join(
                f"{name}: {why or 'NOT EXPLAINED'}" for name, why in each.missing.items()
            )
            print(f"| {each.path} | {made_by} | {lacks or 'has all'} |")
    return 1 if any(not why for each in found for why in each.missing.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
