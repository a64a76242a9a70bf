"""Generated feeds: stable by name, within tables, with masks, branches, sizes and kinds; refusals lead elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.errors import DataError, GraphoptError
from graphopt.ir.model_file import load_model
from graphopt.runtime.session import Session, SessionOptions
from graphopt.verify import feeds as feeds_module
from graphopt.verify.feeds import Feed, find_feeds, make_feeds

HEAD = '<ir_version: 10, opset_import: ["" : 17, "ai.onnx.ml" : 2]>'


def proto(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEAD + text)


def feeds(text: str, **options: Any) -> dict[str, Any]:
    return {feed.name: feed.values for feed in make_feeds(ir.from_proto(proto(text)), **options)}


def test_floats_come_normal_zero_large_and_tiny() -> None:
    made = feeds("g (float[4,5] x) => (float[4,5] y) { y = Relu(x) }")
    assert list(made) == ["normal", "zeros", "large", "tiny"]
    plain = made["normal"]["x"]
    assert plain.dtype == np.float32
    assert not made["zeros"]["x"].any()
    np.testing.assert_allclose(made["large"]["x"], 30 * plain, rtol=1e-6)
    np.testing.assert_allclose(made["tiny"]["x"], 1e-4 * plain, rtol=1e-6)


def test_an_input_keeps_its_numbers_among_others() -> None:
    one = feeds("g (float[4] x) => (float[4] y) { y = Relu(x) }")["normal"]
    two = feeds("g (float[4] w, float[4] x) => (float[4] y) { y = Add(x, w) }")["normal"]
    assert np.array_equal(one["x"], two["x"])
    assert not np.array_equal(two["x"], two["w"])
    other = feeds("g (float[4] x) => (float[4] y) { y = Relu(x) }", seed=1)["normal"]
    assert not np.array_equal(one["x"], other["x"])


def test_ids_stay_within_their_table_and_reach_its_ends() -> None:
    text = "g (int64[b,s] ids, float[7,2] t) => (float y) { y = Gather(t, ids) }"
    made = feeds(text)
    for name, values in made.items():
        assert values["ids"].min() >= 0, name
        assert values["ids"].max() <= 6, name
    assert {0, 6} <= set(made["normal, typical (b=2, s=8)"]["ids"].reshape(-1).tolist())


def test_a_table_of_unknown_length_has_one_row_at_least() -> None:
    made = feeds("g (int64[3] ids, float x) => (float y) { t = NonZero(x) y = Gather(t, ids) }")
    assert made["normal"]["ids"].tolist() == [0, 0, 0]


def test_masks_hide_nothing_tails_and_a_row() -> None:
    text = "g (int64[b,s] attention_mask) => (int64[b,s] y) { y = Neg(attention_mask) }"
    made = {name.split(",")[0]: values["attention_mask"] for name, values in feeds(text).items()}
    assert made["normal"].all()
    assert made["prefix masks"][:, 0].all()
    assert not made["prefix masks"].all()
    assert (np.diff(made["prefix masks"], axis=1) <= 0).all()
    assert not made["one row masked"][0].any()
    assert made["one row masked"][1:].all()


def test_square_masks_are_causal_and_additive_masks_subtract() -> None:
    made = feeds("g (float[1,1,4,4] mask, float[1,1,4,4] a) => (float y) { y = Add(a, mask) }")
    assert not made["normal"]["mask"].any()
    causal = made["causal masks"]["mask"][0, 0]
    assert (causal[np.tril_indices(4)] == 0).all()
    assert (causal[np.triu_indices(4, 1)] == -1e4).all()


def test_one_dimensional_masks_hide_a_tail_and_everything() -> None:
    made = feeds("g (bool[6] key_mask) => (bool[6] y) { y = Not(key_mask) }")
    assert made["prefix masks"]["key_mask"].tolist() == [True] * 3 + [False] * 3
    assert made["one row masked"]["key_mask"].tolist()[0] is False


def test_both_branches_are_taken() -> None:
    text = """g (bool c, float[2] x) => (float[2] y) { y = If (c) <then_branch = t () => (float[2] a) { a = Neg(x) },
              else_branch = e () => (float[2] b) { b = Abs(x) }> }"""
    assert {bool(values["c"]) for values in feeds(text).values()} == {True, False}


def test_compared_constants_are_tried_with_their_neighbour() -> None:
    text = "g (int64 sr) => (bool y) <int64 c = {16000}> { y = Equal(sr, c) }"
    assert {int(values["sr"]) for values in feeds(text).values()} == {16000, 16001}


def test_elements_compared_one_by_one_lie_around_the_constants() -> None:
    made = feeds("g (int32[4,64] x) => (bool[4,64] y) <int32 pad = {256}> { y = Equal(x, pad) }")
    bytes_ = made["normal"]["x"]
    assert bytes_.min() == 0
    assert bytes_.max() == 257
    assert (bytes_[:, -1] == 256).all()
    assert len(np.unique(bytes_)) > 100


def test_padding_ids_are_sprinkled_into_rows() -> None:
    text = """g (int64[2,6] ids, float[9,2] t) => (float y, bool p) <int64 pad = {3}>
              { y = Gather(t, ids) p = Equal(ids, pad) }"""
    assert (feeds(text)["normal"]["ids"][:, -1] == 3).all()


@pytest.mark.parametrize(
    ("declared", "nodes"),
    [
        ("int64[2] x, float[2,3] d", "y = Reshape(d, x)"),
        ("int64[2] x, float[2,3] d", "y = Expand(d, x)"),
        ("int64[2] x", "y = ConstantOfShape(x)"),
        ("int64 x, float[2,3] d", "y = CumSum(d, x)"),
        ("int64[2] x, float[2,3] d", "y = Tile(d, x)"),
        ("int64[1] x, float[2,3] d", "y, i = TopK(d, x)"),
        ("int64[1] x, float[2,3] d", "y = Slice(d, z, x)"),
        ("int64 x", "y = Range(zero, x, one)"),
        ("int32[2] x", "one32 = Cast<to=6>(one) y = Div(one32, x)"),
        ("uint8[2,3] x", "y = Cast<to=1>(x)"),
        ("int64[3] x", "y = Cast<to=1>(x)"),
        ("string[3] x", "y = Identity(x)"),
        ("string x", "y = Identity(x)"),
        ("int64[2] x, float[2,3] d", "y = Unsqueeze(d, x)"),
        ("float[4] x, float[1,1,3,3] d", 'y = Resize<mode = "linear">(d, , x)'),
        ("bool[3] x", "y = Not(x)"),
        ("float16[3] x", "y = Relu(x)"),
        ("seq(float[2]) x", "y = SequenceLength(x)"),
        ("map(int64,float) x", "y = ai.onnx.ml.DictVectorizer<int64_vocabulary=[0,1]>(x)"),
        ("float x", "y = Relu(x)"),
        ("float[0,3] x", "y = Relu(x)"),
    ],
)
def test_every_sort_of_input_runs(declared: str, nodes: str) -> None:
    text = f"g ({declared}) => (y) <int64[1] z = {{0}}, int64 zero = {{0}}, int64 one = {{1}}> {{ {nodes} }}"
    made = proto(text.replace("=> (y)", "=> (float y)"))
    made.graph.output[0].ClearField("type")
    session = Session(made.SerializeToString(), options=SessionOptions(prepack=False))
    found = find_feeds(load_model(made.SerializeToString()), _runner(session), specs=session.inputs)
    assert found.feeds, found.dropped


def _runner(session: Session) -> Any:
    def refuses(feed: Feed) -> str | None:
        try:
            session.run(feed.values)
        except GraphoptError as error:
            return str(error)
        return None

    return refuses


def test_optionals_are_also_absent() -> None:
    made = feeds("g (optional(float[2]) x) => (bool y) { y = OptionalHasElement(x) }")
    assert made["optionals absent"]["x"] is None
    assert made["normal"]["x"].shape == (2,)


def test_float_defaults_are_left_and_overridden_integers_left_alone() -> None:
    text = """g (float[2] x, float[2] w = {1, 2}, int64[1] s = {2}) => (float[2] y)
              { a = Mul(x, w) y = Reshape(a, s) }"""
    made = feeds(text)
    assert set(made["normal"]) == {"x"}
    overridden = made["defaults overridden"]
    assert set(overridden) == {"x", "w"}
    assert not np.array_equal(overridden["w"], [1, 2])
    before_four = onnx.parser.parse_model(HEAD.replace("10", "3") + text)
    assert not any("overridden" in feed.name for feed in make_feeds(ir.from_proto(before_four)))


def test_a_refused_size_is_replaced_by_another() -> None:
    text = "g (float[b,time] x) => (float[b,time] y) { y = Relu(x) }"

    def refuses(feed: Feed) -> str | None:
        return None if feed.values["x"].shape[1] % 32 == 0 else "not a multiple of 32"

    found = find_feeds(ir.from_proto(proto(text)), refuses)
    assert found.feeds[0].name == "normal, typical (b=2, time=32)"
    assert {feed.values["x"].shape for feed in found.feeds} >= {(1, 32), (3, 32)}
    assert all(dropped.reason == "not a multiple of 32" for dropped in found.dropped)


def test_a_model_that_refuses_everything_is_given_up() -> None:
    tried: list[str] = []

    def refuses(feed: Feed) -> str:
        tried.append(feed.name)
        return "no"

    found = find_feeds(
        ir.from_proto(proto("g (float[b,t] x) => (float[b,t] y) { y = Relu(x) }")), refuses
    )
    assert not found.feeds
    assert len(found.dropped) == len(tried) <= feeds_module.MAX_ATTEMPTS


def test_a_feed_too_large_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds_module, "MAX_ELEMENTS", 6)
    monkeypatch.setattr(feeds_module, "MAX_LEAST_ELEMENTS", 10)
    found = find_feeds(
        ir.from_proto(proto("g (float[11] x) => (float[11] y) { y = Relu(x) }")), lambda _: None
    )
    assert [dropped.reason for dropped in found.dropped] == ["more than 10 elements"]
    free = ir.from_proto(proto("g (float[t,5] x) => (float[t,5] y) { y = Relu(x) }"))
    assert {feed.values["x"].shape for feed in find_feeds(free, lambda _: None).feeds} == {(1, 5)}


def test_an_unknown_dimension_is_refused() -> None:
    with pytest.raises(DataError, match="No input has a dimension called 'q'"):
        feeds("g (float[b,t] x) => (float[b,t] y) { y = Relu(x) }", dims={"q": 1})
    sized = feeds("g (float[b,t] x) => (float[b,t] y) { y = Relu(x) }", dims={"t": 5})
    assert {values["x"].shape[1] for values in sized.values()} == {5}


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("vad_silero_16k", 6),
        ("lm_stories260k_kv", 7),
        ("enh_gtcrn_simple", 4),
        ("bytes_magika_v33", 4),
        ("face_yunet_s", 6),
    ],
)
def test_awkward_real_models_get_feeds_that_run(zoo: Path, name: str, least: int) -> None:
    path = zoo / "models" / f"{name}.onnx"
    session = Session(path)
    found = find_feeds(load_model(path), _runner(session), specs=session.inputs)
    assert len(found.feeds) >= least
    if name == "lm_stories260k_kv":
        assert any("past=0" in feed.name for feed in found.feeds)
