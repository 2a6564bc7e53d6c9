"""What is left where a disk is full: a real one, of a few kilobytes."""

import os
import subprocess
from contextlib import contextmanager

import numpy as np
import pytest
from click.testing import CliRunner

from st_kdmcse.cli.main import main
from st_kdmcse.search import SemanticIndex, TextRecord, build_index
from st_kdmcse.search.base import NewRows


@pytest.fixture
def disk(tmp_path):
    """A folder on a file system of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False
    ).returncode
    if made != 0:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def free(disk):
    status = os.statvfs(disk)
    return status.f_bavail * status.f_frsize


@contextmanager
def with_left(disk, size):
    """As many bytes are left on the disk."""
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(free(disk) - size))
    yield
    ballast.unlink()


def rows(start, stop):
    ids = [str(row) for row in range(start, stop)]
    vectors = np.random.default_rng(start).normal(size=(stop - start, 32))
    return NewRows.checked(ids, [f"text {each}" for each in ids], vectors)


def index_of(student, count):
    new = rows(0, count)
    return SemanticIndex.from_embeddings(student, new.embeddings, new.texts, ids=new.ids)


@pytest.mark.parametrize("size", [0, 4096, 120_000, 330_000])
def test_a_save_leaves_the_index_as_it_was_and_nothing_else(disk, student, size):
    index_of(student, 1000).save(disk / "index")
    index = SemanticIndex.load(disk / "index", student)
    index.backend.add(rows(1000, 2000))
    before = free(disk)
    with with_left(disk, size), pytest.raises(OSError, match=f"{disk / 'index'}/.* could not be written .*free space"):
        index.save()
    assert free(disk) == before
    assert len(SemanticIndex.load(disk / "index", student)) == 1000
    index.save()
    assert len(SemanticIndex.load(disk / "index", student)) == 2000


@pytest.mark.parametrize("size", [4096, 60_000, 120_000])
def test_a_first_save_leaves_nothing_that_fills_the_disk(disk, student, size):
    index = index_of(student, 1000)
    (disk / "index").mkdir()
    before = free(disk)
    with with_left(disk, size), pytest.raises(OSError, match=r"could not be written .*free space"):
        index.save(disk / "index")
    assert before - free(disk) <= 4096, "the lock alone"
    index.save(disk / "index")
    assert len(SemanticIndex.load(disk / "index", student)) == 1000


@pytest.mark.parametrize("size", [16_384, 60_000, 100_000])
def test_a_build_goes_on_when_there_is_space(disk, student, sentences, size):
    records = [TextRecord(f"r{row}", text, {"row": row}) for row, text in enumerate(sentences)]

    def build():
        return build_index(lambda: records, student, None, disk / "index", source={"of": "test"}, block_rows=32)

    with with_left(disk, size), pytest.raises(OSError, match=r"could not be written .*(what was encoded is kept|free)"):
        build()
    assert not list((disk / "index").glob("data-*"))
    assert [hit.text for hit in build().get([record.id for record in records])] == sentences
    assert not (disk / "index.parts").exists()


def test_a_command_says_it_in_one_line(disk, tiny_bert, sentences, tmp_path):
    (tmp_path / "texts.txt").write_text("\n".join(sentences))
    arguments = ["index", "build", tmp_path / "texts.txt", "--model", tiny_bert, "--out", disk / "index"]
    with with_left(disk, 16_384):
        result = CliRunner().invoke(main, list(map(str, arguments)))
    assert (result.exit_code, "Traceback" in result.output) == (2, False), result.output
    assert f"error: {disk / 'index.parts'} could not be written (" in result.stderr
    assert CliRunner().invoke(main, list(map(str, arguments))).exit_code == 0
