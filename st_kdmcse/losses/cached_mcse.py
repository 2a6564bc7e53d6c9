"""MCSE for large batches."""

from __future__ import annotations

from st_kdmcse.losses.cached import GradientCaching
from st_kdmcse.losses.mcse import MCSELoss


class CachedMCSELoss(GradientCaching, MCSELoss):
    """MCSE with gradient caching, for batches that do not fit in memory otherwise.

    Args:
        model: SentenceTransformer model.
        args: as for :class:`~st_kdmcse.MCSELoss`.
        kwargs: the same by name.
        mini_batch_size: sentences in a forward pass of the student, >= 1: as many as memory allows.
        chunk_rows: anchors whose similarities to all candidates exist at a time, >= 1.
        show_progress_bar: show one for each pass over the mini-batches.

    References:
        - Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021:
          https://arxiv.org/abs/2101.06983
        - MCSE: Multimodal Contrastive Learning of Sentence Embeddings, NAACL 2022: https://arxiv.org/abs/2204.10931

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
        - The value and the gradients of :class:`~st_kdmcse.MCSELoss`, with other draws of dropout masks.
        - :class:`~st_kdmcse.CachedKDMCSELoss` tells what caching saves and costs.

    Example:
        ::

            from st_kdmcse import CachedMCSELoss, FeatureStore, KDMCSETrainer, build_student

            model = build_student("bert-base-uncased")
            store = FeatureStore.open("flickr30k-features")
            loss = CachedMCSELoss(model, features=store, teacher_dim=store.dim, mini_batch_size=128)
            KDMCSETrainer(model=model, train_dataset=store.dataset(), loss=loss).train()
    """
