"""KDMCSE."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from sentence_transformers import SentenceTransformer

from st_kdmcse.config import KDMCSEConfig
from st_kdmcse.losses.citations import KDMCSE, MCSE, SIMCSE
from st_kdmcse.losses.grounded import GroundedLoss

if TYPE_CHECKING:
    from st_kdmcse.data.store import FeatureStore


class KDMCSELoss(GroundedLoss):
    """KDMCSE: SimCSE, and AdapACSE with threshold filtering against CLIP features of the image and of the caption.

    The loss draws each dropout view of a caption to the teacher's image and text features in a shared space. A negative
    carries an angular margin, which is wider the less the teacher finds the pair alike; the filter removes negatives
    that the teacher finds too much alike. A batch without labels is plain text and gets the text loss alone: one loss
    object, with one text head, serves both sources of the training schedule.

    Args:
        model: SentenceTransformer model.
        config: the options; :meth:`KDMCSEConfig.paper` (default) or :meth:`KDMCSEConfig.released`.
        teacher_dim: width T of the teacher features; None is that of ``features``, or 512 (CLIP ViT-B/32) without.
        features: the :class:`~st_kdmcse.FeatureStore` that row numbers refer to.
        gather_across_devices: use the batches of all processes as negatives: the student's embeddings are gathered with
            gradient, the teacher's features without.

    References:
        - KDMCSE: Knowledge Distillation Multimodal Sentence Embeddings with Adaptive Angular margin Contrastive
          Learning, NAACL 2024: https://arxiv.org/abs/2403.17486

    Requirements:
        1. A model with dropout.
        2. Features of the captions and their images from one frozen CLIP model.

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

    Recommendations:
        - Use :class:`~st_kdmcse.KDMCSETrainer`, which mixes text and caption batches, logs how many negatives the
          filter removed, and saves, restores and clips the heads.
        - Real CLIP text-image cosines lie near 0.15 to 0.35, where the paper's threshold of 0.8 removes nothing:
          give ``image_threshold`` a value on that scale, or "auto".

    Relations:
        - :class:`~st_kdmcse.MCSELoss` is its ancestor, :class:`~st_kdmcse.SimCSELoss` its text loss.
        - ``GISTEmbedLoss`` filters by a guide model in the same spirit.

    Example:
        ::

            from datasets import Dataset, DatasetDict
            from st_kdmcse import FeatureStore, KDMCSEConfig, KDMCSELoss, KDMCSETrainer, build_student, read_sentences

            model = build_student("bert-base-uncased")
            store = FeatureStore.open("flickr30k-features")
            data = DatasetDict(text=read_sentences("wiki1m_for_simcse.txt"), pairs=store.dataset())
            loss = KDMCSELoss(model, KDMCSEConfig.paper(margin=0.1), features=store)
            KDMCSETrainer(model=model, train_dataset=data, loss=loss).train()
    """

    def __init__(
        self,
        model: SentenceTransformer,
        config: KDMCSEConfig = KDMCSEConfig.paper(),  # noqa: B008 - frozen
        teacher_dim: int | None = None,
        features: FeatureStore | None = None,
        gather_across_devices: bool = False,
    ) -> None:
        super().__init__(model, config, ("image", "text"), teacher_dim, features, gather_across_devices)

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {**asdict(self.config), **super().get_config_dict()}

    @property
    def citation(self) -> str:
        """BibTeX."""
        return KDMCSE + MCSE + SIMCSE
