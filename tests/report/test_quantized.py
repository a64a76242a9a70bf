"""The table of quantised layers."""

from __future__ import annotations

import json

from graphopt.report.quantized import QuantizedLayer, quantized_layers
from graphopt.rewrite import RemarkKind
from graphopt.rewrite.context import Remark
from tests.report.test_run import make_report

PASS = "quantize-static"
DONE = Remark(
    RemarkKind.NOTE,
    PASS,
    "quantize",
    "a",
    "words",
    facts=(("operator", "Conv"), ("kernel", "QLinearConv")),
)
LEFT = Remark(RemarkKind.MISSED, PASS, "quantize", "b", "stays float: speed")
OTHERS = (
    Remark(RemarkKind.MISSED, PASS, "quantize", "a", "stays float: it was tried"),
    Remark(RemarkKind.MISSED, "cast", "plan", "c", "stays float: 1e9"),
    Remark(RemarkKind.NOTE, PASS, "quantize", "", "2.00x"),
)


def test_a_row_for_each_layer_and_none_for_other_remarks() -> None:
    assert quantized_layers((*OTHERS, LEFT, DONE)) == (
        QuantizedLayer("a", "Conv", "QLinearConv"),
        QuantizedLayer("b", why_float="speed"),
    )


def test_the_report_holds_rows_and_facts() -> None:
    body = json.loads(json.dumps(make_report(remarks=(DONE, LEFT)).to_json(), allow_nan=False))
    assert [(row["node"], row["kernel"], row["why_float"]) for row in body["quantized_layers"]] == [
        ("a", "QLinearConv", ""),
        ("b", "", "speed"),
    ]
    assert [each["facts"] for each in body["remarks"]] == [
        {"operator": "Conv", "kernel": "QLinearConv"},
        {},
    ]
