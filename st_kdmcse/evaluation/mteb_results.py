"""Tasks and benchmarks of MTEB, run by its own library into result files that its tools read."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer

from st_kdmcse.encoding import assumed_pooling, computing
from st_kdmcse.precision import Precision, resolve_precision
from st_kdmcse.provenance import model_checksum

_BATCH_SIZE = 32


def load_mteb_tasks(benchmark: str | None = None, names: Sequence[str] = ()) -> list[Any]:
    """The tasks of a benchmark, or some tasks by their names.

    Args:
        benchmark: such as "MTEB(eng, v2)".
        names: such as "STS12".

    Returns:
        Tasks of ``mteb``, whose data are not loaded yet.

    Raises:
        ValueError: if there is no such benchmark or task (names the nearest), or both or none are given.
        ImportError: without mteb; names the extra.
    """
    if (benchmark is None) == (not names):
        raise ValueError("give either `benchmark` or `tasks`")
    mteb = _mteb()
    try:
        return [mteb.get_task(name) for name in names] if names else list(mteb.get_benchmark(benchmark).tasks)
    except KeyError as error:
        what = "`tasks`" if names else "`benchmark`"
        raise ValueError(f"{what}: {str(error.args[0]).removeprefix('KeyError: ')}") from error


def evaluate_mteb(
    model: SentenceTransformer,
    tasks: Sequence[Any],
    output_dir: str | Path,
    *,
    name: str,
    batch_size: int = _BATCH_SIZE,
    precision: Precision = "float32",
    show_progress_bar: bool | None = None,
) -> Any:
    """Run tasks of MTEB (Muennighoff et al., EACL 2023), and write a result file for each.

    The files are where ``mteb.ResultCache(output_dir)`` looks for them: ``results/NAME/REVISION/TASK.json``, with
    ``model_meta.json`` beside them. The revision is :func:`~st_kdmcse.provenance.model_checksum`. A task whose file is
    there is not run again; another precision, or a pooling that was not saved with the model, has a folder of its own
    (one of mteb's ``experiments``). Prompts are chosen by mteb from those of the model: by task, by type of task, or
    "query" and "document"; else the model's default prompt counts.

    Args:
        model: any sentence-transformers model.
        tasks: of ``mteb``, see :func:`load_mteb_tasks`.
        output_dir: folder of the results.
        name: of the model, such as "organization/name"; with no organization it becomes "local/name".
        batch_size: texts in a forward pass.
        precision: of the model's matrix products; "auto" is bfloat16 where that is faster.
        show_progress_bar: None shows one in a terminal.

    Returns:
        ``mteb.results.ModelResult``, with the tasks that failed as its ``exceptions``: the others are run all the same.

    Raises:
        ValueError: if there is no task, or the device has no such precision.
        ImportError: without mteb; names the extra.
    """
    mteb = _mteb()
    if not tasks:
        raise ValueError("there are no tasks to evaluate on")
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    computed = resolve_precision(precision, model.device)
    show = sys.stderr.isatty() if show_progress_bar is None else show_progress_bar
    with computing(model, computed) as encoder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # mteb asks for dimensions by an old name
            wrapped = SentenceTransformerEncoderWrapper(encoder)
        wrapped.mteb_model_meta = _model_meta(wrapped.mteb_model_meta, model, name, computed)
        return mteb.evaluate(
            wrapped,
            list(tasks),
            co2_tracker=False,
            raise_error=False,
            encode_kwargs={"batch_size": batch_size, "show_progress_bar": show},
            cache=mteb.ResultCache(output_dir),
            show_progress_bar=show,
        )


def _model_meta(meta: Any, model: SentenceTransformer, name: str, precision: str) -> Any:
    """What mteb's library reads off a model, with what it cannot know of one that is on disk."""
    parameters = sum(each.numel() for each in model.parameters())
    differs = {"compute_dtype": None if precision == "float32" else precision, "pooling": assumed_pooling(model)}
    experiment = {key: value for key, value in differs.items() if value is not None}
    return meta.model_copy(
        update={
            "name": name if "/" in name else f"local/{name}",
            "revision": model_checksum(model),
            "n_parameters": parameters,
            "memory_usage_mb": round(sum(each.numel() * each.element_size() for each in model.parameters()) / 2**20),
            "embed_dim": model.truncate_dim or model.get_embedding_dimension(),
            "max_tokens": model.max_seq_length,
            "modalities": [each for each in model.modalities if each in ("text", "image")],
            "use_instructions": any(model.prompts.values()),
            "experiment_kwargs": experiment or None,
        }
    )


def _mteb() -> Any:
    try:
        import mteb
    except ImportError as error:
        raise ImportError('MTEB needs its library: pip install "st-kdmcse[mteb]", with Python 3.11 or later') from error
    return mteb
