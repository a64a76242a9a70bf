"""What a bundle holds beside the model: options of the runtime, launch lines, a program that runs it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from graphopt.emit.golden_set import GoldenSet
from graphopt.emit.profiles import InputProfile, shapes_text
from graphopt.runtime.specs import TensorSpec
from graphopt.targets import Artefact, SparseStyle, Target

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
RUN = "run.py"
BUILDER, ENGINE = "build_engine.py", "engine.json"
WORKSPACE_MIB, LEVEL = 4096, 3
"""What engines are built with, by trtexec and by the program: memory for tactics, and how long to look for them."""

MAX_LOSS = 0.001
"""1 - cosine between the golden outputs and an engine's: TF32 and half floats stay below."""

_COMPARES = (11, 0)
"""trtexec compares with reference outputs from this version on."""


@dataclasses.dataclass(frozen=True)
class Deployment:
    """What the emitters ask about a result.

    Attributes:
        target: what it is for.
        inputs: what the model takes.
        outputs: what it gives.
        profiles: ranges of dynamic inputs.
        golden: a run of the original; None where it cannot be run here.
        sparse: whether weights follow a 2:4 pattern.
        decided: inputs that decide shapes; their profiles are of values.
    """

    target: Target
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    profiles: tuple[InputProfile, ...]
    golden: GoldenSet | None
    sparse: bool = False
    decided: frozenset[str] = frozenset()


def artefacts(made: Deployment) -> dict[str, str]:
    """Texts of the bundle by relative path."""
    target = made.target
    found = {RUN: _template(RUN)}
    for artefact in target.artefacts:
        found[artefact.value] = _MAKERS[artefact](made)
    if Artefact.TRTEXEC in target.artefacts:
        found[BUILDER], found[ENGINE] = _template(BUILDER), engine(made)
    if target.provider not in (None, CPU):
        found["io_binding.py"] = io_binding(made)
    return found


def _template(name: str) -> str:
    return (files("graphopt.emit") / "templates" / f"{name}.txt").read_text(encoding="utf-8")


def session_options(made: Deployment) -> str:
    """How to make an ONNX Runtime session: fields of SessionOptions, and session configuration entries."""
    stated = made.target.options.get(Artefact.SESSION_OPTIONS, {})
    return _json(
        {
            "fields": {k: v for k, v in stated.items() if not k.startswith("session.")},
            "config_entries": {k: v for k, v in stated.items() if k.startswith("session.")},
        }
    )


def provider_options(made: Deployment) -> str:
    """The execution providers in order, each with its options, as `InferenceSession(providers=…)` takes them."""
    return _json(providers(made))


def providers(made: Deployment) -> list[Any]:
    """The same as data."""
    target = made.target
    stated = dict(target.options.get(Artefact.PROVIDER_OPTIONS, {}))
    if target.provider not in (CPU, CUDA, None) and made.profiles:
        for word, which in (("min", "least"), ("opt", "usual"), ("max", "most")):
            stated[f"trt_profile_{word}_shapes"] = shapes_text(made.profiles, which)
    if target.provider not in (CPU, CUDA, None) and made.sparse:
        stated["trt_sparsity_enable"] = "1"
    chain: list[Any] = [[target.provider or CPU, stated]]
    if target.provider not in (CPU, CUDA, None):
        chain.append([CUDA, {"device_id": "0"}])
    if target.provider != CPU:
        chain.append([CPU, {}])
    return chain


def build_script(made: Deployment) -> str:
    """A shell script: trtexec builds the engine; from TensorRT 11 on it compares with the golden outputs too.

    Flags are those of trtexec 10 and 11: targets/tables/trtexec.json says which version has which.
    """
    version = made.target.version
    flags = ["--onnx=model.onnx", "--saveEngine=model.plan"]
    if not made.target.floats.strongly_typed:
        flags.append("--stronglyTyped")
    if made.profiles:
        for word, which in (("min", "least"), ("opt", "usual"), ("max", "most")):
            flags.append(f"--{word}Shapes={shapes_text(made.profiles, which)}")
    flags += ["--timingCacheFile=timing.cache", f"--builderOptimizationLevel={LEVEL}"]
    if made.sparse:
        flags.append("--sparsity=enable")
    flags.append(f"--memPoolSize=workspace:{WORKSPACE_MIB}")
    flags.append("--skipInference")
    comparing = made.golden is not None and version >= _COMPARES and made.golden.outputs
    lines = [
        "#!/bin/sh",
        f"# Builds an engine with trtexec of TensorRT {'.'.join(map(str, version))}. Engines are for the GPU and the "
        "version that they were built on.",
        "set -eu",
        "# Further flags go through: ./build.sh --noTF32 --versionCompatible",
        'cd "$(dirname "$0")"',
        _command(flags) + ' "$@"',
    ]
    if comparing and made.golden is not None:
        shapes = shapes_text(_fed(made), "usual")
        again = ["--loadEngine=model.plan", f"--loadInputs={made.golden.raw_files('input')}"]
        if shapes:
            again.append(f"--shapes={shapes}")
        again += [
            f"--loadRefOutputs={made.golden.raw_files('output')}",
            "--accuracyAlgorithm=cos",
            f"--accuracyThreshold={MAX_LOSS}",  # the loss is 1 - cosine
        ]
        lines += ["# Compares with the golden outputs.", _command(again)]
    return "\n".join(lines) + "\n"


