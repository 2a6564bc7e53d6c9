"""Models of open_clip as teachers."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from st_kdmcse.teachers.base import ModelTeacher, Preprocess, TeacherPrecision, check_tokenizer, loading, weights_hash

_SCHEMAS = ("hf-hub:", "local-dir:")
_CHECKPOINT_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".npz", ".npy"}
_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
_CONFIG_KEYS = ("embed_dim", "vision_cfg", "text_cfg")


class OpenCLIPTeacher(ModelTeacher):
    """Any open_clip model as a frozen encoder of images and texts.

    Args:
        model_name: name of a model that open_clip knows (``ViT-B-32``), ``hf-hub:owner/name``, ``local-dir:folder``, or
            the path of a model configuration, a .json file with embed_dim, vision_cfg and text_cfg.
        pretrained: tag of the weights that open_clip downloads (``openai``) or path of a checkpoint; None leaves the
            weights random. Not used with ``hf-hub:`` and ``local-dir:``, which bring their own weights. A checkpoint of
            OpenAI's own weights needs a model such as ``ViT-B-32-quickgelu``; the tag switches it on. Images
            are prepared for a checkpoint as for the model's tags if these agree (SigLIP), else as for OpenAI's CLIP; a
            ``local-dir:`` folder can set another one, in its open_clip_config.json.
        device: torch device; by default CUDA where there is a CUDA device, else the CPU.
        batch_size: images or texts in one forward pass.
        precision: of the forward pass; "auto" is what the device is fastest at.

    Raises:
        ImportError: if open_clip is not installed.
        FileNotFoundError: if a folder, configuration or checkpoint is missing.
        ValueError: if the model or tag is unknown, listing near names, or the weights cannot be loaded.

    Example:
        ::

            teacher = OpenCLIPTeacher("ViT-B-32", "openai")
            images = teacher.encode_images(["dog.jpg", "cat.jpg"])  # (2, 512)
            texts = teacher.encode_texts(["a dog", "a cat"])  # (2, 512)
    """

    def __init__(
        self,
        model_name: str = "ViT-B-32",
        pretrained: str | None = "openai",
        device: str | torch.device | None = None,
        batch_size: int = 64,
        precision: TeacherPrecision = "auto",
    ) -> None:
        super().__init__(device, batch_size, precision)
        open_clip = import_open_clip()
        own_config = model_name.endswith(".json")
        if model_name.startswith(_SCHEMAS):
            pretrained = None
        elif own_config:
            model_name = _add_config(Path(model_name))
        else:
            model_name = known_model(model_name)
        if pretrained is not None:
            _check_pretrained(model_name, pretrained)
        model, self._preprocess = _load(model_name, pretrained)
        self.name = f"open_clip:{_identity(model_name, pretrained, own_config, model)}"
        self._model = self._freeze(model)
        with loading(f"the tokenizer of {model_name}"):
            self._tokenizer = open_clip.get_tokenizer(model_name)
        check_tokenizer(self._tokenizer, model_name)
        self.dim = int(self._forward(self._text_features, ["a"]).shape[1])

    @property
    def preprocess(self) -> Preprocess:
        """open_clip's transform of the model: resizing, cropping, scaling."""
        return self._preprocess

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self._model.encode_image(pixels, normalize=False)
        return features

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        features: torch.Tensor = self._model.encode_text(self._tokenizer(texts).to(self.device), normalize=False)
        return features


def import_open_clip() -> Any:
    """The module open_clip, or an ImportError that says how to install it."""
    try:
        import open_clip
    except ImportError as error:
        raise ImportError('The teacher needs open_clip: pip install "st-kdmcse[teacher]"') from error
    return open_clip


def known_model(name: str) -> str:
    """The name by which open_clip knows a model.

    Raises:
        ValueError: if it does not; lists near names.
    """
    known = import_open_clip().list_models()
    dashed = name.replace("/", "-")  # OpenAI writes ViT-B/32
    if dashed in known:
        return dashed
    raise ValueError(
        f"open_clip knows no model {name!r}{_near(dashed, known)}; open_clip.list_models() lists all. "
        "Others: hf-hub:owner/name, local-dir:folder, or the path of a .json configuration"
    )


