"""SimCSE."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_kdmcse import functional
from st_kdmcse.losses.base import TwoViewLoss
from st_kdmcse.losses.citations import SIMCSE


class SimCSELoss(TwoViewLoss):
    """Unsupervised SimCSE: two dropout views of a sentence are a positive pair, the other sentences the negatives.

    A text head (linear and tanh) stands between the sentence embedding and the loss; the saved model is without it.

    Args:
        model: SentenceTransformer model.
        temperature: divides the cosines, > 0.
        text_margin: a fixed margin in radians on the negatives; 0 is SimCSE, KDMCSE's released code takes 0.15.
        gather_across_devices: use the sentences of all processes as negatives.

    References:
        - SimCSE: Simple Contrastive Learning of Sentence Embeddings, EMNLP 2021: https://arxiv.org/abs/2104.08821

    Requirements:
        1. A model with dropout.

    Inputs:
        +----------------------------------+-------------------------------------+
        | Texts                            | Labels                              |
        +==================================+=====================================+
        | single sentences                 | none (labels are ignored)           |
        +----------------------------------+-------------------------------------+
        | (sentence, sentence) pairs       | none (labels are ignored)           |
        +----------------------------------+-------------------------------------+

    Recommendations:
        - Batches of 64 to 512 sentences; a learning rate of 1e-5 to 3e-5; one to three passes over a million sentences.

    Relations:
        - ``MultipleNegativesRankingLoss`` on (sentence, sentence) pairs is the same without the head and with two
          forward passes.
        - :class:`~st_kdmcse.KDMCSELoss` adds knowledge from CLIP.

    Example:
        ::

            from datasets import Dataset
            from sentence_transformers import SentenceTransformerTrainer
            from st_kdmcse import SimCSELoss, build_student

            model = build_student("bert-base-uncased")
            dataset = Dataset.from_dict({"sentence": ["It rains.", "A dog runs.", "Two men talk."]})
            SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=SimCSELoss(model)).train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        temperature: float = 0.05,
        text_margin: float = 0.0,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, gather_across_devices)
        self.temperature = temperature
        self.text_margin = text_margin

    def text_loss(self, anchors: Tensor, candidates: Tensor, offset: int) -> Tensor:
        """InfoNCE (Eq. 1)."""
        return functional.info_nce_with_margin(
            anchors, candidates, self.text_margin, self.temperature, positive_offset=offset
        )

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        options = {"temperature": self.temperature, "text_margin": self.text_margin}
        return {**options, **super().get_config_dict()}

    @property
    def citation(self) -> str:
        """BibTeX."""
        return SIMCSE
