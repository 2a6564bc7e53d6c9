"""Tests of st_kdmcse.search.build."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import st_kdmcse.search.build as build_module
from st_kdmcse import build_student
from st_kdmcse.search import SemanticIndex, TextRecord, build_index

WORKER = Path(__file__).with_name("killed_index_worker.py")
SOURCE = {"file": "some.txt", "sha256": "0" * 64}


@pytest.fixture
def records(sentences):
    return [TextRecord(f"r{row}", text, {"row": row}) for row, text in enumerate(sentences)]


@pytest.fixture
def build(student, tmp_path):
    def run(records, **options):
        settings = {"source": SOURCE, "block_rows": 32, "show_progress_bar": False} | options
        return build_index(lambda: iter(records), student, None, tmp_path / "index", **settings)

    return run


@pytest.fixture
def stopped(build, records, monkeypatch):
    """A build that failed in its fourth block."""
    encode, calls = build_module.encode_documents, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encode(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "encode_documents", fail)
        with pytest.raises(KeyboardInterrupt):
            build(records)


@pytest.mark.parametrize("factory", [None, "HNSW16", "IVF4,Flat"])
def test_equals_an_index_built_in_memory(build, records, student, tmp_path, factory):
    index = build(records, factory=factory, recall_target=1.0)
    texts, ids = [record.text for record in records], [record.id for record in records]
    other = SemanticIndex.build(student, texts, ids=ids, factory=factory, recall_target=1.0)
    for mine, theirs in zip(index.search(texts[::7]), other.search(texts[::7]), strict=True):
        assert [hit.score for hit in mine] == pytest.approx([hit.score for hit in theirs], abs=1e-5)
    assert index.get(ids)[5].metadata == {"row": 5}
    found = [hits[0].id for hits in index.search(texts, k=1)]
    # IVF may miss a near tie, and texts of one embedding change places with the rounding of the processor.
    best = [hits[0].score for hits in index.search(texts, k=1)]
    own = [mine == wanted or score > 1 - 1e-4 for mine, wanted, score in zip(found, ids, best, strict=True)]
    assert np.mean(own) >= 0.99
    assert [each.name for each in tmp_path.iterdir()] == ["index"]
    assert index.save() == tmp_path / "index"


def test_goes_on_after_an_interruption(stopped, build, records, monkeypatch, caplog):
    encoded, encode = [], build_module.encode_documents

    def count(model, texts, *rest):
        encoded.append(len(texts))
        return encode(model, texts, *rest)

    monkeypatch.setattr(build_module, "encode_documents", count)
    with caplog.at_level(logging.INFO, "st_kdmcse"):
        index = build(records)
    assert sum(encoded) == len(records) - 96
    assert "went on with 96 of 200 records" in caplog.text
    assert [hits[0].id for hits in index.search([record.text for record in records], k=1)] == [
        record.id for record in records
    ]


def flip_a_bit(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flip_a_bit, lambda content: content[: len(content) // 2], lambda content: b"", None]
)
def test_damaged_files_of_a_build_are_made_again(stopped, build, records, tmp_path, damage):
    folder = tmp_path / "index.parts"
    for name in ("part-000000.npy", "part-000001.json", "rows.sqlite"):
        if damage is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(damage((folder / name).read_bytes()))
    (folder / "rows.sqlite-journal").write_bytes(b"of a transaction that was killed")
    index = build(records)
    assert [(hit.text, hit.metadata) for hit in index.get([record.id for record in records])] == [
        (record.text, record.metadata) for record in records
    ]
    assert [hits[0].id for hits in index.search([record.text for record in records], k=1)] == [
        record.id for record in records
    ]


def test_every_bit_of_a_part_is_checked(stopped, build, records, tmp_path, caplog):
    file = tmp_path / "index.parts" / "part-000001.json"
    written = file.read_bytes()
    for position in range(0, len(written), 7):
        file.write_bytes(written[:position] + bytes([written[position] ^ 1]) + written[position + 1 :])
        with build_module._Parts.claimed(file.parent, build.__closure__[0].cell_contents, SOURCE, 32) as parts:
            assert not parts.finished(1, records[32:64])
    array = tmp_path / "index.parts" / "part-000002.npy"
    array.write_bytes(flip_a_bit(array.read_bytes()))
    build(records)
    assert f"{array} is damaged and is made again" in caplog.text


def test_other_records_do_not_continue_a_build(stopped, build, records, tiny_bert, tmp_path):
    with pytest.raises(
        ValueError, match=r"index\.parts was begun with other settings .source was .*delete that folder"
    ):
        build(records, source={"file": "other.txt"})
    changed = [TextRecord(record.id, f"{record.text} ball", record.metadata) for record in records]
    with pytest.raises(ValueError, match="made from other records, though their source is the same"):
        build(changed)
    other = build_student(str(tiny_bert)).to("cpu")
    next(other.parameters()).data[7] += 1
    with pytest.raises(ValueError, match="other settings .model was "):
        build_index(lambda: records, other, None, tmp_path / "index", source=SOURCE, block_rows=32)
    assert len(build(records)) == len(records)


def test_killed_after_the_last_step(build, records, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(build_module._Parts, "remove", lambda self: None)
        build(records)
    assert (tmp_path / "index.parts").is_dir()
    assert len(build(records)) == len(records)
    assert not (tmp_path / "index.parts").exists()
    with pytest.raises(ValueError, match="there is an index at"):
        build(records)


def test_unusable_records_are_named_before_anything_is_encoded(build, records, tmp_path):
    for bad, message in [
        ([], "no records"),
        ([*records, TextRecord("r3", "again", {})], "record 201: the id 'r3' was there before"),
        ([*records, TextRecord("x", " ", {})], "record 201 .id 'x'.: the text is ' '"),
        ([TextRecord("", "a dog", {})], "the id ''"),
        ([TextRecord("x", "a dog", {"a": [1]})], "metadata 'a'"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(bad)
    for options, message in [({"factory": "nonsense"}, "nonsense"), ({"recall_target": 0}, "recall_target is 0")]:
        with pytest.raises(ValueError, match=message):
            build(records, **options)
    assert not any(tmp_path.iterdir())


def test_records_that_change_meanwhile_are_refused(student, records, tmp_path):
    for later in (records[:150], [*records, TextRecord("new", "a dog", {})]):
        passes = iter([records, later])
        with pytest.raises(ValueError, match="another number later"):
            build_index(lambda p=passes: next(p), student, None, tmp_path / "i", source=SOURCE, block_rows=32)


def test_two_builds_of_one_index_are_refused(build, records, tmp_path):
    def nested():
        with pytest.raises(ValueError, match="another process is writing to"):
            build(records)
        yield from records

    calls = iter([lambda: records, nested])
    build_records = lambda: next(calls)()  # noqa: E731
    model = build.__closure__[0].cell_contents
    index = build_index(build_records, model, None, tmp_path / "index", source=SOURCE, block_rows=32)
    assert len(index) == len(records)


@pytest.mark.slow
def test_several_processes_encode_the_same(student, records, tmp_path):
    devices = ["cpu", "cpu"]
    index = build_index(lambda: records, student, None, tmp_path / "index", source=SOURCE, devices=devices)
    assert str(student.device) == "cpu"
    assert [hits[0].id for hits in index.search([record.text for record in records], k=1)] == [
        record.id for record in records
    ]


def test_killed_at_file_operations_the_index_is_the_same(tiny_bert, tmp_path):
    sys.path.insert(0, str(WORKER.parent))
    from killed_index_worker import ROWS, TEXTS, records

    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{WORKER.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        [sys.executable, WORKER, tiny_bert, tmp_path / "index", "build"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["killed"] >= 2
    model = build_student(str(tiny_bert)).to("cpu")
    index = SemanticIndex.load(tmp_path / "index", model)
    other = build_index(records, model, None, tmp_path / "other", source=SOURCE, block_rows=16)
    ids = [f"r{row}" for row in range(ROWS)]
    assert index.get(ids) == other.get(ids)
    for mine, theirs in zip(index.search(TEXTS[:40]), other.search(TEXTS[:40]), strict=True):
        assert [hit.score for hit in mine] == pytest.approx([hit.score for hit in theirs], abs=1e-6)
