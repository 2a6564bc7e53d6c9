"""Filters as people type them."""

import pytest

from st_kdmcse.search.filters import parse_filter


def test_conditions():
    assert parse_filter([]) is None
    assert parse_filter(["a = b=c", "n>-1.5", "t=true"]) == {
        "a": {"eq": "b=c"},
        "n": {"gt": -1.5},
        "t": {"eq": True},
    }
    assert parse_filter(["a=NaN"]) == {"a": {"eq": "NaN"}}
    assert parse_filter(["a=" + "[" * 5000]) == {"a": {"eq": "[" * 5000}}


@pytest.mark.parametrize(
    "bad",
    [
        ["=a"],
        ["a"],
        ["a="],
        ["a=1", "a=2"],
        ["a=[1]", "a>1"],
        ["a>1", "a=[1]"],
        ["a>[1]"],
        ["a=null"],
        ['a={"b": 1}'],
        ["a=1e999"],
        ["a<" + "9" * 30],
        ['a=["\\ud800"]'],
        ["\udce9=1"],
    ],
)
def test_what_is_no_condition(bad):
    with pytest.raises(ValueError, match="^filter "):
        parse_filter(bad)
