"""What a run reads: sentences, teacher features and STS-B, loaded and checked before a model is."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig

from st_kdmcse.data import FeatureStore, STSPairs, import_released_json, load_sts_benchmark, read_sentences
from st_kdmcse.data.exclusion import LeftOut, read_left_out, whole_images
from st_kdmcse.data.overlap import EvaluationTexts, Overlap, find_overlap, load_evaluation_texts
from st_kdmcse.data.permuted import PermutedFeatureStore
from st_kdmcse.data.sts import STSTask
from st_kdmcse.extraction import extract_dataset
from st_kdmcse.files import progress_bar, sha256_file
from st_kdmcse.training.lora import check_lora
from st_kdmcse.training.metric import Metric, load_metric
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run_folder import FEATURES_NAME
from st_kdmcse.training.schedule import pair_rows
from st_kdmcse.training.student import (
    build_student,
    check_matryoshka_dims,
    check_modules,
    enable_checkpointing,
    encoder_folder,
)

logger = logging.getLogger(__name__)

_EXCLUDED, _EVALUATED = "excluded images", "evaluation sets"
_SENTENCES_AT_A_TIME = 10_000
_PARAMETERS = {"text": "text", "pairs": "features"}  # that the sources come from


@dataclass(frozen=True)
class TrainingInputs:
    """The data of a run.

    Attributes:
        sources: the datasets "text" and "pairs", as far as there are any.
        store: the teacher features, or None.
        left_out: what ``exclude_images`` and ``exclude_overlap`` leave out of the pairs, or None.
        overlap: with ``exclude_overlap``, the number of "images" and "captions" that stand in the evaluation sets, and
            of "text" sentences, which are trained on all the same; else None.
        dev: STS-B dev, None without evaluation.
        test: STS-B test, None without evaluation.
        metric: what chooses the best model instead of STS-B dev, or None.
        checksums: SHA-256 of the data by name, see :func:`data_checksums`.
    """

    sources: dict[str, Dataset]
    store: FeatureStore | None
    left_out: LeftOut | None
    overlap: dict[str, int] | None
    dev: STSPairs | None
    test: STSPairs | None
    metric: Metric | None
    checksums: dict[str, str]

    @classmethod
    def load(cls, options: TrainingOptions, state: PartialState) -> TrainingInputs:
        """Load and check the data; extract or convert features that are not there yet.

        Args:
            options: the run.
            state: this process among those of the run.

        Raises:
            ValueError, FileNotFoundError, ConnectionError: for data that cannot be trained on; names the file.
        """
        _check_paths(options)
        dev, test = _load_sts(options)
        metric = load_metric(options.metric, options.nanobeir_data)
        sources: dict[str, Dataset] = {}
        checksums = _sts_checksums(dev, test) | _metric_checksum(metric)
        store = left_out = counts = None
        evaluated = None if options.exclude_overlap is None else load_evaluation_texts(options.exclude_overlap)
        if options.text is not None:
            sources["text"] = read_sentences(options.text, options.text_column, options.deduplicate)
            checksums["text"] = sha256_file(options.text)
        if options.has_features:
            store = _open_features(options, state)
            if options.permute_images:
                store = PermutedFeatureStore(store.path, options.seed)
            if state.is_main_process:
                store.verify()
            pairs = store.dataset(captions_per_image=options.captions_per_image, seed=options.seed)
            checksums["features"] = store.checksum
            overlap = None if evaluated is None else find_overlap(store, evaluated)
            left_out = _left_out(options, store, overlap)
            if left_out is not None:
                pairs = pairs.select(np.flatnonzero(~np.isin(pair_rows(pairs), left_out.rows)))
                logger.info("left out %d images with %d captions", left_out.images, len(left_out.rows))
            if evaluated is not None and overlap is not None:
                sentences = _count_overlap(sources.get("text"), evaluated)
                counts = {"images": overlap.images, "captions": len(overlap.captions), "text": sentences}
            sources["pairs"] = pairs
        checksums |= _exclusion_checksums(options, evaluated)
        return cls(sources, store, left_out, counts, dev, test, metric, checksums)


def check_sizes(sources: Mapping[str, Dataset], batch_size: int, batches_a_step: int = 1) -> None:
    """Refuse a source of one row, and warn of one that does not fill a batch: a row's negatives are the others.

    Where a step takes several batches, a source that does not fill one is refused.

    Args:
        sources: what a run trains on.
        batch_size: rows a batch.
        batches_a_step: of all devices, with gradient accumulation.

    Raises:
        ValueError: if a source has a single row, with which the loss would be 0 whatever the model; or less than a
            batch where a step takes several.
    """
    for name, dataset in sources.items():
        if len(dataset) == 1:
            raise ValueError(
                f"`{_PARAMETERS[name]}` has one sentence to train on: its negatives are the other sentences of a "
                "batch; give at least two, better thousands"
            )
        if len(dataset) < batch_size and batches_a_step > 1:
            raise ValueError(
                f"`{_PARAMETERS[name]}` has {len(dataset)} sentences to train on, and a step takes {batches_a_step} "
                f"batches of {batch_size}: choose a smaller `batch_size`"
            )
        if len(dataset) < batch_size:
            logger.warning(
                "`%s` has %d sentences to train on, fewer than the %d of a batch: each has that many negatives less",
                _PARAMETERS[name],
                len(dataset),
                batch_size,
            )


def check_inputs(options: TrainingOptions) -> None:
    """Load what a run reads and its encoder, to find bad input before the first of many runs.

    Features that are still to be extracted or converted are not checked.

    Args:
        options: any of the runs.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: for what the run would fail of; names the parameter or the file.
    """
    _check_paths(options)
    check_encoder(options)
    _load_sts(options)
    load_metric(options.metric, options.nanobeir_data)
    evaluated = None if options.exclude_overlap is None else load_evaluation_texts(options.exclude_overlap)
    if options.text is not None:
        read_sentences(options.text, options.text_column, options.deduplicate)
    if options.features is not None and options.extraction is None and options.features.is_dir():
        store = FeatureStore.open(options.features)
        store.verify()
        _left_out(options, store, None if evaluated is None else find_overlap(store, evaluated))
    check_student(options)


def check_encoder(options: TrainingOptions) -> str:
    """Refuse an encoder that cannot be trained as the options say, before it is loaded.

    Args:
        options: the run.

    Returns:
        Its type, such as "bert".

    Raises:
        ImportError: if a package is missing that the options need.
        ValueError, FileNotFoundError, ConnectionError: names what is wrong.
    """
    check_modules(options.model, options.pooling)
    kind = encoder_type(options.model)
    if options.lora:
        check_lora(kind)
    return kind


def check_student(options: TrainingOptions) -> None:
    """Build the student of a run, to find out whether it can be trained.

    Args:
        options: the run.

    Raises:
        ValueError: if it cannot; names what is wrong.
    """
    try:
        student = build_student(options.model, options.max_seq_length, options.pooling)
        check_matryoshka_dims(student, options.matryoshka_dims)
        if options.gradient_checkpointing:
            enable_checkpointing(student)
    except ValueError:
        raise
    except Exception as error:  # whatever the libraries raise for damaged or missing weights
        raise ValueError(f"`model` {options.model} cannot be loaded: {error}") from error


def data_checksums(options: TrainingOptions) -> dict[str, str]:
    """SHA-256 of the data of a run by name.

    The names are "text", "features", "excluded images", "evaluation sets" (of ``exclude_overlap``), where it evaluates
    "sts-dev" and "sts-test", and "metric" where NanoBEIR chooses the best model.

    Args:
        options: the run, with its features, if any, in a feature store.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: if the data are absent or malformed.
    """
    _check_paths(options)
    checksums = _sts_checksums(*_load_sts(options))
    checksums |= _metric_checksum(load_metric(options.metric, options.nanobeir_data))
    if options.text is not None:
        checksums["text"] = sha256_file(options.text)
    if options.features is not None:
        checksums["features"] = FeatureStore.open(options.features).checksum
    evaluated = None if options.exclude_overlap is None else load_evaluation_texts(options.exclude_overlap)
    return checksums | _exclusion_checksums(options, evaluated)


def encoder_type(model: str) -> str:
    """The type of an encoder, such as "bert", from its configuration alone.

    Args:
        model: hub name or folder.

    Raises:
        ValueError: if there is no such encoder.
    """
    try:
        return str(AutoConfig.from_pretrained(encoder_folder(model)).model_type)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`model` {model} is neither the folder of an encoder (with a config.json) nor a name that the hub knows, "
            f"or the hub cannot be reached: {error}"
        ) from error


def _check_paths(options: TrainingOptions) -> None:
    for name in ("text", "features", "exclude_images", "exclude_overlap"):
        path = getattr(options, name)
        written = name == "features" and options.extraction is not None
        if path is not None and not path.exists() and not written:
            raise FileNotFoundError(f"`{name}` {path} does not exist")


def _load_sts(options: TrainingOptions) -> tuple[STSPairs | None, STSPairs | None]:
    """STS-B dev and test, for a run that evaluates."""
    if not options.eval_steps:
        return None, None
    return load_sts_benchmark(options.eval_data, "dev"), load_sts_benchmark(options.eval_data, "test")


def _sts_checksums(*splits: STSPairs | None) -> dict[str, str]:
    return {pairs.name: STSTask("STS-B", (pairs,)).checksum for pairs in splits if pairs is not None}


def _metric_checksum(metric: Metric | None) -> dict[str, str]:
    return {} if metric is None or metric.checksum is None else {"metric": metric.checksum}


def _left_out(options: TrainingOptions, store: FeatureStore, overlap: Overlap | None) -> LeftOut | None:
    """What a run leaves out of its pairs; None if nothing is to be."""
    listed = None if options.exclude_images is None else read_left_out(options.exclude_images, store)
    if overlap is None:
        return listed
    return whole_images(overlap.rows if listed is None else np.concatenate([listed.rows, overlap.rows]), store)


def _count_overlap(text: Dataset | None, evaluated: EvaluationTexts) -> int:
    """How many sentences of the text stand in evaluation sets; warns if there are any."""
    if text is None:
        return 0
    found = 0
    with progress_bar(len(text), "Comparing with the evaluation sets", "sentence") as progress:
        for batch in text.iter(_SENTENCES_AT_A_TIME):
            found += evaluated.count(batch["sentence"])
            progress.update(len(batch["sentence"]))
    if found:
        logger.warning("%d sentences of `text` stand in the evaluation sets, and are trained on all the same", found)
    return found


def _exclusion_checksums(options: TrainingOptions, evaluated: EvaluationTexts | None) -> dict[str, str]:
    checksums = {} if evaluated is None else {_EVALUATED: evaluated.checksum}
    if options.exclude_images is not None:
        checksums[_EXCLUDED] = sha256_file(options.exclude_images)
    return checksums


def _open_features(options: TrainingOptions, state: PartialState) -> FeatureStore:
    converted = options.output_dir / FEATURES_NAME
    if options.extraction is not None:
        path = options.features or converted
        report = extract_dataset(options.extraction, path)
        if state.is_main_process:
            logger.info("features: %s", report)
        return FeatureStore.open(path)
    path = Path(options.features or "")
    if path.is_dir():
        return FeatureStore.open(path)
    with state.main_process_first():
        if converted.exists():  # a run that is resumed: for a new one the folder is empty
            return FeatureStore.open(converted)
        return import_released_json(path, converted)
