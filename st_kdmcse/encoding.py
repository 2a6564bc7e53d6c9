"""The one way to encode many texts: each distinct text once, in batches of similar length, and finite."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling
from sentence_transformers.util import batch_to_device, load_file_path
from torch import Tensor, nn

from st_kdmcse.files import progress_bar
from st_kdmcse.precision import Precision, autocast, resolve_precision

Matrix = npt.NDArray[np.float32]
Read = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
"""Takes what the model computed for a batch of N sentences; returns (N, dimension) embeddings by name."""

logger = logging.getLogger(__name__)

BATCH_TOKENS = {"cpu": 2048, "cuda": 16_384}
"""Tokens of a batch, padding included, by type of device."""
_LENGTHS_AT_A_TIME = 10_000
_WORTH_CONVERTING = 256  # texts from which faster products pay for converting the weights
_SMALLEST_NORM = 1e-12


class SentenceEmbeddings:
    """Embeddings of distinct sentences, looked up by sentence.

    Args:
        sentences: n distinct sentences.
        matrix: (n, dimension) float32.
    """

    def __init__(self, sentences: Sequence[str], matrix: Matrix) -> None:
        self.sentences = sentences
        self.matrix = matrix
        self._row = {sentence: row for row, sentence in enumerate(sentences)}

    def __len__(self) -> int:
        """Number of distinct sentences."""
        return len(self.sentences)

    def __call__(self, sentences: Sequence[str]) -> Matrix:
        """The (len(sentences), dimension) embeddings of some of the sentences, in their order."""
        rows = np.fromiter((self._row[sentence] for sentence in sentences), dtype=np.int64, count=len(sentences))
        return self.matrix[rows]


def load_model(
    name_or_path: str, device: str | None = None, pooling: Literal["cls", "mean"] | None = None
) -> SentenceTransformer:
    """Load a model to be evaluated.

    Args:
        name_or_path: hub name or local folder.
        device: such as "cpu" or "cuda:1"; the GPU if there is one.
        pooling: of a plain encoder, as SimCSE, MCSE and KDMCSE publish theirs, with which no pooling is saved. None
            takes "mean" and warns. A sentence-transformers model keeps its own. :func:`assumed_pooling` tells.

    Raises:
        FileNotFoundError: if it looks like a path and there is no such folder.
        ValueError: if it is neither the folder of a model nor a name that the hub knows, its files are damaged, or
            there is no such device.
    """
    folder = Path(name_or_path)
    if not folder.exists() and (folder.is_absolute() or name_or_path.startswith(".") or len(folder.parts) > 2):
        raise FileNotFoundError(f"there is no model folder {name_or_path}")
    if folder.is_dir() and not any((folder / name).is_file() for name in ("modules.json", "config.json")):
        raise ValueError(f"{name_or_path} is not the folder of a model: it has neither modules.json nor config.json")
    try:
        model = SentenceTransformer(name_or_path, device=device)
    except (SafetensorError, RuntimeError) as error:  # a damaged file, a device that is not there
        raise ValueError(f"{name_or_path} could not be loaded: {error}") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name_or_path} is neither the folder of a model nor a name that the hub knows, or the hub cannot be "
            f"reached: {error}"
        ) from error
    if load_file_path(name_or_path, "modules.json") is None and isinstance(model[-1], Pooling):
        if pooling is None:
            logger.warning(
                "%s is a plain encoder, with which no pooling was saved: the mean of the token vectors is taken. "
                "SimCSE, MCSE and KDMCSE are trained with the [CLS] vector: set `pooling` to cls or mean",
                name_or_path,
            )
        model[-1] = Pooling(model.get_embedding_dimension(), pooling or "mean")
        model.assumed_pooling = pooling or "mean"
    return model


def assumed_pooling(model: SentenceTransformer) -> str | None:
    """The pooling that :func:`load_model` took because none was saved with the model; None if one was."""
    return getattr(model, "assumed_pooling", None)


def as_texts(model: SentenceTransformer, texts: Sequence[str]) -> list[Any]:
    """Texts as a model takes them for texts whatever they say.

    A model that takes images too would read a text such as "dog.jpg" or "https://example.org/dog.jpg" as the place of
    one, and load it.

    Args:
        model: any sentence-transformers model.
        texts: n texts.
    """
    return [{"text": text} for text in texts] if model.supports("image") else list(texts)


def encode_distinct(
    model: SentenceTransformer,
    sentences: Sequence[str],
    *,
    batch_tokens: int | None = None,
    show_progress_bar: bool | None = None,
    where: Callable[[int], str] | None = None,
    precision: Precision = "float32",
) -> SentenceEmbeddings:
    """Encode each distinct sentence once.

    A batch holds sentences of similar length and a fixed number of tokens, so that there is little padding.

    Args:
        model: any sentence-transformers model; dropout is off while it encodes.
        sentences: N sentences, with repetitions.
        batch_tokens: tokens a batch, padding included; 2,048 on a CPU, 16,384 elsewhere.
        show_progress_bar: None shows one in a terminal, after two seconds.
        where: describes a sentence by its number, such as "sts-dev.csv, line 7", for the error message.
        precision: of the matrix products; "auto" is bfloat16 where that is faster. Embeddings are float32 all the same.

    Returns:
        The embeddings, to be called with any of the sentences.

    Raises:
        ValueError: if there is no sentence, the device has no such precision, or an embedding is not finite; names the
            sentence.
    """
    read = lambda output: {"": output["sentence_embedding"]}  # noqa: E731
    return encode_distinct_each(model, sentences, read, batch_tokens, show_progress_bar, where, precision)[""]


def encode_distinct_each(
    model: SentenceTransformer,
    sentences: Sequence[str],
    read: Read,
    batch_tokens: int | None = None,
    show_progress_bar: bool | None = None,
    where: Callable[[int], str] | None = None,
    precision: Precision = "float32",
) -> dict[str, SentenceEmbeddings]:
    """Like :func:`encode_distinct`, for several embeddings from the same forward pass.

    Args:
        model: any sentence-transformers model.
        sentences: N sentences, with repetitions.
        read: what to take from the model's output.
        batch_tokens: tokens a batch.
        show_progress_bar: None shows one in a terminal, after two seconds.
        where: describes a sentence by its number.
        precision: as for :func:`encode_distinct`.

    Returns:
        Embeddings by the names that ``read`` gives.

    Raises:
        ValueError: if there is no sentence, or an embedding is not finite; names the sentence.
    """
    if not sentences:
        raise ValueError("there are no sentences to encode")
    distinct = list(dict.fromkeys(sentences))
    computed = encoding_precision(model, precision, len(distinct))
    with (
        computing(model, computed) as model,
        progress_bar(len(distinct), "Encoding", "sentence", show_progress_bar) as progress,
    ):
        batches = token_batches(model, distinct, batch_tokens)
        found = encode_batches(model, batches, len(distinct), read, progress.update)
    for name, matrix in found.items():
        _check_finite(name, matrix, distinct, sentences, where)
    return {name: SentenceEmbeddings(distinct, matrix) for name, matrix in found.items()}


def encode_documents(
    model: SentenceTransformer,
    texts: Sequence[str],
    pool: Any = None,
    show_progress_bar: bool | None = None,
    precision: Precision = "float32",
) -> Matrix:
    """Embeddings of texts to be found.

    Args:
        model: any sentence-transformers model; its prompt for documents is put before each text.
        texts: n texts, with repetitions.
        pool: processes of ``model.start_multi_process_pool`` to share the work.
        show_progress_bar: None shows one in a terminal, after two seconds; with a pool there is no bar.
        precision: as for :func:`encode_distinct`.

    Returns:
        (n, dimension) float32 of length 1.

    Raises:
        ValueError: if a text is empty or an embedding is not finite; names the text.
    """
    return _encode_normalized(model, "encode_document", texts, "text", pool, show_progress_bar, precision)


def encode_queries(model: SentenceTransformer, queries: Sequence[str], precision: Precision = "float32") -> Matrix:
    """Embeddings of queries, as :func:`encode_documents`, with the model's prompt for queries."""
    return _encode_normalized(model, "encode_query", queries, "query", None, False, precision)


