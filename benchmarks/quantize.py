"""INT8 on labelled data: the drop of the task metric and the speed, graphopt beside onnxruntime.quantization.

    python -m benchmarks.quantize ../shared/zoo [MODEL …] [--samples 48] [--limit 300] [--peers PYTHON [--torch FOLDER]]

Calibrates on what the zoo's own scoring feeds first, scores with it, times interleaved on one thread.  With `--peers`,
also neural-compressor's ONNX package and ModelOpt, as installed for that Python (FOLDER: where torch is, if elsewhere).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.version_converter
from onnxruntime import quantization as peer
from onnxruntime.quantization.shape_inference import quant_pre_process

import graphopt
from graphopt.errors import GraphoptError
from graphopt.runtime.measure import measure
from graphopt.runtime.session import OptimizationLevel, Session

Feeds = list[dict[str, Any]]
Scorer: TypeAlias = Any  # the zoo's score.py, a module of no package
MODELS = (
    "imagenet_squeezenet10_deepcomp",
    "imagenet_mobilenetv1_025",
    "cifar10_resnet20",
    "cifar10_resnet56",
    "cifar10_vit_ibp",
    "vww_mobilenetv1_025_96",
    "ocr_lprnet",
    "bytes_magika_v33",
    "mnist_burn_cnn",
    "mnist_vnn_256x2",
)


class EnoughError(Exception):
    """As many samples as were asked for."""


def scoring(zoo: Path) -> Scorer:
    """The zoo's own `score.py`."""
    spec = importlib.util.spec_from_file_location("score", zoo / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def record(score: Scorer, zoo: Path, recipe: dict[str, Any], count: int) -> Feeds:
    """What scoring feeds first."""
    feeds: Feeds = []
    original = score.T

    class Recorder(original):  # type: ignore[misc, valid-type]
        def __call__(self, *given: Any, **named: Any) -> Any:  # noqa: ANN401
            values = dict(zip(self.i, given, strict=False)) if given else named
            feeds.append({name: np.array(value) for name, value in values.items()})
            if len(feeds) >= count:
                raise EnoughError
            return self.s.run(None, values)

    score.T = Recorder
    score.ARGS = SimpleNamespace(threads=1, opt="all", limit=0)
    try:
        score.TASK[recipe["task"]](recipe, str(zoo), str(zoo / recipe["file"]))
    except EnoughError:
        pass
    finally:
        score.T = original
    return feeds


def metric(
    score: Scorer, zoo: Path, recipe: dict[str, Any], model: Path, limit: int
) -> tuple[float, list[int]]:
    """The first number of the score, and the class that each run names: where its first output is greatest."""
    classes: list[int] = []
    original = score.T

    class Noted(original):  # type: ignore[misc, valid-type]
        def __call__(self, *given: Any, **named: Any) -> Any:  # noqa: ANN401
            found = super().__call__(*given, **named)
            classes.append(int(np.argmax(found[0])))
            return found

    score.T = Noted
    score.ARGS = SimpleNamespace(threads=1, opt="all", limit=limit)
    try:
        found, _ = score.TASK[recipe["task"]](recipe, str(zoo), str(model))
    finally:
        score.T = original
    return float(next(iter(found.values()))), classes


def ours(model: Path, output: Path, feeds: Feeds) -> str:
    """graphopt without any flag; returns what it warned of."""
    result = graphopt.optimize(model, output=output, precision="int8", calibration=feeds)
    return "; ".join(result.report.warnings)


def theirs(model: Path, output: Path, feeds: Feeds, *, expert: bool) -> str:
    """onnxruntime.quantization, as it comes or as an expert would call it on x86."""

    class Reader(peer.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(feeds)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.rows, None)

    options: dict[str, Any] = {}
    prepared = output.with_suffix(".prepared.onnx")
    if expert:
        lifted = output.with_suffix(".lifted.onnx")
        onnx.save(lift(onnx.load(model)), lifted)
        quant_pre_process(str(lifted), str(prepared), skip_symbolic_shape=True)
        options = {"per_channel": True, "activation_type": peer.QuantType.QUInt8}
    else:
        prepared.write_bytes(model.read_bytes())
    peer.quantize_static(str(prepared), str(output), Reader(), **options)
    return ""


def lift(model: onnx.ModelProto) -> onnx.ModelProto:
    """At opset 13 or later: below, scales by channel have no axis, and the peer writes models that nothing loads."""
    versions = {each.domain: each.version for each in model.opset_import}
    return model if versions[""] >= 13 else onnx.version_converter.convert_version(model, 17)


def elsewhere(tool: str, model: Path, output: Path, feeds: Feeds, given: argparse.Namespace) -> str:
    """A peer in an environment of its own."""
    rows = output.with_suffix(".npz")
    stacked: dict[str, Any] = {n: np.stack([feed[n] for feed in feeds]) for n in feeds[0]}
    np.savez(rows, **stacked)
    script = Path(__file__).with_name("quantize_peers.py")
    command = [given.peers, str(script), tool, str(model), str(rows), str(output)]
    folders = [given.torch] if given.torch else []
    done = subprocess.run([*command, *folders], check=False, capture_output=True, text=True)
    if done.returncode or not output.exists():
        lines = done.stderr.strip().splitlines() or ["no output"]
        raise RuntimeError(lines[-1])
    return ""


def speed(reference: Path, candidate: Path, feed: dict[str, Any]) -> float:
    """How many times faster than the original; in both orders: of two sessions of one file, the later is 2 % slower."""
    ratios = []
    for paths in ((reference, candidate), (candidate, reference)):
        sessions = [Session(path, level=OptimizationLevel.ALL) for path in paths]
        ratios.append(measure(sessions, [feed, feed], seconds=1.5)[1].cpu_ratio)
    return float(np.sqrt(ratios[0] / ratios[1]))


def row(score: Scorer, zoo: Path, name: str, given: argparse.Namespace) -> str:
    """One line of the table."""
    recipe = json.loads((zoo / "models" / f"{name}.json").read_text(encoding="utf-8"))
    model = zoo / recipe["file"]
    feeds = record(score, zoo, recipe, given.samples)
    plain, classes = metric(score, zoo, recipe, model, given.limit)
    makers: list[Callable[[Path], str]] = [
        lambda out: ours(model, out, feeds),
        lambda out: theirs(model, out, feeds, expert=False),
        lambda out: theirs(model, out, feeds, expert=True),
    ]
    if given.peers:
        makers.append(lambda out: elsewhere("inc", model, out, feeds, given))
        makers.append(lambda out: elsewhere("modelopt", model, out, feeds, given))
    cells, notes = [f"{plain:.4f}"], ""
    for make in makers:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model.onnx"
            try:
                notes = make(out) or notes
                reached, others = metric(score, zoo, recipe, out, given.limit)
                same = float(np.mean(np.equal(classes, others)))
                told = (
                    f"{reached - plain:+.4f} (same {same:.2%}) {speed(model, out, feeds[0]):.2f}x"
                )
                cells.append(told)
            except GraphoptError as error:
                cells.append(f"{type(error).__name__}: {error}"[:60])
            except Exception as error:  # noqa: BLE001  a peer may fail in any way; that is a result
                cells.append(f"fails: {type(error).__name__}")
                print(f"<!-- {name}: {str(error)[:300]!r} -->", flush=True)
    return f"| {name} | " + " | ".join(cells) + f" | {notes[:70]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("zoo", type=Path)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--peers", default="")
    parser.add_argument("--torch", default="")
    given = parser.parse_intermixed_args()
    score = scoring(given.zoo.resolve())
    heads = ["model", "float", "graphopt", "ORT quantization, defaults", "ORT, expert U8S8"]
    heads += ["neural-compressor", "ModelOpt"] if given.peers else []
    print("| " + " | ".join([*heads, "remark"]) + " |\n|" + "---|" * (len(heads) + 1))
    for name in given.models:
        print(row(score, given.zoo.resolve(), name, given), flush=True)


if __name__ == "__main__":
    main()
