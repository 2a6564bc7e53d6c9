"""Batches from tokens on disk: those of the collator, without reading and tokenizing sentences again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch import Tensor

from st_kdmcse.data.tokens import TokenTable
from st_kdmcse.training.collator import KDMCSEDataCollator
from st_kdmcse.training.schedule import ROW_COLUMN, pair_rows

_COMPARED = 64


class TokenBatches(torch.utils.data.Dataset[dict[str, Any]]):
    """Concatenated sources of sentences, of which whole batches are taken: ``__getitems__`` gives one, collated.

    Args:
        sources: one a dataset, in their order.
    """

    def __init__(self, sources: Sequence[_Source]) -> None:
        self._sources = list(sources)
        self._ends = np.cumsum([len(source.tokens) for source in sources])

    @classmethod
    def of(
        cls,
        datasets: Sequence[Dataset],
        model: SentenceTransformer,
        collator: KDMCSEDataCollator,
        cache_dir: str | Path | None = None,
        multiple_of: int = 1,
        show_progress_bar: bool | None = None,
    ) -> TokenBatches:
        """Tokenize what was not tokenized before, and compare the first batch of each dataset with the collator's.

        Args:
            datasets: with a column of sentences and optionally ``row``.
            model: the student.
            collator: that it is trained with.
            cache_dir: see :meth:`~st_kdmcse.data.tokens.TokenTable.of`.
            multiple_of: that the lengths of batches are rounded up to.
            show_progress_bar: None shows bars in a terminal, once something has taken two seconds.

        Raises:
            ValueError: if the batches would differ from those of the collator, with the reason.
        """
        if type(collator) is not KDMCSEDataCollator or collator.preprocess_fn != model.preprocess:
            raise ValueError("the collator is not the usual one")
        if collator.max_length or collator.prompts or collator.router_mapping:
            raise ValueError("the collator has its own prompts, routes or lengths")
        sources = [_source(each, model, collator, cache_dir, show_progress_bar) for each in datasets]
        return cls([replace(source, multiple_of=multiple_of) for source in sources])

    def __len__(self) -> int:
        """Number of sentences."""
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Any]:
        """The batch of some sentences of one source."""
        number = int(np.searchsorted(self._ends, indices[0], side="right"))
        source = self._sources[number]
        return source.batch(np.asarray(indices) - (self._ends[number] - len(source.tokens)))


@dataclass(frozen=True)
class _Source:
    """Tokens of a dataset, and what its batches hold beside them.

    Attributes:
        tokens: of the sentences.
        column: name of the sentences.
        padding: the token that fills up.
        labels: (n,) row numbers, or None.
        constant: what is the same in each batch.
        zeros: names of tensors that are zero all over, such as token types.
        multiple_of: that the lengths of batches are rounded up to.
    """

    tokens: TokenTable
    column: str
    padding: int
    labels: npt.NDArray[np.int64] | None
    constant: dict[str, Any]
    zeros: tuple[str, ...]
    multiple_of: int = 1

    def batch(self, rows: npt.NDArray[np.int64]) -> dict[str, Any]:
        ids, mask = self.tokens.batch(rows, self.padding, self.multiple_of)
        batch = {**self.constant, f"{self.column}_input_ids": ids, f"{self.column}_attention_mask": mask}
        batch.update((name, torch.zeros_like(ids)) for name in self.zeros)
        if self.labels is not None:
            batch["label"] = torch.from_numpy(self.labels[rows])
        return batch


def _source(
    dataset: Dataset,
    model: SentenceTransformer,
    collator: KDMCSEDataCollator,
    cache_dir: str | Path | None,
    show: bool | None,
) -> _Source:
    column = next(name for name in dataset.column_names if name != ROW_COLUMN)
    tokenizer = getattr(model[0], "tokenizer", None)
    if getattr(tokenizer, "padding_side", "right") != "right":
        raise ValueError("the tokenizer fills up on the left")
    some = [dataset[row] for row in range(min(_COMPARED, len(dataset)))]
    wanted = collator(some)
    if not {f"{column}_input_ids", f"{column}_attention_mask"} <= wanted.keys():
        raise ValueError(f"its batches hold {', '.join(sorted(wanted))}")  # such as flattened ones, of flash attention
    zeros = tuple(name for name, value in wanted.items() if _is_zero(value) and name.startswith(f"{column}_"))
    labels = None
    if ROW_COLUMN in dataset.column_names:
        labels = pair_rows(dataset)
    constant = {name: value for name, value in wanted.items() if not isinstance(value, Tensor)}
    tokens = TokenTable.of(dataset, column, model.preprocess, tokenizer, model.max_seq_length, cache_dir, show)
    source = _Source(tokens, column, getattr(tokenizer, "pad_token_id", None) or 0, labels, constant, zeros)
    made = source.batch(np.arange(len(some)))
    if made.keys() != wanted.keys():
        raise ValueError(f"its batches hold {', '.join(sorted(wanted))}")
    for name, value in made.items():
        same = torch.equal(value, wanted[name]) if isinstance(value, Tensor) else value == wanted[name]
        if not same:
            raise ValueError(f"{name} differs from that of the collator")
    return source


def _is_zero(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and not value.any()
