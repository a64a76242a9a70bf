"""The test models that ship with onnx: node cases made in memory, converted models on disk."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.backend.test
import onnx.numpy_helper


@dataclasses.dataclass(frozen=True)
class Case:
    """One model with the inputs to run it on.

    Attributes:
        name: of the test.
        model: the model.
        feeds: per data set, the inputs by name; empty where the case brings none.
    """

    name: str
    model: onnx.ModelProto
    feeds: tuple[dict[str, Any], ...]


@functools.cache
def node_cases() -> dict[str, Case]:
    """The single-operator cases of `onnx.backend.test`, over 1 800 of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases  # noqa: PLC0415  warns

        return {case.name: _node_case(case) for case in collect_testcases(None)}


def _node_case(case: Any) -> Case:
    names = [info.name for info in case.model.graph.input]
    feeds = tuple(dict(zip(names, inputs, strict=False)) for inputs, _ in case.data_sets or ())
    return Case(case.name, case.model, feeds)


def disk_folders() -> list[Path]:
    """Folders of the converted models that come with the wheel, with real small weights."""
    root = Path(onnx.backend.test.__file__).parent / "data"
    kinds = ("simple", "pytorch-converted", "pytorch-operator")
    return sorted(path.parent for kind in kinds for path in (root / kind).glob("*/model.onnx"))


def light_files() -> list[Path]:
    """Real topologies whose weights are made by ConstantOfShape: folding them naively grows 9 kB to 575 MB."""
    root = Path(onnx.backend.test.__file__).parent / "data" / "light"
    return sorted(root.glob("*.onnx"))


def disk_case(folder: Path) -> Case:
    """A model on disk with its data sets."""
    model = onnx.load(str(folder / "model.onnx"))
    held = {tensor.name for tensor in model.graph.initializer}
    wanted = [info for info in model.graph.input if info.name not in held]
    feeds = []
    for data in sorted(folder.glob("test_data_set_*")):
        files = sorted(data.glob("input_*.pb"), key=lambda p: int(p.stem.split("_")[1]))
        feeds.append({i.name: _read(f, i) for i, f in zip(wanted, files, strict=False)})
    return Case(folder.name, model, tuple(feeds))


def _read(file: Path, info: onnx.ValueInfoProto) -> Any:
    data = file.read_bytes()
    kind = info.type.WhichOneof("value")
    if kind == "sequence_type":
        return onnx.numpy_helper.to_list(onnx.SequenceProto.FromString(data))
    if kind == "optional_type":
        return onnx.numpy_helper.to_optional(onnx.OptionalProto.FromString(data))
    return onnx.numpy_helper.to_array(onnx.TensorProto.FromString(data))


def as_feed(values: dict[str, Any]) -> dict[str, Any]:
    """Inputs as ONNX Runtime takes them: arrays of at least 0 dims, lists for sequences."""
    return {
        name: value if isinstance(value, Sequence | dict) or value is None else np.asarray(value)
        for name, value in values.items()
    }
