"""What `--distill` asks for."""

from __future__ import annotations

import dataclasses
import enum
from typing import Any

from graphopt.errors import OptionError

_REMEDY = (
    "write yes, or settings with commas: steps=300, lr=0.004, schedule=cosine|linear|constant|step, temperature=1, "
    "batch=64, noise=0.2, mix=0.1, held-out=0.1, patience=16, mode=whole|blocks, features=0, transfer=yes|no"
)


class Schedule(enum.StrEnum):
    """How the learning rate goes on."""

    COSINE = "cosine"
    """Down to a twentieth along half a cosine."""

    LINEAR = "linear"
    """Down to a twentieth in a straight line."""

    STEP = "step"
    """A tenth of it after two thirds of the steps."""

    CONSTANT = "constant"


class Mode(enum.StrEnum):
    """What a step trains."""

    WHOLE = "whole"
    """The model from its inputs to its outputs."""

    BLOCKS = "blocks"
    """Each stretch between residual sums for itself, towards the original's value at its end."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        steps: how many, unless the held-out samples stop it before.
        rate: learning rate of Adam at the start.
        schedule: how it goes on.
        temperature: of logits in the divergence.
        batch: samples a step.
        noise: standard deviation of what is added to float inputs, over that of the input.
        mix: share of the samples of a step that are mixed with another, where all inputs are floats.
        held_out: share of the samples that are kept to judge on.
        patience: after how many judgements without a gain to stop.
        mode: what a step trains.
        features: weight of the error at the ends of blocks, beside that of the outputs.
        transfer: whether weights of the same name and shape are first taken from the teacher.
    """

    steps: int = 300
    rate: float = 4e-3
    schedule: Schedule = Schedule.COSINE
    temperature: float = 1.0
    batch: int = 64
    noise: float = 0.2
    mix: float = 0.1
    held_out: float = 0.1
    patience: int = 16
    mode: Mode = Mode.WHOLE
    features: float = 0.0
    transfer: bool = False


_NUMBERS = {
    "steps": ("steps", 1, 1_000_000),
    "lr": ("rate", 1e-9, 10.0),
    "temperature": ("temperature", 0.1, 100.0),
    "batch": ("batch", 1, 65_536),
    "noise": ("noise", 0.0, 10.0),
    "mix": ("mix", 0.0, 1.0),
    "held-out": ("held_out", 0.01, 0.9),
    "patience": ("patience", 1, 1_000_000),
    "features": ("features", 0.0, 1e6),
}
_WHOLE_NUMBERS = frozenset({"steps", "batch", "patience"})
_DEFAULT = ("yes", "default", "on")


def parse_settings(text: str) -> Settings:
    """The settings that `text` states: `yes`, `steps=500,lr=3e-4,schedule=linear`.

    Raises:
        OptionError: an unknown key or a value that it cannot have; the message says what can be written.
    """
    settings = Settings()
    for part in (each.strip() for each in text.split(",")):
        if part in _DEFAULT:
            continue
        key, _, word = part.partition("=")
        settings = _with(settings, key.strip(), word.strip(), text)
    return settings


def _with(settings: Settings, key: str, word: str, text: str) -> Settings:
    if key in _NUMBERS:
        return _with_number(settings, key, word, text)
    if key == "schedule" and word in [each.value for each in Schedule]:
        return dataclasses.replace(settings, schedule=Schedule(word))
    if key == "mode" and word in [each.value for each in Mode]:
        return dataclasses.replace(settings, mode=Mode(word))
    if key == "transfer" and word in ("yes", "no"):
        return dataclasses.replace(settings, transfer=word == "yes")
    raise OptionError(f"--distill {text!r}: {key!r} is no setting with value {word!r}; {_REMEDY}")


def _with_number(settings: Settings, key: str, word: str, text: str) -> Settings:
    name, low, high = _NUMBERS[key]
    try:
        number = int(word) if key in _WHOLE_NUMBERS else float(word)
    except ValueError as error:
        raise OptionError(
            f"--distill {text!r}: {key}={word!r} is not a number; {_REMEDY}"
        ) from error
    if not low <= number <= high:
        raise OptionError(f"--distill {text!r}: {key} must lie in {low:g} to {high:g}, not {word}")
    changed: dict[str, Any] = {name: number}
    return dataclasses.replace(settings, **changed)
