from __future__ import annotations

import json

import onnx.parser
import onnx_ir as ir

from graphopt.numerics import Numerics
from graphopt.pipeline import PassRun
from graphopt.report.facts import model_facts
from graphopt.report.markdown import run_markdown
from graphopt.report.run import RolledBack, RunReport, VerificationFacts
from graphopt.rewrite.context import Remark, RemarkKind, Rewrite
from graphopt.verify.compare import OutputReport

MODEL = """<ir_version: 9, opset_import: ["" : 18, "com.microsoft" : 1]>
g (float[N,3] x) => (float[N,3] y) <float[3] b = {1, 2, 3}> {
  c = Constant<value = float[2] {0, 0}>()
  z = Add(x, b)
  y = com.microsoft.Gelu(z)
}"""


def make_report(**changes: object) -> RunReport:
    facts = model_facts(ir.from_proto(onnx.parser.parse_model(MODEL)))
    held: dict[str, object] = {
        "input": facts,
        "output": facts,
        "target": "cpu",
        "precision": "fp32",
        "passes": (
            PassRun("tidy", changed=True, rewrites=2, seconds=0.25, nodes_after=4),
            PassRun("fold", changed=False, rewrites=0, seconds=0.5, nodes_after=4),
            PassRun("tidy", changed=False, rewrites=0, seconds=0.25, nodes_after=4),
        ),
        "verification": VerificationFacts(
            "final",
            passed=True,
            profile="exact",
            outputs=(
                OutputReport("y", passed=True, equal=False, max_abs=float("nan"), cosine=1.0),
            ),
            feeds=3,
        ),
        "remarks": (Remark(RemarkKind.MISSED, "tidy", "drop|it", "n<1>", "because\nso"),),
        "rewrites": (
            Rewrite("tidy", "drop", "a", Numerics.EXACT),
            Rewrite("tidy", "drop", "b", Numerics.EXACT),
        ),
        "rolled_back": (RolledBack("conv", "fold-bn", "c", "NaN appeared"),),
        "warnings": ("mind the step",),
    }
    return RunReport(**{**held, **changes})  # type: ignore[arg-type]


def test_facts_count_nodes_constants_and_opsets() -> None:
    facts = make_report().input
    assert facts.nodes == 3
    assert dict(facts.operators) == {"Add": 1, "Constant": 1, "com.microsoft::Gelu": 1}
    assert (facts.parameters, facts.parameter_bytes) == (5, 20)
    assert dict(facts.opsets) == {"": 18, "com.microsoft": 1}
    assert facts.path is None


def test_json_has_the_documented_keys_and_is_strict() -> None:
    body = json.loads(json.dumps(make_report().to_json(), allow_nan=False))
    assert body["nodes"] == {"before": 3, "after": 3}
    assert body["parameter_bytes"] == {"before": 20, "after": 20}
    assert body["passes"][0] == {
        "name": "tidy",
        "changed": True,
        "rewrites": 2,
        "seconds": 0.25,
        "nodes_after": 4,
    }
    assert body["verification"]["mode"] == "final"
    assert body["verification"]["passed"] is True
    assert body["verification"]["verdict"] == "verified"
    output = body["verification"]["outputs"][0]
    assert output["max_abs"] is None, "NaN is not JSON"
    assert {"name", "max_over_rms", "sqnr_db", "cosine", "nonfinite_equal", "passed"} <= set(output)
    assert body["remarks"] == [
        {
            "kind": "missed",
            "pass": "tidy",
            "rule": "drop|it",
            "node": "n<1>",
            "reason": "because\nso",
            "culprit": "",
            "facts": {},
        }
    ]
    assert body["rewrites"] == [{"pass": "tidy", "rule": "drop", "count": 2}]
    assert body["rolled_back"][0]["pass"] == "conv"
    assert {
        "graphopt",
        "input",
        "output",
        "target",
        "precision",
        "recipe",
        "seed",
        "warnings",
    } <= set(body)


def test_totals_add_up_the_runs_of_a_pass() -> None:
    tidy, fold = make_report().pass_totals()
    assert (tidy.name, tidy.runs, tidy.changed, tidy.rewrites, tidy.seconds) == (
        "tidy",
        2,
        1,
        2,
        0.5,
    )
    assert (fold.runs, fold.changed) == (1, 0)


def test_markdown_names_everything_and_keeps_its_columns() -> None:
    text = run_markdown(make_report())
    assert "| tidy | 2 | 2 | 0.50 | drop 2 |" in text
    assert "**Verified** (mode final, gate exact, 3 inputs)" in text
    assert "| missed | tidy/drop\\|it | n&lt;1> | because so |" in text
    assert "NaN appeared" in text
    assert "- mind the step" in text


def test_markdown_says_when_nothing_was_compared_or_done() -> None:
    off = VerificationFacts("off", reason="not asked for")
    text = run_markdown(make_report(verification=off, passes=(), remarks=(), rolled_back=()))
    assert "**Unverified** (mode off): not asked for" in text
    assert "No pass found anything to change." in text


def test_json_tells_what_was_not_judged_from_what_was_verified() -> None:
    nothing_held = VerificationFacts("final", passed=True, profile="lossy", judged=False)
    body = make_report(verification=nothing_held).to_json()
    assert body["verification"]["passed"] is True
    assert body["verification"]["verdict"] == "not judged"
