"""SimCSE for large batches."""

from __future__ import annotations

from st_kdmcse.losses.cached import GradientCaching
from st_kdmcse.losses.simcse import SimCSELoss


class CachedSimCSELoss(GradientCaching, SimCSELoss):
    """SimCSE with gradient caching, for batches that do not fit in memory otherwise.

    Args:
        model: SentenceTransformer model.
        args: as for :class:`~st_kdmcse.SimCSELoss`.
        kwargs: the same by name.
        mini_batch_size: sentences in a forward pass of the student, >= 1: as many as memory allows.
        chunk_rows: anchors whose similarities to all candidates exist at a time, >= 1.
        show_progress_bar: show one for each pass over the mini-batches.

    References:
        - Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021:
          https://arxiv.org/abs/2101.06983
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

    Relations:
        - The value and the gradients of :class:`~st_kdmcse.SimCSELoss`, with other draws of dropout masks.
        - ``CachedMultipleNegativesRankingLoss`` on (sentence, sentence) pairs is the same without the head.
        - :class:`~st_kdmcse.CachedKDMCSELoss` tells what caching saves and costs.

    Example:
        ::

            from datasets import Dataset
            from sentence_transformers import SentenceTransformerTrainer
            from st_kdmcse import CachedSimCSELoss, build_student

            model = build_student("bert-base-uncased")
            dataset = Dataset.from_dict({"sentence": ["It rains.", "A dog runs.", "Two men talk."]})
            loss = CachedSimCSELoss(model, mini_batch_size=128)
            SentenceTransformerTrainer(model=model, train_dataset=dataset, loss=loss).train()
    """
