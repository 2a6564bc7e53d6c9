"""Filters as people type them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_kdmcse import build_student
from st_kdmcse.search import SemanticIndex
from st_kdmcse.search.filters import FilterError, parse_filter, search_typed, typed


def test_conditions():
    assert parse_filter([]) is None
    assert parse_filter(["a = b=c", "n>-1.5", "t=true"]) == {
        "a": {"eq": "b=c"},
        "n": {"gt": -1.5},
        "t": {"eq": True},
    }
    assert parse_filter(["a=NaN"]) == {"a": {"eq": "NaN"}}
    assert parse_filter(["a==1", "b == x"]) == {"a": {"eq": 1}, "b": {"eq": "x"}}
    assert parse_filter(["a=True", "b=FALSE", "c=[true]"]) == {"a": {"eq": True}, "b": {"eq": False}, "c": [True]}
    assert parse_filter(['a="True"', 'b="=>"']) == {"a": {"eq": "True"}, "b": {"eq": "=>"}}
    assert parse_filter([f"a>={-(2**63)}", f"a<={2**63 - 1}"]) == {"a": {"gte": -(2**63), "lte": 2**63 - 1}}
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
        ["a=>1"],
        ["a=<1"],
        ["a<>1"],
        ["a=!1"],
        ["a===1"],
        ["a=[]"],
        [f"a={2**63}"],
        [f"a={-(2**63) - 1}"],
        ["a<" + "9" * 30],
        ['a=["\\ud800"]'],
        ["\udce9=1"],
    ],
)
def test_what_is_no_condition(bad):
    with pytest.raises(ValueError, match="^filter "):
        parse_filter(bad)


@pytest.fixture(scope="module")
def index(tiny_bert):
    metadata = [
        {"ripe": True, "year": 2004, "code": "2004", "either": "x"},
        {"ripe": False, "year": -(2**63), "code": "True", "either": 1},
        {"year": 2**63 - 1, "kind": "<b>", "nothing": None},
    ]
    return SemanticIndex.build(build_student(str(tiny_bert)).to("cpu"), ["a dog", "snow", "a man"], metadata=metadata)


def found(index, *conditions):
    (hits,) = search_typed(index, ["a dog"], 10, parse_filter(conditions))
    return {hit.id for hit in hits}


def test_what_results_show_is_what_a_filter_takes(index):
    for hit in index.search("a dog"):
        for name, value in hit.metadata.items():
            if value is not None:
                assert hit.id in found(index, f"{name}={typed(value)}")
                assert hit.id not in found(index, f"{name}!={typed(value)}")
    assert found(index, "ripe=True") == found(index, "ripe=true") == found(index, "ripe!=False") == {"0"}
    assert found(index, "year==2004") == found(index, "code=" + typed("2004")) == {"0"}
    assert found(index, f"year={-(2**63)}") == found(index, f"year<={-(2**63)}") == {"1"}
    assert found(index, "year<2000", "year>2000") == set(), "nothing is wrong with it"


@given(st.one_of(st.text(min_size=1), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False)))
def test_every_value_is_read_as_it_is_shown(value):
    if value not in (float("inf"), float("-inf")):
        assert parse_filter([f"name={typed(value)}"]) == {"name": {"eq": value}}


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("yaer=2004", "'yaer': no text has such metadata; did you mean 'year'? There are 'code', 'either', 'kind'"),
        ("yaer!=2004", "did you mean 'year'?"),
        ("zzz>1", "'zzz': no text has such metadata; there are 'code'"),
        ("nothing=1", "'nothing': no text has such metadata"),
        ('year="2004"', "'year': there are numbers, and \"2004\" is not one of them"),
        ("code=2004", "'code': there are texts, and 2004 is not one of them"),
        ("ripe=yes", "'ripe': there are truth values, and yes is not one of them"),
        ("ripe=[1, 0]", "'ripe': there are truth values, and 1 is not one of them"),
        ("either=true", "'either': there are texts and numbers, and true is not one of them"),
    ],
)
def test_a_filter_that_no_text_can_fulfil_is_refused(index, condition, message):
    with pytest.raises(FilterError) as error:
        found(index, condition)
    assert message in str(error.value)


def test_an_empty_index_has_nothing_to_find(index):
    empty = SemanticIndex.build(index.model, [])
    assert search_typed(empty, ["a dog"], 3, {"year": 1}) == [[]]
