"""Teachers by the names of a command line."""

import json

import pytest
import torch

pytest.importorskip("open_clip")

import open_clip

from st_kdmcse import build_student
from st_kdmcse.teachers import CLIPTeacher, CombinedTeacher, OpenCLIPTeacher, SentenceTransformerTeacher, load_teacher

TINY_CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory, tiny_bert):
    folder = tmp_path_factory.mktemp("st") / "tiny-st"
    build_student(str(tiny_bert)).save(str(folder))
    return folder


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("local-dir:{open_clip}", OpenCLIPTeacher),
        ("open_clip:local-dir:{open_clip}", OpenCLIPTeacher),
        ("open_clip:{open_clip}", OpenCLIPTeacher),
        ("{open_clip}", OpenCLIPTeacher),
        ("transformers:{clip}", CLIPTeacher),
        ("{clip}", CLIPTeacher),
        ("sentence-transformers:{text}", SentenceTransformerTeacher),
        ("{text}", SentenceTransformerTeacher),
    ],
)
def test_each_kind(tiny_open_clip, tiny_clip, text_folder, template, expected):
    name = template.format(open_clip=tiny_open_clip, clip=tiny_clip, text=text_folder)
    teacher = load_teacher(name, device="cpu", batch_size=7)
    assert type(teacher) is expected
    assert teacher.batch_size == 7
    assert teacher.device == torch.device("cpu")
    with pytest.raises(ValueError, match="brings its own weights: leave `pretrained` .'openai'. out"):
        load_teacher(name, pretrained="openai", device="cpu")


def test_a_second_teacher_for_the_captions(tiny_open_clip, text_folder):
    teacher = load_teacher(f"local-dir:{tiny_open_clip}", text_teacher=str(text_folder), device="cpu")
    assert type(teacher) is CombinedTeacher
    assert teacher.name.startswith("open_clip:local-dir:tiny-open-clip@")
    assert " + sentence-transformers:tiny-st@" in teacher.name


def test_a_configuration_needs_a_checkpoint(tmp_path):
    config = tmp_path / "ViT-tiny-load.json"
    config.write_text(json.dumps(TINY_CONFIG))
    with pytest.raises(ValueError, match=r"ViT-tiny-load.json is a configuration without weights: give .* checkpoint"):
        load_teacher(str(config))
    open_clip.add_model_config(config)
    torch.save(open_clip.create_model("ViT-tiny-load").state_dict(), tmp_path / "weights.pt")
    for name in (str(config), "ViT-tiny-load", "open_clip:ViT-tiny-load"):
        teacher = load_teacher(name, str(tmp_path / "weights.pt"), device="cpu")
        assert teacher.name.startswith("open_clip:ViT-tiny-load/weights.pt@")
    with pytest.raises(ValueError, match="ViT-tiny-load has no weights 'openai': give the path of a checkpoint"):
        load_teacher("ViT-tiny-load")


def test_the_default_weights_are_those_of_openai():
    # Offline, a tag that is right ends at the download.
    with pytest.raises(ValueError, match="ViT-L-14 with the weights openai cannot be loaded"):
        load_teacher("ViT-L-14")
    with pytest.raises(ValueError, match="ViT-B-16-SigLIP has no weights 'openai': give one of webli as `pretrained`"):
        load_teacher("ViT-B-16-SigLIP")


def test_names_that_say_nothing(tiny_bert, tmp_path):
    with pytest.raises(ValueError, match="no teacher 'ViT-B-23': .*near names: ViT-B-32.*prefix: transformers:"):
        load_teacher("ViT-B-23")
    with pytest.raises(ValueError, match="no teacher 'openai/clip-vit-base-patch32': .*transformers:openai/clip"):
        load_teacher("openai/clip-vit-base-patch32")
    with pytest.raises(ValueError, match="holds no model: expected an open_clip_config.json"):
        load_teacher(str(tmp_path))
    with pytest.raises(ValueError, match=r"config.json: a bert model is no teacher of images.*sentence-transformers:/"):
        load_teacher(str(tiny_bert))
    for content in ("{}", "[]", "{"):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match="config.json is not the configuration of a model"):
            load_teacher(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="missing"):
        load_teacher("local-dir:missing")
    with pytest.raises(FileNotFoundError, match="no model configuration"):
        load_teacher("missing.json", "weights.pt")
