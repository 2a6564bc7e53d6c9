"""Queries and documents to unit vectors, with the prompts that a model has for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from sentence_transformers import SentenceTransformer

from st_kdmcse.encoding import BATCH_TOKENS, SentenceEmbeddings, length_batches, token_counts
from st_kdmcse.files import progress_bar
from st_kdmcse.search.base import Matrix


def encode_documents(
    model: SentenceTransformer, texts: Sequence[str], pool: Any = None, show_progress_bar: bool | None = None
) -> Matrix:
    """Embeddings of texts to be found.

    Each distinct text is encoded once, in batches of like length.

    Args:
        model: any sentence-transformers model; its prompt for documents is put before each text.
        texts: n texts.
        pool: processes of ``model.start_multi_process_pool`` to share the work.
        show_progress_bar: None shows one in a terminal, once it has taken two seconds; there is none with a pool.

    Returns:
        (n, dimension) float32 of length 1.

    Raises:
        ValueError: if a text is empty or an embedding is not finite; names the text.
    """
    return _encode(model.encode_document, model, texts, "text", pool, show_progress_bar)


def encode_queries(model: SentenceTransformer, queries: Sequence[str]) -> Matrix:
    """Embeddings of queries, as :func:`encode_documents`, with the model's prompt for queries."""
    return _encode(model.encode_query, model, queries, "query")


def _encode(
    encode: Any,
    model: SentenceTransformer,
    texts: Sequence[str],
    what: str,
    pool: Any = None,
    show: bool | None = False,
) -> Matrix:
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{what} {number} is {text!r}: expected a text that is not empty")
    distinct = list(dict.fromkeys(texts))
    lengths = token_counts(model, distinct)
    matrix = np.empty((len(distinct), model.get_embedding_dimension()), dtype=np.float32)
    settings = {"normalize_embeddings": True, "show_progress_bar": False}
    was_training = model.training
    try:
        if pool is not None:
            order = np.argsort(-lengths, kind="stable")
            matrix[order] = encode([distinct[row] for row in order], pool=pool, **settings)
        else:
            budget = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
            with progress_bar(len(distinct), "Encoding", "text", show) as progress:
                for rows in length_batches(lengths, budget):
                    matrix[rows] = encode([distinct[row] for row in rows], batch_size=len(rows), **settings)
                    progress.update(len(rows))
    finally:
        model.train(was_training)
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if bad.size:
        raise ValueError(
            f"the model's embedding of {distinct[bad[0]][:200]!r} is not finite: its weights are damaged, or training "
            "has diverged"
        )
    return SentenceEmbeddings(distinct, matrix)(texts)
