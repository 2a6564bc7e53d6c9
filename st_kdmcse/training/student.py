"""The student: an encoder of tokens, a pooling, and whatever a sentence-transformers model has after it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import RepositoryNotFoundError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from sentence_transformers.util import batch_to_device, load_file_path
from torch import nn

from st_kdmcse.provenance import configuration_content, parameters_checksum, tokenizer_content
from st_kdmcse.upstream import checkpoint_activations

logger = logging.getLogger(__name__)

PoolingMode = Literal["auto", "cls", "mean"]

_WITH_WEIGHTS = frozenset({"Dense", "LayerNorm"})
_AFTER_POOLING = _WITH_WEIGHTS | {"Normalize", "Dropout"}
"""Modules that may follow a pooling: they take a sentence embedding and give another one."""


def build_student(name_or_path: str, max_seq_length: int = 32, pooling: PoolingMode = "auto") -> SentenceTransformer:
    """A sentence encoder to be trained, in float32: from a plain encoder, or from a sentence-transformers model.

    Args:
        name_or_path: a hub name or local folder of a BERT, RoBERTa, MiniLM, ... encoder, or of a sentence-transformers
            model.
        max_seq_length: tokens after which sentences are cut off (32 in the paper).
        pooling: "auto" keeps a sentence-transformers model whole, with its own pooling and its Dense, LayerNorm,
            Normalize and Dropout modules, and takes "cls" for a plain encoder. "cls" is the [CLS] vector of the last
            layer, before the MLP pooler (the paper's); "mean" is the mean over the tokens. Both take the encoder and
            the prompts of a sentence-transformers model, and leave out its Normalize and Dropout.

    Returns:
        Transformer, Pooling, and what follows in the model; it saves as a stock sentence-transformers model.

    Raises:
        ValueError: if the model consists of other modules, has no [CLS] token to pool, no padding token, or fewer
            positions than ``max_seq_length``; or if "cls" or "mean" would leave out a module that has weights.
    """
    left_out = check_modules(name_or_path, pooling)
    if left_out:
        logger.info("`pooling` %s leaves out the %s of %s", pooling, ", ".join(left_out), name_or_path)
    if left_out is not None and pooling == "auto":
        student = SentenceTransformer(name_or_path)
        student.max_seq_length = max_seq_length
    else:
        transformer = Transformer(encoder_folder(name_or_path), max_seq_length=max_seq_length)
        mode = "cls" if pooling == "auto" else pooling
        student = SentenceTransformer(modules=[transformer, Pooling(transformer.get_embedding_dimension(), mode)])
        _keep_prompts(student, name_or_path)
        if not Path(name_or_path).is_dir():
            student.model_card_data.set_base_model(name_or_path)
    _check_encoder(name_or_path, student, max_seq_length)
    if student.default_prompt_name is not None:
        logger.warning(
            "%s puts the prompt %r before each text that it encodes, and is trained without it",
            name_or_path,
            student.prompts[student.default_prompt_name],
        )
    return student.float()  # in half precision, small updates would be rounded away


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


def pooling_of(student: SentenceTransformer) -> str:
    """How a student makes a sentence embedding from those of tokens, such as "cls" or "mean, Normalize"."""
    return ", ".join(["+".join(_pooling_modes(student)), *(type(module).__name__ for module in list(student)[2:])])


def _pooling_modes(student: SentenceTransformer) -> tuple[str, ...]:
    mode = student[1].pooling_mode
    return (mode,) if isinstance(mode, str) else mode


def enable_checkpointing(student: SentenceTransformer) -> None:
    """Let the encoder of a student save memory in training: activations within its layers are computed again.

    Args:
        student: changed in place; losses and gradients stay the same.

    Raises:
        ValueError: if its encoder cannot; names it.
    """
    encoder = student[0].auto_model
    try:
        checkpoint_activations(encoder)
    except ValueError as error:
        raise ValueError(
            f"`gradient_checkpointing`: transformers has none for a {encoder.config.model_type} ({error}): leave it out"
        ) from error


def check_modules(name_or_path: str, pooling: PoolingMode) -> list[str] | None:
    """Refuse a model with modules that could not be trained here, or that a pooling would leave out in silence.

    Args:
        name_or_path: a hub name or local folder.
        pooling: as for :func:`build_student`.

    Returns:
        The modules of a sentence-transformers model that the pooling leaves out, by class; None for a plain encoder.

    Raises:
        ValueError: for such a model; names the modules.
    """
    try:
        path = load_file_path(name_or_path, "modules.json")
    except RepositoryNotFoundError:  # of which more is said where the encoder is looked for
        return None
    if path is None:
        return None
    try:
        types = [str(module["type"]) for module in json.loads(Path(path).read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): copy the model again") from error
    # A class of another package keeps its whole name, by which nothing here knows it.
    modules = [name.rpartition(".")[2] if name.startswith("sentence_transformers.") else name for name in types]
    after = modules[2:]
    if modules[:2] != ["Transformer", "Pooling"] or not _AFTER_POOLING.issuperset(after):
        raise ValueError(
            f"{name_or_path} consists of {', '.join(modules)}, and a student of Transformer and Pooling, with "
            f"{', '.join(sorted(_AFTER_POOLING))} after them if any: choose another `model`, or give the folder of its "
            "encoder alone"
        )
    if pooling == "auto":
        return []
    lost = [name for name in after if name in _WITH_WEIGHTS]
    if lost:
        raise ValueError(
            f"`pooling` {pooling} would leave out what {name_or_path} has learned in its {', '.join(lost)}: leave "
            "`pooling` out to keep all of it, or give the folder of its encoder alone"
        )
    return after


def _check_encoder(name_or_path: str, student: SentenceTransformer, max_seq_length: int) -> None:
    encoder, tokenizer = student[0].auto_model, student.tokenizer
    config = encoder.config
    lacks_cls = getattr(tokenizer, "cls_token", None) is None or getattr(config, "is_encoder_decoder", False)
    if "cls" in _pooling_modes(student) and lacks_cls:
        raise ValueError(
            f"{name_or_path} ({config.model_type}) has no [CLS] token to pool: use an encoder such as BERT or RoBERTa"
        )
    if getattr(tokenizer, "pad_token", None) is None:
        raise ValueError(
            f"the tokenizer of {name_or_path} has no padding token, so that the sentences of a batch cannot be made "
            "equally long: set its pad_token, to a token of its vocabulary, and save it again"
        )
    positions = _positions(encoder)
    if not 2 <= max_seq_length <= (positions or max_seq_length):
        raise ValueError(
            f"`max_seq_length` must be from 2 to the {positions} positions of {name_or_path}, got {max_seq_length}"
        )


def _keep_prompts(student: SentenceTransformer, name_or_path: str) -> None:
    """Give a student the prompts that are saved with a sentence-transformers model."""
    path = load_file_path(name_or_path, "config_sentence_transformers.json")
    if path is not None:
        saved = json.loads(Path(path).read_text(encoding="utf-8"))
        student.prompts = {**student.prompts, **(saved.get("prompts") or {})}
        student.default_prompt_name = saved.get("default_prompt_name")


def student_checksums(encoder: nn.Module, tokenizer: Any, modules: Sequence[Any] = ()) -> dict[str, str]:
    """What a training starts from, whatever its folder is called: SHA-256 of weights, configuration and tokenizer.

    Args:
        encoder: of transformers.
        tokenizer: that belongs to it.
        modules: of sentence-transformers that follow the encoder, such as its pooling.
    """
    checksums = {
        "weights": parameters_checksum(encoder),
        "configuration": _checksum(configuration_content(encoder.config)),
        "tokenizer": _checksum(tokenizer_content(tokenizer)),
    }
    if modules:
        configurations = [[type(module).__name__, module.get_config_dict()] for module in modules]
        checksums["modules"] = _checksum([configurations, parameters_checksum(nn.ModuleList(modules))])
    return checksums


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
