"""A raw student: an encoder after masked language modelling, which has unlearned what it knew of similarity."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as transformers_logging

from st_kdmcse.data import read_sentences, sha256_file
from st_kdmcse.files import locked, write_json
from st_kdmcse.precision import bfloat16_is_faster, no_bfloat16
from st_kdmcse.processes import check_seed, cpu_only, device_type
from st_kdmcse.provenance import device_name, versions
from st_kdmcse.training.callbacks import EvaluateAtEnd, Interrupted, SaveByTime, StopOnSignal
from st_kdmcse.training.checkpoints import (
    KeepTwoCheckpoints,
    RecordCheckpoints,
    latest_checkpoint,
    removing_partial,
    step_of,
    writing,
)
from st_kdmcse.training.inputs import encoder_type
from st_kdmcse.training.run_folder import (
    CHECKPOINTS_NAME,
    RUN_NAME,
    SUMMARY_NAME,
    check_output_dir,
    claim_student,
    precision_to_resume,
    run_to_go_on,
    save_into,
)
from st_kdmcse.training.student import build_student, encoder_folder, student_checksums


@dataclass(frozen=True)
class MaskingOptions:
    """A run of masked language modelling.

    Args:
        model: hub name or folder of the encoder to start from.
        text: file of sentences, see :func:`~st_kdmcse.data.read_sentences`.
        output_dir: folder of the run, then of the model; must be empty or absent, except for a run that is resumed.
        text_column: the column of a table.
        max_steps: optimizer steps.
        batch_size: sentences a step.
        lr: peak learning rate, decayed linearly to 0.
        max_seq_length: longest sentence in tokens; longer ones are cut off.
        masked: share of the tokens that are predicted, from 0 to 1, both excluded.
        seed: seed of the new prediction head, data order and dropout; masks follow from the batches.
        save_steps: steps between checkpoints; there is one every ten minutes as well.
        bf16: bfloat16 autocast; None turns it on where it is faster.
        resume: go on from the newest checkpoint in ``output_dir``.

    Raises:
        ValueError: for an option out of range; names the parameter.
    """

    model: str
    text: Path
    output_dir: Path
    text_column: str | None = None
    max_steps: int = 1500
    batch_size: int = 64
    lr: float = 3e-4
    max_seq_length: int = 32
    masked: float = 0.15
    seed: int = 42
    save_steps: int = 500
    bf16: bool | None = None
    resume: bool = False

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "lr", "save_steps"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}")
        check_seed(self.seed)
        if not 0 < self.masked < 1:
            raise ValueError(f"`masked` must be between 0 and 1, got {self.masked}")
        if self.bf16 and not bfloat16_is_faster(device_type()):
            raise ValueError(f"`bf16`: {no_bfloat16(device_type())}; leave it out")


def make_raw_student(options: MaskingOptions) -> dict[str, Any]:
    """Train an encoder on masked language modelling, and save it as a sentence-transformers model that pools [CLS].

    The head that predicts tokens is new where the checkpoint has none: it is drawn at random, learns, and is not saved.

    Args:
        options: the run.

    Returns:
        The content of ``training_summary.json``.

    Raises:
        ValueError, FileNotFoundError: for input that cannot be trained on; ValueError also if another process trains in
            the folder.
        OSError: if something could not be written, such as to a full disk; the newest whole checkpoint stays.
        Interrupted: after Ctrl-C or SIGTERM, when a checkpoint has been written.
    """
    check_output_dir(options.output_dir, options.resume, extracts=False)
    if options.resume:
        options = replace(options, bf16=precision_to_resume(options.output_dir, options.bf16))
    encoder_type(options.model)
    if not options.text.exists():
        raise FileNotFoundError(f"`text` {options.text} does not exist")
    sentences = read_sentences(options.text, options.text_column)
    with locked(options.output_dir):
        return _train(options, sentences)


def _train(options: MaskingOptions, sentences: Dataset) -> dict[str, Any]:
    """Train in a folder that is locked."""
    bf16 = bfloat16_is_faster(device_type()) if options.bf16 is None else options.bf16
    recorded = json.loads(json.dumps(asdict(options), default=str))
    checksums = {"text": sha256_file(options.text)}
    checkpoints = options.output_dir / CHECKPOINTS_NAME
    checkpoint = latest_checkpoint(checkpoints) if options.resume else None
    steps_done = step_of(checkpoint) if checkpoint else 0
    record = {"options": recorded, "processes": 1, "bf16": bf16, "data_sha256": checksums}
    run = run_to_go_on(options.output_dir, record, steps_done)
    is_over = steps_done >= options.max_steps  # a run that was killed after its last checkpoint
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder(options.model))
    if tokenizer.mask_token is None:
        raise ValueError(f"`model` {options.model} has no mask token: use an encoder such as BERT or RoBERTa")
    with _quietly():
        network = AutoModelForMaskedLM.from_pretrained(encoder_folder(options.model)).float()
    claim_student(options.output_dir, run, student_checksums(network.base_model, tokenizer))
    with writing(options.output_dir / RUN_NAME):
        write_json(options.output_dir / RUN_NAME, run)
    if is_over:
        with _quietly():
            network = AutoModelForMaskedLM.from_pretrained(checkpoint).float()
    stop = StopOnSignal()
    trainer = _MaskedTrainer(
        network,
        _arguments(options, bf16),
        _Masking(tokenizer, mlm_probability=options.masked),
        sentences.with_transform(_tokenizing(tokenizer, options.max_seq_length)),
        callbacks=[stop, EvaluateAtEnd(), SaveByTime(), RecordCheckpoints(), KeepTwoCheckpoints()],
    )
    started = time.perf_counter()
    if not is_over:
        with stop.listening(), removing_partial(checkpoints):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - started
    if stop.requested and trainer.state.global_step < options.max_steps:
        raise Interrupted(f"stopped in {options.output_dir}: run the same command with `resume` to go on")
    _save(network, tokenizer, options)
    summary = {
        "options": recorded,
        "bf16": bf16,
        "steps": options.max_steps,
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
        "train_seconds": round(seconds, 1),
        "seconds_a_step": None if is_over else seconds / (options.max_steps - steps_done),
        "data_sha256": checksums,
        "device": device_name(),
        "versions": versions(),
    }
    with writing(options.output_dir / SUMMARY_NAME):
        write_json(options.output_dir / SUMMARY_NAME, summary)
    shutil.rmtree(options.output_dir / CHECKPOINTS_NAME, ignore_errors=True)
    return summary


class _MaskedTrainer(Trainer):
    """The stock trainer, which compares masked tokens alone with the vocabulary: six of seven have no label."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        labels = inputs["labels"]
        predicted = labels != -100
        vocabulary = self.model.get_output_embeddings()
        hook = vocabulary.register_forward_pre_hook(lambda _, hidden: (hidden[0][predicted],))
        try:
            return super().compute_loss(model, {**inputs, "labels": labels[predicted]}, *args, **kwargs)
        finally:
            hook.remove()


