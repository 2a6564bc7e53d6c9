"""open_clip models by name, by checkpoint, by configuration; the demo's trained teacher."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("open_clip")

import open_clip
from PIL import Image
from safetensors.torch import save_file
from teacher_models import make_tiny_open_clip, save_tokenizer

from st_kdmcse.demo.scenes import captions, make_pairs, make_scene_pairs, make_scenes, render
from st_kdmcse.teachers import OpenCLIPTeacher
from st_kdmcse.teachers.openclip import preprocessing_of_tags

DEMO = Path(__file__).parents[2] / "st_kdmcse" / "demo" / "teacher"
TEXTS = ["a dog", "two men play", "A dog, running!"]
TINY_CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


def unit(features):
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def spearman(a, b):
    return np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1]


@pytest.fixture(scope="module")
def demo_teacher():
    return OpenCLIPTeacher(f"local-dir:{DEMO}", device="cpu")


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    """Configuration of a small architecture with CLIP's own tokenizer."""
    path = tmp_path_factory.mktemp("configs") / "ViT-tiny-test.json"
    path.write_text(json.dumps(TINY_CONFIG))
    return path


@pytest.fixture(scope="module")
def heldout():
    rng = np.random.default_rng(5)
    scenes = make_scenes(200, seed=5, split="heldout")
    return [render(scene) for scene in scenes], [captions(scene, 1, rng)[0] for scene in scenes]


def test_the_demo_weights_are_small():
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 5e6


def test_the_right_image_is_found_among_heldout_scenes(demo_teacher, heldout):
    images, texts = heldout
    features = demo_teacher.encode_texts(texts)
    assert not np.allclose(np.linalg.norm(features, axis=1), 1)
    scores = unit(features) @ unit(demo_teacher.encode_images(images)).T
    assert (scores.argmax(axis=1) == np.arange(200)).mean() > 0.95
    assert (scores.argmax(axis=0) == np.arange(200)).mean() > 0.95


def test_cosines_follow_the_gold_similarity(demo_teacher):
    texts_a, texts_b, gold = zip(*make_pairs(300, seed=5), strict=True)
    features_a, features_b = unit(demo_teacher.encode_texts(texts_a)), unit(demo_teacher.encode_texts(texts_b))
    images_b = unit(demo_teacher.encode_images([render(scene) for _, scene in make_scene_pairs(300, seed=5)]))
    assert spearman((features_a * features_b).sum(axis=1), gold) > 0.85
    assert spearman((features_a * images_b).sum(axis=1), gold) > 0.85


def test_the_name_changes_with_the_weights(tiny_open_clip, tmp_path):
    other = OpenCLIPTeacher(f"local-dir:{make_tiny_open_clip(tmp_path / 'tiny-open-clip', seed=1)}", device="cpu")
    name = OpenCLIPTeacher(f"local-dir:{tiny_open_clip}/", device="cpu").name
    assert other.name.split("@")[0] == name.split("@")[0] == "open_clip:local-dir:tiny-open-clip"
    assert other.name != name


def test_a_configuration_works_with_random_weights_and_with_a_checkpoint(tiny_config, photos, tmp_path):
    random = OpenCLIPTeacher(str(tiny_config), pretrained=None, device="cpu")
    assert random.name.startswith("open_clip:ViT-tiny-test/random@")
    assert random.encode_images(photos[:3]).shape == random.encode_texts(TEXTS).shape == (3, random.dim) == (3, 24)

    model = open_clip.create_model("ViT-tiny-test")
    checkpoint = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), checkpoint)
    loaded = OpenCLIPTeacher(str(tiny_config), pretrained=str(checkpoint), device="cpu")
    assert loaded.name.startswith("open_clip:ViT-tiny-test/weights.safetensors@")
    assert loaded.name.split("@")[1] != random.name.split("@")[1]
    tokens = open_clip.get_tokenizer("ViT-tiny-test")(TEXTS)
    np.testing.assert_allclose(loaded.encode_texts(TEXTS), model.encode_text(tokens).detach().numpy(), atol=1e-5)
    by_name = OpenCLIPTeacher("ViT/tiny-test", pretrained=str(checkpoint), device="cpu")  # known by now
    assert by_name.name == loaded.name


VISION_TOWERS = {
    "timm": {"timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
    "own": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8, "pool_type": "avg"},
}


