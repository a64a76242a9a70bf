"""A Triton model repository: config.pbtxt, the model, warm-up from the golden inputs.

Field names are those of `ModelConfig` in triton-inference-server/common, protobuf/model_config.proto (BSD-3-Clause), at
83adf7cf88a2f343005974dff3728be746de2d66.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from graphopt.emit.artefacts import CPU, CUDA, Deployment, providers
from graphopt.errors import TargetError
from graphopt.runtime.specs import Kind, TensorSpec

FIELDS: Mapping[str, tuple[str, ...]] = {
    "ModelConfig": (
        "name",
        "platform",
        "backend",
        "max_batch_size",
        "input",
        "output",
        "instance_group",
        "dynamic_batching",
        "optimization",
        "parameters",
        "model_warmup",
        "default_model_filename",
    ),
    "ModelInput": ("name", "data_type", "dims"),
    "ModelOutput": ("name", "data_type", "dims"),
    "ModelInstanceGroup": ("count", "kind"),
    "ModelDynamicBatching": ("preferred_batch_size",),
    "ModelOptimizationPolicy": ("execution_accelerators",),
    "ExecutionAccelerators": ("gpu_execution_accelerator",),
    "Accelerator": ("name", "parameters"),
    "ModelParameter": ("string_value",),
    "ModelWarmup": ("name", "batch_size", "inputs"),
    "WarmupInput": ("data_type", "dims", "input_data_file"),
}
"""The messages that are written, and their fields."""

_TYPES = {
    "BOOL": "TYPE_BOOL",
    "UINT8": "TYPE_UINT8",
    "UINT16": "TYPE_UINT16",
    "UINT32": "TYPE_UINT32",
    "UINT64": "TYPE_UINT64",
    "INT8": "TYPE_INT8",
    "INT16": "TYPE_INT16",
    "INT32": "TYPE_INT32",
    "INT64": "TYPE_INT64",
    "FLOAT16": "TYPE_FP16",
    "FLOAT": "TYPE_FP32",
    "DOUBLE": "TYPE_FP64",
    "STRING": "TYPE_STRING",
    "BFLOAT16": "TYPE_BF16",
}
NAME = "model"


class Word(str):
    """An enumerator: written without quotes."""

    __slots__ = ()


Message: TypeAlias = "list[tuple[str, Any]]"


def write_repository(made: Deployment, folder: Path, model: Path) -> None:
    """Writes `folder/model/`: the configuration, version 1 and the warm-up data.

    Raises:
        TargetError: an input or output is no tensor that Triton has a type for.
    """
    place = folder / NAME
    (place / "1").mkdir(parents=True)
    (place / "config.pbtxt").write_text(config(made), encoding="utf-8")
    if made.target.provider is None and made.target.artefacts:
        (place / "1" / "README").write_text(
            "Build model.plan with build.sh on the machine that serves, and put it here.\n",
            encoding="utf-8",
        )
    else:
        for file in sorted(model.parent.glob(f"{model.name}*")):
            (place / "1" / file.name).hardlink_to(file)
    for name, value in _warm(made).items():
        (place / "warmup").mkdir(exist_ok=True)
        (place / "warmup" / name).write_bytes(np.ascontiguousarray(value).tobytes())


def config(made: Deployment) -> str:
    """The text of config.pbtxt."""
    target = made.target
    is_plan = target.provider is None and bool(target.artefacts)
    batch = max_batch_size(made)
    body: Message = [("name", NAME)]
    body += [("platform", "tensorrt_plan")] if is_plan else [("backend", "onnxruntime")]
    body += [("default_model_filename", "model.plan" if is_plan else "model.onnx")]
    body += [("max_batch_size", batch)]
    fed = tuple(spec for spec in made.inputs if not spec.overridable)
    body += [("input", _tensor(spec, batch)) for spec in fed]
    body += [("output", _tensor(spec, batch)) for spec in made.outputs]
    kind = "KIND_CPU" if target.provider == CPU else "KIND_GPU"
    body += [("instance_group", [("count", 1), ("kind", Word(kind))])]
    if batch:
        body += [("dynamic_batching", [("preferred_batch_size", [batch])])]
    accelerator = _accelerator(made)
    if accelerator:
        body += [("optimization", [("execution_accelerators", accelerator)])]
    warm = _warm(made)
    if warm:
        body += [("model_warmup", _warmup(made, warm, batch))]
    return "".join(_lines(body, ""))


def max_batch_size(made: Deployment) -> int:
    """The largest first dimension, where inputs and outputs share it under one name and have a range for it; else 0."""
    specs = (*(s for s in made.inputs if not s.overridable), *made.outputs)
    firsts = {spec.shape[0] if spec.shape else None for spec in specs}
    if len(firsts) != 1 or not isinstance(next(iter(firsts)), str):
        return 0
    most = {each.most[0] for each in made.profiles}
    return most.pop() if len(most) == 1 else 0


def _tensor(spec: TensorSpec, batch: int) -> Message:
    dims = spec.shape
    if spec.kind is not Kind.TENSOR or dims is None or spec.dtype.name not in _TYPES:
        raise TargetError(
            f"Triton has no type for {spec.name!r} ({spec}): leave out the model repository, or export tensors of "
            "known rank"
        )
    kept = dims[1:] if batch else dims
    sizes = [dim if isinstance(dim, int) else -1 for dim in kept]
    return [("name", spec.name), ("data_type", Word(_TYPES[spec.dtype.name])), ("dims", sizes)]


def _accelerator(made: Deployment) -> Message:
    if made.target.provider in (None, CPU, CUDA):
        return []
    options = providers(made)[0][1]
    parameters = [
        ("parameters", [("key", name), ("value", str(value))]) for name, value in options.items()
    ]
    return [("gpu_execution_accelerator", [("name", "tensorrt"), *parameters])]


def _warm(made: Deployment) -> dict[str, Any]:
    """Golden inputs that can warm up: plain tensors with names that are file names."""
    golden = made.golden.inputs if made.golden is not None else {}
    plain = {
        name: value
        for name, value in golden.items()
        if isinstance(value, np.ndarray) and value.dtype.kind != "O" and "/" not in name
    }
    return plain if len(plain) == len(golden) else {}


def _warmup(made: Deployment, warm: Mapping[str, Any], batch: int) -> Message:
    types = {spec.name: _TYPES.get(spec.dtype.name, "TYPE_INVALID") for spec in made.inputs}
    rows = next(iter(warm.values())).shape[0] if batch else 1
    body: Message = [("name", "golden"), ("batch_size", min(rows, batch) if batch else 0)]
    for name, value in warm.items():
        dims = list(value.shape[1:] if batch else value.shape)
        held: Message = [
            ("data_type", Word(types[name])),
            ("dims", dims),
            ("input_data_file", name),
        ]
        body.append(("inputs", [("key", name), ("value", held)]))
    return body


def _lines(body: Message, pad: str) -> list[str]:
    """Protobuf text format."""
    lines: list[str] = []
    for name, value in body:
        if isinstance(value, list) and value and isinstance(value[0], tuple):
            lines += [f"{pad}{name} {{\n", *_lines(value, pad + "  "), f"{pad}}}\n"]
        elif isinstance(value, list):
            lines.append(f"{pad}{name}: [ {', '.join(map(str, value))} ]\n")
        else:
            lines.append(f"{pad}{name}: {_scalar(value)}\n")
    return lines


def _scalar(value: object) -> str:
    if isinstance(value, Word) or not isinstance(value, str):
        return str(value)
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
