"""What the user asks of one run, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from graphopt.emit.profiles import Range
from graphopt.errors import OptionError
from graphopt.ir.model_file import ExternalData
from graphopt.pipeline import Pass, Step, flatten
from graphopt.report.patterns import Asked, patterns_asked
from graphopt.rewrite import Gate, Options
from graphopt.specialize import Specialization
from graphopt.targets import Precision, SparseStyle, Target, get_target
from graphopt.verify.criteria import Criteria

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

Source: TypeAlias = "str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model"
Feeds: TypeAlias = Sequence[Mapping[str, Any]]
Progress: TypeAlias = Callable[[str, float | None], None]

EXTRAS = ("triton", "ort")
"""What a bundle holds on request: a model repository of Triton, the model in the .ort format."""

PLANNED = (Precision.FP16, Precision.BF16, Precision.FP8)
"""Precisions that write and follow a plan."""

DEFAULT_FOLD_LIMIT = Options().fold_limit_bytes


class VerifyMode(enum.StrEnum):
    """When the numbers are compared with the original's."""

    FINAL = "final"
    EACH = "each"
    OFF = "off"


@dataclasses.dataclass(frozen=True)
class Request:
    """One run, as asked for.

    Attributes:
        source: the model.
        output: where to write; None keeps the result in memory.
        target: what to emit for.
        precision: what the arithmetic shall be.
        steps: the pipeline.
        gate: what the user left out.
        options: what passes may ask for.
        verify: when to verify.
        inputs: a path to inputs, feeds, or None for generated ones.
        strict: whether a failing pass or rewrite ends the run instead of being left out.
        external: where weights go.
        recipe: the recipe in words, for the report.
        repro: folder to write the smallest model to that shows the first rewrite that fails; None for none.
        stages: whether to count bytes and arithmetic after each pass, for a report.
        criteria: limits for single outputs, and metrics, that the user asks for.
        profiles: ranges of dynamic dimensions, for a bundle.
        extras: what a bundle shall hold besides: `EXTRAS`.
        sparse: the form of weights that are mostly zero; None for what the target reads.
        specialization: what to make of the model before anything else.
        kept: folder for the original's values, for later runs; None keeps none.
        cache: shared by all replays of the run; see `Context.cache`.
        progress: called by passes that take long.
    """

    source: Source
    output: Path | None
    target: Target
    precision: Precision
    steps: tuple[Step, ...]
    gate: Gate
    options: Options
    verify: VerifyMode
    inputs: Path | Feeds | None
    strict: bool
    external: ExternalData
    recipe: str | None = None
    repro: Path | None = None
    stages: bool = False
    criteria: Criteria = dataclasses.field(default_factory=Criteria)
    profiles: Mapping[str, Range] = dataclasses.field(default_factory=dict)
    extras: tuple[str, ...] = ()
    sparse: SparseStyle | None = None
    specialization: Specialization = dataclasses.field(default_factory=Specialization)
    kept: Path | None = None
    cache: dict[str, Any] = dataclasses.field(default_factory=dict)
    progress: Progress = lambda _stage, _part: None

    @property
    def sparse_style(self) -> SparseStyle:
        """The form of weights that are mostly zero.

        A dense model becomes a sparse file only where zeros were asked for: many tools refuse sparse initializers.
        """
        if self.sparse is not None:
            return self.sparse
        keeps = self.target.sparse is not SparseStyle.DENSE and not self.options.sparsity
        return SparseStyle.KEPT if keeps else self.target.sparse

    @property
    def patterns(self) -> tuple[Asked, ...]:
        """The N:M patterns that the run asks for, or one of its passes for itself."""
        own = (getattr(each, "sparsity", None) for each in flatten(self.steps))
        return patterns_asked((self.options.sparsity, *own))


def parse_choice(kind: str, text: str, enumeration: type[enum.Enum]) -> str:
    """The member of `enumeration` that `text` names.

    Raises:
        OptionError: none; the message lists them.
    """
    known = [member.value for member in enumeration]
    if text not in known:
        close = difflib.get_close_matches(text, known, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise OptionError(f"unknown {kind} {text!r}{hint}; choose one of {', '.join(known)}")
    return text


def parse_extra(text: str, output: str | os.PathLike[str] | None) -> str:
    """One of `EXTRAS`.

    Raises:
        OptionError: none of them, or the output is no bundle that could hold it.
    """
    if text not in EXTRAS:
        raise OptionError(_unknown("extra", text, EXTRAS, "a bundle"))
    if output is None or Path(output).suffix == ".onnx":
        raise OptionError(f"{text!r} goes into a bundle: give a folder as output, not {output}")
    return text


def parse_plan(
    option: str,
    file: str | os.PathLike[str] | None,
    precision: Precision,
) -> Path | None:
    """The path of a precision plan, where the run has something to plan.

    Raises:
        OptionError: the precision has none.
    """
    if file is None or precision in PLANNED:
        return None if file is None else Path(file)
    names = ", ".join(each.value for each in PLANNED)
    raise OptionError(
        f"{option} {os.fspath(file)}: a precision plan says which nodes are in half or 8 bits, and {precision.value} "
        f"has none; ask for --precision {names}"
    )


def parse_precision(text: str) -> Precision:
    """The precision called `text`.

    Raises:
        OptionError: unknown.
    """
    return Precision(parse_choice("precision", text, Precision))


def parse_external(text: str) -> ExternalData:
    """The place for weights called `text`.

    Raises:
        OptionError: unknown.
    """
    return ExternalData(parse_choice("place for weights", text, ExternalData))


def parse_sparse(text: str) -> SparseStyle | None:
    """The form of sparse weights called `text`; None for `auto`, which leaves it to the target.

    Raises:
        OptionError: unknown.
    """
    if text == "auto":
        return None
    return SparseStyle(parse_choice("form of sparse weights", text, SparseStyle))


def parse_gate(disabled: Sequence[str], steps: Sequence[Step]) -> Gate:
    """The gate that leaves out what the user disabled: `pass` or `pass/rule`.

    Raises:
        OptionError: no such pass or rule in the pipeline.
    """
    passes = {each.name: each for each in flatten(steps)}
    gate = Gate()
    for text in disabled:
        name, _, rule = text.partition("/")
        if name not in passes:
            raise OptionError(_unknown("pass", name, passes, "the pipeline"))
        if not rule:
            gate = gate.without_pass(name)
            continue
        rules = rule_names(passes[name])
        if rules and rule not in rules:
            raise OptionError(_unknown("rule", rule, rules, f"pass {name}"))
        gate = dataclasses.replace(gate, rules=gate.rules | {(name, rule)})
    return gate


def rule_names(each: Pass) -> tuple[str, ...]:
    """Names of the rules of a pass that is made of rules."""
    return tuple(rule.name for rule in getattr(each, "rules", ()))


def _unknown(kind: str, name: str, known: Mapping[str, object] | Sequence[str], where: str) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"no {kind} {name!r} in {where}{hint}; there are: {', '.join(known)}"


def resolve_target(target: str | Target) -> Target:
    """The target itself, or the one of that name.

    Raises:
        OptionError: no such target.
    """
    return target if isinstance(target, Target) else get_target(target)
