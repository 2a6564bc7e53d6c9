"""The search page's application, asked over HTTP."""

import asyncio
import io
import logging
import re
import shutil
import socket
import sys
import threading
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import pytest

pytest.importorskip("faiss")
pytest.importorskip("fastapi")

from PIL import Image
from starlette.testclient import TestClient

from st_kdmcse import build_student
from st_kdmcse.search import SemanticIndex, index_images
from st_kdmcse.search.limits import BusyError, Limits, RateLimit, SharedTurns
from st_kdmcse.search.server import LOCAL_HOSTS, create_app, is_local, listen

HOSTILE = ["<script>document.title = 'taken'</script>", '<img src=x onerror="alert(1)"> & "quoted"']


@pytest.fixture(scope="module")
def model(tiny_bert):
    return build_student(str(tiny_bert)).to("cpu")


@pytest.fixture(scope="module")
def index(model):
    """Ten texts with metadata, two of them hostile."""
    texts = [*HOSTILE, "a dog", "two dogs", "a man", "a woman", "red ball", "blue ball", "snow", "grass"]
    metadata = [{"year": 2000 + row, "lang": "en" if row % 2 else "de"} for row in range(10)]
    return SemanticIndex.build(model, texts, ids=[f"id/{row}?&" for row in range(10)], metadata=metadata)


@pytest.fixture(scope="module")
def client(index):
    with TestClient(create_app(index)) as client:
        yield client


def error(response, status):
    """The text of an error."""
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    return response.json()["error"]


def test_results_are_those_of_the_index(index, client):
    response = client.get("/api/search", params={"q": "two dogs", "k": 4})
    assert response.status_code == 200
    found = response.json()
    assert (found["query"], found["k"], list(found)) == ("two dogs", 4, ["query", "k", "seconds", "results"])
    assert found["seconds"] >= 0
    expected = index.search("two dogs", 4)
    assert found["results"] == [
        {
            "rank": rank,
            "id": hit.id,
            "text": hit.text,
            "score": hit.score,
            "metadata": hit.metadata,
            "thumbnail": None,
        }
        for rank, hit in enumerate(expected, start=1)
    ]
    assert len(client.get("/api/search", params={"q": "two dogs"}).json()["results"]) == 10


def test_filters(index, client):
    found = client.get("/api/search", params={"q": "dogs", "filter": ["year>=2003", "lang=en"]}).json()["results"]
    expected = index.search("dogs", 10, {"year": {"gte": 2003}, "lang": "en"})
    assert [each["id"] for each in found] == [hit.id for hit in expected]
    assert client.get("/api/search", params={"q": "dogs", "filter": "year=1"}).json()["results"] == []


def test_a_model_of_real_weights(minilm):
    index = SemanticIndex.build(minilm, ["A dog barks.", "The bank raised its rates.", "A puppy yelps."])
    with TestClient(create_app(index)) as client:
        found = client.get("/api/search", params={"q": "a noisy animal", "k": 2}).json()["results"]
        assert {each["text"] for each in found} == {"A dog barks.", "A puppy yelps."}
        assert client.get("/api/info").json()["model"] == Path(minilm).name


def test_milvus(tmp_path, model, monkeypatch):
    pytest.importorskip("milvus_lite")
    monkeypatch.chdir(tmp_path)
    index = SemanticIndex.open("milvus:lite.db?collection=texts", model, create=True)
    index.add(["a dog", "snow"], metadata=[{"year": 1}, {"year": 2}])
    with TestClient(create_app(index)) as client:
        found = client.get("/api/search", params={"q": "a dog", "filter": "year<2"}).json()["results"]
        assert [each["text"] for each in found] == ["a dog"]
        wrong = {"q": "a dog", "filter": "yaer=1"}
        assert "did you mean 'year'?" in error(client.get("/api/search", params=wrong), 422)
        wrong["filter"] = 'year="1"'
        assert "there are numbers" in error(client.get("/api/search", params=wrong), 422)
        info = client.get("/api/info").json()
        assert (info["rows"], info["engine"]) == (2, "milvus-lite")
        index.add(["grass"])
        assert client.get("/api/info").json()["rows"] == 3