def encoding_precision(model: SentenceTransformer, precision: Precision, count: int) -> Literal["float32", "bfloat16"]:
    """The precision that some texts are encoded in; "auto" is float32 where they are few.

    Args:
        model: that encodes them.
        precision: what is asked for.
        count: of the texts.

    Raises:
        ValueError: for an unknown precision, or one that the device does not have.
    """
    few = precision == "auto" and count < _WORTH_CONVERTING
    return resolve_precision("float32" if few else precision, model.device)


@contextmanager
def computing(model: SentenceTransformer, precision: str) -> Iterator[SentenceTransformer]:
    """The model to compute with inside of the block: itself, or in bfloat16 a copy, in autocast.

    The copy saves the conversion of weights at each batch, and halves what is read of them. It shares everything but
    weights with the model, which stays as it is.

    Args:
        model: any sentence-transformers model.
        precision: "float32" or "bfloat16".
    """
    if precision == "float32":
        yield model
        return
    with autocast(precision, model.device):
        yield _copy_in(model, getattr(torch, precision))


def _copy_in(model: SentenceTransformer, dtype: torch.dtype) -> SentenceTransformer:
    shared: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            # Configuration, tokenizer, model card (which may know a trainer with all its data), ...
            if not isinstance(value, dict | nn.Module | MethodType):
                shared[id(value)] = value
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            converted = tensor.detach().to(dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            shared[id(tensor)] = nn.Parameter(converted, requires_grad=False) if is_parameter else converted
    return copy.deepcopy(model, shared)


def _encode_normalized(
    model: SentenceTransformer,
    method: str,
    texts: Sequence[str],
    what: str,
    pool: Any,
    show: bool | None,
    precision: Precision,
) -> Matrix:
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{what} {number} is {text!r}: expected a text that is not empty")
    if not texts:
        return np.empty((0, model.get_embedding_dimension()), dtype=np.float32)
    distinct = list(dict.fromkeys(texts))
    settings = {"normalize_embeddings": False, "show_progress_bar": False}
    lengths = token_counts(model, distinct)

    def batches(encode: Callable[..., Any]) -> Iterator[tuple[Rows, Mapping[str, Any]]]:
        if pool is not None:  # the pool divides the texts, the longest first
            rows = np.argsort(-lengths, kind="stable")
            yield rows, {"": encode(as_texts(model, [distinct[row] for row in rows]), pool=pool, **settings)}
            return
        for rows in length_batches(lengths, _token_budget(model)):
            batch = as_texts(model, [distinct[row] for row in rows])
            yield rows, {"": encode(batch, batch_size=len(rows), **settings)}

    with (
        computing(model, encoding_precision(model, precision, len(distinct))) as encoder,
        progress_bar(len(distinct), "Encoding", "text", show if pool is None else False) as progress,
        _in_eval(encoder),
    ):
        found = _collect(batches(getattr(encoder, method)), len(distinct), progress.update)[""]
    _check_finite("", found, distinct, texts, None)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), _SMALLEST_NORM)  # in float32 whatever the model
    return SentenceEmbeddings(distinct, found)(texts)


