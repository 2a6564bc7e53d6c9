"""The step-ratio schedule through stock ``SentenceTransformer.fit``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from st_kdmcse.losses.base import TwoViewLoss
from st_kdmcse.losses.grounded import GroundedLoss
from st_kdmcse.training.examples import MultimodalInputExample, check_examples
from st_kdmcse.training.schedule import pair_interval


def fit_objectives(
    text_loader: DataLoader[Any], pair_loader: DataLoader[Any], loss: TwoViewLoss, pair_every: int | None = None
) -> list[tuple[DataLoader[Any], TwoViewLoss]]:
    """Objectives for ``fit`` that draw a pair batch at every p-th step and text batches at the others (Algorithm 1).

    ``fit`` takes a batch of each objective in turn and ends with the shortest. So the sentences are dealt out to p - 1
    loaders, and each loader is filled up by repeating its first examples until all are equally long: an epoch passes
    over both sources at least once. A repeated example can meet itself in a batch, where it is its own negative; the
    schedule of :class:`~st_kdmcse.KDMCSETrainer` avoids that. ``fit`` saves no heads: with ``resume_from_checkpoint``
    the loss raises ValueError at the first step, where that trainer goes on exactly.

    Args:
        text_loader: a loader of ``InputExample(texts=[sentence])``.
        pair_loader: a loader of :class:`~st_kdmcse.MultimodalInputExample`, with the same batch size (``fit`` has one).
        loss: the one loss object that serves both.
        pair_every: p, at least 2; None computes ceil(sentences / pairs).

    Returns:
        p objectives for ``model.fit(train_objectives=...)``.

    Raises:
        ValueError: for unequal batch sizes, too few examples for a batch, or an example that does not fit, by position.

    Example:
        ::

            objectives = fit_objectives(text_loader, pair_loader, KDMCSELoss(model, features=store))
            model.fit(train_objectives=objectives, epochs=3, warmup_steps=0, weight_decay=0.0)
    """
    batch_size = text_loader.batch_size
    if batch_size is None or batch_size != pair_loader.batch_size:
        raise ValueError(f"fit has one batch size, got loaders of {batch_size} and {pair_loader.batch_size}")
    texts, pairs = _examples(text_loader), _examples(pair_loader)
    for position, example in enumerate(texts):
        if len(example.texts) != 1 or not isinstance(example.texts[0], str):
            raise ValueError(f"text example {position} must have one sentence in texts, got {example.texts!r}")
        if isinstance(example, MultimodalInputExample) or np.any(np.asarray(example.label) != 0):
            raise ValueError(f"text example {position} has a label, which the loss would take for a row: leave it out")
    if isinstance(loss, GroundedLoss):
        check_examples(pairs, loss.teacher_dim, loss.features)
    every = pair_interval(len(texts), len(pairs), pair_every)
    sources = [texts[part :: every - 1] for part in range(every - 1)] + [pairs]
    for name, source in (("sentences", min(sources[:-1], key=len)), ("pairs", pairs)):
        if len(source) < batch_size:
            raise ValueError(
                f"{len(texts)} sentences and {len(pairs)} pairs at one pair batch in {every} leave {len(source)} "
                f"{name} for a loader, fewer than the batch size of {batch_size}: take smaller batches or another "
                "`pair_every`"
            )
    count = max(-(-len(source) // batch_size) for source in sources) * batch_size
    return [
        (DataLoader(_repeat(source, count), batch_size=batch_size, shuffle=True), loss)  # type: ignore[arg-type]
        for source in sources
    ]


def _examples(loader: DataLoader[Any]) -> list[Any]:
    return [loader.dataset[position] for position in range(len(loader.dataset))]  # type: ignore[arg-type]


def _repeat(source: Sequence[Any], count: int) -> list[Any]:
    """The first ``count`` elements of ``source`` repeated without end."""
    return [source[position % len(source)] for position in range(count)]
