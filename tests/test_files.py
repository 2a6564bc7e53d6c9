"""Files: whole or absent, locked, and recognised by their content."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from st_kdmcse.files import (
    atomic_file,
    atomic_path,
    check_output_file,
    is_gzip,
    is_parquet,
    locked,
    manifest_checksum,
    read_json,
    read_manifest,
    write_folder,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole_and_replaces_the_old_one(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for text in ("one", "two"):
        with atomic_file(path) as file:
            file.write(text)
            assert not path.exists() or path.read_text() == "one"
        assert path.read_text() == text
    assert names(path.parent) == ["file.txt"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), atomic_file(path) as file:
        file.writelines(["half", "\ud800"])
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file.txt"]


def test_the_first_of_several_processes_wins_where_that_is_asked_for(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"seed": 1}, keep_existing=True)
    write_json(path, {"seed": 2}, keep_existing=True)
    assert json.loads(path.read_text()) == {"seed": 1}
    write_json(path, {"seed": 3})
    assert json.loads(path.read_text()) == {"seed": 3}
    assert names(tmp_path) == ["run.json"]


def test_folders_are_replaced_or_kept(tmp_path):
    path = tmp_path / "folder"
    for content, keep, expected in (("one", False, "one"), ("two", True, "one"), ("three", False, "three")):
        write_folder(path, lambda folder, text=content: (folder / "file").write_text(text), keep_existing=keep)
        assert (path / "file").read_text() == expected
    with pytest.raises(FileNotFoundError), atomic_path(path) as temporary:
        (temporary / "no folder was made").write_text("")
    assert names(tmp_path) == ["folder"]
    assert (path / "file").read_text() == "three"


def test_a_folder_without_a_name_is_not_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"\. is a folder that is there"):
        write_json(".", {})
    assert not list(tmp_path.iterdir())


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "score.json", {"score": float("nan")})
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[1]", "1", '"text"'])
def test_a_damaged_file_is_named_with_the_remedy(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged .*: delete it"):
        read_json(tmp_path / "run.json", "delete it")


def test_manifests_are_checked(tmp_path):
    manifest = {"format": "ours", "version": 1, "rows": 3}
    manifest["checksum"] = manifest_checksum(manifest)
    path = tmp_path / "manifest.json"
    for changes, message in (
        ({}, None),
        ({"format": "theirs"}, "has the format 'theirs', expected 'ours'"),
        ({"version": 2}, "has version 2, this st_kdmcse reads version 1: upgrade st-kdmcse, or build it"),
        ({"rows": 4}, "was edited or damaged: its checksum does not fit its content; build it"),
    ):
        path.write_text(json.dumps({**manifest, **changes}))
        if message is None:
            assert read_manifest(path, "ours", 1, "build it") == manifest
        else:
            with pytest.raises(ValueError, match=message):
                read_manifest(path, "ours", 1, "build it")


def test_locks_exclude_each_other_unless_they_are_shared(tmp_path):
    pytest.importorskip("fcntl")
    busy = "another process is writing to .*: wait for it, or stop it"
    with locked(tmp_path / "folder"):
        for shared in (False, True):
            with pytest.raises(ValueError, match=busy), locked(tmp_path / "folder", shared=shared):
                pass
    shared_lock = locked(tmp_path / "folder", shared=True)
    with shared_lock, locked(tmp_path / "folder", shared=True), pytest.raises(ValueError, match=busy):
        locked(tmp_path / "folder").__enter__()
    with locked(tmp_path / "folder"):
        pass


def test_the_content_tells_what_a_file_is(tmp_path):
    parquet, packed, text = (tmp_path / name for name in ("a.txt", "b.txt", "c.parquet.gz"))
    pq.write_table(pa.table({"sentence": ["one"]}), parquet)
    packed.write_bytes(gzip.compress(b"one"))
    text.write_text("one")
    assert [is_parquet(path) for path in (parquet, packed, text)] == [True, False, False]
    assert [is_gzip(path) for path in (parquet, packed, text)] == [False, True, False]
    assert not is_gzip(tmp_path / "absent")
    assert not is_parquet(tmp_path)


def test_outputs_are_checked_before_the_work(tmp_path):
    check_output_file(None)
    check_output_file(tmp_path / "new" / "file.json")
    assert (tmp_path / "new").is_dir()
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        check_output_file(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be made"):
        check_output_file(tmp_path / "file" / "below.json")