Rows = npt.NDArray[np.int64]
Batch = tuple[Rows, dict[str, Any]]
"""Rows, and what the model takes for them."""


def token_batches(
    model: SentenceTransformer, sentences: Sequence[str], batch_tokens: int | None = None
) -> Iterator[Batch]:
    """Tokenized batches of sentences of similar length, on the model's device.

    Args:
        model: any sentence-transformers model, whose default prompt is put before each sentence.
        sentences: n sentences.
        batch_tokens: tokens a batch, padding included; 2,048 on a CPU, 16,384 elsewhere.
    """
    lengths = token_counts(model, sentences)
    prompt = model.prompts.get(model.default_prompt_name) if model.default_prompt_name else None
    for rows in length_batches(lengths, batch_tokens or _token_budget(model)):
        features = model.preprocess(as_texts(model, [sentences[row] for row in rows]), prompt=prompt)
        yield rows, batch_to_device(features, model.device)


def encode_batches(
    model: SentenceTransformer, batches: Iterable[Batch], count: int, read: Read, update: Callable[[int], object]
) -> dict[str, Matrix]:
    """Embeddings of the sentences of :func:`token_batches`, with dropout off.

    Args:
        model: that the batches were made for.
        batches: of all sentences.
        count: n, the number of sentences.
        read: what to take from the model's output.
        update: is told the number of sentences of each batch when it is done.

    Returns:
        (n, dimension) float32 by the names that ``read`` gives.
    """
    with torch.inference_mode(), _in_eval(model):
        embedded = (
            (rows, {name: each[:, : model.truncate_dim] for name, each in read(model(dict(features))).items()})
            for rows, features in batches
        )
        return _collect(embedded, count, update)


