"""Sentences as token ids on disk: tokenized once, memory-mapped, gathered by row."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from datasets import config as datasets_config
from torch import Tensor

from st_kdmcse.files import progress_bar, sha256_file, write_folder

logger = logging.getLogger(__name__)

Preprocess = Callable[[list[str]], dict[str, Any]]

_CACHE_VERSION = 2  # counted up when the same sentences would give another file
_TOKENS, _OFFSETS, _MANIFEST = "tokens.bin", "offsets.bin", "manifest.json"
_SENTENCES_AT_A_TIME = 4096


class TokenTable:
    """Token ids of n sentences in a folder, memory-mapped; picklable, for it is opened again by path.

    Args:
        path: a folder that :meth:`of` wrote.

    Raises:
        ValueError: if a file is missing, truncated, or does not fit the others.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
            self._tokens = np.memmap(path / _TOKENS, manifest["dtype"], "r", shape=(manifest["tokens"],))
            self._offsets = np.memmap(path / _OFFSETS, np.int64, "r", shape=(manifest["sentences"] + 1,))
            self._sha256 = manifest["sha256"]
        except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"the tokens in {path} are damaged ({error}): delete that folder") from error

    def verify(self) -> None:
        """Compare the files with their checksums.

        Raises:
            ValueError: if one of them is damaged.
        """
        for name, expected in _checksums(self.path).items():
            if not isinstance(self._sha256, dict) or self._sha256.get(name) != expected:
                raise ValueError(f"the tokens in {self.path} are damaged ({name}): delete that folder")

    @classmethod
    def of(
        cls,
        dataset: Dataset,
        column: str,
        preprocess: Preprocess,
        tokenizer: Any,
        max_length: int | None = None,
        cache_dir: str | Path | None = None,
        show_progress_bar: bool | None = None,
    ) -> TokenTable:
        """Tokenize a column, or find what was tokenized before.

        The sentences, the tokenizer and the maximal length decide the name of the folder. Delete it whenever no
        training uses it.

        Args:
            dataset: with a column of n sentences.
            column: its name.
            preprocess: texts to ``input_ids`` and ``attention_mask``, (b, length) each, such as ``model.preprocess``.
            tokenizer: the fast tokenizer behind it.
            max_length: tokens after which ``preprocess`` cuts off.
            cache_dir: None is ``st_kdmcse`` in the cache of ``datasets`` (``HF_DATASETS_CACHE``).
            show_progress_bar: None shows one in a terminal, after two seconds.

        Raises:
            ValueError: if the tokenizer is not a fast one, or the cache cannot be written.
        """
        key = _key(dataset, column, tokenizer, max_length)
        path = Path(cache_dir or Path(datasets_config.HF_DATASETS_CACHE) / "st_kdmcse") / f"tokens-{key}"
        if path.is_dir():
            try:
                table = cls(path)
                table.verify()
                return table
            except ValueError:
                logger.warning("%s is damaged and is written again", path)
                shutil.rmtree(path, ignore_errors=True)

        def write(folder: Path) -> None:
            with progress_bar(len(dataset), "Tokenizing", "sentence", show_progress_bar) as progress:
                _write(folder, _sentences(dataset, column), preprocess, len(tokenizer), progress.update)

        try:
            write_folder(path, write, keep_existing=True)
        except OSError as error:
            raise ValueError(f"tokens cannot be written to {path.parent}: {error}") from error
        return cls(path)

    def __len__(self) -> int:
        """Number of sentences."""
        return len(self._offsets) - 1

    def __reduce__(self) -> tuple[type[TokenTable], tuple[Path]]:
        return TokenTable, (self.path,)

    def batch(
        self, rows: Sequence[int] | npt.NDArray[np.int64], padding: int, multiple_of: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Token ids and attention mask of some sentences, padded on the right to the longest of them.

        Args:
            rows: b numbers of sentences.
            padding: the token that fills up.
            multiple_of: that the length is rounded up to.

        Returns:
            (b, length) int64 each.
        """
        starts = self._offsets[np.asarray(rows)]
        lengths = self._offsets[np.asarray(rows) + 1] - starts
        columns = np.arange(-(-int(lengths.max()) // multiple_of) * multiple_of)
        mask = columns < lengths[:, None]
        ids = np.full(mask.shape, padding, dtype=np.int64)
        ids[mask] = self._tokens[(starts[:, None] + columns)[mask]]
        return torch.from_numpy(ids), torch.from_numpy(mask.astype(np.int64))


def _key(dataset: Dataset, column: str, tokenizer: Any, max_length: int | None) -> str:
    """SHA-256 over the sentences and all that decides their tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is not a fast tokenizer")
    settings = json.loads(backend.to_str())
    del settings["truncation"], settings["padding"]  # those of the last call
    digest = hashlib.sha256(json.dumps([_CACHE_VERSION, settings, max_length]).encode())
    for block in _sentences(dataset, column):
        digest.update(json.dumps(block).encode())
    return digest.hexdigest()[:32]


def _sentences(dataset: Dataset, column: str) -> Iterator[list[str]]:
    plain = dataset.with_format(None).select_columns([column])
    for batch in plain.iter(_SENTENCES_AT_A_TIME):
        yield batch[column]


def _checksums(path: Path) -> dict[str, str]:
    return {name: sha256_file(path / name) for name in (_TOKENS, _OFFSETS)}


def _write(
    path: Path,
    blocks: Iterable[list[str]],
    preprocess: Preprocess,
    vocabulary: int,
    update: Callable[[int], object],
) -> None:
    dtype = np.dtype(np.uint16 if vocabulary <= 1 << 16 else np.int32)
    total = sentences = 0
    with (path / _TOKENS).open("wb") as tokens, (path / _OFFSETS).open("wb") as offsets:
        offsets.write(np.zeros(1, dtype=np.int64).tobytes())
        for block in blocks:
            features = preprocess(block)
            mask = features["attention_mask"].numpy().astype(bool)
            tokens.write(features["input_ids"].numpy()[mask].astype(dtype).tobytes())
            ends = total + np.cumsum(mask.sum(axis=1), dtype=np.int64)
            offsets.write(ends.tobytes())
            total, sentences = int(ends[-1]), sentences + len(block)
            update(len(block))
    content = {"dtype": dtype.name, "tokens": total, "sentences": sentences, "sha256": _checksums(path)}
    (path / _MANIFEST).write_text(json.dumps(content), encoding="utf-8")
