"""The STS Benchmark, from a SentEval folder or through ``datasets``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datasets import load_dataset
from datasets.exceptions import DatasetsError

Split = Literal["train", "dev", "test"]

_MAX_SCORE = 5.0
_SENTEVAL_ROOTS = (
    "",
    "STSBenchmark",
    "STS/STSBenchmark",
    "downstream/STS/STSBenchmark",
    "data/downstream/STS/STSBenchmark",
)
_LOCAL = (
    "give a SentEval folder with STS/STSBenchmark/sts-dev.csv in it, or a folder of parquet files (validation.parquet, "
    "test.parquet) with the columns sentence1, sentence2, score"
)


@dataclass(frozen=True)
class STSPairs:
    """Sentence pairs with gold similarities.

    Attributes:
        sentences1: the first sentence of each pair.
        sentences2: the second.
        scores: gold similarity of each pair, from 0 to 5.
        name: what an evaluator calls the set, such as "sts-dev".
    """

    sentences1: list[str]
    sentences2: list[str]
    scores: list[float]
    name: str

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.scores)


def load_sts_benchmark(source: str | Path, split: Split) -> STSPairs:
    """Load a split of the STS Benchmark.

    Args:
        source: one of

            - a SentEval folder: the one that holds ``sts-dev.csv`` (tab-separated, no quoting, gold in column 5 and the
              sentences in columns 6 and 7), or a folder above it that holds ``STSBenchmark``, ``STS/STSBenchmark``,
              ``downstream/STS/STSBenchmark`` or ``data/downstream/STS/STSBenchmark``;
            - a folder of parquet files or a name on the Hugging Face hub, such as ``sentence-transformers/stsb``, with
              the columns sentence1, sentence2 and score and the splits train, validation (or dev) and test. If no score
              of the split is above 1 they are taken to run from 0 to 1 and are multiplied by 5.
        split: "train", "dev" or "test".

    Raises:
        FileNotFoundError: if there is no such folder, or the SentEval folder lacks the split's file.
        ValueError: if the split is unknown, or a row is malformed; names the file and the line.
        ConnectionError: if ``source`` names a data set on the hub, and the hub cannot be reached or does not have it.
    """
    if split not in ("train", "dev", "test"):
        raise ValueError(f'split is {split!r}, expected "train", "dev" or "test"')
    folder = Path(source)
    if not folder.is_dir():
        if isinstance(source, Path) or folder.is_absolute():
            raise FileNotFoundError(f"there is no folder {source}: {_LOCAL}")
        return _from_datasets(str(source), split)
    for root in _SENTEVAL_ROOTS:
        if any((folder / root).glob("sts-*.csv")):
            return _from_senteval(folder / root / f"sts-{split}.csv", split)
    return _from_datasets(str(folder), split)


def _from_senteval(path: Path, split: Split) -> STSPairs:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the whole STSBenchmark folder of SentEval")
    pairs = STSPairs([], [], [], f"sts-{split}")
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                columns = raw.decode("utf-8").rstrip("\r\n").split("\t")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8; copy the file again") from error
            if len(columns) < 7:
                raise ValueError(f"{where}: {len(columns)} tab-separated columns, expected 7; copy the file again")
            pairs.scores.append(_score(columns[4], where))
            pairs.sentences1.append(columns[5].strip())
            pairs.sentences2.append(columns[6].strip())
    if not pairs:
        raise ValueError(f"{path} is empty; copy the file again")
    return pairs


def _from_datasets(source: str, split: Split) -> STSPairs:
    try:
        splits = load_dataset(source)
    except (DatasetsError, OSError, ValueError) as error:
        if Path(source).is_dir():
            raise ValueError(f"{source} could not be read: {error}; {_LOCAL}") from error
        raise ConnectionError(f"{source} did not load from the hub: {error}; {_LOCAL}") from error
    name = next((name for name in {"dev": ("validation", "dev")}.get(split, (split,)) if name in splits), None)
    if name is None:
        raise ValueError(f"{source} has the splits {sorted(splits)}, none of them {split}: {_LOCAL}")
    rows = splits[name]
    missing = {"sentence1", "sentence2", "score"} - set(rows.column_names)
    if missing:
        raise ValueError(f"{source}, split {name}: no column {', '.join(sorted(missing))}; {_LOCAL}")
    scores = [_score(score, f"{source}, split {name}, row {row}") for row, score in enumerate(rows["score"])]
    if not scores:
        raise ValueError(f"{source}, split {name}: no rows")
    scale = _MAX_SCORE if max(scores) <= 1 else 1.0
    return STSPairs(
        list(rows["sentence1"]), list(rows["sentence2"]), [score * scale for score in scores], f"sts-{split}"
    )


def _score(value: object, where: str) -> float:
    try:
        score = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= _MAX_SCORE:
        raise ValueError(f"{where}: the score {value!r} is not a number from 0 to 5")
    return score
