"""A whole training run, from options to a saved stock model."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import SequentialEvaluator
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from transformers import ProgressCallback, TrainerCallback, TrainerState, set_seed

from st_kdmcse.data import FeatureStore
from st_kdmcse.evaluation.similarity import (
    TokenizedSimilarityEvaluator,
    spearman,
    spearman_by_size,
    sts_evaluator,
)
from st_kdmcse.files import locked, read_json, write_json
from st_kdmcse.losses.base import TwoViewLoss
from st_kdmcse.losses.grounded import GroundedLoss
from st_kdmcse.precision import autocast
from st_kdmcse.processes import processes
from st_kdmcse.training.callbacks import EvaluateAtEnd, Interrupted, KeepBest, SaveByTime, StopOnSignal
from st_kdmcse.training.checkpoints import (
    METRIC,
    SCORE,
    STATE_NAME,
    KeepTwoCheckpoints,
    latest_checkpoint,
    removing_partial,
    step_of,
    writing,
)
from st_kdmcse.training.head_init import align_heads
from st_kdmcse.training.hub import check_repository, create_repository, push
from st_kdmcse.training.inputs import (
    TrainingInputs,
    check_encoder,
    check_sizes,
    check_student,
    data_checksums,
)
from st_kdmcse.training.lora import LORA_NAME, add_lora
from st_kdmcse.training.methods import build_loss
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.progress import ShowProgress
from st_kdmcse.training.reporting import place_event_files
from st_kdmcse.training.run_folder import (
    CHECKPOINTS_NAME,
    EVENTS_NAME,
    LAST_NAME,
    RUN_NAME,
    SUMMARY_NAME,
    changes_of_run,
    check_output_dir,
    check_unchanged,
    claim_student,
    copy_model,
    export_folder,
    precision_to_resume,
    run_to_go_on,
    save_into,
)
from st_kdmcse.training.schedule import pair_rows
from st_kdmcse.training.student import (
    build_student,
    check_matryoshka_dims,
    enable_checkpointing,
    student_checksums,
)
from st_kdmcse.training.summary import BestScores, run_record, training_summary
from st_kdmcse.training.text_image import check_folder_is_free, export_text_image, open_tower
from st_kdmcse.training.thresholds import BranchFilter, branch_filters
from st_kdmcse.training.trainer import KDMCSETrainer

logger = logging.getLogger(__name__)

_SCORES = {METRIC: "the score on STS-B dev", SCORE: "the score that chooses the best model"}


def train(
    options: TrainingOptions,
    stop: StopOnSignal | None = None,
    repeats: Mapping[str, str] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Train a student and save it as a stock sentence-transformers model.

    ``output_dir`` then holds the model with the best score, on STS-B dev or the ``metric`` of the options, its heads
    (``heads/``), the last model (``last/``), the checkpoints and ``training_summary.json``.

    Args:
        options: what to train.
        stop: listens for Ctrl-C; the caller can ask it afterwards. A signal during the last step does not stop the run.
        repeats: SHA-256 of the data and of the parts of the student of a run that this one is to repeat.
        callbacks: further ones of the trainer.

    Returns:
        The content of ``training_summary.json``.

    Raises:
        ChangedError: if data or student are not those of ``repeats``.
        ValueError, FileNotFoundError: for input that cannot be trained on, before the model is loaded; ValueError also
            if another process trains in the folder, or training has diverged.
        OSError: if something could not be written, such as to a full disk; the newest whole checkpoint stays.
        PushError: if the run is finished and saved, but could not be pushed to the hub.
        Interrupted: after Ctrl-C or SIGTERM, when a checkpoint has been written.
    """
    state = processes()
    kind, repository = _check_before_data(options, state)
    if options.resume:
        options = replace(options, bf16=precision_to_resume(options.output_dir, options.bf16))
    arguments = options.trainer_arguments(roberta="roberta" in kind)
    inputs = TrainingInputs.load(options, state)
    check_unchanged(repeats or {}, inputs.checksums)
    batches_a_step = arguments.gradient_accumulation_steps * arguments.world_size
    check_sizes(inputs.sources, arguments.per_device_train_batch_size, batches_a_step)
    if options.export is not None and inputs.store is not None and state.is_main_process:
        check_folder_is_free(export_folder(options.output_dir, options.export))
        _check_tower(options, inputs.store)
    with locked(options.output_dir) if state.is_main_process else nullcontext():
        summary = _train(
            options, arguments, inputs, state, stop or StopOnSignal(), repository, repeats or {}, callbacks
        )
    if repository:
        push(repository, options.private, options.output_dir, summary, options.export)
    return summary


def _check_before_data(options: TrainingOptions, state: PartialState) -> tuple[str, str | None]:
    """The cheap checks, before a conversion of features takes an hour.

    Returns:
        The type of the encoder, and the repository that the run is pushed to in the end.
    """
    repository = None
    if state.is_main_process:
        check_output_dir(options.output_dir, options.resume, options.extraction is not None)
        repository = check_repository(options.push_to_hub, options.private) if options.push_to_hub else None
    kind = check_encoder(options)
    if options.extraction is not None:
        check_student(options)
    return kind, repository


