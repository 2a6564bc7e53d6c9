"""Every reader, with files that were changed at random: the documented error, or a result; within a gigabyte."""

import gzip
import io
import json
import multiprocessing
import resource
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from st_kdmcse import FeatureStore
from st_kdmcse.data import import_released_json, iter_sentences, open_captions
from st_kdmcse.data.cxc import load_cxc, load_sits
from st_kdmcse.data.exclusion import read_left_out
from st_kdmcse.data.tokens import TokenTable
from st_kdmcse.extraction.parts import Part, PartsFolder
from st_kdmcse.files import manifest_checksum

hypothesis = pytest.importorskip("hypothesis")
st = hypothesis.strategies

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is capped by what only Linux counts")

EXAMPLES = 30
GIGABYTE = 1 << 30
TOKENS = [
    *(b"[", b"]", b"{", b"}", b'"', b"\\", b",", b"\t", b"|", b"#", b"\n", b"\r", b"\0", b"\xff", b"\xed\xa0\x80"),
    *(b"null", b"-1", b"1e999", b"9" * 30, b"[" * 5_000, b'{"a":' * 5_000, b"9" * 5_000, b"../", b"\xff\xff\xff\x7f"),
]

COCO = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [{"id": 7, "image_id": 1, "caption": "one"}, {"id": 8, "image_id": 2, "caption": "two"}],
}
KARPATHY = {"images": [{"filename": "a.jpg", "split": "train", "sentences": [{"raw": "one"}, {"raw": "two"}]}]}
RELEASED = {"a.jpg": {"image_feat": [0.5, 1.0], "captions": ["one"], "lang_feat": [[1.0, 0.5]]}}
ROWS = [{"image": f"{number}.jpg", "caption": ["one", f"two {number}"]} for number in range(5)]
CSV = 'image,caption,split\na.jpg,one,train\nb.jpg,"two, ""three""",val\nc.jpg,"[""four""]",val\n'


def parquet(rows):
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def tar():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as shard:
        for name, content in (("0.jpg", b"x"), ("0.json", b'{"caption": "one"}'), ("1.jpg", b"x"), ("1.txt", b"two")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    return file.getvalue()


CAPTIONS = {
    "f.token": b"a.jpg#0\tone\na.jpg#1\ttwo\nb.jpg#0\tthree\n",
    "results.csv": b"image_name| comment_number| comment\na.jpg| 0| one\nb.jpg| 0| two\n",
    "captions.txt": b'image,caption\na.jpg,one\nb.jpg,"two, three"\n',
    "coco.json": json.dumps(COCO).encode(),
    "karpathy.json": json.dumps(KARPATHY).encode(),
    "table.csv": CSV.encode(),
    "table.tsv": CSV.replace(",", "\t").encode(),
    "table.json": json.dumps(ROWS).encode(),
    "table.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "table.parquet": parquet(ROWS),
    "shard.tar": tar(),
}
SENTENCES = {
    "text.txt": b"one\ntwo\r\nthree\n",
    "text.gz": gzip.compress(b"one\ntwo\nthree\n" * 20, mtime=0),
    "text.csv": b'id,text\n1,one\n2,"two, three"\n',
    "text.tsv": b"id\ttext\n1\tone\n2\ttwo\n",
    "text.json": b'[{"text": "one"}, {"text": "two"}]',
    "text.jsonl": b'{"text": "one"}\n{"text": "two"}\n',
    "text.parquet": parquet([{"text": "one"}, {"text": "two"}]),
}


@st.composite
def changes(draw):
    """Where in a file to change what: bits, cuts, and what parsers trip over."""
    count = draw(st.integers(1, 3))
    what = st.sampled_from(["flip", "insert", "overwrite", "cut", "remove", "repeat"])
    return [
        (draw(what), draw(st.floats(0, 1)), draw(st.integers(0, 255)), draw(st.sampled_from(TOKENS)))
        for _ in range(count)
    ]


def changed(content, edits):
    content = bytearray(content)
    for what, where, number, token in edits:
        at = int(where * len(content))
        if what == "flip" and at < len(content):
            content[at] ^= 1 << number % 8
        elif what == "insert":
            content[at:at] = token
        elif what == "overwrite":
            content[at : at + len(token)] = token
        elif what == "cut":
            del content[at:]
        elif what == "remove":
            del content[at : at + number]
        elif what == "repeat":
            content[at:at] = content[at : at + number]
    return bytes(content)


def in_a_gigabyte(function):
    """Run a function in a process of its own that gets no more memory than that."""

    def child():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + GIGABYTE
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        function()  # multiprocessing prints the traceback, and exits with 1

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0, "the traceback is among the captured output, unless the process died"


def check(folder, name, content, read):
    """Change a file again and again: reading it gives a result, or an error that names it or its folder."""

    @hypothesis.settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
    @hypothesis.given(edits=changes())
    def examples(edits):
        (folder / name).write_bytes(changed(content, edits))
        try:
            read(folder / name)
        except (ValueError, FileNotFoundError) as error:
            if name not in str(error) and str(folder) not in str(error):
                raise AssertionError("the message names no file") from error

    in_a_gigabyte(examples)


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions(tmp_path, name):
    def read(path):
        reader = open_captions(path, images=None if name == "shard.tar" else tmp_path, on_error="skip")
        for record in reader.records(check_files=False):
            assert record.image_id
            assert all(isinstance(caption, str) and caption.strip() for caption in record.captions)

    check(tmp_path, name, CAPTIONS[name], read)


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences(tmp_path, name):
    def read(path):
        assert all(sentence == sentence.strip() != "" for sentence in iter_sentences(path))

    check(tmp_path, name, SENTENCES[name], read)


@pytest.fixture
def store(tmp_path):
    features = np.eye(6, 4, dtype=np.float32) + 1
    captions, ids = [f"caption {row}" for row in range(6)], ["0.jpg", "1.jpg", "2.jpg"]
    return FeatureStore.from_arrays(tmp_path / "store", features[:3], features, captions, [0, 0, 1, 1, 2, 2], ids, "t")


def use(folder):
    store = FeatureStore.open(folder)
    assert all(isinstance(text, str) for row in store.captions() for text in row)
    store.gather(range(len(store)))
    store.dataset()[:]
    store.verify()


@pytest.mark.parametrize("name", ["captions.arrow", "captions.csv", "image_features.npy", "text_features.npy"])
@pytest.mark.parametrize("manifest", [True, False])
def test_stores(store, name, manifest):
    if name == "captions.csv":
        store.to_frame().to_csv(store.path / name, index=False)
        (store.path / "captions.arrow").unlink()
    if name == "captions.csv" or not manifest:
        (store.path / "manifest.json").unlink()

    def read(path):
        try:
            use(path.parent)
        except UnicodeDecodeError:  # a caption that is not UTF-8, before verify() was asked
            assert name == "captions.arrow"

    check(store.path, name, (store.path / name).read_bytes(), read)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def test_forged_manifests(store):
    path = store.path / "manifest.json"
    whole = json.loads(path.read_text())

    @hypothesis.settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True)
    @hypothesis.given(key=st.sampled_from(sorted(whole)), value=VALUES, deep=st.booleans())
    def examples(key, value, deep):
        forged = json.loads(json.dumps(whole))
        if deep and key == "files":
            forged["files"]["captions.arrow"]["bytes"] = value
        else:
            forged[key] = value
        forged["checksum"] = manifest_checksum(forged)
        path.write_text(json.dumps(forged))
        try:
            use(store.path)
        except (ValueError, FileNotFoundError) as error:
            if str(store.path) not in str(error):
                raise AssertionError("the message names no file") from error

    in_a_gigabyte(examples)
    check(store.path, "manifest.json", json.dumps(whole).encode(), lambda path: use(path.parent))


