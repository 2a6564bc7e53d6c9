"""What programs ask the search server for."""

import json
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("faiss")
pytest.importorskip("fastapi")

from PIL import Image
from starlette.testclient import TestClient

from st_kdmcse import build_student
from st_kdmcse.search import SemanticIndex
from st_kdmcse.search.limits import Limits
from st_kdmcse.search.server import create_app

IDS = ["a", "b/c", "/", "../d", "50%", "[", "ä?&#", "two words"]


@pytest.fixture(scope="module")
def model(tiny_bert):
    return build_student(str(tiny_bert)).to("cpu")


@pytest.fixture(scope="module")
def index(model):
    texts = ["a dog", "two dogs", "a man", "a woman", "red ball", "blue ball", "snow", "grass"]
    metadata = [{"year": 2000 + row, "lang": "en" if row % 2 else "de", "none": None} for row in range(8)]
    return SemanticIndex.build(model, texts, ids=IDS, metadata=metadata)


@pytest.fixture(scope="module")
def client(index):
    with TestClient(create_app(index, limits=Limits(requests_per_minute=100_000))) as client:
        yield client


@pytest.fixture(scope="module")
def narrow(index):
    """A client of a server that allows little."""
    with TestClient(create_app(index, limits=Limits(query_characters=40, results=5, queries=4))) as client:
        yield client


def error(response, status):
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    return response.json()["error"]


def test_many_queries_are_answered_as_each_alone(index, client):
    queries = ["two dogs", "snow", "two dogs", "a man in the snow"]
    response = client.post("/api/search", json={"queries": queries, "k": 3})
    assert response.status_code == 200, response.text
    found = response.json()
    assert list(found) == ["queries", "k", "seconds", "results"]
    assert (found["queries"], found["k"]) == (queries, 3)
    for query, results in zip(queries, found["results"], strict=True):
        alone = client.get("/api/search", params={"q": query, "k": 3}).json()["results"]
        assert [{**each, "score": 0} for each in results] == [{**each, "score": 0} for each in alone]
        assert [each["score"] for each in results] == pytest.approx([each["score"] for each in alone], abs=1e-5)
    assert [len(each) for each in client.post("/api/search", json={"queries": ["dog"]}).json()["results"]] == [8]


def test_queries_are_encoded_together(index, client, monkeypatch):
    asked = []
    encode = type(index.model).encode_query
    monkeypatch.setattr(
        type(index.model),
        "encode_query",
        lambda self, texts, **how: asked.append(list(texts)) or encode(self, texts, **how),
    )
    client.post("/api/search", json={"queries": ["a dog", "two dogs", "snow"]})
    assert [sorted(texts) for texts in asked] == [["a dog", "snow", "two dogs"]]


@pytest.mark.parametrize(
    ("where", "typed"),
    [
        ({"year": {"gte": 2003}, "lang": "en"}, ["year>=2003", "lang=en"]),
        ({"year": [2001, 2002]}, ["year=[2001, 2002]"]),
        ({"lang": {"ne": "en"}}, ["lang!=en"]),
        ({}, []),
    ],
)
def test_filters_as_values_and_as_they_are_typed(client, where, typed):
    expected = client.get("/api/search", params={"q": "dogs", "filter": typed}).json()["results"]
    for filter_ in (where, typed):
        found = client.post("/api/search", json={"queries": ["dogs"], "filter": filter_}).json()["results"]
        assert found == [expected]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the request: Invalid JSON: EOF"),
        (b"{", "the request: Invalid JSON"),
        (b"[" * 10_000, "the request: Invalid JSON: recursion limit"),
        (b'{"queries": ["\xff"]}', "the request: Invalid JSON"),
        (rb'{"queries": ["\ud800"]}', "the request: Invalid JSON"),
        ([], "the request: Input should be an object"),
        ({}, "queries: Field required"),
        ({"queries": "dog"}, "queries: Input should be a valid array"),
        ({"queries": [1]}, "queries.0: Input should be a valid string"),
        ({"queries": ["dog"], "top": 3}, "top: Extra inputs are not permitted"),
        ({"queries": ["dog"], "k": "3"}, "k: Input should be a valid integer"),
        ({"queries": ["dog"], "k": True}, "k: Input should be a valid integer"),
        ({"queries": []}, "asked for 0 queries: 1 to 4 are possible in one request"),
        ({"queries": ["dog"] * 5}, "asked for 5 queries: 1 to 4 are possible in one request"),
        ({"queries": ["dog", " "]}, "query 1 is empty"),
        ({"queries": ["dog", "d" * 41]}, "query 1 has 41 characters; at most 40 are searched for"),
        ({"queries": ["dog"], "k": 6}, "asked for 6 results (k): 1 to 5 are possible"),
        ({"queries": ["dog"], "k": 0}, "asked for 0 results (k): 1 to 5 are possible"),
        ({"queries": ["dog"], "filter": 5}, "filter.dict[str,any]: Input should be an object"),
        ({"queries": ["dog"], "filter": {"year": {"above": 1}}}, "unknown comparison ['above']"),
        ({"queries": ["dog"], "filter": {"year": None}}, "None is not a text, a number or a truth value"),
        ({"queries": ["dog"], "filter": {"year": []}}, "the list is empty"),
        ({"queries": ["dog"], "filter": {"": 1}}, "names of metadata as keys"),
        ({"queries": ["dog"], "filter": {"year": 2**63}}, "has more than 64 bits"),
        ({"queries": ["dog"], "filter": {"year": list(range(50))}}, "more than 40 characters"),
        ({"queries": ["dog"], "filter": {"y" * 41: 1}}, "more than 40 characters"),
        ({"queries": ["dog"], "filter": {str(name): 1 for name in range(11)}}, "11 conditions in the filter"),
        ({"queries": ["dog"], "filter": ["year"]}, "filter 'year': expected NAME=VALUE"),
        ({"queries": ["dog"], "filter": {"yaer": 1}}, "did you mean 'year'?"),
        ({"queries": ["dog"], "filter": {"year": "1"}}, "there are numbers"),
    ],
)
def test_what_may_be_asked_for(narrow, body, message):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert message in error(narrow.post("/api/search", content=content), 422)


