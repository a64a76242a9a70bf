"""What `--sparsity` asks for."""

from __future__ import annotations

import dataclasses
import enum
import re
from typing import TypeAlias

from graphopt.errors import OptionError

MAX_ROUNDS = 16
MAX_MULTIPLE = 64

_REMEDY = (
    "write 0.8 (share of zeros), 2:4 (zeros in each four), channels:0.5 (share of the arithmetic to remove), "
    "lowrank:0.05 (error up to which a matrix becomes two) or threshold:0.01, and after it, if need be, "
    "method=…, allocation=…, refit=no, tune=no, multiple=16, blocks=no, tables=0.8, dense=REGEX, layer=REGEX:0.5, "
    "layer=REGEX:2:4"
)


class Method(enum.StrEnum):
    """How the weights to keep are chosen."""

    AUTO = "auto"
    """ADMM from 75 % on, SparseGPT below; magnitude without samples."""

    MAGNITUDE = "magnitude"
    WANDA = "wanda"
    SPARSEGPT = "sparsegpt"
    ADMM = "admm"


class Allocation(enum.StrEnum):
    """How the share of zeros is spread over the layers."""

    MIXED = "mixed"
    """From 90 % on half way between LAMP and ERK: networks differ in which is better.  Else, and blind, LAMP."""

    LAMP = "lamp"
    SENSITIVITY = "sensitivity"
    """Half way between LAMP and LAMP over what removing each weight would cost; LAMP without samples."""

    ERK = "erk"
    GLOBAL = "global"
    UNIFORM = "uniform"


class Importance(enum.StrEnum):
    """What makes a channel worth keeping."""

    AUTO = "auto"
    L2 = "l2"
    SIMILAR = "fpgm"
    ACTIVATION = "activation"
    RECONSTRUCTION = "reconstruction"
    """What the readers lose after the best fit of what is left, comparable over all layers."""

    FISHER = "fisher"
    """By gradients of the model's own answers, without labels; needs PyTorch."""


class Measure(enum.StrEnum):
    """What `channels` is a share of."""

    FLOPS = "flops"
    PARAMETERS = "parameters"
    LATENCY = "latency"
    """As measured here, with one thread."""


class Tune(enum.StrEnum):
    """Whether the weights that stay are trained together after each layer was fitted."""

    AUTO = "auto"
    """At high ratios and for patterns, where the model is small enough for that to take seconds."""

    YES = "yes"
    NO = "no"


Pattern: TypeAlias = tuple[int, int]
Share: TypeAlias = "float | Pattern"
"""How many zeros one layer has: a share of them, or N of each M that stay."""

_OF_CHANNELS = ("importance", "by", "rounds", "multiple", "blocks")
_OF_WEIGHTS = ("method", "allocation", "tune", "layer")
"""Options that say something of one kind of amount alone."""


@dataclasses.dataclass(frozen=True)
class SparsityRequest:
    """One `--sparsity`, in parts; exactly one of ratio, pattern, threshold, channels and low_rank says how much.

    Attributes:
        ratio: share of the weights of Conv, Gemm and MatMul that shall be zero.
        pattern: (N, M): at least M - N zeros in M consecutive weights along the axis that hardware reads.
        threshold: weights up to this magnitude become zero.
        channels: share of the arithmetic, or of the weights, to remove by removing whole channels.
        by: which of the two.
        method: how weights are chosen.
        allocation: how `ratio` is spread over layers.
        importance: how channels are chosen.
        refit: whether the weights that stay are fitted to the outputs of the dense model.
        tune: whether those that stay are then trained together.
        dense: names of weights that stay dense, as a regular expression.
        own: shares of zeros, or patterns, of single layers, by regular expressions of the names of their weights.
        low_rank: error of the outputs, RMS over RMS, up to which a large matrix becomes a product of two.
        rounds: in how many the channels go, each fitted before the next is chosen; 0 for as many as the share asks for.
        multiple: of what the channels of convolutions shall stay a multiple; 0 for `block`, or 8 if that is too much.
        blocks: whether whole branches of residual sums may go where `channels` is asked for.
        tables: share of zeros in tables of embeddings; 0 leaves them dense.
        block: how many channels lie together in the runtime's convolutions; nothing that a user states.
    """

    ratio: float | None = None
    pattern: Pattern | None = None
    threshold: float | None = None
    channels: float | None = None
    method: Method = Method.AUTO
    allocation: Allocation = Allocation.MIXED
    importance: Importance = Importance.AUTO
    by: Measure = Measure.FLOPS
    refit: bool = True
    tune: Tune = Tune.AUTO
    dense: str = ""
    own: tuple[tuple[str, Share], ...] = ()
    rounds: int = 0
    multiple: int = 0
    blocks: bool = True
    block: int = 8
    low_rank: float | None = None
    tables: float = 0.0


def parse_sparsity(text: str) -> SparsityRequest:
    """The request that `text` states: `0.8`, `2:4`, `channels:0.5`, `0.9,method=wanda,allocation=erk`.

    Raises:
        OptionError: the text states none; the message says what does.
    """
    first, *rest = (part.strip() for part in text.split(","))
    request = _amount(first, text)
    for part in rest:
        key, _, word = part.partition("=")
        request = _with_option(request, key.strip(), word.strip(), text)
    return request


