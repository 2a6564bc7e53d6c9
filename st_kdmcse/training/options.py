"""What to train, on what, and how: one frozen class with its checks, and the arguments that follow for the trainer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from sentence_transformers import SentenceTransformerTrainingArguments

from st_kdmcse.config import KDMCSEConfig, Recipe
from st_kdmcse.extraction import ExtractionOptions
from st_kdmcse.precision import bfloat16_is_faster, no_bfloat16
from st_kdmcse.processes import check_seed, cpu_only, device_type
from st_kdmcse.training.head_init import HeadInit
from st_kdmcse.training.methods import METHODS
from st_kdmcse.training.metric import MetricOption, check_metric
from st_kdmcse.training.reporting import check_run_name, trackers
from st_kdmcse.training.run_folder import CHECKPOINTS_NAME
from st_kdmcse.training.student import PoolingMode
from st_kdmcse.training.trainer import CUDA_GRAPH_MODES, check_compilation

COMPILE_MODES = ("default", *CUDA_GRAPH_MODES)
"""Modes of ``torch.compile`` that training offers."""

_TRAINING_OF_RECIPE: dict[str, dict[str, Any]] = {
    "grounded": {"head_learning_rate": 1e-3, "captions_per_image_in_batch": 2}
}


@dataclass(frozen=True)
class TrainingOptions:
    """What to train, on what, and how. None stands for the default that depends on the recipe, encoder or device.

    Args:
        model: hub name or folder of the encoder to start from.
        text: file of sentences, one a line, or a table, see :func:`~st_kdmcse.data.read_sentences`.
        text_column: the column of a table.
        deduplicate: leave out repeated sentences.
        features: a feature store, or a JSON file in the KDMCSE authors' format. With ``extraction``, the folder that
            the store is written to; None writes it into ``output_dir``.
        extraction: the image-caption data set and the teacher that features come from.
        exclude_images: a list of images of the features to leave out of the training: an id a line, or a CSV file with
            a column ``image``.
        exclude_overlap: SentEval directory; images with a caption that stands in its STS tasks, whatever the split, are
            left out as well.
        permute_images: give the captions of each image the features of another one, drawn by ``seed``: a control, for
            experiments.
        recipe: the paper's choices, those of its released code, or "grounded", which goes beyond them. It also sets
            ``head_learning_rate`` to 1e-3 and ``captions_per_image_in_batch`` to 2, where they are None.
        method: a name of :data:`~st_kdmcse.training.methods.METHODS`.
        config: options of :class:`~st_kdmcse.KDMCSEConfig` that differ from the recipe.
        eval_data: STS-B, or another set of pairs in any language, as :func:`~st_kdmcse.data.load_sts_benchmark` reads
            it: a SentEval directory, or a dataset's folder, hub name, or NAME:CONFIG.
        metric: what the best model is chosen by, beside STS-B dev, which is evaluated all the same: "nanobeir",
            "nanobeir:msmarco,nq" for the mean NDCG@10 of some of its tasks, or any evaluator of sentence-transformers,
            whose primary metric it is then. None is STS-B dev.
        nanobeir_data: NanoBEIR's hub name, or a folder of its layout; None is
            :data:`~st_kdmcse.training.metric.NANOBEIR_DATA`.
        output_dir: folder of the run; must be empty or absent, except for a run that is resumed.
        export: folder, from ``output_dir`` on, for the model of sentences and images that is made of the best
            checkpoint in the end, see :func:`~st_kdmcse.training.text_image.export_text_image`; None makes none.
        export_teacher: the ``teacher`` of that function; None is the one of ``extraction``, or that the features name.
        export_images: the ``images`` of that function; None are those of ``extraction``.
        epochs: passes over the larger source.
        max_steps: optimizer steps, instead of epochs.
        batch_size: sentences a batch and device; 64, for RoBERTa 128.
        mini_batch_size: sentences in a forward pass; turns on gradient caching, for batches that do not fit in memory.
            None or 0 turns it off.
        matryoshka_dims: sizes that embeddings can be cut to: the loss is summed over the first dimensions of each (of
            MatryoshkaLoss). The embedding size of the student must be among them. None trains the whole embedding.
        gradient_accumulation_steps: batches whose gradients a step adds up, all of sentences or all of pairs. A batch
            has its own negatives alone, so that this is no larger batch; see ``mini_batch_size`` for that.
        gradient_checkpointing: compute activations of the encoder again in the backward pass, to save memory.
        lora: rank R of LoRA, see :func:`~st_kdmcse.training.lora.add_lora`; None or 0 trains all weights.
        lr: peak learning rate, decayed linearly to 0; 3e-5, for RoBERTa 1e-5.
        head_learning_rate: peak learning rate of the heads, decayed likewise; None is ``lr``.
        pooling: "auto", "cls" or "mean", see :func:`~st_kdmcse.build_student`.
        max_seq_length: longest sentence in tokens; longer ones are cut off.
        pair_every: steps from one pair batch to the next; None computes it from the sizes.
        captions_per_image: draw that many captions of each image; None takes all.
        head_init: "random", or "ridge" for heads that start aligned with the untrained student, see
            :func:`~st_kdmcse.training.head_init.align_heads`.
        captions_per_image_in_batch: draw that many captions of each image for a pair batch; None draws captions one by
            one.
        seed: seed of initialisation, data order and dropout.
        eval_steps: steps between evaluations on STS-B dev; 0 turns evaluation off.
        save_steps: steps between checkpoints. A single process writes one every ten minutes as well.
        gather_across_devices: use the batches of all devices as negatives.
        compile: mode of ``torch.compile`` for the student ("default", or "reduce-overhead" with CUDA graphs, which
            exclude ``mini_batch_size``); the lengths of batches are then multiples of 8 tokens.
        unpad: leave padding out of what the student computes; None does so on a CPU where the student allows it.
        bf16: bfloat16 autocast, with weights, optimizer, heads and losses in float32; None turns it on where it is
            faster, on a GPU or a CPU. A run that is resumed goes on as it was begun.
        workers: processes that tokenize.
        report_to: trackers that get the curves, separated by commas: "tensorboard" (event files go to
            ``output_dir/runs``), "wandb", "trackio" or another one of transformers; "none", or "all" that are
            installed.
        run_name: what trackers call the run; None is ``output_dir``.
        push_to_hub: a repository of the Hugging Face hub that gets model, card and heads at the end.
        private: nobody else is to see that repository.
        resume: go on from the newest checkpoint in ``output_dir``.

    Raises:
        ValueError: for options that exclude each other or are out of range; names the parameter.
        ImportError: for a tracker whose package is missing.
    """

    model: str = "bert-base-uncased"
    text: Path | None = None
    text_column: str | None = None
    deduplicate: bool = False
    features: Path | None = None
    extraction: ExtractionOptions | None = None
    exclude_images: Path | None = None
    exclude_overlap: Path | None = None
    permute_images: bool = False
    recipe: Recipe = "paper"
    method: str = "kdmcse"
    config: Mapping[str, Any] = field(default_factory=dict)
    eval_data: str = "sentence-transformers/stsb"
    metric: MetricOption = None
    nanobeir_data: str | None = None
    output_dir: Path = Path("kdmcse-bert")
    export: Path | None = None
    export_teacher: str | None = None
    export_images: Path | None = None
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int | None = None
    mini_batch_size: int | None = None
    matryoshka_dims: Sequence[int] | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    lora: int | None = None
    lr: float | None = None
    head_learning_rate: float | None = None
    pooling: PoolingMode = "auto"
    max_seq_length: int = 32
    pair_every: int | None = None
    captions_per_image: int | None = None
    captions_per_image_in_batch: int | None = None
    head_init: HeadInit = "random"
    seed: int = 42
    eval_steps: int = 125
    save_steps: int = 1000
    gather_across_devices: bool = False
    compile: str | None = None
    unpad: bool | None = None
    bf16: bool | None = None
    workers: int = 0
    report_to: str = "none"
    run_name: str | None = None
    push_to_hub: str | None = None
    private: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        for name, default in _TRAINING_OF_RECIPE.get(self.recipe, {}).items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        if self.method not in METHODS:
            raise ValueError(f"`method` must be one of {', '.join(METHODS)}, got {self.method!r}")
        positive = ("epochs", "max_steps", "batch_size", "lr", "head_learning_rate", "captions_per_image", "save_steps")
        for name in (*positive, "captions_per_image_in_batch", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive, got {value}")
        check_seed(self.seed)
        check_metric(self.metric)
        if self.metric is not None and not self.eval_steps:
            raise ValueError("`metric` chooses among evaluations, and `eval_steps` 0 turns them off: leave one out")
        if self.nanobeir_data is not None and not isinstance(self.metric, str):
            raise ValueError("`nanobeir_data` is read for `metric` nanobeir: give both, or none")
        for name in ("eval_steps", "workers", "mini_batch_size", "lora"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}")
        if self.pair_every is not None and self.pair_every < 2:
            raise ValueError(f"`pair_every` must be at least 2 (every second batch holds pairs), got {self.pair_every}")
        unread = [f"`{name}`" for name in self.config if name not in METHODS[self.method].reads]
        if unread:
            raise ValueError(f"method {self.method} has no option {', '.join(sorted(unread))}")
        if METHODS[self.method].needs_features and not self.has_features:
            raise ValueError(
                f"method {self.method} learns from teacher features: give `features`, or `captions` and `images`"
            )
        if self.text is None and not self.has_features:
            raise ValueError("there is nothing to train on: give `text`, `features`, or both")
        for name in ("exclude_images", "exclude_overlap"):
            if getattr(self, name) is not None and not self.has_features:
                raise ValueError(f"`{name}` leaves images of `features` out: give both, or none")
        choices = {"recipe": Recipe, "pooling": PoolingMode, "head_init": HeadInit}
        for name, allowed in ((name, get_args(kind)) for name, kind in choices.items()):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if self.head_init == "ridge" and not METHODS[self.method].needs_features:
            raise ValueError(f"method {self.method} has no heads that `head_init` could align: leave it out")
        if self.bf16 and not bfloat16_is_faster(device_type()):
            raise ValueError(f"`bf16`: {no_bfloat16(device_type())}; leave it out")
        if self.compile not in (None, *COMPILE_MODES):
            raise ValueError(f"`compile` must be one of {', '.join(COMPILE_MODES)}, got {self.compile!r}")
        if self.compile:
            in_parts = bool(self.mini_batch_size) or self.gradient_accumulation_steps > 1
            check_compilation(self.compile, self.unpad, in_parts)
        if self.matryoshka_dims is not None:
            object.__setattr__(self, "matryoshka_dims", _sizes(self.matryoshka_dims))
        if self.private and self.push_to_hub is None:
            raise ValueError("`private` is said of the repository of `push_to_hub`: give both, or none")
        check_run_name(self.run_name)
        trackers(self.report_to)
        has_heads = self.loss_config().multimodal_weight != 0 and METHODS[self.method].needs_features
        if self.export is not None and not has_heads:
            raise ValueError("`export` needs the heads of images, which mcse and kdmcse train: choose one of them")
        if self.export is None and (self.export_teacher or self.export_images):
            raise ValueError("`export_teacher` and `export_images` go with `export`")

    @property
    def has_features(self) -> bool:
        """Whether there are teacher features, or a data set to extract them from."""
        return self.features is not None or self.extraction is not None

    def loss_config(self) -> KDMCSEConfig:
        """The recipe with the overrides of the method and of the user."""
        recipe: Callable[..., KDMCSEConfig] = getattr(KDMCSEConfig, self.recipe)
        return recipe(**{**self.config, **METHODS[self.method].fixed})

    def trainer_arguments(self, roberta: bool) -> SentenceTransformerTrainingArguments:
        """The arguments of the stock trainer.

        Args:
            roberta: whether the encoder is a RoBERTa, for which batch size and learning rate have other defaults.
        """
        cuda = torch.cuda.is_available()
        evaluates = self.eval_steps > 0
        return SentenceTransformerTrainingArguments(
            output_dir=str(self.output_dir / CHECKPOINTS_NAME),
            num_train_epochs=self.epochs,
            max_steps=self.max_steps or -1,
            per_device_train_batch_size=self.batch_size or (128 if roberta else 64),
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            learning_rate=self.lr or (1e-5 if roberta else 3e-5),
            lr_scheduler_type="linear",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=bfloat16_is_faster(device_type()) if self.bf16 is None else self.bf16,
            torch_compile=self.compile is not None,
            torch_compile_mode=self.compile,
            seed=self.seed,
            use_cpu=cpu_only(),
            eval_strategy="steps" if evaluates else "no",
            eval_steps=self.eval_steps if evaluates else None,
            save_strategy="steps",
            save_steps=self.save_steps,
            logging_steps=25,
            logging_nan_inf_filter=False,  # the filter would wait for the device at each step
            report_to=trackers(self.report_to),
            run_name=self.run_name or str(self.output_dir),
            dataloader_num_workers=self.workers,
            dataloader_pin_memory=cuda,
            accelerator_config={"non_blocking": cuda},
        )


def _sizes(given: Sequence[int]) -> tuple[int, ...]:
    """Distinct sizes of embeddings, the largest first."""
    whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in given)
    if not given or not whole or len(set(given)) < len(given):
        raise ValueError(f"`matryoshka_dims` must be different whole numbers from 1 on, got {list(given)}")
    return tuple(sorted(given, reverse=True))
