"""LoRA through ``peft``: an encoder whose attention learns low-rank updates, and is saved with them merged into it."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LORA_NAME = "lora.safetensors"
"""The file of a checkpoint with the low-rank updates, from which training goes on; its model has them merged in."""

_IN_NAMES = ".lora_"


def check_lora(encoder_type: str) -> None:
    """Refuse LoRA for an encoder whose layers to adapt ``peft`` does not know.

    Args:
        encoder_type: such as "bert".

    Raises:
        ImportError: without ``peft``.
        ValueError: if ``peft`` has no target modules for it; names it.
    """
    if find_spec("peft") is None:
        raise ImportError('`lora` needs peft: pip install "st-kdmcse[lora]"')
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    if encoder_type not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        raise ValueError(
            f"`lora`: peft knows no target modules of the encoder, a {encoder_type}: leave `lora` out, or take another "
            "encoder, such as bert, roberta, xlm-roberta, electra or deberta-v2"
        )


def add_lora(student: SentenceTransformer, rank: int) -> None:
    """Freeze an encoder, and give the layers of its attention that ``peft`` targets (query and value) low-rank updates.

    An update is 0 at first, and has the scale alpha / rank = 2. Modules after the encoder are trained as before.

    Args:
        student: changed in place.
        rank: R, >= 1.

    Raises:
        ImportError, ValueError: as for :func:`check_lora`.

    References:
        - LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022: https://arxiv.org/abs/2106.09685
    """
    encoder = student[0].auto_model
    check_lora(encoder.config.model_type)
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank), encoder)
    trained = sum(update.numel() for update in _updates(student).values())
    logger.info("LoRA trains %s parameters of an encoder of %s", f"{trained:,}", f"{_size(encoder):,}")


def has_lora(student: SentenceTransformer) -> bool:
    """Whether an encoder has low-rank updates."""
    return bool(_updates(student))


@contextmanager
def lora_merged(student: SentenceTransformer) -> Iterator[None]:
    """Give a student inside of the block a stock encoder: a copy with the updates merged into its weights.

    Args:
        student: with or without LoRA; what is loaded into the copy is lost afterwards.
    """
    if not has_lora(student):
        yield
        return
    transformer: Any = _transformer(student)
    adapted = transformer.model
    transformer.model = _merged(copy.deepcopy(adapted))
    try:
        yield
    finally:
        transformer.model = adapted


def save_lora(student: SentenceTransformer, folder: Path) -> None:
    """Save the updates of a student, if it has any.

    Args:
        student: with or without LoRA.
        folder: for :data:`LORA_NAME`.
    """
    if updates := _updates(student):
        save_file({name: update.detach().contiguous() for name, update in updates.items()}, folder / LORA_NAME)


def load_lora(student: SentenceTransformer, folder: Path) -> None:
    """Load the updates that :func:`save_lora` saved.

    Args:
        student: with LoRA of the same rank, or without.
        folder: that holds :data:`LORA_NAME`.

    Raises:
        ValueError: if they are those of another encoder or rank.
    """
    updates = _updates(student)
    if not updates:
        return
    saved = load_file(folder / LORA_NAME)
    shapes, expected = ({name: tuple(each.shape) for name, each in group.items()} for group in (saved, updates))
    if shapes != expected:
        raise ValueError(
            f"{folder / LORA_NAME} holds the updates of another encoder or rank: give those of the training"
        )
    with torch.no_grad():
        for name, update in updates.items():
            update.copy_(saved[name])


def _updates(student: SentenceTransformer) -> dict[str, Tensor]:
    encoder = getattr(_transformer(student), "model", None)
    if not isinstance(encoder, nn.Module):
        return {}
    return {name: parameter for name, parameter in encoder.named_parameters() if _IN_NAMES in name}


def _transformer(student: nn.Module) -> nn.Module | None:
    return next(iter(getattr(student, "_orig_mod", student).children()), None)  # also of a compiled one


def _size(encoder: nn.Module) -> int:
    return sum(parameter.numel() for name, parameter in encoder.named_parameters() if _IN_NAMES not in name)


def _merged(encoder: nn.Module) -> nn.Module:
    """The encoder, with its adapted layers replaced by stock ones."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(encoder.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(encoder.get_submodule(parent), child, layer.get_base_layer())
    return encoder
