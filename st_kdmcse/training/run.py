"""A whole training run: checks, data, student, loss, trainer, evaluation, saving. The scripts are thin over it."""

from __future__ import annotations

import json
import logging
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from transformers import AutoConfig, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from st_kdmcse.config import KDMCSEConfig
from st_kdmcse.data import FeatureStore, STSPairs, import_released_json, load_sts_benchmark, read_sentences, sha256_file
from st_kdmcse.data.sts import STSTask
from st_kdmcse.evaluation.similarity import TokenizedSimilarityEvaluator
from st_kdmcse.extraction import ExtractionOptions, extract_dataset
from st_kdmcse.files import write_folder, write_json
from st_kdmcse.losses import (
    CachedKDMCSELoss,
    CachedMCSELoss,
    CachedSimCSELoss,
    KDMCSELoss,
    MCSELoss,
    SimCSELoss,
)
from st_kdmcse.losses.base import TwoViewLoss
from st_kdmcse.losses.cached import GradientCaching
from st_kdmcse.processes import cpu_only, processes
from st_kdmcse.provenance import device_name, versions
from st_kdmcse.training.student import build_student
from st_kdmcse.training.trainer import CUDA_GRAPH_MODES, KDMCSETrainer, check_compilation

logger = logging.getLogger(__name__)

COMPILE_MODES = ("default", *CUDA_GRAPH_MODES)
METRIC = "eval_sts-dev_spearman_cosine"
SUMMARY_NAME = "training_summary.json"
RUN_NAME = "run.json"
CHECKPOINTS_NAME = "checkpoints"
_FEATURES = "features"
LAST_NAME = "last"
_SECONDS_BETWEEN_CHECKPOINTS = 600
_STATE_FILES = (
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "training_args.bin",
)

# Options that may differ between a run and its resumption: they do not change what is computed, or (text, features)
# their content is compared.
_FREE_TO_CHANGE = {
    "resume",
    "report_to",
    "output_dir",
    "workers",
    "text",
    "features",
    "extraction",
    "eval_data",
    "save_steps",
}

# Records of runs did not have these checksums once; such a run may still go on.
_CHECKSUMS_ADDED = {"sts-dev", "sts-test"}


class Interrupted(KeyboardInterrupt):
    """Training was stopped by a signal; the message names the checkpoint to resume from."""


