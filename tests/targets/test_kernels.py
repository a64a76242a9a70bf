"""Kernel and operator tables: what is packaged, and how it is read."""

from __future__ import annotations

import json
from importlib.resources import files

import onnxruntime as ort
import pytest

from graphopt.emit.rules import CHECKS
from graphopt.runtime.installed import element_type, installed_kernels
from graphopt.targets.kernels import Kernel, KernelTable, merged, pack, packaged_kernels, unpack
from graphopt.targets.operators import operator_table

FLOAT, INT = frozenset({"float"}), frozenset({"int64"})


def test_every_table_says_what_it_is_and_under_which_licence() -> None:
    tables = [file for file in (files("graphopt.targets") / "tables").iterdir() if file.is_file()]
    assert {file.name for file in tables} == {
        "ort_cpu.json",
        "ort_cuda.json",
        "tensorrt.json",
        "openvino.json",
        "trtexec.json",
    }
    for file in tables:
        header = json.loads(file.read_bytes())["header"]
        assert header["schema"] == 1
        assert all(header[key] for key in ("source", "licence"))
        assert header.get("version") or "release" in header["source"]


def test_an_open_kernel_serves_its_own_version_alone() -> None:
    kernel = Kernel(13, None, {})
    assert [kernel.serves(version) for version in (12, 13, 14)] == [False, True, False]


def test_a_closed_kernel_serves_its_range() -> None:
    kernel = Kernel(7, 12, {})
    assert [kernel.serves(version) for version in (6, 7, 9, 12, 13)] == [
        False,
        True,
        True,
        True,
        False,
    ]


def test_rows_are_joined_where_one_constraint_differs() -> None:
    rows = merged([Kernel(1, None, {"T": FLOAT, "I": INT}), Kernel(1, None, {"T": INT, "I": INT})])
    assert rows == (Kernel(1, None, {"T": FLOAT | INT, "I": INT}),)


def test_rows_that_differ_in_two_constraints_stay_apart() -> None:
    rows = [Kernel(1, None, {"T": FLOAT, "I": INT}), Kernel(1, None, {"T": INT, "I": FLOAT})]
    assert merged(rows) == tuple(rows)


def test_packing_a_table_keeps_it() -> None:
    table = KernelTable("P", "1", "here", {("", "Add"): (Kernel(7, 12, {"T": FLOAT | INT}),)})
    body = json.loads(json.dumps(pack(table, "MIT")))
    assert unpack(body) == table
    assert body["header"]["licence"] == "MIT"


def test_the_packaged_table_is_that_of_its_version() -> None:
    packaged, installed = packaged_kernels("ort-cpu"), installed_kernels()
    assert installed is not None
    if packaged.version != ort.__version__:
        pytest.skip(f"packaged for {packaged.version}, installed is {ort.__version__}")
    if packaged.source.rpartition(", ")[2].split()[0] != "x86_64":
        pytest.skip("packaged for another processor")
    assert pack(packaged, "")["kernels"] == pack(installed, "")["kernels"]


def test_a_provider_that_is_not_installed_has_no_table() -> None:
    assert installed_kernels("NoExecutionProvider") is None


def test_cuda_has_attention_in_half_and_no_integer_convolution() -> None:
    cuda = packaged_kernels("ort-cuda")
    assert any("float16" in row.types["T1"] for row in cuda.find("", "Attention"))
    assert cuda.find("", "QLinearConv") == ()


@pytest.mark.parametrize(
    ("text", "written"), [("tensor(float)", "float"), ("seq(tensor(float))", "seq(tensor(float))")]
)
def test_element_types(text: str, written: str) -> None:
    assert element_type(text) == written


def test_every_rule_of_a_table_is_one_that_is_known() -> None:
    for name in ("tensorrt", "openvino"):
        for op_type, entry in operator_table(name).operators.items():
            for rule in entry.rules:
                assert rule.check in CHECKS, (op_type, rule)
                assert rule.source


def test_versions_of_operators_are_read() -> None:
    table = operator_table("tensorrt")
    assert table.operators["RMSNormalization"].since == (10, 15)
    assert not table.operators["QLinearConv"].supported
    assert table.strict
    assert not operator_table("openvino").strict