class _Masking(DataCollatorForLanguageModeling):
    """Masks drawn from the batch itself and not from the state of the generator, which a resumed run meets elsewhere.

    Batches differ from pass to pass, and with them the masks.
    """

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(zlib.crc32(repr([example["input_ids"] for example in examples]).encode()))
            batch: dict[str, Any] = super().torch_call(examples)
        return batch


@contextmanager
def _quietly() -> Iterator[None]:
    """Load or save without warnings about heads that are new, or left behind: both is meant."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _arguments(options: MaskingOptions, bf16: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(options.output_dir / CHECKPOINTS_NAME),
        max_steps=options.max_steps,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lr,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        bf16=bf16,
        seed=options.seed,
        use_cpu=cpu_only(),
        save_strategy="steps",
        save_steps=options.save_steps,
        logging_steps=25,
        report_to="none",
        remove_unused_columns=False,  # the sentences are tokenized when a batch is drawn
    )


def _tokenizing(tokenizer: PreTrainedTokenizerBase, length: int) -> Callable[[dict[str, list[str]]], dict[str, Any]]:
    def tokenize(batch: dict[str, list[str]]) -> dict[str, Any]:
        tokens = tokenizer(batch["sentence"], truncation=True, max_length=length, return_special_tokens_mask=True)
        return dict(tokens)

    return tokenize


def _save(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, options: MaskingOptions) -> None:
    set_seed(options.seed)  # an encoder of a type with a pooler gets one at random, which no embedding reads
    with tempfile.TemporaryDirectory() as folder, _quietly():
        network.base_model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        student = build_student(folder, options.max_seq_length, "cls")
        save_into(options.output_dir, lambda into: student.save_pretrained(str(into), create_model_card=False))
