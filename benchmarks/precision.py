"""Half precision side by side: which tool gives a valid model that is right in true float16.

    python -m benchmarks.precision [--peer-python PYTHON] [--precision fp16|bf16] [--target NAME] [--tools NAME…] FOLDER

FOLDER holds one folder a hazard model: model.onnx and test_data_set_0, as ONNX's backend tests do.  graphopt runs from
the command line, every peer in a process of its own, with its defaults; ModelOpt's AutoCast also with the inputs of the
case as calibration data.  A result is good if it passes the full checker (order of nodes aside), keeps the dtypes of
inputs and outputs, and lies within 1 % of the RMS of each output (6 % in bfloat16), with the same non-finite elements,
when every half is rounded as a half (`graphopt.runtime.emulate`).  "CPU says fine" counts wrong results that ONNX
Runtime on the CPU, which computes them in float32, lets pass.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from graphopt.errors import GraphoptError
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.ir.scopes import all_graphs, sort
from graphopt.ir.shapes import Shapes
from graphopt.runtime.emulate import emulate
from graphopt.runtime.session import Session

Arrays = Mapping[str, Any]
OURS = "graphopt"
DATA = "test_data_set_0"
TOLERANCE = {"fp16": 0.01, "bf16": 0.06}
_FEEDS = (
    "files = sorted(glob.glob(data + '/input_*.pb')); model = onnx.load(path)\n"
    "    feeds = {i.name: numpy_helper.to_array(onnx.load_tensor(f)) for i, f in zip(model.graph.input, files)}\n"
)
PEERS = {
    "onnxconverter-common": (
        "from onnxconverter_common import float16",
        "made = float16.convert_float_to_float16(onnx.load(path), keep_io_types=True)",
    ),
    "ort-transformers": (
        "from onnxruntime.transformers import float16",
        "made = float16.convert_float_to_float16(onnx.load(path), keep_io_types=True)",
    ),
    "auto-mixed-precision": (
        "from onnxconverter_common.auto_mixed_precision import auto_convert_mixed_precision as convert",
        f"{_FEEDS}    made = convert(model, feeds, rtol=.02, atol=.02, keep_io_types=True)",
    ),
    "modelopt-autocast": (
        "from modelopt.onnx.autocast import convert_to_mixed_precision as convert",
        "made = convert(path, kind, keep_io_types=True)",
    ),
    "modelopt-autocast-data": (
        "from modelopt.onnx.autocast import convert_to_mixed_precision as convert",
        f"{_FEEDS}    numpy.savez(out + '.npz', **feeds)\n"
        "    made = convert(path, kind, keep_io_types=True, calibration_data=out + '.npz')",
    ),
    "modelopt-f16": (
        "from modelopt.onnx.autocast import convert_to_f16",
        "made = convert_to_f16(onnx.load(path), kind, keep_io_types=True)",
    ),
    "neural-compressor": (
        "import os; os.environ['FORCE_FP16'] = os.environ['FORCE_BF16'] = '1'  # it would ask for a GPU\n"
        "from neural_compressor import mix_precision, config",
        "asked = config.MixedPrecisionConfig(device='gpu', backend='onnxrt_cuda_ep', precisions=kind)\n"
        "    made = mix_precision.fit(path, asked).model",
    ),
}
"""How each peer is imported, and what turns `path` into `made`."""

_HARNESS = """import glob, sys, numpy, onnx
from onnx import numpy_helper
{imported}
def convert_one(path, out, data, kind):
    {converted}
    onnx.save(made, out)
for line in sys.stdin:
    path, out, data, kind = line.rstrip().split(chr(9))
    try:
        convert_one(path, out, data, kind)
        fault = ''
    except BaseException as error:
        fault = repr(error)[:300].replace(chr(10), ' ')
    print('RESULT' + chr(9) + out + chr(9) + fault, flush=True)
"""
KNOW_BF16 = tuple(name for name in PEERS if name.startswith(("modelopt", "neural")))


WORDS = (
    "good",
    "crash",
    "invalid",
    "io",
    "wrong",
    "CPU says fine",
    "unsorted",
    "good with halves",
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How one result fares.

    Attributes:
        word: good, crash, invalid, io or wrong.
        detail: the error or the reason.
        cpu_fine: whether ONNX Runtime on the CPU shows an error within the tolerance all the same.
        unsorted: whether some node comes before what it reads, which `onnx.checker` refuses.
        halves: nodes that compute in half, casts aside.
    """

    word: str
    detail: str = ""
    cpu_fine: bool = False
    unsorted: bool = False
    halves: int = 0


def main() -> int:
    """Prints a row a model and tool, and the totals."""
    options = _arguments()
    totals: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cases = {
            case: Path(scratch) / f"{case.name}.onnx"
            for case in sorted(path for path in options.folder.iterdir() if path.is_dir())
        }
        for name in _tools(options):
            faults = (
                {case: _ours(case, out, options) for case, out in cases.items()}
                if name == OURS
                else _peer(name, cases, options)
            )
            totals[name] = _judged_all(name, cases, faults, TOLERANCE[options.precision])
    print("\n" + " | ".join(["tool", *WORDS]))
    for name, counts in totals.items():
        print(" | ".join([name, *(str(counts[word]) for word in WORDS)]))
    ours = totals.get(OURS, Counter())
    return 0 if ours["good"] == sum(ours[word] for word in WORDS[:5]) else 1


def _tools(options: argparse.Namespace) -> list[str]:
    known = PEERS if options.precision == "fp16" else KNOW_BF16
    return options.tools or [OURS, *(known if options.peer_python else ())]


