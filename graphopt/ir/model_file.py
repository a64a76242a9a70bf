"""The edge: ONNX files, text, bytes and protobufs in, `ir.Model` between, files and bytes out.

Loading maps the weights instead of reading them, saving streams them; nothing that a valid file holds is
lost on the way (see `decode`
for what is kept aside). In memory a sparse initializer is an initializer whose `const_value` is a
`CooTensor`, and `Constant(sparse_value)`
a `Constant` whose attribute `value` holds one; both return to their own carrier.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import onnx
import onnx.parser
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from graphopt.errors import ModelError, OptionError
from graphopt.ir.atomic import FileSet
from graphopt.ir.decode import MAX_GRAPH_DEPTH, decode_model
from graphopt.ir.encode import encode_model
from graphopt.ir.external import ModelFolder
from graphopt.ir.layout import ExternalData, Layout
from graphopt.ir.mapped import MappedFile
from graphopt.ir.message import Location, Message, Role
from graphopt.ir.tensor_proto import TensorReader
from graphopt.ir.wire import LARGE_BYTES, Skeleton, scan

__all__ = [
    "ExternalData",
    "load_model",
    "model_to_bytes",
    "save_model",
    "skeleton_bytes",
    "to_proto",
]

Source = str | os.PathLike[str] | bytes | onnx.ModelProto | ir.Model

MAX_PROTOBUF_BYTES = 2**31 - 1
_TEXT_SUFFIXES = (".onnxtxt", ".txt")
_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull`",
    b"PK\x03\x04": "a zip archive (perhaps a PyTorch checkpoint); export it to ONNX",
    b"\x89HDF": "an HDF5 file (perhaps Keras); convert it to ONNX",
    b"\x1f\x8b": "gzip-compressed; unpack it",
}


def load_model(source: Source) -> ir.Model:
    """Returns the model at a path, in ONNX text, in bytes, or that of a ModelProto or ir.Model (cloned).

    Tensors of a kilobyte and more stay in the file, mapped; the file may be replaced (not overwritten in
    place) while the model is in use. Nodes come out sorted. A subgraph that returns a value of the graph
    around it gets an Identity node. A clone shares its tensors with the original.

    Raises:
        ModelError: the source cannot be read, is not valid ONNX, or refers to data outside the model's
        folder.
    """
    if isinstance(source, ir.Model):
        return _cloned(source)
    if isinstance(source, onnx.ModelProto):
        return decode_model(source, TensorReader(), "ModelProto")
    if isinstance(source, bytes):
        if _is_text(source):
            return _from_text(source, TensorReader(), "ONNX text")
        return _from_binary(source, None, "bytes")
    if isinstance(source, str) and ("\n" in source or _is_text(source.encode())):
        return _from_text(source.encode(), TensorReader(), "ONNX text")
    return _from_path(Path(source))


def save_model(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    external: ExternalData = ExternalData.AUTO,
    durable: bool = True,
) -> tuple[Path, ...]:
    """Writes a model; returns the files written, the model first.

    The weights are streamed. All files appear whole, together, or not at all; the same model gives the
    same bytes. AUTO keeps the weights in
    the model up to protobuf's 2 GiB and moves them to `<name>.data` above. FILE_PER_TENSOR writes
    `<name>.data.00000` and so on. What is not `durable` need not have reached the disk.

    Raises:
        OptionError: the path cannot be written, or the model does not fit into one file and `external` is
        NEVER.
    """
    path = Path(path)
    message, files = _laid_out(model, path.name, external)
    outputs = FileSet(durable=durable)
    try:
        for name, pieces in files.items():
            outputs.write(path.with_name(name), pieces)
        outputs.write(path, message.pieces)
        outputs.commit()
    finally:
        outputs.discard()
    return (path, *(path.with_name(name) for name in files))


def model_to_bytes(model: ir.Model) -> bytes:
    """Returns the serialised model, weights included.

    Raises:
        OptionError: it would pass protobuf's 2 GiB.
    """
    message = encode_model(model)
    if message.size > MAX_PROTOBUF_BYTES:
        raise OptionError(
            f"{_too_large(message)}, as bytes it cannot be read; save it to a path instead"
        )
    return b"".join(message.chunks())


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """Returns the model as a ModelProto, weights included.

    Raises:
        OptionError: it would pass protobuf's 2 GiB.
    """
    proto = onnx.ModelProto()
    proto.ParseFromString(model_to_bytes(model))
    return proto


def skeleton_bytes(model: ir.Model) -> bytes:
    """Returns the serialised model, its large tensors replaced by external references that lead nowhere.

    For tools that need dtypes and shapes of weights, not their values; small constants, which shape
    inference reads, are there.
    """

    def elsewhere(tensor: ir.TensorProtocol, _role: Role) -> Location | None:
        return Location("weights", 0) if tensor.nbytes >= LARGE_BYTES else None

    return b"".join(encode_model(model, elsewhere).chunks())


def _laid_out(
    model: ir.Model, name: str, external: ExternalData
) -> tuple[Message, dict[str, list[bytes | ir.TensorProtocol]]]:
    """The model and, by name, the data files beside it."""
    if external in (ExternalData.AUTO, ExternalData.NEVER):
        message = encode_model(model)
        if message.size <= MAX_PROTOBUF_BYTES:
            return message, {}
        if external is ExternalData.NEVER:
            raise OptionError(
                f"{_too_large(message)}, and external data are switched off; allow them (AUTO)"
            )
    message = Message()
    for role in Role:
        layout = Layout(f"{name}.data", external is ExternalData.FILE_PER_TENSOR, role)
        message = encode_model(model, layout)
        if message.size <= MAX_PROTOBUF_BYTES:
            return message, layout.files
    raise OptionError(
        f"{_too_large(message)} even without its weights; no ONNX runtime can read it"
    )


def _too_large(message: Message) -> str:
    return f"the model takes {message.size / 2**30:.1f} GiB in one file, more than protobuf's 2 GiB"


def _cloned(model: ir.Model) -> ir.Model:
    clone = model.clone()
    clone.meta.update(model.meta)  # onnx_ir 1.1 leaves it behind
    return clone


def _from_path(path: Path) -> ir.Model:
    try:
        file = MappedFile(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ModelError(
            f"cannot read {str(path)[:1000]!r}: {reason}; give the path of an ONNX model"
        ) from error
    if not len(file.data):
        raise ModelError(f"{path}: the file is empty; export or download the model again")
    head = bytes(file.data[:64])
    for magic, what in _FOREIGN.items():
        if head.startswith(magic):
            raise ModelError(f"{path}: not an ONNX model but {what}")
    folder = ModelFolder(path)
    if path.suffix in _TEXT_SUFFIXES or _is_text(head):
        return _from_text(bytes(file.data), TensorReader(folder=folder), str(path))
    return _from_binary(file, folder, str(path))


def _from_binary(source: MappedFile | bytes, folder: ModelFolder | None, origin: str) -> ir.Model:
    skeleton = _skeleton(source, origin)
    try:
        proto = onnx.ModelProto.FromString(skeleton.data)
    except DecodeError as error:
        raise ModelError(
            f"{origin}: not a whole ONNX file ({error}); it may be truncated or of another format, "
            "fetch or export it again"
        ) from error
    return decode_model(proto, TensorReader(source, skeleton.token, folder), origin)


def _skeleton(source: MappedFile | bytes, origin: str) -> Skeleton:
    if isinstance(source, bytes):
        return scan(memoryview(source), origin)
    # Reading ahead would bring in the weights that lie between the fields we look at.
    source.advise("MADV_RANDOM")
    skeleton = scan(source.data, origin, lambda: source.advise("MADV_DONTNEED"))
    source.advise("MADV_NORMAL")
    return skeleton


def _is_text(data: bytes) -> bool:
    # "<" opens the header of ONNX text; as a protobuf tag it is of a wire type that ONNX never uses.
    return data.lstrip().startswith(b"<")


def _from_text(data: bytes, reader: TensorReader, origin: str) -> ir.Model:
    try:
        text = data.decode("utf-8")
        _check_depth(text, origin)
        proto = onnx.parser.parse_model(text)
    except (onnx.parser.ParseError, RuntimeError, ValueError, IndexError) as error:
        # The parser's C++ exceptions come through as they are: a bad number is not a ParseError.
        raise ModelError(f"{origin}: not valid ONNX text: {_first_lines(_said(error))}") from error
    return decode_model(proto, reader, origin)


def _check_depth(text: str, origin: str) -> None:
    """ONNX's parser recurses without a limit: a file of brackets would overflow its stack."""
    depth = 0
    for bracket in re.findall(r'"(?:\\.|[^"\\])*"|[{(<\[]|[})>\]]', text):
        depth += {1: 1 if bracket in "{(<[" else -1}.get(len(bracket), 0)
        if depth > 8 * MAX_GRAPH_DEPTH:
            raise ModelError(
                f"{origin}: brackets nest more than {8 * MAX_GRAPH_DEPTH} deep; flatten the model"
            )


def _said(error: Exception) -> str:
    told = error.args[0] if error.args else ""  # of a ParseError, bytes
    return told.decode("utf-8", "replace") if isinstance(told, bytes) else str(error)


def _first_lines(text: str, count: int = 6) -> str:
    lines: Sequence[str] = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[:count])
