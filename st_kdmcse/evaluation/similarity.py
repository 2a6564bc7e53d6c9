"""The stock evaluator of sentence pairs, for a model that is scored again and again while it is trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

from st_kdmcse.data.sts import STSPairs
from st_kdmcse.encoding import Batch, computing, encode_batches, token_batches


class TokenizedSimilarityEvaluator(EmbeddingSimilarityEvaluator):
    """``EmbeddingSimilarityEvaluator`` with the sentences tokenized once, for a model that is evaluated repeatedly.

    Batches hold sentences of similar length, with little padding, and stay on the model's device. Scores
    are those of the stock evaluator up to the rounding of batches of other shapes; inside of an autocast context in
    bfloat16, as in a training of that precision, they are computed in it.

    Args:
        args: as for ``EmbeddingSimilarityEvaluator``.
        kwargs: likewise; with ``precision`` or ``truncate_dim`` it does what that does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._batches: dict[int, list[Batch]] = {}
        self._made_for: tuple[Any, ...] = ()

    def embed_inputs(
        self, model: SentenceTransformer, sentences: str | list[str] | npt.NDArray[Any], **kwargs: Any
    ) -> npt.NDArray[np.float32]:
        """(n, dimension) embeddings of n sentences.

        Args:
            model: any sentence-transformers model.
            sentences: n sentences, of the evaluator.
            kwargs: for ``model.encode``; with any, that does the work.
        """
        if kwargs or self.precision or self.truncate_dim or not isinstance(sentences, list):
            encoded: npt.NDArray[np.float32] = super().embed_inputs(model, sentences, **kwargs)
            return encoded
        made_for = (getattr(model[0], "tokenizer", None), model.max_seq_length, model.device, model.default_prompt_name)
        if made_for != self._made_for:
            self._batches, self._made_for = {}, made_for
        if id(sentences) not in self._batches:
            self._batches[id(sentences)] = list(token_batches(model, sentences))
        batches = self._batches[id(sentences)]
        read = lambda output: {"": output["sentence_embedding"]}  # noqa: E731
        device = model.device.type
        in_half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        with computing(model, "bfloat16" if in_half else "float32") as encoder:
            return encode_batches(encoder, batches, len(sentences), read, lambda _: None)[""]


def sts_evaluator(pairs: STSPairs, name: str) -> TokenizedSimilarityEvaluator:
    """The evaluator of sentence pairs, whose main score is the Spearman correlation of cosines with the gold.

    Args:
        pairs: the sentences and their gold scores.
        name: of the evaluator, such as "sts-dev"; it begins the names of the metrics.
    """
    return TokenizedSimilarityEvaluator(pairs.sentences1, pairs.sentences2, pairs.scores, name=name)


def spearman_by_size(
    evaluator: TokenizedSimilarityEvaluator, model: SentenceTransformer, sizes: Sequence[int]
) -> dict[int, float]:
    """The main score of the first dimensions of embeddings, from -1 to 1; the model's card gets each as ``NAME-SIZE``.

    Args:
        evaluator: of sentence pairs, which are encoded once for all sizes.
        model: any sentence-transformers model.
        sizes: numbers of dimensions, as ``truncate_dim`` of the model.
    """
    if not sizes:
        return {}
    whole = {id(each): evaluator.embed_inputs(model, each) for each in (evaluator.sentences1, evaluator.sentences2)}
    return {size: spearman(_OfEmbeddings(evaluator, whole, size), model) for size in sizes}


class _OfEmbeddings(EmbeddingSimilarityEvaluator):
    """The stock evaluator of embeddings that are there already, of which it reads the first dimensions."""

    def __init__(
        self, evaluator: EmbeddingSimilarityEvaluator, whole: Mapping[int, npt.NDArray[np.float32]], size: int
    ) -> None:
        name = f"{evaluator.name}-{size}"
        super().__init__(evaluator.sentences1, evaluator.sentences2, evaluator.scores, name=name, truncate_dim=size)
        self._whole = whole

    def embed_inputs(self, model: SentenceTransformer, sentences: Any, **kwargs: Any) -> npt.NDArray[np.float32]:
        return self._whole[id(sentences)][:, : self.truncate_dim]


def spearman(evaluator: EmbeddingSimilarityEvaluator, model: SentenceTransformer) -> float:
    """The main score of a model, from -1 to 1.

    Raises:
        ValueError: if it is undefined: the model gives all pairs one similarity.
    """
    score = float(evaluator(model)[f"{evaluator.name}_spearman_cosine"])
    if not math.isfinite(score):
        raise ValueError(
            f"the score on {evaluator.name} is not a number: `model` gives all pairs of sentences the same similarity, "
            "or embeddings that are not finite"
        )
    return score
