"""The student: a BERT-like encoder whose [CLS] vector, or mean token vector, is the sentence embedding."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import batch_to_device
from torch import nn

PoolingMode = Literal["cls", "mean"]


def build_student(name_or_path: str, max_seq_length: int = 32, pooling: PoolingMode = "cls") -> SentenceTransformer:
    """A sentence encoder from any BERT-like checkpoint: the last layer's [CLS] vector, before the MLP pooler.

    Args:
        name_or_path: a hub name or local folder of a BERT, RoBERTa, MiniLM, ... encoder, or of a sentence-transformers
            model, of which the encoder is taken.
        max_seq_length: tokens after which sentences are cut off (32 in the paper).
        pooling: "cls" (the paper's), or "mean" over the tokens, for a model that was trained with it.

    Returns:
        Transformer + Pooling, which saves as a stock sentence-transformers model.

    Raises:
        ValueError: if the model has no [CLS] token, or fewer positions than ``max_seq_length``.
    """
    transformer = Transformer(name_or_path, max_seq_length=max_seq_length)
    config = transformer.auto_model.config
    if getattr(transformer.tokenizer, "cls_token", None) is None or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name_or_path} ({config.model_type}) has no [CLS] token to pool: use an encoder such as BERT or RoBERTa"
        )
    positions = _positions(transformer.auto_model)
    if not 2 <= max_seq_length <= (positions or max_seq_length):
        raise ValueError(
            f"max_seq_length must be from 2 to the {positions} positions of {name_or_path}, got {max_seq_length}"
        )
    transformer.float()  # a checkpoint in half precision would be trained in it, and small updates be rounded away
    student = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), pooling)])
    if not Path(name_or_path).is_dir():
        student.model_card_data.set_base_model(name_or_path)
    return student


def views_differ(student: SentenceTransformer) -> bool:
    """Whether a sentence has another embedding each time in training, from which the text loss learns.

    Args:
        student: any sentence-transformers model; its mode and the random numbers stay as they are.
    """
    features = batch_to_device(student.preprocess(["Is there dropout?"]), student.device)
    was_training = student.training
    student.train()
    devices = [student.device] if student.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        first, second = (student(dict(features))["sentence_embedding"] for _ in range(2))
    student.train(was_training)
    return not torch.equal(first, second)


def _positions(encoder: nn.Module) -> int | None:
    """How many tokens the encoder can number; None where any number goes."""
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        number = getattr(encoder.config, "max_position_embeddings", None) or 0
        return number if number > 0 else None  # XLNet, which has no limit, says -1
    # RoBERTa and its like number positions from the one after the padding index.
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
