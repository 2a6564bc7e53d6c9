import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_kdmcse.search.base import COMPARISONS, NewRows, conditions, unit_rows


def test_rows_are_normalised_and_metadata_may_be_left_out():
    rows = NewRows.checked(["a", "b"], ["x", "y"], [[3, 4], [0, -2]])
    assert len(rows) == 2
    assert rows.embeddings.dtype == np.float32
    np.testing.assert_allclose(rows.embeddings, [[0.6, 0.8], [0, -1]], rtol=1e-6)
    assert list(rows.metadata) == [{}, {}]


def test_no_rows_are_rows():
    assert len(NewRows.checked([], [], np.empty((0, 4)))) == 0


@pytest.mark.parametrize(
    ("ids", "texts", "embeddings", "metadata", "message"),
    [
        (["a"], ["x", "y"], np.ones((1, 2)), None, "1 ids, 2 texts"),
        (["a"], ["x"], np.ones((2, 2)), None, r"shape \(2, 2\)"),
        (["a"], ["x"], np.ones(2), None, r"shape \(2,\)"),
        (["a"], ["x"], np.ones((1, 2)), [{}, {}], "2 metadata"),
        (["a", ""], ["x", "y"], np.ones((2, 2)), None, "row 1: the id ''"),
        (["a", 7], ["x", "y"], np.ones((2, 2)), None, "row 1: the id 7"),
        (["a" * 513], ["x"], np.ones((1, 2)), None, "1 to 512"),
        (["a", "b", "a"], ["x"] * 3, np.ones((3, 2)), None, "row 2: the id 'a' is there twice"),
        (
            ["a", "a\0b"],
            ["x"] * 2,
            np.ones((2, 2)),
            None,
            r"row 1: the id 'a\\x00b' holds the control character",
        ),
        (
            ["a"],
            ["x"],
            np.ones((1, 2)),
            [{"lang": "\0"}],
            r"\(id 'a'\): metadata 'lang': '\\x00' holds the control",
        ),
        (["a"], ["x"], np.ones((1, 2)), [{"la\x1fng": 1}], r"metadata 'la\\x1fng': 'la\\x1fng' holds the control"),
        (["a", "b"], ["x", "y"], [[1, 0], [0, 0]], None, r"row 1 \(id 'b'\): the embedding is zero"),
        (["a"], ["x"], [[np.nan, 1]], None, "not finite"),
        (["a"], ["x"], [[np.inf, 1]], None, "not finite"),
        (["a"], ["x"], np.ones((1, 2)), [{"tags": ["x"]}], r"row 0 \(id 'a'\): metadata 'tags'"),
        (["a"], ["x"], np.ones((1, 2)), [{1: "x"}], "metadata 1"),
        (["a"], ["x"], np.ones((1, 2)), [{"score": float("nan")}], "nan or infinite"),
    ],
)
def test_rows_that_do_not_fit_together_are_named(ids, texts, embeddings, metadata, message):
    with pytest.raises(ValueError, match=message):
        NewRows.checked(ids, texts, embeddings, metadata)


def test_unit_rows_survive_what_overflows_in_float32():
    np.testing.assert_allclose(unit_rows([[1e30, 1e30], [1e-30, 0]]), [[0.5**0.5, 0.5**0.5], [1, 0]], rtol=1e-6)


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=1, max_size=5))
def test_unit_rows_keep_the_direction(matrix):
    lengths = np.linalg.norm(matrix, axis=1)
    if lengths.min() < 1e-3:
        return
    units = unit_rows(matrix)
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(units * lengths[:, None], matrix, rtol=1e-5, atol=1e-3)


def test_conditions_of_a_filter():
    where = {"lang": "en", "tag": ["x", 2], "year": {"gte": 2000, "lt": 2010}, "seen": False, "none": ()}
    assert conditions(where) == [
        ("lang", "eq", "en"),
        ("tag", "in", ["x", 2]),
        ("year", "gte", 2000),
        ("year", "lt", 2010),
        ("seen", "eq", False),
        ("none", "in", []),
    ]
    assert [comparison for _, comparison, _ in conditions({"x": dict.fromkeys(COMPARISONS, 1)})] == list(COMPARISONS)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"": 1}, "names of metadata"),
        ({3: 1}, "names of metadata"),
        ({"year": {"above": 3}}, r"unknown comparison \['above'\]"),
        ({"year": {}}, "unknown comparison"),
        ({"year": None}, "None"),
        ({"year": [1, None]}, "None"),
        ({"year": {"eq": [1]}}, r"\[1\]"),
        ({"year": float("nan")}, "nan"),
        ({"year": {"lt": float("inf")}}, "inf"),
    ],
)
def test_filters_that_cannot_be_read(where, message):
    with pytest.raises(ValueError, match=message):
        conditions(where)