@dataclass(frozen=True)
class TrainingOptions:
    """What to train, on what, and how. None stands for the recipe's default.

    Args:
        model: hub name or folder of the encoder to start from.
        text: file of sentences, one a line (plain or .gz), or a column of a .parquet.
        text_column: the column of a .parquet.
        deduplicate: leave out sentences that came before.
        features: a feature store directory, or a JSON file of the KDMCSE authors' format; with ``extraction``, where
            the store goes if it is not there yet (None is a folder of ``output_dir``).
        extraction: the image-caption data set and the teacher that features come from.
        recipe: the paper's choices or those of its released code.
        method: a name of :data:`METHODS`.
        config: options of :class:`KDMCSEConfig` that differ from the recipe.
        eval_data: SentEval directory, or a dataset with STS-B's columns (hub name or folder).
        output_dir: where the model goes; must be empty or absent, unless the run is resumed.
        epochs: passes over the larger source.
        max_steps: optimizer steps, instead of epochs.
        batch_size: sentences a step and device; 64, for RoBERTa 128.
        mini_batch_size: sentences in a forward pass, with gradient caching, for batches that do not fit in memory; None
            or 0 is without.
        lr: peak learning rate, decayed linearly to 0; 3e-5, for RoBERTa 1e-5.
        max_seq_length: tokens after which sentences are cut off.
        pair_every: every how many steps a pair batch comes; computed from the sizes.
        captions_per_image: draw that many captions of each image; all.
        seed: of initialisation, data order and dropout.
        eval_steps: steps between evaluations on STS-B dev; 0 evaluates never.
        save_steps: steps between checkpoints, which a run that was killed goes on from; a single process writes one
            every ten minutes as well.
        gather_across_devices: use the batches of all devices as negatives.
        compile: compile the student with this mode of torch.compile ("default"; "reduce-overhead" is CUDA graphs, which
            exclude mini_batch_size), and round the lengths of batches up to multiples of 8 tokens.
        unpad: leave padding out of what the student computes; None does so on a CPU, unless it is compiled or cannot.
        bf16: bfloat16 autocast; on where a GPU has it.
        workers: processes that tokenize.
        report_to: where the Trainer reports: "none", "tensorboard", "wandb", ...
        resume: go on from the newest checkpoint in ``output_dir``.
    """

    model: str = "bert-base-uncased"
    text: Path | None = None
    text_column: str | None = None
    deduplicate: bool = False
    features: Path | None = None
    extraction: ExtractionOptions | None = None
    recipe: Literal["paper", "released"] = "paper"
    method: str = "kdmcse"
    config: Mapping[str, Any] = field(default_factory=dict)
    eval_data: str = "sentence-transformers/stsb"
    output_dir: Path = Path("kdmcse-bert")
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int | None = None
    mini_batch_size: int | None = None
    lr: float | None = None
    max_seq_length: int = 32
    pair_every: int | None = None
    captions_per_image: int | None = None
    seed: int = 42
    eval_steps: int = 125
    save_steps: int = 1000
    gather_across_devices: bool = False
    compile: str | None = None
    unpad: bool | None = None
    bf16: bool | None = None
    workers: int = 0
    report_to: str = "none"
    resume: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("epochs", "max_steps", "batch_size", "lr", "captions_per_image", "save_steps"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}")
        for name in ("eval_steps", "workers", "mini_batch_size"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.pair_every is not None and self.pair_every < 2:
            raise ValueError(
                f"pair_every must be at least 2 (a pair batch at every second step), got {self.pair_every}"
            )
        unread = [f"--{name.replace('_', '-')}" for name in self.config if name not in METHODS[self.method].reads]
        if unread:
            raise ValueError(f"method {self.method} has no option {', '.join(sorted(unread))}")
        has_features = self.features is not None or self.extraction is not None
        if METHODS[self.method].needs_features and not has_features:
            raise ValueError(
                f"method {self.method} learns from teacher features: give --features STORE, or --captions and --images"
            )
        if self.text is None and not has_features:
            raise ValueError("there is nothing to train on: give --text FILE, --features STORE, or both")
        if self.bf16 and not torch.cuda.is_available():
            raise ValueError("bf16 needs a GPU; on a CPU it is about 100 times slower than float32")
        if self.compile not in (None, *COMPILE_MODES):
            raise ValueError(f"compile must be one of {', '.join(COMPILE_MODES)}, got {self.compile!r}")
        if self.compile:
            check_compilation(self.compile, self.unpad, bool(self.mini_batch_size))
        self.loss_config()

    def loss_config(self) -> KDMCSEConfig:
        """The recipe with the overrides of the method and of the user."""
        recipe = KDMCSEConfig.released if self.recipe == "released" else KDMCSEConfig.paper
        return recipe(**{**self.config, **METHODS[self.method].fixed})


Build = Callable[[SentenceTransformer, KDMCSEConfig, FeatureStore | None, bool, int | None], TwoViewLoss]


class Method(NamedTuple):
    """A row of the paper's tables.

    Attributes:
        build: makes the loss from student, config, features, whether to gather across devices, and the size of
            mini-batches, if gradients are to be cached.
        needs_features: whether it learns from a teacher.
        reads: the options of the config that it has.
        fixed: the options that define it.
    """

    build: Build
    needs_features: bool
    reads: frozenset[str]
    fixed: Mapping[str, Any] = {}


def _kdmcse(
    model: SentenceTransformer,
    config: KDMCSEConfig,
    store: FeatureStore | None,
    gather: bool,
    mini_batch: int | None = None,
) -> TwoViewLoss:
    make = _cached(KDMCSELoss, CachedKDMCSELoss, mini_batch)
    return make(model, config, store.dim if store else 512, store, gather)


def _mcse(use_captions: bool) -> Build:
    def build(
        model: SentenceTransformer,
        config: KDMCSEConfig,
        store: FeatureStore | None,
        gather: bool,
        mini_batch: int | None = None,
    ) -> TwoViewLoss:
        return _cached(MCSELoss, CachedMCSELoss, mini_batch)(
            model,
            use_captions=use_captions,
            teacher_dim=store.dim if store else 512,
            features=store,
            gather_across_devices=gather,
            **{name: getattr(config, name) for name in _MCSE_OPTIONS},
        )

    return build


def _simcse(
    model: SentenceTransformer,
    config: KDMCSEConfig,
    store: FeatureStore | None,
    gather: bool,
    mini_batch: int | None = None,
) -> TwoViewLoss:
    make = _cached(SimCSELoss, CachedSimCSELoss, mini_batch)
    return make(model, config.text_temperature, config.text_margin, gather)


def _cached(
    plain: type[TwoViewLoss], cached: type[GradientCaching], mini_batch: int | None
) -> Callable[..., TwoViewLoss]:
    return partial(cached, mini_batch_size=mini_batch) if mini_batch else plain


_ALL_OPTIONS = frozenset(option.name for option in fields(KDMCSEConfig))
_SIMCSE_OPTIONS = frozenset({"text_temperature", "text_margin"})
_MCSE_OPTIONS = _SIMCSE_OPTIONS | {"multimodal_weight", "temperature", "projection_dim"}

METHODS: dict[str, Method] = {
    "kdmcse": Method(_kdmcse, True, _ALL_OPTIONS),
    "kdmcse-without-adapacse": Method(_kdmcse, True, _ALL_OPTIONS - {"margin"}, {"margin": 0.0}),
    "kdmcse-without-filter": Method(_kdmcse, True, _ALL_OPTIONS - {"filter_negatives"}, {"filter_negatives": False}),
    "mcse": Method(_mcse(use_captions=False), True, _MCSE_OPTIONS),
    "mcse-clip-text": Method(_mcse(use_captions=True), True, _MCSE_OPTIONS),
    "simcse": Method(_simcse, False, _SIMCSE_OPTIONS),
}
"""The methods of Tables 1, 3 and 5 by name."""


def train(options: TrainingOptions, stop: StopOnSignal | None = None) -> dict[str, Any]:
    """Train a student and save it as a stock sentence-transformers model.

    ``output_dir`` then holds the model with the best STS-B dev score, its heads (``heads/``), the last model
    (``last/``), the checkpoints and ``training_summary.json``.

    Args:
        options: what to train.
        stop: what listens for Ctrl-C, to ask it afterwards; one that came with the last step does not stop this run.

    Returns:
        The content of ``training_summary.json``.

    Raises:
        ValueError, FileNotFoundError: for input that cannot be trained on, before the model is loaded; ValueError also
            if training has diverged.
        Interrupted: after Ctrl-C or SIGTERM, when a checkpoint has been written.
    """
    state = processes()
    # The cheap checks first: a conversion of features may take an hour.
    if state.is_main_process:
        _check_output_dir(options)
    arguments = _arguments(options, roberta="roberta" in _encoder_type(options.model))
    inputs = _Inputs.load(options, state)
    checkpoint = latest_checkpoint(options.output_dir) if options.resume else None
    run = _claim(options, inputs, arguments) if state.is_main_process else {}
    state.wait_for_everyone()

    set_seed(options.seed)
    model = build_student(options.model, options.max_seq_length)
    loss = METHODS[options.method].build(
        model, options.loss_config(), inputs.store, options.gather_across_devices, options.mini_batch_size
    )
    evaluator = sts_evaluator(inputs.dev, "sts-dev") if inputs.dev else None
    if evaluator and "score_before" not in run and state.is_main_process:
        run["score_before"] = spearman(evaluator, model)
        write_json(options.output_dir / RUN_NAME, run)
    stop = stop or StopOnSignal()
    trainer = KDMCSETrainer(
        model,
        arguments,
        inputs.sources,
        loss=loss,
        evaluator=evaluator,
        pair_every=options.pair_every,
        pad_to_multiple_of=8 if options.compile else 1,
        unpad=options.unpad,
        callbacks=[stop, _AtEnd(), _SaveByTime()],
    )
    best = _KeepBest(options.output_dir / CHECKPOINTS_NAME, trainer) if evaluator else None
    if best:
        trainer.add_callback(best)
    started = time.perf_counter()
    with stop.listening():
        _train_from(trainer, checkpoint, best)
    seconds = time.perf_counter() - started
    last = latest_checkpoint(options.output_dir)
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"stopped; {last} holds everything: run the same command with --resume to go on")
    summary: dict[str, Any] = {}
    if state.is_main_process:
        _check_converged(trainer)
        if best and best.path:
            trainer.load_checkpoint(best.path)
        trainer.save_model(str(options.output_dir))
        (options.output_dir / "training_args.bin").unlink(missing_ok=True)  # a pickle that loading does not need
        if evaluator and last is not None:
            _copy_model(last, options.output_dir / LAST_NAME)
        summary = _summary(options, trainer, run, inputs, seconds)
        write_json(options.output_dir / SUMMARY_NAME, summary)
    state.wait_for_everyone()
    return summary


