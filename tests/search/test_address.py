import pytest

from st_kdmcse.search.address import MilvusAddress, MilvusOptions, open_backend, parse_address
from st_kdmcse.search.base import NewRows
from st_kdmcse.search.storage import write_index

ADDRESSES = [
    ("milvus://localhost/wiki", "http://localhost:19530", "wiki"),
    ("milvus://10.0.0.7:20000/wiki", "http://10.0.0.7:20000", "wiki"),
    ("milvus://[::1]:20000/wiki", "http://[::1]:20000", "wiki"),
    ("milvus+https://db.example.org/wiki", "https://db.example.org:443", "wiki"),
    ("milvus+https://db.example.org:19530/wiki", "https://db.example.org:19530", "wiki"),
    ("milvus:///data/index.db?collection=wiki", "/data/index.db", "wiki"),
    ("milvus:///data/my%20index%3F.db?collection=wiki", "/data/my index?.db", "wiki"),
    ("milvus:index.db?collection=wiki", "index.db", "wiki"),
    ("milvus:sub/index.db?collection=wiki", "sub/index.db", "wiki"),
]


@pytest.mark.parametrize(("address", "uri", "collection"), ADDRESSES)
def test_addresses_of_milvus(address, uri, collection):
    parsed = parse_address(address)
    assert parsed == MilvusAddress(uri, collection)
    assert parse_address(str(parsed)) == parsed


def test_options_of_a_server():
    address = "milvus://db/wiki?index=IVF_PQ&consistency=Session&index.nlist=8&index.m=4&search.nprobe=3&search.x=a%26b"
    parsed = parse_address(address)
    assert parsed.options == MilvusOptions("IVF_PQ", (("nlist", 8), ("m", 4)), (("nprobe", 3), ("x", "a&b")), "Session")
    assert parse_address(str(parsed)) == parsed
    assert str(parse_address("milvus://db/wiki?index=HNSW")) == "milvus://db:19530/wiki?index=HNSW"


@pytest.mark.parametrize("directory", ["wiki", "./a b", "/data/index", "milvus", "milvus/wiki", "C:/index"])
def test_everything_else_is_a_directory(tmp_path, directory):
    assert str(parse_address(directory)) == directory.removeprefix("./")
    assert parse_address(tmp_path) == tmp_path


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("", "empty"),
        ("http://localhost/wiki", "http:// is not an address"),
        ("Milvus://localhost/wiki", "Milvus:// is not an address"),
        ("milvus://localhost", "one collection"),
        ("milvus://localhost/", "one collection"),
        ("milvus://localhost/a/b", "one collection"),
        ("milvus://localhost/wiki?collection=other", "one collection"),
        ("milvus://localhost:port/wiki", "port"),
        ("milvus://localhost:99999/wiki", "port"),
        ("milvus://:19530/wiki", "no host"),
        ("milvus://index.db?collection=wiki", "three slashes"),
        ("milvus://data/index.db?collection=wiki", "three slashes"),
        ("milvus:///data/index.db", "which collection"),
        ("milvus:///data/index.db?collection=", "which collection"),
        ("milvus:///data/index.db?collection=a&collection=b", "which collection"),
        ("milvus:///data/index.db?colection=a", "unknown option 'colection'"),
        ("milvus:///data/index.db?collection=a&index=HNSW", "unknown option 'index'.*of a server"),
        ("milvus://localhost/wiki?indx=HNSW", "unknown option 'indx': there are index=TYPE, index.NAME=VALUE"),
        ("milvus://localhost/wiki?search.=1", "unknown option 'search.'"),
        ("milvus://localhost/wiki?index=HNSW&index=FLAT", "index takes one value"),
        ("milvus://localhost/wiki?consistency=strong", "expected one of Strong, Session, Bounded, Eventually"),
        ("milvus:///data/index?collection=a", "ends in .db"),
        ("milvus+https:///data/index.db?collection=a", "expected"),
        ("milvus:///data/in#dex.db?collection=a", "%23"),
        ("milvus:", "expected"),
    ],
)
def test_what_is_wrong_with_an_address(address, message):
    with pytest.raises(ValueError, match=message):
        parse_address(address)


def test_a_password_in_an_address_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="MILVUS_TOKEN") as raised:
        parse_address("milvus://root:hunter2@localhost/wiki")
    assert "hunter2" not in str(raised.value)


def test_opening_a_server_that_is_not_there_says_so(monkeypatch):
    pytest.importorskip("pymilvus")
    monkeypatch.setenv("MILVUS_TOKEN", "hunter2")
    with pytest.raises(OSError, match="http://127.0.0.1:1: Fail connecting") as raised:
        open_backend("milvus://127.0.0.1:1/wiki")
    assert "hunter2" not in str(raised.value)


def test_opening_a_file_or_a_collection_that_is_not_there(tmp_path):
    pytest.importorskip("milvus_lite")
    address = f"milvus://{tmp_path}/sub/index.db?collection=wiki"
    with pytest.raises(FileNotFoundError, match="index.db"):
        open_backend(address)
    assert not (tmp_path / "sub").exists()
    with pytest.raises(ValueError, match="dim=None"):
        open_backend(address, create=True)
    made = open_backend(address, dim=3, create=True)
    assert (made.dim, len(made)) == (3, 0)
    with pytest.raises(FileNotFoundError, match="no collection other"):
        open_backend(address.replace("wiki", "other"))
    with pytest.raises(ValueError, match="width 3, not 4"):
        open_backend(address, dim=4)
    assert open_backend(address).dim == 3


def test_opening_a_directory(tmp_path):
    pytest.importorskip("faiss")
    address = str(tmp_path / "index")
    with pytest.raises(FileNotFoundError, match="no index at"):
        open_backend(address)
    with pytest.raises(ValueError, match="dim=None"):
        open_backend(address, create=True)
    made = open_backend(address, dim=3, create=True)
    made.add(NewRows.checked(["a"], ["x"], [[1, 2, 2]]))
    model = {"name": None, "parameters_sha256": "0", "dimension": 3}
    write_index(tmp_path / "index", made, {"model": model, "probe": {"text": "x", "embedding": [0.0, 0.6, 0.8]}})
    with pytest.raises(ValueError, match="width 3, not 4"):
        open_backend(address, dim=4)
    assert open_backend(address, dim=3, create=True).get(["a"])[0].text == "x"
