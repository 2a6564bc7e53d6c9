"""MCSE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sentence_transformers import SentenceTransformer

from st_kdmcse.config import KDMCSEConfig
from st_kdmcse.losses.citations import MCSE, SIMCSE
from st_kdmcse.losses.grounded import GroundedLoss, Modality

if TYPE_CHECKING:
    from st_kdmcse.data.store import FeatureStore


class MCSELoss(GroundedLoss):
    """MCSE: SimCSE, and InfoNCE between each dropout view of a caption and its image in a shared space.

    A batch without labels is plain text and gets the SimCSE loss alone.

    Args:
        model: SentenceTransformer model.
        multimodal_weight: lambda, the weight of the cross-modal terms, >= 0.
        temperature: of the cross-modal terms, > 0.
        text_temperature: of the text loss, > 0.
        text_margin: a fixed margin in radians on the negatives of the text loss; 0 is MCSE.
        use_captions: add the same term against the teacher's features of the caption ("MCSE + CLIP text").
        projection_dim: width of the shared space.
        teacher_dim: width T of the teacher features.
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
            loss = MCSELoss(model, features=store, teacher_dim=store.dim)
            KDMCSETrainer(model=model, train_dataset=store.dataset(), loss=loss).train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        multimodal_weight: float = 0.01,
        temperature: float = 0.05,
        text_temperature: float = 0.05,
        text_margin: float = 0.0,
        use_captions: bool = False,
        projection_dim: int = 256,
        teacher_dim: int = 512,
        features: FeatureStore | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        config = KDMCSEConfig(
            margin=0.0,
            filter_negatives=False,
            modality_reduction="sum",
            multimodal_weight=multimodal_weight,
            temperature=temperature,
            text_temperature=text_temperature,
            text_margin=text_margin,
            projection_dim=projection_dim,
        )
        modalities: tuple[Modality, ...] = ("image", "text") if use_captions else ("image",)
        super().__init__(model, config, modalities, teacher_dim, features, gather_across_devices)

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        names = ("multimodal_weight", "temperature", "text_temperature", "text_margin", "projection_dim")
        options = {name: getattr(self.config, name) for name in names}
        return {**options, "use_captions": "text" in self.modalities, **super().get_config_dict()}

    @property
    def citation(self) -> str:
        """BibTeX."""
        return MCSE + SIMCSE
