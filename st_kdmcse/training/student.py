"""The student: a BERT-like encoder whose [CLS] vector, or mean token vector, is the sentence embedding."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import batch_to_device, load_file_path
from torch import nn
from transformers import PretrainedConfig

from st_kdmcse.provenance import parameters_checksum

logger = logging.getLogger(__name__)

PoolingMode = Literal["cls", "mean"]


def build_student(name_or_path: str, max_seq_length: int = 32, pooling: PoolingMode = "cls") -> SentenceTransformer:
    """A sentence encoder from any BERT-like checkpoint: the last layer's [CLS] vector, before the MLP pooler.

    Args:
        name_or_path: a hub name or local folder of a BERT, RoBERTa, MiniLM, ... encoder, or of a sentence-transformers
            model, of which the encoder and the prompts are taken.
        max_seq_length: tokens after which sentences are cut off (32 in the paper).
        pooling: "cls" (the paper's), or "mean" over the tokens, for a model that was trained with it.

    Returns:
        Transformer + Pooling, which saves as a stock sentence-transformers model.

    Raises:
        ValueError: if the model has no [CLS] token, or fewer positions than ``max_seq_length``.
    """
    transformer = Transformer(encoder_folder(name_or_path), max_seq_length=max_seq_length)
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
    _keep_prompts(student, name_or_path)
    if not Path(name_or_path).is_dir():
        student.model_card_data.set_base_model(name_or_path)
    return student


def check_matryoshka_dims(student: SentenceTransformer, dims: Sequence[int] | None) -> None:
    """Refuse sizes of embeddings that do not fit a student.

    Args:
        student: any sentence-transformers model.
        dims: the sizes; None fits all.

    Raises:
        ValueError: if one is larger than its embeddings, or their own size is not among them: what lies beyond the
            largest would not be trained.
    """
    if dims is None:
        return
    size = student.get_embedding_dimension()
    if max(dims) != size:
        problem = "must not exceed" if max(dims) > size else "must contain"
        raise ValueError(
            f"`matryoshka_dims` {problem} {size}, the embedding size of `model`: give {size} and smaller sizes, got "
            f"{', '.join(map(str, dims))}"
        )


def encoder_folder(name_or_path: str) -> str:
    """Where the encoder of a model is: in older folders of sentence-transformers, one below (``0_Transformer``).

    Args:
        name_or_path: a hub name or local folder.
    """
    folder = Path(name_or_path)
    inner = sorted(folder.glob("0_*/config.json"))
    return str(inner[0].parent) if inner and not (folder / "config.json").is_file() else name_or_path


def _keep_prompts(student: SentenceTransformer, name_or_path: str) -> None:
    """Give a student the prompts that are saved with a sentence-transformers model; it is trained without them."""
    path = load_file_path(name_or_path, "config_sentence_transformers.json")
    if path is None:
        return
    saved = json.loads(Path(path).read_text(encoding="utf-8"))
    student.prompts = {**student.prompts, **(saved.get("prompts") or {})}
    student.default_prompt_name = saved.get("default_prompt_name")
    if student.default_prompt_name is not None:
        logger.warning(
            "%s puts the prompt %r before each text that it encodes, and is trained without it",
            name_or_path,
            student.prompts[student.default_prompt_name],
        )


def student_checksums(encoder: nn.Module, tokenizer: Any) -> dict[str, str]:
    """What a training starts from, whatever its folder is called: SHA-256 of weights, configuration and tokenizer.

    Args:
        encoder: of transformers.
        tokenizer: that belongs to it.
    """
    config: PretrainedConfig = encoder.config
    ignored = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
    settings = {name: value for name, value in config.to_diff_dict().items() if name not in ignored}
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        vocabulary = sorted(tokenizer.get_vocab().items())
    else:
        vocabulary = json.loads(fast.to_str())
        del vocabulary["truncation"], vocabulary["padding"]  # those of the last call
    return {
        "weights": parameters_checksum(encoder),
        "configuration": _checksum(settings),
        "tokenizer": _checksum(vocabulary),
    }


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


def _checksum(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _positions(encoder: nn.Module) -> int | None:
    """How many tokens the encoder can number; None where any number goes."""
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        number = getattr(encoder.config, "max_position_embeddings", None) or 0
        return number if number > 0 else None  # XLNet, which has no limit, says -1
    # RoBERTa and its like number positions from the one after the padding index.
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
