"""config.pbtxt, read back by protobuf's own parser with the field names of Triton's definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    text_format,
)

from graphopt.emit.artefacts import Deployment
from graphopt.emit.golden_set import GoldenSet
from graphopt.emit.profiles import InputProfile
from graphopt.emit.triton import FIELDS, config, max_batch_size
from graphopt.errors import TargetError
from graphopt.runtime.specs import Kind, TensorSpec
from graphopt.targets import get_target

X = TensorSpec("x", ir.DataType.FLOAT, ("batch", 3))
Y = TensorSpec("y", ir.DataType.FLOAT16, ("batch", 2))
PROFILE = InputProfile("x", (1, 3), (4, 3), (8, 3))
GOLDEN = GoldenSet({"x": np.zeros((2, 3), np.float32)}, {}, {})

Field = descriptor_pb2.FieldDescriptorProto
MESSAGES = {
    "input": "ModelInput",
    "output": "ModelOutput",
    "instance_group": "ModelInstanceGroup",
    "dynamic_batching": "ModelDynamicBatching",
    "optimization": "ModelOptimizationPolicy",
    "execution_accelerators": "ExecutionAccelerators",
    "gpu_execution_accelerator": "Accelerator",
    "model_warmup": "ModelWarmup",
}
REPEATED = ("input", "output", "instance_group", "gpu_execution_accelerator", "model_warmup")
INTEGERS = ("max_batch_size", "dims", "count", "preferred_batch_size", "batch_size")
ENUMS = {"data_type": "DataType", "kind": "Kind"}
TYPES = ("TYPE_INVALID", "TYPE_FP16", "TYPE_FP32", "TYPE_INT64")


def model_config() -> Any:
    """The class of a message with the fields that are written, numbered as it comes: text does not depend on it."""
    file = descriptor_pb2.FileDescriptorProto(name="config.proto", package="t", syntax="proto3")
    for name, values in (("DataType", TYPES), ("Kind", ("KIND_AUTO", "KIND_GPU", "KIND_CPU"))):
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for message, fields in FIELDS.items():
        described = file.message_type.add(name=message)
        for number, name in enumerate(fields, 1):
            add_field(described, message, name, number)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))


def add_field(described: Any, message: str, name: str, number: int) -> None:
    field = described.field.add(name=name, number=number, label=Field.LABEL_OPTIONAL)
    is_map = (message, name) in (("Accelerator", "parameters"), ("ModelWarmup", "inputs"))
    if is_map:
        entry = described.nested_type.add(name=f"{name.title()}Entry")
        entry.options.map_entry = True
        entry.field.add(name="key", number=1, label=1, type=Field.TYPE_STRING)
        value = entry.field.add(name="value", number=2, label=1, type=Field.TYPE_STRING)
        if name == "inputs":
            value.type, value.type_name = Field.TYPE_MESSAGE, ".t.WarmupInput"
        field.type_name = f".t.{message}.{entry.name}"
        field.type, field.label = Field.TYPE_MESSAGE, Field.LABEL_REPEATED
    elif name in MESSAGES and message != "ModelWarmup":
        field.type, field.type_name = Field.TYPE_MESSAGE, f".t.{MESSAGES[name]}"
        field.label = Field.LABEL_REPEATED if name in REPEATED else Field.LABEL_OPTIONAL
    elif name in ENUMS:
        field.type, field.type_name = Field.TYPE_ENUM, f".t.{ENUMS[name]}"
    elif name in INTEGERS:
        field.type = Field.TYPE_INT64
        many = name in ("dims", "preferred_batch_size")
        field.label = Field.LABEL_REPEATED if many else Field.LABEL_OPTIONAL
    else:
        field.type = Field.TYPE_STRING


def parsed(made: Deployment) -> Any:
    return text_format.Parse(config(made), model_config()())


def deployment(target: str, *specs: TensorSpec, golden: GoldenSet | None = GOLDEN) -> Deployment:
    inputs, outputs = (specs or (X, Y))[:-1], (specs or (X, Y))[-1:]
    return Deployment(get_target(target), inputs, outputs, (PROFILE,), golden)


def test_a_shared_first_dimension_is_the_batch() -> None:
    read = parsed(deployment("cpu"))
    assert (read.name, read.backend, read.max_batch_size) == ("model", "onnxruntime", 8)
    assert list(read.input[0].dims) == [3]
    assert (read.input[0].data_type, read.output[0].data_type) == (2, 1)
    assert list(read.dynamic_batching.preferred_batch_size) == [8]
    assert read.instance_group[0].kind == 2
    assert list(read.model_warmup[0].inputs["x"].dims) == [3]
    assert read.model_warmup[0].batch_size == 2


def test_other_models_state_every_dimension() -> None:
    alone = TensorSpec("y", ir.DataType.INT64, (None,))
    made = deployment("cuda", X, alone)
    read = parsed(made)
    assert max_batch_size(made) == 0
    assert list(read.input[0].dims) == [-1, 3]
    assert read.instance_group[0].kind == 1
    assert not read.HasField("dynamic_batching")


def test_tensorrt_serves_a_plan() -> None:
    read = parsed(deployment("tensorrt", golden=None))
    assert (read.platform, read.default_model_filename) == ("tensorrt_plan", "model.plan")
    assert not read.model_warmup


def test_the_tensorrt_provider_is_an_accelerator_with_its_options() -> None:
    read = parsed(deployment("ort-tensorrt"))
    accelerator = read.optimization.execution_accelerators.gpu_execution_accelerator[0]
    assert accelerator.name == "tensorrt"
    assert accelerator.parameters["trt_profile_max_shapes"] == "x:8x3"
    assert accelerator.parameters["trt_fp16_enable"] == "0"


def test_names_are_quoted() -> None:
    odd = TensorSpec('x"\n', ir.DataType.FLOAT, (1,))
    assert parsed(deployment("cpu", odd, Y, golden=None)).input[0].name == 'x"\n'


@pytest.mark.parametrize(
    "spec",
    [
        TensorSpec("s", ir.DataType.FLOAT, (1,), Kind.SEQUENCE),
        TensorSpec("s", ir.DataType.FLOAT, None),
        TensorSpec("s", ir.DataType.INT4, (1,)),
    ],
)
def test_what_triton_has_no_type_for(spec: TensorSpec) -> None:
    with pytest.raises(TargetError, match="Triton has no type"):
        config(deployment("cpu", spec, Y, golden=None))
