import csv
import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st_kdmcse.data.json_files import json_items
from st_kdmcse.data.readers.base import BadRowError, Problems
from st_kdmcse.data.readers.parsing import (
    existing_file,
    image_folder,
    is_image_name,
    read_csv,
    read_lines,
)


def kept(read, path):
    problems = Problems("skip")
    return list(read(path, problems)), [(problem.kind, problem.where) for problem in problems.listed]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo\n", [(1, "one"), (2, "two")]),
        (b"one\r\n\r\ntwo", [(1, "one"), (3, "two")]),
        (b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n", [(1, "one"), (2, "\ufefftwo")]),
        (b"  one \t\n", [(1, "  one \t")]),
        ("a\u2028b\x0bc\x85d\n".encode(), [(1, "a\u2028b\x0bc\x85d")]),
        (b"a\rb\n", [(1, "a"), (2, "b")]),
    ],
)
def test_lines(write, content, expected):
    assert kept(read_lines, write("f.txt", content)) == (expected, [])


@settings(max_examples=80, deadline=None)
@given(lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\0\r\ufeff"), min_size=1), min_size=1))
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_keep_their_text(tmp_path_factory, lines, end):
    path = tmp_path_factory.mktemp("lines") / "f.txt"
    path.write_bytes("".join(line + end for line in lines).encode())
    assert kept(read_lines, path) == (list(enumerate(lines, start=1)), [])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"caf\xe9", r"f.txt, line 2: not UTF-8 at character 4; convert the file, .*`iconv -f latin-1 -t utf-8`"),
        (b"a\0b", r"f.txt, line 2: a NUL byte; .*`iconv -f utf-16 -t utf-8`"),
        (b"\xed\xa0\x80", "f.txt, line 2: not UTF-8"),  # half of a surrogate pair
    ],
)
@pytest.mark.parametrize("read", [read_lines, read_csv])
def test_encodings(write, read, bad, message):
    path = write("f.txt", b"good\n" + bad + b"\nalso good\n")
    rows, problems = kept(read, path)
    assert [number for number, _ in rows] == [1, 3]
    assert problems == [("encoding", f"{path}, line 2")]
    with pytest.raises(BadRowError, match=message):
        list(read(path, Problems()))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("read", [read_lines, read_csv])
def test_a_file_in_utf_16(write, read, encoding):
    path = write("f.txt", "a.jpg,one\nb.jpg,two\n".encode(encoding))
    with pytest.raises(BadRowError, match="line 1: .*iconv -f utf-16"):
        list(read(path, Problems()))
    rows, problems = kept(read, path)
    assert not rows
    assert {kind for kind, _ in problems} == {"encoding"}


@pytest.mark.parametrize("read", [read_lines, read_csv])
def test_an_empty_file(write, read):
    with pytest.raises(ValueError, match=r"f.txt is empty: give the file with the captions"):
        list(read(write("f.txt", ""), Problems("skip")))


FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\0\r\ufeff"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(st.tuples(FIELD.filter(bool), FIELD), min_size=1, max_size=8), end=st.sampled_from(["\n", "\r\n"]))
def test_csv_is_read_as_it_was_written(tmp_path_factory, rows, end):
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows(rows)
    path = tmp_path_factory.mktemp("csv") / "f.csv"
    path.write_bytes(text.getvalue().encode())
    found, problems = kept(read_csv, path)
    assert [fields for _, fields in found] == [list(row) for row in rows]
    assert not problems


def test_a_quoted_field_over_several_lines(write):
    path = write("f.csv", 'image,caption\na.jpg,"one\ntwo, ""three""\n"\nb.jpg,four\n')
    assert kept(read_csv, path)[0][1:] == [(2, ["a.jpg", 'one\ntwo, "three"\n']), (5, ["b.jpg", "four"])]


@pytest.mark.parametrize(
    "bad", ['b.jpg,"not closed', 'b.jpg,"closed" too early', 'b.jpg,"one"two"', '"b.jpg,caption', 'b.jpg,"a ""b']
)
@pytest.mark.parametrize("more", ['c.jpg,"a quoted, caption"\nd.jpg,two\n', "c.jpg,one\nd.jpg,two\n", ""])
def test_a_quote_that_is_not_closed_swallows_nothing(write, bad, more):
    path = write("f.csv", f"a.jpg,zero\n{bad}\n{more}")
    rows, problems = kept(read_csv, path)
    expected = [["c.jpg", "a quoted, caption" if "quoted" in more else "one"], ["d.jpg", "two"]] if more else []
    assert [fields for _, fields in rows] == [["a.jpg", "zero"], *expected]
    assert problems == [("wrong columns", f"{path}, line 2")]
    with pytest.raises(BadRowError, match=r'f.csv, line 2: a quote \("\) is opened there and not closed'):
        list(read_csv(path, Problems()))


def test_a_quote_that_is_not_closed_among_names_without_suffix(write):
    path = write("f.csv", 'one,"open\n' + "".join(f"name{row},caption\n" for row in range(200)))
    rows, problems = kept(read_csv, path)
    assert rows == [(row + 2, [f"name{row}", "caption"]) for row in range(200)]
    assert problems == [("wrong columns", f"{path}, line 1")]


def test_a_quote_within_an_unquoted_field_is_text(write):
    assert kept(read_csv, write("f.csv", 'a.jpg,a 5" pipe\nb.jpg,two\n')) == (
        [(1, ["a.jpg", 'a 5" pipe']), (2, ["b.jpg", "two"])],
        [],
    )


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_json_items(write, start):
    path = write("f.json", start + '{"x": 1, "images": [{"a": 1.5}, "犬"]}'.encode())
    assert list(json_items(path, "images.item")) == [{"a": 1.5}, "犬"]
    assert list(json_items(path, "other.item")) == []


@pytest.mark.parametrize("content", [b"", b"text", b'{"images": [1, 2', b'{"images": ["\xff"]}', b'{"images": [1]}}'])
def test_bad_json(write, content):
    with pytest.raises(ValueError, match=r"f.json is not whole, valid JSON in UTF-8.*download it again"):
        list(json_items(write("f.json", content), "images.item"))


def test_paths(tmp_path, write):
    path = write("f.txt", "x")
    assert existing_file(str(path)) == path
    assert image_folder(str(tmp_path)) == tmp_path
    assert image_folder(None) is None
    for wrong, message in ((tmp_path, "is a folder"), (tmp_path / "no", "does not exist")):
        with pytest.raises(FileNotFoundError, match=message):
            existing_file(wrong)
    for wrong in (path, tmp_path / "no"):
        with pytest.raises(FileNotFoundError, match="there is no folder .*: give the folder with the image files"):
            image_folder(wrong)


def test_names_of_images():
    assert all(map(is_image_name, ["a.jpg", "x/y.PNG", "a b.jpeg", "http://x.org/y?z=1", "https://x.org"]))
    assert not any(map(is_image_name, ["image", "a.txt", "a dog. a cat", "see http://x.org", "http://a b", ""]))
