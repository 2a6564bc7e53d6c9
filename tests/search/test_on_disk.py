"""Tests of st_kdmcse.search.on_disk, of indexes that are memory-mapped, and of how their files are verified."""

import json
import logging
import shutil

import faiss
import numpy as np
import pytest

from st_kdmcse.search import SemanticIndex, TextRecord, build_index
from st_kdmcse.search.base import unit_rows
from st_kdmcse.search.factory import build_faiss, stays_on_disk
from st_kdmcse.search.on_disk import flat_file, mapped_rows, read_on_disk, write_on_disk
from st_kdmcse.search.storage import read_index

DIM, FACTORY = 32, "IVF16,PQ16x4fs,RFlat"
SOURCE = {"file": "some.txt", "sha256": "0" * 64}
GIB = 1 << 30


@pytest.fixture(scope="module")
def vectors():
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(50, DIM))
    return unit_rows(centres[generator.integers(0, 50, 5000)] + 0.7 * generator.normal(size=(5000, DIM)))


@pytest.fixture
def build(student, sentences, tmp_path):
    def run(name="index", **options):
        records = [TextRecord(f"r{row}", text, {"row": row}) for row, text in enumerate(sentences)]
        settings = {"source": SOURCE, "block_rows": 32, "factory": "IVF4,PQ16x4fs,RFlat"} | options
        return build_index(lambda: iter(records), student, None, tmp_path / name, **settings)

    return run


def hits(index, texts):
    return [[(hit.id, round(hit.score, 5)) for hit in found] for found in index.search(texts)]


def test_the_file_of_vectors_is_one_of_faiss(tmp_path, vectors):
    with flat_file(tmp_path / "ours", *vectors.shape) as file:
        file.write(vectors[:3000].tobytes())
        file.write(vectors[3000:].tobytes())
    index = faiss.IndexFlatIP(DIM)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "theirs"))
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (mapped_rows(tmp_path / "ours", *vectors.shape)[[4999, 0, 7]] == vectors[[4999, 0, 7]]).all()
    with pytest.raises(ValueError, match="expected 2 rows"), flat_file(tmp_path / "short", 2, DIM) as file:
        file.write(vectors[0].tobytes())


@pytest.mark.parametrize("factory", [FACTORY, "IVF16,PQ16np,RFlat", "IVF16,SQ8,RFlat", "IVF16_HNSW8,PQ16x4fs,RFlat"])
def test_lists_on_disk_give_what_those_in_memory_give(tmp_path, vectors, factory):
    in_memory = build_faiss(vectors, factory, 0.8)
    built = build_faiss(vectors, factory, 0.8, exact=tmp_path / "exact")
    assert built.tuning.value == in_memory.tuning.value
    assert (built.order == in_memory.order).all()
    queries = vectors[:50]
    scores, found = built.index.search(queries, 10)
    assert (found == in_memory.index.search(queries, 10)[1]).all()
    (tmp_path / "folder").mkdir()
    write_on_disk(built.index, tmp_path / "exact", tmp_path / "folder")
    opened = read_on_disk(tmp_path / "folder", built.index.k_factor)
    read_scores, read = opened.search(queries, 10)
    assert opened.ntotal == 5000
    assert (read == found).all()
    assert (read_scores == scores).all()


def test_an_index_on_disk_equals_one_in_memory(build, sentences, tmp_path, caplog, student):
    mapped, plain = build("mapped", mmap=True), build("plain")
    assert hits(mapped, sentences[::9]) == hits(plain, sentences[::9])
    assert mapped.search(sentences[5], 5, {"row": {"lt": 3}}) == plain.search(sentences[5], 5, {"row": {"lt": 3}})
    assert len(mapped.search(sentences[5], 500)) == 200
    assert mapped.info()["vectors"] == "on disk, memory-mapped"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mapped", "plain"]
    for change in (
        lambda: mapped.add(["new"]),
        lambda: mapped.remove(["r1"]),
        lambda: mapped.update(["r1"], ["new"]),
        lambda: mapped.backend.compact(),
    ):
        with pytest.raises(ValueError, match="cannot be changed"):
            change()
    assert mapped.save() == tmp_path / "mapped"
    with pytest.raises(ValueError, match="copy its folder"):
        mapped.save(tmp_path / "other")
    with pytest.raises(ValueError, match="was built to stay on disk"):
        SemanticIndex.load(tmp_path / "mapped", student, mmap=False)
    assert mapped.reloaded() is mapped


