"""The collator for columns of sentences and row numbers."""

from __future__ import annotations

from dataclasses import dataclass, field

from sentence_transformers.base.data_collator import DEFAULT_LABEL_COLUMNS
from sentence_transformers.sentence_transformer.data_collator import SentenceTransformerDataCollator

from st_kdmcse.training.schedule import ROW_COLUMN


@dataclass
class KDMCSEDataCollator(SentenceTransformerDataCollator):
    """Tokenizes the text column and hands the ``row`` column to the loss as labels, (N,) int64."""

    valid_label_columns: list[str] = field(default_factory=lambda: [ROW_COLUMN, *DEFAULT_LABEL_COLUMNS])
