"""MCSE."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sentence_transformers import SentenceTransformer

from st_kdmcse.config import MCSEConfig
from st_kdmcse.losses.citations import MCSE, SIMCSE
from st_kdmcse.losses.grounded import GroundedLoss, Modality

if TYPE_CHECKING:
    from st_kdmcse.data.store import FeatureStore


class MCSELoss(GroundedLoss):
    """MCSE: SimCSE, and InfoNCE between each dropout view of a caption and its image in a shared space.

    A batch without labels is plain text and gets the SimCSE loss alone.

    Args:
        model: SentenceTransformer model.
        config: the options.
        use_captions: add the same term against the teacher's features of the caption ("MCSE + CLIP text").
        teacher_dim: width T of the teacher features; None is that of ``features``, or 512 (CLIP ViT-B/32) without.
        features: the :class:`~st_kdmcse.FeatureStore` that row numbers refer to.
        gather_across_devices: use the batches of all processes as negatives.

    References:
        - MCSE: Multimodal Contrastive Learning of Sentence Embeddings, NAACL 2022: https://arxiv.org/abs/2204.10931
        - "MCSE + CLIP text" is from Table 5 of KDMCSE, NAACL 2024: https://arxiv.org/abs/2403.17486

    Requirements:
        1. A model with dropout.
        2. Features of the captions and their images from one frozen teacher.

    Inputs:
        +------------------+----------------------------------------------------------------------------+
        | Texts            | Labels                                                                     |
        +==================+============================================================================+
        | single sentences | none: the text loss alone                                                  |
        +------------------+----------------------------------------------------------------------------+
        | single captions  | row numbers of ``features``, (N,) or (N, 1)                                |
        +------------------+----------------------------------------------------------------------------+
        | single captions  | image and text features side by side, (N, 2 T)                             |
        +------------------+----------------------------------------------------------------------------+

    Relations:
        - :class:`~st_kdmcse.KDMCSELoss` adds the caption term, the adaptive margin and the filter.

    Example:
        ::

            from st_kdmcse import FeatureStore, KDMCSETrainer, MCSELoss, build_student

            model = build_student("bert-base-uncased")
            store = FeatureStore.open("flickr30k-features")
            loss = MCSELoss(model, features=store)
            KDMCSETrainer(model=model, train_dataset=store.dataset(), loss=loss).train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        config: MCSEConfig = MCSEConfig(),  # noqa: B008 - frozen
        use_captions: bool = False,
        teacher_dim: int | None = None,
        features: FeatureStore | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        modalities: tuple[Modality, ...] = ("image", "text") if use_captions else ("image",)
        super().__init__(model, config.as_kdmcse(), modalities, teacher_dim, features, gather_across_devices)
        self.options = config

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {**asdict(self.options), "use_captions": "text" in self.modalities, **super().get_config_dict()}

    @property
    def citation(self) -> str:
        """BibTeX."""
        return MCSE + SIMCSE