@pytest.mark.parametrize("factory", ["Flat", "SQ8", "HNSW8", "IVF4,Flat", "IVF4,PQ16x4fs,RFlat"])
def test_every_saved_index_can_be_mapped(build, sentences, student, tmp_path, factory):
    expected = hits(build(factory=factory), sentences[::9])
    opened = SemanticIndex.load(tmp_path / "index", student, mmap=True)
    assert hits(opened, sentences[::9]) == expected
    assert len(opened.search(sentences[0], 300)) == 200
    with pytest.raises(ValueError, match="memory-mapped, and cannot be changed"):
        opened.add(["new"])


def test_an_index_that_fills_memory_is_mapped_and_this_is_said(build, student, tmp_path, monkeypatch, caplog):
    build()
    monkeypatch.setattr("st_kdmcse.search.storage.free_memory", lambda: 10_000)
    assert SemanticIndex.load(tmp_path / "index", student).backend.mapped
    assert "they stay on disk, memory-mapped" in caplog.text
    assert not SemanticIndex.load(tmp_path / "index", student, mmap=False).backend.mapped


@pytest.mark.parametrize("name", ["vectors.faiss", "rows.sqlite", "lists.bin", "lists.npy", "exact.faiss"])
def test_damage_is_found(build, student, tmp_path, name):
    build(mmap=True)
    file = next((tmp_path / "index").glob(f"data-*/{name}"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for verify in ("full", "size"):  # of so small a file the sample is everything
        with pytest.raises(ValueError, match=f"{name} was altered"):
            read_index(tmp_path / "index", verify=verify)
    file.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{name} has .* bytes, not"):
        read_index(tmp_path / "index", verify="size")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        read_index(tmp_path / "index", verify="size")


def test_a_sample_is_all_that_is_read_above_a_gigabyte(build, tmp_path, monkeypatch):
    build()
    table = next((tmp_path / "index").glob("data-*/rows.sqlite"))
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content)
    monkeypatch.setattr("st_kdmcse.search.storage._FULL_UP_TO", 1000)
    monkeypatch.setattr("st_kdmcse.search.storage._PIECE_BYTES", 1)
    manifest = json.loads((tmp_path / "index" / "manifest.json").read_text())
    for known in manifest["files"].values():
        known.pop("sample")  # as the first indexes were written
    del manifest["checksum"]
    from st_kdmcse.files import manifest_checksum

    (tmp_path / "index" / "manifest.json").write_text(json.dumps({**manifest, "checksum": manifest_checksum(manifest)}))
    read_index(tmp_path / "index")
    with pytest.raises(ValueError, match=r"rows\.sqlite was altered"):
        read_index(tmp_path / "index", verify="full")
    with pytest.raises(ValueError, match="`verify` is 'no'"):
        read_index(tmp_path / "index", verify="no")


def test_offsets_of_other_lists_are_refused(build, tmp_path, student):
    build(mmap=True)
    folder = next((tmp_path / "index").glob("data-*"))
    shutil.copytree(folder, tmp_path / "copy")
    offsets = np.load(folder / "lists.npy")
    for change in ({"size": 5}, {"offset": 1 << 40}, {"capacity": 1}):
        wrong = offsets.copy()
        for name, value in change.items():
            wrong[name][0] = value
        np.save(tmp_path / "copy" / "lists.npy", wrong)
        with pytest.raises(ValueError, match="does not belong"):
            read_on_disk(tmp_path / "copy", 8.0)


@pytest.mark.parametrize(
    ("rows", "factory", "limit", "mmap", "expected"),
    [
        (10_000_000, None, 4 * GIB, None, True),
        (10_000_000, None, 4 * GIB, False, False),
        (10_000_000, None, 20 * GIB, None, False),
        (10_000_000, None, 20 * GIB, True, True),
        (10_000_000, None, GIB, None, False),  # not even the codes fit: it is compressed
        (50_000, None, 1 << 20, None, False),
        (50_000, "IVF64,PQ192x4fs,RFlat", None, True, True),
        (10_000_000, "IVF64,PQ192x4fs,RFlat", GIB, None, False),
    ],
)
def test_what_stays_on_disk(rows, factory, limit, mmap, expected, caplog):
    with caplog.at_level(logging.INFO, "st_kdmcse"):
        assert stays_on_disk(rows, 384, factory, limit, mmap) == expected
    assert ("stay on disk" in caplog.text) == (expected and factory is None)


def test_what_cannot_stay_on_disk():
    with pytest.raises(ValueError, match="IVF16,Flat cannot be built on disk"):
        stays_on_disk(1000, 384, "IVF16,Flat", None, True)
    with pytest.raises(ValueError, match="raise `memory_limit`"):
        stays_on_disk(10_000_000, 384, None, GIB, True)
