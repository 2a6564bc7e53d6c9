import logging
import pickle

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st_kdmcse.data import sentences as sentences_module
from st_kdmcse.data.sentences import read_sentences


def write(tmp_path, content):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    return path


def test_real_sentences(shared_data):
    path = shared_data / "wiki" / "wiki_sentences.txt"
    dataset = read_sentences(path)
    lines = path.read_text(encoding="utf-8").split("\n")
    assert dataset.column_names == ["sentence"]
    assert dataset["sentence"][:] == [line.strip() for line in lines if line.strip()]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\ntwo", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
        (b"\xef\xbb\xbf\none\n", ["one"]),
        (b"\n  \none\n\t\r\n\ntwo\n\n", ["one", "two"]),
        (b"  two  words \t\n", ["two  words"]),
        ("Zürich, 犬\u2028x\n".encode(), ["Zürich, 犬\u2028x"]),
        (b'a "quoted", text\tand a tab\n', ['a "quoted", text\tand a tab']),
    ],
)
def test_lines(tmp_path, content, expected):
    assert read_sentences(write(tmp_path, content))["sentence"][:] == expected


@settings(max_examples=100, deadline=None)
@given(lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\0"))), end=st.sampled_from("\n \r\n"))
def test_text_is_kept_apart_from_surrounding_whitespace(tmp_path_factory, lines, end):
    path = write(
        tmp_path_factory.mktemp("text"), "".join(f"{line}{end.strip(' ') or ' '}\n" for line in lines).encode()
    )
    expected = [line.removeprefix("\ufeff") if row == 0 else line for row, line in enumerate(lines)]
    expected = [line.strip() for line in expected if line.strip()]
    if expected:
        assert read_sentences(path)["sentence"][:] == expected
    else:
        with pytest.raises(ValueError, match="has no sentence"):
            read_sentences(path)


def test_many_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(sentences_module, "_LINES_PER_CHUNK", 4)
    for rows in (3, 4, 5, 8, 11):
        lines = [f"sentence {row}" for row in range(rows)]
        assert read_sentences(write(tmp_path, "\n".join(lines).encode()))["sentence"][:] == lines


def test_blank_lines_are_counted_in_the_log(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger=sentences_module.__name__)
    read_sentences(write(tmp_path, b"one\n\n \ntwo\n"))
    assert "text.txt: skipped 2 blank lines" in caplog.text


def test_memory_is_about_the_size_of_the_text(tmp_path):
    line = b"A sentence of about one hundred and twenty characters, as they are in an encyclopaedia that is on the web."
    path = write(tmp_path, (line + b"\n") * 150_000)
    before = pa.total_allocated_bytes()
    dataset = read_sentences(path)
    assert len(dataset) == 150_000
    assert pa.total_allocated_bytes() - before < 1.2 * path.stat().st_size


def test_pickle(tmp_path):
    dataset = read_sentences(write(tmp_path, b"one\ntwo\n"))
    assert pickle.loads(pickle.dumps(dataset))["sentence"][:] == ["one", "two"]


@pytest.mark.parametrize("content", [b"", b"\n", b" \n\t\r\n", b"\xef\xbb\xbf"])
def test_no_sentence(tmp_path, content):
    with pytest.raises(ValueError, match=r"text\.txt has no sentence"):
        read_sentences(write(tmp_path, content))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere\.txt"):
        read_sentences(tmp_path / "nowhere.txt")
    with pytest.raises(ValueError, match="is a folder"):
        read_sentences(tmp_path)


def test_other_encodings_name_the_line_and_the_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"text\.txt, line 3: not UTF-8 .*byte 1 .*iconv -f latin-1 -t utf-8"):
        read_sentences(write(tmp_path, "one\ntwo\nZürich\n".encode("latin-1")))


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf_16_names_the_remedy(tmp_path, encoding):
    with pytest.raises(ValueError, match=r"line 1: a NUL byte.*iconv -f utf-16"):
        read_sentences(write(tmp_path, "one\ntwo\n".encode(encoding)))


def test_binary_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="line 2: a NUL byte"):
        read_sentences(write(tmp_path, b"fine\nnot\0fine\n"))
