"""Folders of transformers that are no teachers; what all teachers share is in test_all_teachers.py."""

import shutil

import pytest

pytest.importorskip("torchvision")

from helpers import copy_tree
from safetensors.torch import load_file, save_file
from teacher_models import make_tiny_clip

from st_kdmcse.teachers import CLIPTeacher


def test_the_name_changes_with_the_weights(tiny_clip, tmp_path):
    other = CLIPTeacher(make_tiny_clip(tmp_path / tiny_clip.name, seed=1), device="cpu").name
    assert other.startswith("transformers:tiny-clip@")
    assert other != CLIPTeacher(tiny_clip, device="cpu").name


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
def test_a_missing_file(tiny_clip, tmp_path, name):
    folder = copy_tree(tiny_clip, tmp_path / "copy")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"copy cannot be loaded: .*Give a folder"):
        CLIPTeacher(folder)


def test_a_missing_tokenizer(tiny_clip, tmp_path):
    folder = copy_tree(tiny_clip, tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"the tokenizer of .*copy knows no words: add its files"):
        CLIPTeacher(folder)


def test_weights_that_are_not_all_there(tiny_clip, tmp_path):
    folder = copy_tree(tiny_clip, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"copy cannot be loaded: .*lack 1 parameters, such as visual_projection"):
        CLIPTeacher(folder)


def test_weights_of_another_size(tiny_clip, tmp_path):
    folder = copy_tree(tiny_clip, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["text_projection.weight"] = weights["text_projection.weight"][:5]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"copy cannot be loaded: .*belong together"):
        CLIPTeacher(folder)


def test_truncated_weights(tiny_clip, tmp_path):
    folder = copy_tree(tiny_clip, tmp_path / "copy")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:20_000])
    with pytest.raises(ValueError, match=r"copy cannot be loaded: .*whole"):
        CLIPTeacher(folder)


def test_other_models_and_unknown_names(tiny_bert, tmp_path):
    with pytest.raises(ValueError, match=r"it is a bert model, expected one of clip, siglip"):
        CLIPTeacher(tiny_bert)
    with pytest.raises(ValueError, match="cannot be loaded: .*model_type"):
        CLIPTeacher(tmp_path)
    with pytest.raises(FileNotFoundError, match="no/such-model cannot be loaded: .*a name on the hub"):
        CLIPTeacher("no/such-model")
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        CLIPTeacher(tmp_path)
