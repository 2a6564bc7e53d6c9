"""Gradient caching: the losses for batches that do not fit in memory.

One technique for three losses, and the classes that carry it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from st_kdmcse.losses.base import AnchorLoss, AnchorTensors, TwoViewLoss, Views
from st_kdmcse.losses.citations import GRADIENT_CACHE
from st_kdmcse.losses.components import LossComponents
from st_kdmcse.losses.kdmcse import KDMCSELoss
from st_kdmcse.losses.mcse import MCSELoss
from st_kdmcse.losses.simcse import SimCSELoss
from st_kdmcse.upstream import CachedLossDecorator, CachedLossMixin, RandContext, backward_of_mini_batches, shrink


class GradientCaching(CachedLossMixin, TwoViewLoss):
    """A mixin that computes a loss in parts, so that neither activations nor similarity matrices exist as a whole.

    Put before a loss class, it changes how that loss is computed and not its value. The student embeds the batch
    without gradient, a mini-batch at a time. Everything after that, heads included, is an ordinary graph over the
    embeddings. It holds the similarities of ``chunk_rows`` anchors at a time and computes them again in the backward
    pass. When the gradient reaches the embeddings, the student runs again over each mini-batch, with gradient, and with
    the dropout masks and the autocast of the first pass.

    Args:
        model: the student.
        mini_batch_size: sentences in a forward pass of the student, >= 1.
        chunk_rows: anchors whose similarities to all candidates exist at a time, >= 1.
        show_progress_bar: show one for each pass over the mini-batches.
        args: as for the loss.
        kwargs: as for the loss.

    Raises:
        ValueError: for sizes below 1.

    References:
        - Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021:
          https://arxiv.org/abs/2101.06983
    """

    embed_minibatch_iter: Callable[..., Iterator[tuple[Tensor, RandContext]]]

    def __init__(
        self,
        model: SentenceTransformer,
        *args: Any,
        mini_batch_size: int = 32,
        chunk_rows: int = 512,
        show_progress_bar: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, *args, **kwargs)
        for name, value in (("mini_batch_size", mini_batch_size), ("chunk_rows", chunk_rows)):
            if value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}")
        self.mini_batch_size = mini_batch_size
        self.chunk_rows = chunk_rows
        self.show_progress_bar = show_progress_bar

    def embed(self, columns: list[dict[str, Tensor]]) -> Views:
        """The two views, without a graph of the student: a hook on them runs it again in the backward pass."""
        with_grad = torch.is_grad_enabled()
        device = next(self.parameters()).device.type
        # With its cache, autocast hands weights that were cast without gradient to the later pass with gradient.
        autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
        )
        with autocast:
            passes = [
                list(self.embed_minibatch_iter(column, with_grad=False, copy_random_state=with_grad))
                for column in columns
            ]
        embeddings = torch.cat([rows for mini_batches in passes for rows, _ in mini_batches])
        if with_grad:
            sizes = [[len(rows) for rows, _ in mini_batches] for mini_batches in passes]
            conditions = [[_Conditions(random, autocast) for _, random in mini_batches] for mini_batches in passes]
            embeddings.requires_grad_().register_hook(partial(self._backward_of_student, columns, sizes, conditions))
        first, second = embeddings.chunk(2)
        return first, second

    def _backward_of_student(
        self,
        columns: list[dict[str, Tensor]],
        sizes: list[list[int]],
        conditions: list[list[_Conditions]],
        gradient: Tensor,
    ) -> None:
        """Carry the (2 N, hidden) gradient of the embeddings into the student, a mini-batch at a time."""
        parts = iter(gradient.split([size for column in sizes for size in column]))
        cache = [[next(parts) for _ in column] for column in sizes]
        # The library's function lets DDP average the gradients after the last mini-batch only.
        backward_of_mini_batches(gradient.new_ones(()), columns, self, cache, conditions, [None] * len(columns))

    def text_batch(self, columns: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """As without caching, a mini-batch at a time."""
        count = len(columns[0]["input_ids"])
        parts = []
        for start in range(0, count, self.mini_batch_size):
            rows = slice(start, start + self.mini_batch_size)
            parts.append(
                super().text_batch(
                    [
                        {name: value[rows] if isinstance(value, Tensor) else value for name, value in column.items()}
                        for column in columns
                    ]
                )
            )
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def over_anchors(self, loss: AnchorLoss, anchors: AnchorTensors, offset: int) -> tuple[Tensor, ...]:
        """The mean of a loss over all anchors, and the sums of its counts, from ``chunk_rows`` anchors at a time."""
        count = len(next(iter(anchors.values())))
        results = []
        for parts in zip(*(values.split(self.chunk_rows) for values in anchors.values()), strict=True):
            chunk = dict(zip(anchors, parts, strict=True))
            mean, *counts = checkpoint(loss, chunk, offset, use_reentrant=False, preserve_rng_state=False)
            results.append((mean * (len(parts[0]) / count), *counts))
            offset += len(parts[0])
        return tuple(torch.stack(each).sum() for each in zip(*results, strict=True))

    def compute_loss_from_embeddings(self, views: Views, *args: Any, **kwargs: Any) -> LossComponents:
        """As without caching; inside ``MatryoshkaLoss``, of the views at each of its dimensions."""
        compute = super().compute_loss_from_embeddings
        # MatryoshkaLoss leaves a decorator here, with its dimensions. Calling it would run the backward pass, as in the
        # library's cached losses, and the heads would miss the factor that the loss is multiplied with later.
        matryoshka = vars(self).get("calculate_loss")
        if not isinstance(matryoshka, CachedLossDecorator):
            return compute(views, *args, **kwargs)
        weights = list(zip(matryoshka.matryoshka_dims, matryoshka.matryoshka_weights, strict=True))
        if 0 < matryoshka.n_dims_per_step < len(weights):
            weights = random.sample(weights, matryoshka.n_dims_per_step)
        losses = [
            weight * compute(tuple(shrink(view, dim) for view in views), *args, **kwargs) for dim, weight in weights
        ]
        return sum(losses, start=LossComponents({}))

    def get_config_dict(self) -> dict[str, Any]:
        """The options, for the model card."""
        return {**super().get_config_dict(), "mini_batch_size": self.mini_batch_size, "chunk_rows": self.chunk_rows}

    @property
    def citation(self) -> str:
        """BibTeX."""
        return str(super().citation) + GRADIENT_CACHE


class CachedKDMCSELoss(GradientCaching, KDMCSELoss):
    """KDMCSE with gradient caching, for batches whose activations or similarity matrices do not fit in memory.

    Value and gradients are those of :class:`~st_kdmcse.KDMCSELoss`, which tells options and inputs. Only the
    draw of the dropout masks differs: the student sees the batch in other parts.

    Memory grows with ``mini_batch_size``, with ``chunk_rows`` times the candidates, and with the embeddings of the
    batch. The price is a second forward pass of the student in each step. Gradients accumulated over several steps are
    no substitute: each step has only its own few negatives.

    Args:
        model: SentenceTransformer model.
        args: those of :class:`~st_kdmcse.KDMCSELoss`.
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
        1. Those of :class:`~st_kdmcse.KDMCSELoss`.

    Inputs:
        As for :class:`~st_kdmcse.KDMCSELoss`.

    Relations:
        - :class:`~st_kdmcse.KDMCSELoss` is faster where a batch fits.
        - ``CachedMultipleNegativesRankingLoss`` does the same for the stock loss.

    Example:
        ::

            from datasets import DatasetDict
            from sentence_transformers import SentenceTransformerTrainingArguments
            from st_kdmcse import CachedKDMCSELoss, FeatureStore, KDMCSETrainer, build_student, read_sentences

            model = build_student("bert-base-uncased")
            store = FeatureStore.open("flickr30k-features")
            data = DatasetDict(text=read_sentences("wiki1m_for_simcse.txt"), pairs=store.dataset())
            loss = CachedKDMCSELoss(model, features=store, mini_batch_size=128)
            arguments = SentenceTransformerTrainingArguments("out", per_device_train_batch_size=4096)
            KDMCSETrainer(model=model, args=arguments, train_dataset=data, loss=loss).train()
    """


class CachedMCSELoss(GradientCaching, MCSELoss):
    """MCSE with gradient caching, for batches whose activations or similarity matrices do not fit in memory.

    Value and gradients are those of :class:`~st_kdmcse.MCSELoss`, which tells options and inputs. Only the
    draw of the dropout masks differs: the student sees the batch in other parts.

    Args:
        model: SentenceTransformer model.
        args: those of :class:`~st_kdmcse.MCSELoss`.
        kwargs: the same by name.
        mini_batch_size: sentences in a forward pass of the student, >= 1: as many as memory allows.
        chunk_rows: anchors whose similarities to all candidates exist at a time, >= 1.
        show_progress_bar: show one for each pass over the mini-batches.

    References:
        - Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021:
          https://arxiv.org/abs/2101.06983
        - MCSE: Multimodal Contrastive Learning of Sentence Embeddings, NAACL 2022: https://arxiv.org/abs/2204.10931

    Requirements:
        1. Those of :class:`~st_kdmcse.MCSELoss`.

    Inputs:
        As for :class:`~st_kdmcse.MCSELoss`.

    Relations:
        - :class:`~st_kdmcse.MCSELoss` is faster where a batch fits.
        - ``CachedMultipleNegativesRankingLoss`` does the same for the stock loss.

    Example:
        ::

            from st_kdmcse import CachedMCSELoss, FeatureStore, KDMCSETrainer, build_student

            model = build_student("bert-base-uncased")
            store = FeatureStore.open("flickr30k-features")
            loss = CachedMCSELoss(model, features=store, mini_batch_size=128)
            KDMCSETrainer(model=model, train_dataset=store.dataset(), loss=loss).train()
    """


class CachedSimCSELoss(GradientCaching, SimCSELoss):
    """SimCSE with gradient caching, for batches whose activations or similarity matrices do not fit in memory.

    Value and gradients are those of :class:`~st_kdmcse.SimCSELoss`, which tells options and inputs. Only the
    draw of the dropout masks differs: the student sees the batch in other parts.

    Args:
        model: SentenceTransformer model.
        args: those of :class:`~st_kdmcse.SimCSELoss`.
        kwargs: the same by name.
        mini_batch_size: sentences in a forward pass of the student, >= 1: as many as memory allows.
        chunk_rows: anchors whose similarities to all candidates exist at a time, >= 1.
        show_progress_bar: show one for each pass over the mini-batches.

    References:
        - Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, RepL4NLP 2021:
          https://arxiv.org/abs/2101.06983
        - SimCSE: Simple Contrastive Learning of Sentence Embeddings, EMNLP 2021: https://arxiv.org/abs/2104.08821

    Requirements:
        1. Those of :class:`~st_kdmcse.SimCSELoss`.

    Inputs:
        As for :class:`~st_kdmcse.SimCSELoss`.

    Relations:
        - :class:`~st_kdmcse.SimCSELoss` is faster where a batch fits.
        - ``CachedMultipleNegativesRankingLoss`` does the same for the stock loss.

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


class _Conditions:
    """What a forward pass of the student depends on besides its input: the random state, and autocast."""

    def __init__(self, random: RandContext, autocast: torch.autocast) -> None:
        self.contexts = (random, autocast)

    def __enter__(self) -> None:
        for context in self.contexts:
            context.__enter__()

    def __exit__(self, *error: object) -> None:
        for context in reversed(self.contexts):
            context.__exit__(*error)
