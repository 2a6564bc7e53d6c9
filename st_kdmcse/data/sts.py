"""The seven STS tasks, from a SentEval folder or through ``datasets``."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from datasets import load_dataset
from datasets.exceptions import DatasetsError

logger = logging.getLogger(__name__)

Split = Literal["train", "dev", "test"]

STS_TASKS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STS-B", "SICK-R")
"""The tasks of Table 1 in its order."""

_MAX_SCORE = 5.0
_SCORE_COLUMNS = ("score", "similarity_score")

# Parts of each year's task in SentEval. Of STS13 it leaves out SMT, for its licence.
_SUBSETS = {
    "STS12": ("MSRpar", "MSRvid", "SMTeuroparl", "surprise.OnWN", "surprise.SMTnews"),
    "STS13": ("FNWN", "headlines", "OnWN"),
    "STS14": ("deft-forum", "deft-news", "headlines", "images", "OnWN", "tweet-news"),
    "STS15": ("answers-forums", "answers-students", "belief", "headlines", "images"),
    "STS16": ("answer-answer", "headlines", "plagiarism", "postediting", "question-question"),
}
_SICK_FILES = {"train": "SICK_train.txt", "dev": "SICK_trial.txt", "test": "SICK_test_annotated.txt"}
_SENTEVAL_ROOTS = ("", "downstream", "data/downstream")
# A task's folder in each root; of STS-B also the folder itself.
_FOLDERS = {
    **{name: (f"STS/{name}-en-test", f"{name}-en-test") for name in _SUBSETS},
    "STS-B": ("STS/STSBenchmark", "STSBenchmark", ""),
    "SICK-R": ("SICK",),
}
_REPOSITORIES = {
    **{name: f"{name.lower()}-sts" for name in _SUBSETS},
    "STS-B": "stsbenchmark-sts",
    "SICK-R": "sickr-sts",
}
_SICK_TEST_PAIRS = 4927

_LOCAL = (
    "give a SentEval folder with STS/STSBenchmark/sts-dev.csv in it, or a folder of parquet files (validation.parquet, "
    "test.parquet) with the columns sentence1, sentence2 and score (or similarity_score)"
)
_COPY = "copy the file again"


@dataclass(frozen=True)
class STSPairs:
    """Sentence pairs with gold similarities.

    Attributes:
        sentences1: the first sentence of each pair, its words joined by single blanks, as SentEval feeds them.
        sentences2: the second.
        scores: gold similarity of each pair, from 0 to 5.
        name: what an evaluator calls the set, such as "sts-dev".
        places: where each pair comes from, such as "sts-dev.csv, line 7"; for error messages.
        genres: of STS-B in SentEval's layout, the genre of each pair, such as "main-captions".
    """

    sentences1: list[str]
    sentences2: list[str]
    scores: list[float]
    name: str
    places: Sequence[str] = field(default=(), compare=False, repr=False)
    genres: Sequence[str] = field(default=(), compare=False, repr=False)

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.scores)


@dataclass(frozen=True)
class STSTask:
    """A task of Table 1, or another one: one or several subsets, scored as one in the "all" setting.

    Attributes:
        name: one of :data:`STS_TASKS`, or another name.
        subsets: the sets of pairs that its publisher tells apart, at least one.
    """

    name: str
    subsets: tuple[STSPairs, ...]

    def __len__(self) -> int:
        """Number of pairs of all subsets."""
        return sum(map(len, self.subsets))

    @property
    def sentences1(self) -> list[str]:
        """The first sentence of each pair, subset after subset."""
        return [sentence for subset in self.subsets for sentence in subset.sentences1]

    @property
    def sentences2(self) -> list[str]:
        """The second sentence of each pair."""
        return [sentence for subset in self.subsets for sentence in subset.sentences2]

    @property
    def scores(self) -> list[float]:
        """The gold similarity of each pair."""
        return [score for subset in self.subsets for score in subset.scores]

    @property
    def places(self) -> list[str]:
        """Where each pair comes from."""
        return [place for subset in self.subsets for place in subset.places]

    @cached_property
    def checksum(self) -> str:
        """SHA-256 over subset names, sentences and scores, as 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for subset in self.subsets:
            content = [subset.name, subset.sentences1, subset.sentences2, subset.scores]
            digest.update(json.dumps(content).encode())
        return digest.hexdigest()


