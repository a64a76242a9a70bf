"""Where two models part, in a real model: values that are gone are followed to what stands in their place."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx_ir as ir
import pytest

from graphopt import Numerics, optimize
from graphopt.rewrite import Context
from graphopt.verify.divergence import Truth, first_divergence
from graphopt.verify.verifier import ReferenceRun, VerifyOptions

ENCODER = Path(__file__).resolve().parents[2] / "golden" / "encoder" / "model.onnx"
GONE, STANDS = "/b.1/a/Reshape_3_output_0", "/b.1/a/Transpose_3_output_0_Attention"


@dataclasses.dataclass(frozen=True)
class Rescale:
    """The second attention gets another scale, wrongly; `became` is what the engine knew by then."""

    became: dict[str, str] = dataclasses.field(default_factory=dict)
    name: str = "rescale"
    numerics: Numerics = Numerics.REORDERED

    def run(self, model: ir.Model, ctx: Context) -> bool:
        self.became.update(ctx.became)
        node = [each for each in model.graph if each.op_type == "Attention"][1]
        if not ctx.permit("scale", node, Numerics.REORDERED):
            return False
        node.attributes["scale"] = ir.AttrFloat32("scale", 0.4)
        return True


@pytest.mark.parametrize("mode", ["final", "each"])
def test_a_fault_in_what_replaced_a_value_is_found_at_that_value(mode: str) -> None:
    report = optimize(ENCODER, passes=[Rescale()], verify=mode).report
    (guilty,) = report.rolled_back
    assert (guilty.pass_name, guilty.rule, guilty.site) == ("rescale", "scale", STANDS)
    assert f"'{GONE}' (Attention) is the first value to differ" in guilty.reason
    assert report.verification.passed


def test_the_source_is_told_from_what_it_spreads_to(tmp_path: Path) -> None:
    wrong = Rescale()
    out = tmp_path / "out.onnx"
    optimize(ENCODER, passes=[wrong], verify="off", output=out)
    assert wrong.became[GONE] == STANDS
    run = ReferenceRun(ENCODER)
    profile = run.profile(VerifyOptions(Numerics.REORDERED))
    found = first_divergence(Truth(ENCODER), out, run.feeds[0], profile, wrong.became)
    assert found is not None
    assert (found.value, found.stands, found.operator) == (GONE, STANDS, "Attention")
    assert found.spread > 10, "every value of the layers behind it"
    assert STANDS in found.region
    assert all("b.2" not in name for name in (*found.region, *found.boundary))
    # Without the map, what it spreads to is taken for the source.
    late = first_divergence(Truth(ENCODER), out, run.feeds[0], profile)
    assert late is not None
    assert late.value != GONE
    assert late.spread < found.spread


def test_equal_models_do_not_part(tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    optimize(ENCODER, verify="off", output=out)
    run = ReferenceRun(ENCODER)
    profile = run.profile(VerifyOptions(Numerics.REORDERED))
    assert first_divergence(Truth(ENCODER), out, run.feeds[0], profile) is None