def _judged_all(
    name: str, cases: Mapping[Path, Path], faults: Mapping[Path, str], tolerance: float
) -> Counter[str]:
    counts: Counter[str] = Counter()
    for case, out in cases.items():
        fault = faults[case]
        found = Verdict("crash", fault) if fault else judge(case, out, tolerance)
        counts[found.word] += 1
        counts["CPU says fine"] += found.cpu_fine
        counts["unsorted"] += found.unsorted
        counts["good with halves"] += found.word == "good" and found.halves > 0
        told = f"{found.word:8} {found.halves:3} halves {found.detail[:90]}"
        print(f"{case.name:28} {name:22} {told}", flush=True)
        out.unlink(missing_ok=True)
    return counts


def judge(case: Path, out: Path, tolerance: float) -> Verdict:
    """How the model in `out` fares against the reference outputs of the case."""
    try:
        model = load_model(out)
    except GraphoptError as error:
        return Verdict("invalid", str(error).replace("\n", " "))
    unsorted = not _is_sorted(onnx.load(out).graph)  # as the file has it: loading sorts
    found = _judged(case, model, tolerance)
    return dataclasses.replace(found, unsorted=unsorted, halves=_halves(model))


def _is_sorted(graph: onnx.GraphProto) -> bool:
    """Whether every node of the main graph comes after those whose outputs it reads."""
    late = {name for node in graph.node for name in node.output}
    for node in graph.node:
        if late.intersection(filter(None, node.input)):
            return False
        late.difference_update(node.output)
    return True


def _halves(model: ir.Model) -> int:
    kinds = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    Shapes(model)
    return sum(
        any(value.dtype in kinds for value in node.outputs)
        for scope in all_graphs(model)
        for node in scope.graph
        if node.op_type != "Cast"
    )


def _judged(case: Path, model: ir.Model, tolerance: float) -> Verdict:
    original = onnx.load(case / "model.onnx")
    try:
        for scope in all_graphs(model):
            sort(scope.graph)
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
    except (
        GraphoptError,
        onnx.checker.ValidationError,
        onnx.shape_inference.InferenceError,
    ) as error:
        return Verdict("invalid", str(error).replace("\n", " "))
    if _contract(proto) != _contract(original):
        return Verdict("io", "dtype of an input or output changed")
    feeds = _arrays(case, "input", original.graph.input)
    expected = _arrays(case, "output", original.graph.output)
    true = _error(model_to_bytes(emulate(model)), feeds, expected)
    if true <= tolerance:
        return Verdict("good", f"{true:.2g}")
    plain = _error(model_to_bytes(model), feeds, expected)
    return Verdict("wrong", f"{true:.2g}, on the CPU {plain:.2g}", plain <= tolerance)


def _error(model: bytes, feeds: Arrays, expected: Arrays) -> float:
    """Greatest difference over the RMS; inf where non-finite elements differ or the model does not run."""
    try:
        results = Session(model).run(feeds)
    except GraphoptError:
        return float("inf")
    worst = 0.0
    for name, reference in expected.items():
        wide, got = np.asarray(reference, np.float64), np.asarray(results[name], np.float64)
        finite = np.isfinite(wide)
        if wide.shape != got.shape or not np.array_equal(finite, np.isfinite(got)):
            return float("inf")
        scale = float(np.sqrt(np.mean(wide[finite] ** 2)))
        difference = float(np.abs(wide - got)[finite].max(initial=0.0))
        worst = max(worst, difference / scale if scale else difference)
    return worst


def _contract(proto: onnx.ModelProto) -> list[tuple[str, int]]:
    return [
        (v.name, v.type.tensor_type.elem_type) for v in (*proto.graph.input, *proto.graph.output)
    ]


def _arrays(case: Path, kind: str, values: Any) -> Arrays:  # noqa: ANN401
    folder = case / DATA
    return {
        value.name: numpy_helper.to_array(onnx.load_tensor(str(folder / f"{kind}_{index}.pb")))
        for index, value in enumerate(values)
    }


def _ours(case: Path, out: Path, options: argparse.Namespace) -> str:
    model = str(case / "model.onnx")
    command = [sys.executable, "-m", "graphopt", "optimize", model, "-o", str(out), "--quiet"]
    command += ["--target", options.target, "--precision", options.precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"status {done.returncode}")


def _peer(name: str, cases: Mapping[Path, Path], options: argparse.Namespace) -> dict[Path, str]:
    """Converts all cases with a peer, in one process of its own; why it did not, by case."""
    imported, converted = PEERS[name]
    script = _HARNESS.format(imported=imported, converted=converted)
    asked = [
        "\t".join([str(case / "model.onnx"), str(out), str(case / DATA), options.precision])
        for case, out in ((case.absolute(), out) for case, out in cases.items())
    ]
    done = subprocess.run(
        [Path(options.peer_python).absolute(), "-c", script],
        cwd=next(iter(cases.values())).parent,  # some leave files where they run
        input="\n".join(asked) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    told = [line.split("\t") for line in done.stdout.splitlines() if line.startswith("RESULT\t")]
    found = {Path(out): fault for _, out, fault in told}
    return {case: found.get(out, f"status {done.returncode}") for case, out in cases.items()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--peer-python")
    parser.add_argument("--precision", choices=TOLERANCE, default="fp16")
    parser.add_argument("--target", default="cuda")
    parser.add_argument("--tools", nargs="*", help="only these")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
