"""The search page as a user starts it, and as a browser shows it."""

import html
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from socket import create_connection
from urllib.error import HTTPError
from urllib.parse import quote, urlencode
from urllib.request import Request, urlopen

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("faiss")
pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from helpers import copy_tree
from PIL import Image

from st_kdmcse import build_student
from st_kdmcse.cli.main import main
from st_kdmcse.files import manifest_checksum
from st_kdmcse.search import SemanticIndex
from st_kdmcse.search.server import listen

SCRIPT = "<script>document.title = 'taken'</script>"
MARKUP = "<img src=x onerror=\"document.title = 'taken'\"> & more"


@pytest.fixture(scope="module")
def index(tmp_path_factory, tiny_bert):
    """Folder of an index of five texts with images; its model is in that folder too."""
    folder = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    build_student(str(tiny_bert)).to("cpu").save_pretrained(str(folder / "a-student"))
    (folder / "images").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "images" / "red.png")
    texts = ["a dog runs", "two dogs on snow", "a woman sits on grass", SCRIPT, MARKUP]
    metadata = [{"image": "red.png", "year": 2000 + row, MARKUP: SCRIPT} for row in range(5)]
    SemanticIndex.build(str(folder / "a-student"), texts, ids=[*"abc", SCRIPT, MARKUP], metadata=metadata).save(
        folder / "index"
    )
    return folder / "index"


