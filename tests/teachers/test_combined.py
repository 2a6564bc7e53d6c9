"""Text-only teachers, and two teachers as one."""

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")

from helpers import copy_tree
from PIL import Image
from sentence_transformers import SentenceTransformer

from st_kdmcse import build_student
from st_kdmcse.teachers import CLIPTeacher, CombinedTeacher, OpenCLIPTeacher, SentenceTransformerTeacher

TEXTS = ["a dog runs", "two dogs", "a man sits on the large red ball in the snow", "a dog runs"]


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory, tiny_bert):
    folder = tmp_path_factory.mktemp("st") / "tiny-st"
    torch.manual_seed(0)
    build_student(str(tiny_bert)).save(str(folder))
    return folder


@pytest.fixture(scope="module")
def texts(text_folder):
    return SentenceTransformerTeacher(text_folder, device="cpu", batch_size=3)


@pytest.fixture(scope="module")
def images(tiny_open_clip):
    return OpenCLIPTeacher(f"local-dir:{tiny_open_clip}", device="cpu", batch_size=3)


def test_texts_equal_those_of_the_model_one_by_one(texts, text_folder):
    model = SentenceTransformer(str(text_folder), device="cpu")
    features = texts.encode_texts(TEXTS)
    assert features.dtype == np.float32
    assert features.shape == (4, texts.dim) == (4, 32)
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(features[row], model.encode(text), atol=1e-5)
    assert texts.encode_texts([]).shape == (0, 32)
    assert texts.name.startswith("sentence-transformers:tiny-st@")


def test_a_teacher_of_texts_knows_no_images(texts, images, photos):
    assert not texts.knows_images
    assert not texts.shared_space
    for refused in (
        lambda: texts.encode_images(photos[:1]),
        lambda: texts.encode_pixels(torch.zeros(1, 3, 32, 32)),
        lambda: texts.preprocess,
        lambda: CombinedTeacher(texts, images),
    ):
        with pytest.raises(ValueError, match="sentence-transformers:tiny-st@.* knows no images"):
            refused()


def test_each_side_comes_from_its_teacher_padded_with_zeros(texts, images, photos):
    teacher = CombinedTeacher(images, texts)
    assert (teacher.dim, teacher.shared_space, teacher.knows_images) == (32, False, True)
    assert teacher.name == f"{images.name} + {texts.name}"
    assert (teacher.precision, teacher.batch_size) == ("float32", 3)
    encoded = teacher.encode_images(photos)
    np.testing.assert_array_equal(encoded[:, :24], images.encode_images(photos))
    assert encoded.shape == (12, 32)
    assert not encoded[:, 24:].any()
    np.testing.assert_array_equal(teacher.encode_texts(TEXTS), texts.encode_texts(TEXTS))
    assert teacher.encode_texts([]).shape == (0, 32)


def test_the_captions_may_be_the_narrower_side(texts, images, tiny_clip, photos):
    clip = CLIPTeacher(tiny_clip, device="cpu")
    teacher = CombinedTeacher(images, clip)
    assert (teacher.dim, clip.dim) == (24, 20)
    features = teacher.encode_texts(TEXTS)
    np.testing.assert_array_equal(features[:, :20], clip.encode_texts(TEXTS))
    assert not features[:, 20:].any()
    np.testing.assert_array_equal(teacher.encode_images(photos[:4]), images.encode_images(photos[:4]))
    photo = Image.open(photos[0])
    np.testing.assert_array_equal(teacher.preprocess(photo), images.preprocess(photo))


def test_bad_folders(text_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no/such-model cannot be loaded"):
        SentenceTransformerTeacher("no/such-model")
    folder = copy_tree(text_folder, tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer of .*copy knows no words"):
        SentenceTransformerTeacher(folder)
