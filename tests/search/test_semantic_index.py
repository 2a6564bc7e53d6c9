"""Tests of st_kdmcse.search.semantic_index, .storage and .encoding."""

import json
import operator
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import copy_tree

from st_kdmcse import build_student
from st_kdmcse.files import locked, manifest_checksum, sha256_file
from st_kdmcse.search import SemanticIndex, UnknownIdError, storage
from st_kdmcse.search.storage import read_manifest

WORKER = Path(__file__).with_name("killed_index_worker.py")


@pytest.fixture
def index(student, sentences):
    return SemanticIndex.build(student, sentences[:60], metadata=[{"row": row} for row in range(60)])


@pytest.fixture
def saved(index, tmp_path):
    index.save(tmp_path / "index")
    return tmp_path / "index"


def alter_manifest(path, **changes):
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8")) | changes
    manifest["checksum"] = manifest_checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_search_is_cosine_of_the_models_embeddings(index, student, sentences):
    texts, queries = sentences[:60], sentences[100:108]
    scores = student.encode(queries, normalize_embeddings=True) @ student.encode(texts, normalize_embeddings=True).T
    found = index.search(queries, k=5)
    for hits, row in zip(found, scores, strict=True):
        order = np.argsort(-row)[:5]
        assert [hit.score for hit in hits] == pytest.approx(row[order].tolist(), abs=1e-5)
        assert all(hit.text == texts[int(hit.id)] and hit.metadata == {"row": int(hit.id)} for hit in hits)
    assert index.search(queries[0], k=5) == found[0]
    assert index.search([]) == []
    assert len(index.search(queries[0], k=1000)) == len(index) == 60
    assert {hit.id for hit in index.search(queries[0], k=9, where={"row": {"lt": 4}})} == {"0", "1", "2", "3"}


def test_from_embeddings_equals_build(index, student, sentences):
    embeddings = 3 * student.encode(sentences[:60], normalize_embeddings=False)
    other = SemanticIndex.from_embeddings(student, embeddings, sentences[:60])
    for mine, theirs in zip(other.search(sentences[90:95]), index.search(sentences[90:95]), strict=True):
        assert [hit.score for hit in mine] == pytest.approx([hit.score for hit in theirs], abs=1e-5)


def test_add_update_remove_get(index):
    new = index.add(["two dogs", "a red ball"])
    assert len(set(new)) == 2
    assert [hit.text for hit in index.get(new)] == ["two dogs", "a red ball"]
    assert index.add(["a man"], ids=["man"], metadata=[{"lang": "en"}]) == ["man"]
    index.update(["man", "0"], ["a woman", "a child"])
    assert [(hit.text, hit.metadata) for hit in index.get(["man", "0"])] == [("a woman", {}), ("a child", {})]
    assert index.search("a woman", k=1)[0].id == "man"
    index.remove(["man", "man"])
    assert len(index) == 62
    assert index.add([]) == []


def test_model_prompts_apply_to_queries_and_documents(tiny_bert, sentences):
    model = build_student(str(tiny_bert)).to("cpu")
    model.prompts = {"query": "dog ", "document": "snow "}
    index = SemanticIndex.build(model, sentences[:20])
    expected = (
        model.encode([f"dog {sentences[50]}"], normalize_embeddings=True)
        @ model.encode([f"snow {sentence}" for sentence in sentences[:20]], normalize_embeddings=True).T
    )
    assert index.search(sentences[50], k=1)[0].score == pytest.approx(float(expected.max()), abs=1e-5)


