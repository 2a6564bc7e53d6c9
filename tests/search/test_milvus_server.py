"""What only a real Milvus server shows; `make milvus` runs it."""

import re
import threading

import numpy as np
import pytest

from st_kdmcse.search import SemanticIndex
from st_kdmcse.search.address import open_backend
from st_kdmcse.search.base import NewRows

pytestmark = pytest.mark.milvus_server


@pytest.fixture
def place(milvus_server, request):
    collection = re.sub(r"\W", "_", request.node.name)
    return f"milvus://127.0.0.1:{milvus_server.port}/{collection}"


def rows(ids, seed=0):
    embeddings = np.random.default_rng([seed, len(ids)]).normal(size=(len(ids), 8))
    return NewRows.checked(ids, [f"text of {each}" for each in ids], embeddings)


def test_index_and_search_parameters(place):
    address = f"{place}?index=HNSW&index.M=8&index.efConstruction=64&search.ef=50&consistency=Session"
    backend = open_backend(address, dim=8, create=True)
    stored = rows([f"row {number}" for number in range(200)])
    backend.add(stored)
    for found, query in zip(backend.search(stored.embeddings[:5], 3), stored.embeddings, strict=False):
        assert [hit.id for hit in found] == [stored.ids[row] for row in np.argsort(-stored.embeddings @ query)[:3]]
    info = backend.info()
    assert (info["engine"], info["index"], info["consistency"]) == ("milvus", "HNSW", "Session")
    assert info["index_parameters"] == {"M": "8", "efConstruction": "64"}
    assert info["search_parameters"] == {"ef": 50}
    assert len(open_backend(place)) == 200, "a collection may be opened without saying what its index is"
    for wrong, message in ((f"{place}?index=FLAT", "has index=HNSW, not FLAT"), (f"{address}&index.M=9", "one value")):
        with pytest.raises(ValueError, match=message):
            open_backend(wrong)
    with pytest.raises(ValueError, match="has M=8, not 9"):
        open_backend(f"{place}?index=HNSW&index.M=9")


@pytest.mark.parametrize("options", ["index=HNSW&index.M=1000000", "index=HSNW", "index=IVF_FLAT&index.nlist=none"])
def test_an_index_that_the_server_does_not_make_leaves_no_collection(place, options):
    with pytest.raises(OSError, match="Milvus at"):
        open_backend(f"{place}?{options}", dim=8, create=True)
    with pytest.raises(FileNotFoundError, match="there is no collection"):
        open_backend(place)


def test_a_semantic_index(place, student):
    index = SemanticIndex.open(place, student, create=True)
    index.add(["a dog runs", "the man sits"], ids=["dog", "man"], metadata=[{"year": 1999}, {}])
    again = SemanticIndex.open(place, student)
    assert again.search("a dog runs", k=1)[0].id == "dog"
    assert [hit.id for hit in again.search("a dog", where={"year": {"lt": 2000}})] == ["dog"]


def test_what_was_acknowledged_survives_a_killed_server(milvus_server, place):
    backend = open_backend(place, dim=8, create=True)
    acknowledged, begun, failed = [], threading.Event(), []

    def add():
        for number in range(100_000):
            part = rows([f"{number}-{row}" for row in range(50)], number)
            try:
                backend.add(part)
            except OSError as error:
                failed.append(str(error))
                return
            acknowledged.append(part)
            if number == 20:
                begun.set()

    adding = threading.Thread(target=add, daemon=True)
    adding.start()
    assert begun.wait(120)
    milvus_server.kill()
    adding.join(120)
    assert "Milvus at" in failed[0], "a call during which the server went says so"
    milvus_server.start()
    again = open_backend(place)
    for part in acknowledged:
        assert [hit.text for hit in again.get(part.ids)] == list(part.texts)
        assert [hits[0].id for hits in again.search(part.embeddings[:3], 1)] == part.ids[:3]
    assert len(acknowledged) * 50 <= len(again) <= len(acknowledged) * 50 + 50
