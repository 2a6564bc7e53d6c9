"""CLIP and SigLIP models of Hugging Face transformers as teachers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from st_kdmcse.teachers.base import ModelTeacher, Preprocess, TeacherPrecision, check_tokenizer, loading, weights_hash

if TYPE_CHECKING:
    from PIL import Image

_PADDING = {"clip": "longest", "siglip": "max_length"}  # SigLIP reads its feature off the last position


class CLIPTeacher(ModelTeacher):
    """A ``CLIPModel`` or ``SiglipModel`` of transformers as a frozen encoder of images and texts.

    Args:
        model: name on the hub (``openai/clip-vit-base-patch32``) or a folder with the model, its tokenizer and its
            image processor.
        device: torch device; by default CUDA where there is a CUDA device, else the CPU.
        batch_size: images or texts in one forward pass.
        precision: of the forward pass; "auto" is what the device is fastest at.

    Raises:
        FileNotFoundError: if there is no such model, or a file of it is missing.
        ValueError: if it is a model of another kind, or its weights or tokenizer are incomplete.

    Example:
        ::

            teacher = CLIPTeacher("openai/clip-vit-base-patch32")
            images = teacher.encode_images(["dog.jpg", "cat.jpg"])  # (2, 512)
            texts = teacher.encode_texts(["a dog", "a cat"])  # (2, 512)
    """

    def __init__(
        self,
        model: str | Path = "openai/clip-vit-base-patch32",
        device: str | torch.device | None = None,
        batch_size: int = 64,
        precision: TeacherPrecision = "auto",
    ) -> None:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

        super().__init__(device, batch_size, precision)
        name = str(model)
        with loading(name):
            kind = AutoConfig.from_pretrained(name).model_type
            if kind not in _PADDING:
                raise ValueError(f"it is a {kind} model, expected one of {', '.join(_PADDING)}")
            loaded, report = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
            absent = sorted(report["missing_keys"])
            if absent:  # transformers would leave them random
                raise ValueError(f"its weights lack {len(absent)} parameters, such as {absent[0]}")
            self._preprocess = _Preprocess(AutoImageProcessor.from_pretrained(name))
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        check_tokenizer(lambda texts: self._tokenizer(texts)["input_ids"], name)
        source = Path(name).resolve().name if Path(name).is_dir() else name
        self.name = f"transformers:{source}@{weights_hash(loaded)}"
        self._tokenizer_options = {
            "padding": _PADDING[kind],
            "truncation": True,
            "max_length": loaded.config.text_config.max_position_embeddings,
            "return_attention_mask": kind == "clip",  # SigLIP was trained to attend to its padding
        }
        self._model = self._freeze(loaded)
        self.dim = int(self._forward(self._text_features, ["a"]).shape[1])

    @property
    def preprocess(self) -> Preprocess:
        """The model's image processor."""
        return self._preprocess

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return _pooled(self._model.get_image_features(pixel_values=pixels))

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        tokens = self._tokenizer(texts, return_tensors="pt", **self._tokenizer_options).to(self.device)
        return _pooled(self._model.get_text_features(**tokens))


class _Preprocess:
    """An image processor as a function of one image."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(self, image: Image.Image) -> torch.Tensor:
        pixels: torch.Tensor = self._processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"][0]
        return pixels


def _pooled(output: Any) -> torch.Tensor:
    """The features: transformers returned them alone once, and now as the pooled part of the output."""
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features