def check_inputs(options: TrainingOptions) -> None:
    """Load what a run reads and its encoder, as the run will: for many runs of the same data, before the first one.

    Features that are still to be extracted or converted are not looked at.

    Args:
        options: of any of the runs.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: for what the run would fail of; names the option or the file.
    """
    _check_paths(options)
    _encoder_type(options.model)
    _load_sts(options)
    if options.text is not None:
        read_sentences(options.text, options.text_column, options.deduplicate)
    if options.features is not None and options.extraction is None and options.features.is_dir():
        FeatureStore.open(options.features).verify()
    try:
        build_student(options.model, options.max_seq_length)
    except ValueError:
        raise
    except Exception as error:  # whatever the libraries raise for damaged or missing weights
        raise ValueError(f"--model {options.model} cannot be loaded: {error}") from error


def data_checksums(options: TrainingOptions) -> dict[str, str]:
    """SHA-256 of the data of a run: "text", "features", and where it evaluates "sts-dev" and "sts-test".

    Args:
        options: with features, if there are any, in a feature store.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: if the data are not there or malformed.
    """
    _check_paths(options)
    checksums = _sts_checksums(*_load_sts(options))
    if options.text is not None:
        checksums["text"] = sha256_file(options.text)
    if options.features is not None:
        checksums["features"] = FeatureStore.open(options.features).checksum
    return checksums


