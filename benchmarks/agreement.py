"""How often the static legality checks agree with the runtimes, over the single-operator models of onnx's node tests.

    python benchmarks/agreement.py [--verbose]

cpu       every node test: the check's verdict against making a session in the installed ONNX Runtime.
tensorrt  the counts that the packaged table records of NVIDIA's parser, per operator, over the node tests as they are
          and with inputs after the first made initializers.  Counts are compared, so the figure is an upper bound;
          parser_verdicts.py compares model by model, with the parser itself.
"""

from __future__ import annotations

import argparse
import collections
import warnings
from collections.abc import Iterator

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort

from graphopt.emit.findings import Verdict
from graphopt.emit.legality import check_legality
from graphopt.errors import GraphoptError
from graphopt.ir.model_file import load_model
from graphopt.targets import Target, get_target
from graphopt.targets.operators import operator_table


def cases() -> Iterator[tuple[str, onnx.ModelProto, dict[str, object]]]:
    """Name, model and first inputs of each node test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases  # noqa: PLC0415  warns

        for case in collect_testcases(None):
            model = case.model
            if model is None:
                continue
            names = [info.name for info in model.graph.input]
            first = (case.data_sets or [([], [])])[0][0]
            yield case.name, model, dict(zip(names, first, strict=False))


def said(model: onnx.ModelProto, target: Target) -> tuple[bool, str]:
    """Whether the check lets the model pass, and its first objection."""
    try:
        report = check_legality(load_model(model), target)
    except GraphoptError as fault:
        return False, f"cannot be read: {fault}"
    refused = report.refused
    return not refused, refused[0].reason if refused else ""


def runs(model: onnx.ModelProto) -> tuple[bool, str]:
    """Whether ONNX Runtime makes a session of the model, and its words."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    try:
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as fault:  # noqa: BLE001  the runtime's own types share no base
        return False, " ".join(str(fault).split())
    return True, ""


def clamped(model: onnx.ModelProto, target: Target) -> onnx.ModelProto:
    """The model under an IR version that the runtime reads: the tests are written by the newest onnx."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.ir_version = min(copy.ir_version, target.ir_version[1])
    return copy


def cpu(verbose: bool) -> None:
    target = get_target("cpu")
    agreed: collections.Counter[str] = collections.Counter()
    for name, case, _ in cases():
        model = clamped(case, target)
        ours, why = said(model, target)
        theirs, words = runs(model)
        kind = f"check {'ok' if ours else 'refuses'}, runtime {'takes' if theirs else 'refuses'}"
        agreed[kind] += 1
        if verbose and ours != theirs:
            print(f"{name}: {kind}: {why or words[:200]}")
    right = sum(
        n
        for kind, n in agreed.items()
        if "ok, runtime takes" in kind or "refuses, runtime refuses" in kind
    )
    print(
        f"cpu: {right} of {sum(agreed.values())} agree ({right / sum(agreed.values()):.2%}); {dict(agreed)}"
    )


def with_initializers(model: onnx.ModelProto, feeds: dict[str, object]) -> onnx.ModelProto | None:
    """The model with its inputs after the first turned into initializers; None where there are none."""
    kinds = np.ndarray | np.generic | onnx.TensorProto
    rest = [info for info in model.graph.input[1:] if isinstance(feeds.get(info.name), kinds)]
    if not rest:
        return None
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for info in rest:
        given = feeds[info.name]
        if isinstance(given, onnx.TensorProto):
            copy.graph.initializer.add().CopyFrom(given)
            copy.graph.initializer[-1].name = info.name
            continue
        tensor = onnx.numpy_helper.from_array(np.asarray(given), info.name)
        copy.graph.initializer.append(tensor)
    kept = [info for info in copy.graph.input if info.name not in {i.name for i in rest}]
    del copy.graph.input[:]
    copy.graph.input.extend(kept)
    return copy


def tensorrt(verbose: bool) -> None:
    target, table = get_target("tensorrt"), operator_table("tensorrt")
    counts: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    reasons: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for name, model, feeds in cases():
        if len(model.graph.node) != 1:
            continue
        del name
        for variant in (model, with_initializers(model, feeds)):
            if variant is None:
                continue
            fits = onnx.ModelProto()
            fits.CopyFrom(variant)
            fits.opset_import[0].version = min(fits.opset_import[0].version, 26)
            op = model.graph.node[0].op_type
            ours, why = said_of_nodes(fits, target)
            counts[op][0] += ours
            counts[op][1] += 1
            reasons[op][why] += 1
    total, agreed = 0, 0.0
    for op, (ok, tried) in sorted(counts.items()):
        entry = table.operators.get(op)
        if entry is None or entry.parsed is None:
            continue
        parsed, of = entry.parsed
        expected = parsed * tried / of if of else 0
        same = tried - abs(expected - ok)
        total, agreed = total + tried, agreed + same
        if verbose and abs(expected - ok) > 0.5:
            print(
                f"{op}: check takes {ok} of {tried}, parser {parsed} of {of}; {dict(reasons[op])}"
            )
    print(f"tensorrt: at most {agreed:.0f} of {total} agree ({agreed / total:.2%})")


def said_of_nodes(model: onnx.ModelProto, target: Target) -> tuple[bool, str]:
    """As `said`, without the limits on opsets: the parser does not refuse by number."""
    report = check_legality(load_model(model), target)
    refused = [
        f for f in report.findings if f.verdict is Verdict.REFUSED and "opset" not in f.reason
    ]
    return not refused, refused[0].reason if refused else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verbose", action="store_true", help="each disagreement")
    parser.add_argument("--only", choices=("tensorrt",))
    options = parser.parse_args()
    if options.only != "tensorrt":
        cpu(options.verbose)
    tensorrt(options.verbose)


if __name__ == "__main__":
    main()
