"""Tables of embeddings: dense unless asked for, pruned before the layers behind them are fitted."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from graphopt_passes.prune import Prune
from graphopt_passes.prune.request import parse_sparsity
from graphopt_passes.prune.tables import find_tables, prune_tables

from graphopt.errors import OptionError
from graphopt.ir.model_file import load_model, model_to_bytes
from graphopt.rewrite import Calibration, Context, Options, RemarkKind
from graphopt.targets import get_target
from tests.rewriting import parse

READER = """g (int64[N,6] t) => (float[N,6,8] y)
    <float[600,64] words, float[8,64] places, int64[6] at, float[64,64] w, float[64] b, float[64,8] v> {
    e = Gather(words, t)
    p = Gather(places, at)
    s = Add(e, p)
    m = MatMul(s, w)
    c = Add(m, b)
    r = Relu(c)
    y = MatMul(r, v)
}"""


def reader(text: str = READER) -> ir.Model:
    """The network with weights of a normal distribution."""
    proto, rng = parse(text), np.random.default_rng(0)
    for tensor in proto.graph.initializer:
        if tensor.name == "at":
            tensor.raw_data = np.arange(6, dtype=np.int64).tobytes()
        else:
            tensor.raw_data = rng.normal(size=tuple(tensor.dims)).astype(np.float32).tobytes()
    return load_model(proto)


def related() -> ir.Model:
    """The same with rows that are mixtures of eight."""
    model, rng = reader(), np.random.default_rng(3)
    rows = (rng.normal(size=(600, 8)) @ rng.normal(size=(8, 64))).astype(np.float32)
    model.graph.initializers["words"].const_value = ir.Tensor(rows, name="words")
    return model


def sentences(seed: int, count: int = 48) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [{"t": rng.integers(0, 600, (1, 6))} for _ in range(count)]


def context(model: ir.Model, sparsity: str, *, blind: bool = False, count: int = 48) -> Context:
    calibration = None if blind else Calibration(sentences(1, count))
    options = Options(sparsity=sparsity, calibration=calibration)
    return Context(model, get_target("cpu"), options)


def zeros(model: ir.Model, name: str) -> float:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return float(np.mean(tensor.numpy() == 0))


def outputs(model: ir.Model) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(model_to_bytes(model))
    return np.concatenate([session.run(None, feed)[0] for feed in sentences(2)])


def notes(ctx: Context) -> str:
    return " ".join(each.reason for each in ctx.remarks if each.kind is RemarkKind.NOTE)


def test_tables_stay_dense_and_the_note_says_how_to_prune_them() -> None:
    model = reader()
    ctx = context(model, "0.5")
    assert Prune().run(model, ctx)
    assert zeros(model, "words") == 0
    assert "tables=0.8 would prune those that Gather reads, 88% of the constants" in notes(ctx)


@pytest.mark.parametrize("blind", [True, False], ids=["blind", "fitted"])
@pytest.mark.parametrize(("option", "share"), [("0.75", 0.75), ("yes", 0.5), ("no", 0), ("0", 0)])
def test_a_vocabulary_gets_the_share_that_was_asked_for(
    option: str, share: float, *, blind: bool
) -> None:
    model = reader()
    ctx = context(model, f"0.5,tables={option}", blind=blind)
    assert Prune().run(model, ctx)
    assert zeros(model, "words") == pytest.approx(share, abs=1e-4)
    assert zeros(model, "places") == 0
    if share:
        assert f"{share:.1%} of the 38400 in tables" in notes(ctx)
        assert "would prune" not in notes(ctx)


def test_layers_behind_a_table_make_up_for_what_it_lost() -> None:
    whole, error = outputs(related()), {}
    for method in ("sparsegpt", "magnitude,refit=no"):
        model = related()
        ctx = context(model, f"0.1,tables=0.9,method={method}", count=240)
        Prune().run(model, ctx)
        error[method] = float(np.mean((outputs(model) - whole) ** 2))
    assert error["sparsegpt"] < 0.8 * error["magnitude,refit=no"]


def test_the_smallest_elements_of_the_table_go_and_zeros_are_positive() -> None:
    model = reader()
    (table,) = find_tables(model.graph)
    before = np.array(table.const_value.numpy()) if table.const_value else np.zeros(0)
    (done,) = prune_tables([table], 0.9)
    after = done.tensor.numpy()
    kept = after != 0
    assert done.zeros == int((~kept).sum()) == round(0.9 * before.size)
    np.testing.assert_array_equal(after[kept], before[kept])
    assert np.abs(before[~kept]).max() <= np.abs(before[kept]).min()
    assert not np.signbit(after[~kept]).any()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("e = Gather(words, t)", "e = Gather<axis=1>(words, t)"),
        ("s = Add(e, p)", "q = ReduceSum(words) k = Add(e, p) s = Add(k, q)"),
        ("(int64[N,6] t) =>", "(int64[N,6] t, float[600,64] words) =>"),
        ("float[600,64] words", "float[200,64] words"),
        ("float[600,64] words", "float[1,600,64] words"),
    ],
    ids=["other-axis", "other-reader", "overridable", "small", "rank"],
)
def test_no_table(old: str, new: str) -> None:
    text = READER.replace(old, new)
    if "t, float" in new:
        text = text.replace("float[600,64] words, float[8", "float[8", 1).replace(
            "<float[8", "<float[600,64] words, float[8"
        )
    assert find_tables(reader(text).graph) == []


def test_a_table_that_the_user_names_stays_dense() -> None:
    model = reader()
    assert find_tables(model.graph, "^words$") == []
    assert [each.name for each in find_tables(model.graph, "^w$")] == ["words"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("2:4,tables=yes", "no share of zeros"),
        ("0.5,tables=1", "no share of zeros"),
        ("0.5,tables=-0.1", "no share of zeros"),
        ("0.5,tables=all", "'all' is not a number"),
        ("channels:0.5,tables=0.5", "not for what is removed"),
        ("lowrank:0.05,tables=0.5", "not for what is removed"),
    ],
)
def test_what_is_no_share_of_tables_is_refused(text: str, why: str) -> None:
    with pytest.raises(OptionError, match=why):
        parse_sparsity(text)


def test_tables_go_with_patterns_and_thresholds_too() -> None:
    assert parse_sparsity("2:4,tables=0.75").tables == 0.75
    model = reader()
    assert Prune().run(model, context(model, "threshold:0.5,tables=0.75"))
    assert zeros(model, "words") == pytest.approx(0.75, abs=1e-4)


def test_what_stays_of_a_table_is_trained_with_the_layers() -> None:
    whole, error = outputs(related()), {}
    for tune in ("yes", "no"):
        model = related()
        ctx = context(model, f"0.5,tables=0.75,tune={tune}", count=120)
        assert Prune().run(model, ctx)
        assert zeros(model, "words") == pytest.approx(0.75, abs=1e-4)
        error[tune] = float(np.mean((outputs(model) - whole) ** 2))
        again = related()
        replay = dataclasses.replace(ctx, model=again)
        assert Prune().run(again, replay)
        assert weights_of(again) == weights_of(model)
        assert ("training what stays" in notes(ctx)) is (tune == "yes")
    assert error["yes"] < 0.9 * error["no"]


def weights_of(model: ir.Model) -> dict[str, bytes]:
    held = model.graph.initializers
    return {name: v.const_value.tobytes() for name, v in held.items() if v.const_value is not None}