@pytest.mark.parametrize("tower", VISION_TOWERS)
def test_a_model_in_the_style_of_siglip(tower, photos, tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    text = {"vocab_size": save_tokenizer(tokenizer), "context_length": 16, "width": 32, "heads": 2, "layers": 2}
    text |= {"hf_tokenizer_name": str(tokenizer), "tokenizer_kwargs": {"clean": "canonicalize"}}
    text |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    config = {"embed_dim": 64, "init_logit_bias": -10, "custom_text": True}
    config |= {"vision_cfg": VISION_TOWERS[tower], "text_cfg": text}
    path = tmp_path / f"siglip-style-{tower}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    model, _, preprocess = open_clip.create_model_and_transforms(path.stem)
    model.eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")

    teacher = OpenCLIPTeacher(str(path), str(tmp_path / "weights.pt"), device="cpu", batch_size=2)
    tokens = open_clip.get_tokenizer(path.stem)(TEXTS)
    pixels = torch.stack([preprocess(Image.open(photo)) for photo in photos[:3]])
    with torch.no_grad():
        texts, images = model.encode_text(tokens).numpy(), model.encode_image(pixels).numpy()
    np.testing.assert_allclose(teacher.encode_texts(TEXTS), texts, atol=1e-5)
    np.testing.assert_allclose(teacher.encode_images(photos[:3]), images, atol=1e-5)


def test_a_checkpoint_gets_the_preprocessing_that_all_weights_of_its_model_share():
    assert preprocessing_of_tags("ViT-B-16-SigLIP") == {
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "image_interpolation": "bicubic",
        "image_resize_mode": "squash",
    }
    assert preprocessing_of_tags("ViT-L-14") == {}  # its weights differ
    assert preprocessing_of_tags("ViT-no-such") == {}


def test_a_tag_brings_its_activation(monkeypatch):
    seen = {}

    def record(model_name, pretrained, **options):
        seen.update(options)
        raise RuntimeError("stop before any download")

    monkeypatch.setattr(open_clip, "create_model_from_pretrained", record)
    with pytest.raises(ValueError, match="stop"):
        OpenCLIPTeacher("ViT-B/32", "openai")
    assert seen == {"force_quick_gelu": True}


def test_unknown_names_are_answered_with_near_ones(tiny_config):
    with pytest.raises(ValueError, match=r"no model 'vit-b-23'; near names: ViT-B-32.*hf-hub:"):
        OpenCLIPTeacher("vit-b-23")
    with pytest.raises(ValueError, match=r"no model 'qqqq'; open_clip.list_models"):
        OpenCLIPTeacher("qqqq")
    with pytest.raises(ValueError, match=r"no weights 'openia' of ViT-B-32; near names: openai; its tags: openai, "):
        OpenCLIPTeacher("ViT-B-32", "openia")
    with pytest.raises(ValueError, match=r"no weights 'openai' of ViT-tiny-test; it has no tags. Give .* checkpoint"):
        OpenCLIPTeacher(str(tiny_config))


@pytest.mark.parametrize("name", ["missing.pt", "folder/missing"])
def test_a_missing_checkpoint(tiny_config, tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"no checkpoint .*{name}"):
        OpenCLIPTeacher(str(tiny_config), str(tmp_path / name))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", "another model", "cut off"])
def test_a_bad_checkpoint_is_named(tiny_config, tmp_path, content, suffix):
    path = tmp_path / f"bad{suffix}"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        (save_file if suffix == ".safetensors" else torch.save)({"weight": torch.zeros(500)}, path)
        if content == "cut off":
            path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=rf"ViT-tiny-test with the weights .*bad\{suffix} cannot be loaded: .+whole"):
        OpenCLIPTeacher(str(tiny_config), str(path))


def test_bad_configurations(tiny_config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no model configuration .*missing\.json"):
        OpenCLIPTeacher(str(tmp_path / "missing.json"))
    for content, message in (
        ("{", r"bad\.json is not valid JSON"),
        ("[]", r"bad\.json has no embed_dim, vision_cfg, text_cfg"),
        (json.dumps({"embed_dim": 3, "vision_cfg": {}}), r"bad\.json has no text_cfg: .*local-dir:"),
    ):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            OpenCLIPTeacher(str(tmp_path / "bad.json"))
    namesake = tmp_path / "ViT-B-32.json"
    namesake.write_text(tiny_config.read_text())
    with pytest.raises(ValueError, match=r"another model by the name ViT-B-32; rename"):
        OpenCLIPTeacher(str(namesake))


def test_bad_folders(tiny_open_clip, tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        OpenCLIPTeacher(f"local-dir:{tmp_path / 'missing'}")
    with pytest.raises(FileNotFoundError, match=r"open_clip_config\.json"):
        OpenCLIPTeacher(f"local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": TINY_CONFIG}))
    with pytest.raises(ValueError, match="weights"):
        OpenCLIPTeacher(f"local-dir:{tmp_path}")
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        (tmp_path / name).write_bytes((tiny_open_clip / name).read_bytes())
    with pytest.raises(ValueError, match="tokenizer of"):
        OpenCLIPTeacher(f"local-dir:{tmp_path}")


def test_missing_open_clip_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"st-kdmcse\[teacher\]"):
        OpenCLIPTeacher()
