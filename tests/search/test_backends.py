"""One suite for every engine: what is promised in st_kdmcse/search/base.py holds for each."""

import json
import operator
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from st_kdmcse.search.base import NewRows, conditions, unit_rows

DIM = 4
ODD_IDS = [
    "it's",
    'a "quoted" id',
    "back\\slash\\",
    "' or id != '",
    '"] or id != "',
    " ",
    "  leading and trailing  ",
    "größe/漢字/🙂",
    "line\nbreak\tand\rreturn",
    "100%",
    "{id}",
    "é",
    "e\u0301",
    "x" * 512,
    "🙂" * 512,
    "0",
    "00",
    "null",
]
NAMES = ["year", "lang", "a b", 'q"uo\\te', "größe漢🙂", "x][y", "~t/i.l-d_e", "%41", "$.year", "1", "line\nbreak"]
VALUES = [
    *(5, 5.0, -7, 0, 1, 1.5, 2**62, 1e300, 1e-7, True, False),
    *("", "5", "true", "en", "de", 'q"u', "b\\n", "größe漢🙂", '" or id != "', "it's", "line\nbreak\t"),
]


class Faiss:
    """How the tests make FAISS backends."""

    def __init__(self, folder):
        pytest.importorskip("faiss")
        self.folder = folder

    def new(self, name):
        from st_kdmcse.search.faiss_backend import FaissBackend

        return FaissBackend.empty(DIM)

    def reopened(self, backend, name):
        import faiss

        from st_kdmcse.search.faiss_backend import FaissBackend
        from st_kdmcse.search.table import RowTable

        vectors, table = self.folder / f"{name}.faiss", self.folder / f"{name}.sqlite"
        for path in (vectors, table):
            path.unlink(missing_ok=True)
        faiss.write_index(backend.index, str(vectors))
        backend.table.write(table)
        return FaissBackend(faiss.read_index(str(vectors)), RowTable.open(table), backend.factory)


class Milvus:
    """How the tests make Milvus backends: one database, with a collection a test."""

    def __init__(self, folder):
        pytest.importorskip("milvus_lite")
        self.file = str(folder / "index.db")

    def new(self, name):
        from st_kdmcse.search.milvus_backend import MilvusBackend

        return MilvusBackend(self.file, name, dim=DIM, create=True)

    def reopened(self, backend, name):
        from milvus_lite.server_manager import server_manager_instance

        from st_kdmcse.search.milvus_backend import MilvusBackend

        server_manager_instance.release_server(self.file)
        return MilvusBackend(self.file, name)


class Server:
    """How the tests make Milvus backends on a server."""

    def __init__(self, uri):
        self.uri = uri

    def new(self, name):
        from st_kdmcse.search.milvus_backend import MilvusBackend

        return MilvusBackend(self.uri, name, dim=DIM, create=True)

    def reopened(self, backend, name):
        from st_kdmcse.search.milvus_backend import MilvusBackend

        backend.close()
        return MilvusBackend(self.uri, name)


@pytest.fixture(scope="module", params=[Faiss, Milvus, pytest.param(Server, marks=pytest.mark.milvus_server)])
def engine(request, tmp_path_factory):
    if request.param is Server:
        return Server(request.getfixturevalue("milvus_server").uri)
    return request.param(tmp_path_factory.mktemp("backends"))


@pytest.fixture
def name(request):
    return re.sub(r"\W", "_", request.node.name)


@pytest.fixture
def backend(engine, name):
    return engine.new(name)


def rows(ids, metadata=None, seed=0, dim=DIM):
    embeddings = np.random.default_rng([seed, len(ids)]).normal(size=(len(ids), dim))
    return NewRows.checked(ids, [f"text {seed} of {each}" for each in ids], embeddings, metadata)


def numbered(count):
    return [f"row {number}" for number in range(count)]


def queries(count, seed=1):
    return unit_rows(np.random.default_rng(seed).normal(size=(count, DIM)))


def contents(backend, ids):
    """Everything that can be read of an index, to see that nothing has changed."""
    found = backend.search(queries(1), len(backend) + 5)[0]
    return len(backend), backend.get(ids), [(hit.id, round(hit.score, 5)) for hit in found]


def fulfils(metadata, condition):
    """The meaning of a condition, spelt out."""
    name, comparison, wanted = condition
    value = metadata.get(name)
    if value is None:
        return False
    if comparison == "in":
        return any(fulfils(metadata, (name, "eq", each)) for each in wanted)
    comparable = kind(value) == kind(wanted)
    if comparison == "ne":
        return not (comparable and value == wanted)
    compare = {"eq": operator.eq, "gt": operator.gt, "gte": operator.ge, "lt": operator.lt, "lte": operator.le}[
        comparison
    ]
    return comparable and compare(value, wanted)