def preprocessing_of_tags(model_name: str) -> dict[str, Any]:
    """How images are prepared for a model: options of open_clip if all weights that it knows agree, else none."""
    open_clip = import_open_clip()
    tags = [
        open_clip.get_pretrained_cfg(model_name, tag) for tag in open_clip.list_pretrained_tags_by_model(model_name)
    ]
    choices = [{f"image_{key}": tag[key] for key in _PREPROCESSING if key in tag} for tag in tags]
    return choices[0] if choices and all(choice == choices[0] for choice in choices) else {}


def _near(name: str, known: list[str]) -> str:
    exact = {one.lower(): one for one in known}
    near = [exact[match] for match in difflib.get_close_matches(name.lower(), exact, n=5)]
    return f"; near names: {', '.join(near)}" if near else ""


def _add_config(path: Path) -> str:
    """Make a model configuration known to open_clip, under the name of its file."""
    open_clip = import_open_clip()
    if not path.is_file():
        raise FileNotFoundError(f"no model configuration {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    missing = [key for key in _CONFIG_KEYS if not isinstance(config, dict) or key not in config]
    if missing:
        raise ValueError(
            f"{path} has no {', '.join(missing)}: expected the configuration of an open_clip model; "
            "a folder with an open_clip_config.json is given as local-dir:folder"
        )
    known = open_clip.get_model_config(path.stem)
    if known is None:
        open_clip.add_model_config(path)
    elif known != config:
        raise ValueError(f"{path}: open_clip knows another model by the name {path.stem}; rename the file")
    return path.stem


def _check_pretrained(model_name: str, pretrained: str) -> None:
    open_clip = import_open_clip()
    if open_clip.get_pretrained_cfg(model_name, pretrained) or Path(pretrained).is_file():
        return
    if Path(pretrained).suffix in _CHECKPOINT_SUFFIXES or Path(pretrained).name != pretrained:
        raise FileNotFoundError(f"no checkpoint {pretrained}")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    known = f"its tags: {', '.join(tags)}" if tags else "it has no tags"
    raise ValueError(
        f"open_clip knows no weights {pretrained!r} of {model_name}{_near(pretrained, tags)}; {known}. "
        "Give one of them, or the path of a checkpoint, as `pretrained`"
    )


def _load(model_name: str, pretrained: str | None) -> tuple[nn.Module, Preprocess]:
    open_clip = import_open_clip()
    if pretrained is None and not model_name.startswith(_SCHEMAS):
        model, _, preprocess = open_clip.create_model_and_transforms(model_name)
        return model, preprocess
    tag = open_clip.get_pretrained_cfg(model_name, pretrained) if pretrained else {}
    # open_clip prepares images for a checkpoint file as for OpenAI's CLIP, whatever the model.
    options = preprocessing_of_tags(model_name) if pretrained and not tag else {}
    with loading(f"{model_name} with the weights {pretrained}" if pretrained else model_name):
        model, preprocess = open_clip.create_model_from_pretrained(
            model_name,
            pretrained,
            # open_clip only warns where a tag's weights were trained with another activation than the model's.
            force_quick_gelu=tag.get("quick_gelu", False),
            **options,
        )
    return model, preprocess


def _identity(model_name: str, pretrained: str | None, own_config: bool, model: nn.Module) -> str:
    """Names a model by its source, and by a hash of its weights where they can change under the same name."""
    if model_name.startswith("local-dir:"):
        source = f"local-dir:{Path(model_name.removeprefix('local-dir:')).resolve().name}"
    elif model_name.startswith("hf-hub:"):
        source = model_name
    elif pretrained is None:
        source = f"{model_name}/random"
    elif Path(pretrained).is_file():
        source = f"{model_name}/{Path(pretrained).name}"
    elif own_config:
        source = f"{model_name}/{pretrained}"
    else:
        return f"{model_name}/{pretrained}"
    return f"{source}@{weights_hash(model)}"