@contextmanager
def serving(index, *options, **constants):
    """The real command on a free port, with some constants of its module: its process, and the URL that it says."""
    code = f"import st_kdmcse.search.server as server; vars(server).update({constants}); " + (
        "from st_kdmcse.cli.main import main; main(prog_name='st-kdmcse')"
    )
    command = [sys.executable, "-c", code, "serve", str(index), "--port", "0", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            url = re.search(r"http://\S+", line)
            assert url, line + process.stderr.read()
            yield process, url[0]
        finally:
            process.kill()


def run(*arguments):
    return CliRunner().invoke(main, ["serve", *map(str, arguments)])


def fails(*arguments):
    """The error of a command that a user can mend: status 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


def test_from_start_to_end(index):
    with serving(index, "--rate", 3, "--max-k", 4) as (process, url):
        with urlopen(f"{url}/api/search?{urlencode({'q': 'a dog runs', 'k': 1})}") as response:
            found = json.load(response)
        assert [(each["id"], each["text"]) for each in found["results"]] == [("a", "a dog runs")]
        for query, status in ((f"q={'dog' * 33_333}", 422), ("q=dog&k=4", 200), ("q=dog&k=4", 429)):
            try:
                with urlopen(f"{url}/api/search?{query}") as response:
                    assert response.status == status
            except HTTPError as error:
                assert error.code == status  # noqa: PT017 - either way is compared
                error.close()
        with pytest.raises(HTTPError, match="400"):
            urlopen(Request(url, headers={"Host": "evil.example"}))
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest, errors.strip()) == (130, "", "stopped"), "and no query is logged"


def status(url):
    try:
        with urlopen(url, timeout=60) as response:
            return response.status
    except HTTPError as error:
        error.close()
        return error.code


def closed(connection):
    """Whether the other side closes a connection, after whatever it has to say."""
    connection.settimeout(60)
    try:
        while connection.recv(1 << 16):
            pass
    except ConnectionResetError:
        pass
    return True


HALVES = [
    b"",
    b"GET /api/info HT",
    b"GET /api/info HTTP/1.1\r\nHost: localhost\r\nX: ",
    b"GET /api/info HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhalf",
    b"GET /api/info HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf",
    b"GET /api/info HTTP/1.1\r\nHost: localhost\r\n\r\nGET /api/info",
    b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\nhalf",
]


def test_half_a_request_holds_nothing_for_long(index):
    with serving(index, _REQUEST_SECONDS=1, _CONNECTIONS=20) as (_, url), ExitStack() as opened:
        place = re.search(r"//(.*):(\d+)", url).groups()
        connections = [opened.enter_context(create_connection(place)) for _ in range(30)]
        for number, connection in enumerate(connections):
            with suppress(ConnectionError):  # closed, for those that came after it
                connection.sendall(HALVES[number % len(HALVES)])
        assert status(f"{url}/api/info") == 200, "though there are more connections than there may be"
        assert all(map(closed, connections))
        assert status(f"{url}/api/info") == 200
        with create_connection(place) as connection:
            with suppress(ConnectionError):
                connection.sendall(b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * (1 << 20))
            assert closed(connection)
        assert status(f"{url}/api/info") == 200


def test_an_index_that_is_saved_or_replaced_meanwhile_is_served(index, tmp_path, tiny_bert):
    folder = copy_tree(index, tmp_path / "index")
    with serving(folder, "--rate", 100_000, _LOOK_SECONDS=0.0) as (process, url):
        writer = SemanticIndex.load(folder)
        search = f"{url}/api/search?{urlencode({'q': 'a small child', 'k': 1})}"

        def found():
            with urlopen(search, timeout=60) as response:
                return json.load(response)["results"][0]["id"]

        assert found() in {*"abc", SCRIPT, MARKUP}
        writer.add(["a small child"], ids=["new"])
        writer.save()
        until = time.monotonic() + 60
        while found() != "new":
            assert time.monotonic() < until
        with urlopen(f"{url}/api/info", timeout=60) as response:
            assert json.load(response)["rows"] == 6
        vectors = next(folder.glob("data-*/vectors.faiss"))
        manifest = json.loads((folder / "manifest.json").read_text())
        vectors.write_bytes(b"")
        manifest["rows"] = 7
        manifest["checksum"] = manifest_checksum(manifest)
        (folder / "manifest.json").write_text(json.dumps(manifest))
        assert [found() for _ in range(20)] == ["new"] * 20
        torch.manual_seed(1)
        build_student(str(tiny_bert)).to("cpu").save_pretrained(str(tmp_path / "another"))
        SemanticIndex.build(str(tmp_path / "another"), ["a small child"], ids=["other"], path=tmp_path / "replacement")
        folder.rename(tmp_path / "before")
        (tmp_path / "replacement").rename(folder)
        until = time.monotonic() + 60
        while found() != "other":
            assert time.monotonic() < until
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert "INFO: the index has changed: 6 texts are served now" in errors
    assert "INFO: the index has changed: 1 texts are served now" in errors
    assert errors.count("the one of before is served: ") == 1
    assert f"{vectors} has 0 bytes" in errors


def test_every_request_that_came_is_answered_after_sigterm(index):
    body = json.dumps({"queries": [f"{number} dogs and a {'child ' * 100}" for number in range(64)]}).encode()
    head = f"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    with serving(index, "--rate", 10_000) as (process, url), ExitStack() as opened:
        place = re.search(r"//(.*):(\d+)", url).groups()
        connections = [opened.enter_context(create_connection(place, timeout=60)) for _ in range(8)]
        idle = opened.enter_context(create_connection(place, timeout=60))
        for connection in connections:
            connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
        for connection in connections:
            assert connection.recv(1000).startswith(b"HTTP/1.1 100"), "the server reads the request"
        process.send_signal(signal.SIGTERM)
        for connection in connections:
            connection.sendall(body)
        for connection in connections:
            response = HTTPResponse(connection)
            response.begin()
            assert response.status == 200
            assert [len(results) for results in json.load(response)["results"]] == [5] * 64
        assert closed(idle), "without waiting for what it may ask for"
        assert process.wait(60) == -signal.SIGTERM
        with pytest.raises(ConnectionRefusedError):
            create_connection(place)


def test_ids_come_as_they_are_written(tmp_path, index):
    model = index.parent / "a-student"
    SemanticIndex.build(str(model), ["a dog", "a cat"], ids=["%2F", "../a//b/"], path=tmp_path / "odd")
    with serving(tmp_path / "odd") as (_, url):
        for key in ("%2F", "../a//b/"):
            with urlopen(f"{url}/api/items/{quote(key, safe='')}", timeout=60) as response:
                assert json.load(response)["id"] == key


def test_in_a_browser(index):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium")

    def shown(url, parameters):
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", "--dump-dom"]
        command.append(f"--user-data-dir={index.parent / 'profile'}")
        return subprocess.run(
            [*command, f"{url}?{urlencode(parameters, doseq=True)}"], capture_output=True, text=True, check=True
        ).stdout

    with serving(index, "--images", index.parent / "images", "--docs") as (_, url):
        described = shown(f"{url}/docs", {})
        page = shown(f"{url}/", {"q": "a dog runs", "k": 5, "filter": ["year>=2000", "year<=2004"]})
        wrong = shown(f"{url}/", {"q": "a dog", "k": 500})
    for request in ("/api/search", "/api/items", "/api/info"):
        assert re.search(rf'data-path="{request}', described), "the library of the page runs"
    results = page[page.index('id="results"') : page.index("</ol>")]
    assert "<title>a dog runs · Semantic search</title>" in page, "what is hostile did not run"
    assert "5 texts · a-student · faiss Flat" in page
    assert re.search(r"5 results in \d+ ms", page)
    assert results.count("<li") == 5
    assert re.search(r'class="rank">1<.*?class="text"[^>]*>a dog runs<.*?1\.000<.*?class="id">id a<', results)
    assert [html.unescape(text) for text in re.findall(r'class="text"[^>]*>(.*?)</p>', results)].count(SCRIPT) == 1
    assert html.escape(SCRIPT, quote=False) in results
    assert html.escape(MARKUP, quote=False) in results
    assert "<script" not in results
    assert set(re.findall(r"<img[^>]*>", results)) == {
        f'<img alt="" loading="lazy" src="/thumbnail?{urlencode({"id": key}).replace("+", "%20")}">'
        for key in (*"abc", SCRIPT, MARKUP)
    }
    assert "no image" not in results
    assert re.search(r'role="alert">Asked for 500 results \(k\): 1 to 100 are possible\.<', wrong)
    assert "<li" not in wrong[wrong.index("</header>") :]


def test_what_cannot_be_served(index, tmp_path):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        assert f"error: cannot serve at 127.0.0.1, port {port}: " in fails(index, "--port", port)
    assert "error: there is no host 'no such host'" in fails(index, "--host", "no such host")
    assert f"error: there is no index at {tmp_path / 'idnex'}" in fails(tmp_path / "idnex", "--port", 0)
    assert "error: there is no folder of images" in fails(index, "--port", 0, "--images", tmp_path / "imgaes")
    assert "error: --max-k is 0, expected an integer of 1 to 1,000" in fails(index, "--max-k", 0)
    assert "error: --max-query is 10000" in fails(index, "--max-query", 10000)
    assert "error: --rate is -1" in fails(index, "--rate", -1)
    assert "70000 is not in the range" in fails(index, "--port", 70000)


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_without_the_extra(index, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert 'pip install "st-kdmcse[serve]"' in fails(index, "--port", 0)


def test_a_warning_where_others_can_connect(index, monkeypatch):
    asked = []

    def interrupted(app, listener):
        asked.append(listener.getsockname()[1])
        raise KeyboardInterrupt

    monkeypatch.setattr("st_kdmcse.cli.serve.serve_app", interrupted)
    everywhere = run(index, "--host", "0.0.0.0", "--port", 0)
    assert everywhere.stdout == f"5 texts at http://0.0.0.0:{asked[0]} (Ctrl-C ends)\n"
    assert "warning: other machines can reach 0.0.0.0, without a password and unencrypted" in everywhere.stderr
    assert (everywhere.exit_code, everywhere.stderr.splitlines()[-1]) == (130, "stopped")
    here = run(index, "--host", "localhost", "--port", 0)
    assert here.stdout == f"5 texts at http://localhost:{asked[1]} (Ctrl-C ends)\n"
    assert "warning" not in here.stderr
