"""What a run carries along: target, shapes, names, remarks, and the gate that every rewrite asks first."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Executor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import onnx_ir as ir

from graphopt.ir.annotations import annotation_names
from graphopt.ir.build import Names
from graphopt.ir.scopes import Census
from graphopt.ir.shapes import Shapes
from graphopt.numerics import Numerics
from graphopt.targets import Target

if TYPE_CHECKING:
    from graphopt.rewrite.index import Looks


class RemarkKind(enum.StrEnum):
    """What a remark tells."""

    MISSED = "missed"
    """A rewrite recognised its pattern, or most of it, and declined."""

    NOTE = "note"
    """Something the user may want to know."""

    WARNING = "warning"
    """Something the user should act on."""


@dataclasses.dataclass(frozen=True)
class Remark:
    """One thing a pass has to say, for people and machines.

    Attributes:
        kind: what it tells.
        pass_name: the pass that said it.
        rule: the rule, or the part of the pass.
        node: the node that it is about, or "".
        reason: the sentence.
        culprit: the node or value that stands in the way, or "".
        facts: the same as names and values, for tables; empty where the sentence says all.
    """

    kind: RemarkKind
    pass_name: str
    rule: str
    node: str
    reason: str
    culprit: str = ""
    facts: tuple[tuple[str, str | float | bool | None], ...] = ()


@dataclasses.dataclass(frozen=True)
class Rewrite:
    """One change to the graph, named so that a replay can leave it out.

    Attributes:
        pass_name: the pass that made it.
        rule: the rule within the pass.
        site: where: the name of the value that it replaced or of the node that it changed.
        numerics: what it may have done to the numbers.
    """

    pass_name: str
    rule: str
    site: str
    numerics: Numerics


@dataclasses.dataclass(frozen=True)
class Gate:
    """Decides which rewrites a run may make.

    Runs are deterministic, so the n-th permitted rewrite is the same in every replay: bisection is a binary search
    over `limit`.

    Attributes:
        limit: rewrites permitted in all; None for no limit.
        passes: names of passes that may not run.
        rules: (pass, rule) pairs that may not fire.
        sites: (pass, rule, site) triples that may not be rewritten.
    """

    limit: int | None = None
    passes: frozenset[str] = frozenset()
    rules: frozenset[tuple[str, str]] = frozenset()
    sites: frozenset[tuple[str, str, str]] = frozenset()

    def allows(self, rewrite: Rewrite, done: int) -> bool:
        """Whether `rewrite` may be made when `done` have been made before it."""
        return (
            (self.limit is None or done < self.limit)
            and (rewrite.pass_name, rewrite.rule) not in self.rules
            and (rewrite.pass_name, rewrite.rule, rewrite.site) not in self.sites
        )

    def without(self, rewrite: Rewrite) -> Gate:
        """This gate with one more rewrite left out: its site, or its whole rule where that site is out already."""
        site = (rewrite.pass_name, rewrite.rule, rewrite.site)
        if site in self.sites:
            return dataclasses.replace(self, rules=self.rules | {site[:2]})
        return dataclasses.replace(self, sites=self.sites | {site})

    def without_all(self, rewrites: Iterable[Rewrite]) -> Gate:
        """This gate with the sites of several rewrites left out."""
        sites = {(each.pass_name, each.rule, each.site) for each in rewrites}
        return dataclasses.replace(self, sites=self.sites | sites)

    def without_pass(self, name: str) -> Gate:
        """This gate with pass `name` left out."""
        return dataclasses.replace(self, passes=self.passes | {name})


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Samples of what the model will see, for passes that decide by data.

    Attributes:
        source: a path (npz, folder of npz, ONNX `test_data_set_*`, folder of images) or feeds by input name; of an
            iterator, the first `limit` are kept in memory.
        preprocess: a file that says how images become inputs.
        limit: how many samples to use at most; None for all.
        executor: where the samples are run; None for here. The result has the same bits.
    """

    source: Path | Iterable[Mapping[str, Any]]
    preprocess: Path | None = None
    limit: int | None = None
    executor: Executor | None = None

    def __post_init__(self) -> None:
        """Keeps what can be read only once: samples are read several times."""
        if isinstance(self.source, Iterator):
            limit = None if self.limit is None else max(self.limit, 0)
            object.__setattr__(self, "source", list(islice(self.source, limit)))


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user may set for a whole run.

    Attributes:
        seed: for whatever draws random numbers.
        fold_limit_bytes: how much larger than the constants that it makes dead a folded constant may be.
        trace_misses: whether to search for near misses (slower: every failed match is looked at).
        calibration: samples, for passes that decide by data; None where the user gave none.
        budget: the error that a lossy run may make, as the user wrote it; None for the default of the precision.
        sparsity: what to prune, as the user wrote it.
        force: emit what the target is known to run slower.
        autotune: where measured gains are kept; None where the targets' tables decide.
        distill: how to train what is left to compute what the original did, as the user wrote it; None for not at all.
        plan: a precision plan to follow; None where rules and experiments decide alone.
        save_plan: where the precision plan of the run goes; None for nowhere.
    """

    seed: int = 0
    fold_limit_bytes: int = 1 << 20
    trace_misses: bool = False
    calibration: Calibration | None = None
    budget: str | None = None
    sparsity: str | None = None
    force: bool = False
    distill: str | None = None
    autotune: Path | None = None
    plan: Path | None = None
    save_plan: Path | None = None


class Tuner(Protocol):
    """Measures what a rewrite gains on this machine."""

    def gain(
        self,
        before: Sequence[ir.Node],
        old: Sequence[ir.Value],
        after: Sequence[ir.Node],
        new: Sequence[ir.Value],
    ) -> float | None:
        """How many times as fast the new nodes are; None where that cannot be measured."""


@dataclasses.dataclass
class Context:
    """One run over one model.  Passes get it as an argument; there is no other state.

    Attributes:
        model: the model that the run is about.
        target: what the result is for.
        options: what the user set.
        gate: which rewrites are permitted.
        remarks: what passes had to say, in order.
        rewrites: what was changed, in order.
        pass_name: the pass that is running.
        cache: what is dear and the same in every replay of a run (statistics, by fingerprint); never a decision.
        original: loads the model as the user gave it; None where nobody knows.
        progress: called with the stage that goes on, and how much of it is done.
        tuner: measures what rewrites gain; None where the target's tables decide.
        findings: facts that passes have for the report, by name of the pass.
    """

    model: ir.Model
    target: Target
    options: Options = dataclasses.field(default_factory=Options)
    gate: Gate = dataclasses.field(default_factory=Gate)
    remarks: list[Remark] = dataclasses.field(default_factory=list)
    rewrites: list[Rewrite] = dataclasses.field(default_factory=list)
    pass_name: str = ""
    cache: MutableMapping[str, Any] = dataclasses.field(default_factory=dict)
    original: Callable[[], ir.Model] | None = None
    progress: Callable[[str, float | None], None] = lambda _stage, _part: None
    findings: dict[str, Any] = dataclasses.field(default_factory=dict)

    became: dict[str, str] = dataclasses.field(default_factory=dict)
    """Values that are gone, and those of other names that were put in their place."""

    tuner: Tuner | None = None

    census: Census | None = None
    """The graphs and nodes of the model, where whoever runs the passes knows that nothing changed since; else None."""

    looks: Looks | None = None
    """How the nodes of `census` look, kept for the passes that find the model as the last one did."""

    _said: set[Remark] = dataclasses.field(default_factory=set, init=False, repr=False)
    _near: dict[tuple[str, str, str], tuple[str, str]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )
    _shapes: Shapes | None = dataclasses.field(default=None, init=False, repr=False)
    _names: Names | None = dataclasses.field(default=None, init=False, repr=False)
    _unannotated: bool = dataclasses.field(default=False, init=False, repr=False)

    @property
    def shapes(self) -> Shapes:
        """Shape facts of the model, inferred when first asked for; whoever changes the graph keeps them current."""
        if self._shapes is None:
            self._shapes = Shapes(self.model)
        return self._shapes

    @property
    def names(self) -> Names:
        """Hands out names that the model does not use."""
        if self._names is None:
            self._names = Names.of(self.model)
        return self._names

    def walk(self, model: ir.Model) -> Census:
        """The graphs and nodes of the model as they are now."""
        return self.census or Census(model)

    def annotated(self, model: ir.Model) -> frozenset[str]:
        """The tensors that quantization annotations name; where there were none, no pass has made any."""
        if self._unannotated:
            return frozenset()
        found = annotation_names(self.walk(model))
        self._unannotated = not found
        return found

    def refresh(self) -> None:
        """Drops shapes and names, to be taken anew when next asked for.

        For changes that were not made through the engine, and for passes that touch so many nodes that one inference
        afterwards costs less than an update for each.
        """
        self._shapes = None
        self._names = None

    def forget(self, node: ir.Node) -> None:
        """Drops the shape facts of a node that is about to go."""
        if self._shapes is not None:
            self._shapes.forget(node)

    def permit(
        self, rule: str, site: ir.Node | ir.Value | str, numerics: Numerics = Numerics.EXACT
    ) -> bool:
        """Whether the running pass may apply `rule` at `site`; if so, the rewrite is on record as made."""
        rewrite = Rewrite(self.pass_name, rule, name_of(site), numerics)
        if not self.gate.allows(rewrite, len(self.rewrites)):
            return False
        self.rewrites.append(rewrite)
        self.census = None  # whoever asked will change something now
        return True

    def remark(
        self,
        kind: RemarkKind,
        rule: str,
        node: ir.Node | ir.Value | str,
        reason: str,
        culprit: ir.Node | ir.Value | None = None,
        facts: Mapping[str, str | float | bool | None] | None = None,
    ) -> None:
        """Puts a remark of the running pass on record, once."""
        guilty = "" if culprit is None else name_of(culprit)
        held = tuple((facts or {}).items())
        remark = Remark(kind, self.pass_name, rule, name_of(node), reason, guilty, held)
        if remark not in self._said:
            self._said.add(remark)
            self.remarks.append(remark)

    def missed(
        self,
        rule: str,
        node: ir.Node | ir.Value | str,
        reason: str,
        culprit: ir.Node | ir.Value | None = None,
    ) -> None:
        """Records that `rule` recognised its pattern at `node` and declined, and because of what."""
        self.remark(RemarkKind.MISSED, rule, node, reason, culprit)

    def replaced(self, old: str | None, new: str | None) -> None:
        """Keeps in mind that what read one value reads another one, of another name, from now on."""
        if old and new and old != new:
            self.became[old] = new

    def near_miss(
        self, rule: str, node: ir.Node, reason: str, culprit: ir.Node | ir.Value | None = None
    ) -> None:
        """As `missed`, of a rule that is tried again whenever something changes: its last word at a node counts."""
        self.missed(rule, node, reason, culprit)
        guilty = "" if culprit is None else name_of(culprit)
        self._near[self.pass_name, rule, name_of(node)] = reason, guilty

    def aside(self) -> Context:
        """A copy for trials: what is said and made there stays there."""
        other = copy.copy(self)
        vars(other).update(remarks=[], rewrites=[], _said=set(), _near={})
        return other

    def take_remarks(self) -> list[Remark]:
        """The remarks so far, which are forgotten here."""
        said, self.remarks = self.remarks, []
        self._said.clear()
        return said

    def settle_remarks(self) -> None:
        """Drops what was missed at first and made after all; of near misses, what is no longer there or so."""
        if not any(remark.kind is RemarkKind.MISSED for remark in self.remarks):
            return
        made = {(each.pass_name, each.rule, each.site) for each in self.rewrites}
        there = {name_of(node) for _, nodes in Census(self.model).parts for node in nodes}
        told = {place: said for place, said in self._near.items() if place[2] in there}
        self.remarks = [
            remark
            for remark in self.remarks
            if remark.kind is not RemarkKind.MISSED
            or (
                (place := (remark.pass_name, remark.rule, remark.node)) not in made
                and (place not in self._near or told.get(place) == (remark.reason, remark.culprit))
            )
        ]

    @property
    def numerics(self) -> Numerics:
        """What the run so far may have done to the numbers."""
        return max((rewrite.numerics for rewrite in self.rewrites), default=Numerics.EXACT)


def name_of(site: ir.Node | ir.Value | str) -> str:
    """A stable name for a node: its first named output, which survives where node names are absent."""
    if isinstance(site, ir.Node):
        for value in site.outputs:
            if name := value.name:
                return name
    return site if isinstance(site, str) else site.name or ""


def describe(nodes: Sequence[ir.Node]) -> str:
    """Operator and name of each node, for messages."""
    return ", ".join(f"{node.op_type} {name_of(node)!r}" for node in nodes)
