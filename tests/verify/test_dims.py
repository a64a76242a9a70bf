"""Sizes of symbolic dimensions: consistent, in several sets, and derived where the model derives them."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphopt.errors import DataError
from graphopt.runtime.specs import Dim, TensorSpec
from graphopt.verify.dims import Dims, DimSet, Sort


def spec(name: str, *shape: Dim) -> TensorSpec:
    return TensorSpec(name, ir.DataType.FLOAT, shape)


DECODER = (
    spec("input_ids", "batch", "seq"),
    spec("past.0.key", "batch", 4, "past_len", 8),
    spec("attention_mask", "batch", "total_len"),
)


def test_a_total_is_past_plus_present() -> None:
    dims = Dims(DECODER)
    typical = next(dims.first_choices())
    assert dims.shape(DECODER[0], typical) == (2, 8)
    assert dims.shape(DECODER[1], typical) == (2, 4, 4, 8)
    assert dims.shape(DECODER[2], typical) == (2, 12)


def test_further_sets_cover_ones_primes_and_an_empty_past() -> None:
    dims = Dims(DECODER)
    further = {
        candidates[0].label: candidates[0]
        for candidates in dims.further(next(dims.first_choices()))
    }
    assert dict(further["ones"].sizes) == {"batch": 1, "seq": 1, "past_len": 1}
    assert dict(further["primes"].sizes) == {"batch": 3, "seq": 13, "past_len": 5}
    assert dict(further["empty past"].sizes) == {"batch": 2, "seq": 8, "past_len": 0}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("past + seq", 12),
        ("past + 1", 5),
        ("2*seq", 16),
        ("seq - 1", 7),
        ("seq // 3", 2),
        ("past + 1//0", None),
    ],
)
def test_expressions_in_dimensions_follow_their_symbols(text: str, size: int | None) -> None:
    first = spec("x", "past", "seq", text)
    dims = Dims([first])
    assert dims.resolve(text, DimSet("typical", (("past", 4), ("seq", 8)))) == size
    assert set(dims.sorts) == {"past", "seq"}


@pytest.mark.parametrize("name", ["a-b", "unk__1", "dim 0", "f(x) + 1", "x +", "?"])
def test_other_text_is_a_name(name: str) -> None:
    assert set(Dims([spec("x", 3, name)]).sorts) == {name}


def test_unnamed_dimensions_share_the_batch_only() -> None:
    first, second = spec("x", None, None), spec("y", None, None)
    dims = Dims([first, second])
    assert set(dims.sorts) == {"batch?", "x[1]", "y[1]"}
    assert dims.shape(second, next(dims.first_choices())) == (2, 8)


def test_images_have_sides() -> None:
    dims = Dims(
        [spec("x", "N", 3, "h", "w"), spec("z", "N", "r", "s", 3), spec("q", "N", 16, "t", "u")]
    )
    assert [name for name, sort in dims.sorts.items() if sort is Sort.SIDE] == ["h", "w", "r", "s"]
    typical = next(dims.first_choices())
    primes = [c for cs in dims.further(typical) for c in cs if c.label == "primes"]
    # An odd size, half as much again, and the same again: detectors want multiples of their stride.
    assert [dict(c.sizes)["h"] for c in primes] == [67, 96, 64, 64]


def test_choices_go_on_to_other_sizes() -> None:
    dims = Dims([spec("x", "batch", "time")])
    tried = [dict(choice.sizes) for choice in dims.first_choices()]
    assert tried[0] == {"batch": 2, "time": 8}
    assert {"batch": 1, "time": 512} in tried
    assert list(Dims([spec("x", 2)]).first_choices()) == [DimSet("typical", ())]
    assert list(Dims([spec("x", 2)]).further(DimSet("typical", ()))) == []


def test_sizes_asked_for_are_kept() -> None:
    dims = Dims(DECODER, {"seq": 3})
    typical = next(dims.first_choices())
    assert dict(typical.sizes)["seq"] == 3
    assert all(dict(c.sizes)["seq"] == 3 for cs in dims.further(typical) for c in cs)


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(
        DataError, match=r"No input has a dimension called 'sek'.*'batch', 'seq', 'past_len'"
    ):
        Dims(DECODER, {"sek": 3})
    with pytest.raises(DataError, match="'seq' cannot be -1"):
        Dims(DECODER, {"seq": -1})


def test_unknown_ranks_and_unresolved_sizes() -> None:
    dims = Dims([TensorSpec("x", ir.DataType.FLOAT, None), spec("y", "a + b*c")])
    assert dims.shape(TensorSpec("x", ir.DataType.FLOAT, None), DimSet("typical", ())) is None
    assert dims.shape(spec("y", "a + b*c"), DimSet("typical", ())) == (1,)
    assert str(DimSet("typical", ())) == "typical"