def load_sts_tasks(source: str | Path, names: Sequence[str] = STS_TASKS, split: Split = "test") -> list[STSTask]:
    """Load the STS tasks that a source has.

    Args:
        source: one of

            - a SentEval folder, with ``STS/STS12-en-test`` and so on, ``STS/STSBenchmark`` and ``SICK`` in it, in
              ``downstream`` or in ``data/downstream``;
            - a folder with a folder of parquet files for each task, called as on the hub: ``sts12-sts`` to
              ``sts16-sts``, ``stsbenchmark-sts``, ``sickr-sts``;
            - an organisation on the Hugging Face hub that has data sets of these names, such as ``mteb``.
        names: tasks to load, of :data:`STS_TASKS`.
        split: "test", or for STS-B and SICK-R also "dev" or "train"; the others have a test split only.

    Returns:
        The tasks in the order of ``names``; those whose files are absent are left out.

    Raises:
        FileNotFoundError: if there is no such folder, or a task's folder lacks one of its files.
        ValueError: for an unknown task or split, a folder with none of the tasks, a malformed row, or a task that no
            model can be scored on, see :func:`check_scorable`; names the file and the line.
        ConnectionError: if ``source`` names an organisation on the hub that cannot be reached or lacks a task.
    """
    _check_split(split)
    unknown = [name for name in names if name not in STS_TASKS]
    if unknown or not names:
        raise ValueError(f"unknown STS task {', '.join(unknown) or '(none)'}: choose from {', '.join(STS_TASKS)}")
    folder = Path(source)
    if not folder.is_dir():
        if _is_path(source):
            raise FileNotFoundError(
                f"there is no folder {source}: give a SentEval folder (with STS/ and SICK/ in it), or an organisation "
                "on the hub such as mteb"
            )
        return [check_scorable(_hub_task(f"{source}/{_REPOSITORIES[name]}", name, split)) for name in names]
    found = [task for name in names if (task := _local_task(folder, name, split)) is not None]
    if not found:
        raise ValueError(
            f"{source} holds none of {', '.join(names)} ({split}): expected SentEval's folders (STS/STS12-en-test, "
            "STS/STSBenchmark, SICK) or folders of parquet files (sts12-sts, stsbenchmark-sts, sickr-sts)"
        )
    return [check_scorable(task) for task in found]


