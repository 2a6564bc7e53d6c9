import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from st_kdmcse.data.readers.columns import captions_in, choose_columns


@pytest.mark.parametrize(
    ("names", "asked", "expected"),
    [
        (["image", "caption"], (), ("image", ["caption"])),
        (["raw", "sentids", "split", "filename", "img_id"], (), ("filename", ["raw"])),
        (["image", "caption_0", "caption_1", "x"], (), ("image", ["caption_0", "caption_1"])),
        (["image", "caption1", "caption2"], (), ("image", ["caption1", "caption2"])),
        (["image", "caption", "caption_0"], (), ("image", ["caption"])),
        (["image", "caption", "alt"], ("auto", "alt,caption"), ("image", ["alt", "caption"])),
        (["image", "a, b"], ("auto", "a, b"), ("image", ["a, b"])),
        (["image", "caption"], ("auto", "alt,caption"), None),
        (["image", "caption"], ("caption", "auto"), ("caption", ["image"])),
        (["picture", "caption"], (), ("picture", ["caption"])),
        (["picture", "words", "n"], (), None),
        (["path", "path"], (), None),
    ],
)
def test_columns(names, asked, expected):
    assert choose_columns(names, *asked) == expected


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["one"], ["one"]),
        ([["one", "two"]], ["one", "two"]),
        (['["one", "tw\\u00f6"]'], ["one", "tw\u00f6"]),
        (["['one', \"two's\"]"], ["one", "two's"]),
        (["['one' 'two']"], ["['one' 'two']"]),  # of NumPy: Python would read one text
        (['["one"'], ['["one"']),
        (["[1, 2]"], ["[1, 2]"]),
        (['["one", 2]'], ['["one", 2]']),
        (["[a dog]"], ["[a dog]"]),
        ([""], [""]),
        ([None], [None]),
        ([[]], []),
        (["one", "", None, "two"], ["one", "two"]),
        (["", None], ["", None]),
        (['["' + "[" * 100_000], ['["' + "[" * 100_000]),
    ],
)
def test_captions_in_cells(cells, expected):
    assert captions_in(*cells) == expected


@given(st.lists(st.text(), min_size=1))
def test_lists_in_a_cell_are_read_as_they_were_written(texts):
    assert captions_in(json.dumps(texts)) == texts
    assert captions_in(repr(texts)) == texts
