"""What NVIDIA's ONNX parser says to single-operator models, model by model; it needs no GPU.

    python -m benchmarks.parser_verdicts LIBRARIES OUT.json [--from FOLDER …] [--whole]

LIBRARIES is a folder with the unpacked wheels `onnxruntime-ep-nv-tensorrt-rtx-cu13` (the libraries) and
`tensorrt-rtx-cu13-bindings` (their Python module), from PyPI; NVIDIA's licence is in them.  Tried are the node tests of
onnx with one node: as they are, with inputs after the first made initializers, and both with float32 turned into
float16, bfloat16 and float64; with --from, every node of the models in the folders instead, each kind once, which the
rules were not made with; with --whole, those models as they are.  Prints how often the static check agrees.
"""

from __future__ import annotations

import argparse
import collections
import ctypes
import importlib
import json
import multiprocessing
import sys
import zlib
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.checker
import onnx.numpy_helper
import onnx.shape_inference
import onnx_ir as ir
from google.protobuf.message import (  # type: ignore[import-untyped, unused-ignore]
    DecodeError,
)

from benchmarks.agreement import cases, said_of_nodes, with_initializers
from graphopt.errors import GraphoptError
from graphopt.ir import operators, values
from graphopt.ir.model_file import load_model
from graphopt.ir.shapes import Shapes
from graphopt.targets import get_target

