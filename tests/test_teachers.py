import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")

from st_kdmcse.demo.scenes import captions, make_pairs, make_scene_pairs, make_scenes, render
from st_kdmcse.teachers import OpenCLIPTeacher

FOLDER = Path(__file__).parents[1] / "st_kdmcse" / "demo" / "teacher"
TINY_CONFIG = """{
  "embed_dim": 24,
  "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
  "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
}"""


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def spearman(a, b):
    return np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1]


@pytest.fixture(scope="module")
def teacher():
    return OpenCLIPTeacher(f"local-dir:{FOLDER}", device="cpu")


@pytest.fixture(scope="module")
def tiny_name(tmp_path_factory):
    """Name of a small architecture that open_clip then knows like its own."""
    import open_clip

    path = tmp_path_factory.mktemp("configs") / "ViT-tiny-test.json"
    path.write_text(TINY_CONFIG)
    open_clip.add_model_config(path)
    return path.stem


@pytest.fixture(scope="module")
def heldout():
    rng = np.random.default_rng(5)
    scenes = make_scenes(200, seed=5, split="heldout")
    return [render(scene) for scene in scenes], [captions(scene, 1, rng)[0] for scene in scenes]


def test_shipped_weights_are_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 5e6


def test_features_are_raw_float32(teacher, heldout):
    images, texts = heldout
    for features in (teacher.encode_images(images[:5]), teacher.encode_texts(texts[:5])):
        assert features.shape == (5, teacher.dim) == (5, 128)
        assert features.dtype == np.float32
        assert not np.allclose(np.linalg.norm(features, axis=1), 1)


def test_the_right_image_is_found_among_heldout_scenes(teacher, heldout):
    images, texts = heldout
    scores = unit(teacher.encode_texts(texts)) @ unit(teacher.encode_images(images)).T
    assert (scores.argmax(axis=1) == np.arange(200)).mean() > 0.95
    assert (scores.argmax(axis=0) == np.arange(200)).mean() > 0.95


def test_cosines_follow_the_gold_similarity(teacher):
    texts_a, texts_b, gold = zip(*make_pairs(300, seed=5), strict=True)
    features_a, features_b = unit(teacher.encode_texts(texts_a)), unit(teacher.encode_texts(texts_b))
    images_b = unit(teacher.encode_images([render(scene) for _, scene in make_scene_pairs(300, seed=5)]))
    assert spearman((features_a * features_b).sum(axis=1), gold) > 0.85
    assert spearman((features_a * images_b).sum(axis=1), gold) > 0.85


def test_features_do_not_depend_on_the_batch_size(teacher, heldout):
    images, texts = heldout
    other = OpenCLIPTeacher(f"local-dir:{FOLDER}", device="cpu", batch_size=7)
    np.testing.assert_allclose(other.encode_texts(texts[:30]), teacher.encode_texts(texts[:30]), atol=1e-4)
    np.testing.assert_allclose(other.encode_images(images[:30]), teacher.encode_images(images[:30]), atol=1e-4)


def test_nothing_gives_an_empty_array(teacher):
    assert teacher.encode_texts([]).shape == teacher.encode_images([]).shape == (0, teacher.dim)


def test_image_files_are_read(teacher, heldout, tmp_path):
    path = tmp_path / "scene.png"
    heldout[0][0].save(path)
    expected = teacher.encode_images(heldout[0][:1])
    np.testing.assert_array_equal(teacher.encode_images([path]), expected)
    np.testing.assert_array_equal(teacher.encode_images([str(path)]), expected)


@pytest.mark.parametrize("content", [b"not an image", None, "truncated"])
def test_an_unreadable_image_is_named(teacher, heldout, tmp_path, content):
    path = tmp_path / "broken.png"
    if content == "truncated":
        heldout[0][0].save(path)
        content = path.read_bytes()[:150]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.png"):
        teacher.encode_images([heldout[0][0], path])


def test_progress_shows_for_many_batches_only(heldout, capsys):
    teacher = OpenCLIPTeacher(f"local-dir:{FOLDER}", device="cpu", batch_size=2)
    teacher.encode_texts(heldout[1][:8])
    teacher.encode_texts(heldout[1][:20], show_progress_bar=False)
    assert "Texts" not in capsys.readouterr().err
    teacher.encode_texts(heldout[1][:20])
    assert "Texts" in capsys.readouterr().err


def test_the_name_identifies_the_folder_and_its_weights(teacher):
    source, weights_hash = teacher.name.split("@")
    assert source == "open_clip:local-dir:teacher"
    assert len(weights_hash) == 12
    assert OpenCLIPTeacher(f"local-dir:{FOLDER}/", device="cpu").name == teacher.name


def test_a_named_architecture_works_with_random_weights_and_with_a_checkpoint(tiny_name, heldout, tmp_path):
    import open_clip
    from safetensors.torch import save_file

    images, texts = heldout[0][:3], heldout[1][:3]
    random = OpenCLIPTeacher(tiny_name, pretrained=None, device="cpu")
    assert random.name.startswith(f"open_clip:{tiny_name}/random@")
    assert random.encode_images(images).shape == random.encode_texts(texts).shape == (3, random.dim) == (3, 24)

    model = open_clip.create_model(tiny_name)
    checkpoint = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), checkpoint)
    loaded = OpenCLIPTeacher(tiny_name, pretrained=str(checkpoint), device="cpu")
    assert loaded.name.startswith(f"open_clip:{tiny_name}/weights.safetensors@")
    assert loaded.name.split("@")[1] != random.name.split("@")[1]
    tokens = open_clip.get_tokenizer(tiny_name)(texts)
    np.testing.assert_allclose(loaded.encode_texts(texts), model.encode_text(tokens).detach().numpy(), atol=1e-5)


def test_weights_are_frozen(tiny_name):
    model = OpenCLIPTeacher(tiny_name, pretrained=None, device="cpu")._model
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "open_clip_config.json").write_text(f'{{"model_cfg": {TINY_CONFIG}}}')
    with pytest.raises(RuntimeError, match="weights"):
        OpenCLIPTeacher(f"local-dir:{tmp_path}")


def test_an_unknown_tag_is_refused(tiny_name):
    with pytest.raises(RuntimeError, match="no-such-tag"):
        OpenCLIPTeacher(tiny_name, pretrained="no-such-tag")


def test_a_tag_brings_its_activation(monkeypatch):
    import open_clip

    seen = {}

    def record(model_name, pretrained, **options):
        seen.update(options)
        raise RuntimeError("stop before any download")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", record)
    with pytest.raises(RuntimeError, match="stop"):
        OpenCLIPTeacher("ViT-B/32", "openai")
    assert seen == {"force_quick_gelu": True}


def test_missing_open_clip_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"st-kdmcse\[teacher\]"):
        OpenCLIPTeacher()
