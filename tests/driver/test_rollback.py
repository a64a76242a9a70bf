"""What breaks is found, left out and named, and the rest stands; or nothing is written."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt import optimize
from graphopt.driver import judge as judge_module
from graphopt.errors import GraphoptError, ModelError, PassError, VerifyError
from graphopt.ir.build import Builder
from graphopt.numerics import Numerics
from graphopt.pipeline import RewritePass
from graphopt.rewrite import Context, Match, Op, Var, exact, rule
from graphopt.targets import get_target
from tests.driver.conftest import Loose, double, only, operators, put, remove_identity, same

x = Var()
FEED = {"x": np.linspace(-2, 2, 12, dtype=np.float32).reshape(3, 4)}


def fail(_model: ir.Model, _ctx: Context) -> None:
    raise KeyError("no such thing")


def dangle(model: ir.Model, _ctx: Context) -> None:
    """Leaves a node that reads a value of no graph."""
    model.graph[-1].replace_input_with(0, ir.Value(name="nowhere"))


def negate(model: ir.Model, _ctx: Context) -> None:
    """Turns the Exp into a Neg, unasked."""
    for node in model.graph:
        if node.op_type == "Exp":
            node.op_type = "Neg"


def test_a_wrong_rule_is_found_left_out_and_named(source: Path, out: Path) -> None:
    result = optimize(source, output=out, passes=[double("bad", "Exp")])
    (left,) = result.report.rolled_back
    assert (left.pass_name, left.rule, left.site) == ("bad", "wrong", "c")
    assert "output 'y'" in left.reason
    assert result.report.verification.passed is True
    assert operators(out) == ["Abs", "Exp", "Neg"]
    same(source, out, FEED)
    assert "bad/wrong" not in {f"{r.pass_name}/{r.rule}" for r in result.report.rewrites}


def test_a_wrong_rule_among_right_ones_costs_only_itself(source: Path, out: Path) -> None:
    steps = (double("bad", "Abs"), *map(only_identity, "ab"), double("worse", "Neg"))
    result = optimize(source, output=out, recipe=only(*steps))
    assert {left.pass_name for left in result.report.rolled_back} == {"bad", "worse"}
    assert operators(out) == ["Abs", "Exp", "Neg"]


def only_identity(name: str) -> RewritePass:
    @exact(Op("Identity", x))
    def drop(m: Match, _g: Builder) -> ir.Value:
        return m[x]

    return RewritePass(name, (drop,))


def test_a_rule_that_is_wrong_in_many_places_is_left_out_everywhere(
    tmp_path: Path, out: Path
) -> None:
    chain = "  ".join(f"v{i + 1} = Tanh(v{i})" for i in range(40))
    text = f"g (float[4] v0) => (float[4] y) {{ {chain}  y = Neg(v40) }}"
    result = optimize(
        put(tmp_path / "m.onnx", text), output=out, recipe=only(double("bad", "Tanh"))
    )
    assert {(left.pass_name, left.rule) for left in result.report.rolled_back} == {("bad", "wrong")}
    assert operators(out) == ["Tanh"] * 40 + ["Neg"]


def test_a_rule_that_is_wrong_on_one_feed_only(tmp_path: Path, out: Path) -> None:
    """Relu is left away where the user's first inputs are positive, and the second are not."""

    @exact(Op("Relu", x))
    def optimistic(m: Match, _g: Builder) -> ir.Value:
        return m[x]

    text = "g (float[N] x) => (float[N] y) { a = Identity(x)  b = Relu(a)  y = Neg(b) }"
    feeds = [{"x": np.ones(3, np.float32)}, {"x": -np.ones(5, np.float32)}]
    hopeful = RewritePass("hopeful", (optimistic,))
    result = optimize(put(tmp_path / "m.onnx", text), output=out, passes=[hopeful], inputs=feeds)
    assert [left.rule for left in result.report.rolled_back] == ["optimistic"]
    assert result.report.verification.feeds == 2
    assert operators(out) == ["Relu", "Neg"]
    blind = optimize(tmp_path / "m.onnx", passes=[hopeful], inputs=feeds[:1])
    assert blind.report.rolled_back == ()