def test_the_size_of_a_request_is_bounded(index):
    limits = Limits(query_characters=10, results=5, queries=4)
    with TestClient(create_app(index, limits=limits)) as client:
        largest = json.dumps({"queries": ["\N{DOG}" * 10] * 4})
        assert client.post("/api/search", content=largest).status_code == 200
        assert "the request has more than" in error(client.post("/api/search", content=b" " * 100_000), 413)


def test_every_query_counts(index):
    with TestClient(create_app(index, limits=Limits(requests_per_minute=5))) as client:
        assert "1 to 5 are possible" in error(client.post("/api/search", json={"queries": ["dog"] * 6}), 422)
        assert client.post("/api/search", json={"queries": ["dog"] * 3}).status_code == 200
        refused = client.post("/api/search", json={"queries": ["dog"] * 3})
        assert "too many requests a minute: try again in" in error(refused, 429)
        assert 1 <= int(refused.headers["Retry-After"]) <= 12
        assert client.get("/api/search", params={"q": "dog"}).status_code == 200, "what was refused did not count"
        assert client.post("/api/search", json={"queries": ["dog"]}).status_code == 200
        assert client.get("/api/search", params={"q": "dog"}).status_code == 429


@pytest.mark.parametrize("row", range(len(IDS)))
def test_items(index, client, row):
    response = client.get(f"/api/items/{quote(IDS[row], safe='')}")
    assert response.status_code == 200, response.text
    (hit,) = index.get([IDS[row]])
    assert response.json() == {"id": hit.id, "text": hit.text, "metadata": hit.metadata, "thumbnail": None}


@pytest.mark.parametrize("row", ["e", "", "%00", "x" * 5000])
def test_items_that_are_not_there(client, row):
    assert "there is no row with the id" in error(client.get(f"/api/items/{row}"), 404)


def test_items_with_images(tmp_path, model):
    Image.new("RGB", (10, 10), "red").save(tmp_path / "a.png")
    index = SemanticIndex.build(model, ["a dog"], ids=["a"], metadata=[{"image": "a.png"}])
    with TestClient(create_app(index, images=tmp_path)) as client:
        item = client.get("/api/items/a").json()
        assert client.get(item["thumbnail"]).headers["content-type"] == "image/jpeg"


def test_the_description_fits_what_is_answered(index):
    with TestClient(create_app(index, docs=True)) as client:
        described = client.get("/openapi.json").json()
        answers = {
            "/api/search": {
                "get": client.get("/api/search", params={"q": "dog"}),
                "post": client.post("/api/search", json={"queries": ["dog"]}),
            },
            "/api/items/{id}": {"get": client.get("/api/items/a")},
        }
    assert set(described["paths"]) == {*answers, "/api/info", "/api/search/image", "/thumbnail"}
    schemas = described["components"]["schemas"]
    for path, methods in answers.items():
        assert set(described["paths"][path]) == set(methods)
        for method, response in methods.items():
            reference = described["paths"][path][method]["responses"]["200"]["content"]["application/json"]["schema"]
            schema = schemas[reference["$ref"].rpartition("/")[2]]
            assert set(schema["properties"]) == set(response.json())
    (result, *_) = answers["/api/search"]["get"].json()["results"]
    assert set(schemas["Result"]["properties"]) == set(result)
    body = described["paths"]["/api/search"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    with TestClient(create_app(index)) as client:
        assert all(client.post("/api/search", json=example).status_code == 200 for example in body["examples"])


def test_the_page_of_the_description_loads_from_here_alone(index):
    with TestClient(create_app(index, docs=True)) as client:
        page = client.get("/docs")
        assert "'self'" in page.headers["Content-Security-Policy"]
        assert "http" not in page.text.replace("http-equiv", "")
        for asset in ("swagger-ui-bundle.js", "swagger-ui.css"):
            assert f"/docs/assets/{asset}" in page.text
            assert len(client.get(f"/docs/assets/{asset}").content) > 100_000
        assert client.get(f"/docs/assets/../../{Path(__file__).name}").status_code == 404
        assert "'unsafe-inline'" not in client.get("/").headers["Content-Security-Policy"]