def test_info(client, tiny_bert):
    assert client.get("/api/info").json() == {
        "rows": 10,
        "model": tiny_bert.name,
        "engine": "faiss",
        "index": "Flat",
        "limits": {
            "query_characters": 1000,
            "results": 100,
            "requests_per_minute": 120,
            "waiting": 512,
            "queries": 64,
            "image_bytes": 10 << 20,
        },
        "images": False,
        "image_queries": False,
        "rows_are": "texts",
    }


def test_hostile_texts_are_data(client):
    response = client.get("/api/search", params={"q": "a", "k": 10})
    assert response.headers["content-type"] == "application/json"
    assert set(HOSTILE) < {each["text"] for each in response.json()["results"]}


def test_the_page_has_all_it_needs_and_writes_no_markup(client):
    response = client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|style=|onclick", response.text)
    assert re.findall(r"https?://[^'\"]+", response.text) == ["http://www.w3.org/2000/svg"]


@pytest.mark.parametrize("path", ["/", "/api/info", "/api/search?q=dog", "/api/search", "/nothing", "/thumbnail?id=1"])
def test_headers(client, path):
    headers = client.get(path, headers={"Origin": "http://evil.example"}).headers
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({}, "the query is empty"),
        ({"q": " \n"}, "the query is empty"),
        ({"q": "é" * 21}, "the query has 21 characters; at most 20 are searched for"),
        ({"q": "dog", "k": 0}, "asked for 0 results"),
        ({"q": "dog", "k": 6}, "1 to 5 are possible"),
        ({"q": "dog", "k": "many"}, "k: "),
        ({"q": "dog", "filter": ["year>1"] * 11}, "there are 11 conditions"),
        ({"q": "dog", "filter": "a=" + "b" * 19}, "a condition of the filter has more than 20 characters"),
        ({"q": "dog", "filter": "year"}, "filter 'year': expected NAME=VALUE"),
        ({"q": "dog", "filter": "year=null"}, "filter on 'year'"),
        ({"q": "dog", "filter": "year>1234567890123456789"}, None),
        ({"q": "dog", "filter": "yaer=1"}, "did you mean 'year'?"),
        ({"q": "dog", "filter": "n<12345678901234567890"}, "filter 'n<12345678901234567890': 12345678901234567890 has"),
        ({"q": "d" * 20, "k": 5, "filter": ["year>1", "year>=2", "lang!=1"]}, None),
    ],
)
def test_what_may_be_asked_for(index, query, message):
    with TestClient(
        create_app(index, limits=Limits(query_characters=25 if "1234567890" in str(query) else 20, results=5))
    ) as c:
        response = c.get("/api/search", params=query)
    if message is None:
        assert response.status_code == 200, response.text
    else:
        assert message in error(response, 422)


