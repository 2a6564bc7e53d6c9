"""What holds for every teacher of images and texts; models are small and random, images real."""

import io
import multiprocessing
import pickle

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")

import open_clip
from PIL import Image
from teacher_models import make_tiny_siglip
from transformers import AutoModel, AutoTokenizer, CLIPImageProcessor, SiglipImageProcessor

from st_kdmcse.data.images import FileSlice
from st_kdmcse.teachers import CLIPTeacher, OpenCLIPTeacher

TEXTS = [
    "a dog",
    "Two men play football on a very green meadow , and a third one looks on .",
    "A child runs .",
    "",
    "a dog",
    "x" * 200,
    "Ein Hündchen läuft durch den Schnee",
]
TOLERANCE = {"rtol": 0, "atol": 1e-5}  # the features have norms of 3 to 7


@pytest.fixture(scope="session")
def tiny_siglip(tmp_path_factory):
    return make_tiny_siglip(tmp_path_factory.mktemp("siglip") / "tiny-siglip")


@pytest.fixture(scope="module", params=["open_clip", "clip", "siglip"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def folder(kind, tiny_open_clip, tiny_clip, tiny_siglip):
    return {"open_clip": tiny_open_clip, "clip": tiny_clip, "siglip": tiny_siglip}[kind]


def make(kind, folder, **options):
    if kind == "open_clip":
        return OpenCLIPTeacher(f"local-dir:{folder}", device="cpu", **options)
    return CLIPTeacher(folder, device="cpu", **options)


@pytest.fixture(scope="module")
def teacher(kind, folder):
    return make(kind, folder, batch_size=5)


def plain_features(kind, folder, path, text):
    """Features of one image and one text, as the library's own documentation computes them."""
    image = Image.open(path)
    if kind == "open_clip":
        model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")([text])
        model.eval()
        return model.encode_image(preprocess(image)[None]), model.encode_text(tokens)
    model = AutoModel.from_pretrained(folder)
    processor = {"clip": CLIPImageProcessor, "siglip": SiglipImageProcessor}[kind].from_pretrained(folder)
    padding = {"clip": False, "siglip": "max_length"}[kind]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer([text], padding=padding, truncation=True, max_length=24, return_tensors="pt")
    image_output = model.get_image_features(**processor(images=image, return_tensors="pt"))
    return image_output.pooler_output, model.get_text_features(input_ids=tokens["input_ids"]).pooler_output


def test_batches_equal_the_plain_model_one_by_one(teacher, kind, folder, photos):
    images, texts = teacher.encode_images(photos), teacher.encode_texts(TEXTS)
    assert (images.shape, texts.shape) == ((12, teacher.dim), (len(TEXTS), teacher.dim))
    assert images.dtype == texts.dtype == np.float32
    with torch.no_grad():
        for row in (0, 5, 11):
            expected, _ = plain_features(kind, folder, photos[row], "")
            np.testing.assert_allclose(images[row], expected[0].numpy(), **TOLERANCE)
        for row, text in enumerate(TEXTS):
            _, expected = plain_features(kind, folder, photos[0], text)
            np.testing.assert_allclose(texts[row], expected[0].numpy(), **TOLERANCE)


def test_each_row_belongs_to_its_input(teacher, photos):
    images, texts = teacher.encode_images(photos), teacher.encode_texts(TEXTS)
    for row, path in enumerate(photos):
        np.testing.assert_allclose(teacher.encode_images([path])[0], images[row], **TOLERANCE)
        assert all(np.abs(images[row] - images[other]).max() > 1e-2 for other in range(row))
    for row, text in enumerate(TEXTS):
        np.testing.assert_allclose(teacher.encode_texts([text])[0], texts[row], **TOLERANCE)
    assert np.abs(texts[0] - texts[2]).max() > 0.1
    np.testing.assert_allclose(texts[0], texts[4], **TOLERANCE)
    order = [6, 2, 0, 5, 1, 4, 3]
    np.testing.assert_allclose(teacher.encode_texts([TEXTS[row] for row in order]), texts[order], **TOLERANCE)
    np.testing.assert_array_equal(teacher.encode_texts(TEXTS), texts)


def test_preprocessed_pixels_are_encoded_alike(teacher, photos):
    pixels = torch.stack([teacher.preprocess(Image.open(path)) for path in photos[:3]])
    assert (pixels.shape, pixels.dtype) == ((3, 3, 32, 32), torch.float32)
    features = teacher.encode_pixels(pixels)
    assert features.dtype == torch.float32
    np.testing.assert_allclose(features.numpy(), teacher.encode_images(photos[:3]), **TOLERANCE)


def test_an_image_can_be_given_in_any_form(teacher, photos, tmp_path):
    path, content = photos[0], photos[0].read_bytes()
    (tmp_path / "pack").write_bytes(b"before" + content + b"after")
    forms = [
        path,
        str(path),
        content,
        FileSlice(tmp_path / "pack", 6, len(content), path.name),
        Image.open(path),
        Image.open(io.BytesIO(content)),
    ]
    features = teacher.encode_images(forms, workers=2)
    np.testing.assert_allclose(features, np.repeat(features[:1], len(forms), axis=0), **TOLERANCE)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_images_of_any_mode_and_shape_have_pixels(teacher, mode):
    for size in ((1, 1), (1, 3), (3, 1), (3, 200)):
        pixels = teacher.preprocess(Image.new(mode, size))
        assert pixels.shape == (3, 32, 32)
        assert torch.isfinite(pixels).all()


def test_gray_of_16_bits_is_the_same_picture(teacher, photos, tmp_path):
    gray = Image.open(photos[0]).convert("L")
    gray.save(tmp_path / "8.png")
    Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(tmp_path / "16.png")
    for form in (lambda path: path, Image.open):
        features = teacher.encode_images([form(tmp_path / name) for name in ("8.png", "16.png")])
        np.testing.assert_allclose(features[1], features[0], **TOLERANCE)


@pytest.fixture(scope="module")
def spawned():
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


def test_preprocessing_goes_to_spawned_processes(teacher, photos, spawned):
    assert len(pickle.dumps(teacher.preprocess)) < 10_000  # the model is not in it
    pixels = spawned.apply(run_preprocess, (teacher.preprocess, photos[0]))
    np.testing.assert_array_equal(pixels, teacher.preprocess(Image.open(photos[0])).numpy())


def run_preprocess(preprocess, path):
    return preprocess(Image.open(path)).numpy()


@pytest.mark.parametrize("content", [b"not an image", b"", None, "truncated"])
def test_an_unreadable_image_is_named(teacher, photos, tmp_path, content):
    path = tmp_path / "broken.jpg"
    if content == "truncated":
        content = photos[0].read_bytes()[:2000]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.jpg"):
        teacher.encode_images([photos[0], path])


def test_a_truncated_pil_image_is_named(teacher, photos, tmp_path):
    (tmp_path / "cut.jpg").write_bytes(photos[0].read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be decoded"):
        teacher.encode_images([Image.open(tmp_path / "cut.jpg")])


def test_nothing_gives_an_empty_array(teacher):
    assert teacher.encode_texts([]).shape == teacher.encode_images([]).shape == (0, teacher.dim)


def test_a_bare_string_is_refused(teacher):
    with pytest.raises(ValueError, match="expected a list of strings"):
        teacher.encode_texts("a dog")


def test_weights_are_frozen(teacher):
    assert not teacher._model.training
    assert not teacher.encode_pixels(torch.zeros(1, 3, 32, 32)).requires_grad


def test_the_name_holds_the_folder_and_a_hash_of_the_weights(teacher, kind, folder):
    again = make(kind, folder)
    assert again.name == teacher.name
    source, weights_hash = teacher.name.split("@")
    assert source == {"open_clip": "open_clip:local-dir:"}.get(kind, "transformers:") + folder.name
    assert len(weights_hash) == 12


def test_half_precision_is_refused_on_a_cpu_that_is_slower_at_it(kind, folder):
    with pytest.raises(ValueError, match="float16 is slower than float32 on a CPU: set `precision` to auto"):
        make(kind, folder, precision="float16")
    with pytest.raises(ValueError, match="this CPU has no instructions for bfloat16.* set `precision` to auto"):
        make(kind, folder, precision="bfloat16")


def test_a_cpu_that_is_faster_at_bfloat16_computes_in_it(bfloat16, kind, folder, teacher, photos):
    half = make(kind, folder)
    assert (half.precision, make(kind, folder, precision="float32").precision) == ("bfloat16", "float32")
    assert half.name == teacher.name
    assert {weight.dtype for weight in half._model.parameters()} == {torch.bfloat16}
    for ours, expected in (
        (half.encode_images(photos), teacher.encode_images(photos)),
        (half.encode_texts(TEXTS), teacher.encode_texts(TEXTS)),
    ):
        assert ours.dtype == np.float32
        assert 1e-6 < np.linalg.norm(ours - expected) / np.linalg.norm(expected) < 5e-2


def test_options_out_of_range(kind, folder, teacher):
    with pytest.raises(ValueError, match="precision is 'half', expected one of auto, float32"):
        make(kind, folder, precision="half")
    with pytest.raises(ValueError, match="batch_size is 0"):
        make(kind, folder, batch_size=0)
    assert teacher.precision == "float32"


def test_progress_shows_for_many_batches_only(kind, folder, capsys):
    teacher = make(kind, folder, batch_size=2)
    capsys.readouterr()
    teacher.encode_texts(TEXTS[:6])
    teacher.encode_texts(TEXTS * 2, show_progress_bar=False)
    teacher.encode_texts(TEXTS * 2, show_progress_bar=None)  # not a terminal
    assert "Texts" not in capsys.readouterr().err
    teacher.encode_texts(TEXTS * 2)
    assert "Texts" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16", "auto"])
def test_features_of_a_gpu_are_close_to_those_of_the_cpu(kind, teacher, folder, photos, precision):
    source = f"local-dir:{folder}" if kind == "open_clip" else folder
    on_gpu = (OpenCLIPTeacher if kind == "open_clip" else CLIPTeacher)(source, device="cuda", precision=precision)
    tolerance = 1e-3 if precision == "float32" else 5e-2
    for ours, expected in (
        (on_gpu.encode_images(photos), teacher.encode_images(photos)),
        (on_gpu.encode_texts(TEXTS), teacher.encode_texts(TEXTS)),
    ):
        assert ours.dtype == np.float32
        assert np.linalg.norm(ours - expected) < tolerance * np.linalg.norm(expected)