ORDER = ("libcudart", "libtensorrt_rtx", "libtensorrt_onnxparser_rtx")
FLOATS = {
    "fp16": (onnx.TensorProto.FLOAT16, np.float16),
    "bf16": (onnx.TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "fp64": (onnx.TensorProto.DOUBLE, np.float64),
}
SECONDS = 60
MAX_ELEMENTS = 1 << 20
"""Of a constant that goes into a model of one node."""


def models() -> Iterator[tuple[str, str, onnx.ModelProto]]:
    """Name, operator and model of everything that is tried."""
    for name, model, feeds in cases():
        if len(model.graph.node) != 1:
            continue
        op = model.graph.node[0].op_type
        for form, made in (("", model), ("+init", with_initializers(model, feeds))):
            if made is None:
                continue
            fits = onnx.ModelProto()
            fits.CopyFrom(made)
            fits.opset_import[0].version = min(fits.opset_import[0].version, 26)
            yield name + form, op, fits
            for word in FLOATS:
                other = in_float(fits, word)
                if other is not None:
                    yield f"{name}{form}+{word}", op, other


def nodes_of(paths: Sequence[Path]) -> Iterator[tuple[str, str, onnx.ModelProto]]:
    """Each node of the models as a model of its own, with its constants; alike ones once."""
    seen: set[bytes] = set()
    for path in paths:
        try:
            whole = load_model(path)
            shapes = Shapes(whole)
        except GraphoptError:
            continue
        for node in whole.graph:
            made = _alone(whole, node, shapes)
            if made is None:
                continue
            key = made.SerializeToString()
            if key not in seen:
                seen.add(key)
                yield f"{path.stem}/{len(seen)}/{node.op_type}", node.op_type, made


def _alone(whole: ir.Model, node: ir.Node, shapes: Shapes) -> onnx.ModelProto | None:
    """The node in a model, its values under names of their own; None where a type is not known or it has subgraphs."""
    if operators.has_subgraph(node) or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type in ("Constant", "Identity"):
        return None
    named = {value: f"v{i}" for i, value in enumerate(dict.fromkeys(v for v in node.inputs if v))}
    named |= {value: f"o{i}" for i, value in enumerate(node.outputs) if value.name}
    proto = ir.serde.serialize_node(node)
    proto.name = node.op_type
    proto.input[:] = [named[v] if v is not None else "" for v in node.inputs]
    proto.output[:] = [named.get(v, "") for v in node.outputs]
    model = onnx.ModelProto(ir_version=10)
    model.opset_import.add(
        version=whole.opset_imports.get("", whole.opset_imports.get("ai.onnx", 17))
    )
    model.graph.name = "one"
    model.graph.node.append(proto)
    for value, name in named.items():
        tensor = values.constant(value)
        if tensor is not None and tensor.size <= MAX_ELEMENTS:
            array = np.ascontiguousarray(tensor.numpy())
            model.graph.initializer.append(ir.serde.serialize_tensor(ir.Tensor(array, name=name)))
            continue
        dtype, dims = shapes.dtype(value), shapes.dims(value)
        if dtype is None or dims is None:
            return None
        info = model.graph.output.add() if name.startswith("o") else model.graph.input.add()
        info.name = name
        info.type.tensor_type.elem_type = int(dtype)
        info.type.tensor_type.shape.SetInParent()
        for dim in dims:
            entry = info.type.tensor_type.shape.dim.add()
            if dim.value is not None:
                entry.dim_value = dim.value
            else:
                entry.dim_param = str(dim) if str(dim).isidentifier() else "d"
    return model


def whole_models(paths: Sequence[Path]) -> Iterator[tuple[str, str, onnx.ModelProto]]:
    """The models as they are; those with external data are left out."""
    for path in paths:
        try:
            model = onnx.load(path, load_external_data=False)
        except DecodeError:
            continue
        if all(t.data_location != onnx.TensorProto.EXTERNAL for t in model.graph.initializer):
            yield str(path), "", model


def in_float(model: onnx.ModelProto, word: str) -> onnx.ModelProto | None:
    """The model with float32 inputs, outputs and initializers in another float; None where it has none."""
    kind, dtype = FLOATS[word]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    changed = False
    for info in (*copy.graph.input, *copy.graph.output):
        if info.type.tensor_type.elem_type == onnx.TensorProto.FLOAT:
            info.type.tensor_type.elem_type = kind
            changed = True
    for tensor in copy.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            array = onnx.numpy_helper.to_array(tensor).astype(dtype)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
            changed = True
    try:
        onnx.checker.check_model(copy, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError):
        return None  # ONNX knows no such types there
    return copy if changed else None


def load_parser(folder: Path) -> Any:  # noqa: ANN401  a module without types
    """The Python module of TensorRT-RTX, with its libraries loaded."""
    for word in ORDER:
        (path,) = folder.rglob(f"{word}.so*")
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    (bindings,) = folder.glob("tensorrt_rtx_bindings")
    sys.path.insert(0, str(bindings.parent))
    return importlib.import_module(bindings.name)


def serve(folder: Path, pipe: Connection) -> None:
    """Parses what comes through the pipe; a parser may crash, so it has a process of its own."""
    trt = load_parser(folder)
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(log)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    while True:
        data = pipe.recv_bytes()
        network = builder.create_network(flags)
        parser = trt.OnnxParser(network, log)
        taken = parser.parse(data)
        words = (
            ""
            if taken
            else " | ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        )
        pipe.send((bool(taken), words[:300]))


class Parser:
    """The parser in its process, started anew after a crash."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._start()

    def _start(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(
            target=serve, args=(self.folder, theirs), daemon=True
        )
        self.process.start()
        theirs.close()

    def verdict(self, model: onnx.ModelProto) -> tuple[bool, str]:
        """Whether the parser takes the model, and its words."""
        try:
            self.pipe.send_bytes(model.SerializeToString())
            if self.pipe.poll(SECONDS):
                found: tuple[bool, str] = self.pipe.recv()
                return found
            self.process.kill()
        except (EOFError, OSError):
            pass
        self._start()
        return False, "crashed"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("libraries", type=Path)
    options.add_argument("output", type=Path)
    options.add_argument("--from", dest="folders", nargs="*", type=Path, default=[])
    options.add_argument("--whole", action="store_true")
    given = options.parse_args()
    parser, target = Parser(given.libraries), get_target("tensorrt")
    paths = sorted(path for folder in given.folders for path in folder.rglob("*.onnx"))
    tried = whole_models(paths) if given.whole else nodes_of(paths) if paths else models()
    found = {}
    for name, op, model in tried:
        taken, words = parser.verdict(model)
        ours, why = said_of_nodes(model, target)
        found[name] = {"op": op, "taken": taken, "words": words, "check": ours, "reason": why}
    given.output.write_text(json.dumps(found, indent=0), encoding="utf-8")
    tell(found)


def tell(found: dict[str, dict[str, Any]]) -> None:
    """How often both agree, over all and over either half, and where they do not."""
    for half, rows in (
        ("all", list(found.items())),
        *(
            (f"half {i}", [r for r in found.items() if zlib.crc32(r[0].encode()) % 2 == i])
            for i in (0, 1)
        ),
    ):
        same = sum(each["taken"] == each["check"] for _, each in rows)
        print(f"{half}: {same} of {len(rows)} agree ({same / max(1, len(rows)):.2%})")
    wrong = collections.Counter(
        (each["op"], "refused by the check alone" if each["taken"] else "taken by the check alone")
        for each in found.values()
        if each["taken"] != each["check"]
    )
    for (op, what), times in wrong.most_common():
        print(f"  {op}: {what}: {times}")


if __name__ == "__main__":
    main()
