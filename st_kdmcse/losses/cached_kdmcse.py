"""KDMCSE for large batches."""

from __future__ import annotations

from st_kdmcse.losses.cached import GradientCaching
from st_kdmcse.losses.kdmcse import KDMCSELoss


class CachedKDMCSELoss(GradientCaching, KDMCSELoss):
    """KDMCSE with gradient caching, for batches whose activations or similarity matrices do not fit in memory.

    Value and gradients are those of :class:`~st_kdmcse.KDMCSELoss`; only the draw of dropout masks differs, as the
    student sees the batch in other parts. Memory grows with mini_batch_size, with chunk_rows times the candidates, and
    with the embeddings of the batch. The price is a second forward pass of the student in each step.

    Args:
        model: SentenceTransformer model.
        args: as for :class:`~st_kdmcse.KDMCSELoss`: config, teacher_dim, features, gather_across_devices.
        kwargs: the same by name.
        mini_batch_size: sentences in a forward pass of the student, >= 1: as many as memory allows.
        chunk_rows: anchors whose similarities to all candidates exist at a time, >= 1.
        show_progress_bar: show one for each pass over the mini-batches.

    References:
        - Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021:
          https://arxiv.org/abs/2101.06983
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
        - Where a batch fits, :class:`~st_kdmcse.KDMCSELoss` is faster.
        - Gradients accumulated over several steps are no substitute: each step has its own few negatives.

    Relations:
        - ``CachedMultipleNegativesRankingLoss`` does the same for the stock loss.
        - :class:`~st_kdmcse.CachedMCSELoss` and :class:`~st_kdmcse.CachedSimCSELoss` are its ablations.

    Example:
        ::

            from datasets import DatasetDict
            from sentence_transformers import SentenceTransformerTrainingArguments
            from st_kdmcse import CachedKDMCSELoss, FeatureStore, KDMCSETrainer, build_student, read_sentences

            model = build_student("bert-base-uncased")
            store = FeatureStore.open("flickr30k-features")
            data = DatasetDict(text=read_sentences("wiki1m_for_simcse.txt"), pairs=store.dataset())
            loss = CachedKDMCSELoss(model, teacher_dim=store.dim, features=store, mini_batch_size=128)
            arguments = SentenceTransformerTrainingArguments("out", per_device_train_batch_size=4096)
            KDMCSETrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()
    """
