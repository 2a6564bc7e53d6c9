"""A SentenceTransformerTrainer that knows the step-ratio schedule and takes care of the heads."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from datasets import Dataset, DatasetDict, IterableDataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, MatryoshkaLoss
from sentence_transformers.util.distributed import get_world_size
from torch import Tensor, nn
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from st_kdmcse.data import FeatureStore
from st_kdmcse.dropout import fast_dropout
from st_kdmcse.losses.base import TwoViewLoss
from st_kdmcse.losses.components import LossComponents
from st_kdmcse.losses.heads import HEADS_DIR
from st_kdmcse.training.card import describe_training
from st_kdmcse.training.checkpoints import RECORD_NAME, RecordCheckpoints, check_files
from st_kdmcse.training.collator import KDMCSEDataCollator
from st_kdmcse.training.lora import load_lora, lora_merged, save_lora
from st_kdmcse.training.schedule import ROW_COLUMN, StepRatioBatchSampler, pair_rows
from st_kdmcse.training.student import views_differ
from st_kdmcse.training.token_batches import TokenBatches
from st_kdmcse.training.unpadding import unchecked_masks, unpadded
from st_kdmcse.upstream import NO_LAYERS, HookedTrainer, nested_gather

logger = logging.getLogger(__name__)

HEAD_PARAMETERS = r"(^|\.)heads\.\w+\.dense\."
"""What the names of the heads' parameters match, as a key of ``learning_rate_mapping``."""

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Modes of ``torch.compile`` that record CUDA graphs."""


class KDMCSETrainer(HookedTrainer):
    """The stock trainer, with what two sources and trained heads need.

    - **Schedule**: a ``DatasetDict`` of a text dataset (column ``sentence``) and a pair dataset (columns ``sentence``
      and ``row``) is drawn as in Algorithm 1, see :class:`~st_kdmcse.training.schedule.StepRatioBatchSampler`.
    - **Heads** are saved in each checkpoint (folder ``heads``), restored by ``resume_from_checkpoint`` and
      ``load_best_model_at_end``, counted in gradient clipping, and kept equal between processes under DDP.
    - **Checkpoints** get a record of their files (``checksums.json``), and one that is damaged is not resumed from.
    - **LoRA** of :func:`~st_kdmcse.training.lora.add_lora` is saved merged into a stock model, and resumed exactly.
    - **Sentences** are tokenized once, ahead of training, into a memory-mapped file that later runs use again. Where
      such a batch would differ from the collator's, the collator makes it.
    - **Padding** is left out of what the student computes where its encoder allows that, see
      :func:`~st_kdmcse.unpadded`.
    - **Dropout** on a CPU draws a quarter of the random numbers, see :func:`~st_kdmcse.dropout.dropout`.
    - **The model card** names the teacher and tells how to load the heads.
    - **Divergence** ends training at the next log, score or checkpoint, with an error that names the step.
    - **Logs** show each term of the loss as a mean over the steps that have it, and how many negatives were removed.

    Args:
        model: the student.
        args: training arguments; the schedule replaces their batch samplers.
        train_dataset: a dataset of sentences or of pairs, or a dictionary of one of each.
        pair_every: every how many steps a pair batch comes; None computes it from the sizes.
        head_learning_rate: peak learning rate of the heads, with the schedule and the weight decay of the rest; None is
            that of the student.
        captions_per_image_in_batch: draw that many captions of each image for a pair batch; None draws captions one by
            one.
        features: the store that the rows of the pairs refer to; needed by ``captions_per_image_in_batch`` where the
            loss has none.
        pretokenize: tokenize once; False leaves it to the collator, batch by batch.
        pad_to_multiple_of: lengths of batches are rounded up to multiples of this many tokens, so that a compiled model
            meets few shapes; only with ``pretokenize``.
        unpad: leave padding out; None does so on a CPU where the student allows it and is not compiled.
        token_cache: folder for the tokens; None is ``st_kdmcse`` in the cache of ``datasets`` (``HF_DATASETS_CACHE``).
        kwargs: as for ``SentenceTransformerTrainer``.

    Raises:
        ValueError: if a dataset is a streaming one, or has other columns than one of text and optionally ``row``, if
            AdaptiveLayerLoss or Matryoshka2dLoss wraps a loss of this package, or for what a compiled
            student cannot do (see :func:`check_compilation`); by ``train``, if ``unpad`` is True for a student that
            does not allow it.
    """

    data_collator_class = KDMCSEDataCollator
    train_dataset: DatasetDict | None

    def __init__(
        self,
        model: SentenceTransformer | None = None,
        args: SentenceTransformerTrainingArguments | None = None,
        train_dataset: Dataset | DatasetDict | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        *,
        pair_every: int | None = None,
        head_learning_rate: float | None = None,
        captions_per_image_in_batch: int | None = None,
        features: FeatureStore | None = None,
        pretokenize: bool = True,
        pad_to_multiple_of: int = 1,
        unpad: bool | None = None,
        token_cache: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(train_dataset, Dataset):
            # One sampler for one source or two: the stock one for a single dataset is not resumed exactly.
            train_dataset = {"pairs" if ROW_COLUMN in train_dataset.column_names else "text": train_dataset}
        if isinstance(train_dataset, IterableDataset):
            train_dataset = {"train": train_dataset}
        for name, dataset in (train_dataset or {}).items():
            _check_columns(name, dataset)
        self.pair_every = pair_every
        self.captions_per_image_in_batch = captions_per_image_in_batch
        self.features = features
        self.pretokenize = pretokenize
        self.pad_to_multiple_of = pad_to_multiple_of
        self.unpad = unpad
        self.token_cache = token_cache
        self._log_sums: dict[str, dict[str, Tensor]] = {"train": {}, "eval": {}}
        self._schedule: StepRatioBatchSampler | None = None
        self._first_bad: Tensor | None = None
        if head_learning_rate is not None:
            args = copy(args)  # the caller may go on with it
        super().__init__(model, args, train_dataset, **kwargs)
        if head_learning_rate is not None:
            self.args.learning_rate_mapping = {**self.args.learning_rate_mapping, HEAD_PARAMETERS: head_learning_rate}
        if self.head_losses and any(isinstance(module, AdaptiveLayerLoss) for module in self._loss_modules):
            raise ValueError(NO_LAYERS)
        if self.args.torch_compile:
            in_parts = any(hasattr(module, "mini_batch_size") for module in self._loss_modules)
            in_parts |= self.args.gradient_accumulation_steps > 1
            check_compilation(self.args.torch_compile_mode, self.unpad, in_parts)
        self.add_callback(_Prepare(self))
        self.add_callback(RecordCheckpoints())

    @property
    def head_losses(self) -> list[TwoViewLoss]:
        """The losses that own heads, wrapped ones included."""
        return [module for module in self._loss_modules if isinstance(module, TwoViewLoss)]

    @property
    def _loss_modules(self) -> list[nn.Module]:
        losses = nn.ModuleList(self.loss.values()) if isinstance(self.loss, dict) else self.loss
        return list(losses.modules())

    @property
    def _feature_stores(self) -> list[FeatureStore]:
        features = [getattr(loss, "features", None) for loss in self.head_losses]
        return [store for store in features if store is not None]

    @property
    def head_parameters(self) -> list[nn.Parameter]:
        """The trained parameters of all heads."""
        return [parameter for loss in self.head_losses for parameter in loss.heads.parameters()]

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Describe the sentences in the card, without the row numbers."""
        train_dataset = self.train_dataset
        if train_dataset is not None:
            self.train_dataset = DatasetDict(
                {
                    name: dataset.remove_columns(ROW_COLUMN) if ROW_COLUMN in dataset.column_names else dataset
                    for name, dataset in train_dataset.items()
                }
            )
        super().add_model_card_callback(default_args_dict)
        self.train_dataset = train_dataset

    def get_multi_dataset_batch_sampler(
        self,
        dataset: ConcatDataset[Any],
        batch_samplers: Sequence[BatchSampler],
        generator: torch.Generator | None = None,
        seed: int | None = 0,
    ) -> BatchSampler:
        """The schedule of Algorithm 1, whatever sampler the arguments name."""
        return StepRatioBatchSampler(
            dataset,
            batch_samplers,
            generator=generator,
            seed=seed or 0,
            pair_every=self.pair_every,
            run_length=self.args.world_size * self.args.gradient_accumulation_steps,
            image_rows=self._images_of_pairs(),
            captions_per_image=self.captions_per_image_in_batch,
        )

    def _images_of_pairs(self) -> npt.NDArray[np.int64] | None:
        """The image of each pair; None where nothing asks for it."""
        pairs = [data for data in (self.train_dataset or {}).values() if ROW_COLUMN in data.column_names]
        if (self.captions_per_image_in_batch or 1) == 1 or not pairs:
            return None
        stores = [self.features] if self.features is not None else self._feature_stores
        if not stores:
            raise ValueError("`captions_per_image_in_batch` needs the images of the pairs: give `features`")
        images: npt.NDArray[np.int64] = stores[0].image_rows[pair_rows(pairs[0])]
        return images

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The stock loader; its schedule is found under the wrappers of accelerate and remembered."""
        self._check_rows()
        loader: DataLoader[Any] = super().get_train_dataloader()
        sampler: Any = loader.batch_sampler
        while not isinstance(sampler, StepRatioBatchSampler):
            sampler = sampler.batch_sampler
        self._schedule = sampler
        return loader

    def _check_rows(self) -> None:
        """Refuse rows that the features do not have. On a GPU, a gather that fails does not tell the row."""
        limit = min(map(len, self._feature_stores), default=None)
        for name, dataset in (self.train_dataset or {}).items():
            if limit is not None and ROW_COLUMN in dataset.column_names:
                rows = pair_rows(dataset)
                bad = np.flatnonzero((rows < 0) | (rows >= limit))
                if bad.size:
                    raise ValueError(
                        f"dataset {name!r}, example {bad[0]}: row {rows[bad[0]]} is not one of the {limit:,} of the "
                        "feature store: give the dataset of that store"
                    )

    def training_batches(self, loader: DataLoader[Any], dataset: DatasetDict) -> DataLoader[Any]:
        """Batches from tokens on disk if they equal those of the collator, and the stock loader if not."""
        if not self.pretokenize:
            return loader
        try:
            with self.args.main_process_first():
                batches = TokenBatches.of(
                    list(dataset.values()), self.model, self.data_collator, self.token_cache, self.pad_to_multiple_of
                )
        except ValueError as error:
            logger.info("sentences are tokenized batch by batch: %s", error)
            return loader
        return DataLoader(
            batches,
            batch_sampler=loader.batch_sampler,
            collate_fn=_unchanged,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            persistent_workers=loader.persistent_workers,
            prefetch_factor=loader.prefetch_factor,
        )

    @contextmanager
    def around_training(self) -> Iterator[None]:
        """Leave padding out of what the student computes; where that is impossible, do not check its masks."""
        on_cpu = self.args.device.type == "cpu"
        unpad = on_cpu if self.unpad is None else self.unpad
        with ExitStack() as stack:
            if on_cpu and not self.args.torch_compile:
                stack.enter_context(fast_dropout(self.model))
            try:
                if not self.args.torch_compile:
                    stack.enter_context((unpadded if unpad else unchecked_masks)(self.model))
            except ValueError as error:
                if self.unpad:
                    raise
                logger.info("padding is computed: %s", error)
            yield

    def save_weights(self, path: str | Path) -> None:
        """Save student and heads, without the state of training, for :meth:`load_checkpoint`."""
        with self.around_files():
            self.model.save_pretrained(str(path), create_model_card=False)
        self._save_beside(Path(path))

    def around_files(self) -> AbstractContextManager[object]:
        """Save and load a stock model, with the updates of LoRA merged into it."""
        return lora_merged(self.model)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Forward and backward; averages the heads' gradients between processes, as DDP does with the student's."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._note_finite(loss)
        if get_world_size() > 1 and self.accelerator.sync_gradients:
            gradients = [parameter.grad for parameter in self.head_parameters if parameter.grad is not None]
            _for_all(gradients, lambda flat: dist.all_reduce(flat.div_(get_world_size())))
        return loss

    def gradients_clipped(self, norm: Tensor) -> None:
        """Note whether the norm is finite."""
        if not self.args.fp16:  # there, gradients beyond the range of float16 are left out and their scale is reduced
            self._note_finite(norm)

    def _note_finite(self, value: Tensor) -> None:
        """Remember the first step with a value that is not finite, on the device, which nobody waits for."""
        bad = torch.where(value.detach().isfinite(), math.inf, float(self.state.global_step + 1))
        self._first_bad = bad if self._first_bad is None else torch.minimum(self._first_bad, bad)

    def forget_divergence(self) -> None:
        """Begin with no step that went wrong."""
        self._first_bad = None

    def check_converged(self) -> None:
        """Stop a training that has diverged.

        Raises:
            ValueError: if a loss or gradient norm was not finite since training began; names the first step.
        """
        if self._first_bad is None:
            return
        if get_world_size() > 1:
            dist.all_reduce(self._first_bad, op=dist.ReduceOp.MIN)
        if math.isfinite(step := self._first_bad.item()):
            raise ValueError(
                f"training diverged: the loss or a gradient of step {step:.0f} is not finite, and nothing after step "
                f"{step - 1:.0f} can be used; train again with a smaller `lr`, or look for damaged features"
            )

    def broadcast_heads(self) -> None:
        """Give every process the heads of the first one: each has initialised its own."""
        if get_world_size() > 1:
            _for_all([parameter.data for parameter in self.head_parameters], lambda flat: dist.broadcast(flat, src=0))

    def set_schedule_epoch(self) -> None:
        """Tell the schedule its epoch, which the wrappers of accelerate do not pass on."""
        if self._schedule is not None:
            self._schedule.set_epoch(self.state.global_step // self._schedule.steps)

    def parameters_to_clip(self, model: nn.Module) -> list[nn.Parameter]:
        """The student's parameters and those of the heads."""
        return [*model.parameters(), *self.head_parameters]

    def save_extra(self, directory: Path) -> None:
        """Save the heads and the updates of LoRA, and tell about the heads in the model card."""
        self._save_beside(directory)
        wrappers = [module for module in self._loss_modules if isinstance(module, MatryoshkaLoss)]
        describe_training(directory, self.head_losses, wrappers[0].matryoshka_dims if wrappers else ())

    def load_extra(self, directory: Path) -> None:
        """Load the heads and the updates of LoRA, if no file that the folder has a record of is missing or damaged."""
        if (directory / RECORD_NAME).is_file():
            check_files(directory)
        for path, loss in self._head_paths(directory):
            loss.load_heads(path)
        load_lora(self.model, directory)

    def checkpoint_loaded(self) -> None:
        """Tell the losses that their heads are those of the student."""
        for loss in self.head_losses:
            loss.heads_fit()

    def _save_beside(self, directory: Path) -> None:
        for path, loss in self._head_paths(directory):
            loss.save_heads(path)
        save_lora(self.model, directory)

    def _head_paths(self, directory: str | Path) -> list[tuple[Path, TwoViewLoss]]:
        losses = self.head_losses
        names = [HEADS_DIR] if len(losses) == 1 else [f"{HEADS_DIR}-{number}" for number in range(len(losses))]
        return [(Path(directory) / name, loss) for name, loss in zip(names, losses, strict=True)]

    def track_loss_components(self, loss: dict[str, Tensor]) -> None:
        """Remember the terms and metrics of a batch for the next log."""
        sums = self._log_sums["train" if self.model.training else "eval"]
        metrics = loss.metrics if isinstance(loss, LossComponents) else {}
        for name, value in {**loss, **metrics}.items():
            value = value.detach().float()
            # A sum and a count: a term is averaged over the batches that have it, not over all.
            entry = torch.stack([value, torch.ones_like(value)])
            sums[name] = sums[name] + entry if name in sums else entry

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each term and metric since the last log."""
        kind = "train" if "loss" in logs else "eval" if any(name.endswith("_loss") for name in logs) else None
        if kind and self._log_sums[kind]:
            prefix = "eval_" if kind == "eval" else ""
            gathered = nested_gather(self._log_sums[kind], parallel_mode=self.args.parallel_mode)
            for name, entries in gathered.items():
                total, count = entries.reshape(-1, 2).sum(dim=0).tolist()
                logs = {**logs, prefix + name: round(total / count, 4)}
            self._log_sums[kind] = {}
        super().log(logs, start_time)


def check_compilation(mode: str | None, unpad: bool | None, in_parts: bool) -> None:
    """Refuse what a compiled student cannot do.

    Args:
        mode: of ``torch.compile``.
        unpad: whether padding is left out.
        in_parts: whether gradients are added up over parts of a batch (gradient caching or accumulation).

    Raises:
        ValueError: if both are asked for, or gradients would be added up in the memory of a CUDA graph, which the next
            part overwrites (PyTorch's issue 169545).
    """
    if unpad:
        raise ValueError("`unpad` and compilation exclude each other: batches without padding have no static shapes")
    if in_parts and mode in CUDA_GRAPH_MODES:
        raise ValueError(
            f"compiled with mode {mode}, a CUDA graph overwrites gradients that are added up over parts of a batch: "
            "use mode default, or one part (no mini-batches, no gradient accumulation)"
        )


class _Prepare(TrainerCallback):
    """Equal heads at the beginning of training, the schedule's epoch at that of each epoch, an end at divergence."""

    def __init__(self, trainer: KDMCSETrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, *_: Any, **kwargs: Any) -> None:
        self.trainer.broadcast_heads()
        self.trainer.forget_divergence()
        if not args.torch_compile and not views_differ(self.trainer.model):
            config = self.trainer.model.config
            options = [] if config is None else [name for name in config.to_dict() if "dropout" in name]
            logger.warning(
                "the student%s has no dropout: both views of a sentence are equal, and the text loss teaches next to "
                "nothing. Set one in its config.json%s, or take another encoder",
                "" if config is None else f" (a {config.model_type})",
                f" ({', '.join(options)})" if options else "",
            )

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.trainer.set_schedule_epoch()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # After the other callbacks have decided, and before a score, a log or a checkpoint shows what it cannot be.
        last = control.should_training_stop or state.global_step >= state.max_steps
        if last or control.should_log or control.should_evaluate or control.should_save:
            self.trainer.check_converged()


def _unchanged(batch: Any) -> Any:
    return batch


def _check_columns(name: str, dataset: Dataset | IterableDataset) -> None:
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"dataset {name!r} is a streaming one, and the schedule needs the number of its rows: load it with "
            "streaming=False, or make it one with Dataset.from_generator"
        )
    texts = [column for column in dataset.column_names if column != ROW_COLUMN]
    if len(texts) != 1:
        raise ValueError(
            f"dataset {name!r} must have one column of sentences and optionally {ROW_COLUMN!r}, got "
            f"{dataset.column_names}; every other column would be trained on as text: use dataset.select_columns"
        )


def _for_all(tensors: list[Tensor], collective: Any) -> None:
    """Run one collective over many small tensors, in place."""
    if not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    collective(flat)
    for tensor, values in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(values.view_as(tensor))
