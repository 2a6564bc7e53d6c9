"""Features for examples without a store."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("open_clip")

from PIL import Image
from sentence_transformers import InputExample

from st_kdmcse import KDMCSEConfig, KDMCSELoss, MultimodalInputExample, build_student, fit_objectives
from st_kdmcse.teachers import CombinedTeacher, OpenCLIPTeacher, SentenceTransformerTeacher
from st_kdmcse.training.attach import attach_features
from st_kdmcse.training.examples import check_examples

TEXTS = ["a dog runs", "two dogs on the grass", "a man sits", "a child plays with the large red ball", "snow"]


class Counting(OpenCLIPTeacher):
    """Counts what it encodes."""

    images = texts = 0

    def _image_features(self, pixels):
        self.images += len(pixels)
        return super()._image_features(pixels)

    def _text_features(self, texts):
        self.texts += len(texts)
        return super()._text_features(texts)


@pytest.fixture
def teacher(tiny_open_clip):
    teacher = Counting(f"local-dir:{tiny_open_clip}", device="cpu", batch_size=2)
    teacher.images = teacher.texts = 0
    return teacher


def make_examples(photos):
    return [MultimodalInputExample(texts=[text], image=photos[row]) for row, text in enumerate(TEXTS)]


def test_missing_features_are_filled_in(teacher, photos):
    examples = make_examples(photos)
    assert attach_features(examples, teacher) is examples
    check_examples(examples, teacher_dim=24)
    images, texts = teacher.encode_images(photos[:5]), teacher.encode_texts(TEXTS)
    for row, example in enumerate(examples):
        np.testing.assert_allclose(example.image_features, images[row], atol=1e-5)
        np.testing.assert_allclose(example.text_features, texts[row], atol=1e-5)
        assert example.label.shape == (48,)


def test_each_file_and_each_text_is_encoded_once(teacher, photos):
    pairs = [(TEXTS[row % 2], photos[row % 3]) for row in range(12)]
    examples = [MultimodalInputExample(texts=[text], image=image) for text, image in pairs]
    examples[3].image = str(photos[0])  # the same file, as a string
    attach_features(examples, teacher)
    assert (teacher.images, teacher.texts) == (3, 2)
    expected = teacher.encode_images(photos[:3])
    for row, example in enumerate(examples):
        np.testing.assert_allclose(example.image_features, expected[row % 3], atol=1e-5)
    attach_features(examples, teacher)
    assert (teacher.images, teacher.texts) == (6, 2)  # three of them from the line above


def test_pil_images_and_bytes(teacher, photos):
    images = [Image.open(photos[0]), photos[1].read_bytes(), Image.open(photos[2]).convert("L")]
    examples = [MultimodalInputExample(texts=["a dog"], image=image) for image in images]
    attach_features(examples, teacher)
    features = np.stack([example.image_features for example in examples])
    np.testing.assert_allclose(features, teacher.encode_images(images), atol=1e-5)


def test_what_is_there_is_kept(teacher, photos):
    kept = np.full(24, 0.5)
    examples = [
        MultimodalInputExample(texts=["a dog"], image_features=kept, image=photos[0]),
        MultimodalInputExample(texts=["a dog"], text_features=kept, image=photos[0]),
        MultimodalInputExample(texts=["a dog"], row=3),
        MultimodalInputExample(texts=["a dog"], image_features=kept),
    ]
    attach_features(examples, teacher)
    assert examples[0].image_features is examples[1].text_features is examples[3].image_features is kept
    assert (teacher.images, teacher.texts) == (1, 1)
    assert [example.problem() for example in examples] == [None] * 4
    assert examples[2].image_features is examples[2].text_features is None
    assert attach_features([], teacher) == []


BAD = {
    "no image": (MultimodalInputExample(texts=["a dog"]), "neither image nor image_features"),
    "text only": (MultimodalInputExample(texts=["a dog"], text_features=np.ones(24)), "neither image nor"),
    "two texts": (MultimodalInputExample(texts=["a", "b"], image="x.jpg"), "list of one string"),
    "bare text": (MultimodalInputExample(texts="a", image="x.jpg"), "list of one string"),
    "width": (MultimodalInputExample(texts=["a"], image_features=np.ones(5)), "5 dimensions, the teacher gives 24"),
    "plain": (InputExample(texts=["a"]), "is a InputExample, expected a MultimodalInputExample"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_example_is_refused_before_anything_is_encoded(teacher, photos, name):
    example, message = BAD[name]
    examples = [*make_examples(photos), example]
    with pytest.raises(ValueError, match=f"example 5 .*{message}"):
        attach_features(examples, teacher)
    assert (teacher.images, teacher.texts) == (0, 0)
    assert examples[0].image_features is None


def test_unreadable_images_are_named_and_the_others_keep_their_features(teacher, photos, tmp_path):
    examples = make_examples(photos)
    (tmp_path / "broken.jpg").write_bytes(photos[0].read_bytes()[:2000])
    examples[1].image, examples[2].image = tmp_path / "broken.jpg", tmp_path / "missing.jpg"
    with pytest.raises(ValueError, match="example 1 ") as caught:
        attach_features(examples, teacher)
    first, second = str(caught.value).splitlines()
    assert "broken.jpg cannot be decoded" in first
    assert "example 2 " in second
    assert "missing.jpg" in second
    assert [example.image_features is None for example in examples] == [False, True, True, False, False]
    assert all(example.text_features is not None for example in examples)
    np.testing.assert_allclose(examples[3].image_features, teacher.encode_images(photos[3:4])[0], atol=1e-5)

    done = teacher.images, teacher.texts
    examples[1].image = examples[2].image = photos[1]
    attach_features(examples, teacher)
    assert (teacher.images, teacher.texts) == (done[0] + 1, done[1])
    check_examples(examples)


def test_many_unreadable_images_make_a_short_message(teacher):
    examples = [MultimodalInputExample(texts=["a"], image=f"missing-{number}.jpg") for number in range(25)]
    with pytest.raises(ValueError, match="and 15 more$"):
        attach_features(examples, teacher)


def test_a_teacher_of_texts_fills_in_texts_only(tiny_bert, tiny_open_clip, photos, tmp_path):
    build_student(str(tiny_bert)).save(str(tmp_path / "st"))
    texts = SentenceTransformerTeacher(tmp_path / "st", device="cpu")
    examples = attach_features(make_examples(photos), texts)
    assert all(example.image_features is None for example in examples)
    np.testing.assert_allclose(examples[1].text_features, texts.encode_texts(TEXTS[1:2])[0], atol=1e-5)
    images = OpenCLIPTeacher(f"local-dir:{tiny_open_clip}", device="cpu")
    attach_features(examples, CombinedTeacher(images, texts))
    check_examples(examples, teacher_dim=32)


def test_examples_with_attached_features_are_trained_on(student, teacher, photos, sentences, tmp_path):
    examples = [
        MultimodalInputExample(texts=[sentence], image=photos[row % 12]) for row, sentence in enumerate(sentences[:24])
    ]
    attach_features(examples, teacher)
    loss = KDMCSELoss(student, KDMCSEConfig(multimodal_weight=1.0), teacher_dim=teacher.dim)
    before = {name: value.clone() for name, value in loss.heads.state_dict().items()}
    texts = [InputExample(texts=[sentence]) for sentence in sentences[:48]]
    student.fit(
        train_objectives=fit_objectives(DataLoader(texts, batch_size=8), DataLoader(examples, batch_size=8), loss),
        epochs=1,
        steps_per_epoch=3,
        warmup_steps=0,
        show_progress_bar=False,
        checkpoint_path=str(tmp_path),
        optimizer_params={"lr": 1e-3},
    )
    for name, value in loss.heads.state_dict().items():
        assert torch.isfinite(value).all()
        assert not torch.equal(value, before[name]), name