def changes_since_start(options: TrainingOptions, checksums: Mapping[str, str] | None = None) -> list[str]:
    """What differs between the run in ``output_dir``, finished or not, and these options and data.

    Args:
        options: with features, if there are any, in a feature store.
        checksums: of the data, where :func:`data_checksums` has been asked already.

    Returns:
        Each difference in words, such as "max_steps was 100, is 200"; nothing if there is no run yet.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: if the record of the run is damaged, or the data are not there.
    """
    path = options.output_dir / RUN_NAME
    if not path.is_file():
        return []
    if checksums is None:
        checksums = data_checksums(options)
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        # Whether the encoder is a RoBERTa decides only defaults, which are not compared.
        return _changes(earlier, _record(options, checksums, _arguments(options, roberta=False)))
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove its folder to train anew") from error


def latest_checkpoint(output_dir: Path) -> Path | None:
    """The newest checkpoint of a run that was written to its end, None if there is none.

    Args:
        output_dir: the directory that :func:`train` was given.
    """
    complete = []
    for path in (output_dir / CHECKPOINTS_NAME).glob("checkpoint-*"):
        # The trainer state is written after everything else: with it, a checkpoint is whole.
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            logger.warning("%s is incomplete and is passed over", path)
            continue
        complete.append((int(path.name.rpartition("-")[2]), path))
    return max(complete)[1] if complete else None


