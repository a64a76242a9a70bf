"""Einsum where it is a Transpose or a MatMul."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.einsum import RULES, find_product, read_equation, without_ellipsis

from graphopt.numerics import Numerics
from tests.rewriting import apply, check, compare, make_feeds, parse, run


@pytest.mark.parametrize(
    ("equation", "left", "right", "after"),
    [
        ("bsd,de->bse", "B,S,4", "4,5", "MatMul(a, b)"),
        ("bsd,ed->bse", "B,S,4", "5,4", "Transpose<perm = [1, 0]>(b)  y = MatMul(a, t)"),
        ("bhid,bhjd->bhij", "B,2,I,4", "B,2,J,4", "Transpose<perm = [0, 1, 3, 2]>(b)  y = MatMul(a, t)"),
        ("bhij,bhjd->bhid", "B,2,I,J", "B,2,J,4", "MatMul(a, b)"),
        ("bdi,bdj->bij", "B,4,I", "B,4,J", "Transpose<perm = [0, 2, 1]>(a)  y = MatMul(t, b)"),
        ("kj,ik->ij", "4,J", "I,4", "MatMul(b, a)"),
        ("bsd,d->bs", "B,S,4", "4", "MatMul(a, b)"),
        ("bhid,hde->bhie", "B,2,I,4", "2,4,5", "MatMul(a, b)"),
    ],
)  # fmt: skip
def test_einsum_is_a_product(equation: str, left: str, right: str, after: str) -> None:
    rank = len(equation.partition("->")[2])
    head = f"g (float[{left}] a, float[{right}] b) => (float[{','.join('PQRS'[:rank])}] y)"
    after = after if "y =" in after else f"y = {after}"
    after = after if after.startswith("y =") else f"t = {after}"
    check(
        RULES,
        before=f'{head} {{ y = Einsum<equation = "{equation}">(a, b) }}',
        after=f"{head} {{ {after} }}",
    )


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bij,bj->bi", "B,I,J", "B,J"),  # a product of matrix and vector for each b
        ("ij,ij->ij", "I,J", "I,J"),
        ("ij,jk->i", "I,4", "4,K"),
        ("ij,kl->ijkl", "I,J", "K,L"),
        ("ii,ij->j", "3,3", "3,J"),
    ],
)
def test_other_einsums_stay(equation: str, left: str, right: str) -> None:
    rank = len(equation.partition("->")[2])
    head = f"g (float[{left}] a, float[{right}] b) => (float[{','.join('PQRS'[:rank])}] y)"
    check(RULES, before=f'{head} {{ y = Einsum<equation = "{equation}">(a, b) }}')


def test_dims_that_may_differ_stay() -> None:
    check(
        RULES,
        before='g (float[I,K] a, float[L,J] b) => (float[I,J] y) { y = Einsum<equation = "ik,kj->ij">(a, b) }',
        missed="may differ",
    )


@pytest.mark.parametrize(
    ("equation", "left", "right", "result", "kinds"),
    [
        ("bqhd,bkhd->bhqk", "B,Q,2,4", "B,K,2,4", "B,2,Q,K", ["Transpose", "Transpose", "MatMul"]),
        ("bhqk,bkhd->bqhd", "B,2,Q,K", "B,K,2,4", "B,Q,2,4", ["Transpose", "MatMul", "Transpose"]),
        ("bsd,dhk->bshk", "B,S,4", "4,2,3", "B,S,2,3", ["Reshape", "MatMul", "Reshape"]),
        ("bshk,hkd->bsd", "B,S,2,3", "2,3,4", "B,S,4", ["Reshape", "Reshape", "MatMul"]),
        ("dhk,bsd->bshk", "4,2,3", "B,S,4", "B,S,2,3", ["Reshape", "MatMul", "Reshape"]),
        ("bxyd,bde->bxye", "B,X,3,4", "B,4,5", "B,X,3,5", ["Reshape", "MatMul", "Reshape"]),
        ("...d,de->...e", "I,4", "4,5", "I,5", ["MatMul"]),
        ("...qd,...kd->...qk", "B,2,Q,4", "B,2,K,4", "B,2,Q,K", ["Transpose", "MatMul"]),
    ],
)  # fmt: skip
def test_einsum_is_a_product_of_what_is_moved(
    equation: str, left: str, right: str, result: str, kinds: list[str]
) -> None:
    text = f"""g (float[{left}] a, float[{right}] b) => (float[{result}] y)
               {{ y = Einsum<equation = "{equation}">(a, b) }}"""
    model = ir.from_proto(parse(text))
    apply(RULES, model)
    assert [n.op_type for n in model.graph if n.op_type != "Constant"] == kinds
    feeds = make_feeds(parse(text), 0, dim=3)
    compare(run(parse(text), feeds), run(ir.to_proto(model), feeds), Numerics.REORDERED, 1e-6)


@pytest.mark.parametrize(
    ("equation", "left", "right", "result", "missed"),
    [
        ("bqhd,bkhd->bhqk", "B,Q,2,4", "C,K,2,4", "B,2,Q,K", "the dims of 'b' may differ"),
        ("bxyd,bde->bxye", "B,X,Y,D", "B,D,5", "B,X,Y,5", "more than one size is unknown"),
    ],
)
def test_contraction_of_unknown_sizes_stays(
    equation: str, left: str, right: str, result: str, missed: str
) -> None:
    head = f"g (float[{left}] a, float[{right}] b) => (float[{result}] y)"
    check(RULES, before=f'{head} {{ y = Einsum<equation = "{equation}">(a, b) }}', missed=missed)


def test_products_of_bfloat16_stay() -> None:
    """ONNX Runtime has kernels of Einsum for it that MatMul lacks."""
    text = """g (bfloat16[2,3] x, bfloat16[3,4] w) => (bfloat16[2,4] y) {
        y = Einsum<equation = "ij,jk->ik">(x, w) }"""
    ctx = apply(RULES, model := ir.from_proto(parse(text)))
    assert {remark.reason for remark in ctx.remarks} == {
        "not every runtime multiplies matrices of bfloat16"
    }
    assert [node.op_type for node in model.graph] == ["Einsum"]


def test_contraction_of_nothing_stays() -> None:
    """A view cannot say 0 and mean it; ONNX Runtime 1.31 itself divides by zero there, so that nothing is run."""
    text = """g (float[0,Q,2,4] a, float[0,K,2,4] b) => (float[0,2,Q,K] y)
              { y = Einsum<equation = "bqhd,bkhd->bhqk">(a, b) }"""
    ctx = apply(RULES, ir.from_proto(parse(text)))
    assert [remark.reason for remark in ctx.remarks] == ["an operand is empty"]


def test_labels_that_an_ellipsis_stands_for() -> None:
    assert without_ellipsis("...d, de -> ...e", [3, 2]) == "ABd,de->ABe"
    assert without_ellipsis("...i,...i->...", [3, 2]) == "ABi,Bi->AB"
    assert without_ellipsis("ij,jk->ik", [2, 2]) == "ij,jk->ik"


def test_einsum_of_one_operand_is_a_transpose() -> None:
    check(
        RULES,
        before='g (float[I,J,K] x) => (float[K,I,J] y) { y = Einsum<equation = "ijk -> kij">(x) }',
        after="g (float[I,J,K] x) => (float[K,I,J] y) { y = Transpose<perm = [2, 0, 1]>(x) }",
    )


def test_implicit_result_is_alphabetical() -> None:
    assert read_equation("ba") == (("ba",), "ab")
    assert read_equation("ik,kj") == (("ik", "kj"), "ij")


def test_sum_over_a_label_stays() -> None:
    check(RULES, before='g (float[I,J] x) => (float[I] y) { y = Einsum<equation = "ij->i">(x) }')


def test_every_product_found_is_right() -> None:
    """All equations over four labels with operands of two or three: what is found multiplies to the same."""
    sizes = dict(zip("abcd", (2, 3, 4, 5), strict=True))
    rng = np.random.default_rng(0)
    found = 0
    for left, right in itertools.product(
        itertools.permutations("abc"), itertools.permutations("abcd", 2)
    ):
        for result in itertools.permutations("abcd", 3):
            terms = "".join(left), "".join(right), "".join(result)
            product = find_product(*terms)
            if product is None or not set(terms[2]) <= set(terms[0] + terms[1]):
                continue
            found += 1
            x, w = (rng.standard_normal([sizes[c] for c in term]) for term in terms[:2])
            first, second = (w, x) if product.swapped else (x, w)
            first = first.swapaxes(-1, -2) if product.flip_left else first
            second = second.swapaxes(-1, -2) if product.flip_right else second
            np.testing.assert_allclose(
                first @ second, np.einsum(f"{terms[0]},{terms[1]}->{terms[2]}", x, w)
            )
    assert found > 20
