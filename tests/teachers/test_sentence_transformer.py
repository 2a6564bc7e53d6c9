"""sentence-transformers models as teachers of images and captions."""

import numpy as np
import pytest

pytest.importorskip("torchvision")

from click.testing import CliRunner
from PIL import Image
from sentence_transformers import SentenceTransformer

from st_kdmcse import FeatureStore, build_student
from st_kdmcse.cli.main import main
from st_kdmcse.teachers import CLIPTeacher, SentenceTransformerTeacher, load_teacher

TEXTS = ["a dog", "Two men play football .", "", "a dog"]


@pytest.fixture(scope="module")
def folder(tiny_multimodal):
    return tiny_multimodal


@pytest.fixture(scope="module")
def teacher(folder):
    return load_teacher(f"sentence-transformers:{folder}", device="cpu", batch_size=5, precision="float32")


def test_features_are_those_of_the_model(teacher, folder, tiny_clip, photos):
    stock = SentenceTransformer(str(folder), device="cpu")
    images, texts = teacher.encode_images(photos), teacher.encode_texts(TEXTS)
    assert np.abs(images - stock.encode([Image.open(path) for path in photos])).max() < 1e-5
    assert np.abs(texts - stock.encode(TEXTS)).max() < 1e-5
    of_transformers = CLIPTeacher(tiny_clip, device="cpu", precision="float32")
    assert np.abs(images - of_transformers.encode_images(photos)).max() < 1e-5
    assert (teacher.knows_images, teacher.shared_space, teacher.dim) == (True, True, 20)
    assert teacher.name.startswith("sentence-transformers:tiny-multimodal@")


def test_images_of_one_size_and_large_ones(teacher, photos):
    pixels = np.random.default_rng(0).integers(0, 255, (2, 60, 50, 3), dtype=np.uint8)
    images = [Image.fromarray(each) for each in pixels]
    assert np.abs(teacher.encode_images(images) - teacher.model.encode(images)).max() < 1e-5
    large = images[0].resize((3000, 2500))
    assert teacher.preprocess(large).shape == (3, 1825, 2190)
    cosine = np.corrcoef(teacher.encode_images([large])[0], teacher.model.encode([large])[0])[0, 1]
    assert cosine > 0.99


def test_a_caption_that_names_a_file_is_a_text(teacher, photos):
    names = [str(photos[0]), "https://example.invalid/dog.jpg"]
    as_dicts = teacher.model.encode([{"text": name} for name in names])
    assert np.abs(teacher.encode_texts(names) - as_dicts).max() < 1e-5


def test_bfloat16(folder, photos, teacher, bfloat16):
    found = SentenceTransformerTeacher(folder, device="cpu", precision="bfloat16")
    for one, other in ((found.encode_images(photos), teacher.encode_images(photos)),):
        cosines = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
        assert cosines.min() > 0.99
        assert np.abs(one - other).max() > 0


def test_extraction(folder, photo_set, teacher, tmp_path):
    arguments = ["--captions", photo_set / "captions.txt", "--images", photo_set / "Images", "--workers", 2]
    arguments += ["--teacher", f"sentence-transformers:{folder}", "--dtype", "float32", "--precision", "float32"]
    result = CliRunner().invoke(main, list(map(str, ["extract", tmp_path / "features", *arguments])))
    assert result.exit_code == 0, result.output
    store = FeatureStore.open(tmp_path / "features", verify=True)
    assert (store.teacher, store.shared_space, store.manifest["source"]["precision"]) == (teacher.name, True, "float32")
    rows = np.flatnonzero(np.diff(store.image_rows, prepend=-1))
    images = teacher.encode_images([photo_set / "Images" / store.image_id(int(row)) for row in rows])
    assert np.abs(store.image_features - images).max() < 1e-5
    again = CliRunner().invoke(main, list(map(str, ["extract", tmp_path / "features", *arguments])))
    assert "45 images had been finished before" in again.output


def test_a_model_of_texts_alone_is_no_teacher_of_images(photo_set, tiny_bert, tmp_path):
    build_student(str(tiny_bert)).save_pretrained(str(tmp_path / "text-only"))
    arguments = ["--captions", photo_set / "captions.txt", "--images", photo_set / "Images"]
    arguments += ["--teacher", f"sentence-transformers:{tmp_path / 'text-only'}"]
    result = CliRunner().invoke(main, list(map(str, ["extract", tmp_path / "features", *arguments])))
    assert result.exit_code == 2
    assert "sentence-transformers:text-only@" in result.output
    assert "knows no images: take it for the captions only" in result.output
    assert "--text-teacher" in result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text-only"]
