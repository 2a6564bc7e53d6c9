import shutil

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_kdmcse import FeatureStore, KDMCSEConfig, KDMCSELoss, SimCSELoss
from st_kdmcse.search.images import index_images, text_to_image_encoder
from st_kdmcse.search.semantic_index import SemanticIndex

pytest.importorskip("faiss")


@pytest.fixture
def loss(student, store):
    return KDMCSELoss(student, KDMCSEConfig(projection_dim=16), features=store)


@pytest.fixture
def heads(loss, tmp_path):
    loss.save_heads(tmp_path / "heads")
    return tmp_path / "heads"


@pytest.fixture
def folder(store, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for image, _ in store.captions():
        (folder / image).write_bytes(b"a picture")
    return folder


def test_scores_are_the_cosines_that_the_loss_compares(student, store, loss, heads, sentences, tmp_path):
    index = index_images(store, student, heads, tmp_path / "index")
    student.eval()
    with torch.inference_mode():
        grounded = loss.heads["grounding"](student.encode(sentences[:5], convert_to_tensor=True))
        images = loss.heads["teacher_image"](torch.from_numpy(np.array(store.image_features, dtype=np.float32)))
        expected = torch.nn.functional.cosine_similarity(grounded[:, None], images[None], dim=2)
    for query, row in zip(sentences[:5], expected, strict=True):
        hits = index.search(query, k=store.num_images)
        assert len(hits) == store.num_images
        of_image = {store.image_id(3 * image): float(score) for image, score in enumerate(row)}
        assert {hit.id: hit.score for hit in hits} == pytest.approx(of_image, abs=1e-5)


def test_rows_are_images_with_their_captions_and_files(student, store, heads, folder, tmp_path):
    index = index_images(store, student, heads, tmp_path / "index", images=folder)
    (hit,) = index.get([store.image_id(6)])
    assert hit.text.split("\n") == [store.caption(row) for row in (6, 7, 8)]
    assert hit.metadata == {"image": store.image_id(6)}
    assert index.images == folder
    assert len(index) == store.num_images


def test_the_folder_can_be_moved_for_the_encoder_is_in_it(student, store, heads, sentences, tmp_path):
    index = index_images(store, student, heads, tmp_path / "index")
    expected = index.search(sentences[0], k=4)
    shutil.move(tmp_path / "index", tmp_path / "moved")
    loaded = SemanticIndex.load(tmp_path / "moved")
    found = loaded.search(sentences[0], k=4)
    assert [hit.id for hit in found] == [hit.id for hit in expected]
    assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    loaded.save(tmp_path / "copy")
    shutil.rmtree(tmp_path / "moved")
    assert SemanticIndex.load(tmp_path / "copy").search(sentences[0], k=4)[0].id == expected[0].id


def test_images_are_removed_but_texts_not_added(student, store, heads, tmp_path):
    index_images(store, student, heads, tmp_path / "index")
    index = SemanticIndex.load(tmp_path / "index")
    with pytest.raises(ValueError, match="an index of images"):
        index.add(["a dog"])
    with pytest.raises(ValueError, match="an index of images"):
        index.update([store.image_id(0)], ["a dog"])
    index.remove([store.image_id(0)])
    index.save()
    assert len(SemanticIndex.load(tmp_path / "index")) == store.num_images - 1


def test_the_encoder_is_a_stock_model(student, loss, heads, sentences, tmp_path):
    text_to_image_encoder(student, heads).save_pretrained(str(tmp_path / "encoder"))
    found = SentenceTransformer(str(tmp_path / "encoder"), device="cpu").encode(sentences[:3], convert_to_tensor=True)
    with torch.inference_mode():
        expected = loss.heads["grounding"](student.encode(sentences[:3], convert_to_tensor=True))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_index_that_is_there_stays(student, store, heads, tmp_path):
    index_images(store, student, heads, tmp_path / "index")
    with pytest.raises(ValueError, match="there is an index at"):
        index_images(store, student, heads, tmp_path / "index")


def test_heads_that_do_not_fit(student, store, heads, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"heads\.safetensors does not exist"):
        index_images(store, student, tmp_path / "nothing", tmp_path / "index")
    SimCSELoss(student).save_heads(tmp_path / "simcse")
    with pytest.raises(ValueError, match="no grounding head, only text: train with mcse or kdmcse"):
        index_images(store, student, tmp_path / "simcse", tmp_path / "index")
    generator = np.random.default_rng(0)
    other = FeatureStore.from_arrays(
        tmp_path / "other",
        generator.normal(size=(2, 5)),
        generator.normal(size=(2, 5)),
        ["a", "b"],
        [0, 1],
        ["x", "y"],
        "t",
    )
    with pytest.raises(ValueError, match="of width 8, those of .*other are of width 5"):
        index_images(other, student, heads, tmp_path / "index")
    (heads / "heads.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="may be truncated"):
        index_images(store, student, heads, tmp_path / "index")
    assert not (tmp_path / "index").exists()


def test_missing_files_are_counted_before_anything_is_written(student, store, heads, folder, tmp_path):
    (folder / store.image_id(3)).unlink()
    with pytest.raises(FileNotFoundError, match=rf"1 of 24 images are not in .*, the first is {store.image_id(3)}"):
        index_images(store, student, heads, tmp_path / "index", images=folder)
    assert not (tmp_path / "index").exists()
