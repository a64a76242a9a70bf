"""Predicted times: of sizes that were observed, of nodes beside the products, of factors in front of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from graphopt_passes.quantize.cost import Costs, rates_of
from graphopt_passes.quantize.placement import Site, place
from graphopt_passes.quantize.styles import style_named

from graphopt.calibrate.statistics import Statistics
from graphopt.ir.model_file import load_model
from tests.calibrate.test_statistics import observe
from tests.rewriting import parse

RATES = rates_of("x86-vnni")
SEEN = {"x": observe(np.ones((1, 128, 64), np.float32))}


def sites_of(text: str) -> tuple[ir.Graph, dict[ir.Node, Site]]:
    graph = load_model(parse(text)).graph
    return graph, place(graph, style_named("x86-vnni"), lambda _node: True)


def product(size: str) -> str:
    return f"g (float[1,{size},64] x) => (float[1,{size},256] y) <float[64,256] w> {{ y = MatMul(x, w) }}"


def gain(text: str, statistics: dict[str, Statistics]) -> float:
    _, sites = sites_of(text)
    return Costs(statistics, RATES).gain(sites, sites)


def test_what_a_product_makes_follows_from_what_it_reads() -> None:
    """A free axis is no axis of one: the result has as many rows as were observed."""
    known = SEEN | {"y": observe(np.ones((1, 128, 256), np.float32))}
    assert gain(product("t"), SEEN) == pytest.approx(gain(product("128"), known))


def test_nodes_beside_the_products_take_time() -> None:
    text = """g (float[1,128,64] x) => (float[1,128,128] p) <float[64,64] w, float[64,64] v> {
     q = MatMul(x, w)  k = MatMul(x, v)  t = Transpose<perm=[0,2,1]>(k)  s = MatMul(q, t)  p = Softmax(s) }"""
    graph, sites = sites_of(text)
    for value in (node.outputs[0] for node in graph if node.op_type in ("Transpose", "MatMul")):
        sizes = {"t": (1, 64, 128), "s": (1, 128, 128)}.get(value.name or "", (1, 128, 64))
        value.shape = ir.Shape(sizes)
    costs = Costs(SEEN, RATES)
    product_of_both = 128 * 128 * 64 * RATES.product
    passed_on = 0.6 * (128 * 64 + 128 * 128) + 3 * 4000  # Transpose, Softmax, three nodes
    assert costs.beside(graph, sites) == pytest.approx(product_of_both + passed_on)


def test_factors_in_front_of_products_are_paid_for_with_them() -> None:
    _, sites = sites_of(product("128"))
    plain, factored = Costs(SEEN, RATES), Costs(SEEN, RATES, multiplied=frozenset({"x"}))
    assert factored.gain(sites, sites) < plain.gain(sites, sites)


def convolution(weight: tuple[int, ...], group: int, image: tuple[int, ...]) -> str:
    sizes, kernel = ",".join(map(str, image)), ",".join(map(str, weight))
    pads = ",".join(str(d // 2) for d in (*weight[2:], *weight[2:]))
    return (
        f"g (float[1,{weight[1] * group},{sizes}] x) => (float[1,{weight[0]},{sizes}] y) <float[{kernel}] w> "
        f"{{ y = Conv<group={group}, pads=[{pads}]>(x, w) }}"
    )


@pytest.mark.parametrize(("weight", "group", "image", "pays"), [
    ((64, 64, 3, 3), 1, (28, 28), True),
    ((256, 64, 3, 3), 4, (14, 14), True),  # 2.4x
    ((64, 8, 3, 3), 8, (28, 28), False),  # measured: 0.79x of float
    ((128, 4, 3, 3), 32, (28, 28), False),  # 0.37x
    ((64, 8, 1, 1), 8, (28, 28), False),  # 0.42x
    ((16, 3, 3, 3, 3), 1, (8, 32, 32), False),  # 0.22x
    ((32, 32, 3, 3, 3), 1, (8, 16, 16), True),  # 2.6x
    ((64, 64, 3), 1, (200,), True),  # 2.9x
])  # fmt: skip
def test_groups_and_other_axes_are_copied_at_length(
    weight: tuple[int, ...], group: int, image: tuple[int, ...], pays: bool
) -> None:
    _, sites = sites_of(convolution(weight, group, image))
    made = observe(np.ones((1, weight[0], *image), np.float32))
    read = observe(np.ones((1, weight[1] * group, *image), np.float32))
    costs = Costs({"x": read, "y": made}, RATES)
    alone = costs.gain(sites, sites)
    assert (alone > 0) == pays
