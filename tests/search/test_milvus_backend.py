import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from st_kdmcse import build_student
from st_kdmcse.search import milvus_backend
from st_kdmcse.search.address import open_backend
from st_kdmcse.search.base import NewRows
from st_kdmcse.search.milvus_backend import MilvusBackend, expression
from st_kdmcse.search.semantic_index import SemanticIndex

pytest.importorskip("milvus_lite")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A database that the tests of this file share, with a collection each."""
    return str(tmp_path_factory.mktemp("milvus") / "an index.db")


@pytest.fixture
def collection(request):
    return re.sub(r"\W", "_", request.node.name)


@pytest.fixture
def backend(file, collection):
    return MilvusBackend(file, collection, dim=3, create=True)


def rows(ids, texts=None, metadata=None):
    embeddings = np.random.default_rng(len(ids)).normal(size=(len(ids), 3))
    return NewRows.checked(ids, texts or [f"text of {each}" for each in ids], embeddings, metadata)


def reopened(file, collection):
    """The backend after a new start of milvus-lite, from what is on the disk."""
    from milvus_lite.server_manager import server_manager_instance

    server_manager_instance.release_server(file)
    return MilvusBackend(file, collection)


def test_without_pymilvus_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pymilvus", None)
    with pytest.raises(ImportError, match=re.escape('pip install "st-kdmcse[milvus]"')):
        MilvusBackend(str(tmp_path / "index.db"), "wiki", dim=3, create=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "2wiki", "wiki-en", "wiki en", "wíki", "a" * 256, "a/b"])
def test_names_that_milvus_does_not_take(file, name):
    with pytest.raises(ValueError, match="cannot name a collection"):
        MilvusBackend(file, name, dim=3, create=True)


def test_a_collection_of_another_program_is_refused(backend, file):
    backend._client.create_collection("foreign", dimension=3)
    with pytest.raises(ValueError, match="not of this package: it has the fields id, vector"):
        MilvusBackend(file, "foreign")


def test_the_identity_of_the_model_stays_with_the_collection(backend, file, collection):
    assert backend.identity is None
    identity = {
        "name": 'mödel "x"',
        "parameters_sha256": "0" * 64,
        "dimension": 3,
        "modules": ["Transformer", "Pooling"],
    }
    backend.identity = {"name": "first"}
    backend.identity = identity
    assert backend.identity == identity
    assert reopened(file, collection).identity == identity


def test_what_the_index_is(backend):
    backend.add(rows(["a", "b"]))
    info = backend.info()
    assert (info["engine"], info["index"], info["rows"], info["dim"]) == ("milvus-lite", "FLAT", 2, 3)
    assert info["bytes"] > 0


@pytest.mark.parametrize(
    ("text", "metadata", "message"),
    [
        ("é" * 32_768, {}, "'new'.*65,536 bytes.*65,535: shorten"),
        ("\ud800", {}, "'new'.*not valid Unicode"),
        ("x", {"notes": "é" * 40_000}, "'new'.*metadata have 80,.* bytes"),
        ("x", {"big": 2**63}, "'new'.*'big'.*64 bits"),
    ],
)
def test_what_milvus_cannot_hold_is_refused_with_the_id_and_stores_nothing(backend, text, metadata, message):
    backend.add(rows(["old"]))
    with pytest.raises(ValueError, match=message):
        backend.add(rows(["other", "new"], ["x", text], [{}, metadata]))
    with pytest.raises(ValueError, match=message):
        backend.replace(rows(["old", "new"], ["x", text], [{}, metadata]))
    assert len(backend) == 1
    assert backend.get(["old"])[0].text == "text of old"


def test_the_largest_that_milvus_holds(backend):
    texts = ["x" * 65_535, "é" * 32_767]
    metadata = [{"big": 2**63 - 1, "small": -(2**63) + 1}, {"notes": "é" * 32_000}]
    backend.add(rows(["a", "b"], texts, metadata))
    hits = backend.get(["a", "b"])
    assert [hit.text for hit in hits] == texts
    assert [hit.metadata for hit in hits] == metadata
    assert [hit.id for hit in backend.search(np.eye(1, 3, dtype=np.float32), 2, {"big": 2**63 - 1})[0]] == ["a"]


def test_many_messages_are_as_good_as_one(backend, monkeypatch):
    monkeypatch.setattr(milvus_backend, "_BYTES_AT_A_TIME", 300)
    monkeypatch.setattr(milvus_backend, "_IDS_AT_A_TIME", 7)
    monkeypatch.setattr(milvus_backend, "MAX_K", 45)
    stored = rows([f"row {number}" for number in range(60)])
    assert len(backend._batches(stored)) > 5
    backend.add(stored)
    assert len(backend) == 60
    hits = backend.search(stored.embeddings, 20)
    for query, found in zip(stored.embeddings, hits, strict=True):
        nearest = np.argsort(-stored.embeddings @ query)[:20]
        assert [hit.id for hit in found] == [stored.ids[row] for row in nearest]
    backend.remove(stored.ids[:50])
    assert len(backend) == 10
    assert len(backend.search(stored.embeddings[:1], 50)[0]) == 10  # more than MAX_K, and than there are
    assert [hit.id for hit in backend.get(stored.ids[50:])] == stored.ids[50:]


def test_many_rows_are_indexed_at_once(backend, file, collection):
    def segments():
        return list((Path(file) / "collections" / collection).rglob("*.parquet"))

    backend.add(rows(["a"]))
    assert not segments()
    backend.add(rows([f"row {number}" for number in range(1000)]))
    assert segments()
    assert len(backend.search(np.eye(1, 3, dtype=np.float32), 2000)[0]) == 1001


def test_more_rows_than_milvus_returns_are_refused(backend, monkeypatch):
    monkeypatch.setattr(milvus_backend, "MAX_K", 4)
    backend.add(rows(list("abcdef")))
    assert len(backend.search(np.eye(1, 3, dtype=np.float32), 4)[0]) == 4
    with pytest.raises(ValueError, match="at most 4 rows a query; 5 were asked for"):
        backend.search(np.eye(1, 3, dtype=np.float32), 5)


def test_an_interrupted_add_stores_nothing(backend, file, collection, monkeypatch):
    class Interrupted(MilvusBackend):
        def _upsert(self, batches):
            super()._upsert(batches[:2])
            assert len(self) > 2
            raise KeyboardInterrupt

    monkeypatch.setattr(milvus_backend, "_BYTES_AT_A_TIME", 300)
    backend.add(rows(["a", "b"]))
    with pytest.raises(KeyboardInterrupt):
        Interrupted(file, collection).add(rows([f"new {number}" for number in range(20)]))
    assert len(backend) == 2


@pytest.mark.slow
def test_what_was_added_survives_a_killed_process(tmp_path):
    file = str(tmp_path / "killed.db")
    script = """