@dataclass(frozen=True)
class _Inputs:
    """What a run reads: loaded and checked."""

    sources: dict[str, Dataset]
    store: FeatureStore | None
    dev: STSPairs | None
    test: STSPairs | None
    checksums: dict[str, str]

    @classmethod
    def load(cls, options: TrainingOptions, state: PartialState) -> _Inputs:
        _check_paths(options)
        dev, test = _load_sts(options)
        sources: dict[str, Dataset] = {}
        checksums = _sts_checksums(dev, test)
        store = None
        if options.text is not None:
            sources["text"] = read_sentences(options.text, options.text_column, options.deduplicate)
            checksums["text"] = sha256_file(options.text)
        if options.features is not None or options.extraction is not None:
            store = _open_features(options, state)
            if state.is_main_process:
                store.verify()
            sources["pairs"] = store.dataset(captions_per_image=options.captions_per_image, seed=options.seed)
            checksums["features"] = store.checksum
        return cls(sources, store, dev, test, checksums)


def _check_paths(options: TrainingOptions) -> None:
    for name in ("text", "features"):
        path = getattr(options, name)
        made = name == "features" and options.extraction is not None
        if path is not None and not path.exists() and not made:
            raise FileNotFoundError(f"--{name} {path} does not exist")


def _load_sts(options: TrainingOptions) -> tuple[STSPairs | None, STSPairs | None]:
    """STS-B dev and test, for a run that evaluates."""
    if not options.eval_steps:
        return None, None
    return load_sts_benchmark(options.eval_data, "dev"), load_sts_benchmark(options.eval_data, "test")


def _sts_checksums(*splits: STSPairs | None) -> dict[str, str]:
    return {pairs.name: STSTask("STS-B", (pairs,)).checksum for pairs in splits if pairs is not None}


def _train_from(trainer: KDMCSETrainer, checkpoint: Path | None, best: _KeepBest | None) -> None:
    """Train, from a checkpoint if there is one; from the last one of a run, which was killed later, do not train."""
    if checkpoint is None:
        trainer.train()
        return
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:
        trainer.state = state
        trainer.load_checkpoint(checkpoint)
        if best:
            best.restore(state)


def _open_features(options: TrainingOptions, state: PartialState) -> FeatureStore:
    made = options.output_dir / _FEATURES
    if options.extraction is not None:
        path = options.features or made
        report = extract_dataset(options.extraction, path)
        if state.is_main_process:
            logger.info("features: %s", report)
        return FeatureStore.open(path)
    path = Path(options.features or "")
    if path.is_dir():
        return FeatureStore.open(path)
    with state.main_process_first():
        if made.exists():  # only when resuming: the output directory was empty otherwise
            return FeatureStore.open(made)
        return import_released_json(path, made)


def _check_output_dir(options: TrainingOptions) -> None:
    output_dir = options.output_dir
    if output_dir.exists() and not output_dir.is_dir():
        raise ValueError(f"--output-dir {output_dir} is a file")
    found = {path.name for path in output_dir.iterdir()} if output_dir.is_dir() else set()
    found = {name for name in found if not name.endswith(".tmp")}  # a file that was being written at a kill
    if options.extraction is not None and found and all(name.startswith(_FEATURES) for name in found):
        return  # an extraction that was interrupted or finished, and no training yet
    if options.resume:
        if found and not (output_dir / RUN_NAME).is_file():
            raise ValueError(f"--output-dir {output_dir} holds no run to resume: there is no {RUN_NAME} in it")
        if (output_dir / SUMMARY_NAME).is_file():
            raise ValueError(f"the run in {output_dir} is finished: its results are in {output_dir / SUMMARY_NAME}")
    elif found:
        remedy = "choose another directory"
        if (output_dir / RUN_NAME).is_file():
            remedy = f"add --resume to go on with it, or {remedy}"
        elif found == {_FEATURES}:
            remedy = f"move the converted features in it away and give them as --features, or {remedy}"
        raise ValueError(f"--output-dir {output_dir} is not empty: {remedy}")


def _claim(
    options: TrainingOptions, inputs: _Inputs, arguments: SentenceTransformerTrainingArguments
) -> dict[str, Any]:
    """The record of the run; a resumed one must have been started with the same options and data."""
    run = _record(options, inputs.checksums, arguments)
    path = options.output_dir / RUN_NAME
    if path.is_file():
        earlier: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        changes = _changes(earlier, run)
        if changes:
            raise ValueError(f"the run in {options.output_dir} was started otherwise: {'; '.join(changes)}")
        return earlier
    options.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, run)
    return run


