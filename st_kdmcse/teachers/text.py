"""sentence-transformers models as teachers of captions."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import torch

from st_kdmcse.teachers.base import ModelTeacher, Preprocess, TeacherPrecision, check_tokenizer, loading, weights_hash


class SentenceTransformerTeacher(ModelTeacher):
    """A sentence-transformers model as a frozen encoder of texts; it knows no images.

    Args:
        model: name on the hub (``sentence-transformers/all-mpnet-base-v2``) or a folder.
        device: torch device; by default CUDA where there is a CUDA device, else the CPU.
        batch_size: texts in one forward pass.
        precision: of the forward pass; "auto" is what the device is fastest at.

    Raises:
        FileNotFoundError: if there is no such model.

    Example:
        ::

            texts = SentenceTransformerTeacher("sentence-transformers/all-mpnet-base-v2")
            teacher = CombinedTeacher(images=OpenCLIPTeacher(), texts=texts)
    """

    shared_space = False
    knows_images = False

    def __init__(
        self,
        model: str | Path,
        device: str | torch.device | None = None,
        batch_size: int = 64,
        precision: TeacherPrecision = "auto",
    ) -> None:
        from sentence_transformers import SentenceTransformer

        super().__init__(device, batch_size, precision)
        name = str(model)
        with loading(name):
            loaded = SentenceTransformer(name, device="cpu", model_kwargs={"dtype": torch.float32})
        check_tokenizer(lambda texts: loaded.preprocess(texts)["input_ids"], name)
        source = Path(name).resolve().name if Path(name).is_dir() else name
        self.name = f"sentence-transformers:{source}@{weights_hash(loaded)}"
        self._model = self._freeze(loaded)
        self.dim = int(self._forward(self._text_features, ["a"]).shape[1])

    @property
    def preprocess(self) -> Preprocess:
        """Refused.

        Raises:
            ValueError: always.
        """
        self._refuse_images()

    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        self._refuse_images()

    def _text_features(self, texts: list[str]) -> torch.Tensor:
        features: torch.Tensor = self._model.encode(
            texts,
            batch_size=len(texts),
            convert_to_tensor=True,
            show_progress_bar=False,
            device=str(self.device),
        )
        return features

    def _refuse_images(self) -> NoReturn:
        raise ValueError(
            f"the teacher {self.name} knows no images: take it for the captions only, with an image teacher beside it "
            "(CombinedTeacher, or load_teacher with text_teacher)"
        )
