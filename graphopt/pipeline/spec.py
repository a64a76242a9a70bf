"""The grammar of spec strings: `fold-constants{limit=3}, fuse{ops=[Add, Mul], name="a, b"}`.

    specs   = spec {"," spec}
    spec    = name ["{" [options] "}"]
    options = key "=" value {"," key "=" value}
    value   = text | word ["{" options "}"] | "[" values "]" | "{" options "}"

A word is anything without `,[]{}"'`; `none` stands for None.  A text is in quotes, with JSON's escapes in double ones.
A word with braces is kept as it is written: the spec of a pass, for options that take passes.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.errors import OptionError

_NAME = re.compile(r"""[^,{}\[\]"'=]+""")
_WORD = re.compile(r"""[^,{}\[\]"']+""")
_DOUBLE = re.compile(r'"(?:[^"\\]|\\.)*"')
_SINGLE = re.compile(r"'[^']*'")
_PLAIN = re.compile(r"[A-Za-z_][\w.:/-]*\Z")
_NOTHING = ("none", "null")
_RESERVED = (*_NOTHING, "true", "false")


@dataclasses.dataclass(frozen=True)
class PassSpec:
    """A pass as a recipe names it.

    Attributes:
        name: name of a known pass, or where to load one from.
        options: values of its options.
        where: where it was written, for messages.
        text: whether the values come from a spec string, where numbers are words too.
    """

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    where: str = "spec"
    text: bool = True


def parse_specs(text: str, where: str = "spec") -> tuple[PassSpec, ...]:
    """The passes that `text` names, in order.

    Raises:
        OptionError: it does not follow the grammar; the message points at the place.
    """
    reader = _Reader(text, where)
    specs: list[PassSpec] = []
    while not reader.at_end():
        specs.append(PassSpec(reader.name(), reader.braces(), where))
        if not reader.at_end():
            reader.take(",", "a comma between passes, or braces with options")
    return tuple(specs)


@dataclasses.dataclass
class _Reader:
    """Reads a spec string from left to right."""

    text: str
    where: str
    at: int = 0

    def at_end(self) -> bool:
        """Whether only blanks are left."""
        return not self.text[self.at :].strip()

    def peek(self) -> str:
        """The next character that is not blank, or ""."""
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def take(self, wanted: str, expected: str) -> None:
        """Steps over the character `wanted`."""
        if self.peek() != wanted:
            raise self.error(expected)
        self.at += 1

    def name(self) -> str:
        """A pass's name: a word, or a text."""
        return (
            self.quoted() if self.peek() in ("'", '"') else self.match(_NAME, "the name of a pass")
        )

    def braces(self) -> Mapping[str, Any]:
        """`{key=value, …}`, or nothing."""
        if self.peek() != "{":
            return {}
        self.at += 1
        found: dict[str, Any] = {}
        while self.peek() != "}":
            key = self.match(_NAME, "option=value")
            self.take("=", f"'=' and a value after option {key!r}")
            if key in found:
                raise self.error(f"option {key!r} only once")
            found[key] = self.value()
            if self.peek() != "}":
                self.take(",", "a comma or '}'")
        self.at += 1
        return found

    def value(self) -> Any:  # noqa: ANN401
        """A text, word, list or mapping."""
        match self.peek():
            case "'" | '"':
                return self.quoted()
            case "[":
                return self.items()
            case "{":
                return self.braces()
        start = self.at
        word = self.match(_WORD, "a value")
        if self.peek() == "{":
            self.braces()
            return self.text[start : self.at].strip()
        return None if word in _NOTHING else word

    def items(self) -> list[Any]:
        """`[value, …]`."""
        self.at += 1
        found: list[Any] = []
        while self.peek() != "]":
            found.append(self.value())
            if self.peek() != "]":
                self.take(",", "a comma or ']'")
        self.at += 1
        return found

    def quoted(self) -> str:
        """The text in quotes that begins here."""
        double = self.peek() == '"'
        raw = self.match(_DOUBLE if double else _SINGLE, "the closing quote")
        if not double:
            return raw[1:-1]
        try:
            return str(json.loads(raw))
        except json.JSONDecodeError as error:
            raise self.error(f"escapes as in JSON ({error.msg})") from error

    def match(self, pattern: re.Pattern[str], expected: str) -> str:
        """What `pattern` finds here, without blanks around it."""
        self.peek()
        found = pattern.match(self.text, self.at)
        if found is None or not found[0].strip():
            raise self.error(expected)
        self.at = found.end()
        return found[0].strip()

    def error(self, expected: str) -> OptionError:
        """What is wrong, with the place marked."""
        self.peek()
        return OptionError(
            f"{self.where}: expected {expected} at column {self.at + 1}: "
            f"{self.text[: self.at]} >>> {self.text[self.at :]}"
        )


def format_spec(name: str, options: Mapping[str, Any]) -> str:
    """The spec string that `parse_specs` reads as this name and these options (plain Python values)."""
    shown = name if _NAME.fullmatch(name) and name == name.strip() else json.dumps(name)
    return f"{shown}{{{_pairs(options)}}}" if options else shown


def _pairs(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={format_value(value)}" for key, value in options.items())


def format_value(value: Any) -> str:  # noqa: ANN401
    """One value as a spec string has it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        return f"{{{_pairs(value)}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, str) and (not _PLAIN.match(value) or value in _RESERVED):
        return json.dumps(value, ensure_ascii=False)
    return str(value)
