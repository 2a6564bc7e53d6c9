"""Encoders that do not compute padding, or at least do not ask the device whether there is any."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import batch_to_device
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

ENCODERS = frozenset({"bert", "roberta", "xlm-roberta", "camembert", "electra"})
"""Types of encoders in which tokens meet nowhere but in attention, and positions are counted or learned."""

_ATTENTION = "st_kdmcse_sdpa"
_ALL_LAYERS = "all_layer_embeddings"
_WORTH_IT = 1 / 16  # the share of padding from which leaving it out pays for moving tokens about
_OTHER_INPUTS = frozenset({"position_ids", "inputs_embeds", _ALL_LAYERS})
_PROBES = ["Short.", "A sentence that is somewhat longer than the other one, so that it is padded."]
_TOLERANCE = 1e-3


@contextmanager
def unpadded(model: SentenceTransformer) -> Iterator[None]:
    """Leave padding out of what the encoder computes, meanwhile; embeddings are the same up to rounding.

    Everything in an encoder but attention looks at one token at a time. There, the tokens of a batch stand in one row;
    in attention, which is a small part of the work for sentences, they are padded as usual. What goes in and what comes
    out has the usual shapes, so that losses, poolings and callers see no difference. Dropout draws other numbers, for
    it does not draw any for padding.

    Forward and backward passes both belong inside: gradient checkpointing and caching compute embeddings again.

    Args:
        model: a sentence-transformers model whose encoder is of a type in :data:`ENCODERS`, with PyTorch's
            scaled-dot-product attention (the default of transformers), not compiled.

    Raises:
        ValueError: if the encoder is another one, or gives other embeddings so; says which.

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
    """Use attention masks without looking first whether anything is masked, meanwhile.

    The look, which transformers takes at each forward pass, has a GPU finish what it was given before it is given more.

    Args:
        model: as for :func:`unpadded`.

    Raises:
        ValueError: if the encoder is another one; says which.
    """
    encoder = _encoder(model)
    encoder.set_attn_implementation(_ATTENTION)
    # Also where nothing is packed: a process that the model is sent to imports this module then, and has the attention.
    hook = model[0].register_forward_hook(_repad)
    try:
        yield
    finally:
        hook.remove()
        encoder.set_attn_implementation("sdpa")


@dataclass(frozen=True)
class _Packing:
    """Where the tokens of a batch stand.

    Attributes:
        slots: (T,) numbers of the tokens in the padded batch of B x L.
        mask: (B, L) bool, which of the padded batch are tokens.
        features: the padded batch.
    """

    slots: Tensor
    mask: Tensor
    features: dict[str, Any]

    def pack(self, padded: Tensor) -> Tensor:
        """(B, L, ...) to (1, T, ...)."""
        return padded.flatten(0, 1)[self.slots][None]

    def pad(self, packed: Tensor) -> Tensor:
        """(1, T, ...) to (B, L, ...), with zeros."""
        rows = packed.new_zeros(self.mask.numel(), *packed.shape[2:]).index_copy(0, self.slots, packed[0])
        return rows.view(*self.mask.shape, *packed.shape[2:])


def _unpad(module: Any, inputs: tuple[dict[str, Any]]) -> dict[str, Any] | None:
    """What the encoder is to be called with instead, None if there is little padding or other input."""
    (features,) = inputs
    mask = features.get("attention_mask")
    if mask is None or "input_ids" not in features or not _OTHER_INPUTS.isdisjoint(features):
        return None
    mask = mask.bool()
    slots = mask.flatten().nonzero().squeeze(1)
    if len(slots) > (1 - _WORTH_IT) * mask.numel():
        return None
    packing = _Packing(slots, mask, features)
    packed = {
        **features,
        "attention_mask": None,
        "position_ids": packing.pack(_positions(module.auto_model, features["input_ids"])),
        "packing": packing,
    }
    for name in ("input_ids", "token_type_ids"):
        if name in features:
            packed[name] = packing.pack(features[name])
    return packed


def _repad(_: nn.Module, __: Any, output: dict[str, Any]) -> dict[str, Any]:
    """Give what the encoder computed its usual shape, among the features that it was called with."""
    packing: _Packing | None = output.get("packing")
    if packing is None:
        return output
    packing.features["token_embeddings"] = packing.pad(output["token_embeddings"])
    if _ALL_LAYERS in output:
        packing.features[_ALL_LAYERS] = tuple(packing.pad(each) for each in output[_ALL_LAYERS])
    return packing.features


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: _Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers' signature, of (B, heads, L, width) or, with a packing, (1, heads, T, width)."""
    if packing is None:
        plain: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return plain
    query, key, value = (packing.pad(each.transpose(1, 2)).transpose(1, 2) for each in (query, key, value))
    output, _ = sdpa_attention_forward(module, query, key, value, packing.mask[:, None, None], **kwargs)
    return packing.pack(output), None


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of transformers' signature; not skipped where all of it is 1."""
    if attention_mask is not None:
        kwargs["allow_is_bidirectional_skip"] = False
    made: Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    return made


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, _mask)


def _encoder(model: SentenceTransformer) -> PreTrainedModel:
    encoder = getattr(model[0], "auto_model", None)
    if not isinstance(encoder, PreTrainedModel):
        raise ValueError(f"the encoder is a {type(model[0] if encoder is None else encoder).__name__}")
    config = encoder.config
    if config.model_type not in ENCODERS:
        raise ValueError(f"the encoder is a {config.model_type}, not one of {', '.join(sorted(ENCODERS))}")
    if config.is_decoder or model[0].module_output_name != "token_embeddings":
        raise ValueError("the encoder is a decoder, or does not give embeddings of tokens")
    if config._attn_implementation == _ATTENTION:
        raise ValueError("padding or masks are taken care of already")
    if config._attn_implementation != "sdpa":
        raise ValueError(f"its attention is {config._attn_implementation}, not sdpa")
    return encoder


def _positions(encoder: PreTrainedModel, ids: Tensor) -> Tensor:
    """(B, L) positions of tokens; RoBERTa counts from behind the number of the padding token, and leaves that out."""
    embeddings = encoder.base_model.embeddings
    if hasattr(embeddings, "padding_idx"):
        counted: Tensor = embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx)
        return counted
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


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