def _train(
    options: TrainingOptions,
    arguments: SentenceTransformerTrainingArguments,
    inputs: TrainingInputs,
    state: PartialState,
    stop: StopOnSignal,
    repository: str | None,
    repeats: Mapping[str, str],
    callbacks: Sequence[TrainerCallback],
) -> dict[str, Any]:
    """Train in a folder that is locked, on inputs that are checked."""
    checkpoints = options.output_dir / CHECKPOINTS_NAME
    checkpoint = latest_checkpoint(checkpoints) if options.resume else None
    run: dict[str, Any] = {}
    if state.is_main_process:
        record = run_record(options, inputs.checksums, arguments)
        run = run_to_go_on(options.output_dir, record, step_of(checkpoint) if checkpoint else 0)
    state.wait_for_everyone()

    set_seed(options.seed)
    model = build_student(options.model, options.max_seq_length, options.pooling)
    check_matryoshka_dims(model, options.matryoshka_dims)
    student = student_checksums(model[0].auto_model, model.tokenizer, list(model)[1:])
    check_unchanged(repeats, student)
    if options.gradient_checkpointing:
        enable_checkpointing(model)
    if repository:
        model.model_card_data.set_model_id(repository)
        create_repository(repository, options.private)
    loss = build_loss(
        options.method,
        model,
        options.loss_config(),
        inputs.store,
        options.gather_across_devices,
        options.mini_batch_size,
    )
    filters = _announce_filters(loss, options) if state.is_main_process else []
    evaluator = sts_evaluator(inputs.dev, "sts-dev") if inputs.dev else None
    if state.is_main_process:
        claim_student(options.output_dir, run, student)
        if evaluator and "score_before" not in run:
            with autocast("bfloat16" if arguments.bf16 else "float32", model.device):  # as all scores of the curve
                run["score_before"] = spearman(evaluator, model)
                if inputs.metric:
                    run["metric_before"] = inputs.metric.score(model)
        with writing(options.output_dir / RUN_NAME):
            write_json(options.output_dir / RUN_NAME, run)
    trainer = _trainer(options, arguments, inputs, loss, evaluator, [stop, EvaluateAtEnd(), SaveByTime(), *callbacks])
    if options.head_init == "ridge" and checkpoint is None and state.is_main_process and isinstance(loss, GroundedLoss):
        align_heads(loss, pair_rows(inputs.sources["pairs"]))  # the other processes get these heads
    events = options.output_dir / EVENTS_NAME / (options.run_name or "")
    place_event_files(trainer, events, (step_of(checkpoint) if checkpoint else 0) if options.resume else None)
    trainer.add_callback(KeepTwoCheckpoints())
    best = KeepBest(checkpoints, trainer) if evaluator else None
    if best:
        trainer.add_callback(best)
    started = time.perf_counter()
    with stop.listening(), removing_partial(checkpoints):
        _train_from(trainer, checkpoint, best)
    seconds = time.perf_counter() - started
    last = checkpoints / f"checkpoint-{trainer.state.global_step}"
    if stop.requested and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(f"stopped; {last} holds everything: run the same command with `resume` to go on")
    summary: dict[str, Any] = {}
    if state.is_main_process:
        _check_converged(trainer)
        scores = _load_best(trainer, evaluator, best, inputs, options.matryoshka_dims or ())
        _save(trainer, options.output_dir, last if evaluator else None)
        summary = training_summary(options, trainer, run, inputs, scores, filters, seconds)
        with writing(options.output_dir / SUMMARY_NAME):
            write_json(options.output_dir / SUMMARY_NAME, summary)
        if options.export is not None and inputs.store is not None:
            _export(options, inputs.store.path)
    state.wait_for_everyone()
    return summary


def _trainer(
    options: TrainingOptions,
    arguments: SentenceTransformerTrainingArguments,
    inputs: TrainingInputs,
    loss: TwoViewLoss,
    evaluator: TokenizedSimilarityEvaluator | None,
    callbacks: Sequence[TrainerCallback],
) -> KDMCSETrainer:
    """The trainer of a run, with what the options put around the student and its loss."""
    model = loss.model
    if options.lora:
        add_lora(model, options.lora)
    metric = [inputs.metric.evaluator] if inputs.metric else []
    trainer = KDMCSETrainer(
        model,
        arguments,
        inputs.sources,
        loss=MatryoshkaLoss(model, loss, options.matryoshka_dims) if options.matryoshka_dims else loss,
        evaluator=SequentialEvaluator([evaluator, *metric]) if evaluator else None,  # the last one is the score
        pair_every=options.pair_every,
        head_learning_rate=options.head_learning_rate,
        captions_per_image_in_batch=options.captions_per_image_in_batch,
        features=inputs.store,
        pad_to_multiple_of=8 if options.compile else 1,
        unpad=options.unpad,
        callbacks=[*callbacks],
    )
    if trainer.pop_callback(ProgressCallback):  # the stock one
        trainer.add_callback(ShowProgress())
    return trainer


