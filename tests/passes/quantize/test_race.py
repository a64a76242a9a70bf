"""What a quantised model is timed against: new sessions each time, in turns, and the ratio the same way round."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.quantize import certificate
from graphopt_passes.quantize.certificate import Judgement

from graphopt.verify.feed_files import Feed

FEEDS = [Feed("0", {"x": np.ones(3, np.float32)})]


def _model(op_type: str) -> ir.Model:
    return ir.from_onnx_text(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[3] x) => (float[3] y) {{ y = {op_type}(x) }}'
    )


def test_each_race_has_new_sessions_and_the_ratio_of_float_over_quantised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain, other = _model("Relu"), _model("Neg")
    raced: list[list[Any]] = []
    judge = Judgement(plain, FEEDS)
    monkeypatch.setattr(judge, "_session", lambda model: SimpleNamespace(model=model))

    def measured(sessions: list[Any], _values: object, **_named: object) -> list[Any]:
        """As if float took 3 ms and the other one 2."""
        raced.append(sessions)
        took = [3.0 if session.model is plain else 2.0 for session in sessions]
        return [SimpleNamespace(cpu_ratio=took[0] / each) for each in took]

    monkeypatch.setattr(certificate, "measure", measured)
    race = judge.race(other)
    assert [race(), race(), race()] == pytest.approx([1.5] * 3)
    assert [pair[0].model is plain for pair in raced] == [True, False, True]
    assert len({id(session) for pair in raced for session in pair}) == 6