def _record(
    options: TrainingOptions, checksums: Mapping[str, str], arguments: SentenceTransformerTrainingArguments
) -> dict[str, Any]:
    return {
        "options": json.loads(json.dumps(asdict(options), default=str)),
        "processes": arguments.world_size,
        "bf16": arguments.bf16,
        "batch_size": arguments.per_device_train_batch_size,
        "learning_rate": arguments.learning_rate,
        "data_sha256": dict(checksums),
    }


def _changes(earlier: Mapping[str, Any], run: Mapping[str, Any]) -> list[str]:
    before, now = (
        {**record["options"], "processes": record["processes"], "bf16": record["bf16"]} for record in (earlier, run)
    )
    changes = [
        f"{name} was {before[name]!r}, is {value!r}"
        for name, value in now.items()
        if name not in _FREE_TO_CHANGE and name in before and before[name] != value
    ]
    checksums = earlier["data_sha256"], run["data_sha256"]
    return changes + [
        f"the {name} data have changed"
        for name in sorted({*checksums[0], *(checksums[1].keys() - _CHECKSUMS_ADDED)})
        if checksums[0].get(name) != checksums[1].get(name)
    ]


def _encoder_type(model: str) -> str:
    try:
        return str(AutoConfig.from_pretrained(model).model_type)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--model {model} is neither the folder of an encoder (with a config.json) nor a name that the hub knows, "
            f"or the hub cannot be reached: {error}"
        ) from error


def _arguments(options: TrainingOptions, roberta: bool) -> SentenceTransformerTrainingArguments:
    cuda = torch.cuda.is_available()
    evaluates = options.eval_steps > 0
    return SentenceTransformerTrainingArguments(
        output_dir=str(options.output_dir / CHECKPOINTS_NAME),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.batch_size or (128 if roberta else 64),
        learning_rate=options.lr or (1e-5 if roberta else 3e-5),
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=(cuda and torch.cuda.is_bf16_supported()) if options.bf16 is None else options.bf16,
        torch_compile=options.compile is not None,
        torch_compile_mode=options.compile,
        seed=options.seed,
        use_cpu=cpu_only(),
        eval_strategy="steps" if evaluates else "no",
        eval_steps=options.eval_steps if evaluates else None,
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=2,
        logging_steps=25,
        logging_nan_inf_filter=False,  # it would wait for the device at each step
        report_to=options.report_to,
        dataloader_num_workers=options.workers,
        dataloader_pin_memory=cuda,
        accelerator_config={"non_blocking": cuda},
    )


def sts_evaluator(pairs: STSPairs, name: str) -> TokenizedSimilarityEvaluator:
    """The evaluator of sentence pairs, whose main score is the Spearman correlation of cosines with the gold."""
    return TokenizedSimilarityEvaluator(pairs.sentences1, pairs.sentences2, pairs.scores, name=name)


def spearman(evaluator: TokenizedSimilarityEvaluator, model: SentenceTransformer) -> float:
    """The main score of a model, from -1 to 1."""
    return float(evaluator(model)[f"{evaluator.name}_spearman_cosine"])


def _check_converged(trainer: KDMCSETrainer) -> None:
    for entry in trainer.state.log_history:
        if METRIC in entry and not math.isfinite(entry[METRIC]):
            raise ValueError(
                f"training diverged: the score on STS-B dev at step {entry['step']} is not a number; train anew with a "
                "smaller --lr"
            )