def _export_source(options: TrainingOptions) -> tuple[str | None, Path | None]:
    """Teacher and images of an export, where the options have them."""
    teacher, images = options.export_teacher, options.export_images
    if options.extraction is not None:
        named = options.extraction.teacher
        stock = named.startswith(("transformers:", "sentence-transformers:")) or Path(named).is_dir()
        teacher = teacher or (named if stock else None)
        images = images or options.extraction.images
    return teacher, images


def _check_tower(options: TrainingOptions, store: FeatureStore) -> None:
    """Load what the export needs in the end, to find out before hours of training whether it can."""
    try:
        open_tower(store, *_export_source(options))
    except (ValueError, FileNotFoundError) as error:
        named = str(error).replace("`teacher`", "`export_teacher`").replace("`images`", "`export_images`")
        raise type(error)(named) from error


def _export(options: TrainingOptions, features: Path) -> None:
    assert options.export is not None
    path = export_folder(options.output_dir, options.export)
    teacher, images = _export_source(options)
    export_text_image(options.output_dir, path, teacher=teacher, features=features, images=images)
    logger.info("a model of sentences and images is in %s", path)


def changes_since_start(options: TrainingOptions, checksums: Mapping[str, str] | None = None) -> list[str]:
    """What differs between the run in ``output_dir``, finished or not, and these options and data.

    Args:
        options: the run, with its features, if any, in a feature store.
        checksums: the result of :func:`~st_kdmcse.training.inputs.data_checksums`, where it is known already.

    Returns:
        Each difference in words, such as "max_steps was 100, is 200"; nothing if there is no run yet.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: if the record of the run is damaged, or the data are absent.
    """
    path = options.output_dir / RUN_NAME
    if not path.is_file():
        return []
    if checksums is None:
        checksums = data_checksums(options)
    # Whether the encoder is a RoBERTa decides only defaults, which are not compared.
    record = run_record(options, checksums, options.trainer_arguments(roberta=False))
    return changes_of_run(path, read_json(path, "remove its folder and train again"), record)


def _announce_filters(loss: TwoViewLoss, options: TrainingOptions) -> list[BranchFilter]:
    """Say what the filter of each branch removes, before a run of hours; warn where it removes nothing."""
    filters = branch_filters(loss)
    for branch in filters:
        logger.info("%s", branch)
        remedy = branch.remedy(options.loss_config())
        if remedy:
            logger.warning("%s", remedy)
    return filters


def _train_from(trainer: KDMCSETrainer, checkpoint: Path | None, best: KeepBest | None) -> None:
    """Train, from a checkpoint if there is one; not if that is the last one of a run which was killed later."""
    if checkpoint is None:
        trainer.train()
        return
    state = _state_of(checkpoint)
    if state.global_step < state.max_steps:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    else:
        trainer.state = state
        trainer.load_checkpoint(checkpoint)
        if best:
            best.restore(state)


def _state_of(checkpoint: Path) -> TrainerState:
    return TrainerState.load_from_json(str(checkpoint / STATE_NAME))


def _check_converged(trainer: KDMCSETrainer) -> None:
    for entry in trainer.state.log_history:
        broken = [what for key, what in _SCORES.items() if not math.isfinite(entry.get(key, 0))]
        if broken:
            raise ValueError(
                f"training diverged: {broken[0]} at step {entry['step']} is not a number; train again with a smaller "
                "`lr`"
            )


def _load_best(
    trainer: KDMCSETrainer,
    evaluator: TokenizedSimilarityEvaluator | None,
    best: KeepBest | None,
    inputs: TrainingInputs,
    sizes: Sequence[int],
) -> BestScores | None:
    """Load the best model, and give its card the scores of its weights."""
    if best is None or best.path is None or evaluator is None or inputs.test is None:
        return None
    trainer.load_checkpoint(best.path)
    model: SentenceTransformer = trainer.model
    # Every evaluation has written its scores into the card, the latest last: those of the best step go there again.
    test = sts_evaluator(inputs.test, "sts-test")
    with trainer.around_files():  # as it is saved
        dev_by_size, test_by_size = (spearman_by_size(each, model, sizes) for each in (evaluator, test))
        by_size = {size: (dev_by_size[size], test_by_size[size]) for size in sizes}
        metric = inputs.metric.score(model) if inputs.metric else None
        scores = BestScores(spearman(evaluator, model), spearman(test, model), by_size, metric)
    model.model_card_data.set_best_model_step(best.step)
    return scores


def _save(trainer: KDMCSETrainer, output_dir: Path, last: Path | None) -> None:
    """Save the model that is loaded, and beside it that of the last checkpoint."""

    def save(folder: Path) -> None:
        trainer.save_model(str(folder))
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that loading does not need
        (folder / LORA_NAME).unlink(missing_ok=True)  # merged into the weights

    save_into(output_dir, save)
    if last is not None:
        copy_model(last, output_dir / LAST_NAME)
