"""How inputs and outputs of a specialised model stand to those of the original, to run both on the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

Array: TypeAlias = "np.ndarray[Any, Any]"


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What the original's caller did to an image: `(x / scale - mean) / std`, with the channels on `axis`."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    axis: int
    reverse: bool

    def __call__(self, image: Array) -> Array:
        """The image as the original takes it, in float64; channels stay where they are."""
        wide = [1] * image.ndim
        wide[self.axis] = -1
        mean = np.asarray(self.mean, np.float64).reshape(wide)
        std = np.asarray(self.std, np.float64).reshape(wide)
        pixels = image.astype(np.float64)
        ordered = np.flip(pixels, self.axis) if self.reverse else pixels
        return np.asarray((ordered / self.scale - mean) / std)


@dataclasses.dataclass(frozen=True)
class InputPort:
    """One input of the specialised model.

    Attributes:
        name: what it is called now.
        original: what the original calls it.
        dtype: the original's element type, where it was changed.
        scaling: what was folded into the model.
        perm: axes of the original, as axes of what is fed now; None where the layout is the same.
    """

    name: str
    original: str
    dtype: ir.DataType | None = None
    scaling: Scaling | None = None
    perm: tuple[int, ...] | None = None

    def to_original(self, value: Any) -> Any:  # noqa: ANN401  arrays, lists, None
        """What the original is fed in the place of `value`."""
        if self.scaling is not None:
            value = self.scaling(value)
        if self.dtype is not None:
            value = np.asarray(value).astype(self.dtype.numpy())
        return value if self.perm is None else np.ascontiguousarray(value.transpose(self.perm))


@dataclasses.dataclass(frozen=True)
class OutputPort:
    """One output of the specialised model; attributes as of an input, `perm` and `dtype` lead to it."""

    name: str
    original: str
    dtype: ir.DataType | None = None
    perm: tuple[int, ...] | None = None

    def from_original(self, value: Any) -> Any:  # noqa: ANN401
        """What the specialised model gives where the original gives `value`."""
        if self.perm is not None:
            value = np.ascontiguousarray(value.transpose(self.perm))
        return value if self.dtype is None else np.asarray(value).astype(self.dtype.numpy())


@dataclasses.dataclass(frozen=True)
class Plan:
    """All of them, and what inputs are bound to.

    Attributes:
        inputs: of the specialised model, in order; defaults that may be overridden are among them.
        outputs: likewise.
        bound: values of inputs that are no more, by the original's name.
    """

    inputs: tuple[InputPort, ...]
    outputs: tuple[OutputPort, ...]
    bound: Mapping[str, Any]

    def to_original(self, feed: Mapping[str, Any]) -> dict[str, Any]:
        """What the original is fed where the specialised model is fed `feed`."""
        ports = {port.name: port for port in self.inputs}
        given = {ports[n].original: ports[n].to_original(value) for n, value in feed.items()}
        return {**given, **self.bound}

    def from_original(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """What the specialised model gives where the original gives `outputs`."""
        return {port.name: port.from_original(outputs[port.original]) for port in self.outputs}