def engine(made: Deployment) -> str:
    """What build_engine.py builds for: profiles, flags and limits, the same as in build.sh."""
    shapes = {p.name: [p.least, p.usual, p.most] for p in made.profiles}
    return _json(
        {
            "tensorrt": ".".join(map(str, made.target.version)),
            "strongly_typed_flag": not made.target.floats.strongly_typed,
            "sparse_weights": made.sparse,
            "workspace_mib": WORKSPACE_MIB,
            "optimization_level": LEVEL,
            "shapes": {name: held for name, held in shapes.items() if name not in made.decided},
            "values": {name: held for name, held in shapes.items() if name in made.decided},
        }
    )


def _fed(made: Deployment) -> tuple[InputProfile, ...]:
    """The dynamic inputs at the sizes of the golden set."""
    golden = made.golden
    if golden is None:
        return ()
    found = []
    for each in made.profiles:
        if each.name in made.decided:
            found.append(InputProfile(each.name, each.usual, each.usual, each.usual))
            continue
        shape = tuple(getattr(golden.inputs.get(each.name), "shape", each.usual))
        found.append(InputProfile(each.name, shape, shape, shape))
    return tuple(found)


def _command(flags: Sequence[str]) -> str:
    return " \\\n  ".join(["trtexec", *(shlex.quote(flag) for flag in flags)])


def openvino_config(made: Deployment) -> str:
    """What `openvino.Core().compile_model(config=…)` takes."""
    return _json(dict(made.target.options.get(Artefact.OPENVINO_CONFIG, {})))


def io_binding(made: Deployment) -> str:
    """A program that keeps inputs and outputs on the device."""
    lines = [
        '"""Runs the model with inputs and outputs bound to device memory: no copy hides in a run."""',
        "",
        "import json",
        "from pathlib import Path",
        "",
        "import onnx.numpy_helper",
        "import onnxruntime as ort",
        "",
        "HERE = Path(__file__).resolve().parent",
        'providers = [tuple(each) for each in json.loads((HERE / "provider_options.json").read_text())]',
        'session = ort.InferenceSession(HERE / "model.onnx", providers=providers)',
        "binding = session.io_binding()",
        'golden = HERE / "golden" / "test_data_set_0"',
    ]
    for index, spec in enumerate(spec for spec in made.inputs if not spec.overridable):
        lines += [
            f"# {spec.name}: {spec}",
            f'tensor = onnx.load_tensor(golden / "input_{index}.pb")',
            "value = onnx.numpy_helper.to_array(tensor)",
            'held = ort.OrtValue.ortvalue_from_numpy(value, "cuda", 0)',
            f"binding.bind_ortvalue_input({spec.name!r}, held)",
        ]
    for spec in made.outputs:
        lines += [f"# {spec.name}: {spec}", f'binding.bind_output({spec.name!r}, "cuda", 0)']
    lines += [
        "session.run_with_iobinding(binding)",
        "for value in binding.get_outputs():",
        "    print(value.data_type(), value.shape(), value.device_name())",
    ]
    return "\n".join(lines) + "\n"


def is_two_of_four(style: SparseStyle, patterns: Iterable[tuple[int, int]]) -> bool:
    """Whether the run pruned weights to 2:4, which dense kernels for sparse tensor cores take."""
    return style is SparseStyle.DENSE and (2, 4) in patterns


def _json(body: object) -> str:
    return json.dumps(body, indent=2, allow_nan=False) + "\n"


_MAKERS: Mapping[Artefact, Any] = {
    Artefact.SESSION_OPTIONS: session_options,
    Artefact.PROVIDER_OPTIONS: provider_options,
    Artefact.TRTEXEC: build_script,
    Artefact.OPENVINO_CONFIG: openvino_config,
}
