"""Explanations: why a node has its dtype, what was rewritten there, and what is said where there is no such node."""

from __future__ import annotations

from graphopt.driver import optimize
from graphopt.driver.result import Result
from graphopt.report.explain import explain
from tests.rewriting import parse

TEXT = (
    "g (float[N,16] x) => (float[N,8] y) <float[16,32] w, float[32,8] v>"
    "{ a = MatMul(x, w) e = Exp(a) b = Identity(e) l = Tanh(b) y = MatMul(l, v) }"
)


def made() -> Result:
    model = parse(TEXT)
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    return optimize(model, target="cuda", precision="fp16", verify="off")


def told(pattern: str, result: Result) -> dict[str, tuple[str, ...]]:
    return {e.node: e.sentences for e in explain(result.report, result.model, pattern)}


def test_a_node_in_float32_says_why() -> None:
    (sentence, *_) = told("e", made())["e"]
    assert sentence.startswith("float32: Exp: range: |e| reaches inf")


def test_a_node_in_half_says_how_far_it_is_from_the_limits() -> None:
    (first, *rest) = told("node_y", made())["node_y"]
    assert first.startswith("half: nothing speaks against it 'MatMul, up to ")
    assert any("rewritten by cast-to-half/cast" in sentence for sentence in rest)


def test_what_is_gone_is_explained_by_what_happened_to_it() -> None:
    (sentence, *_) = told("b", made())["b"]
    assert "tidy/" in sentence


def test_wildcards_name_several() -> None:
    assert {"node_a", "node_y"} <= set(told("node_?", made()))


def test_a_wrong_name_is_answered_with_close_ones() -> None:
    assert "node_y" in told("node_z", made())["node_z"][0]
    assert told("@", made())["@"] == ("no node or value is called so",)
