"""Side by side with the simplifiers people use: nodes, CPU time, peak memory, file size, validity, equality.

    python -m benchmarks.simplify [--peer-python PYTHON] [--tools graphopt,onnxsim,…] [--repeat N] MODEL.onnx …

`--tools …,onnxruntime` adds ONNX Runtime's optimiser of transformers, told by the model's name that it is a BERT, a
GPT-2 or a ViT.

Each tool runs in a fresh process and does what its users do: read the file, simplify, write the file.  CPU time is user
and system of the whole process, imports included, the least of N runs; `call` is that of the simplifying call alone
(for graphopt the mapped load is part of it).  graphopt runs with verification off, because no peer verifies; what
verification costs is a column of its own.  Peers live in an environment of their own (`--peer-python`).

Results are judged here: `onnx.checker`, then `graphopt verify` (ONNX Runtime, optimisations off, generated inputs).
The first table has a row for each tool, the second says for each model where graphopt stands.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.processes import least
from graphopt.ir.model_file import load_model
from graphopt.ir.scopes import all_graphs

OURS = "graphopt"
TOOLS = {
    OURS: (
        "import graphopt.driver; mark('imported')\n"
        "made = graphopt.optimize(sys.argv[1], verify='off'); mark('done'); made.save(sys.argv[2])"
    ),
    "onnxsim": (
        "import onnx, onnxsim; model = onnx.load(sys.argv[1]); mark('imported')\n"
        "model, ok = onnxsim.simplify(model); mark('done'); onnx.save(model, sys.argv[2])"
    ),
    "onnxslim": (
        "import onnx, onnxslim; model = onnx.load(sys.argv[1]); mark('imported')\n"
        "model = onnxslim.slim(model); mark('done'); onnx.save(model, sys.argv[2])"
    ),
    "onnxoptimizer": (
        "import onnx, onnxoptimizer; model = onnx.load(sys.argv[1]); mark('imported')\n"
        "model = onnxoptimizer.optimize(model); mark('done'); onnx.save(model, sys.argv[2])"
    ),
    "onnxscript": (
        "import onnx_ir, onnxscript.optimizer; model = onnx_ir.load(sys.argv[1]); mark('imported')\n"
        "onnxscript.optimizer.optimize(model); mark('done'); onnx_ir.save(model, sys.argv[2])"
    ),
}
FUSERS = {
    "onnxruntime": (
        "from onnxruntime.transformers import optimizer; mark('imported')\n"
        "kind = next((k for k in ('bert', 'gpt2', 'vit') if k in sys.argv[1]), 'bert')\n"
        "made = optimizer.optimize_model(sys.argv[1], model_type=kind, use_gpu=False); mark('done')\n"
        "made.save_model_to_file(sys.argv[2])"
    )
}
"""ONNX Runtime's optimiser of transformers, which wants to know what they are: run where it is named."""

VERIFIED = "import graphopt; graphopt.optimize(sys.argv[1], output=sys.argv[2])"
CHECK = "import sys, onnx.checker; onnx.checker.check_model(sys.argv[1])"


@dataclasses.dataclass(frozen=True)
class Row:
    """What one tool did to one model.

    Attributes:
        model: name of the model.
        tool: name of the tool.
        nodes: of the result, subgraphs and functions included; None if there is none.
        cpu: CPU seconds of the process.
        call: CPU seconds of the simplifying call; None if it failed.
        peak_mb: peak resident memory.
        size_mb: of the files written.
        verdict: "equal", or what is wrong.
        verify: CPU seconds that verification adds; None for peers.
    """

    model: str
    tool: str
    nodes: int | None
    cpu: float
    call: float | None
    peak_mb: float
    size_mb: float
    verdict: str
    verify: float | None = None

    @property
    def is_right(self) -> bool:
        """Whether the result is valid and computes the same."""
        return self.verdict == "equal"


def measure(tool: str, python: str, model: Path, *, repeat: int, folder: Path, dims: str) -> Row:
    """What a tool does to a model, and at which cost."""
    out = folder / f"{model.stem}.{tool}.onnx"
    code = {**TOOLS, **FUSERS}[tool]
    cost = least(python, code, [model, out], repeat=repeat)
    if cost.failure:
        verdict = f"failed: {cost.failure[:110]}"
        return Row(model.stem, tool, None, cost.cpu_seconds, None, cost.peak_mb, 0.0, verdict)
    files = list(folder.glob(f"{out.name}*"))
    row = Row(
        model=model.stem,
        tool=tool,
        nodes=nodes_of(out),
        cpu=cost.cpu_seconds,
        call=cost.marks["done"] - cost.marks["imported"],
        peak_mb=cost.peak_mb,
        size_mb=sum(file.stat().st_size for file in files) / 1e6,
        verdict=judge(model, out, dims),
        verify=_verifying(model, out, cost.cpu_seconds) if tool == OURS else None,
    )
    for file in files:
        file.unlink()
    return row


