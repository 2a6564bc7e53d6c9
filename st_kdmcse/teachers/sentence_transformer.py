"""sentence-transformers models as teachers: of images and captions where they take both, else of captions alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from st_kdmcse.encoding import Matrix, as_texts, computing, encoding_precision
from st_kdmcse.precision import Precision
from st_kdmcse.teachers.base import (
    ModelTeacher,
    Pixels,
    Preprocess,
    TeacherImage,
    TeacherPrecision,
    check_tokenizer,
    loading,
    weights_hash,
)

if TYPE_CHECKING:
    from PIL import Image

_MOST_PIXELS = 4_000_000


class SentenceTransformerTeacher(ModelTeacher):
    """A sentence-transformers model as a frozen encoder of texts, and of images if it takes them.

    CLIP, SigLIP and vision-language models (such as Qwen3-VL-Embedding) take both, and so does what
    :func:`~st_kdmcse.training.text_image.export_text_image` writes. Images of more than 4 million pixels are scaled
    down before the model prepares them.

    Attributes:
        model: the model, frozen.

    Args:
        model: name on the hub (``sentence-transformers/clip-ViT-B-32``), a folder, or a model that is loaded, which is
            then not renamed by its weights.
        device: torch device; by default CUDA where there is a CUDA device, else the CPU.
        batch_size: images or texts in one forward pass.
        precision: of the forward pass; "auto" is what the device is fastest at.

    Raises:
        FileNotFoundError: if there is no such model.

    Example:
        ::

            teacher = SentenceTransformerTeacher("sentence-transformers/clip-ViT-B-32")
            images = teacher.encode_images(["dog.jpg", "cat.jpg"])  # (2, 512)
            texts = SentenceTransformerTeacher("sentence-transformers/all-mpnet-base-v2")
            combined = CombinedTeacher(images=OpenCLIPTeacher(), texts=texts)
    """

    def __init__(
        self,
        model: str | Path | SentenceTransformer,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        precision: TeacherPrecision = "auto",
    ) -> None:
        super().__init__(device, batch_size, precision)
        if isinstance(model, SentenceTransformer):
            loaded, self.name = model, "sentence-transformers:a loaded model"
        else:
            name = str(model)
            with loading(name):
                loaded = SentenceTransformer(name, device="cpu", model_kwargs={"dtype": torch.float32})
            check_tokenizer(lambda texts: loaded.preprocess(as_texts(loaded, texts))["input_ids"], name)
            source = Path(name).resolve().name if Path(name).is_dir() else name
            self.name = f"sentence-transformers:{source}@{weights_hash(loaded)}"
        self.knows_images = self.shared_space = loaded.supports("image")
        self.model: SentenceTransformer = self._freeze(loaded)
        self.dim = int(self._forward(self._text_features, ["a"]).shape[1])

    @property
    def preprocess(self) -> Preprocess:
        """Makes (3, H, W) uint8 pixels of an image, in its own size; the model prepares them.

        Raises:
            ValueError: if the model takes no images.
        """
        self._check_images()
        return _rgb

    def encode_pixels(self, pixels: Pixels) -> torch.Tensor:
        """See :meth:`~st_kdmcse.teachers.base.Teacher.encode_pixels`; images may be of several sizes."""
        self._check_images()
        return self._forward(self._encode, [_picture(each) for each in pixels])

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        return self._encode(as_texts(self.model, texts))

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._encode([_picture(each) for each in pixels])

    def _encode(self, inputs: Sequence[object]) -> torch.Tensor:
        features: torch.Tensor = self.model.encode(
            inputs,
            batch_size=len(inputs),
            convert_to_tensor=True,
            show_progress_bar=False,
            device=str(self.device),
        )
        return features

    def _check_images(self) -> None:
        if not self.knows_images:
            raise ValueError(
                f"the teacher {self.name} knows no images: take it for the captions only, with an image teacher beside "
                "it (`text_teacher`, or CombinedTeacher)"
            )


def encode_images(
    model: SentenceTransformer,
    images: Sequence[TeacherImage],
    show_progress_bar: bool | None = None,
    precision: Precision = "float32",
) -> Matrix:
    """Embeddings of images by a model that takes them.

    Args:
        model: it is not changed.
        images: n PIL images, files, slices of files, or encoded bytes; read batch by batch.
        show_progress_bar: None shows one in a terminal, after two seconds.
        precision: as for :func:`~st_kdmcse.encoding.encode_distinct`.

    Returns:
        (n, dimension) float32, not normalised.

    Raises:
        ValueError: if an image cannot be read, or its embedding is not finite, naming it; if the model takes no images.
    """
    computed = encoding_precision(model, precision, len(images))
    with computing(model, computed) as encoder:
        teacher = SentenceTransformerTeacher(encoder, model.device, precision=computed)
        found = teacher.encode_images(images, show_progress_bar)
    broken = ~np.isfinite(found).all(axis=1)
    if broken.any():
        raise ValueError(
            f"the model's embedding of {images[int(broken.argmax())]} is not finite: the model's weights are damaged, "
            "or training has diverged"
        )
    return found


def _rgb(image: Image.Image) -> torch.Tensor:
    colours = image.convert("RGB")
    shrink = (_MOST_PIXELS / (colours.width * colours.height)) ** 0.5
    if shrink < 1:
        colours = colours.resize((max(1, int(colours.width * shrink)), max(1, int(colours.height * shrink))))
    return torch.from_numpy(np.array(colours)).permute(2, 0, 1).contiguous()


def _picture(pixels: torch.Tensor | np.ndarray) -> Image.Image:
    from PIL import Image

    return Image.fromarray(np.asarray(pixels.cpu() if isinstance(pixels, torch.Tensor) else pixels).transpose(1, 2, 0))
