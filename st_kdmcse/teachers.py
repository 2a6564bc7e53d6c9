"""Frozen image-text teachers whose embeddings the losses distil."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

if TYPE_CHECKING:
    from PIL import Image

T = TypeVar("T")

_SCHEMAS = ("hf-hub:", "local-dir:")
_MANY_BATCHES = 4


class OpenCLIPTeacher:
    """Any open_clip model as a frozen encoder of images and texts.

    Args:
        model_name: Name of a model that open_clip knows (``ViT-B-32``), ``hf-hub:owner/name``, or ``local-dir:folder``.
        pretrained: Tag of the weights that open_clip downloads (``openai``) or path of a checkpoint; None leaves the
            weights random. Not used with ``hf-hub:`` and ``local-dir:``, which bring their own weights.
        device: Torch device; by default CUDA where there is a CUDA device, else the CPU.
        batch_size: Images or texts per forward pass.

    Raises:
        ImportError: If open_clip is not installed.
        RuntimeError: If the model is unknown or its weights cannot be loaded.

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
        device: str | None = None,
        batch_size: int = 64,
    ) -> None:
        try:
            import open_clip
        except ImportError as error:
            raise ImportError('The teacher needs open_clip: pip install "st-kdmcse[teacher]"') from error

        if model_name.startswith(_SCHEMAS):
            pretrained = None
            model, preprocess = open_clip.create_model_from_pretrained(model_name)
        else:
            model_name = model_name.replace("/", "-")
            if pretrained is None:
                model, _, preprocess = open_clip.create_model_and_transforms(model_name)
            else:
                # open_clip only warns where a tag's weights were trained with another activation than the model's.
                quick_gelu = open_clip.get_pretrained_cfg(model_name, pretrained).get("quick_gelu", False)
                model, preprocess = open_clip.create_model_from_pretrained(
                    model_name, pretrained, force_quick_gelu=quick_gelu
                )
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.batch_size = batch_size
        self.name = f"open_clip:{_identity(model_name, pretrained, model)}"
        self._model = model.requires_grad_(False).eval().to(self.device)
        self._preprocess = preprocess
        self._tokenizer = open_clip.get_tokenizer(model_name)
        self.dim = int(self._encode_text_batch(["a"]).shape[1])

    def encode_images(
        self, images: Sequence[Image.Image | str | Path], show_progress_bar: bool = True
    ) -> npt.NDArray[np.float32]:
        """Embeds images.

        Args:
            images: N images or paths of image files; files are read batch by batch.
            show_progress_bar: Show a progress bar if there are more than a few batches.

        Returns:
            Features as the model gives them, not normalised, shape (N, dim).

        Raises:
            ValueError: If an image cannot be read; names it.
        """
        return self._encode(images, self._encode_image_batch, "Images", show_progress_bar)

    def encode_texts(self, texts: Sequence[str], show_progress_bar: bool = True) -> npt.NDArray[np.float32]:
        """Embeds texts.

        Args:
            texts: N texts; the model's tokenizer cuts them at its context length.
            show_progress_bar: Show a progress bar if there are more than a few batches.

        Returns:
            Features as the model gives them, not normalised, shape (N, dim).
        """
        return self._encode(texts, self._encode_text_batch, "Texts", show_progress_bar)

    def _encode(
        self,
        items: Sequence[T],
        encode_batch: Callable[[Sequence[T]], torch.Tensor],
        unit: str,
        show_progress_bar: bool,
    ) -> npt.NDArray[np.float32]:
        starts = range(0, len(items), self.batch_size)
        features = np.empty((len(items), self.dim), dtype=np.float32)
        quiet = not show_progress_bar or len(starts) <= _MANY_BATCHES
        for start in tqdm(starts, desc=unit, unit="batch", disable=quiet):
            batch = items[start : start + self.batch_size]
            features[start : start + len(batch)] = encode_batch(batch).float().cpu().numpy()
        return features

    @torch.inference_mode()
    def _encode_image_batch(self, images: Sequence[Image.Image | str | Path]) -> torch.Tensor:
        with ThreadPoolExecutor() as pool:  # decoding releases the interpreter lock
            pixels = torch.stack(list(pool.map(self._load, images))).to(self.device)
        features: torch.Tensor = self._model.encode_image(pixels, normalize=False)
        return features

    @torch.inference_mode()
    def _encode_text_batch(self, texts: Sequence[str]) -> torch.Tensor:
        tokens = self._tokenizer(list(texts)).to(self.device)
        features: torch.Tensor = self._model.encode_text(tokens, normalize=False)
        return features

    def _load(self, image: Image.Image | str | Path) -> torch.Tensor:
        from PIL import Image

        pixels: torch.Tensor
        if isinstance(image, Image.Image):
            pixels = self._preprocess(image)
            return pixels
        try:
            with Image.open(image) as opened:
                pixels = self._preprocess(opened)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"Cannot read the image {image}: {error}. Replace it or leave it out.") from error
        return pixels


def _identity(model_name: str, pretrained: str | None, model: nn.Module) -> str:
    """Names a model by its source, and by a hash of its weights where the source can change under the same name."""
    if model_name.startswith("hf-hub:"):
        return model_name
    if model_name.startswith("local-dir:"):
        source = f"local-dir:{Path(model_name.removeprefix('local-dir:')).resolve().name}"
    elif pretrained is None:
        source = f"{model_name}/random"
    elif Path(pretrained).is_file():
        source = f"{model_name}/{Path(pretrained).name}"
    else:
        return f"{model_name}/{pretrained}"
    return f"{source}@{_weights_hash(model)}"


def _weights_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
