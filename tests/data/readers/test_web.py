import gzip
import io
import json
import os
import re
import tarfile
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from st_kdmcse.data.images import load_image
from st_kdmcse.data.readers import BadRowError, WebDataset, open_captions


def pack(path, files, layout=tarfile.PAX_FORMAT):
    """A tar of (name, content) pairs; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=layout) as tar:
        for name, content in files:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


@pytest.fixture(scope="session")
def sample(jpeg):
    """The files of a sample, as img2dataset writes them."""

    def files(key, number=0, caption=None, **metadata):
        text = f"caption of {key}" if caption is None else caption
        values = {"caption": text, "key": key, "status": "success", **metadata}
        return [(f"{key}.jpg", jpeg(number)), (f"{key}.json", json.dumps(values)), (f"{key}.txt", text)]

    return files


def test_samples(tmp_path, sample, jpeg, read):
    shard = pack(tmp_path / "00000.tar", [file for number in range(5) for file in sample(f"{number:09}", number)])
    reader = WebDataset(shard)
    records = list(reader)
    assert [record.image_id for record in records] == [f"00000/{number:09}" for number in range(5)]
    assert [record.captions for record in records] == [(f"caption of {number:09}",) for number in range(5)]
    assert reader.streaming
    assert reader.num_images is None
    for number, record in enumerate(records):
        content = shard.read_bytes()[record.image.offset : record.image.offset + record.image.size]
        assert content == jpeg(number)
        assert (record.image.path, record.image.name) == (shard, f"{number:09}.jpg")
        assert load_image(record.image).size == (8, 6)
    assert not reader.problems.counts


@pytest.mark.parametrize("layout", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_in_a_tar(tmp_path, jpeg, read, layout):
    long = "folder/" * 20 + "a" * 30 if layout != tarfile.USTAR_FORMAT else "folder/a"
    files = [
        *((f"./x/{name}", content) for name, content in (("1.JPG", jpeg(1)), ("1.Txt", "one"))),
        ("y/1.jpeg", jpeg(2)),
        ("y/1.seg.png", jpeg(2)),
        ("y/1.txt", "two"),
        ("y/._1.jpg", b"resource"),
        ("README", "no sample"),
        (f"{long}.webp", jpeg(3)),
        (f"{long}.txt", "three"),
    ]
    found, problems = read(WebDataset(pack(tmp_path / "s.tar", files, layout)))
    assert (found, problems) == ({"s/x/1": ["one"], "s/y/1": ["two"], f"s/{long}": ["three"]}, [])


@pytest.mark.parametrize(
    ("key", "files", "expected"),
    [
        ("auto", {"txt": "from txt", "json": '{"caption": "from json"}'}, ["from txt"]),
        ("auto", {"json": '{"caption": "from json"}'}, ["from json"]),
        ("auto", {"json": '{"caption": ["one", "two"]}'}, ["one", "two"]),
        ("alt", {"txt": "from txt", "json": '{"caption": "x", "alt": " Ein Hündchen "}'}, [" Ein Hündchen "]),
        ("auto", {"txt": "  two\nlines \n"}, ["  two\nlines "]),
        ("auto", {"txt": "one\r\n"}, ["one"]),
        ("auto", {"txt": "\ufeffone\n\n"}, ["one\n"]),
        ("auto", {"txt": "犬"}, ["犬"]),
    ],
)
def test_captions(tmp_path, jpeg, read, key, files, expected):
    shard = pack(tmp_path / "s.tar", [("1.jpg", jpeg()), *((f"1.{suffix}", text) for suffix, text in files.items())])
    assert read(WebDataset(shard, caption_key=key)) == ({"s/1": expected}, [])


@pytest.mark.parametrize(
    ("files", "kind", "message"),
    [
        ({"jpg": b"x"}, "no caption", r"no .txt or .json among its files \(.jpg\)"),
        ({"txt": "x"}, "no image file", r"no image among its files \(.txt\)"),
        ({"jpg": b"x", "png": b"x", "txt": "x"}, "several images", "several images among its files"),
        ({"jpg": b"x", "txt": b"caf\xe9"}, "encoding", "the .txt is not UTF-8"),
        ({"jpg": b"x", "txt": b"a\0"}, "encoding", "NUL"),
        ({"jpg": b"x", "txt": " \n"}, "no caption", "the caption is empty"),
        ({"jpg": b"x", "json": "{"}, "no caption", "the .json is not valid JSON"),
        ({"jpg": b"x", "json": b'"\xff"'}, "no caption", "the .json is not valid JSON"),
        ({"jpg": b"x", "json": '{"alt": "x", "url": "y"}'}, "no caption", "no 'caption'; its keys: alt, url"),
        ({"jpg": b"x", "json": '{"caption": null}'}, "no caption", "the caption is None"),
        ({"jpg": b"x", "json": '{"caption": []}'}, "no caption", "the .json has no 'caption'"),
        ({"jpg": b"x", "json": '["caption"]'}, "no caption", "its keys: none"),
        ({"jpg": b"x", "json": '{"caption": "\\ud800"}'}, "encoding", "not Unicode"),
        ({"jpg": b"", "txt": "x"}, "empty image file", "has 0 bytes"),
    ],
)
def test_a_bad_sample_is_named_and_shifts_nothing(tmp_path, sample, read, files, kind, message):
    bad = [(f"2.{suffix}", content) for suffix, content in files.items()]
    shard = pack(tmp_path / "00007.tar", [*sample("1"), *bad, *sample("3")])
    found, problems = read(WebDataset(shard, on_error="skip"))
    assert found == {"00007/1": ["caption of 1"], "00007/3": ["caption of 3"]}
    assert [problem[:2] for problem in problems] == [(kind, f"{shard}, sample '00007/2'")]
    with pytest.raises(BadRowError, match=re.escape(f"{shard}, sample '00007/2': ") + f".*{message}"):
        list(WebDataset(shard))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_files_in_any_order_are_never_paired_wrongly(tmp_path_factory, jpeg, data):
    keys = "abcd"
    files = [(f"{key}.jpg", jpeg(number)) for number, key in enumerate(keys)] + [(f"{k}.txt", k) for k in keys]
    shard = pack(tmp_path_factory.mktemp("web") / "s.tar", data.draw(st.permutations(files)))
    reader = WebDataset(shard, on_error="skip")
    try:
        records = list(reader)
    except ValueError:  # no pair stands together
        records = []
    for record in records:
        key = record.image_id.removeprefix("s/")
        assert record.captions == (key,)
        assert load_image(record.image).tobytes() == load_image(jpeg(keys.index(key))).tobytes()
    # Each of the others is reported twice: once for its image, once for its caption.
    assert reader.problems.counts.total() == 2 * (len(keys) - len(records))


def test_a_sample_that_comes_twice(tmp_path, sample, read):
    shard = pack(tmp_path / "s.tar", [*sample("1", caption="first"), *sample("1", caption="second"), *sample("2")])
    found, problems = read(WebDataset(shard, on_error="skip"))
    assert found == {"s/1": ["first"], "s/2": ["caption of 2"]}
    assert [problem[:2] for problem in problems] == [("duplicate id", f"{shard}, sample 's/1'")]


def test_a_tar_cut_anywhere_gives_its_whole_samples(tmp_path, sample):
    files = [file for number in range(4) for file in sample(str(number), number)]
    whole = pack(tmp_path / "whole.tar", files).read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        ends = {member.name: member.offset_data + member.size for member in tar}
    cut = tmp_path / "cut.tar"
    end_of_archive = -(-max(ends.values()) // 512) * 512
    for length in [*range(1, end_of_archive + 512, 97), *ends.values(), *range(0, end_of_archive + 1, 512)]:
        cut.write_bytes(whole[:length])
        # An image with its .json is whole: that holds the caption as well.
        expected = [f"cut/{number}" for number in range(4) if ends[f"{number}.json"] <= length]
        reader = WebDataset(cut, on_error="skip")
        records = []
        if expected:
            records = list(reader)
        else:
            with pytest.raises(ValueError, match="no image with captions .*cut.tar: not a whole, uncompressed tar"):
                list(reader)
        assert [record.image_id for record in records] == expected, length
        assert all(record.captions == (f"caption of {record.image_id[4:]}",) for record in records)
        assert [load_image(record.image).size for record in records] == [(8, 6)] * len(records)
        assert reader.problems.counts == {"broken shard": 1}
        with pytest.raises(BadRowError, match="cut.tar: not a whole, uncompressed tar: .*download it again"):
            list(WebDataset(cut))
    cut.write_bytes(whole[: end_of_archive + 512])  # one block of the end mark is enough
    assert len(list(WebDataset(cut))) == 4


def test_a_broken_shard_leaves_the_others(tmp_path, sample):
    pack(tmp_path / "0.tar", sample("a"))
    middle = bytearray(pack(tmp_path / "1.tar", [*sample("b"), *sample("c")]).read_bytes())
    start = middle.index(b"c.jpg")
    middle[start : start + 512] = b"\x07" * 512  # a header
    (tmp_path / "1.tar").write_bytes(middle)
    (tmp_path / "2.tar").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    (tmp_path / "3.tar").write_bytes(b"")
    pack(tmp_path / "4.tar", sample("d"))
    reader = WebDataset(tmp_path, on_error="skip")
    assert [record.image_id for record in reader] == ["0/a", "1/b", "4/d"]
    assert [(problem.kind, problem.where) for problem in reader.problems.listed] == [
        ("broken shard", str(tmp_path / name)) for name in ("1.tar", "2.tar", "3.tar")
    ]
    assert "after 'b'" in reader.problems.listed[0].message
    assert "decompress it" in reader.problems.listed[1].message


def test_links_are_no_images(tmp_path, jpeg, sample):
    shard = tmp_path / "s.tar"
    with tarfile.open(pack(shard, sample("1")), "a") as tar:
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = tarfile.LNKTYPE, "1.jpg"
        tar.addfile(link)
        text = tarfile.TarInfo("2.txt")
        text.size = 3
        tar.addfile(text, io.BytesIO(b"two"))
    reader = WebDataset(shard, on_error="skip")
    assert [record.image_id for record in reader] == ["s/1"]
    assert reader.problems.counts == {"no image file": 1}


def test_ways_to_give_shards(tmp_path, sample):
    for number in range(8, 13):
        pack(tmp_path / f"{number:05}.tar", sample("1"))
    everything = [f"{number:05}/1" for number in range(8, 13)]

    def ids(shards):
        return [record.image_id for record in WebDataset(shards)]

    assert ids(tmp_path) == ids(str(tmp_path)) == ids(f"{tmp_path}/{{00008..00012}}.tar") == everything
    assert ids(f"{tmp_path}/*.tar") == everything
    assert ids(f"{tmp_path}/0000*.tar") == everything[:2]
    assert ids(tmp_path / "{00008..00012}.tar") == everything
    assert ids([tmp_path / "00009.tar", f"{tmp_path}/{{00011..00012}}.tar"]) == [
        everything[position] for position in (1, 3, 4)
    ]
    assert ids(f"{tmp_path}/000{{0..0}}{{9..9}}.tar") == [everything[1]]


def test_shards_of_one_name_in_several_folders(tmp_path, sample):
    first = pack(tmp_path / "x" / "a" / "00000.tar", sample("1", caption="one"))
    second = pack(tmp_path / "x" / "b" / "00000.tar", sample("1", caption="two"))
    records = list(WebDataset([first, second]))
    assert {record.image_id: record.captions for record in records} == {
        "a/00000/1": ("one",),
        "b/00000/1": ("two",),
    }


def test_the_same_key_in_two_shards(tmp_path, sample, jpeg):
    for number in range(2):
        pack(tmp_path / f"{number}.tar", sample("1", number, caption=f"caption {number}"))
    records = {record.image_id: record for record in WebDataset(tmp_path)}
    assert {key: record.captions for key, record in records.items()} == {"0/1": ("caption 0",), "1/1": ("caption 1",)}
    for number in range(2):
        assert load_image(records[f"{number}/1"].image).tobytes() == load_image(jpeg(number)).tobytes()


def test_wrong_shards(tmp_path, sample):
    shard = pack(tmp_path / "full" / "0.tar", sample("1"))
    (tmp_path / "empty").mkdir()
    for shards, message in (
        (tmp_path / "no.tar", "there is no shard .*no.tar; 1 of 1 shards are missing"),
        (f"{tmp_path}/full/{{0..3}}.tar", "there is no shard .*1.tar; 3 of 4 shards are missing"),
        (tmp_path / "empty", "there is no .tar in the folder .*empty"),
    ):
        with pytest.raises(FileNotFoundError, match=message):
            WebDataset(shards)
    for shards, message in (
        ([], "no shards are given"),
        ([shard, str(shard)], "the shard .*0.tar is given twice"),
        (f"{tmp_path}/{{3..1}}.tar", "stands for no shard"),
    ):
        with pytest.raises(ValueError, match=message):
            WebDataset(shards)


def test_a_subset_over_shards(tmp_path, sample):
    for shard in range(3):
        pack(tmp_path / f"{shard}.tar", [file for number in range(20) for file in sample(str(number))])
    reader = WebDataset(tmp_path, limit=17, seed=3)
    ids = [record.image_id for record in reader]
    assert len(set(ids)) == 17
    assert {image_id[0] for image_id in ids} == set("012")


def test_memory_does_not_grow_with_the_shard(tmp_path):
    def peak(count):
        files = [
            (f"{n:06}.{suffix}", content) for n in range(count) for suffix, content in (("jpg", "x"), ("txt", "c"))
        ]
        shard = pack(tmp_path / f"{count}.tar", files)
        tracemalloc.start()
        assert sum(1 for _ in WebDataset(shard)) == count
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(50)
    assert peak(4_000) < peak(400) + 200_000


def test_folders_of_img2dataset(tmp_path, write, jpeg, read):
    for shard in ("00000", "00001"):
        for key in range(2):
            write(f"cc/{shard}/{shard}000{key}.jpg", jpeg(key))
            write(f"cc/{shard}/{shard}000{key}.txt", f"caption {shard} {key}\n")
            write(f"cc/{shard}/{shard}000{key}.json", json.dumps({"caption": "not this", "alts": ["one", "two"]}))
        pq.write_table(pa.table({"url": ["x"], "caption": ["y"]}), tmp_path / "cc" / f"{shard}.parquet")
    reader = open_captions(tmp_path / "cc")
    assert type(reader) is WebDataset
    found, problems = read(reader)
    assert found == {f"{s}/{s}000{k}": [f"caption {s} {k}"] for s in ("00000", "00001") for k in range(2)}
    assert problems == []
    assert next(iter(reader)).image == tmp_path / "cc/00000/000000000.jpg"
    assert list(read(open_captions(tmp_path / "cc/00001", caption_column="alts"))[0].values()) == [["one", "two"]] * 2
    os.mkfifo(tmp_path / "cc/00000/000000002.txt")
    write("cc/00000/000000002.jpg", jpeg())
    _, ((kind, _, message),) = read(open_captions(tmp_path / "cc", on_error="skip"))
    assert (kind, message[:26]) == ("no caption", "the .txt is no regular fil")


def test_a_deeply_nested_json_costs_its_sample(tmp_path, jpeg, read):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in (
            ("0.jpg", jpeg()),
            ("0.json", b'{"caption": ' + b"[" * 100_000),
            ("1.jpg", jpeg()),
            ("1.json", b'{"caption": "[\\"one\\", \\"two\\"]", "n": 1}'),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    found, ((kind, _, message),) = read(WebDataset(path, on_error="skip"))
    assert (found, kind) == ({"a/1": ["one", "two"]}, "no caption")
    assert "nested more than" in message
