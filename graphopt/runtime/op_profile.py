"""Where the time of a run goes, by ONNX Runtime's own profile."""

from __future__ import annotations

import bisect
import dataclasses
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from graphopt.runtime.session import OptimizationLevel, Session, SessionOptions

_KERNEL = "_kernel_time"
Key: TypeAlias = tuple[str, str, str]
"""Node, operator, provider."""


@dataclasses.dataclass(frozen=True)
class Spent:
    """Time in one node, or in all nodes of one operator, in one run.

    Attributes:
        name: of the node, as the runtime calls it; "" for an operator.
        operator: which.
        provider: who runs it.
        ms: time in one run, the median over the runs that were profiled.
        share: of all time in kernels.
        count: how often a kernel ran in one run.
    """

    name: str
    operator: str
    provider: str
    ms: float
    share: float
    count: float


@dataclasses.dataclass(frozen=True)
class OpProfile:
    """Where the time goes: operators and nodes, the dearest first; the graph is the runtime's, after its rewrites.

    Attributes:
        kernels_ms: time in kernels in one run.
        operators: each operator on each provider.
        nodes: each node; those within a subgraph add up over its turns.
    """

    kernels_ms: float
    operators: tuple[Spent, ...]
    nodes: tuple[Spent, ...]


def profile_ops(
    model: Path | bytes,
    feed: Mapping[str, Any],
    *,
    level: OptimizationLevel = OptimizationLevel.ALL,
    options: SessionOptions | None = None,
    runs: int = 10,
) -> OpProfile:
    """Runs the model `runs` times under the profiler, after one run that is not counted.

    Raises:
        ModelError: the runtime refuses the model.
        DataError: the feed does not fit.
    """
    options = options or SessionOptions()
    with tempfile.TemporaryDirectory(prefix="graphopt-profile-") as scratch:
        held = dataclasses.replace(options, profile=Path(scratch) / "profile")
        session = Session(model, level=level, options=held)
        for _ in range(runs + 1):
            session.run(feed)
        events = json.loads(session.end_profiling().read_text(encoding="utf-8"))
    return _summed(events)


def _summed(events: Sequence[Mapping[str, Any]]) -> OpProfile:
    """Adds up each run but the first by node and by operator, and takes the median over the runs."""
    ends = sorted(e["ts"] + e["dur"] for e in events if e.get("name") == "model_run")
    nodes: dict[Key, list[list[int]]] = defaultdict(lambda: [[] for _ in ends])
    operators: dict[Key, list[list[int]]] = defaultdict(lambda: [[] for _ in ends])
    for event in events:
        name = str(event.get("name", ""))
        run = bisect.bisect_left(ends, event["ts"] + event["dur"])
        if event.get("cat") != "Node" or not name.endswith(_KERNEL) or run >= len(ends):
            continue
        about = event.get("args", {})
        op, provider = str(about.get("op_name", "")), str(about.get("provider", ""))
        nodes[name.removesuffix(_KERNEL), op, provider][run].append(int(event["dur"]))
        operators["", op, provider][run].append(int(event["dur"]))
    per_run = [sum(sum(runs[i]) for runs in nodes.values()) for i in range(1, len(ends))]
    total = statistics.median(per_run) / 1e3 if per_run else 0.0
    return OpProfile(total, _ranked(operators), _ranked(nodes))


def _ranked(found: Mapping[Key, Sequence[Sequence[int]]]) -> tuple[Spent, ...]:
    timed = {
        key: (
            statistics.median(sum(each) for each in runs[1:]) / 1e3,
            statistics.fmean(len(each) for each in runs[1:]),
        )
        for key, runs in found.items()
        if len(runs) > 1
    }
    total = sum(ms for ms, _ in timed.values())
    spent = [
        Spent(*key, ms, ms / total if total else 0.0, count) for key, (ms, count) in timed.items()
    ]
    return tuple(sorted(spent, key=lambda each: (-each.ms, each.name, each.operator)))