def kind(value):
    return bool if isinstance(value, bool) else str if isinstance(value, str) else float


def test_rows_come_back_as_they_were_added(backend):
    metadata = [
        {"lang": "en", "year": 1999, "score": 0.5, "seen": True, "source": None, 'q"uo\\te/~%': "größe\n🙂"},
        {},
    ]
    stored = rows(["a", "b"], metadata)
    backend.add(stored)
    assert (backend.dim, len(backend)) == (DIM, 2)
    b, a = backend.get(["b", "a"])
    assert (a.id, a.text, a.score, a.metadata) == ("a", "text 0 of a", 1.0, metadata[0])
    assert {each: type(value) for each, value in a.metadata.items()} == {
        each: type(value) for each, value in metadata[0].items()
    }
    assert (b.id, b.text, b.metadata) == ("b", "text 0 of b", {})
    assert backend.get([]) == []


def test_search_is_brute_force_by_cosine(backend):
    stored = rows(numbered(200))
    backend.add(stored)
    asked = queries(7)
    found = backend.search(asked, 10)
    similarities = asked @ stored.embeddings.T
    for hits, scores in zip(found, similarities, strict=True):
        nearest = np.argsort(-scores)[:10]
        assert [hit.id for hit in hits] == [stored.ids[row] for row in nearest]
        np.testing.assert_allclose([hit.score for hit in hits], scores[nearest], atol=1e-5)
        assert hits[0].text == f"text 0 of {hits[0].id}"
    itself = backend.search(stored.embeddings[:1], 1)[0][0]
    assert itself.id == "row 0"
    assert itself.score == pytest.approx(1, abs=1e-6)
    assert itself.score <= 1


def test_added_in_parts_is_added_at_once(backend):
    stored = rows(numbered(30))
    for start in range(0, 30, 7):
        part = slice(start, start + 7)
        backend.add(NewRows(stored.ids[part], stored.texts[part], stored.embeddings[part], stored.metadata[part]))
    nearest = np.argsort(-(stored.embeddings @ queries(1)[0]))
    assert [hit.id for hit in backend.search(queries(1), 30)[0]] == [stored.ids[row] for row in nearest]


def test_k_beyond_the_rows_returns_them_all(backend):
    backend.add(rows(["a", "b", "c"]))
    assert [len(hits) for hits in backend.search(queries(2), 100_000)] == [3, 3]
    assert [len(hits) for hits in backend.search(queries(2), 4, {"year": 3})] == [0, 0]


def test_an_empty_index(backend):
    assert len(backend) == 0
    assert backend.search(queries(2), 3) == [[], []]
    assert backend.search(queries(2), 3, {"lang": "en"}) == [[], []]
    backend.add(rows([]))
    backend.remove([])
    backend.replace(rows([]))
    assert len(backend) == 0
    with pytest.raises(KeyError, match="a"):
        backend.get(["a"])
    assert backend.info()["rows"] == 0


def test_no_queries_have_no_answers(backend):
    backend.add(rows(["a"]))
    assert backend.search(queries(0), 3) == []


@pytest.mark.parametrize("k", [0, -1])
def test_k_must_be_positive(backend, k):
    with pytest.raises(ValueError, match="at least 1"):
        backend.search(queries(1), k)


def test_widths_that_do_not_fit(backend):
    backend.add(rows(["a"]))
    with pytest.raises(ValueError, match="5"):
        backend.add(rows(["b"], dim=5))
    with pytest.raises(ValueError, match="3"):
        backend.replace(rows(["a"], dim=3))
    with pytest.raises(ValueError, match="5"):
        backend.search(np.eye(1, 5, dtype=np.float32), 1)
    assert len(backend) == 1


def test_odd_ids(backend):
    metadata = [{"number": number} for number in range(len(ODD_IDS))]
    stored = rows(ODD_IDS, metadata)
    backend.add(stored)
    assert [(hit.id, hit.metadata) for hit in backend.get(ODD_IDS)] == list(zip(ODD_IDS, metadata, strict=True))
    assert {hit.id for hit in backend.search(queries(1), 100)[0]} == set(ODD_IDS)
    for number, each in enumerate(ODD_IDS):
        backend.replace(rows([each], seed=2))
        assert backend.get([each])[0].text == f"text 2 of {each}"
        backend.remove([each])
        assert len(backend) == len(ODD_IDS) - number - 1