def test_unusable_input_is_refused(index, student):
    cases = [
        (lambda: index.search(""), "query 0 is ''"),
        (lambda: index.search(["a dog", "  "]), "query 1"),
        (lambda: index.search("a dog", k=0), "k is 0"),
        (lambda: index.search("a dog", k=2.5), "k is 2.5"),
        (lambda: index.add(["a dog", ""]), "row 1: the text is ''"),
        (lambda: index.add("a dog"), "one text: give a list"),
        (lambda: index.add(["a", "b"], ids=["x", "x"]), "row 1: the id 'x' is there twice"),
        (lambda: index.add(["a"], ids=["0"]), "'0' is there already"),
        (lambda: index.add(["a"], ids=["x", "y"]), "2 ids, 1 texts"),
        (lambda: index.add(["a"], ids="x"), "ids is one text"),
        (lambda: index.add(["a"], metadata=[{"a": [1]}]), "metadata 'a'"),
        (lambda: index.add(["a"], metadata=[None]), "the metadata are None"),
        (lambda: index.search("a dog \udcff"), "query 0 is not valid UTF-8 .at character 6."),
        (lambda: index.add(["a", "\ud800"]), "row 1: the text is not valid UTF-8"),
        (lambda: index.update(["0"], ["\ud800"]), "row 0: the text is not valid UTF-8"),
        (lambda: index.add(["a"], ids=["\ud800"]), "holds the control character"),
        (lambda: index.add(["a"], metadata=[{"a": "\ud800"}]), "holds the control character"),
        (lambda: SemanticIndex.from_embeddings(student, np.full((1, 32), np.nan), ["a"]), "zero or not finite"),
        (lambda: SemanticIndex.from_embeddings(student, np.ones((1, 5)), ["a"]), "width 5"),
        (lambda: SemanticIndex.build(student, ["a"], factory="nonsense"), "no index 'nonsense'"),
        (lambda: index.save(), "never saved"),
    ]
    for act, message in cases:
        with pytest.raises(ValueError, match=message):
            act()
    for act in (
        lambda: index.update(["nobody"], ["a"]),
        lambda: index.remove(["0", "nobody"]),
        lambda: index.get(["nobody"]),
    ):
        with pytest.raises(UnknownIdError, match="^there is no row with the id 'nobody'$"):
            act()
    assert len(index) == 60


def test_damaged_weights_are_refused(student, sentences):
    with torch.no_grad():
        next(student.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="is not finite"):
        SemanticIndex.build(student, sentences[:3])


def test_a_very_long_query_is_cut_off(index):
    assert len(index.search("dog " * 25_000, k=3)) == 3


def test_an_empty_index_can_be_saved_and_added_to(student, tmp_path):
    index = SemanticIndex.build(student, [], path=tmp_path / "index")
    assert index.search("a dog") == []
    index.add(["a dog"])
    index.save()
    assert SemanticIndex.load(tmp_path / "index", student).search("a dog")[0].text == "a dog"


@pytest.mark.parametrize("factory", [None, "HNSW16", "IVF4,SQ8"])
def test_save_and_load(student, sentences, tmp_path, factory):
    index = SemanticIndex.build(student, sentences, factory=factory, path=tmp_path / "index")
    loaded = SemanticIndex.load(tmp_path / "index", student)
    assert loaded.search(sentences[:5]) == index.search(sentences[:5])
    assert loaded.info() == index.info()
    assert (loaded.backend.tuning is None) == (factory is None)
    loaded.remove(["3"])
    loaded.save()
    again = SemanticIndex.load(tmp_path / "index", student)
    assert len(again) == len(sentences) - 1
    assert "3" not in {hit.id for hit in again.search(sentences[3], k=len(sentences))}
    assert sum(each.is_dir() for each in (tmp_path / "index").iterdir()) == 1


def test_the_model_that_the_manifest_names_is_loaded(tiny_bert, sentences, tmp_path):
    student = build_student(str(tiny_bert)).to("cpu")
    student.save_pretrained(str(tmp_path / "model"))
    SemanticIndex.build(str(tmp_path / "model"), sentences[:5], path=tmp_path / "index")
    assert SemanticIndex.load(tmp_path / "index").search(sentences[2], k=1)[0].id == "2"
    assert SemanticIndex.open(str(tmp_path / "index")).info()["model"]["name"] == str(tmp_path / "model")


