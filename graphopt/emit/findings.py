"""What a legality check says of a model, as facts."""

from __future__ import annotations

import dataclasses
import enum
from collections import Counter
from collections.abc import Mapping


class Verdict(enum.StrEnum):
    """What becomes of a node, worst last."""

    OK = "ok"
    WARNING = "warning"
    FALLS_BACK = "falls-back"
    REFUSED = "refused"


@dataclasses.dataclass(frozen=True)
class Finding:
    """Something that the target has to say against a node, or against the model.

    Attributes:
        verdict: how bad it is.
        reason: what is wrong, with the values seen.
        source: the rule's origin.
        remedy: what to do about it.
        node: name of the node (of its first output where it has none); "" for the model itself.
        op: operator.
        graph: where the node is: `main`, `main/If (cond)` …
        provider: who runs it instead, where it falls back.
        fix: name of a pass that mends it; "" for none.
    """

    verdict: Verdict
    reason: str
    source: str
    remedy: str = ""
    node: str = ""
    op: str = ""
    graph: str = "main"
    provider: str = ""
    fix: str = ""


@dataclasses.dataclass(frozen=True)
class NodeVerdict:
    """What becomes of one node."""

    node: str
    op: str
    graph: str
    verdict: Verdict
    provider: str


@dataclasses.dataclass(frozen=True)
class Copies:
    """Values that must move between host and device, by where they go; predicted, not measured."""

    to_host: tuple[str, ...] = ()
    to_device: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """How many copies one run makes."""
        return len(self.to_host) + len(self.to_device)


@dataclasses.dataclass(frozen=True)
class Legality:
    """Whether and how a target takes a model.

    Attributes:
        target: its name.
        checked_against: the tables that were asked, with their versions.
        nodes: every node's verdict, in the order of the graphs.
        findings: what is not plainly fine.
        copies: predicted copies between host and device; empty where there is one memory.
    """

    target: str
    checked_against: tuple[str, ...]
    nodes: tuple[NodeVerdict, ...]
    findings: tuple[Finding, ...]
    copies: Copies = Copies()

    @property
    def refused(self) -> tuple[Finding, ...]:
        """What keeps the target from taking the model."""
        return tuple(f for f in self.findings if f.verdict is Verdict.REFUSED)

    @property
    def verdict(self) -> Verdict:
        """The worst of all findings."""
        order = list(Verdict)
        return max((f.verdict for f in self.findings), key=order.index, default=Verdict.OK)

    @property
    def fixes(self) -> tuple[str, ...]:
        """The passes that mend something, once each."""
        return tuple(dict.fromkeys(f.fix for f in self.findings if f.fix))

    def placement(self) -> Mapping[str, int]:
        """How many nodes each provider runs."""
        return dict(Counter(node.provider for node in self.nodes if node.provider))
