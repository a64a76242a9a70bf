"""What a model shall be specialised to, and the texts of the command line that say so."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnx_ir as ir
from google.protobuf.message import (  # type: ignore[import-untyped, unused-ignore]
    DecodeError,
)

from graphopt.errors import OptionError

LAYOUTS = ("NCHW", "NHWC")
CHANNELS = ("RGB", "BGR")


@dataclasses.dataclass(frozen=True)
class Image:
    """An input that shall take images as they are decoded: bytes of 0 to 255, red first, channels last.

    The model then computes `(image / scale - mean) / std` by itself.

    Attributes:
        layout: of the new input, NHWC as decoders give it, or NCHW.
        scale: what pixels are divided by.
        mean: what is subtracted after that: one number, or one a channel in the model's order.
        std: what is divided by after that, likewise.
        channels: the order of the channels that the model was trained on; images come as RGB.
        model_layout: of the model's input; "" where its dimensions tell.
    """

    layout: str = "NHWC"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    channels: str = "RGB"
    model_layout: str = ""

    def __post_init__(self) -> None:
        """Refuses what means nothing.

        Raises:
            OptionError: an unknown layout or order, or a division by zero.
        """
        if self.layout not in LAYOUTS or self.model_layout not in (*LAYOUTS, ""):
            raise OptionError(
                f"image layout {self.layout!r} of a model in {self.model_layout!r}: layouts are NCHW and NHWC"
            )
        if self.channels not in CHANNELS:
            raise OptionError(f"image channels {self.channels!r}: give RGB or BGR")
        if self.scale == 0 or 0 in self.std or not self.std or not self.mean:
            raise OptionError(
                f"image with scale {self.scale}, mean {self.mean} and std {self.std}: scale and std divide, so none "
                "may be zero, and mean and std need one number at least"
            )


@dataclasses.dataclass(frozen=True)
class Specialization:
    """What to make of a model; all names are those of the original.

    Attributes:
        dims: sizes of dynamic dimensions, by their name or as `INPUT:AXIS`.
        bind: values that inputs have from now on.
        outputs: what the model shall give, in this order: outputs, or values within the main graph; () for all.
        dtypes: new element types of inputs and outputs.
        layouts: new layouts of inputs and outputs: NHWC for what is NCHW, and the other way round.
        images: inputs that shall take decoded images.
        rename: new names of inputs and outputs.
    """

    dims: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bind: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    layouts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    images: Mapping[str, Image] = dataclasses.field(default_factory=dict)
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __bool__(self) -> bool:
        """Whether anything is wanted."""
        return any(getattr(self, field.name) for field in dataclasses.fields(self))

    def sentences(self) -> tuple[str, ...]:
        """What is wanted, one phrase each."""
        images = [
            f"input {name} takes images: {image.layout}, 0 to 255, / {image.scale:g}, - {list(image.mean)}, "
            f"/ {list(image.std)}, {image.channels}"
            for name, image in self.images.items()
        ]
        return (
            *(f"dimension {name} = {size}" for name, size in self.dims.items()),
            *(f"input {name} = {_shown(value)}" for name, value in self.bind.items()),
            *([f"outputs {', '.join(self.outputs)}"] if self.outputs else []),
            *images,
            *(f"{name} in {dtype}" for name, dtype in self.dtypes.items()),
            *(f"{name} in layout {layout}" for name, layout in self.layouts.items()),
            *(f"{old} is called {new}" for old, new in self.rename.items()),
        )


def _shown(value: object) -> str:
    array = np.asarray(value)
    return (
        str(array.tolist())
        if array.size <= 8
        else f"{array.dtype.name}{list(array.shape)} as given"
    )


def from_texts(  # noqa: PLR0913  one a kind of option, by keyword only
    *,
    dims: Sequence[str] = (),
    bind: Sequence[str] = (),
    outputs: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    layouts: Sequence[str] = (),
    images: Sequence[str] = (),
    rename: Sequence[str] = (),
) -> Specialization:
    """What the options of the command line ask for.

    Raises:
        OptionError: a text is not of its form, or a name is given twice.
    """
    return Specialization(
        dims={k: _size(k, v) for k, v in _pairs("--set-dim", dims, "batch=1").items()},
        bind={k: _value(k, v) for k, v in _pairs("--bind", bind, "mask=1").items()},
        outputs=tuple(n.strip() for text in outputs for n in text.split(",") if n.strip()),
        dtypes=_pairs("--io-dtype", dtypes, "image=float16"),
        layouts=_pairs("--io-layout", layouts, "image=NHWC"),
        images={k: parse_image(k, v) for k, v in _pairs("--image", images, "x=scale=255").items()},
        rename=_pairs("--rename", rename, "input.1=image"),
    )


def _pairs(option: str, texts: Sequence[str], example: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise OptionError(f"{option} {text!r}: give NAME=VALUE, as in {example}")
        if found.get(name, value) != value:
            raise OptionError(f"{option}: {name!r} is {found[name]} and {value}; give it once")
        found[name] = value
    return found


def _size(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise OptionError(f"--set-dim {name}={text}: the size must be a whole number")
    return int(text)


def _value(name: str, text: str) -> Any:  # noqa: ANN401  an array, or what JSON holds
    """A number, a list or a text in JSON, or the array in a file."""
    path = Path(text)
    if path.suffix in (".npy", ".pb"):
        return read_array(name, path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise OptionError(
            f"--bind {name}={text}: give a number, a list such as [1, 0], a text in quotes, or a file .npy or .pb "
            f"({error})"
        ) from error


def read_array(name: str, path: Path) -> Any:  # noqa: ANN401
    """The array in a file .npy or .pb.

    Raises:
        OptionError: it cannot be read.
    """
    try:
        if path.suffix == ".npy":
            with path.open("rb") as file:
                return np.load(file, allow_pickle=False)
        return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes()))
    except (OSError, ValueError, EOFError, TypeError, DecodeError) as error:
        raise OptionError(f"--bind {name}={path}: cannot be read as an array: {error}") from error


def parse_image(name: str, text: str) -> Image:
    """An image input, of `nhwc,scale=255,mean=0.5:0.5:0.5,bgr` or of a preprocessing file `prep.toml`.

    Words: a file of `--preprocess` (.toml); nhwc or nchw (of the new input); rgb or bgr (of the model); scale, mean,
    std; model=nhwc or model=nchw.

    Raises:
        OptionError: a word is unknown.
    """
    held: dict[str, Any] = {}
    for word in (each.strip() for each in text.split(",")):
        key, equals, value = word.partition("=")
        if word.endswith(".toml"):
            held |= _from_file(Path(word))
        elif word.upper() in LAYOUTS:
            held["layout"] = word.upper()
        elif word.upper() in CHANNELS:
            held["channels"] = word.upper()
        elif word in ("uint8", ""):
            continue
        elif key == "model" and value.upper() in LAYOUTS:
            held["model_layout"] = value.upper()
        elif equals and key in ("scale", "mean", "std"):
            numbers = _numbers(name, word, value)
            held[key] = numbers[0] if key == "scale" else numbers
        else:
            raise OptionError(
                f"--image {name}: {word!r} is none of nhwc, nchw, rgb, bgr, scale=S, mean=R:G:B, std=R:G:B, "
                "model=nchw, model=nhwc, FILE.toml"
            )
    return Image(**held)


def _from_file(path: Path) -> dict[str, Any]:
    from graphopt.calibrate.images import load_preprocess, numbers_of  # noqa: PLC0415  seldom asked for

    recipe = load_preprocess(path)
    if recipe.channels == "L":
        raise OptionError(f"--image {path}: grey images (channels = L) have no order; leave it out")
    return {
        "scale": recipe.scale,
        "mean": numbers_of(recipe.mean),
        "std": numbers_of(recipe.std),
        "channels": recipe.channels,
        "model_layout": recipe.layout,
    }


def _numbers(name: str, word: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(":"))
    except ValueError as error:
        raise OptionError(
            f"--image {name}: {word!r}: give numbers with colons between them"
        ) from error


def parse_dtype(name: str, text: str) -> ir.DataType:
    """The element type called `text`, such as float16 or int64.

    Raises:
        OptionError: there is none of that name.
    """
    words = {"float32": "FLOAT", "float64": "DOUBLE"}
    found = ir.DataType.__members__.get(words.get(text.lower(), text.upper()))
    if found is None or found in (ir.DataType.UNDEFINED, ir.DataType.STRING):
        raise OptionError(
            f"{name!r} in {text!r}: no such element type to change to; there are float32, float16, bfloat16, "
            "float64, uint8, int8, int32, int64, bool …"
        )
    return found
