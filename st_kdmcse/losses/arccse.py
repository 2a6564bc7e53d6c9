"""ArcCSE."""

from __future__ import annotations

from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_kdmcse import functional
from st_kdmcse.losses.base import TwoViewLoss
from st_kdmcse.losses.citations import ARCCSE


class ArcCSELoss(TwoViewLoss):
    """ArcCSE's additive angular margin: SimCSE with a fixed margin on the angle of the positive pair.

    The triplet term of the ArcCSE paper (entailment between masked sentences) is not a part of it.

    Args:
        model: SentenceTransformer model.
        margin: in radians, in [0, pi]; the ArcCSE paper takes 10 degrees.
        temperature: divides the cosines, > 0.
        gather_across_devices: use the sentences of all processes as negatives.

    References:
        - A Contrastive Framework for Learning Sentence Representations from Pairwise and Triple-wise Perspective in
          Angular Space, ACL 2022: https://aclanthology.org/2022.acl-long.336/

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

    Relations:
        - :class:`~st_kdmcse.SimCSELoss` is the same with margin 0.
        - :class:`~st_kdmcse.KDMCSELoss` puts a margin on the negatives instead.

    Example:
        ::

            from datasets import Dataset
            from sentence_transformers import SentenceTransformerTrainer
            from st_kdmcse import ArcCSELoss, build_student

            model = build_student("bert-base-uncased")
            dataset = Dataset.from_dict({"sentence": ["It rains.", "A dog runs.", "Two men talk."]})
            SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=ArcCSELoss(model)).train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        margin: float = 0.1745,
        temperature: float = 0.05,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, gather_across_devices)
        self.margin = margin
        self.temperature = temperature

    def text_loss(self, anchors: Tensor, candidates: Tensor, offset: int) -> Tensor:
        """InfoNCE with the margin on the positive (Eq. 10)."""
        return functional.arc_cse(anchors, candidates, self.margin, self.temperature, positive_offset=offset)

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {"margin": self.margin, "temperature": self.temperature, **super().get_config_dict()}

    @property
    def citation(self) -> str:
        """BibTeX."""
        return ARCCSE
