"""Options of passes: what there is, and values of it checked against the declared types.

A field of a pass that has a default is an option; a field without one is what the pass is made of.  A factory's options
are its parameters.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import enum
import inspect
import pathlib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from graphopt.errors import OptionError

_MISSING = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class OptionInfo:
    """One option of a pass.

    Attributes:
        name: its name.
        type: its declared type.
        default: its default.
    """

    name: str
    type: Any
    default: Any

    @property
    def expected(self) -> str:
        """The type in words: `int`, `float | None`, `one of exact, reordered, lossy`."""
        return _in_words(self.type)

    def __str__(self) -> str:
        return f"{self.name}: {self.expected} = {plain(self.default)!r}"


def options_of(maker: Any) -> tuple[OptionInfo, ...]:  # noqa: ANN401
    """The options of a pass class, a pass or a factory of passes, with their defaults (of a pass: its values)."""
    if dataclasses.is_dataclass(maker):
        return tuple(_of_fields(maker))
    if isinstance(maker, type) or inspect.isroutine(maker):
        return tuple(_of_parameters(maker))
    return ()


_CODE = ("name", "rules", "later", "wishes")
"""Fields that nobody sets in a recipe: what a pass is called, and what it is made of."""


def _of_fields(maker: Any) -> Iterable[OptionInfo]:  # noqa: ANN401
    hints = _hints(maker if isinstance(maker, type) else type(maker))
    for field in dataclasses.fields(maker):
        has_default = field.default is not _MISSING or field.default_factory is not _MISSING
        if not field.init or not has_default or field.name in _CODE:
            continue
        yield OptionInfo(field.name, hints.get(field.name, Any), _default(maker, field))


def _default(maker: Any, field: dataclasses.Field[Any]) -> Any:  # noqa: ANN401
    if not isinstance(maker, type):
        return getattr(maker, field.name)
    return field.default if field.default_factory is _MISSING else field.default_factory()


def _of_parameters(maker: Any) -> Iterable[OptionInfo]:  # noqa: ANN401
    hints = _hints(vars(maker).get("__init__", maker) if isinstance(maker, type) else maker)
    for parameter in inspect.signature(maker).parameters.values():
        if parameter.default is not parameter.empty:
            yield OptionInfo(parameter.name, hints.get(parameter.name, Any), parameter.default)


def _hints(owner: Any) -> Mapping[str, Any]:  # noqa: ANN401
    """Declared types; those left out in which a name exists for type checkers alone."""
    try:
        return typing.get_type_hints(owner)
    except NameError:
        module = vars(sys.modules[owner.__module__])
    found: dict[str, Any] = {}
    for name, declared in inspect.get_annotations(owner).items():
        alone = types.SimpleNamespace(__annotations__={name: declared})
        with contextlib.suppress(NameError):
            found.update(typing.get_type_hints(alone, module))
    return found


def convert(option: OptionInfo, value: Any, where: str, *, text: bool) -> Any:  # noqa: ANN401
    """`value` as the option's type.

    Args:
        option: the option.
        value: what the user gave.
        where: file or spec, and pass, for messages.
        text: whether numbers and truth values may be given as words.

    Raises:
        OptionError: it does not fit.
    """
    member = _member(option.type, value)
    if member is not None:
        return member
    try:
        return _convert(option.type, value, text=text)
    except (msgspec.ValidationError, ValueError, TypeError) as error:
        given = "none" if value is None else repr(value)
        raise OptionError(
            f"{where}: option {option.name!r} is {given}; expected {option.expected}, as in the default "
            f"{plain(option.default)!r} ({error})"
        ) from error


def _convert(kind: Any, value: Any, *, text: bool) -> Any:  # noqa: ANN401
    if value is None and text and not _admits_none(kind):
        value = "none"  # a word like any other where there is no None
    return msgspec.convert(value, kind, strict=not text, dec_hook=_decode)


def _admits_none(kind: Any) -> bool:  # noqa: ANN401
    return kind is Any or kind is type(None) or type(None) in typing.get_args(kind)


def _decode(kind: type, value: Any) -> Any:  # noqa: ANN401
    """Types that msgspec has no rule for."""
    if issubclass(kind, pathlib.PurePath) and isinstance(value, str):
        return kind(value)
    raise ValueError(f"a {kind} cannot be given in a recipe; set it in Python")


def _member(kind: Any, value: Any) -> enum.Enum | None:  # noqa: ANN401
    """The member of an enumeration of numbers that a word names: msgspec knows values only."""
    for each in (kind, *typing.get_args(kind)):
        if isinstance(each, type) and issubclass(each, enum.IntEnum) and isinstance(value, str):
            found = each.__members__.get(value.upper().replace("-", "_"))
            if found is not None:
                return found
    return None


def _in_words(kind: Any) -> str:  # noqa: ANN401
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return f"one of {', '.join(str(plain(member)) for member in kind)}"
    if typing.get_origin(kind) is typing.Literal:
        return f"one of {', '.join(map(str, typing.get_args(kind)))}"
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " | ".join(_in_words(each) for each in typing.get_args(kind))
    if kind is type(None):
        return "none"
    if isinstance(kind, type) and not typing.get_args(kind):
        return kind.__name__
    return str(kind).replace("typing.", "").replace("collections.abc.", "")


def plain(value: Any) -> Any:  # noqa: ANN401
    """A value in terms of recipes: numbers, texts, lists, mappings."""
    if isinstance(value, enum.Enum):
        return value.name.lower() if isinstance(value, enum.IntEnum) else plain(value.value)
    if isinstance(value, pathlib.PurePath):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(plain(each) for each in value)
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    return value


def select(
    known: Iterable[OptionInfo], given: Mapping[str, Any], where: str, *, text: bool
) -> dict[str, Any]:
    """The given options, converted.

    Raises:
        OptionError: an option is unknown or does not fit.
    """
    by_name = {option.name: option for option in known}
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        if name not in by_name:
            listed = "; ".join(map(str, by_name.values())) or "none"
            raise OptionError(
                f"{where}: no option {name!r}{did_you_mean(name, by_name)}; options: {listed}"
            )
        chosen[name] = convert(by_name[name], value, where, text=text)
    return chosen


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is closest, or ""."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
