"""Accuracy, size, arithmetic and latency of a model against `--sparsity`.

    python -m benchmarks.prune MODEL.onnx --samples SAMPLES.npz --test TEST.npz [--labels y] [--save ROWS.json] [AMOUNT]

SAMPLES.npz holds unlabelled inputs by name, their leading axis the samples; TEST.npz inputs that are not among them and
the labels: classes, or where they are no whole numbers how alike rows 2 i and 2 i + 1 are, which Spearman's correlation
with the cosine of the means over `attention_mask` then judges.  One row an amount: accuracy of the written file in
ONNX Runtime, zeros among the weights, millions of multiply-adds of one sample, bytes of the file and of the file
deflated, CPU seconds of the run (verification off), latency of one sample (least CPU time of 50 runs, one thread).
`blind:AMOUNT` prunes without samples.  With `--peer PYTHON`, which has onnxsim, a second row shows what onnxsim makes
of the same amount (see `benchmarks/prune_peer.py`); `--only` runs one of the two.  Rows that ROWS.json has already are
not run again.  `python -m benchmarks.prune_curves` does all that for four networks of the zoo, and draws the rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

import graphopt
from graphopt.ir.model_file import load_model
from graphopt.report.facts import stored_tensors
from graphopt.report.inspect import inspect_model

Labels: TypeAlias = "npt.NDArray[Any]"

AMOUNTS = (
    "0.5",
    "0.8",
    "0.9",
    "0.95",
    "blind:0.8",
    "2:4",
    "channels:0.3",
    "channels:0.5",
    "channels:0.7",
)
BATCH = 64
SENTENCES = 16
RUNS = 50


@dataclasses.dataclass(frozen=True)
class Trial:
    """One model, and what its rows are made with."""

    model: Path
    samples: Path
    test: Path
    save: Path | None = None
    labels: str = "y"
    peer: Path | None = None
    only: str | None = None
    keep: Path | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument("--test", type=Path, required=True)
    parser.add_argument("--labels", default="y")
    parser.add_argument("--peer", type=Path)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--keep", type=Path, help="folder in which the pruned models stay")
    parser.add_argument("--only", choices=("graphopt", "onnxsim"))
    parser.add_argument("amounts", nargs="*", default=AMOUNTS)
    given = vars(parser.parse_intermixed_args(argv))
    amounts = given.pop("amounts")
    complete(Trial(**given), amounts)
    return 0


def complete(trial: Trial, amounts: Sequence[str]) -> None:
    """Runs, prints and saves the rows that are not saved yet."""
    inputs = dict(np.load(trial.test))
    labels = inputs.pop(trial.labels)
    header = ("sparsity", "accuracy", "zeros", "MMACs", "bytes", "deflated", "CPU s", "ms")
    sys.stdout.write("{:20}{:>10}{:>8}{:>9}{:>10}{:>10}{:>8}{:>8}\n".format(*header))
    rows = _saved(trial.save)
    known = {(row["tool"], row["amount"]) for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "m.onnx"
        for tool, amount in _wanted(amounts, peer=bool(trial.peer), only=trial.only):
            if (tool, amount) in known:
                continue
            spent = _pruned(trial, tool, amount, out)
            if spent is None:
                continue
            if trial.keep:
                name = f"{trial.model.stem}.{tool}.{amount.replace(':', '-') or 'none'}.onnx"
                shutil.copy(out, trial.keep / name)
            rows.append({"tool": tool, "amount": amount, **facts(out, inputs, labels, spent)})
            show(amount or "(none)" if tool == "graphopt" else f"  onnxsim {amount}", rows[-1])
            if trial.save:
                _write(trial, labels, rows)


def _pruned(trial: Trial, tool: str, amount: str, out: Path) -> float | None:
    """Writes what a tool makes; returns the CPU seconds, None where it fails."""
    if tool == "graphopt":
        return ours(trial.model, trial.samples, out, amount)
    assert trial.peer is not None
    return theirs(trial.peer, trial.model, trial.samples, out, amount)


def _write(trial: Trial, labels: Labels, rows: Sequence[Mapping[str, Any]]) -> None:
    assert trial.save is not None
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    about = json.dumps({"model": trial.model.stem, "measure": measure(labels)})
    about = about.removesuffix("}") + f', "tested": {len(labels)}'
    trial.save.write_text(f'{about}, "rows": [\n  {lines}\n]}}\n')


def measure(labels: Labels) -> str:
    """What `accuracy` is."""
    return "accuracy" if labels.dtype.kind in "iu" else "Spearman's correlation"


def _saved(path: Path | None) -> list[dict[str, Any]]:
    """The rows of earlier runs."""
    if path is None or not path.exists():
        return []
    return list(json.loads(path.read_text())["rows"])


def _wanted(amounts: Sequence[str], *, peer: bool, only: str | None) -> Iterator[tuple[str, str]]:
    """What is run: tool and amount, "" for the model as it is."""
    for amount in ("", *amounts):
        if only != "onnxsim" or not amount:
            yield "graphopt", amount
        if peer and only != "graphopt" and amount and not amount.startswith("blind:"):
            yield "onnxsim", amount


def show(name: str, row: Mapping[str, Any]) -> None:
    """Prints one row."""
    numbers = "{accuracy:10.2%}{zeros:8.1%}{macs:9.1f}{bytes:10}{deflated:10}{cpu:8.1f}{ms:8.3f}\n"
    sys.stdout.write(f"{name:20}" + numbers.format(**row))
    sys.stdout.flush()


def ours(model: Path, samples: Path, out: Path, amount: str) -> float:
    """Prunes; returns the CPU seconds."""
    started = time.process_time()
    graphopt.optimize(
        model,
        output=out,
        sparsity=amount.removeprefix("blind:") or None,
        calibration=None if amount.startswith("blind:") else samples,
        verify="off",
    )
    return time.process_time() - started


def theirs(python: Path, model: Path, samples: Path, out: Path, amount: str) -> float | None:
    """Prunes with onnxsim; returns the CPU seconds, None where it fails.

    It takes channels from what graphopt makes of the model without pruning: from what exporters write, simplified by
    itself or not, it takes none where there is a BatchNormalization, an `Expand` of constants or a Gelu in parts.
    """
    if amount.startswith("channels:"):
        clean = out.with_name("clean.onnx")
        graphopt.optimize(model, output=clean, verify="off")
        model = clean
    script = Path(__file__).with_name("prune_peer.py")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [python, script, model, samples, out, amount], check=False, capture_output=True, text=True
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        sys.stdout.write(f"  onnxsim {amount:10} failed: {last[0][:100]}\n")
        return None
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def facts(
    out: Path, inputs: Mapping[str, Any], labels: Labels, spent: float = 0.0
) -> dict[str, Any]:
    """Accuracy, share of zeros, arithmetic, bytes, bytes deflated, seconds and latency of a file."""
    data = out.read_bytes()
    model = load_model(out)
    weights = [t.numpy() for _, t in stored_tensors(model) if t.dtype.is_floating_point()]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.size for w in weights)
    session = _session(data)
    judge = _accuracy if labels.dtype.kind in "iu" else _correlation
    return {
        "accuracy": judge(session, inputs, labels),
        "zeros": zeros,
        "macs": _macs(out, inputs) / 1e6,
        "bytes": len(data),
        "deflated": len(zlib.compress(data, 6)),
        "cpu": spent,
        "ms": _latency(session, inputs),
    }


def _macs(out: Path, inputs: Mapping[str, Any]) -> int:
    """Multiply-adds of one sample."""
    dims: dict[str, int] = {}
    for value in load_model(out).graph.inputs:
        array = inputs.get(value.name or "")
        if array is None or value.shape is None:
            continue
        for dim, size in zip(value.shape, (1, *array.shape[1:]), strict=True):
            if not isinstance(dim, int) and dim.value is not None:
                dims[dim.value] = size
    return inspect_model(load_model(out), out, dims=dims).arithmetic.macs


def _correlation(session: ort.InferenceSession, inputs: Mapping[str, Any], labels: Labels) -> float:
    """Spearman's correlation of the labels with how alike the means over tokens of pairs of rows are."""
    found = []
    for start in range(0, 2 * len(labels), SENTENCES):
        feed = {name: array[start : start + SENTENCES] for name, array in inputs.items()}
        mask = feed["attention_mask"][..., None].astype(np.float64)
        means = (session.run(None, feed)[0] * mask).sum(1) / mask.sum(1)
        found.append(means / np.linalg.norm(means, axis=-1, keepdims=True))
    rows = np.concatenate(found)
    return float(np.corrcoef(_ranks((rows[::2] * rows[1::2]).sum(-1)), _ranks(labels))[0, 1])


def _ranks(numbers: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The place of each number among all; equal ones share the mean of theirs."""
    _, index, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[index], np.float64)


def _session(data: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _accuracy(session: ort.InferenceSession, inputs: Mapping[str, Any], labels: Labels) -> float:
    """Share of rows whose greatest element is the label."""
    right = 0
    for start in range(0, len(labels), BATCH):
        part = slice(start, start + BATCH)
        scores = session.run(None, {name: array[part] for name, array in inputs.items()})[0]
        right += int((scores.argmax(-1) == labels[part]).sum())
    return right / len(labels)


def _latency(session: ort.InferenceSession, inputs: Mapping[str, Any]) -> float:
    """Milliseconds of CPU for one sample."""
    feed = {name: array[:1] for name, array in inputs.items()}
    times = []
    for _ in range(RUNS):
        started = time.process_time()
        session.run(None, feed)
        times.append(time.process_time() - started)
    return 1e3 * min(times)


if __name__ == "__main__":
    sys.exit(main())