def _summary(
    options: TrainingOptions,
    trainer: KDMCSETrainer,
    run: Mapping[str, Any],
    inputs: _Inputs,
    seconds: float,
) -> dict[str, Any]:
    history = trainer.state.log_history
    curve = [{"step": entry["step"], "spearman": entry[METRIC]} for entry in history if METRIC in entry]
    best = max(curve, key=lambda point: point["spearman"], default=None)
    cuda = torch.cuda.is_available()
    return {
        "method": options.method,
        "recipe": options.recipe,
        "config": trainer.head_losses[0].get_config_dict(),
        "options": run["options"],
        "batch_size": trainer.args.per_device_train_batch_size,
        "learning_rate": trainer.args.learning_rate,
        "bf16": trainer.args.bf16,
        "processes": trainer.args.world_size,
        "steps": trainer.state.global_step,
        "seed": options.seed,
        "data_sha256": inputs.checksums,
        "teacher": inputs.store.teacher if inputs.store else None,
        "sts_dev_before": run.get("score_before"),
        "sts_dev_curve": curve,
        "sts_dev_best": best,
        "sts_dev_last": curve[-1] if curve else None,
        "sts_test_of_best": spearman(sts_evaluator(inputs.test, "sts-test"), trainer.model) if inputs.test else None,
        "losses": [entry for entry in history if "loss" in entry],
        "train_seconds": round(seconds, 1),
        "resumed": options.resume,
        "peak_memory_mib": {
            "device": round(torch.cuda.max_memory_allocated() / 2**20) if cuda else None,
            "process": _peak_memory_mib(),
        },
        "device": device_name(),
        "versions": versions(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _peak_memory_mib() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / 2**20 if sys.platform == "darwin" else peak / 2**10)  # bytes there, KiB elsewhere


def _copy_model(checkpoint: Path, target: Path) -> None:
    """The model of a checkpoint, without the state of the trainer."""
    shutil.copytree(checkpoint, target, ignore=shutil.ignore_patterns(*_STATE_FILES), dirs_exist_ok=True)


class StopOnSignal(TrainerCallback):
    """On Ctrl-C or SIGTERM, finish the step, write a checkpoint and stop; a second Ctrl-C stops at once.

    Attributes:
        requested: whether a signal came.
    """

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the place of the signals' handlers meanwhile."""
        previous = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        logger.warning("stopping after this step; a checkpoint will be written (Ctrl-C again to stop at once)")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop after this step if a signal came."""
        if args.world_size > 1:  # processes may get the signal at different steps, and must stop at the same
            flag = torch.tensor(int(self.requested), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            self.requested = bool(flag.item())
        if self.requested:
            control.should_save = True
            control.should_training_stop = True


class _AtEnd(TrainerCallback):
    """Score and save the last step too, whatever the intervals: the last model is reported beside the best one."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = args.eval_strategy != "no"
            control.should_save = True


class _SaveByTime(TrainerCallback):
    """Checkpoints after some minutes of slow steps; several processes would not agree on the time."""

    def __init__(self) -> None:
        self._saved = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.world_size == 1 and time.monotonic() - self._saved > _SECONDS_BETWEEN_CHECKPOINTS:
            control.should_save = True

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._saved = time.monotonic()


class _KeepBest(TrainerCallback):
    """Keep student and heads of the best score on STS-B dev, in a folder beside the checkpoints.

    Attributes:
        path: the folder, ``best-STEP``; None before the first evaluation.
    """

    def __init__(self, checkpoints: Path, trainer: KDMCSETrainer) -> None:
        self._checkpoints, self._trainer = checkpoints, trainer
        self.path: Path | None = None
        self._score = -math.inf

    def restore(self, state: TrainerState) -> None:
        """Find what was kept up to the checkpoint of this state; what came after it is to be computed again."""
        scores = {f"best-{entry['step']}": entry[METRIC] for entry in state.log_history if METRIC in entry}
        self.path = max(
            (path for path in self._folders() if path.name in scores), key=lambda path: scores[path.name], default=None
        )
        self._score = scores[self.path.name] if self.path else -math.inf

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        self.restore(state)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float],
        **kwargs: Any,
    ) -> None:
        """Save, if the score is a new best."""
        if METRIC not in metrics or not metrics[METRIC] > self._score or not state.is_world_process_zero:
            return
        path = self._checkpoints / f"best-{state.global_step}"
        write_folder(path, self._trainer.save_weights)
        self.path, self._score = path, metrics[METRIC]

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        """Delete earlier bests, which no checkpoint needs any more."""
        for path in self._folders():
            if self.path is not None and path != self.path:
                shutil.rmtree(path, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return [path for path in self._checkpoints.glob("best-*") if path.name[len("best-") :].isdigit()]
