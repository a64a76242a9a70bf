"""What a user asks of outputs beyond the gate of the run: limits for single outputs, and a metric of their own."""

from __future__ import annotations

import dataclasses
import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from graphopt.errors import OptionError
from graphopt.numerics import Numerics
from graphopt.verify.budget import parse_budget
from graphopt.verify.compare import Budget, Profile

Function: TypeAlias = Callable[[Mapping[str, Any], Mapping[str, Any]], float]

IGNORE = Budget(agreement=None)
"""Measured and shown, and gates nothing."""

_METRIC = re.compile(r"\s*([\w.]+:[\w.]+)\s*(?:(>=|<=)\s*([-+.\deE]+))?\s*")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A function of the user's, and what it must give.

    Attributes:
        name: how it is shown.
        function: called for each set of inputs with the outputs of the reference and of the candidate, by name;
            returns a number, or whether it is content.
        least: the number must not be below this; None where anything will do.
        most: nor above this.
    """

    name: str
    function: Function
    least: float | None = None
    most: float | None = None

    def accepts(self, value: float) -> bool:
        """Whether a value will do; NaN never does, and neither does False without limits."""
        if math.isnan(value):
            return False
        if self.least is None and self.most is None:
            return value is not False
        return (self.least is None or value >= self.least) and (
            self.most is None or value <= self.most
        )

    @property
    def limit(self) -> str:
        """The limit in words."""
        parts = [f">= {self.least:g}"] if self.least is not None else []
        return " and ".join(parts + ([f"<= {self.most:g}"] if self.most is not None else []))


@dataclasses.dataclass(frozen=True)
class MetricReport:
    """What a metric said: the worst value over all feeds, and where."""

    name: str
    value: float
    limit: str
    passed: bool
    feed: str


@dataclasses.dataclass(frozen=True)
class Criteria:
    """Limits by output, and metrics; the gate of the run holds for outputs that are not named."""

    outputs: Mapping[str, Budget] = dataclasses.field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()

    def profile(self, name: str, usual: Profile) -> Profile:
        """The gate of one output."""
        budget = self.outputs.get(name)
        if budget is None:
            return usual
        tolerance = budget.max_over_rms or usual.tolerance
        return Profile("as asked for", Numerics.LOSSY, tolerance, budget)

    def check_names(self, known: Sequence[str]) -> None:
        """Refuses limits for outputs that there are not.

        Raises:
            OptionError: with the outputs that there are.
        """
        for name in self.outputs:
            if name not in known:
                raise OptionError(
                    f"no output '{name}' to hold to a limit; the outputs are {', '.join(known)}"
                )


def parse_gates(texts: Sequence[str] | Mapping[str, str]) -> dict[str, Budget]:
    """Limits by output: `logits=sqnr>=40,cosine>=0.999`, `boxes=max<=0.01`, `debug=ignore`.

    Raises:
        OptionError: a text is none.
    """
    pairs = (
        [(name, "=", limit) for name, limit in texts.items()]
        if isinstance(texts, Mapping)
        else [text.partition("=") for text in texts]
    )
    found = {}
    for name, sign, limit in pairs:
        if not sign or not name.strip() or not limit.strip():
            raise OptionError(
                f"--gate {name!r}: write OUTPUT=LIMITS, as in logits=sqnr>=40,cosine>=0.999, or OUTPUT=ignore"
            )
        is_open = limit.strip() == "ignore"
        found[name.strip()] = IGNORE if is_open else parse_budget(limit)
    return found


def load_metric(text: str) -> Metric:
    """The metric that `module:function`, `module:function>=0.98` or `module:function<=0.02` names.

    Raises:
        OptionError: the text is none, there is no such function, or it cannot be called.
    """
    match = _METRIC.fullmatch(text)
    if match is None:
        raise OptionError(
            f"--metric {text!r}: write module:function, with >= or <= and a number for a limit"
        )
    module, _, path = match[1].partition(":")
    try:
        held: Any = importlib.import_module(module)
        for part in path.split("."):
            held = getattr(held, part)
    except (ImportError, AttributeError) as error:
        raise OptionError(f"--metric {text!r} cannot be loaded: {error}") from error
    if not callable(held):
        raise OptionError(f"--metric {text!r}: {match[1]} is {type(held).__name__}, not a function")
    limit = None if match[3] is None else _number(text, match[3])
    return Metric(
        match[1],
        held,
        least=limit if match[2] == ">=" else None,
        most=limit if match[2] == "<=" else None,
    )


def _number(text: str, digits: str) -> float:
    try:
        return float(digits)
    except ValueError as error:
        raise OptionError(f"--metric {text!r}: {digits!r} is not a number") from error


def measured(
    metric: Metric, reference: Mapping[str, Any], candidate: Mapping[str, Any], feed: str
) -> MetricReport:
    """What a metric says of one feed.

    Raises:
        OptionError: the function fails or returns no number.
    """
    try:
        value = metric.function(reference, candidate)
        number = float(value)
    except Exception as error:  # the user's function may raise anything
        raise OptionError(
            f"the metric {metric.name} fails on feed '{feed}': {type(error).__name__}: {error}"
        ) from error
    passed = metric.accepts(value if isinstance(value, bool) else number)
    return MetricReport(metric.name, number, metric.limit, passed, feed)


def worst(reports: Sequence[MetricReport]) -> MetricReport:
    """Of several reports of one metric: the first that fails, else the one nearest to its limit."""
    failed = next((report for report in reports if not report.passed), None)
    if failed is not None:
        return failed
    sign = -1 if reports[0].limit.startswith("<=") else 1
    return min(reports, key=lambda report: sign * report.value)