import os, signal, sys
import numpy as np
from st_kdmcse.search.base import NewRows
from st_kdmcse.search.milvus_backend import MilvusBackend
backend = MilvusBackend(sys.argv[1], "wiki", dim=3, create=True)
backend.add(NewRows.checked(["a", "b", "c"], ["x", "y", "z"], np.eye(3)))
backend.replace(NewRows.checked(["b"], ["why"], [[0, 1, 1]]))
backend.remove(["c"])
backend.identity = {"name": "m"}
os.kill(os.getpid(), signal.SIGKILL)
"""
    finished = subprocess.run(
        [sys.executable, "-c", script, file], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert finished.returncode == -signal.SIGKILL
    backend = MilvusBackend(file, "wiki")
    assert len(backend) == 2
    assert [hit.text for hit in backend.get(["b", "a"])] == ["why", "x"]
    assert backend.identity == {"name": "m"}


def test_a_file_that_another_process_has_open(tmp_path, capfd):
    file = str(tmp_path / "index.db")
    script = (
        "import sys; from milvus_lite.db import MilvusLite; db = MilvusLite(sys.argv[1]); print(1, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "1\n"
        with pytest.raises(OSError, match="another process has it open"):
            MilvusBackend(file, "wiki", dim=3, create=True)
        other.communicate("\n")
    assert "Traceback" not in capfd.readouterr().err
    assert len(MilvusBackend(file, "wiki", dim=3, create=True)) == 0


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "index.db").write_text("SQLite format 3")
    with pytest.raises(OSError, match="not a database of milvus-lite 3"):
        MilvusBackend(str(tmp_path / "index.db"), "wiki", dim=3, create=True)
    assert (tmp_path / "index.db").read_text() == "SQLite format 3"


def test_a_server_by_its_address(tmp_path):
    from milvus_lite.adapter.grpc.server import start_server_in_thread

    server, database, port = start_server_in_thread(str(tmp_path / "server"))
    try:
        backend = open_backend(f"milvus://127.0.0.1:{port}/wiki", dim=3, create=True)
        backend.add(rows(["a", "b"], metadata=[{"lang": "en"}, {}]))
        backend.identity = {"name": "m"}
        again = open_backend(f"milvus://127.0.0.1:{port}/wiki")
        assert [hit.id for hit in again.search(np.eye(1, 3, dtype=np.float32), 5, {"lang": "en"})[0]] == ["a"]
        assert again.identity == {"name": "m"}
        info = again.info()
        assert (info["engine"], info["index"], info["bytes"]) == ("milvus", "AUTOINDEX", None)
    finally:
        server.stop(grace=0)
        database.close()


def test_a_semantic_index_in_milvus(tmp_path, student, tiny_bert):
    address = f"milvus://{tmp_path}/index.db?collection=wiki"
    with pytest.raises(FileNotFoundError, match="index.db"):
        SemanticIndex.open(address, student)
    index = SemanticIndex.open(address, student, create=True)
    index.add(["a dog runs", "the man sits"], ids=["dog", "man"], metadata=[{"year": 1999}, {}])
    index.update(["man"], ["the woman plays"])
    again = SemanticIndex.open(address, student)
    assert again.search("a dog runs", k=1)[0].id == "dog"
    assert [hit.text for hit in again.search("a dog", where={"year": {"lt": 2000}})] == ["a dog runs"]
    assert again.get(["man"])[0].text == "the woman plays"
    torch.manual_seed(1)
    other = build_student(str(tiny_bert))
    with torch.no_grad():
        next(other.parameters()).add_(0.1)
    with pytest.raises(ValueError, match="made with the model"):
        SemanticIndex.open(address, other)


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"lang": "en"}, '(metadata["text"]["lang"] == "en")'),
        (
            {"year": {"gte": 1999, "lt": 2.5}},
            '(metadata["number"]["year"] >= 1999) and (metadata["number"]["year"] < 2.5)',
        ),
        ({"seen": True}, '(metadata["truth"]["seen"] == true)'),
        ({"lang": ["en", 2]}, '((metadata["text"]["lang"] == "en" or metadata["number"]["lang"] == 2))'),
        ({"lang": []}, '(id == "")'),
        ({"n": np.float64(0.5)}, '(metadata["number"]["n"] == 0.5)'),
        ({'a"]b\\\n': 'q"u\\o\nte'}, '(metadata["text"]["a%22%5Db%5C%0A"] == "q\\"u\\\\o\\nte")'),
        ({"größe~": 1}, '(metadata["number"]["gr%C3%B6%C3%9Fe%7E"] == 1)'),
    ],
)
def test_filters_as_expressions(where, expected):
    assert expression(where) == expected


def test_integers_that_milvus_would_misread_are_refused():
    with pytest.raises(ValueError, match="'big'.*64 bits"):
        expression({"big": {"lt": -(2**63)}})


@given(st.text(min_size=1), st.text())
def test_no_name_and_no_value_leaves_its_quotes(name, value):
    literal = r'"(?:[^"\\\n\r]|\\.)*"'
    pattern = rf'\(metadata\["text"\]\["[A-Za-z0-9_.%-]+"\] == {literal}\)'
    assert re.fullmatch(pattern, expression({name: value}))
