"""Images as inputs, by a preprocessing file in TOML.

resize = 256            # shorter side; [height, width] for both sides
crop = 224              # centre crop; a number or [height, width]
scale = 255             # divide by this, then subtract `mean`, then divide by `std`
mean = [0.485, 0.456, 0.406]   # one number a channel, or one for all
std = [0.229, 0.224, 0.225]
layout = "NCHW"         # or "NHWC"
channels = "RGB"        # or "BGR", "L" for grey
input = "image"         # which input, where the model has several
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np

from graphopt.errors import DataError, OptionError
from graphopt.runtime.specs import TensorSpec
from graphopt.verify.feed_files import Feed, check_feed, natural_order

if TYPE_CHECKING:
    from PIL import Image

Array: TypeAlias = "np.ndarray[Any, Any]"
Size: TypeAlias = int | tuple[int, int] | None
Numbers: TypeAlias = float | tuple[float, ...]

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}
)


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an image becomes an input; see the module for what each field means."""

    resize: Size = None
    crop: Size = None
    scale: float = 1.0
    mean: Numbers = 0.0
    std: Numbers = 1.0
    layout: str = "NCHW"
    channels: str = "RGB"
    input: str = ""


def load_preprocess(path: Path) -> Preprocess:
    """Reads a preprocessing file.

    Raises:
        OptionError: it cannot be read, or says something unknown or impossible.
    """
    try:
        recipe = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Preprocess)
    except (OSError, ValueError, msgspec.ValidationError) as error:
        known = ", ".join(Preprocess.__struct_fields__)
        raise OptionError(
            f"the preprocessing file '{path}' cannot be used: {error}; it may say {known}"
        ) from error
    if wrong := _wrong(recipe):
        raise OptionError(f"the preprocessing file '{path}' {wrong}")
    return recipe


def _wrong(recipe: Preprocess) -> str:
    """What is impossible in a recipe, and the remedy; nothing where all is well."""
    if recipe.layout not in ("NCHW", "NHWC") or recipe.channels not in ("RGB", "BGR", "L"):
        return (
            f"says layout {recipe.layout!r} and channels {recipe.channels!r}; layout is NCHW or NHWC, channels are "
            "RGB, BGR or L"
        )
    for name, size in (("resize", recipe.resize), ("crop", recipe.crop)):
        if size is not None and min(_pair(size)) < 1:
            return f"says {name} = {size}: sizes are 1 or more"
    count = 1 if recipe.channels == "L" else 3
    for name, given in (("scale", recipe.scale), ("mean", recipe.mean), ("std", recipe.std)):
        numbers = numbers_of(given)
        if not all(map(math.isfinite, numbers)):
            return f"says {name} = {given}: give finite numbers"
        if len(numbers) not in (1, count):
            return f"says {name} of {len(numbers)} numbers for {count} channels: give one for all or one a channel"
    if recipe.scale == 0 or 0 in numbers_of(recipe.std):
        return "divides by zero: check scale and std"
    return ""


def numbers_of(given: Numbers) -> tuple[float, ...]:
    """One number for all channels, or one a channel."""
    return given if isinstance(given, tuple) else (given,)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def images_in(source: Path) -> list[Path]:
    """The images of a folder and the folders in it, in natural order; a file that is one; else none.

    Hidden files are none: some systems leave some beside each image, under names like its own.
    """
    if not source.is_dir():
        return [source] if source.suffix.lower() in IMAGE_SUFFIXES else []
    found = (
        path.relative_to(source)
        for path in source.rglob("*")
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.is_dir()
    )
    shown = (path for path in found if not any(part.startswith(".") for part in path.parts))
    ordered = sorted(shown, key=lambda path: [natural_order(Path(part)) for part in path.parts])
    return [source / path for path in ordered]


def image_feeds(
    paths: Sequence[Path], recipe: Preprocess, specs: Sequence[TensorSpec], notes: dict[str, None]
) -> Iterator[Feed]:
    """Images as samples: one each, or as many as the model takes at a time; those that are left over are noted.

    Raises:
        OptionError: nothing says which input they feed.
        DataError: one cannot be read or does not fit, or they are too few.
    """
    spec = _fed(recipe, specs)
    size = spec.shape[0] if spec.shape is not None and len(spec.shape) == 4 else 1
    size = size if isinstance(size, int) and size > 0 else 1
    if len(paths) < size:
        raise DataError(
            f"the input '{spec.name}' takes {size} images at a time ({spec}), and there are {len(paths)}: give "
            f"at least {size}"
        )
    if left := len(paths) % size:
        notes[
            f"the last {left} of {len(paths)} images are left out: the model takes {size} at a time"
        ] = None
    for start in range(0, len(paths) - size + 1, size):
        arrays = [_image_input(path, recipe, spec) for path in paths[start : start + size]]
        array = arrays[0] if size == 1 else np.concatenate(arrays)
        yield check_feed(Feed(str(paths[start]), {spec.name: array}), specs)