def test_filters_of_every_kind(backend):
    """Random metadata of all types under odd names, and random filters, against a plain reading of each row."""
    generator = np.random.default_rng(0)

    def draw(choices, count):
        return [choices[row] for row in generator.permutation(len(choices))[:count]]

    metadata = [{each: draw([*VALUES, None], 1)[0] for each in NAMES if generator.random() < 0.7} for _ in range(80)]
    backend.add(rows(numbered(80), metadata))
    found = 0
    for _ in range(150):
        where = {}
        for each in draw(NAMES, generator.integers(1, 3)):
            comparisons = draw(["eq", "ne", "gt", "gte", "lt", "lte"], generator.integers(1, 3))
            where[each] = draw(
                [
                    draw(VALUES, 1)[0],
                    draw(VALUES, generator.integers(0, 5)),
                    {comparison: draw(VALUES, 1)[0] for comparison in comparisons},
                ],
                1,
            )[0]
        expected = {
            f"row {row}" for row, each in enumerate(metadata) if all(fulfils(each, one) for one in conditions(where))
        }
        found += len(expected)
        assert {hit.id for hit in backend.search(queries(1), 80, where)[0]} == expected, where
    assert found > 300


def test_the_meaning_of_filters(backend):
    metadata = [{"x": 5}, {"x": 5.0}, {"x": "5"}, {"x": True}, {"x": 1}, {"x": None}, {}]
    backend.add(rows(["int", "float", "text", "truth", "one", "none", "missing"], metadata))

    def ids(where):
        return {hit.id for hit in backend.search(queries(1), 10, where)[0]}

    assert ids({"x": 5}) == {"int", "float"}
    assert ids({"x": "5"}) == {"text"}
    assert ids({"x": True}) == {"truth"}
    assert ids({"x": 1}) == {"one"}
    assert ids({"x": {"ne": 5}}) == {"text", "truth", "one"}
    assert ids({"x": {"ne": True}}) == {"int", "float", "text", "one"}
    assert ids({"x": {"ne": "5"}}) == {"int", "float", "truth", "one"}
    assert ids({"x": {"gt": 1}}) == {"int", "float"}
    assert ids({"x": {"lte": "6"}}) == {"text"}
    assert ids({"x": {"gte": 1, "lt": 5}}) == {"one"}
    assert ids({"x": [1, "5"]}) == {"one", "text"}
    assert ids({"x": []}) == set()
    assert ids({}) == {"int", "float", "text", "truth", "one", "none", "missing"}
    assert ids({"x": 5, "y": 5}) == set()
    assert ids({"x": list(range(2000))}) == {"int", "float", "one"}


def test_a_filter_limits_to_the_nearest_of_its_rows(backend):
    metadata = [{"even": number % 2 == 0} for number in range(60)]
    stored = rows(numbered(60), metadata)
    backend.add(stored)
    order = [row for row in np.argsort(-(stored.embeddings @ queries(1)[0])) if row % 2 == 0]
    assert [hit.id for hit in backend.search(queries(1), 5, {"even": True})[0]] == [
        stored.ids[row] for row in order[:5]
    ]


@pytest.mark.parametrize("where", [{"x": {"above": 1}}, {"x": None}, {"": 1}])
def test_filters_that_cannot_be_read(backend, where):
    backend.add(rows(["a"]))
    with pytest.raises(ValueError, match="filter"):
        backend.search(queries(1), 1, where)


def test_values_in_a_filter_are_data(backend):
    backend.add(rows(["a", "b"], [{"lang": "en"}, {}]))
    for value in [
        'x" or id != "',
        "x' or '1' == '1",
        'x"] or true',
        "x\\",
        '\\" or id != \\"',
        "1); DROP TABLE rows; --",
    ]:
        assert backend.search(queries(1), 5, {"lang": value}) == [[]]
        assert backend.search(queries(1), 5, {value: "en"}) == [[]]
    assert len(backend) == 2


def test_replace(backend):
    ids = numbered(20)
    backend.add(rows(ids, [{"old": True}] * 20))
    backend.replace(rows(ids[5:10], [{"new": True}] * 5, seed=3))
    assert len(backend) == 20
    assert [hit.text for hit in backend.get(["row 4", "row 5"])] == ["text 0 of row 4", "text 3 of row 5"]
    assert {hit.id for hit in backend.search(queries(1), 20, {"new": True})[0]} == set(ids[5:10])
    assert len(backend.search(queries(1), 20, {"old": True})[0]) == 15
    moved = rows(ids[5:10], seed=3).embeddings
    assert [hits[0].id for hits in backend.search(moved, 1)] == ids[5:10]
    assert all(hits[0].score == pytest.approx(1, abs=1e-5) for hits in backend.search(moved, 1))


