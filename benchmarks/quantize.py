"""INT8 on labelled data: the drop of the task metric and the speed, graphopt beside its peers.

    python -m benchmarks.quantize ZOO FOLDER [MODEL …] [--tools graphopt ort expert inc modelopt] [--samples 48]
        [--limit N] [--variants 8] [--inc PYTHON] [--modelopt PYTHON] [--made FOLDER] [--again | --rescore] [--table]

Calibrates on what the zoo's own scoring feeds first, scores with it (labelled.py), times interleaved on one thread.
FOLDER keeps the quantised models, the answers of float, and one JSON file a row: rows are made piecemeal, those that
are there are not made again without `--again`, and the table is printed from all.  `--inc` and `--modelopt`: the
Pythons in whose environments neural-compressor's ONNX package and ModelOpt are installed.  `--made`: where models lie
that are too large for the zoo.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
from onnxruntime import quantization as peer
from onnxruntime.quantization.shape_inference import quant_pre_process

import graphopt
from benchmarks.labelled import Answers, Change, Task, change, first_only
from graphopt.errors import GraphoptError
from graphopt.report.quantized import quantized_layers
from graphopt.runtime.measure import measure
from graphopt.runtime.session import OptimizationLevel, Session

Feeds = list[dict[str, Any]]
MODELS = (
    "mnist_ort_java_cnn",
    "mnist_cntk",
    "mnist_burn_cnn",
    "mnist_vnn_256x2",
    "vww_mobilenetv1_025_96",
    "cifar10_vit_ibp",
    "bytes_magika_v33",
    "imagenet_mobilenetv1_025",
    "lm_stories260k_kv",
    "cifar10_resnet20",
    "ocr_lprnet",
    "det_yolox_nano",
    "cifar10_resnet56",
    "imagenet_squeezenet10_deepcomp",
    "text_minilm_l6_ts14",
)
TOOLS = {
    "graphopt": "graphopt, no flags",
    "ort": "onnxruntime.quantization, defaults",
    "expert": "the same, expert",
    "inc": "neural-compressor",
    "modelopt": "ModelOpt",
}
PEER_SECONDS = 300


def ours(model: Path, output: Path, feeds: Feeds) -> str:
    """graphopt without any flag; returns what it warned of, or how many layers run in 8 bits."""
    report = graphopt.optimize(model, output=output, precision="int8", calibration=feeds).report
    layers = quantized_layers(report.remarks)
    inside = sum(not each.why_float for each in layers)
    return "; ".join([f"{inside} of {len(layers)} layers in 8 bits", *report.warnings])


def theirs(model: Path, output: Path, feeds: Feeds, *, expert: bool) -> str:
    """onnxruntime.quantization, as it comes or as an expert would call it on x86 with VNNI."""

    class Reader(peer.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rows, None)

    options: dict[str, Any] = {}
    prepared = model
    if expert:
        prepared = preprocessed(model, output)
        options = {"per_channel": True, "activation_type": peer.QuantType.QUInt8}
        if not any(node.op_type == "Conv" for node in onnx.load(prepared).graph.node):
            options["op_types_to_quantize"] = [
                "MatMul",
                "Gemm",
            ]  # as its guide says of transformers
    try:
        peer.quantize_static(str(prepared), str(output), Reader(), **options)
    except (
        ValueError
    ) as error:  # its adjustment of weights to biases fails on weights of one channel
        if not expert:
            raise
        options["extra_options"] = {"QDQDisableWeightAdjustForInt32Bias": True}
        peer.quantize_static(str(prepared), str(output), Reader(), **options)
        return f"with QDQDisableWeightAdjustForInt32Bias, since {error}"
    return ""


def preprocessed(model: Path, output: Path) -> Path:
    """The model as peers want it: lifted to an opset with scales by channel, simplified, with shapes."""
    lifted, prepared = output.with_suffix(".lifted.onnx"), output.with_suffix(".prepared.onnx")
    onnx.save(lift(onnx.load(model)), lifted)
    quant_pre_process(str(lifted), str(prepared), skip_symbolic_shape=True)
    return prepared


def lift(model: onnx.ModelProto) -> onnx.ModelProto:
    """At opset 13 or later: below, scales by channel have no axis, and the peer writes models that nothing loads.

    And at an IR version in which initializers need not be inputs: pre-processing makes such.
    """
    model.ir_version = max(model.ir_version, 8)
    versions = {each.domain: each.version for each in model.opset_import}
    return model if versions[""] >= 13 else onnx.version_converter.convert_version(model, 17)


def elsewhere(tool: str, python: str, model: Path, output: Path, feeds: Feeds) -> str:
    """A peer in an environment of its own, on the pre-processed model; where that fails, on the model as it came.

    Raises:
        RuntimeError: it fails on both, with its last words.
        subprocess.TimeoutExpired: it takes longer than five minutes.
    """
    rows = output.with_suffix(".npz")
    arrays: dict[str, Any] = {
        f"{index}/{name}": value for index, feed in enumerate(feeds) for name, value in feed.items()
    }
    np.savez(rows, **arrays)
    script = Path(__file__).with_name("quantize_peers.py")
    lines = ["no output"]
    for source in (preprocessed(model, output), model):
        command = [python, str(script), tool, str(source), str(rows), str(output)]
        done = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=PEER_SECONDS
        )
        if done.returncode == 0 and output.exists():
            return "" if source != model else "not pre-processed, where it fails"
        lines = done.stderr.strip().splitlines() or lines
    raise RuntimeError(lines[-1])


def speed(reference: Path, candidate: Path, feed: dict[str, Any]) -> float:
    """How many times faster than the original; in both orders: of two sessions of one file, the later is 2 % slower."""
    ratios = []
    for paths in ((reference, candidate), (candidate, reference)):
        sessions = [Session(path, level=OptimizationLevel.ALL) for path in paths]
        ratios.append(measure(sessions, [feed, feed], seconds=1.5)[1].cpu_ratio)
    return float(np.sqrt(ratios[0] / ratios[1]))


def make(tool: str, model: Path, output: Path, feeds: Feeds, given: argparse.Namespace) -> str:
    """Writes the model of one tool."""
    if tool == "graphopt":
        return ours(model, output, feeds)
    if tool in ("ort", "expert"):
        return theirs(model, output, feeds, expert=tool == "expert")
    return elsewhere(tool, getattr(given, tool), model, output, feeds)


def made(task: Task, tool: str, given: argparse.Namespace) -> dict[str, Any]:
    """Writes the model of one tool and asks whether it runs; what there is to tell of it."""
    output = given.folder / f"{task.name}.{tool}.onnx"
    if given.rescore and output.exists():
        known: dict[str, Any] = json.loads(file_of(task.name, tool, given).read_text("utf-8"))
        return known
    feeds = task.record(given.samples)
    began = time.process_time()
    row: dict[str, Any] = {"model": task.name, "tool": tool, "remark": ""}
    try:
        row["remark"] = make(tool, task.float_model, output, feeds, given)
        row["seconds"] = time.process_time() - began
        row["speed"] = speed(task.float_model, output, feeds[0])
    except subprocess.TimeoutExpired:
        row["fails"] = f"not done after {PEER_SECONDS} s"
    except GraphoptError as error:
        row["fails"] = f"{type(error).__name__}: {error}"[:300]
    except Exception as error:  # noqa: BLE001  a peer may fail in any way; that is a result
        row["fails"] = f"{type(error).__name__}: {error}"[:300]
    return row


def rows(task: Task, given: argparse.Namespace) -> None:
    """Makes and scores what is missing of one model."""
    anew = given.again or given.rescore
    wanted = [t for t in given.tools if anew or not file_of(task.name, t, given).exists()]
    found = [made(task, tool, given) for tool in wanted]
    alive = [row for row in found if "fails" not in row]
    variants = task.variants(given.variants)
    asked = [given.folder / f"{task.name}.{row['tool']}.onnx" for row in alive]
    kept = given.folder / f"{task.name}.answers.{given.limit}.{len(variants)}.json"
    first = [] if kept.exists() else [task.float_model]
    answers = task.answers([*first, *asked], variants) if asked else []
    if first and asked:
        kept.write_text(json.dumps(answers.pop(0)), encoding="utf-8")
    plain: Answers = json.loads(kept.read_text(encoding="utf-8")) if asked else []
    whole = first_only(plain) if task.answer else plain
    for row, each in zip(alive, answers, strict=True):
        row["float"] = task.metric(whole, range(len(plain)))
        row.update(described(task, plain, each, varied=bool(variants)))
    for row in found:
        text = json.dumps(row, indent=1)
        file_of(task.name, row["tool"], given).write_text(text, encoding="utf-8")


def described(task: Task, plain: Answers, found: Answers, *, varied: bool) -> dict[str, Any]:
    """The change on the labelled samples, and on these and their variants."""
    if task.answer is None:
        return {"plain": dataclasses.asdict(change(task, plain, found))}
    alone = change(task, first_only(plain), first_only(found))
    row = {"plain": dataclasses.asdict(alone)}
    return row | ({"varied": dataclasses.asdict(change(task, plain, found))} if varied else {})


def file_of(model: str, tool: str, given: argparse.Namespace) -> Path:
    return Path(given.folder / f"{model}.{tool}.json")


def table(given: argparse.Namespace) -> list[str]:
    """A row for each model that has any result."""
    heads = ["model, metric in float", *TOOLS.values()]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for model in given.models:
        files = {tool: file_of(model, tool, given) for tool in TOOLS}
        known = {
            tool: json.loads(file.read_text(encoding="utf-8"))
            for tool, file in files.items()
            if file.exists()
        }
        if known:
            plain = next((row["float"] for row in known.values() if "float" in row), math.nan)
            cells = [cell(known[tool]) if tool in known else "" for tool in TOOLS]
            lines.append("| " + " | ".join([f"{model}, {plain:.2f}", *cells]) + " |")
    return lines


def cell(row: dict[str, Any]) -> str:
    """Drop on the samples; on these and their variants; of all, equal answers and fall of the label's probability."""
    if "fails" in row:
        return f"fails: {row['fails'][:60]}"
    found = [Change(**row[key]) for key in ("plain", "varied") if key in row]
    told = "; ".join(f"{each.drop:+.2f} ± {each.error:.2f}" for each in found)
    last = found[-1]
    same = "" if math.isnan(last.same) else f", {last.same:.1%}"
    same += "" if math.isnan(last.sure) else f", sure {last.sure:+.2f} ± {last.sure_error:.2f}"
    layers = row["remark"].partition(" layers")[0] if row["tool"] == "graphopt" else ""
    return f"{told}{same}, {row['speed']:.2f}x" + (f" ({layers} layers)" if layers else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("zoo", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--tools", nargs="+", default=["graphopt", "ort", "expert"], choices=TOOLS)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--variants", type=int, default=8)
    parser.add_argument("--inc", default="")
    parser.add_argument("--modelopt", default="")
    parser.add_argument("--made", type=Path)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--rescore", action="store_true", help="score the models that are there")
    parser.add_argument("--table", action="store_true", help="only print what there is")
    given = parser.parse_intermixed_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    if not given.table:
        for name in given.models:
            rows(Task(given.zoo.resolve(), name, given.limit, given.made), given)
    print("\n".join(table(given)))


if __name__ == "__main__":
    main()
