"""Copies of indexes between a folder and Milvus."""

import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("faiss")
pytest.importorskip("milvus_lite")

from st_kdmcse import build_student
from st_kdmcse.cli.main import main
from st_kdmcse.search import FaissBackend, SemanticIndex, copy_index, faiss_backend, milvus_backend
from st_kdmcse.search.address import open_backend
from st_kdmcse.search.base import unit_rows

ROWS = 260


@pytest.fixture(scope="module", params=["lite", pytest.param("server", marks=pytest.mark.milvus_server)])
def milvus(request, tmp_path_factory):
    """Makes addresses of collections."""
    if request.param == "server":
        port = request.getfixturevalue("milvus_server").port
        return lambda name: f"milvus://127.0.0.1:{port}/{name}"
    file = tmp_path_factory.mktemp("milvus") / "lite.db"
    return lambda name: f"milvus://{file}?collection={name}"


@pytest.fixture(scope="module")
def student(tiny_bert):
    torch.manual_seed(0)
    return build_student(str(tiny_bert)).to("cpu")


@pytest.fixture
def name(request):
    return re.sub(r"\W", "_", request.node.name)


@pytest.fixture(scope="module")
def source(tmp_path_factory, student):
    """Folder of an index whose ids are in no order, with metadata of all kinds; some rows were changed or removed."""
    generator = np.random.default_rng(0)
    ids = [f"{chr(int(generator.integers(33, 0x3000)))}{row} 🙂"[: 2 + row % 7] + f"-{row}" for row in range(ROWS + 5)]
    metadata = [{"row": row, "half": row / 2, "even": row % 2 == 0, "ö": "ä", "none": None} for row in range(ROWS + 5)]
    texts = [f"dog {row}\n" for row in range(ROWS + 5)]
    vectors = unit_rows(generator.normal(size=(ROWS + 5, student.get_embedding_dimension())))
    index = SemanticIndex.from_embeddings(student, vectors, texts, ids=ids, metadata=metadata)
    index.remove(ids[100:105])
    index.update(ids[7:9], ["a man", "two men"])
    return index.save(tmp_path_factory.mktemp("copied") / "index")


def contents(backend):
    """All that is in a backend, by id."""
    found = {}
    for part in backend.all_rows():
        assert list(part.ids) == sorted(part.ids)
        assert not set(part.ids) & set(found)
        found |= {
            key: (text, dict(metadata), vector)
            for key, text, metadata, vector in zip(part.ids, part.texts, part.metadata, part.embeddings, strict=True)
        }
    return found


def assert_equal(one, other):
    assert {key: each[:2] for key, each in one.items()} == {key: each[:2] for key, each in other.items()}
    for key, (_, _, vector) in one.items():
        np.testing.assert_allclose(vector, other[key][2], atol=1e-6)


def run(*arguments):
    return CliRunner().invoke(main, ["index", "copy", *map(str, arguments)])


@pytest.fixture
def small_parts(monkeypatch):
    """Many parts of a copy."""
    for module in (faiss_backend, milvus_backend):
        monkeypatch.setattr(module, "_ROWS_AT_A_TIME", 50)


def interrupted(monkeypatch, backend, parts):
    """Ctrl-C when so many parts of a backend were read."""
    all_rows = backend.all_rows

    def some(self, after=""):
        for number, part in enumerate(all_rows(self, after)):
            if number == parts:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(backend, "all_rows", some)


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("factory", [None, "HNSW8", "IVF4,Flat", "IVF4,PQ4x4fs,RFlat"])
def test_there_and_back(source, milvus, name, tmp_path, student, factory):
    options = [] if factory is None else ["--factory", factory]
    there, back, other = milvus(name), tmp_path / "back", tmp_path / "other"
    first = run(source, there)
    assert first.exit_code == 0, first.output
    assert first.stdout == f"260 rows of {source} are in {there}\n"
    assert run(there, back, *options).exit_code == 0
    assert copy_index(back, other) == 260
    expected = contents(open_backend(source))
    for place in (there, back, other):
        assert_equal(contents(open_backend(place)), expected)
    queries = ["a man", "dog 9"]
    results = [SemanticIndex.open(place, student).search(queries, 3) for place in (source, there, other)]
    for found in results[1:]:
        assert [[hit.id for hit in hits] for hits in found] == [[hit.id for hit in hits] for hits in results[0]]
    assert open_backend(back).factory == (factory or "Flat")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "other"]


@pytest.mark.usefixtures("small_parts")
def test_an_interrupted_copy_goes_on(source, milvus, name, tmp_path, student, monkeypatch):
    there, back = milvus(name), tmp_path / "back"
    for parts, (one, other, backend) in enumerate(
        [(source, there, FaissBackend), (there, back, milvus_backend.MilvusBackend)], start=2
    ):
        with monkeypatch.context() as patch:
            interrupted(patch, backend, parts)
            stopped = run(one, other)
            assert stopped.exit_code == 130
            assert stopped.stderr.endswith(
                "stopped; what was copied is kept, and the same command goes on from there\n"
            )
        if other is there:
            message = f"is an unfinished copy of {re.escape(str(source))}: st-kdmcse index copy"
            with pytest.raises(ValueError, match=message):
                SemanticIndex.open(there, student)
            with pytest.raises(ValueError, match=message):
                copy_index(there, tmp_path / "half")
            assert len(open_backend(there)) == 100
        else:
            assert not back.exists()
        assert run(one, other).exit_code == 0
    assert_equal(contents(open_backend(back)), contents(open_backend(source)))
    assert not (tmp_path / "back.copy").exists()


def test_what_cannot_be_copied(source, milvus, name, tmp_path, student):
    there = milvus(name)
    index = SemanticIndex.open(there, student, create=True)
    assert f"the index {there} is empty" in run(there, tmp_path / "a").stderr
    index.add(["a dog"])
    assert "holds another index" in run(source, there).stderr
    assert "there is no index at" in run(tmp_path / "nothing", there).stderr
    assert (
        "--factory and --memory-limit are for an index in a folder"
        in run(source, milvus(f"{name}2"), "--factory", "Flat").stderr
    )
    assert run(source, source).exit_code == 2
    vectors = np.random.default_rng(0).normal(size=(300, student.get_embedding_dimension()))
    texts = [f"text {row}" for row in range(300)]
    SemanticIndex.from_embeddings(student, vectors, texts, factory="IVF4,PQ4").save(tmp_path / "small")
    assert "keeps compressed vectors instead" in run(tmp_path / "small", milvus(f"{name}3")).stderr
    assert not list(tmp_path.glob("*.copy"))


@pytest.mark.usefixtures("small_parts")
def test_an_index_that_changes_meanwhile(milvus, name, tmp_path, student, monkeypatch):
    there = milvus(name)
    index = SemanticIndex.open(there, student, create=True)
    index.add([f"dog {row}" for row in range(120)], [f"{row:03}" for row in range(120)])
    with monkeypatch.context() as patch:
        interrupted(patch, milvus_backend.MilvusBackend, 1)
        assert run(there, tmp_path / "copy").exit_code == 130
    index.remove(["100"])
    assert "begun with other settings (rows" in run(there, tmp_path / "copy").stderr