def test_a_small_limit_is_the_default_number_of_results(index):
    with TestClient(create_app(index, limits=Limits(results=3))) as client:
        assert client.get("/api/search", params={"q": "dog"}).json()["k"] == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"query_characters": 0},
        {"query_characters": 5001},
        {"results": 0},
        {"results": True},
        {"requests_per_minute": 0},
        {"requests_per_minute": 0.5},
        {"waiting": -1},
        {"queries": 0},
    ],
)
def test_limits_are_checked(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` is .*, expected an integer of"):
        Limits(**wrong)


def test_a_token_bucket():
    now = [0.0]
    rate = RateLimit(6, clock=lambda: now[0])
    assert [rate.wait("a") for _ in range(7)] == [0, 0, 0, 0, 0, 0, 10]
    assert rate.wait("b") == 0
    now[0] = 4
    assert rate.wait("a") == pytest.approx(6)
    now[0] = 10.001
    assert rate.wait("a") == 0
    assert rate.wait("a") > 9
    now[0] = 10_000
    assert [rate.wait("a") > 0 for _ in range(7)] == [False] * 6 + [True]
    assert (rate.wait("c", 5), rate.wait("c", 3), rate.wait("c", 1)) == (0, 20, 0), "a refusal counts nothing"


def test_a_token_bucket_forgets_the_clients_of_long_ago():
    rate = RateLimit(1, clock=lambda: 0.0)
    assert (rate.wait("a"), rate.wait("b")) == (0, 0)
    for number in range(9_998):
        rate.wait(str(number))
    assert rate.wait("a") > 0, "10,000 are remembered"
    rate.wait("one more")
    assert rate.wait("a") > 0
    assert rate.wait("b") == 0, "the one that was silent for longest"


def test_searches_are_limited_by_client(index):
    app = create_app(index, limits=Limits(requests_per_minute=2))
    with TestClient(app, client=("10.0.0.1", 1)) as client:
        answers = [client.get("/api/search", params={"q": "dog"}) for _ in range(3)]
        assert [each.status_code for each in answers] == [200, 200, 429]
        assert "try again in" in error(answers[2], 429)
        assert 1 <= int(answers[2].headers["Retry-After"]) <= 30
        assert client.get("/api/info").status_code == 200
        disguised = client.get("/api/%73earch", params={"q": "dog"}, headers={"Host": "a/b"})
        assert disguised.status_code == 429
        other = TestClient(app, client=("10.0.0.2", 1))
        assert other.get("/api/search", params={"q": "dog"}).status_code == 200


def test_searches_take_turns_and_not_too_many_wait(index, monkeypatch):
    gate, running, together = threading.Event(), [], []
    found = index.search
    queries = [f"{word} dogs" for word in ("two", "red", "blue", "small", "large", "the")]
    expected = {query: [hit.id for hit in found(query)] for query in queries}

    def search(query, k, where):
        running.append(query)
        together.append(len(running))
        assert gate.wait(30)
        hits = found(query, k, where)
        running.remove(query)
        return hits

    monkeypatch.setattr(index, "search", search)
    with (
        TestClient(create_app(index, limits=Limits(waiting=2))) as client,
        ThreadPoolExecutor(max_workers=6) as threads,
    ):
        asked = {threads.submit(client.get, "/api/search", params={"q": query}): query for query in queries}
        refused = set()
        while len(refused) < 3:  # the others do not end before the gate is open
            refused |= wait(set(asked) - refused, return_when=FIRST_COMPLETED, timeout=30).done
        assert client.get("/").status_code == 200, "the rest goes on"
        gate.set()
        for request, query in asked.items():
            response = request.result()
            if request in refused:
                assert "too many are searching" in error(response, 503)
                assert response.headers["Retry-After"] == "1"
            else:
                assert [each["id"] for each in response.json()["results"]] == expected[query]
    assert together == [1, 1], "those that waited are searched for together"


def test_queries_that_wait_are_counted_not_requests():
    turns, gate = SharedTurns(waiting=3, most=4), threading.Event()

    async def ask():
        def answer(items):
            assert gate.wait(30)
            return items

        admitted = [asyncio.ensure_future(turns.take(answer, list(range(size)), 0)) for size in (1, 2, 9)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await turns.take(answer, [0], 0)
        gate.set()
        assert [len(found) for found in await asyncio.gather(*admitted)] == [1, 2, 9]
        return await turns.take(answer, [0], 0)

    assert asyncio.run(ask()) == [0], "there is room again"


def test_questions_of_one_kind_share_a_turn():
    turns, gate, calls = SharedTurns(waiting=20, most=4), threading.Event(), []

    def answer(items):
        calls.append(items)
        assert gate.wait(30)
        if "wrong" in items:
            raise ValueError(items)
        return [each.upper() for each in items]

    async def ask():
        first = asyncio.ensure_future(turns.take(answer, ["first"], 0))
        while not calls:
            await asyncio.sleep(0)
        asked = [(["a"], 1), (["b", "c"], 1), (["d"], 2), (["e", "f"], 1), (["g"], 1), (["wrong"], 3), (["h"], 3)]
        others = [asyncio.ensure_future(turns.take(answer, items, kind)) for items, kind in asked]
        left = asyncio.ensure_future(turns.take(answer, ["nobody waits for it"], 1))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    *found, error, last = asyncio.run(ask())
    assert found == [["FIRST"], ["A"], ["B", "C"], ["D"], ["E", "F"], ["G"]]
    assert isinstance(error, ValueError)
    assert last == ["H"], "the error of another is not its own"
    assert calls == [["first"], ["a", "b", "c", "g"], ["d"], ["e", "f"], ["wrong", "h"], ["h"]]


def test_an_unexpected_error_shows_nothing_of_the_inside(index, monkeypatch, caplog):
    def search(query, k, where):
        raise RuntimeError("secret of /root")

    monkeypatch.setattr(index, "search", search)
    with TestClient(create_app(index)) as client, caplog.at_level(logging.DEBUG):
        response = client.get("/api/search", params={"q": "a private matter"})
        assert error(response, 500) == "something went wrong here; the server's log says what"
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        assert client.get("/api/info").status_code == 200
    (record,) = [record for record in caplog.records if record.name.startswith("st_kdmcse")]
    assert (record.levelname, "/api/search" in record.getMessage()) == ("ERROR", True)
    assert "secret of /root" in caplog.text
    assert "private matter" not in caplog.text.replace("+", " ").split("HTTP Request:")[0]


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.example", 400),
        ("localhost.evil.example:8000", 400),
        ("127.0.0.1.evil.example", 400),
        ("", 400),
    ],
)
def test_host_names(index, host, status):
    with TestClient(create_app(index, hosts=LOCAL_HOSTS)) as client:
        assert client.get("/api/info", headers={"Host": host}).status_code == status


def test_other_paths_and_methods(client):
    assert error(client.get("/docs"), 404) == "Not Found"
    assert error(client.get("/openapi.json"), 404) == "Not Found"
    assert error(client.get("/api/search/", params={"q": "dog"}), 404) == "Not Found"
    assert error(client.put("/api/search"), 405) == "Method Not Allowed"


@pytest.mark.parametrize("path", ["/", "/api/info", "/api/search?q=dog"])
def test_head_is_answered_as_get_is(client, path):
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.headers["content-type"]) == (200, get.headers["content-type"])


def test_answers_are_sent_at_once():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_without_fastapi(index, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(ImportError, match=r'pip install "st-kdmcse\[serve\]"'):
        create_app(index)


def test_listening():
    with listen("127.0.0.1", 0) as one:
        assert is_local(one)
        with pytest.raises(OSError, match=r"cannot serve at 127.0.0.1, port \d+: .*; choose another"):
            listen("127.0.0.1", one.getsockname()[1])
    with listen("0.0.0.0", 0) as everywhere:
        assert not is_local(everywhere)
    with pytest.raises(OSError, match=r"there is no host 'no such host': give a name"):
        listen("no such host", 0)
    with pytest.raises(OSError, match=r"cannot serve at 192.0.2.1, port 0"):
        listen("192.0.2.1", 0)


class TestThumbnails:
    """Images of rows, most of them not to be shown."""

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("gallery")
        (folder / "images" / "below").mkdir(parents=True)
        Image.new("RGB", (800, 200), "red").save(folder / "images" / "wide.png")
        Image.new("RGB", (100, 50), "red").save(folder / "images" / "below" / "small.jpg")
        Image.new("RGB", (50, 50), "blue").save(folder / "outside.jpg")
        (folder / "images" / "link.jpg").symlink_to(folder / "outside.jpg")
        (folder / "images" / "inner.jpg").symlink_to(folder / "images" / "below" / "small.jpg")
        (folder / "images" / "loop.jpg").symlink_to(folder / "images" / "loop.jpg")
        orientation = Image.Exif()
        orientation[0x0112] = 6
        turned = Image.new("RGB", (400, 200), "green")
        turned.paste("white", (0, 0, 400, 100))
        turned.save(folder / "images" / "turned.jpg", exif=orientation)
        Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(folder / "images" / "clear.png")
        Image.new("I;16", (10, 10)).save(folder / "images" / "deep.png")
        whole = (folder / "images" / "turned.jpg").read_bytes()
        (folder / "images" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
        (folder / "images" / "text.jpg").write_text("no image")
        (folder / "images" / "empty.jpg").touch()
        Image.new("1", (20_000, 5_000)).save(folder / "images" / "bomb.png")
        with (folder / "images" / "vast.jpg").open("wb") as vast:
            vast.write(whole)
            vast.truncate(65 << 20)
        return folder

    @pytest.fixture(scope="class")
    def index(self, folder, model):
        inside = ["wide.png", "below/small.jpg", "inner.jpg", "turned.jpg", "clear.png", "deep.png"]
        damaged = ["cut.jpg", "text.jpg", "empty.jpg", "bomb.png", "vast.jpg"]
        outside = [
            "../outside.jpg",
            str(folder / "outside.jpg"),
            "link.jpg",
            "below/../../outside.jpg",
            "/etc/hostname",
        ]
        strange = ["loop.jpg", "nothing.jpg", "below", "", ".", "a" * 5000, 7, None]
        names = [*inside, *damaged, *outside, *strange]
        texts = [f"dog {row}" for row in range(len(names))]
        return SemanticIndex.build(
            model,
            texts,
            ids=[str(name)[:500] or "none" for name in names],
            metadata=[{"photo": name} for name in names],
        )

    @pytest.fixture(scope="class")
    def client(self, folder, index):
        with TestClient(create_app(index, images=folder / "images", image_column="photo")) as client:
            yield client

    def get(self, client, name, **headers):
        return client.get("/thumbnail", params={"id": name}, headers=headers)

    def opened(self, client, name):
        response = self.get(client, name)
        assert (response.status_code, response.headers["content-type"]) == (200, "image/jpeg"), response.text
        return Image.open(io.BytesIO(response.content))

    def test_results_name_them(self, index, client):
        results = client.get("/api/search", params={"q": "dog", "k": 100}).json()["results"]
        assert client.get("/api/info").json()["images"] is True
        assert len(results) == len(index)
        for result in results:
            if isinstance(result["metadata"]["photo"], str):
                assert client.get(result["thumbnail"]).content == self.get(client, result["id"]).content
            else:
                assert result["thumbnail"] is None

    @pytest.mark.parametrize(
        ("name", "size"), [("wide.png", (320, 80)), ("below/small.jpg", (100, 50)), ("inner.jpg", (100, 50))]
    )
    def test_small_and_whole(self, client, name, size):
        image = self.opened(client, name)
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
        assert image.getpixel((5, 5))[0] > 200

    def test_upright(self, client):
        image = self.opened(client, "turned.jpg")
        assert image.size == (160, 320)
        assert min(image.getpixel((150, 160))) > 240, "what was above is on the right"
        assert image.getpixel((10, 160))[0] < 20

    def test_other_modes(self, client):
        assert min(self.opened(client, "clear.png").getpixel((5, 5))) > 250, "transparent is white"
        assert self.opened(client, "deep.png").mode == "RGB"

    @pytest.mark.parametrize("name", ["cut.jpg", "text.jpg", "empty.jpg", "bomb.png", "vast.jpg"])
    def test_damaged_and_huge(self, client, name):
        assert error(self.get(client, name), 422) == "the image cannot be shown: it is damaged or too large"

    @pytest.mark.parametrize(
        "name",
        [
            "../outside.jpg",
            "FOLDER/outside.jpg",
            "link.jpg",
            "below/../../outside.jpg",
            "/etc/hostname",
            "loop.jpg",
            "nothing.jpg",
            "below",
            "none",
            ".",
            "a\0b",
            "a" * 500,
            "7",
            "None",
            "an id of no row",
            "",
        ],
    )
    def test_nothing_else(self, folder, client, name):
        response = self.get(client, name.replace("FOLDER", str(folder)))
        assert error(response, 404) in ("there is no such image", "there is no such row")

    def test_browsers_keep_them_and_ask_again(self, client):
        first = self.get(client, "wide.png")
        assert first.headers["Cache-Control"] == "private, no-cache"
        again = self.get(client, "wide.png", **{"If-None-Match": first.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert self.get(client, "turned.jpg", **{"If-None-Match": first.headers["ETag"]}).status_code == 200

    def test_a_changed_file_has_another(self, tmp_path, model):
        Image.new("RGB", (10, 10), "red").save(tmp_path / "a.png")
        index = SemanticIndex.build(model, ["a dog"], ids=["a"], metadata=[{"image": "a.png"}])
        with TestClient(create_app(index, images=tmp_path)) as client:
            before = self.opened(client, "a")
            Image.new("RGB", (10, 20), "red").save(tmp_path / "b.png")
            (tmp_path / "b.png").replace(tmp_path / "a.png")
            assert (before.size, self.opened(client, "a").size) == ((10, 10), (10, 20))

    def test_without_a_folder(self, index, folder):
        with TestClient(create_app(index)) as client:
            assert error(self.get(client, "wide.png"), 404) == "there are no images"
            results = client.get("/api/search", params={"q": "dog"}).json()["results"]
            assert {each["thumbnail"] for each in results} == {None}
        with pytest.raises(FileNotFoundError, match=r"no folder of images .*gone"):
            create_app(index, images=folder / "gone")

    def test_the_folder_of_the_index(self, folder, index, monkeypatch, caplog):
        monkeypatch.setattr(SemanticIndex, "images", folder / "images")
        with TestClient(create_app(index, image_column="photo")) as client:
            assert self.opened(client, "wide.png").size == (320, 80)
        monkeypatch.setattr(SemanticIndex, "images", folder / "gone")
        with TestClient(create_app(index, image_column="photo")) as client:
            assert client.get("/api/info").json()["images"] is False
        assert "gone" in caplog.text


class TestSearchByImage:
    @pytest.fixture(scope="class")
    def index(self, tmp_path_factory, tiny_multimodal, photos):
        folder = tmp_path_factory.mktemp("photos")
        for photo in photos:
            shutil.copy(photo, folder)
        return index_images(folder, str(tiny_multimodal), tmp_path_factory.mktemp("of-images") / "index")

    @pytest.fixture(scope="class")
    def client(self, index):
        with TestClient(create_app(index, limits=Limits(image_bytes=1 << 20))) as client:
            yield client

    def post(self, client, content, kind="image/jpeg", **params):
        return client.post("/api/search/image", content=content, headers={"Content-Type": kind}, params=params)

    def test_what_is_near_to_an_image(self, client, index, photos):
        found = self.post(client, photos[3].read_bytes(), k=4).json()
        (expected,) = index.search_images([photos[3]], k=4)
        assert (found["query"], found["k"], len(found["results"])) == (None, 4, 4)
        assert [(each["id"], each["score"]) for each in found["results"]] == [(hit.id, hit.score) for hit in expected]
        assert found["results"][0]["thumbnail"] == f"/thumbnail?id={photos[3].name}"
        only = self.post(client, photos[3].read_bytes(), filter=f"image!={photos[3].name}").json()["results"]
        assert (len(only), photos[3].name in {each["id"] for each in only}) == (10, False)
        assert client.get("/api/info").json()["image_queries"]

    def test_what_is_refused(self, client, photos):
        png = io.BytesIO()
        Image.new("1", (8000, 8000)).save(png, "PNG")
        tiff = io.BytesIO()
        Image.new("RGB", (4, 4)).save(tiff, "TIFF")
        photo = photos[0].read_bytes()
        assert "too large an image" in error(self.post(client, png.getvalue()), 422)
        assert "no known image format" in error(self.post(client, tiff.getvalue()), 422)
        assert "no known image format" in error(self.post(client, b"<svg/>"), 422)
        assert "cannot be decoded" in error(self.post(client, photo[: len(photo) // 2]), 422)
        assert "empty" in error(self.post(client, b""), 422)
        assert "more than 1,048,576 bytes" in error(self.post(client, b"x" * ((1 << 20) + 1)), 413)
        assert "more than 1,048,576 bytes" in error(self.post(client, (b"x" * 99_999 for _ in range(11))), 413)
        assert "the request is no image" in error(self.post(client, photo, "text/plain"), 415)
        assert "k: Input should be a valid integer" in error(self.post(client, photo, k="many"), 422)
        assert "1 to 100 are possible" in error(self.post(client, photo, k=101), 422)
        assert "did you mean 'image'?" in error(self.post(client, photo, filter="imaeg=x"), 422)
        assert client.get("/api/search/image").status_code == 405

    def test_searches_by_image_are_limited_like_others(self, index, photos):
        with TestClient(create_app(index, limits=Limits(requests_per_minute=1))) as client:
            assert self.post(client, photos[0].read_bytes()).status_code == 200
            assert self.post(client, photos[0].read_bytes()).status_code == 429


def test_an_index_whose_model_encodes_no_images(client, photos):
    response = client.post("/api/search/image", content=photos[0].read_bytes(), headers={"Content-Type": "image/jpeg"})
    assert "the model of this index encodes no images" in error(response, 422)
