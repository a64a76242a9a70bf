"""Golden inputs and outputs of a bundle, in the layout of ONNX's backend tests, and raw for trtexec."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.runtime.specs import Kind, TensorSpec
from graphopt.verify.golden_files import write_value

DATA_SET = "golden/test_data_set_0"
RAW = "golden/raw"


@dataclasses.dataclass(frozen=True)
class GoldenSet:
    """One run of the original model.

    Attributes:
        inputs: by name, in the order of the model's inputs.
        outputs: by name, in the order of its outputs; those that cannot be compared are left out.
        tolerance: by output: what max|d| / RMS of a right result stays below; None where only bits may agree.
    """

    inputs: Mapping[str, Any]
    outputs: Mapping[str, Any]
    tolerance: Mapping[str, float | None]

    def write(self, folder: Path, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
        """Writes the set below `folder`; returns what the manifest says of it."""
        place = folder / DATA_SET
        place.mkdir(parents=True)
        listing: dict[str, Any] = {"folder": DATA_SET, "inputs": [], "outputs": []}
        for kind, values in (("input", self.inputs), ("output", self.outputs)):
            for index, (name, value) in enumerate(values.items()):
                file = f"{kind}_{index}.pb"
                spec = specs.get(name)
                write_value(place / file, name, value, spec.kind if spec else Kind.TENSOR)
                entry: dict[str, Any] = {"name": name, "file": file}
                if kind == "output":
                    entry["max_over_rms"] = self.tolerance.get(name)
                listing[f"{kind}s"].append(entry)
        return listing

    def write_raw(self, folder: Path) -> None:
        """Writes every plain tensor as the bytes of its elements, row-major, little-endian."""
        place = folder / RAW
        place.mkdir(parents=True)
        for kind, values in (("input", self.inputs), ("output", self.outputs)):
            for index, value in enumerate(values.values()):
                if isinstance(value, np.ndarray) and value.dtype.kind != "O":
                    array = np.ascontiguousarray(value)
                    (place / f"{kind}_{index}.bin").write_bytes(array.tobytes())

    def raw_files(self, kind: str) -> str:
        """`x:golden/raw/input_0.bin,…` for trtexec; `kind` is input or output."""
        values = self.inputs if kind == "input" else self.outputs
        return ",".join(f"{name}:{RAW}/{kind}_{i}.bin" for i, name in enumerate(values))
