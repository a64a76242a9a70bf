"""The report of one run, as facts and as JSON."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from graphopt.distill.history import History
from graphopt.emit.sparse import SparseFacts
from graphopt.pipeline import PassRun
from graphopt.report.facts import ModelFacts
from graphopt.report.layers import Layer
from graphopt.report.patterns import PatternLayer
from graphopt.report.plain import graphopt_version, plain
from graphopt.report.quantized import quantized_layers
from graphopt.report.stages import Stage
from graphopt.rewrite.context import Remark, Rewrite
from graphopt.verify.compare import OutputReport
from graphopt.verify.criteria import MetricReport


@dataclasses.dataclass(frozen=True)
class VerificationFacts:
    """What the comparison of the result with the original said.

    Attributes:
        mode: `final`, `each` or `off`.
        passed: None where nothing was compared: mode `off`, or a model that the reference runtime cannot run.
        profile: name of the gate; "" where nothing was compared.
        outputs: one entry an output.
        feeds: how many sets of inputs were run.
        reason: why nothing was compared, or what failed; else "".
        metrics: what metrics of the user's said.
        judged: whether differences were held against anything; where not, `passed` only says that outputs came out
            finite and of the right shapes.
    """

    mode: str
    passed: bool | None = None
    profile: str = ""
    outputs: tuple[OutputReport, ...] = ()
    feeds: int = 0
    reason: str = ""
    metrics: tuple[MetricReport, ...] = ()
    judged: bool = True

    @property
    def verdict(self) -> str:
        """In a word: what was lossy on purpose and has no budget is not called verified, however near it is."""
        if self.passed and not self.is_judged:
            return "not judged"
        return {True: "verified", False: "differs", None: "unverified"}[self.passed]

    @property
    def is_judged(self) -> bool:
        """Whether `passed` says that the result is equal: it is judged, or the same to the bit."""
        return self.judged or (bool(self.outputs) and all(each.equal for each in self.outputs))

    @property
    def worst_db(self) -> float | None:
        """The least SQNR of an output that differs."""
        found = [o.sqnr_db for o in self.outputs if o.sqnr_db is not None and not o.equal]
        return min(found, default=None)


@dataclasses.dataclass(frozen=True)
class RolledBack:
    """Something that a pass did, or would have done, and that is not in the result.

    Attributes:
        pass_name: the pass.
        rule: the rule, or "" for the whole pass.
        site: where, or "" for everywhere.
        reason: what went wrong with it.
    """

    pass_name: str
    rule: str
    site: str
    reason: str


@dataclasses.dataclass(frozen=True)
class RunReport:
    """What a run did and how it was checked.

    Attributes:
        input: the model as it was read.
        output: the model as it was written.
        target: what it was made for.
        precision: what was asked of weights and activations.
        passes: each execution of a pass, in order; the last replay's where something was rolled back.
        verification: how the result compares with the original.
        remarks: what the passes had to say.
        rewrites: what was changed, in order.
        rolled_back: what was left out because it failed.
        stages: the model as it was read and after each pass that changed it; empty where nobody asked.
        layers: in which numbers each product of the result is computed; empty where nobody asked.
        recipe: what was run, in words; None for the pipeline of the target.
        seed: of everything random.
        seconds: CPU time of the whole run; None where it was not taken.
        warnings: what the user should act on.
        specialized: what the model was made of first, one phrase each, and how that compares with the original.
        distilled: what training towards the original did; None where there was none.
        pattern_layers: whether sparse tensor cores can read each weight; empty where no N:M pattern was asked for.
        sparse: sizes of the weights dense, as stored and compressed; None where none is mostly zero.
    """

    input: ModelFacts
    output: ModelFacts
    target: str
    precision: str
    passes: tuple[PassRun, ...]
    verification: VerificationFacts
    remarks: tuple[Remark, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    rolled_back: tuple[RolledBack, ...] = ()
    stages: tuple[Stage, ...] = ()
    layers: tuple[Layer, ...] = ()
    recipe: str | None = None
    seed: int = 0
    seconds: float | None = None
    warnings: tuple[str, ...] = ()
    sparse: SparseFacts | None = None
    pattern_layers: tuple[PatternLayer, ...] = ()
    distilled: History | None = None
    specialized: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The report as `--json` prints it: strictly JSON, keys as in the documentation of the command line."""
        before, after = self.input, self.output
        facts = plain({f.name: getattr(self, f.name) for f in dataclasses.fields(self)})
        return {
            "graphopt": graphopt_version(),
            **facts,
            "nodes": {"before": before.nodes, "after": after.nodes},
            "parameter_bytes": {"before": before.parameter_bytes, "after": after.parameter_bytes},
            "verification": {"verdict": self.verification.verdict, **plain(self.verification)},
            "remarks": [{**plain(each), "facts": dict(each.facts)} for each in self.remarks],
            "quantized_layers": plain(quantized_layers(self.remarks)),
            "rewrites": [
                {"pass": name, "rule": rule, "count": count}
                for (name, rule), count in self.rewrite_counts().items()
            ],
        }

    def rewrite_counts(self) -> dict[tuple[str, str], int]:
        """How often each (pass, rule) fired, in order of first use."""
        return dict(Counter((rewrite.pass_name, rewrite.rule) for rewrite in self.rewrites))

    def pass_totals(self) -> tuple[PassTotal, ...]:
        """The executions of each pass added up, in order of first execution."""
        totals: dict[str, PassTotal] = {}
        for run in self.passes:
            so_far = totals.get(run.name, PassTotal(run.name))
            totals[run.name] = PassTotal(
                run.name,
                so_far.runs + 1,
                so_far.changed + run.changed,
                so_far.rewrites + run.rewrites,
                so_far.seconds + run.seconds,
            )
        return tuple(totals.values())


@dataclasses.dataclass(frozen=True)
class PassTotal:
    """All executions of one pass, added up; `changed` counts those that changed the model."""

    name: str
    runs: int = 0
    changed: int = 0
    rewrites: int = 0
    seconds: float = 0.0