def _verifying(model: Path, out: Path, without: float) -> float:
    return least(sys.executable, VERIFIED, [model, out], repeat=1).cpu_seconds - without


def nodes_of(path: Path) -> int:
    """Nodes of a model, subgraphs and functions included."""
    return sum(len(scope.graph) for scope in all_graphs(load_model(path)))


def judge(model: Path, out: Path, dims: str = "") -> str:
    """`equal`, or what is wrong with the result."""
    checked = _run([sys.executable, "-c", CHECK, str(out)])
    if checked.returncode:
        return f"invalid: {_last(checked.stderr)[:110]}"
    command = [sys.executable, "-m", "graphopt", "verify", str(model), str(out), "--json"]
    compared = _run([*command, *(["--dims", dims] if dims else [])])
    if compared.returncode == 0:
        return "equal"
    try:
        found = json.loads(compared.stdout)
    except json.JSONDecodeError:
        return f"unjudged: exit status {compared.returncode}: {_last(compared.stderr)[:90]}"
    return f"different: {str(found.get('reason') or found.get('error'))[:110]}"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _last(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "?")


def table(rows: Sequence[Row], originals: dict[str, tuple[int, float]]) -> Iterator[str]:
    """A row for each tool and model."""
    yield "| model | tool | nodes | CPU s | call s | peak MB | file MB | result | verify s |"
    yield "|---|---|--:|--:|--:|--:|--:|---|--:|"
    for row in rows:
        if row.tool == OURS:
            nodes, size = originals[row.model]
            yield f"| **{row.model}** | original | {nodes} | | | | {size:.1f} | | |"
        yield (
            f"| | {row.tool} | {_or_none(row.nodes, 'd')} | {row.cpu:.2f} | {_or_none(row.call, '.2f')} "
            f"| {row.peak_mb:.0f} | {row.size_mb:.1f} | {row.verdict} | {_or_none(row.verify, '.2f')} |"
        )


def _or_none(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """For each model: graphopt against the best peer of those whose result is right."""
    yield "| model | nodes | best peer | CPU s | fastest peer | peak MB | its peak MB | behind in |"
    yield "|---|--:|--:|--:|--:|--:|--:|---|"
    for model in dict.fromkeys(row.model for row in rows):
        ours = next((r for r in rows if r.model == model and r.tool == OURS), None)
        peers = [r for r in rows if r.model == model and r.tool != OURS and r.is_right]
        if ours is not None and peers:
            yield _standing(ours, peers)


def _standing(ours: Row, peers: Sequence[Row]) -> str:
    best = min(peers, key=lambda row: (row.nodes or 0, row.cpu))
    fastest = min(peers, key=lambda row: row.cpu)
    behind = [
        name
        for name, worse in (
            ("correctness", not ours.is_right),
            ("nodes", (ours.nodes or 0) > (best.nodes or 0)),
            ("CPU", ours.cpu > fastest.cpu),
            ("memory", ours.peak_mb > fastest.peak_mb),
        )
        if worse
    ]
    return (
        f"| {ours.model} | {_or_none(ours.nodes, 'd')} | {best.nodes} {best.tool} | {ours.cpu:.2f} "
        f"| {fastest.cpu:.2f} {fastest.tool} | {ours.peak_mb:.0f} | {fastest.peak_mb:.0f} "
        f"| {', '.join(behind) or '-'} |"
    )


def _saved(path: Path | None) -> list[Row]:
    if path is None or not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()]


def main() -> None:
    """Prints the two tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--tools", default=",".join(TOOLS))
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--dims", default="", help="sizes of symbolic dims to judge on")
    parser.add_argument("--keep", type=Path, help="JSON lines of rows; those already in it stand")
    args = parser.parse_args()
    rows = _saved(args.keep)
    known = {(row.model, row.tool) for row in rows}
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models:
            for tool in args.tools.split(","):
                if (model.stem, tool) in known:
                    continue
                python = sys.executable if tool == OURS else args.peer_python
                rows.append(
                    measure(
                        tool,
                        python,
                        model,
                        repeat=args.repeat,
                        folder=Path(scratch),
                        dims=args.dims,
                    )
                )
                print(rows[-1], file=sys.stderr, flush=True)
                if args.keep is not None:
                    with args.keep.open("a") as file:
                        file.write(json.dumps(dataclasses.asdict(rows[-1])) + "\n")
    originals = {m.stem: (nodes_of(m), m.stat().st_size / 1e6) for m in args.models}
    order = {name: i for i, name in enumerate((*originals, *TOOLS, *FUSERS))}
    wanted = sorted(
        (row for row in rows if row.model in originals),
        key=lambda row: (order[row.model], order[row.tool]),
    )
    print("\n".join([*table(wanted, originals), "", *summary(wanted)]))


if __name__ == "__main__":
    main()