def _collect(
    batches: Iterable[tuple[Rows, Mapping[str, Any]]], count: int, update: Callable[[int], object]
) -> dict[str, Matrix]:
    """Put the embeddings of batches in their rows: (count, dimension) float32 by name."""
    found: dict[str, Matrix] = {}
    for rows, embeddings in batches:
        for name, given in embeddings.items():
            values = given.float().cpu().numpy() if isinstance(given, Tensor) else given
            if name not in found:
                found[name] = np.empty((count, values.shape[1]), dtype=np.float32)
            found[name][rows] = values
        update(len(rows))
    return found


@contextmanager
def _in_eval(model: SentenceTransformer) -> Iterator[None]:
    """Turn dropout off inside of the block."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _token_budget(model: SentenceTransformer) -> int:
    return BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])


def token_counts(model: SentenceTransformer, sentences: Sequence[str]) -> npt.NDArray[np.int64]:
    """Tokens of each sentence as the model reads it; the number of characters if it has no such tokenizer."""
    tokenizer = getattr(model[0], "tokenizer", None)
    if not callable(tokenizer):
        return np.array([len(sentence) for sentence in sentences])
    limit = model.max_seq_length or np.iinfo(np.int64).max
    counts: list[int] = []
    for start in range(0, len(sentences), _LENGTHS_AT_A_TIME):
        tokens = tokenizer(list(sentences[start : start + _LENGTHS_AT_A_TIME]), verbose=False)["input_ids"]
        counts += [min(len(ids), limit) for ids in tokens]
    return np.array(counts)


def length_batches(lengths: npt.NDArray[np.int64], budget: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows of each batch, the longest sentences first: what does not fit in memory fails at once.

    Args:
        lengths: (n,) tokens of each sentence.
        budget: tokens of a batch, padding included; a longer sentence fills a batch alone.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(1, budget // max(1, int(lengths[order[start]])))
        yield order[start : start + size]
        start += size


def _check_finite(
    name: str,
    matrix: Matrix,
    distinct: Sequence[str],
    sentences: Sequence[str],
    where: Callable[[int], str] | None,
) -> None:
    bad = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
    if not len(bad):
        return
    sentence = distinct[bad[0]]
    place = f" ({where(list(sentences).index(sentence))})" if where else ""
    raise ValueError(
        f"the model's {f'{name} ' if name else ''}embedding of {sentence!r}{place} is not finite, and so for "
        f"{len(bad)} of {len(matrix)} sentences: the model's weights are damaged, or training has diverged"
    )