def _fed(recipe: Preprocess, specs: Sequence[TensorSpec]) -> TensorSpec:
    """The input that images feed."""
    required = [spec for spec in specs if not spec.overridable]
    name = recipe.input or (required[0].name if len(required) == 1 else "")
    spec = next((spec for spec in required if spec.name == name), None)
    if spec is None:
        raise OptionError(
            f'the preprocessing file must name the input that images feed (input = "…"): the model has '
            f"{', '.join(repr(spec.name) for spec in required)}"
        )
    return spec


def _image_input(path: Path, recipe: Preprocess, spec: TensorSpec) -> Array:
    """An image as the input wants it: in its dtype, and without a leading axis where it has three."""
    pixels = read_image(path, recipe)
    array = pixels[0] if spec.shape is not None and len(spec.shape) == 3 else pixels
    if spec.shape is not None and not _fits(array.shape, spec.shape):
        raise DataError(
            f"'{path}' becomes {list(array.shape)} by the preprocessing file, and the input '{spec.name}' must be "
            f"{spec}: change its resize, crop, layout or channels"
        )
    if spec.dtype.is_floating_point():
        return array.astype(spec.dtype.numpy())
    wanted = spec.dtype.numpy()
    if not spec.dtype.is_integer():
        raise DataError(
            f"'{path}' cannot feed the input '{spec.name}' ({spec}): images are numbers"
        )
    whole = np.rint(array)
    bounds = np.iinfo(wanted)
    # A resized picture has whole numbers; what was scaled or shifted has not, or falls below zero.
    if (
        (np.abs(array - whole) > _WHOLE).any()
        or whole.min() < bounds.min
        or whole.max() > bounds.max
    ):
        raise DataError(
            f"'{path}' becomes numbers from {array.min():.4g} to {array.max():.4g} by the preprocessing file, and the "
            f"input '{spec.name}' takes whole ones from {bounds.min} to {bounds.max} ({spec}): leave scale, mean "
            "and std out"
        )
    return whole.astype(wanted)


_WHOLE = 1e-3
"""How far from a whole number a pixel may be."""


def _fits(shape: Sequence[int], wanted: Sequence[int | str | None]) -> bool:
    """Whether an image fits, whatever the size of its batch."""
    first = 1 if len(wanted) == 4 else 0
    return len(shape) == len(wanted) and all(
        not isinstance(d, int) or d == n for d, n in zip(wanted[first:], shape[first:], strict=True)
    )


def read_image(path: Path, recipe: Preprocess) -> Array:
    """The image as a float32 input with a leading axis of 1.

    Raises:
        OptionError: pillow is not installed.
        DataError: the file is no image.
    """
    try:
        from PIL import Image, ImageOps  # noqa: PLC0415  an extra: only who calibrates on images needs it
    except ImportError as error:
        raise OptionError(
            "calibration on images needs pillow: pip install 'graphopt[images]'"
        ) from error
    mode = "L" if recipe.channels == "L" else "RGB"
    try:
        with Image.open(path) as opened:
            # A camera's file may lie on its side and say so; viewers, and what reads it later, turn it.
            upright = ImageOps.exif_transpose(opened)
            grey = _bytes_of(upright, opened.format, path)
            image = (upright if grey is None else Image.fromarray(grey)).convert(mode)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"'{path}' cannot be read as an image: {error}; remove it, or save it anew"
        ) from error
    if recipe.resize is not None:
        image = image.resize(_resized(image.size, recipe.resize), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, np.float32)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if recipe.channels == "BGR":
        pixels = pixels[..., ::-1]
    if recipe.crop is not None:
        pixels = _cropped(pixels, recipe.crop, path)
    mean, std = np.array(recipe.mean, np.float32), np.array(recipe.std, np.float32)
    scaled = (pixels / np.float32(recipe.scale) - mean) / std
    moved = scaled.transpose(2, 0, 1) if recipe.layout == "NCHW" else scaled
    return np.ascontiguousarray(moved[None], np.float32)


def _bytes_of(image: Image.Image, kind: str | None, path: Path) -> Array | None:
    """Pixels of 16 bits as their upper byte, None of others: by itself, what is beyond 255 would become white.

    Raises:
        DataError: pixels are floats or of 32 bits, of which nothing says what is white.
    """
    if image.mode.startswith("I;16") or (image.mode, kind) == ("I", "PNG"):
        return (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise DataError(
            f"'{path}' has pixels of mode '{image.mode}', of which nothing says what is white: give 8 or 16 bits, or "
            "arrays as .npz"
        )
    return None


def _resized(size: tuple[int, int], wanted: int | tuple[int, int]) -> tuple[int, int]:
    """Width and height: both given, or the shorter side given."""
    if not isinstance(wanted, int):
        return wanted[1], wanted[0]
    ratio = wanted / min(size)
    return max(wanted, round(size[0] * ratio)), max(wanted, round(size[1] * ratio))


def _cropped(pixels: Array, wanted: int | tuple[int, int], path: Path) -> Array:
    height, width = _pair(wanted)
    if pixels.shape[0] < height or pixels.shape[1] < width:
        raise DataError(
            f"'{path}' is {pixels.shape[0]} x {pixels.shape[1]} after resizing, smaller than the crop of "
            f"{height} x {width}; resize to at least that"
        )
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