def test_verify_each_names_the_pass(source: Path, out: Path) -> None:
    result = optimize(source, output=out, passes=[double("bad", "Exp")], verify="each")
    (left,) = result.report.rolled_back
    assert (left.pass_name, left.rule) == ("bad", "wrong")
    assert "pass bad broke the numbers" in left.reason
    assert result.report.verification.mode == "each"
    assert operators(out) == ["Abs", "Exp", "Neg"]


def test_strict_refuses_wrong_numbers(source: Path, out: Path) -> None:
    out.write_bytes(b"what was there")
    with pytest.raises(
        VerifyError, match=r"the result is wrong: output 'y'.* Nothing was written"
    ) as told:
        optimize(source, output=out, passes=[double("bad", "Exp")], strict=True)
    assert told.value.exit_status == 1
    assert out.read_bytes() == b"what was there"
    assert list(out.parent.iterdir()) == [out]


@pytest.mark.parametrize("act", [fail, dangle], ids=["raises", "invariants"])
def test_a_pass_that_fails_is_left_out(
    act: object, source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    loose = Loose("loose", act)  # type: ignore[arg-type]
    result = optimize(source, output=out, passes=[loose])
    (left,) = result.report.rolled_back
    assert (left.pass_name, left.rule, left.site) == ("loose", "", "")
    assert "pass loose" in left.reason
    assert operators(out) == ["Abs", "Exp", "Neg"]
    (dump,) = tmp_path.glob("graphopt-before-loose-*.onnx")
    assert str(dump) in left.reason


def test_the_dump_is_the_model_before_the_pass_without_large_weights(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    text = """g (float[N,64] x) => (float[N,64] y) <float[64,64] w> {
        a = Identity(x)  b = MatMul(a, w)  y = Relu(b) }"""
    with pytest.raises(PassError, match="pass loose raised KeyError: 'no such thing'") as told:
        optimize(
            put(tmp_path / "m.onnx", text), output=out, passes=[Loose("loose", fail)], strict=True
        )
    assert told.value.exit_status == 70
    assert told.value.dump is not None
    assert told.value.dump in str(told.value)
    dump = Path(told.value.dump)
    assert dump.stat().st_size < 2000
    dumped = onnx.load(dump, load_external_data=False)
    assert [node.op_type for node in dumped.graph.node] == ["MatMul", "Relu"]
    assert not list(out.parent.iterdir())


def test_the_first_pass_is_dumped_as_the_model_was_loaded(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(PassError) as told:
        optimize(source, recipe=only(Loose("loose", fail)), strict=True)
    assert operators(Path(str(told.value.dump))) == ["Abs", "Identity", "Exp", "Neg"]


def test_a_dump_that_cannot_be_written_is_done_without(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    result = optimize(source, output=out, passes=[Loose("loose", fail)])
    assert "The model as it was" not in result.report.rolled_back[0].reason


def test_a_pass_that_fails_otherwise_the_second_time_leaves_no_dump(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not deterministic: the replay never comes to the pass that failed first."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    turns: list[int] = []

    def erratic(_model: ir.Model, _ctx: Context) -> None:
        turns.append(1)
        if len(turns) > 1:
            raise ValueError("again")

    with pytest.raises(PassError) as told:
        optimize(source, recipe=only(Loose("one", erratic), Loose("two", fail)), strict=True)
    assert told.value.dump is None
    assert told.value.pass_name == "two"


def test_a_model_that_the_checker_refuses_is_mended(source: Path, out: Path) -> None:
    """The rule puts an attribute where the operator has none: the numbers are right, the file is not."""
    pattern = Op("Exp", x)

    @exact(pattern)
    def adorned(m: Match, g: Builder) -> ir.Value | None:
        return None if m.attr(pattern, "frills", 0) else g.op("Exp", m[x], frills=1)

    result = optimize(source, output=out, passes=[RewritePass("sloppy", (adorned,))])
    (left,) = result.report.rolled_back
    assert (left.pass_name, left.rule) == ("sloppy", "adorned")
    assert left.reason.startswith("onnx.checker refuses the result")
    onnx.checker.check_model(onnx.load(out), full_check=True)


def test_what_the_checker_refuses_before_is_a_warning_after(tmp_path: Path, out: Path) -> None:
    proto = onnx.load(
        put(tmp_path / "m.onnx", "g (float[4] x) => (float[4] y) { a = Identity(x)  y = Exp(a) }")
    )
    proto.graph.node[1].attribute.append(onnx.helper.make_attribute("frills", 1))
    onnx.save(proto, tmp_path / "m.onnx")
    result = optimize(tmp_path / "m.onnx", output=out)
    (warning,) = [w for w in result.report.warnings if "onnx.checker" in w]
    assert warning.startswith("onnx.checker refuses the original model, and so the result")


@pytest.mark.parametrize("verify", ["final", "each"])
def test_a_pass_that_asks_for_nothing_and_breaks_the_numbers_is_left_out_whole(
    verify: str, source: Path, out: Path
) -> None:
    loose = Loose("loose", negate)
    result = optimize(source, output=out, passes=[loose, only_identity("fine")], verify=verify)
    (left,) = result.report.rolled_back
    assert (left.pass_name, left.rule, left.site) == ("loose", "", "")
    assert "without asking" in left.reason
    assert operators(out) == ["Abs", "Exp", "Neg"]


def test_a_pass_that_asks_for_nothing_and_is_right_stands(source: Path, out: Path) -> None:
    loose = Loose("loose", lambda model, _ctx: remove_identity(model))
    result = optimize(source, output=out, recipe=only(loose))
    assert not result.report.rolled_back
    assert operators(out) == ["Abs", "Exp", "Neg"]


def test_a_fault_of_reading_or_writing_is_told_as_one(
    source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference is of another model than the one that is optimised."""
    other = put(source.with_name("other.onnx"), "g (float[N,4] x) => (float[N,4] y) { y = Exp(x) }")
    monkeypatch.setattr(judge_module.Judge, "_original", lambda _self: other)
    out.write_bytes(b"what was there")
    with pytest.raises(VerifyError, match=r"wrong even without any rewrite.*Nothing was written"):
        optimize(source, output=out)
    assert out.read_bytes() == b"what was there"
    assert list(out.parent.iterdir()) == [out]


def test_after_too_many_faults_the_run_gives_up(source: Path, out: Path) -> None:
    steps = [double(f"bad{i}", "Exp") for i in range(17)]
    with pytest.raises(
        VerifyError, match=r"still wrong after 16 .*bad\d+/wrong\. Nothing was written"
    ):
        optimize(source, output=out, recipe=only(*steps))
    assert not list(out.parent.iterdir())


def test_a_model_that_does_not_run_itself_is_to_blame_for_what_the_checker_refuses(
    tmp_path: Path,
) -> None:
    text = "g (float[N,4] x) => (float[7] y) <int64[1] s = {7}> { z = Reshape(x, s) y = Neg(z) }"
    source = put(tmp_path / "model.onnx", text)

    @exact(Op("Neg", x))
    def unknown(m: Match, g: Builder) -> ir.Value:
        return g.op("NoSuchOperator", m[x])

    steps = [RewritePass(f"bad{i}", (unknown,)) for i in range(4)]
    with pytest.raises(ModelError, match=r"contradicts itself.*does not run either.*Reshape"):
        optimize(source, output=tmp_path / "out.onnx", recipe=only(*steps))
    assert list(tmp_path.iterdir()) == [source]


def test_a_pass_that_fails_in_a_replay_alone_is_left_out_too(source: Path, out: Path) -> None:
    """It stumbles over what another pass leaves when bisection cuts that short."""

    def picky(model: ir.Model, _ctx: Context) -> None:
        if "Tanh" not in operators(model):
            raise RuntimeError("where is my Tanh?")

    @exact(Op("Abs", x))
    def first(m: Match, g: Builder) -> ir.Value:
        return g.op("Tanh", m[x])

    steps = (RewritePass("bad", (first,)), Loose("picky", picky))
    result = optimize(source, output=out, recipe=only(*steps))
    assert {left.pass_name for left in result.report.rolled_back} <= {"bad", "picky"}
    assert "bad" in {left.pass_name for left in result.report.rolled_back}
    assert operators(out) == ["Abs", "Identity", "Exp", "Neg"]


def test_a_named_error_of_a_pass_ends_the_run(source: Path, out: Path) -> None:
    """A pass may have a word for the user: that is no bug."""

    def refuse(_model: ir.Model, _ctx: Context) -> None:
        raise VerifyError("not with me")

    with pytest.raises(GraphoptError, match="not with me"):
        optimize(source, output=out, passes=[Loose("loose", refuse)])
    assert not list(out.parent.iterdir())


def test_nothing_of_the_dump_is_left_where_nothing_fails(
    source: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    optimize(source, output=out)
    assert not list(tmp_path.glob("graphopt-*"))


def test_numbers_are_judged_by_what_was_done_not_by_what_could_have_been(
    source: Path, out: Path
) -> None:
    """A pass that may reorder and does nothing leaves the gate exact."""
    lossy = Loose("lossy", lambda _model, _ctx: None, Numerics.LOSSY)
    result = optimize(source, output=out, passes=[lossy])
    assert result.report.verification.profile == "exact"


SCRIPT = """
import onnx_graphsurgeon as gs
import onnx_ir as ir
from graphopt.rewrite import Op, Var, exact

def strip(graph: gs.Graph) -> gs.Graph:
    for node in [n for n in graph.nodes if n.op == "Identity"]:
        node.o().inputs[0] = node.inputs[0]
    return graph.cleanup().toposort()

def spoil(graph: gs.Graph) -> gs.Graph:
    for node in graph.nodes:
        if node.op == "Exp":
            node.op = "Abs"
    return graph

class Drop(ir.passes.InPlacePass):
    def call(self, model):
        for node in [n for n in model.graph if n.op_type == "Identity"]:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            model.graph.remove(node, safe=True)
        return ir.passes.PassResult(model, True)

x = Var()

@exact(Op("Identity", x))
def through(m, g):
    return m[x]
"""


@pytest.mark.parametrize("name", ["strip", "Drop", "through"])
def test_passes_of_every_origin_run_from_a_script(
    name: str, source: Path, out: Path, tmp_path: Path
) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    result = optimize(source, output=out, recipe=only(), passes=[f"{script}:{name}"])
    assert not result.report.rolled_back
    assert operators(out) == ["Abs", "Exp", "Neg"]


def test_a_graphsurgeon_function_that_breaks_the_numbers_is_left_out(
    source: Path, out: Path, tmp_path: Path
) -> None:
    script = tmp_path / "mine.py"
    script.write_text(SCRIPT)
    result = optimize(source, output=out, passes=[f"{script}:spoil"])
    assert [left.pass_name for left in result.report.rolled_back] == ["spoil"]
    assert operators(out) == ["Abs", "Exp", "Neg"]


def test_a_replay_that_the_target_could_not_take_is_compared_all_the_same(
    tmp_path: Path, out: Path
) -> None:
    """Without its last rewrites the model needs opset 20; a search over how many to make must get past that."""
    source = put(
        tmp_path / "m.onnx",
        '<ir_version: 9, opset_import: ["" : 20]> g (float[4] x) => (float[4] y)'
        " { a = Abs(x)  b = Exp(a)  c = Gelu(b)  y = Neg(c) }",
    )

    root = Op("Exp", x)

    @exact(root)
    def refused(m: Match, g: Builder) -> ir.Value | None:
        return None if m[root].attributes else g.op("Exp", m[x], nonsense=1)

    @rule(Op("Gelu", x))
    def expanded(m: Match, g: Builder) -> ir.Value:
        erf = g.op("Erf", g.op("Div", m[x], g.const(np.float32(np.sqrt(2)))))
        half = g.op("Mul", m[x], g.const(np.float32(0.5)))
        return g.op("Mul", half, g.op("Add", erf, g.const(np.float32(1))))

    once = Loose("invalid", lambda model, ctx: RewritePass("r", (refused,)).run(model, ctx))
    target = dataclasses.replace(get_target("cpu"), opset=(7, 18))
    passes = only(once, RewritePass("expand", (expanded,)))
    result = optimize(source, output=out, recipe=passes, target=target)
    assert [(left.pass_name, left.rule) for left in result.report.rolled_back] == [
        ("invalid", "refused")
    ]
    assert operators(out)[:2] == ["Abs", "Exp"]
