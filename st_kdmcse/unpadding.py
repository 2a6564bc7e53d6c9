"""Encoders that do not compute padding, or at least do not ask the device whether there is any."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sentence_transformers import SentenceTransformer
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

logger = logging.getLogger(__name__)

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
    expected = _embed_probes(model)
    hooks = [
        model[0].register_forward_pre_hook(lambda _, args: _unpad(model[0].auto_model, args[0])),
        model[0].register_forward_hook(_repad),
    ]
    try:
        with unchecked_masks(model):
            difference = float((_embed_probes(model) - expected).norm() / expected.norm())
            if not difference <= _TOLERANCE:
                raise ValueError(f"without padding, its embeddings differ by {difference:.1e}")
            yield
    finally:
        for hook in hooks:
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
    try:
        yield
    finally:
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


def _unpad(encoder: PreTrainedModel, features: dict[str, Any]) -> dict[str, Any] | None:
    """What the encoder is to be called with instead, None if there is little padding or other input."""
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
        "position_ids": (slots % mask.shape[1] + _first_position(encoder))[None],
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
    """The mask of transformers' signature; skipped where there is none to begin with, and not where all of it is 1."""
    kwargs["allow_is_bidirectional_skip"] = attention_mask is None
    made: Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    return made


AttentionInterface.register(_ATTENTION, _attention)
AttentionMaskInterface.register(_ATTENTION, _mask)


def _encoder(model: SentenceTransformer) -> PreTrainedModel:
    encoder = getattr(model[0], "auto_model", None)
    kind = getattr(getattr(encoder, "config", None), "model_type", None)
    if not isinstance(encoder, PreTrainedModel) or kind not in ENCODERS:
        raise ValueError(f"the encoder is a {kind or type(encoder).__name__}, not one of {', '.join(sorted(ENCODERS))}")
    attention = encoder.config._attn_implementation
    if attention != "sdpa":
        raise ValueError(f"its attention is {attention}, not sdpa")
    return encoder


def _first_position(encoder: PreTrainedModel) -> int:
    """The position of the first token: RoBERTa counts from behind the number of the padding token."""
    return int(encoder.config.pad_token_id) + 1 if hasattr(encoder.base_model.embeddings, "padding_idx") else 0


def _embed_probes(model: SentenceTransformer) -> Tensor:
    was_training = model.training
    embeddings: Tensor = model.encode(_PROBES, convert_to_tensor=True, show_progress_bar=False).float()
    model.train(was_training)
    return embeddings
