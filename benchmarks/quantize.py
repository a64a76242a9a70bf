"""INT8 on labelled data: the drop of the task metric and the speed, graphopt beside onnxruntime.quantization.

    python -m benchmarks.quantize ../shared/zoo [MODEL …] [--samples 48] [--limit 300]

Calibrates on what the zoo's own scoring feeds first, scores with it, times interleaved on one thread.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
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


def metric(score: Scorer, zoo: Path, recipe: dict[str, Any], model: Path, limit: int) -> float:
    """The first number of the score."""
    score.ARGS = SimpleNamespace(threads=1, opt="all", limit=limit)
    found, _ = score.TASK[recipe["task"]](recipe, str(zoo), str(model))
    return float(next(iter(found.values())))


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
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        options = {"per_channel": True, "activation_type": peer.QuantType.QUInt8}
    else:
        prepared.write_bytes(model.read_bytes())
    peer.quantize_static(str(prepared), str(output), Reader(), **options)
    return ""


def speed(reference: Path, candidate: Path, feed: dict[str, Any]) -> float:
    """How many times faster than the original."""
    sessions = [Session(path, level=OptimizationLevel.ALL) for path in (reference, candidate)]
    return measure(sessions, [feed, feed], seconds=1.5)[1].cpu_ratio


def row(score: Scorer, zoo: Path, name: str, samples: int, limit: int) -> str:
    """One line of the table."""
    recipe = json.loads((zoo / "models" / f"{name}.json").read_text(encoding="utf-8"))
    model = zoo / recipe["file"]
    feeds = record(score, zoo, recipe, samples)
    plain = metric(score, zoo, recipe, model, limit)
    makers: list[Callable[[Path], str]] = [
        lambda out: ours(model, out, feeds),
        lambda out: theirs(model, out, feeds, expert=False),
        lambda out: theirs(model, out, feeds, expert=True),
    ]
    cells, notes = [f"{plain:.4f}"], ""
    for make in makers:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "model.onnx"
            try:
                notes = make(out) or notes
                drop = metric(score, zoo, recipe, out, limit) - plain
                cells.append(f"{drop:+.4f} {speed(model, out, feeds[0]):.2f}x")
            except GraphoptError as error:
                cells.append(f"{type(error).__name__}: {error}"[:60])
            except Exception as error:  # noqa: BLE001  a peer may fail in any way; that is a result
                cells.append(f"fails: {type(error).__name__}")
    return f"| {name} | " + " | ".join(cells) + f" | {notes[:70]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("zoo", type=Path)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--samples", type=int, default=48)
    parser.add_argument("--limit", type=int, default=300)
    given = parser.parse_intermixed_args()
    score = scoring(given.zoo.resolve())
    print("| model | float | graphopt | ORT quantization, defaults | ORT, expert U8S8 | remark |")
    print("|---|---|---|---|---|---|")
    for name in given.models:
        print(row(score, given.zoo.resolve(), name, given.samples, given.limit), flush=True)


if __name__ == "__main__":
    main()