def test_released_features(tmp_path):
    def read(path):
        target = tmp_path / "out" / str(len(list(tmp_path.glob("out/*"))))
        import_released_json(path, target)

    (tmp_path / "in").mkdir()
    check(tmp_path / "in", "features.json", json.dumps(RELEASED).encode(), read)


def test_parts(tmp_path):
    parts = PartsFolder(tmp_path)
    features = np.ones((2, 3), np.float16)
    parts.write(0, Part("d", ["a", "b"], features, [["one"], ["two"]], features))
    name = "part-0000000.arrow"

    def read(_):
        header = parts.intact_header(0)
        part = None if header is None else parts.read(0)
        assert part is None or (part.image_features == features).all()

    check(tmp_path, name, (tmp_path / name).read_bytes(), read)


def test_lists_of_images_and_caption_pairs(tmp_path, store):
    check(tmp_path, "list.csv", b"image,why\n0.jpg,x\n", lambda path: read_left_out(path, store))
    pairs = b"image,caption1,caption2,agg_score,sampling_method\n"
    rows = b"x,COCO_val2014:sentid:7,COCO_val2014:sentid:8,3.5,c2c_cocosim\n"
    (tmp_path / "captions.json").write_text(json.dumps(COCO))
    check(tmp_path, "sts_val.csv", pairs + rows, lambda path: load_cxc(path, tmp_path / "captions.json"))
    pairs, rows = b"caption,image,agg_score,sampling_method\n", b"x:sentid:7,x.jpg,3.5,y\nx:sentid:8,z.jpg,3,y\n"
    check(tmp_path, "sits_val.csv", pairs + rows, lambda path: load_sits(path, tmp_path / "captions.json"))


@pytest.mark.parametrize("name", ["manifest.json", "offsets.bin", "tokens.bin"])
def test_tokens(tmp_path, name):
    manifest = {"dtype": "uint16", "tokens": 3, "sentences": 2, "sha256": {}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "offsets.bin").write_bytes(np.array([0, 1, 3]).tobytes())
    (tmp_path / "tokens.bin").write_bytes(np.array([5, 6, 7], np.uint16).tobytes())
    check(tmp_path, name, (tmp_path / name).read_bytes(), lambda _: TokenTable(tmp_path).verify())