def test_remove_and_add_again(backend):
    ids = numbered(20)
    backend.add(rows(ids))
    backend.remove(["row 3", "row 19", "row 0"])
    assert len(backend) == 17
    assert not {"row 3", "row 19", "row 0"} & {hit.id for hit in backend.search(queries(1), 20)[0]}
    with pytest.raises(KeyError):
        backend.get(["row 3"])
    backend.add(rows(["row 3"], seed=4))
    assert backend.get(["row 3"])[0].text == "text 4 of row 3"
    backend.remove([each for each in ids if each not in ("row 0", "row 19")])
    assert len(backend) == 0
    assert backend.search(queries(1), 3) == [[]]
    backend.add(rows(ids[:2]))
    assert len(backend.search(queries(1), 3)[0]) == 2


def test_errors_change_nothing(backend):
    backend.add(rows(["a", "b"], [{"lang": "en"}, {}]))
    before = contents(backend, ["a", "b"])
    with pytest.raises(ValueError, match="'b' is there already"):
        backend.add(rows(["c", "b"], seed=5))
    with pytest.raises(KeyError, match="c"):
        backend.replace(rows(["a", "c"], seed=5))
    with pytest.raises(KeyError, match="c"):
        backend.remove(["a", "c"])
    with pytest.raises(KeyError, match="c"):
        backend.get(["a", "c"])
    assert contents(backend, ["a", "b"]) == before


def test_reopened_from_disk(engine, backend, name):
    ids = ["a", 'odd "id"\n漢', "c", "d"]
    backend.add(rows(ids, [{"lang": "en", "year": 1999, "x": None}, {"größe": 1.5}, {"seen": False}, {}]))
    backend.replace(rows(["c"], [{"seen": True}], seed=6))
    backend.remove(["d"])
    before = contents(backend, ids[:3])
    again = engine.reopened(backend, name)
    assert contents(again, ids[:3]) == before
    assert again.dim == DIM
    assert [hit.id for hit in again.search(queries(1), 5, {"seen": True})[0]] == ["c"]
    again.add(rows(["d"], seed=7))
    again.remove(["a"])
    assert len(engine.reopened(again, name)) == 3


def test_info_is_for_json(backend):
    backend.add(rows(["a"]))
    info = json.loads(json.dumps(backend.info(), allow_nan=False))
    assert info["rows"] == 1
    assert info["dim"] == DIM
    assert info["engine"]


IDS = st.sampled_from(["a", "b", "c", "d'", 'e"', "f\\", "g 漢"])
STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "replace", "remove", "search"]), st.lists(IDS, max_size=4, unique=True)),
    max_size=12,
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_any_sequence_of_changes_equals_a_dictionary(backend, steps):
    if len(backend):
        backend.remove([hit.id for hit in backend.search(queries(1), len(backend))[0]])
    kept = {}
    for seed, (step, ids) in enumerate(steps):
        given_rows = rows(ids, [{"seed": seed % 3}] * len(ids), seed=seed)
        change = {each: (row, seed) for each, row in zip(ids, given_rows.embeddings, strict=True)}
        if step == "add" and not set(ids) & set(kept):
            backend.add(given_rows)
            kept |= change
        elif step == "add":
            with pytest.raises(ValueError, match="there already"):
                backend.add(given_rows)
        elif step == "search":
            where = {"seed": seed % 3}
            allowed = {each: row for each, (row, since) in kept.items() if since % 3 == seed % 3}
            assert_nearest(backend.search(queries(1, seed), 3, where)[0], allowed, queries(1, seed)[0], 3)
        elif set(ids) <= set(kept):
            backend.replace(given_rows) if step == "replace" else backend.remove(ids)
            kept = kept | change if step == "replace" else {each: kept[each] for each in kept if each not in ids}
        else:
            with pytest.raises(KeyError):
                backend.replace(given_rows) if step == "replace" else backend.remove(ids)
        assert len(backend) == len(kept)
        assert_nearest(
            backend.search(queries(1), 10)[0], {each: row for each, (row, _) in kept.items()}, queries(1)[0], 10
        )
    assert [hit.text for hit in backend.get(list(kept))] == [
        f"text {seed} of {each}" for each, (_, seed) in kept.items()
    ]


def assert_nearest(hits, embeddings, query, k):
    scores = {each: float(row @ query) for each, row in embeddings.items()}
    expected = sorted(scores, key=scores.get, reverse=True)[:k]
    assert [hit.id for hit in hits] == expected
    np.testing.assert_allclose([hit.score for hit in hits], [scores[each] for each in expected], atol=1e-5)
