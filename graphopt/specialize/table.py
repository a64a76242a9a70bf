"""What a recipe's table [specialize] asks for.

[specialize]
dims = {batch = 1, seq = 128}
bind = {sr = 16000, mask = "mask.npy"}     # numbers, lists, texts, or files .npy and .pb beside the recipe
outputs = ["logits"]
dtypes = {scores = "float16"}
layouts = {x = "NHWC"}
rename = {x = "image"}

[specialize.images]
x = "nhwc,scale=255,mean=0.485:0.456:0.406,std=0.229:0.224:0.225"    # or a table: layout, scale, mean, std, …
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from graphopt.errors import OptionError
from graphopt.specialize.wanted import Image, Specialization, parse_image, read_array

FILES = (".npy", ".pb")


class _ImageTable(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """As `Image`, as TOML writes it."""

    layout: str = "NHWC"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: str = "RGB"
    model_layout: str = ""

    def image(self) -> Image:
        return Image(**msgspec.structs.asdict(self))


class _Table(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The keys of the table."""

    dims: dict[str, int] = {}
    bind: dict[str, Any] = {}
    outputs: list[str] = []
    dtypes: dict[str, str] = {}
    layouts: dict[str, str] = {}
    images: dict[str, str | _ImageTable] = {}
    rename: dict[str, str] = {}


def from_table(table: Mapping[str, Any], source: str, folder: Path | None = None) -> Specialization:
    """What the table asks for; files that it names lie beside the recipe, in `folder`.

    Raises:
        OptionError: an unknown key, a value of the wrong type, or a file that cannot be read.
    """
    try:
        said = msgspec.convert(dict(table), _Table)
    except msgspec.ValidationError as error:
        known = ", ".join(_Table.__struct_fields__)
        raise OptionError(f"{source}, [specialize]: {error}; known keys: {known}") from error
    return Specialization(
        dims=said.dims,
        bind={name: _value(name, given, folder) for name, given in said.bind.items()},
        outputs=tuple(said.outputs),
        dtypes=said.dtypes,
        layouts=said.layouts,
        images={
            name: parse_image(name, given) if isinstance(given, str) else given.image()
            for name, given in said.images.items()
        },
        rename=said.rename,
    )


def _value(name: str, given: Any, folder: Path | None) -> Any:  # noqa: ANN401  what TOML holds, or an array
    if isinstance(given, str) and given.endswith(FILES):
        return read_array(name, (folder or Path()) / given)
    return given


def over(first: Specialization, second: Specialization) -> Specialization:
    """Both, with what `second` says going before: the command line before the recipe."""
    held: dict[str, Any] = {}
    for field in dataclasses.fields(Specialization):
        a, b = getattr(first, field.name), getattr(second, field.name)
        held[field.name] = {**a, **b} if isinstance(a, Mapping) else b or a
    return Specialization(**held)
