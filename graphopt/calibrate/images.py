"""Images as inputs, by a preprocessing file in TOML.

resize = 256            # shorter side; [height, width] for both sides
crop = 224              # centre crop; a number or [height, width]
scale = 255             # divide by this, then subtract `mean`, then divide by `std`
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
layout = "NCHW"         # or "NHWC"
channels = "RGB"        # or "BGR", "L" for grey
input = "image"         # which input, where the model has several
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
import numpy as np

from graphopt.errors import DataError, OptionError

if TYPE_CHECKING:
    from PIL import Image

Array: TypeAlias = "np.ndarray[Any, Any]"
Size: TypeAlias = int | tuple[int, int] | None

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})


class Preprocess(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an image becomes an input; see the module for what each field means."""

    resize: Size = None
    crop: Size = None
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: str = "NCHW"
    channels: str = "RGB"
    input: str = ""


def load_preprocess(path: Path) -> Preprocess:
    """Reads a preprocessing file.

    Raises:
        OptionError: it cannot be read, or says something unknown.
    """
    try:
        recipe = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), Preprocess)
    except (OSError, ValueError, msgspec.ValidationError) as error:
        known = ", ".join(Preprocess.__struct_fields__)
        raise OptionError(
            f"the preprocessing file '{path}' cannot be used: {error}; it may say {known}"
        ) from error
    if recipe.layout not in ("NCHW", "NHWC") or recipe.channels not in ("RGB", "BGR", "L"):
        raise OptionError(
            f"the preprocessing file '{path}' says layout {recipe.layout!r} and channels {recipe.channels!r}; "
            "layout is NCHW or NHWC, channels are RGB, BGR or L"
        )
    if recipe.scale == 0 or 0 in recipe.std:
        raise OptionError(f"the preprocessing file '{path}' divides by zero: check scale and std")
    return recipe


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
        raise DataError(f"'{path}' cannot be read as an image: {error}") from error
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
    height, width = (wanted, wanted) if isinstance(wanted, int) else wanted
    if pixels.shape[0] < height or pixels.shape[1] < width:
        raise DataError(
            f"'{path}' is {pixels.shape[0]} x {pixels.shape[1]} after resizing, smaller than the crop of "
            f"{height} x {width}; resize to at least that"
        )
    top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
    return pixels[top : top + height, left : left + width]
