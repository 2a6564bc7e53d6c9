"""Private parts of sentence-transformers, transformers and optuna that this package overrides or calls, in one place.

A new version of any may move them. ``tests/test_upstream.py`` has a test for each, which fails by its name.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.losses.gradcache import CachedLossMixin, RandContext
from sentence_transformers.base.losses.gradcache import _backward_hook as backward_of_mini_batches
from sentence_transformers.base.losses.merged_forward import embed_columns
from sentence_transformers.sentence_transformer.losses.adaptive_layer import TransformerDecorator
from sentence_transformers.sentence_transformer.losses.matryoshka import CachedLossDecorator, shrink
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from st_kdmcse.dropout import dropout as fast_dropout

__all__ = [
    "ATTENTION",
    "NO_LAYERS",
    "CachedLossDecorator",
    "CachedLossMixin",
    "HookedTrainer",
    "Packing",
    "RandContext",
    "attention_of",
    "backward_of_mini_batches",
    "check_layers",
    "checkpoint_activations",
    "embed_columns",
    "leave_autocast",
    "nested_gather",
    "shrink",
    "token_positions",
    "trial_again",
]

if TYPE_CHECKING:
    from optuna import Study, Trial
    from optuna.trial import FrozenTrial

NO_LAYERS = (
    "AdaptiveLayerLoss and Matryoshka2dLoss do not work with the losses of st_kdmcse, which double a batch themselves: "
    "use the loss alone, or in MatryoshkaLoss"
)

ATTENTION = "st_kdmcse_sdpa"
"""The name under which this package's attention is registered with transformers."""


class HookedTrainer(SentenceTransformerTrainer):
    """The stock trainer with public hooks where a subclass would have to override private methods."""

    def around_training(self) -> AbstractContextManager[object]:
        """A context for the whole training loop."""
        return nullcontext()

    def parameters_to_clip(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters whose common gradient norm is clipped."""
        return list(model.parameters())

    def gradients_clipped(self, norm: Tensor) -> None:
        """The gradients of a step were clipped; they had this common norm before."""

    def training_batches(self, loader: DataLoader[Any], dataset: DatasetDict) -> DataLoader[Any]:
        """The loader of training batches, made from the stock one."""
        return loader

    def save_extra(self, directory: Path) -> None:
        """Save what belongs to a checkpoint or a saved model beside the model itself."""

    def load_extra(self, directory: Path) -> None:
        """Load what :meth:`save_extra` saved, before the model is loaded."""

    def around_files(self) -> AbstractContextManager[object]:
        """A context in which the model is saved, or loaded."""
        return nullcontext()

    def checkpoint_loaded(self) -> None:
        """The model and what :meth:`load_extra` loads are those of one checkpoint now."""

    def load_checkpoint(self, checkpoint: str | Path) -> None:
        """Load the model of a checkpoint and its extras, without the state of training."""
        self._load_from_checkpoint(str(checkpoint))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """The stock loop; in autocast, the weights are converted once for all batches and not at each."""
        with self.accelerator.autocast():
            output: EvalLoopOutput = super().evaluation_loop(*args, **kwargs)
        return output

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            with self.around_training():
                output: TrainOutput = super()._inner_training_loop(*args, **kwargs)
        finally:
            leave_autocast(self.model)
        return output

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = self.accelerator.clip_grad_norm_(self.parameters_to_clip(model), self.args.max_grad_norm)
        if isinstance(norm, Tensor):
            self.gradients_clipped(norm)
        return norm

    def _build_dataloader(self, dataset: Dataset | DatasetDict, batch_size: int, dataset_kind: str) -> DataLoader[Any]:
        loader: DataLoader[Any] = super()._build_dataloader(dataset, batch_size, dataset_kind)
        if dataset_kind != "train" or not isinstance(dataset, DatasetDict):
            return loader
        return self.training_batches(loader, dataset)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        with self.around_files():
            super()._save(output_dir, state_dict)
        self.save_extra(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, checkpoint_path: str) -> None:
        self.load_extra(Path(checkpoint_path))
        with self.around_files():
            super()._load_from_checkpoint(checkpoint_path)
        self.checkpoint_loaded()


def check_layers(model: nn.Module) -> None:
    """Refuse a model that AdaptiveLayerLoss computes with: it looks for layers in the features that a loss was given.

    Raises:
        ValueError: if it does.
    """
    encoder = next(iter(getattr(model, "module", model).children()), None)
    if isinstance(getattr(encoder, "forward", None), TransformerDecorator):
        raise ValueError(NO_LAYERS)


def checkpoint_activations(encoder: PreTrainedModel) -> None:
    """Let the layers of an encoder keep their inputs alone in training, and compute the rest again for the gradient.

    Raises:
        ValueError: if it has no layers that can.
    """
    # The trainer's argument is called differently from version to version, and its old name warns.
    enable = getattr(encoder, "activation_checkpointing_enable", None) or encoder.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def leave_autocast(model: nn.Module) -> None:
    """Let a model compute in the precision of its weights again: accelerate leaves autocast in it after training.

    Args:
        model: that was trained; trained once more, it gets autocast again.
    """
    if hasattr(model, "_original_forward"):
        extract_model_from_parallel(model, keep_fp32_wrapper=False)
        vars(model).pop("_is_accelerate_prepared", None)


def trial_again(study: Study, trial: FrozenTrial) -> Trial:
    """A trial of a study that another process has begun, to go on with: it keeps what was suggested and reported."""
    from optuna import Trial  # of the extra `tune`

    return Trial(study, trial._trial_id)


@dataclass(frozen=True)
class Packing:
    """Where the tokens of a batch stand: in a padded batch of B x L, or in one row of T.

    Attributes:
        slots: (T,) numbers of the tokens in the padded batch.
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


def attention_of(encoder: PreTrainedModel) -> str | None:
    """The name of the attention that an encoder computes with, such as "sdpa"."""
    name: str | None = encoder.config._attn_implementation
    return name


def token_positions(encoder: PreTrainedModel, ids: Tensor) -> Tensor:
    """(B, L) positions of tokens; RoBERTa counts from behind the number of the padding token, which it leaves out."""
    embeddings = encoder.base_model.embeddings
    if hasattr(embeddings, "padding_idx"):
        counted: Tensor = embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx)
        return counted
    return torch.arange(ids.shape[1], device=ids.device).expand_as(ids)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of transformers' signature, of (B, heads, L, width) or, with a packing, (1, heads, T, width)."""
    if packing is None:
        return _padded_attention(module, query, key, value, attention_mask, **kwargs), None
    query, key, value = (packing.pad(each.transpose(1, 2)).transpose(1, 2) for each in (query, key, value))
    output = _padded_attention(module, query, key, value, packing.mask[:, None, None], **kwargs)
    return packing.pack(output), None


def _padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> Tensor:
    """(B, L, heads, width) from (B, heads, L, width) each."""
    if not 0 < dropout < 1 or query.device.type != "cpu":
        options = {"dropout": dropout, "scaling": scaling, **kwargs}
        output: Tensor = sdpa_attention_forward(module, query, key, value, mask, **options)[0]
        return output
    # With dropout on a CPU, PyTorch has no kernel for it and computes these products in float32.
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(query.dtype)
    return (fast_dropout(weights, dropout) @ value).transpose(1, 2).contiguous()


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """The mask of transformers' signature. Its values are not checked: a GPU would have to finish its work first."""
    if attention_mask is not None:
        kwargs["allow_is_bidirectional_skip"] = False
    made: Tensor | None = sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    return made


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
