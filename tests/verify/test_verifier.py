"""Verification as a whole: equal models pass, wrong ones fail with a reason, what cannot be judged is said to be so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper as helper
import onnx.parser
import pytest

from graphopt.errors import DataError, ModelError
from graphopt.numerics import Numerics
from graphopt.runtime import session as session_module
from graphopt.runtime.session import OptimizationLevel
from graphopt.verify import noise, origins
from graphopt.verify import reference as reference_module
from graphopt.verify.compare import Budget, OutputReport, profile_for
from graphopt.verify.feeds import Feed
from graphopt.verify.origins import OutputOrigin, scale_floor
from graphopt.verify.verifier import ReferenceRun, Status, VerifyOptions, verify

HEAD = '<ir_version: 10, opset_import: ["" : 17, "ai.onnx.ml" : 2]>'
REORDERED = VerifyOptions(Numerics.REORDERED)
MLP = """g (float[n,4] x) => (float[n,3] y) <float[4,3] w, float[3] b>
         { a = MatMul(x, w) c = Add(a, b) y = Relu(c) }"""


def model(text: str, **weights: np.ndarray[Any, Any]) -> bytes:
    proto = onnx.parser.parse_model(HEAD + text)
    proto.graph.initializer.extend(
        helper.from_array(array, name) for name, array in weights.items()
    )
    return bytes(proto.SerializeToString())


def mlp(bias: float = 1.0) -> bytes:
    weight = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
    return model(MLP, w=weight, b=np.full(3, bias, np.float32))


def test_a_model_equals_itself_bit_for_bit() -> None:
    found = verify(mlp(), mlp())
    assert found.status is Status.PASSED
    assert found.passed is True
    assert found.profile == "exact"
    assert [report.equal for report in found.outputs] == [True]
    assert len(found.feeds) == 6


def test_a_wrong_bias_fails_and_names_output_feed_and_place() -> None:
    found = verify(mlp(), mlp(1.001), options=REORDERED)
    assert found.passed is False
    assert "output 'y' on feed 'normal, typical (n=2)'" in found.reason
    assert found.outputs[0].max_abs == pytest.approx(1e-3, rel=0.01)


def test_a_reordered_sum_passes_as_reordered_and_fails_as_exact() -> None:
    three = "g (float[64] x, float[64] z) => (float[64] y) { a = Add(x, z) b = Mul(a, x) y = Add(b, z) }"
    other = three.replace("b = Mul(a, x)", "p = Mul(x, x) q = Mul(z, x) b = Add(p, q)")
    assert verify(model(three), model(other), options=REORDERED).passed
    exact = verify(model(three), model(other))
    assert exact.passed is False
    assert "not bit-equal" in exact.reason


def test_folding_a_weight_is_exact() -> None:
    """With prepacking, ONNX Runtime would run the constant weight through another kernel."""
    weight = np.random.default_rng(0).standard_normal((64, 17)).astype(np.float32)
    text = "g (float[n,64] x) => (float[n,17] y) <float[64,17] w> {{ {} }}"
    computed = model(text.format("v = Neg(w) u = Neg(v) y = MatMul(x, u)"), w=weight)
    folded = model(text.format("y = MatMul(x, w)"), w=weight)
    assert verify(computed, folded).passed


def test_a_reference_is_run_once_for_many_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    plain = session_module.Session.run

    def counted(session: Any, feeds: Any, names: Any = None) -> Any:
        runs.append("run")
        return plain(session, feeds, names)

    monkeypatch.setattr(session_module.Session, "run", counted)
    reference = ReferenceRun(mlp())
    feeds = len(reference.feeds)
    assert len(runs) == feeds
    assert verify(reference, mlp()).passed
    assert len(runs) == 2 * feeds
    assert verify(reference, mlp(1.2)).passed is False
    # Feeds that failed ran on the reference twice more, to see how uncertain it is and whether it repeats itself,
    # and never again.
    again = len(runs)
    assert again <= 4 * feeds
    assert verify(reference, mlp(1.2)).passed is False
    assert len(runs) == again + feeds
    verify(reference, mlp(1.2), options=VerifyOptions(fail_fast=True))
    assert len(runs) <= again + feeds + 2


def test_a_large_reference_makes_room_for_its_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    small = ReferenceRun(mlp())
    monkeypatch.setattr(reference_module, "LARGE_BYTES", 1)
    large = ReferenceRun(mlp())
    held = []
    for run in (small, large):
        # A failure asks the reference again, once it has made room.
        assert run.verify(mlp(bias=1.5)).passed is False
        assert run.verify(mlp()).passed
        held.append(run._session._session is not None)
    assert held == [True, False]


def test_notes_on_the_reference_are_in_every_verification() -> None:
    reference = ReferenceRun(mlp())
    reference.notes.append("an older runtime")
    for candidate in (mlp(), mlp(2), b"\xff"):
        assert "an older runtime" in verify(reference, candidate).notes


def test_given_feeds_are_used_alone() -> None:
    feed = Feed("mine", {"x": np.zeros((1, 4), np.float32)})
    found = verify(mlp(-1), mlp(-2), [feed])
    assert found.passed
    assert found.feeds == ("mine",)
    with pytest.raises(DataError, match="'x'"):
        verify(mlp(), mlp(), [Feed("bad", {"x": np.zeros((1, 4))})])


def test_random_outputs_are_excluded_and_said_so() -> None:
    text = "g (float[4] x) => (float[4] y, float[4] z) { y = RandomNormalLike(x) z = {}(x) }"
    found = verify(model(text.replace("{}", "Neg")), model(text.replace("{}", "Neg")))
    assert found.passed
    assert [report.name for report in found.outputs] == ["z"]
    assert "y" in found.excluded
    assert any("'y' depends on the random RandomNormalLike" in note for note in found.notes)
    assert (
        verify(model(text.replace("{}", "Neg")), model(text.replace("{}", "Abs"))).passed is False
    )


def test_a_model_of_noise_alone_is_unverified() -> None:
    text = "g (float[4] x) => (float[4] y) { y = RandomNormalLike(x) }"
    found = verify(model(text), model(text))
    assert found.status is Status.UNVERIFIED
    assert found.passed is None
    assert "every output is random" in found.reason


def test_a_reference_that_does_not_repeat_itself_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(origins, "random_outputs", lambda _: {})
    text = "g (float[4] x) => (float[4] y) { y = RandomNormalLike(x) }"
    found = verify(model(text), model(text.replace("Like", "Like<seed = 3.0>")))
    assert found.status is Status.UNVERIFIED
    assert found.excluded == {"y": "differs between two runs of the reference"}


def test_an_output_that_is_unstable_on_some_feeds_only_is_excluded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = ReferenceRun(mlp())
    plain = session_module.Session.run

    def unstable(session: Any, feeds: Any, names: Any = None) -> Any:
        results = plain(session, feeds, names)
        return {name: value + np.float32(not feeds["x"].any()) for name, value in results.items()}

    monkeypatch.setattr(session_module.Session, "run", unstable)
    found = verify(reference, mlp())
    assert found.status is Status.UNVERIFIED
    assert found.excluded == {"y": "differs between two runs of the reference"}


def test_a_custom_operator_leaves_the_numbers_unverified_but_the_contract_checked() -> None:
    head = '<ir_version: 10, opset_import: ["" : 17, "mine" : 1]>'
    text = "g (float[4] x) => (float[4] y) { y = mine.Nonsense(x) }"
    data = bytes(onnx.parser.parse_model(head + text).SerializeToString())
    found = verify(data, data)
    assert found.status is Status.UNVERIFIED
    assert "the reference cannot be run: ONNX Runtime" in found.reason
    other = onnx.parser.parse_model(head + text.replace("y", "q"))
    assert verify(data, other.SerializeToString()).passed is False


def test_a_model_without_feeds_that_run_is_unverified() -> None:
    text = "g (float[2] x, int64[2] i) => (float[2] y) <int64[1] k = {7}, float[1] z = {1}> { y = Reshape(x, k) }"
    found = verify(model(text), model(text))
    assert found.status is Status.UNVERIFIED
    assert "generated ones were refused, the first (normal): " in found.reason
    assert found.dropped
    assert "none were given" in verify(mlp(), mlp(), []).reason


@pytest.mark.parametrize(
    ("candidate", "reason"),
    [
        (b"\xff\xff", "the candidate cannot be read"),
        (model("g (float[n,4] x) => (float[n,3] y) { y = Nonsense(x) }"), "the candidate cannot be run"),
        (model(MLP.replace("[n,4]", "[2,4]"), w=np.zeros((4, 3), np.float32), b=np.zeros(3, np.float32)), "axis 0 of"),
        (model("g (float[n,4] x) => (float[n,3] y) <int64[2] s = {1,3}> { y = Reshape(x, s) }"),
         "cannot be run: on feed 'normal, typical (n=2)', which the reference runs"),
    ],
)  # fmt: skip
def test_candidates_that_do_not_run_fail(candidate: bytes, reason: str) -> None:
    found = verify(mlp(), candidate)
    assert found.passed is False
    assert reason in found.reason


def test_a_reference_that_is_no_model_is_an_error() -> None:
    with pytest.raises(ModelError):
        verify(b"\xff\xff", mlp())


def test_defaults_may_become_constants_only_when_allowed() -> None:
    reference = model("g (float[2] x, float[2] w = {1, 2}) => (float[2] y) { y = Mul(x, w) }")
    fixed = model("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }")
    refused = verify(reference, fixed)
    assert refused.contract == ("the default of input 'w' can no longer be overridden",)
    allowed = verify(reference, fixed, options=VerifyOptions(allow_constant_defaults=True))
    assert allowed.passed
    assert "1 overridable defaults became constants: w" in allowed.notes
    assert "defaults overridden" not in allowed.feeds


def test_a_dropped_default_that_was_used_is_seen_in_the_numbers() -> None:
    reference = model("g (float[2] x, float[2] w = {1, 2}) => (float[2] y) { y = Mul(x, w) }")
    ignoring = model(
        "g (float[2] x, float[2] w = {1, 2}) => (float[2] y) <float[2] k = {1, 2}> { y = Mul(x, k) }"
    )
    found = verify(reference, ignoring)
    assert "on feed 'defaults overridden'" in found.reason


def test_ties_between_equal_scores_are_forgiven() -> None:
    text = "g (float[n,6] x) => (int64[n] i) { z = Mul(x, x) s = {} i = ArgMax<axis = 1, keepdims = 0>(s) }"
    plain = model(text.replace("{}", "Add(z, z)"))
    squared = text.replace(
        "s = {} i = ArgMax<axis = 1, keepdims = 0>(s)",
        "q = Mul(z, z) i = ArgMax<axis = 1, keepdims = 0>(q)",
    )
    assert verify(plain, model(squared), options=REORDERED).passed
    flat = (
        "g (float[n,6] x) => (int64[n] i) { s = Sub(x, x) i = ArgMax<axis = 1, keepdims = 0{}>(s) }"
    )
    last = verify(
        model(flat.replace("{}", "")),
        model(flat.replace("{}", ", select_last_index = 1")),
        options=REORDERED,
    )
    assert last.passed
    assert "equal within the tolerance" in last.outputs[0].why
    wrong = verify(plain, model(text.replace("{}", "Neg(z)")), options=REORDERED)
    assert wrong.passed is False


def test_cancellation_is_measured_against_the_noise_of_the_reference() -> None:
    """1e4 + x - 1e4 keeps four digits of x: the reference itself moves as much when x moves by one ulp."""
    one = """g (float[64] x, float[64] h) => (float[64] y) <float c = {3000}>
             { a = Add(x, c) b = Add(a, h) y = Sub(b, c) }"""
    two = one.replace("a = Add(x, c) b = Add(a, h)", "a = Add(x, h) b = Add(a, c)")
    feed = Feed(
        "big",
        {
            "x": np.linspace(90, 100, 64, dtype=np.float32),
            "h": np.linspace(1, 90, 64, dtype=np.float32),
        },
    )
    found = verify(model(one), model(two), [feed], options=REORDERED)
    assert found.outputs[0].max_abs
    assert found.passed
    shifted = one.replace("y = Sub(b, c)", "k = Sub(b, c) y = Add(k, e)").replace(
        "3000}", "3000}, float e = {0.01}"
    )
    assert verify(model(one), model(shifted), [feed], options=REORDERED).passed is False


PARTS = (
    "t = Transpose<perm=[0,2,1]>(k) p = MatMul(q, t) z = Mul(p, s) w = Softmax(z) y = MatMul(w, v)"
)
HALF_HEAD = '<ir_version: 10, opset_import: ["" : 23]>'


@pytest.mark.parametrize(("scale", "passes"), [(0.0078125, True), (0.0086, False)])
def test_halves_are_forgiven_what_rounding_them_does(scale: float, passes: bool) -> None:
    """The runtime computes parts in float32 and drops the casts; its Attention rounds scores, as the graph says.

    With inputs 30 times larger than usual that makes percents of difference, and so does rounding each value.
    """
    io = "(float16[2,16,64] q, float16[2,16,64] k, float16[2,16,64] v) => (float16[2,16,64] y)"
    reference = onnx.parser.parse_model(f"{HALF_HEAD}g {io} <float16 s = {{8192}}> {{ {PARTS} }}")
    candidate = onnx.parser.parse_model(
        f"{HALF_HEAD}g {io} {{ y = Attention<scale={scale}, q_num_heads=1, kv_num_heads=1>(q, k, v) }}"
    )
    found = verify(reference.SerializeToString(), candidate.SerializeToString(), options=REORDERED)
    assert found.passed is passes


def test_noise_forgives_no_more_than_it_explains() -> None:
    failed = OutputReport(
        "y", passed=False, equal=False, max_abs=1e-3, max_over_rms=1e-3, why="outside"
    )
    assert noise.forgive(failed, 1e-3).passed
    assert "the reference itself moves by 0.001" in noise.forgive(failed, 1e-3).why
    assert not noise.forgive(failed, 1e-4).passed
    assert noise.forgive(failed, 1e-4, stress=True).passed
    assert not noise.forgive(failed, 3e-5, stress=True).passed
    assert not noise.forgive(failed, 0.1).passed
    broken = dataclasses.replace(failed, nonfinite_equal=False)
    assert not noise.forgive(broken, 1e-3).passed


def test_the_floor_of_an_output() -> None:
    gate = profile_for(Numerics.REORDERED)
    ones = np.ones(4, np.float32)
    assert scale_floor(ones, OutputOrigin(), gate) == origins.FLOOR
    assert scale_floor(ones * 0, OutputOrigin(absolute=1e-6), gate) == pytest.approx(0.1)
    assert scale_floor(ones * 0, OutputOrigin(absolute=1e-6), profile_for(Numerics.EXACT)) == 0
    assert scale_floor([ones], OutputOrigin(), gate) == 0


def test_zero_feeds_do_not_turn_rounding_noise_into_failure() -> None:
    text = """g (float[n,9] x) => (float[n,9] y) <float c = {0.1}>
              { a = Add(x, c) m = ReduceMean<axes = [1]>(a) y = Sub(a, m) }"""
    other = text.replace("ReduceMean<axes = [1]>(a)", "Add(r, c)").replace(
        "{ a", "{ r = ReduceMean<axes = [1]>(x) a"
    )
    found = verify(model(text), model(other), options=REORDERED)
    assert found.passed
    assert found.outputs[0].equal is False


def test_lossy_has_a_budget() -> None:
    options = VerifyOptions(Numerics.LOSSY, Budget(sqnr_db=30))
    assert verify(mlp(), mlp(1.001), options=options).passed
    assert verify(mlp(), mlp(1.2), options=options).passed is False


def test_the_deployed_level_is_reported_and_never_fails() -> None:
    found = verify(mlp(), mlp(), options=VerifyOptions(deployed=OptimizationLevel.ALL))
    assert [report.name for report in found.deployed] == ["y"]
    wrong = verify(
        mlp(),
        mlp(1.2),
        options=VerifyOptions(Numerics.LOSSY, Budget(), deployed=OptimizationLevel.ALL),
    )
    assert wrong.passed


def test_strings_maps_and_sequences_are_verified() -> None:
    zipped = "g (float[2,2] x) => (seq(map(int64,float)) y) { y = ai.onnx.ml.ZipMap<classlabels_int64s = [4, {}]>(x) }"
    assert verify(model(zipped.replace("{}", "7")), model(zipped.replace("{}", "7"))).passed
    assert (
        verify(model(zipped.replace("{}", "7")), model(zipped.replace("{}", "8"))).passed is False
    )
    words = """g (string[3] x) => (string[3] y)
               { y = ai.onnx.ml.LabelEncoder<keys_strings = ["a"], values_strings = ["b"],
                 default_string = "{}">(x) }"""
    assert verify(model(words.replace("{}", "UPPER")), model(words.replace("{}", "UPPER"))).passed
    assert (
        verify(model(words.replace("{}", "UPPER")), model(words.replace("{}", "LOWER"))).passed
        is False
    )


def test_a_verification_is_json() -> None:
    found = verify(mlp(), mlp(1.2), options=REORDERED)
    text = json.dumps([dataclasses.asdict(report) for report in found.outputs], allow_nan=False)
    assert json.loads(text)[0]["name"] == "y"


def _off_by_one_axis(proto: onnx.ModelProto) -> None:
    node = next(node for node in proto.graph.node if node.op_type == "Softmax")
    node.attribute[0].i = 2


def _wrong_bias(proto: onnx.ModelProto) -> None:
    tensor = next(
        t
        for t in proto.graph.initializer
        if len(t.dims) == 1 and t.data_type == 1 and t.dims[0] > 4
    )
    array = helper.to_array(tensor).copy()
    array[0] += 0.01
    tensor.CopyFrom(helper.from_array(array, tensor.name))


def _no_op(op_type: str) -> Any:
    def change(proto: onnx.ModelProto) -> None:
        node = next(node for node in proto.graph.node if node.op_type == op_type)
        node.op_type = "Identity"
        del node.attribute[:]
        del node.input[1:]

    return change


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("lm_stories260k_kv", _no_op("Neg")),
        ("lm_stories260k_kv", _off_by_one_axis),
        ("vad_silero_16k", _wrong_bias),
        ("enh_gtcrn_simple", _no_op("Tanh")),
        ("bytes_magika_v33", _no_op("Tanh")),
        ("cifar10_resnet20", _wrong_bias),
    ],
)
def test_real_models_equal_themselves_and_not_their_broken_twins(
    zoo: Path, name: str, fault: Any
) -> None:
    path = zoo / "models" / f"{name}.onnx"
    reference = ReferenceRun(path)
    assert reference.verify(path).passed, reference.unverifiable
    broken = onnx.load(path)
    fault(broken)
    assert reference.verify(broken.SerializeToString(), REORDERED).passed is False


def test_a_brief_comparison_leaves_out_the_longest_feeds() -> None:
    text = "g (float[batch,4] x) => (float[batch,4] y) { y = Relu(x) }"
    model = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}')
    run = ReferenceRun(model.SerializeToString(), thorough=True)
    whole = run.verify(model.SerializeToString())
    brief = run.verify(model.SerializeToString(), VerifyOptions(brief=True))
    left = set(whole.feeds) - set(brief.feeds)
    assert left
    assert all("long (" in name for name in left)
