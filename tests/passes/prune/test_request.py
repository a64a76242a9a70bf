"""What `--sparsity` takes and refuses."""

from __future__ import annotations

import pytest
from graphopt_passes.prune.request import Allocation, Method, SparsityRequest, parse_sparsity

from graphopt.errors import OptionError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.8", SparsityRequest(ratio=0.8)),
        ("2:4", SparsityRequest(pattern=(2, 4))),
        ("channels:0.5", SparsityRequest(channels=0.5)),
        ("threshold:0.01", SparsityRequest(threshold=0.01)),
        (
            "0.8,layer=^a:0.5,layer=b:2:4,layer=c:2:0.5",
            SparsityRequest(ratio=0.8, own=(("^a", 0.5), ("b", (2, 4)), ("c:2", 0.5))),
        ),
        (
            "0.9, method=wanda, allocation=erk, refit=no, dense=^head",
            SparsityRequest(
                ratio=0.9,
                method=Method.WANDA,
                allocation=Allocation.ERK,
                refit=False,
                dense="^head",
            ),
        ),
    ],
)
def test_reads(text: str, expected: SparsityRequest) -> None:
    assert parse_sparsity(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("80", "80 is not between 0 and 1"),
        ("half", "is not a number"),
        ("4:2", "keeps 4 of each 2"),
        ("0:4", "keeps 0 of each 4"),
        ("rows:0.5", "is no amount"),
        ("threshold:-1", "is no amount"),
        ("0.8,method=magic", "unknown method 'magic'"),
        ("0.8,refit=maybe", "is no option"),
        ("0.8,dense=(", "is not a regular expression"),
        ("0.8,colour=red", "is no option"),
        ("channels:0.5,multiple=0", "is no option"),
        ("channels:0.5,multiple=x", "is no option"),
        ("channels:0.5,blocks=maybe", "is no option"),
        ("0.8,layer=a:4:2", "is not a regular expression, a colon and"),
        ("0.8,layer=(:2:4", "is not a regular expression"),
        ("0.8,importance=l2", "importance= is for channels"),
        ("2:4,by=latency", "by= is for channels"),
        ("lowrank:0.05,rounds=2", "rounds= is for channels"),
        ("channels:0.5,method=wanda", "method= is for zeros"),
        ("channels:0.5,layer=a:0.5", "layer= is for zeros"),
        ("lowrank:0.05,tune=yes", "tune= is for zeros"),
        ("2:4,allocation=erk", "allocation= spreads a share"),
        ("threshold:0.1,allocation=erk", "allocation= spreads a share"),
    ],
)
def test_refuses(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=None) as caught:
        parse_sparsity(text)
    assert says in str(caught.value)