def _amount(word: str, text: str) -> SparsityRequest:
    pattern = re.fullmatch(r"(\d+):(\d+)", word)
    if pattern:
        n, m = int(pattern[1]), int(pattern[2])
        if not 0 < n < m:
            raise OptionError(f"--sparsity {text!r}: {n}:{m} keeps {n} of each {m}; {_REMEDY}")
        return SparsityRequest(pattern=(n, m))
    kind, colon, number = word.rpartition(":")
    value = _number(number, text)
    if kind == "threshold" and value > 0:
        return SparsityRequest(threshold=value)
    if kind == "lowrank" and 0 < value < 1:
        return SparsityRequest(low_rank=value)
    if kind in ("", "channels", "lowrank") and not 0 < value < 1 and not (colon and not kind):
        raise OptionError(f"--sparsity {text!r}: {number} is not between 0 and 1; {_REMEDY}")
    if kind not in ("", "channels") or (colon and not kind):
        raise OptionError(f"--sparsity {text!r}: {word!r} is no amount; {_REMEDY}")
    return SparsityRequest(channels=value) if kind else SparsityRequest(ratio=value)


def _number(word: str, text: str) -> float:
    try:
        return float(word)
    except ValueError as error:
        raise OptionError(f"--sparsity {text!r}: {word!r} is not a number; {_REMEDY}") from error


def _with_option(request: SparsityRequest, key: str, word: str, text: str) -> SparsityRequest:
    _check_use(request, key, text)
    choices: dict[str, type[enum.StrEnum]] = {
        "method": Method,
        "allocation": Allocation,
        "importance": Importance,
        "by": Measure,
        "tune": Tune,
    }
    if key in choices:
        known = [member.value for member in choices[key]]
        if word not in known:
            raise OptionError(
                f"--sparsity {text!r}: unknown {key} {word!r}; choose one of {', '.join(known)}"
            )
        return _with_choice(request, key, word)
    if key == "refit" and word in ("yes", "no"):
        return dataclasses.replace(request, refit=word == "yes")
    if key == "blocks" and word in ("yes", "no"):
        return dataclasses.replace(request, blocks=word == "yes")
    if key == "rounds" and word.isdecimal() and 1 <= int(word) <= MAX_ROUNDS:
        return dataclasses.replace(request, rounds=int(word))
    if key == "multiple" and word.isdecimal() and 1 <= int(word) <= MAX_MULTIPLE:
        return dataclasses.replace(request, multiple=int(word))
    if key == "tables":
        return dataclasses.replace(request, tables=_tables(request, word, text))
    if key == "layer" and word:
        return dataclasses.replace(request, own=(*request.own, _own(word, text)))
    if key == "dense" and word:
        return dataclasses.replace(request, dense=_regex(word, text))
    raise OptionError(f"--sparsity {text!r}: {key!r} is no option with value {word!r}; {_REMEDY}")


def _check_use(request: SparsityRequest, key: str, text: str) -> None:
    """Refuses options that would change nothing."""
    amount = text.partition(",")[0].strip()
    if key in _OF_CHANNELS and request.channels is None:
        raise OptionError(
            f"--sparsity {text!r}: {key}= is for channels that are removed (channels:0.5), not for {amount}; {_REMEDY}"
        )
    if key in _OF_WEIGHTS and (request.channels is not None or request.low_rank is not None):
        raise OptionError(
            f"--sparsity {text!r}: {key}= is for zeros (0.8, 2:4, threshold:0.01), not for {amount}; {_REMEDY}"
        )
    if key == "allocation" and request.ratio is None:
        raise OptionError(
            f"--sparsity {text!r}: allocation= spreads a share of zeros (0.8), and {amount} leaves nothing to spread; "
            f"{_REMEDY}"
        )


def _with_choice(request: SparsityRequest, key: str, word: str) -> SparsityRequest:
    if key == "method":
        return dataclasses.replace(request, method=Method(word))
    if key == "allocation":
        return dataclasses.replace(request, allocation=Allocation(word))
    if key == "by":
        return dataclasses.replace(request, by=Measure(word))
    if key == "tune":
        return dataclasses.replace(request, tune=Tune(word))
    return dataclasses.replace(request, importance=Importance(word))


def _tables(request: SparsityRequest, word: str, text: str) -> float:
    """The share of zeros in tables; `yes` means that of the weights."""
    share = request.ratio if word == "yes" else 0.0 if word == "no" else _number(word, text)
    if request.channels is not None or request.low_rank is not None:
        raise OptionError(
            f"--sparsity {text!r}: tables= is for zeros, not for what is removed or split; {_REMEDY}"
        )
    if share is None or not 0 <= share < 1:
        raise OptionError(
            f"--sparsity {text!r}: tables={word} is no share of zeros between 0 and 1, such as tables=0.8; 'yes' means "
            "the share asked for of the weights, where there is one"
        )
    return share


def _own(word: str, text: str) -> tuple[str, Share]:
    found = re.fullmatch(r"(.+):(\d+):(\d+)", word)
    if found and 0 < int(found[2]) < int(found[3]):
        return _regex(found[1], text, "layer"), (int(found[2]), int(found[3]))
    pattern, _, number = word.rpartition(":")
    share = _number(number, text)
    if not pattern or not 0 <= share < 1:
        raise OptionError(
            f"--sparsity {text!r}: layer={word} is not a regular expression, a colon and a share of zeros between 0 "
            "and 1, such as layer=^encoder:0.5, or a pattern, such as layer=^encoder:2:4"
        )
    return _regex(pattern, text, "layer"), share


def _regex(word: str, text: str, key: str = "dense") -> str:
    try:
        re.compile(word)
    except re.error as error:
        raise OptionError(
            f"--sparsity {text!r}: {key}={word!r} is not a regular expression: {error}"
        ) from error
    return word
