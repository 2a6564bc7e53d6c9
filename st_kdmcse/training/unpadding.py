"""Encoders that leave padding out of what they compute, and attention masks that no step checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from st_kdmcse.upstream import ATTENTION, Packing, attention_of, token_positions

ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra"})
"""Types of encoders in which tokens meet only in attention, and positions are counted or learned."""

_ALL_LAYERS = "all_layer_embeddings"
_WORTH_IT = 1 / 16  # the share of padding from which leaving it out pays for moving tokens about
_OTHER_INPUTS = frozenset({"position_ids", "inputs_embeds", _ALL_LAYERS})
_PROBES = ["Short.", "A sentence that is somewhat longer than the other one, so that it is padded."]
_TOLERANCE = 1e-3


@contextmanager
def unpadded(model: SentenceTransformer) -> Iterator[None]:
    """Leave padding out of what the encoder computes inside of the block; embeddings are the same up to rounding.

    Everything in an encoder but attention looks at one token at a time. For that, the tokens of a batch stand in one
    row. For attention, which is a small part of the work on sentences, they are padded. Inputs and outputs keep their
    shapes, so that losses, poolings and callers see no difference. Dropout draws other random numbers: it draws none
    for padding.

    Keep forward and backward passes in one block: gradient checkpointing and caching compute embeddings again.

    Args:
        model: a sentence-transformers model whose encoder is of a type in :data:`ENCODERS`, with PyTorch's
            scaled-dot-product attention (the default of transformers), not compiled.

    Raises:
        ValueError: if the encoder is of another type, or its embeddings differ without padding; the message
            names the cause.

    Example:
        ::

            with unpadded(model):
                SentenceTransformerTrainer(model, args, dataset, loss=SimCSELoss(model)).train()
    """
    with unchecked_masks(model):
        expected = _embed_probes(model)
        hook = model[0].register_forward_pre_hook(_unpad)
        try:
            difference = float((_embed_probes(model) - expected).norm() / expected.norm())
            if not difference <= _TOLERANCE:
                raise ValueError(f"without padding, its embeddings differ by {difference:.1e}")
            yield
        finally:
            hook.remove()


@contextmanager
def unchecked_masks(model: SentenceTransformer) -> Iterator[None]:
    """Use attention masks inside of the block without checking their values.

    In each forward pass, transformers checks whether anything is masked. A GPU must finish its work before it
    can answer.

    Args:
        model: as for :func:`unpadded`.

    Raises:
        ValueError: if the encoder is of another type. The message names it.
    """
    encoder = _encoder(model)
    encoder.set_attn_implementation(ATTENTION)
    # The hook is needed without packing too: a process that gets the model by pickle imports this module for it, and
    # with it the attention.
    hook = model[0].register_forward_hook(_repad)
    try:
        yield
    finally:
        hook.remove()
        encoder.set_attn_implementation("sdpa")


def _unpad(module: Any, inputs: tuple[dict[str, Any]]) -> dict[str, Any] | None:
    """The input without padding; None if there is little padding, or input of another kind."""
    (features,) = inputs
    mask = features.get("attention_mask")
    if mask is None or "input_ids" not in features or not _OTHER_INPUTS.isdisjoint(features):
        return None
    mask = mask.bool()
    slots = mask.flatten().nonzero().squeeze(1)
    if len(slots) > (1 - _WORTH_IT) * mask.numel():
        return None
    packing = Packing(slots, mask, features)
    packed = {
        **features,
        "attention_mask": None,
        "position_ids": packing.pack(token_positions(module.auto_model, features["input_ids"])),
        "packing": packing,
    }
    for name in ("input_ids", "token_type_ids"):
        if name in features:
            packed[name] = packing.pack(features[name])
    return packed


def _repad(_: nn.Module, __: Any, output: dict[str, Any]) -> dict[str, Any]:
    """Give the output its padded shape, among the features that the encoder was called with."""
    packing: Packing | None = output.get("packing")
    if packing is None:
        return output
    packing.features["token_embeddings"] = packing.pad(output["token_embeddings"])
    if _ALL_LAYERS in output:
        packing.features[_ALL_LAYERS] = tuple(packing.pad(each) for each in output[_ALL_LAYERS])
    return packing.features


def _encoder(model: SentenceTransformer) -> PreTrainedModel:
    encoder = getattr(model[0], "auto_model", None)
    if not isinstance(encoder, PreTrainedModel):
        raise ValueError(f"the encoder is a {type(model[0] if encoder is None else encoder).__name__}")
    config = encoder.config
    if config.model_type not in ENCODERS:
        raise ValueError(f"the encoder is a {config.model_type}, not one of {', '.join(sorted(ENCODERS))}")
    if config.is_decoder or model[0].module_output_name != "token_embeddings":
        raise ValueError("the encoder is a decoder, or does not give embeddings of tokens")
    if attention_of(encoder) == ATTENTION:
        raise ValueError("padding or masks are taken care of already")
    if attention_of(encoder) != "sdpa":
        raise ValueError(f"its attention is {attention_of(encoder)}, not sdpa")
    return encoder


def _embed_probes(model: SentenceTransformer) -> Tensor:
    """Embeddings of two sentences, of which one is padded."""
    features = batch_to_device(model.preprocess(_PROBES), model.device)
    if _unpad(model[0], (features,)) is None:
        raise ValueError(f"sentences of {features['input_ids'].shape[1]} tokens have no padding that is worth it")
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            embeddings: Tensor = model(features)["sentence_embedding"].float()
    except Exception as error:  # whatever else an encoder may ask for
        raise ValueError(f"it fails on two sentences: {error}") from error
    finally:
        for module, mode in modes.items():
            module.training = mode
    return embeddings