def load_sts_splits(source: str | Path) -> dict[str, STSTask]:
    """Load all splits of the STS tasks that a folder has.

    Args:
        source: a folder, as for :func:`load_sts_tasks`.

    Returns:
        By name, such as "STS12" or "STS-B dev": test splits first, in the order of :data:`STS_TASKS`.

    Raises:
        FileNotFoundError: if there is no such folder, or a task's folder lacks one of its files.
        ValueError: if it has none of the tasks, or a row is malformed; names the file and the line.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {source}: give a SentEval folder, with STS/ and SICK/ in it")
    tasks = {task.name: task for task in load_sts_tasks(folder)}
    for name in ("STS-B", "SICK-R"):
        in_test = name == "SICK-R" and (folder / _REPOSITORIES[name]).is_dir()  # on the hub, all its pairs are
        for split in () if in_test else ("dev", "train"):
            if task := _local_task(folder, name, split):
                tasks[f"{name} {split}"] = task
    return tasks


def load_sts_benchmark(source: str | Path, split: Split) -> STSPairs:
    """Load a split of the STS Benchmark, or of a data set of its form in any language.

    Args:
        source: one of

            - a SentEval folder: the one that holds ``sts-dev.csv`` (tab-separated, no quoting, gold in column 5 and the
              sentences in columns 6 and 7), or a folder above it that holds ``STSBenchmark``, ``STS/STSBenchmark``,
              ``downstream/STS/STSBenchmark`` or ``data/downstream/STS/STSBenchmark``;
            - a folder of parquet, CSV or JSON files or a name on the Hugging Face hub, such as
              ``sentence-transformers/stsb``, with the columns sentence1, sentence2 and score (or similarity_score) and
              the splits train, validation (or dev) and test. If no score of the split is above 1 they are taken to run
              from 0 to 1 and are multiplied by 5. A configuration of it follows a colon, such as
              ``PhilipMay/stsb_multi_mt:de``.
        split: "train", "dev" or "test".

    Raises:
        FileNotFoundError: if there is no such folder, or the SentEval folder lacks the split's file.
        ValueError: if the split is unknown, a row is malformed, or no model can be scored on the pairs, see
            :func:`check_scorable`; names the file and the line.
        ConnectionError: if ``source`` names a data set on the hub, and the hub cannot be reached or does not have it.
    """
    _check_split(split)
    folder = Path(source)
    repository = _configuration(source)[0]
    if _is_path(repository) and not Path(repository).is_dir():
        raise FileNotFoundError(f"there is no folder {source}: {_LOCAL}")
    benchmark = _benchmark_folder(folder)
    if benchmark is not None:
        pairs = _read_benchmark(benchmark, split)
    else:
        pairs = _from_datasets(str(source), split, f"sts-{split}")
    return check_scorable(STSTask("STS-B", (pairs,))).subsets[0]


def _local_task(folder: Path, name: str, split: Split) -> STSTask | None:
    if name in _SUBSETS and split != "test":
        return None
    repository = folder / _REPOSITORIES[name]
    if repository.is_dir():
        return _hub_task(str(repository), name, split)
    if name == "STS-B":
        benchmark = _benchmark_folder(folder)
        has_split = benchmark is not None and (benchmark / f"sts-{split}.csv").is_file()
        return STSTask(name, (_read_benchmark(benchmark, split),)) if benchmark is not None and has_split else None
    for place in _places(folder, name):
        if name == "SICK-R" and (place / _SICK_FILES[split]).is_file():
            return STSTask(name, (_read_sick(place / _SICK_FILES[split], f"sick-{split}"),))
        if name in _SUBSETS and place.is_dir():
            return STSTask(name, tuple(_read_year(place, subset) for subset in _SUBSETS[name]))
    return None


def _hub_task(repository: str, name: str, split: Split) -> STSTask:
    task = STSTask(name, (_from_datasets(repository, split, f"{_REPOSITORIES[name]}-{split}"),))
    if name == "SICK-R" and split == "test" and len(task) != _SICK_TEST_PAIRS:
        logger.warning(
            "%s has %d pairs where the test set of SentEval has %d: its SICK-R score does not compare with published "
            "ones",
            repository,
            len(task),
            _SICK_TEST_PAIRS,
        )
    return task


def _benchmark_folder(folder: Path) -> Path | None:
    return next((place for place in _places(folder, "STS-B") if any(place.glob("sts-*.csv"))), None)


def _places(folder: Path, name: str) -> Iterator[Path]:
    return (folder / root / place for root in _SENTEVAL_ROOTS for place in _FOLDERS[name])


def _read_benchmark(folder: Path, split: Split) -> STSPairs:
    path = folder / f"sts-{split}.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the whole STSBenchmark folder of SentEval")
    rows = [(where, _columns(line, where, 7)) for where, line in _lines(path)]
    pairs = checked_pairs(f"sts-{split}", path, ((where, row[4], row[5], row[6]) for where, row in rows))
    return replace(pairs, genres=[row[0] for _, row in rows])


def _read_sick(path: Path, name: str) -> STSPairs:
    lines = _lines(path)
    where, header = next(lines, (f"{path}, line 1", ""))
    if _columns(header, where, 4)[1:4] != ["sentence_A", "sentence_B", "relatedness_score"]:
        raise ValueError(
            f"{where}: the header is {header!r}, expected pair_ID, sentence_A, sentence_B, relatedness_score; {_COPY}"
        )
    rows = ((where, _columns(line, where, 4)) for where, line in lines)
    return checked_pairs(name, path, ((where, row[3], row[1], row[2]) for where, row in rows))


def _read_year(folder: Path, subset: str) -> STSPairs:
    """A subset of STS12 to STS16: a file of sentence pairs and one of gold scores, in which a blank line is no gold."""
    inputs, golds = folder / f"STS.input.{subset}.txt", folder / f"STS.gs.{subset}.txt"
    for path in (inputs, golds):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: copy the whole {folder.name} folder of SentEval")
    sentences, scores = list(_lines(inputs)), list(_lines(golds))
    while scores and len(scores) > len(sentences) and not scores[-1][1].strip():
        scores.pop()
    if len(sentences) != len(scores):
        raise ValueError(
            f"{golds} has {len(scores)} lines, {inputs} has {len(sentences)}: a line of the one belongs to a line of "
            "the other; copy both files again"
        )
    rows = (
        (where, _score(gold.strip(), place), *_two_columns(line, where))
        for (where, line), (place, gold) in zip(sentences, scores, strict=True)
        if gold.strip()
    )
    return checked_pairs(subset, inputs, rows)


def _from_datasets(source: str, split: Split, name: str) -> STSPairs:
    repository, configuration = _configuration(source)
    try:
        splits = load_dataset(str(repository), configuration)
    except (DatasetsError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if reason.startswith("Config name is missing"):
            raise ValueError(f"{source} has several configurations: name one, as {source}:CONFIG ({reason})") from error
        if Path(repository).is_dir():
            raise ValueError(f"{source} could not be read: {reason}; {_LOCAL}") from error
        raise ConnectionError(f"{source} did not load from the hub: {reason}; {_LOCAL}") from error
    found = next((each for each in {"dev": ("validation", "dev")}.get(split, (split,)) if each in splits), None)
    if found is None:
        raise ValueError(f"{source} has the splits {sorted(splits)}, none of them {split}: {_LOCAL}")
    rows = splits[found]
    gold = next((name for name in _SCORE_COLUMNS if name in rows.column_names), _SCORE_COLUMNS[0])
    missing = {"sentence1", "sentence2", gold} - set(rows.column_names)
    if missing:
        raise ValueError(f"{source}, split {found}: no column {', '.join(sorted(missing))}; {_LOCAL}")
    columns = zip(rows[gold], rows["sentence1"], rows["sentence2"], strict=True)
    where = f"{source}, split {found}"
    pairs = checked_pairs(name, where, ((f"{where}, row {row}", *each) for row, each in enumerate(columns)))
    if max(pairs.scores) <= 1:
        pairs.scores[:] = [score * _MAX_SCORE for score in pairs.scores]
    return pairs


def check_scorable(task: STSTask) -> STSTask:
    """Refuse a task whose correlation is undefined, whatever the model.

    Args:
        task: of checked pairs.

    Returns:
        The task.

    Raises:
        ValueError: if all scores are the same, or all cosines must be; names the first place.
    """
    problem = None
    # A sentence has the cosine 1 with itself, whichever it is.
    pairs = zip(task.sentences1, task.sentences2, strict=True)
    distinct = {frozenset(pair) if pair[0] != pair[1] else None for pair in pairs}
    if len(task) < 2:
        problem = "is the only pair"
    elif len(set(task.scores)) < 2:
        problem = f"and all others have the score {task.scores[0]:g}"
    elif len(distinct) < 2:
        problem = "and all others are one pair of sentences, or a sentence with itself"
    if problem:
        place = task.places[0] if task.places else task.name
        raise ValueError(f"{place} {problem}: a correlation with them is undefined; give a whole file of pairs")
    return task


def checked_pairs(name: str, source: str | Path, rows: Iterable[tuple[str, Any, Any, Any]]) -> STSPairs:
    """Pairs from rows, with their sentences' words joined by single blanks.

    Args:
        name: of the set.
        source: where they come from.
        rows: place, gold score and both sentences of each pair.

    Raises:
        ValueError: if there is no row, a sentence is no text or blank, or a score is not from 0 to 5; names the place.
    """
    places: list[str] = []
    pairs = STSPairs([], [], [], name, places)
    for where, gold, first, second in rows:
        if not (isinstance(first, str) and isinstance(second, str)):
            raise ValueError(f"{where}: the sentences are {first!r} and {second!r}, expected two texts")
        if not first.split() or not second.split():
            raise ValueError(f"{where}: the sentences are {first!r} and {second!r}, and a blank one has no meaning")
        pairs.scores.append(_score(gold, where))
        pairs.sentences1.append(" ".join(first.split()))
        pairs.sentences2.append(" ".join(second.split()))
        places.append(where)
    if not pairs:
        raise ValueError(f"{source} is empty: no pair with a score; {_COPY}")
    return pairs


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Each line of a file with its place; lines end with a line feed only, as in SentEval's own files."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                yield where, raw.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8; {_COPY}") from error


def _columns(line: str, where: str, expected: int) -> list[str]:
    columns = line.split("\t")
    if len(columns) < expected:
        raise ValueError(f"{where}: {len(columns)} tab-separated columns, expected {expected}; {_COPY}")
    return columns


def _two_columns(line: str, where: str) -> tuple[str, str]:
    first, second, *_ = _columns(line, where, 2)
    return first, second


def _score(value: object, where: str) -> float:
    try:
        score = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= _MAX_SCORE:
        raise ValueError(f"{where}: the score {value!r} is not a number from 0 to 5")
    return score


def _check_split(split: str) -> None:
    if split not in get_args(Split):
        raise ValueError(f'split is {split!r}, expected "train", "dev" or "test"')


def _configuration(source: str | Path) -> tuple[str | Path, str | None]:
    """A data set and its configuration: of ``NAME:CONFIG``, both."""
    repository, colon, configuration = str(source).rpartition(":")
    return (repository, configuration) if colon and not Path(source).is_dir() else (source, None)


def _is_path(source: str | Path) -> bool:
    """Whether it can only be a path: names on the hub have one slash at most."""
    return (
        isinstance(source, Path)
        or Path(source).is_absolute()
        or source.startswith((".", "~"))
        or source.strip("/").count("/") > 1
    )
