"""What the cached losses share: gradient caching of the student, and similarity matrices that exist in part only."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext, _backward_hook
from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator, shrink
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from st_kdmcse.losses.base import Rows, RowsLoss, TwoViewLoss, Views
from st_kdmcse.losses.citations import GRADIENT_CACHE
from st_kdmcse.losses.components import LossComponents


class GradientCaching(CachedLossMixin, TwoViewLoss):
    """A loss whose memory does not grow with the square of the batch, nor with the student's activations of all of it.

    Put before a loss class, it changes how that loss is computed and not its value. The student embeds the batch
    without gradient, a mini-batch at a time. Everything after that, heads included, is an ordinary graph over the
    embeddings, in which the similarity matrices are computed for some anchors at a time, and once more in the backward
    pass. When that has come to the embeddings, the student runs again over each mini-batch, with gradient, with the
    dropout masks and under the autocast of the first time.

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
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.mini_batch_size = mini_batch_size
        self.chunk_rows = chunk_rows
        self.show_progress_bar = show_progress_bar

    def embed(self, columns: list[dict[str, Tensor]]) -> Views:
        """The two views, without a graph of the student: a hook on them runs it again in the backward pass."""
        with_grad = torch.is_grad_enabled()
        device = next(self.parameters()).device.type
        # Older versions of PyTorch hand weights that were cast without gradient to a later pass with gradient.
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
        # The library's own knows when DDP is to average the gradients: after the last mini-batch.
        _backward_hook(gradient.new_ones(()), columns, self, cache, conditions, [None] * len(columns))

    def over_rows(self, rows_loss: RowsLoss, rows: Rows, offset: int) -> tuple[Tensor, ...]:
        """The mean of a loss over all rows, and the sums of its counts, from ``chunk_rows`` rows at a time."""
        count = len(next(iter(rows.values())))
        results = []
        for parts in zip(*(values.split(self.chunk_rows) for values in rows.values()), strict=True):
            chunk = dict(zip(rows, parts, strict=True))
            mean, *counts = checkpoint(rows_loss, chunk, offset, use_reentrant=False, preserve_rng_state=False)
            results.append((mean * (len(parts[0]) / count), *counts))
            offset += len(parts[0])
        return tuple(torch.stack(each).sum() for each in zip(*results, strict=True))

    def compute_loss_from_embeddings(self, views: Views, *args: Any, **kwargs: Any) -> LossComponents:
        """As without caching; inside ``MatryoshkaLoss``, of the views at each of its dimensions."""
        compute = super().compute_loss_from_embeddings
        # MatryoshkaLoss leaves its dimensions here. To call what it leaves would go backward at once, as the library's
        # cached losses do, and gradients of the heads would not know by what the loss is multiplied afterwards.
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
