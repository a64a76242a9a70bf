"""Bundles of the zoo: each runs from an empty folder in a process of its own, twice made it has the same bytes.

    python -m benchmarks.bundles [--target NAME …] [--once] [--proto FOLDER] [FOLDER …]

FOLDER holds models; those of the zoo beside the checkout by default.  --proto names a folder with `model_config_pb2.py`
(of the wheel `tritonclient`), by which each config.pbtxt is parsed.  A row is printed for each model and target.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import graphopt
from benchmarks.legality import zoo_models
from graphopt.errors import GraphoptError
from graphopt.targets import all_targets

TARGETS = ("cpu", "cuda", "tensorrt", "tensorrt-10", "ort-tensorrt", "openvino", "portable")


def digests(folder: Path) -> dict[str, str]:
    """The hash of each file."""
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def snippet(bundle: Path, empty: Path) -> str:
    """What the bundle's own program says, run from an empty folder."""
    empty.mkdir(exist_ok=True)
    ran = subprocess.run(
        [sys.executable, str(bundle / "run.py")],
        cwd=empty,
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode == 0:
        return "no golden set" if "no golden set" in ran.stdout else "runs"
    return f"FAILS: {(ran.stdout + ran.stderr).strip()[-200:]}"


def parsed(bundle: Path, proto: Any) -> str:  # noqa: ANN401  a generated module
    """Whether Triton's own definition reads the configuration; "" where there is none."""
    file = bundle / "triton" / "model" / "config.pbtxt"
    if proto is None or not file.is_file():
        return ""
    from google.protobuf import (  # type: ignore[import-untyped, unused-ignore]  # noqa: PLC0415
        text_format,
    )

    try:
        text_format.Parse(file.read_text(encoding="utf-8"), proto.ModelConfig())
    except text_format.ParseError as error:
        return f"config.pbtxt: {error}"
    return "parses"


def judge(path: Path, target: str, scratch: Path, *, once: bool, proto: Any) -> str:  # noqa: ANN401
    """One row."""
    made = []
    for name in ("a", "b")[: 1 if once else 2]:
        folder = scratch / name
        folder.mkdir()
        extras = ("triton", "ort") if target == "cpu" else ("triton",)
        try:
            graphopt.optimize(path, target=target, output=folder / "bundle", extras=extras)
        except GraphoptError as fault:
            return f"no bundle: {fault}"
        made.append(folder / "bundle")
    (scratch / "moved").mkdir()
    bundle = made[0].rename(scratch / "moved" / "deploy")
    words = [snippet(bundle, scratch / "empty"), parsed(bundle, proto)]
    if not once:
        same = digests(bundle) == digests(made[1])
        words.append("same bytes" if same else "OTHER BYTES")
    return ", ".join(filter(None, words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=sorted(all_targets()))
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--proto", type=Path)
    parser.add_argument("folders", nargs="*", type=Path)
    given = parser.parse_args()
    proto = None
    if given.proto is not None:
        sys.path.insert(0, str(given.proto))
        proto = importlib.import_module("model_config_pb2")
    paths = [p for folder in given.folders for p in sorted(folder.rglob("*.onnx"))] or zoo_models()
    for path in paths:
        for target in given.target or TARGETS:
            with tempfile.TemporaryDirectory() as scratch:
                said = judge(path, target, Path(scratch), once=given.once, proto=proto)
            print(f"{path.parent.name}/{path.stem:34} {target:14} {said}", flush=True)


if __name__ == "__main__":
    main()
