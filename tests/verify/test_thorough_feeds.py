"""Feeds that find faults: huge, where consumers expect them, around thresholds, long and empty, in every branch."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.numerics import Numerics
from graphopt.runtime import session
from graphopt.verify.empties import takes_empty
from graphopt.verify.feeds import find_feeds
from graphopt.verify.verifier import ReferenceRun, VerifyOptions

HEAD = '<ir_version: 9, opset_import: ["" : 17]>'
REORDERED = VerifyOptions(Numerics.REORDERED)


def proto(text: str) -> bytes:
    return bytes(onnx.parser.parse_model(HEAD + text).SerializeToString())


def thorough(text: str) -> dict[str, Any]:
    model = ir.from_proto(onnx.parser.parse_model(HEAD + text))
    found = find_feeds(model, lambda _: None, thorough=True)
    return {feed.name: feed.values for feed in found.feeds}


def test_numbers_are_huge_and_not_negative_once_each() -> None:
    made = thorough("g (float[4,5] x) => (float[4,5] y) { y = Relu(x) }")
    samples = [f"sample {n}" for n in range(2, 6)]
    assert list(made) == [
        "normal",
        "zeros",
        "large",
        "tiny",
        "huge",
        "small",
        "unit",
        *samples,
        "sparse",
    ]
    assert np.abs(made["huge"]["x"]).max() > 65504
    assert made["unit"]["x"].min() >= 0
    assert made["unit"]["x"].max() < 1


def test_a_model_of_one_sample_gets_several() -> None:
    made = thorough("g (float[1,50] x) => (float[1,50] y) { y = Relu(x) }")
    drawn = {made[name]["x"].tobytes() for name in ("normal", "sample 2", "sample 5")}
    assert len(drawn) == 3
    zeros = float((made["sparse"]["x"] == 0).mean())
    assert 0.6 < zeros < 0.95
    batch = thorough("g (float[n,50] x) => (float[n,50] y) { y = Relu(x) }")
    assert not any("sample" in name for name in batch), "a batch holds them"


def test_halves_are_not_made_infinite() -> None:
    made = thorough("g (float16[4,5] x) => (float16[4,5] y) { y = Relu(x) }")
    assert "huge" not in made
    assert all(np.isfinite(values["x"]).all() for values in made.values())


def test_pixels_are_bytes_where_the_model_divides_by_255() -> None:
    made = thorough("g (float[4,5] x) => (float[4,5] y) <float c = {255}> { y = Div(x, c) }")
    assert 200 < made["usual"]["x"].max() <= 255


def test_a_square_root_gets_numbers_that_it_can_take_and_once_others() -> None:
    made = thorough("g (float[4,5] x) => (float[4,5] y) { y = Sqrt(x) }")
    assert made["normal"]["x"].min() >= 0
    assert made["anywhere"]["x"].min() < 0


def test_thresholds_are_met_and_passed_on_both_sides() -> None:
    made = thorough("g (float[8,9] x) => (bool[8,9] y) <float c = {50}> { y = Greater(x, c) }")
    turning = made["turning"]["x"]
    assert (turning == 50).any()
    assert (turning > 50).any()
    assert (turning < 50).any()
    assert not (made["normal"]["x"] > 50).any()


def test_integers_are_wide_where_no_size_follows_from_them() -> None:
    made = thorough("g (int64[9] x) => (int64[9] y) { y = Neg(x) }")
    assert np.abs(made["wide integers"]["x"]).max() > 2**32
    sizes = thorough("g (int64[1] n, float[1] x) => (float[k] y) { a = Abs(n) y = Expand(x, a) }")
    assert "wide integers" not in sizes


def test_dimensions_are_long_and_empty() -> None:
    made = thorough("g (float[batch,seq,3] x) => (float[batch,seq,3] y) { y = Relu(x) }")
    shapes = {values["x"].shape for values in made.values()}
    assert {(1, 1, 3), (3, 13, 3), (5, 37, 3), (0, 8, 3)} <= shapes


def test_more_steps_than_eight_bits_count() -> None:
    made = thorough("g (float[batch,seq,3] x) => (float[batch,seq,3] y) { y = Relu(x) }")
    assert max(values["x"].shape[1] for values in made.values()) > 127
    cached = thorough("""g (float[batch,seq,3] x, float[batch,past_len,3] past) => (float[batch,t,3] y)
      { y = Concat<axis = 1>(past, x) }""")
    longer = next(values for name, values in cached.items() if "longer" in name)
    assert (longer["x"].shape[1], longer["past"].shape[1]) == (8, 131), (
        "steps behind cost less than steps"
    )


def test_small_numbers_are_not_tiny() -> None:
    made = thorough("g (float[40,50] x) => (float[40,50] y) { y = Relu(x) }")
    assert 1e-3 < np.abs(made["small"]["x"]).max() < 1e-1


def test_an_operator_that_dies_of_nothing_is_not_given_it() -> None:
    text = """g (float[3,batch,4] x) => (float[3,1,batch,2] y) <float[1,8,4] w, float[1,8,2] r>
              { y = LSTM<hidden_size = 2>(x, w, r) }"""
    model = ir.from_proto(onnx.parser.parse_model(HEAD + text))
    assert not takes_empty(model)
    assert all(0 not in values["x"].shape for values in thorough(text).values())


BY_MEAN = """g (float[n,4] x) => (float[n,4] y) <float limit = {3}>
  { m = ReduceMean<keepdims = 0>(x) c = Greater(m, limit)
    y = If (c) <then_branch = t () => (float[n,4] p) { p = {} },
                else_branch = e () => (float[n,4] q) { q = Sin(x) }> }"""


def test_feeds_are_sought_that_take_each_branch() -> None:
    run = ReferenceRun(
        proto(BY_MEAN.replace("{}", "Cos(x)", 1).replace("{3}", "{3}")), thorough=True
    )
    assert any(float(feed.values["x"].mean()) > 3 for feed in run.feeds if "around" in feed.name)
    assert not any("no inputs were found" in note for note in run.notes)
    assert len(run.outputs) == len(run.feeds)


def test_what_is_wrong_in_a_rare_branch_is_found() -> None:
    right, wrong = (proto(_with(BY_MEAN, op)) for op in ("Cos(x)", "Sin(x)"))
    assert ReferenceRun(right, thorough=True).verify(wrong, REORDERED).passed is False
    assert ReferenceRun(right, thorough=True).verify(right, REORDERED).passed


def _with(text: str, op: str) -> str:
    return text.replace("p = {}", f"p = {op}")


def test_a_branch_that_nothing_takes_is_named() -> None:
    never = BY_MEAN.replace(
        "m = ReduceMean<keepdims = 0>(x)",
        "q0 = Mul(x, x) n0 = Neg(q0) m = ReduceMean<keepdims = 0>(n0)",
    )
    run = ReferenceRun(proto(_with(never, "Cos(x)")), thorough=True)
    (note,) = (note for note in run.notes if "no inputs were found" in note)
    assert "If 'y' with a condition that is true" in note


def test_branches_that_sizes_decide_are_sought_too() -> None:
    text = """g (float[n,4] x) => (float[n,4] y) <int64 limit = {12}>
      { s = Shape<start = 0, end = 1>(x) d = Squeeze(s) c = Greater(d, limit)
        y = If (c) <then_branch = t () => (float[n,4] p) { p = Cos(x) },
                    else_branch = e () => (float[n,4] q) { q = Sin(x) }> }"""
    run = ReferenceRun(proto(text), thorough=True)
    assert any(feed.values["x"].shape[0] > 12 for feed in run.feeds)


CLASS = "g (float[n,9] x) => (int64[n] y) <float k = {K}> { s = Mul(x, k) y = ArgMax<axis = 1, keepdims = 0>(s) }"


def test_scores_behind_a_class_are_compared() -> None:
    right, wrong = (proto(CLASS.replace("{K}", f"{{{k}}}")) for k in ("2.0", "2.01"))
    found = ReferenceRun(right).verify(wrong, REORDERED)
    assert found.passed is False
    assert "what it is made of, 's', differs" in found.reason


def test_scores_of_another_name_are_not() -> None:
    right = proto(CLASS.replace("{K}", "{2.0}"))
    other = proto(CLASS.replace("{K}", "{4.0}").replace("s = Mul", "t = Mul").replace("(s)", "(t)"))
    assert ReferenceRun(right).verify(other, REORDERED).passed


PLAIN = "g (float[n,4] x) => (float[{},4] y) { y = Relu(x) }"


@pytest.mark.parametrize("stated", ["1", "2"])
def test_a_stale_shape_of_an_output_is_refused(stated: str) -> None:
    run = ReferenceRun(proto(PLAIN.replace("{}", "n")))
    found = run.verify(proto(PLAIN.replace("{}", stated)), REORDERED)
    assert found.passed is False
    assert "the declared shape is wrong" in found.reason
    assert run.verify(proto(PLAIN.replace("{}", "n"))).passed


def test_a_shape_that_the_reference_states_wrongly_too_is_its_own_affair() -> None:
    text = "g (float[n,4] x) => (float[m,4] y) { y = Concat<axis = 0>(x, x) }"
    stale = text.replace("[m,4]", "[n,4]")
    assert ReferenceRun(proto(stale)).verify(proto(stale)).passed
    assert ReferenceRun(proto(text)).verify(proto(stale)).passed is False


def test_outputs_that_are_never_finite_prove_nothing() -> None:
    text = "g (float[4] x) => (float[4] y) { a = Abs(x) b = Neg(a) d = Sub(b, one) y = Log(d) }"
    text = text.replace("=> (float[4] y)", "=> (float[4] y) <float one = {1}>")
    found = ReferenceRun(proto(text)).verify(proto(text))
    assert found.passed is None
    assert "is NaN or infinite in every element" in found.reason


def test_nan_beyond_thousands_is_found() -> None:
    text = "g (float[n,4] x) => (float[n,4] y) { y = Tanh(x) }"
    wrong = """g (float[n,4] x) => (float[n,4] y) <float k = {1000}, float nan = {nan}>
               { a = Abs(x) c = Greater(a, k) w = Where(c, z, x) y = Tanh(w) }"""
    wrong = wrong.replace("float nan = {nan}", "float one = {1}").replace(
        "w = Where", "m = Neg(one) z = Sqrt(m) w = Where"
    )
    found = ReferenceRun(proto(text), thorough=True).verify(proto(wrong), REORDERED)
    assert found.passed is False
    assert "on feed 'huge" in found.reason


def test_each_feed_costs_one_run_of_the_reference_and_two_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs: list[int] = []
    plain = session.Session.run

    def counted(one: Any, feeds: Any, names: Any = None) -> Any:
        runs.append(id(one))
        return plain(one, feeds, names)

    monkeypatch.setattr(session.Session, "run", counted)
    text = "g (float[n,9] x) => (float[n,9] y) { e = Exp(x) s = ReduceSum<keepdims = 1>(e) y = Div(e, s) }"
    reordered = text.replace("y = Div(e, s)", "r = Reciprocal(s) y = Mul(e, r)")
    run = ReferenceRun(proto(text), thorough=True)
    assert len(runs) == len(run.feeds) + len(run.dropped)
    assert run.verify(proto(reordered), REORDERED).passed
    own = runs.count(runs[0])
    assert own <= 2 * len(run.feeds) + len(run.dropped)
    assert len(runs) - own == len(run.feeds)


INNER = "g (float[n,4] x, float[m,4] w) => (float[n,4] y) <float[{}] a> { a = Neg(x) y = Relu(a) }"


def test_a_stale_shape_of_a_value_within_is_refused() -> None:
    run = ReferenceRun(proto(INNER.replace("{}", "n,4")))
    found = run.verify(proto(INNER.replace("{}", "2,4")))
    assert found.passed is False
    assert "'a' has size 1 on axis 0" in found.reason
    assert "declared 2: the declared shape is wrong" in found.reason
    assert run.verify(proto(INNER.replace("{}", "k,4"))).passed, "names say nothing"
    brief = VerifyOptions(brief=True)
    assert run.verify(proto(INNER.replace("{}", "2,4")), brief).passed, "left to the end"


def test_a_stale_shape_within_the_original_is_its_own_affair() -> None:
    stale = proto(INNER.replace("{}", "2,4"))
    assert ReferenceRun(stale).verify(stale).passed


def test_sizes_that_nothing_follows_from_are_not_judged() -> None:
    text = """g (float[n,4] x) => (float[k] y) <{} where>
      { where = NonZero(x) p = Cast<to = 1>(where) q = Neg(p) y = ReduceMax<axes = [0], keepdims = 0>(q) }"""
    run = ReferenceRun(proto(text.replace("<{} where>", "")))
    assert run.verify(proto(text.replace("{}", "int64[2,8]"))).passed