def test_open_makes_an_index_where_there_is_none(student, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no index"):
        SemanticIndex.open(tmp_path / "index", student)
    with pytest.raises(ValueError, match="name the model"):
        SemanticIndex.open(tmp_path / "index", create=True)
    assert len(SemanticIndex.open(tmp_path / "index", student, create=True)) == 0
    assert len(SemanticIndex.open(tmp_path / "index", student, create=True)) == 0


@pytest.mark.parametrize("name", ["vectors.faiss", "rows.sqlite", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_files_are_named(saved, student, name, damage):
    file = next(saved.rglob(name))
    content = file.read_bytes()
    middle = len(content) // 2
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[:middle])
    else:
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(
        (ValueError, FileNotFoundError), match="no index" if (name, damage) == ("manifest.json", "missing") else name
    ):
        SemanticIndex.load(saved, student)


def test_manifests_that_lie_are_refused(saved, student):
    manifest = read_manifest(saved)
    for changes, message in [
        ({"version": 2}, "version 2"),
        ({"format": "other"}, "has the format"),
        ({"folder": "../../etc"}, "folder is '../../etc'"),
        ({"folder": ".."}, "folder is '..'"),
        ({"folder": str(saved)}, "folder is "),
        ({"folder": 1}, "folder is 1"),
        ({"files": {"vectors.faiss": {}}}, "files.vectors.faiss.bytes is missing"),
        ({"files": []}, r"files is \[\]"),
        ({"rows": 61}, "do not belong together"),
        ({"rows": "60"}, "rows is '60'"),
        ({"rows": True}, "rows is True"),
        ({"factory": None}, "factory is None"),
        ({"tuning": {}}, "tuning.parameter is missing"),
        ({"tuning": "good"}, "tuning is 'good'"),
        ({"images": "/"}, "images is '/'"),
        ({"model": {}}, "model.name is missing"),
        ({"model": manifest["model"] | {"name": 7}}, "model.name is 7"),
        ({"probe": None}, "probe is None"),
        ({"probe": manifest["probe"] | {"embedding": [1.0]}}, "probe.embedding has 1 numbers"),
        ({"probe": manifest["probe"] | {"embedding": ["a"] * 32}}, "probe.embedding is"),
        ({"probe": manifest["probe"] | {"embedding": [float("nan")] * 32}}, "embeds a probe sentence differently"),
    ]:
        alter_manifest(saved, **changes)
        with pytest.raises(ValueError, match=message):
            SemanticIndex.load(saved, student)
        alter_manifest(saved, **{"images": None, **manifest})
    assert len(SemanticIndex.load(saved, student)) == 60


@pytest.mark.parametrize("name", ["\0", "./" + "m" * 5000], ids=["NUL", "long"])
def test_a_manifest_that_names_an_impossible_model_is_refused(saved, name):
    alter_manifest(saved, model=read_manifest(saved)["model"] | {"name": name})
    with pytest.raises((ValueError, OSError)):
        SemanticIndex.load(saved)


def test_a_manifest_without_end_is_refused(saved, student):
    (saved / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="manifest.json is damaged"):
        SemanticIndex.load(saved, student)


def test_vectors_that_faiss_cannot_read_are_named(saved, student):
    folder = saved / read_manifest(saved)["folder"]
    (folder / "vectors.faiss").write_bytes(b"nothing of FAISS")
    known = {"bytes": 16, "sha256": sha256_file(folder / "vectors.faiss")}
    alter_manifest(saved, files=read_manifest(saved)["files"] | {"vectors.faiss": known})
    with pytest.raises(ValueError, match="FAISS cannot read .*vectors.faiss .*: build the index again"):
        SemanticIndex.load(saved, student)


@pytest.mark.parametrize("moment", ["sha256_file", "load_faiss", "RowTable.open"])
def test_a_reader_gets_the_new_index_when_another_process_saves_at_any_moment(saved, student, monkeypatch, moment):
    writer = SemanticIndex.load(saved, student)
    writer.add(["a dog"], ids=["new"])
    within, _, name = f"{storage.__name__}.{moment}".rpartition(".")
    original = operator.attrgetter(moment)(storage)

    def saves_before(*arguments):
        monkeypatch.undo()
        writer.save()
        return original(*arguments)

    monkeypatch.setattr(f"{within}.{name}", saves_before)
    assert SemanticIndex.load(saved, student).get(["new"])[0].text == "a dog"


def test_another_model_is_refused(saved, student, tiny_bert, tiny_roberta, tmp_path):
    expected = read_manifest(saved)["model"]["parameters_sha256"][:12]
    with torch.no_grad():
        next(student.parameters())[7] += 0.5
    with pytest.raises(ValueError, match=f"made with the model .*{expected}.* is not"):
        SemanticIndex.load(saved, student)
    with pytest.raises(ValueError, match="width 32.*width 16"):
        SemanticIndex.load(saved, build_student(str(tiny_roberta)))
    with pytest.raises(ValueError, match="embeds a probe sentence differently"):
        SemanticIndex.load(saved, str(tiny_bert))  # pooled by the mean
    pooled = build_student(str(tiny_bert)).to("cpu")
    assert len(SemanticIndex.load(saved, pooled)) == 60


def test_a_folder_of_something_else_is_not_overwritten(index, saved, student, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="something else in it"):
        index.save(tmp_path / "other")
    with pytest.raises((ValueError, OSError), match="file"):
        index.save(tmp_path / "file")
    with pytest.raises(ValueError, match="there is an index at"):
        SemanticIndex.build(student, ["a dog"], path=saved)
    index.save(saved)  # where it was saved before
    assert index.save(tmp_path / "copy") == tmp_path / "copy"


def test_two_that_save_do_not_overwrite_each_other(saved, student):
    first, second = (SemanticIndex.load(saved, student) for _ in range(2))
    first.add(["a dog"])
    first.save()
    second.add(["a man"])
    with pytest.raises(ValueError, match="was changed by another process since"):
        second.save()
    with locked(saved), pytest.raises(ValueError, match="another process is writing to"):
        first.save()
    assert len(SemanticIndex.load(saved, student)) == 61


def test_an_open_index_outlives_its_files(saved, student, sentences):
    reader, writer = (SemanticIndex.load(saved, student) for _ in range(2))
    writer.remove(["0"])
    writer.save()
    assert reader.search(sentences[0], k=1)[0].id == "0"
    reader.add(["a dog"])
    assert len(reader) == 61


def damaged(content):
    middle = len(content) // 2
    yield b""
    yield content[:middle]
    yield content[: len(content) - 1]
    for place in (0, middle, len(content) - 1):
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def test_a_damaged_file_is_refused_whichever_it_is(student, sentences, tmp_path):
    """Every file; what loads is as good as before."""
    index = SemanticIndex.build(student, sentences[:20])
    index.save(tmp_path / "index")
    expected = index.search(sentences[:3])
    files = [file for file in (tmp_path / "index").rglob("*") if file.is_file() and file.name != "lock"]
    assert {file.name for file in files} == {"manifest.json", "vectors.faiss", "rows.sqlite"}
    for file in files:
        content = file.read_bytes()
        for damage in damaged(content):
            if damage.strip() != content.strip():
                file.write_bytes(damage)
                with pytest.raises(ValueError, match=re.escape(file.name)):
                    SemanticIndex.load(tmp_path / "index", student)
        file.unlink()
        with pytest.raises((ValueError, FileNotFoundError)):
            SemanticIndex.load(tmp_path / "index", student)
        file.write_bytes(content)
    loaded = SemanticIndex.load(tmp_path / "index", student)
    assert loaded.search(sentences[:3]) == expected


def test_killed_while_adding_or_saving_the_index_is_whole(tiny_bert, tmp_path):
    sys.path.insert(0, str(WORKER.parent))
    from killed_index_worker import ROWS, TEXTS

    model = build_student(str(tiny_bert)).to("cpu")
    ids, metadata = [f"r{row}" for row in range(ROWS)], [{"row": row} for row in range(ROWS)]
    SemanticIndex.build(model, TEXTS[:ROWS], ids=ids, metadata=metadata, path=tmp_path / "index")
    before = copy_tree(tmp_path / "index", tmp_path / "before")
    report = run_worker(tiny_bert, tmp_path / "index", "add")
    assert report["killed"] >= 3
    assert report["rows"] == sorted(report["rows"])
    assert len(SemanticIndex.load(tmp_path / "index", model)) == report["rows"][-1] > ROWS
    assert len(SemanticIndex.load(before, model)) == ROWS


def test_a_first_save_that_was_killed_anywhere_can_be_repeated(tiny_bert, tmp_path):
    report = run_worker(tiny_bert, tmp_path, "save")
    folders = list(tmp_path.iterdir())
    assert len(folders) == report["killed"] + 1 > 3
    model = build_student(str(tiny_bert)).to("cpu")
    for folder in folders:
        assert len(SemanticIndex.load(folder, model)) == 8
    left = [path.name for folder in folders for path in folder.glob(".manifest*")]
    assert left == []


def test_a_copy_that_was_killed_anywhere_goes_on(tiny_bert, tmp_path):
    report = run_worker(tiny_bert, tmp_path, "copy")
    assert report["killed"] > 6
    model = build_student(str(tiny_bert)).to("cpu")
    assert not list(tmp_path.glob("*.copy"))
    copies = [path for path in tmp_path.iterdir() if path.is_dir() and path.name != "source"]
    assert len(copies) == report["killed"] + 1
    assert {len(SemanticIndex.load(copy, model)) for copy in copies} == {120}


def run_worker(model, path, act):
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{WORKER.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        [sys.executable, WORKER, model, path, act], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
