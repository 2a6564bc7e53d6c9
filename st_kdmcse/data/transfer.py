"""The transfer tasks of SentEval (MR, CR, SUBJ, MPQA, SST2, TREC, MRPC), from their original files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from st_kdmcse.files import sha256_file

TREC_CLASSES = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
"""The coarse question classes of TREC in the order of their labels."""

_ROOTS = ("", "downstream", "data/downstream")
_BINARY_FILES = {  # label 0, label 1
    "MR": ("MR/rt-polarity.neg", "MR/rt-polarity.pos"),
    "CR": ("CR/custrev.neg", "CR/custrev.pos"),
    "SUBJ": ("SUBJ/subj.subjective", "SUBJ/subj.objective"),
    "MPQA": ("MPQA/mpqa.neg", "MPQA/mpqa.pos"),
}
_SPLIT_FILES = {
    "SST2": {split: f"SST/binary/sentiment-{split}" for split in ("train", "dev", "test")},
    "TREC": {"train": "TREC/train_5500.label", "test": "TREC/TREC_10.label"},
    "MRPC": {split: f"MRPC/msr_paraphrase_{split}.txt" for split in ("train", "test")},
}
TRANSFER_TASKS = (*_BINARY_FILES, *_SPLIT_FILES)
"""The tasks in the order of SentEval's table."""

_Row = tuple[tuple[str, ...], int]
_Reader = Callable[[str, str], _Row]
"""Takes a line without its end and where it is; returns its sentences and its label."""


@dataclass(frozen=True)
class LabelledSentences:
    """A split of a classification task, in the order of its files.

    Attributes:
        sentences: of each row its one sentence, or its two (MRPC); the tokens joined by single blanks. A blank line is
            the empty sentence (CR and MPQA have a few).
        labels: the class of each row, from 0.
        places: file and line of each row, for messages.
    """

    sentences: list[tuple[str, ...]]
    labels: list[int]
    places: list[str]

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.labels)


@dataclass(frozen=True)
class TransferTask:
    """A transfer task.

    Attributes:
        name: one of :data:`TRANSFER_TASKS`.
        splits: MR, CR, SUBJ and MPQA have "all" alone, TREC and MRPC "train" and "test", SST2 "train", "dev", "test".
        sha256: checksum of each file, by its path below the SentEval folder.
    """

    name: str
    splits: Mapping[str, LabelledSentences]
    sha256: Mapping[str, str]


def load_transfer_task(folder: str | Path, name: str) -> TransferTask | None:
    """Read a transfer task from SentEval's files.

    As in SentEval, MR, CR, SUBJ, MPQA and TREC are read as Latin-1, SST2 and MRPC as UTF-8, and a sentence is split at
    white space.

    Args:
        folder: SentEval's folder: the one that holds ``MR``, ``CR``, ``SST`` ..., or one above it that holds
            ``downstream`` or ``data/downstream``.
        name: one of :data:`TRANSFER_TASKS`.

    Returns:
        The task, or None if none of its files are there.

    Raises:
        FileNotFoundError: if there is no such folder, or the task has some of its files only.
        ValueError: if there is no such task, or a file is malformed or empty; names the file and the line.
    """
    if name not in TRANSFER_TASKS:
        raise ValueError(f"there is no transfer task {name!r}: choose from {', '.join(TRANSFER_TASKS)}")
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}: give a SentEval folder, with {_files(name)[0]} in it")
    root = next((folder / root for root in _ROOTS if _present(folder / root, name)), None)
    if root is None:
        return None
    for file in _files(name):
        if not (root / file).is_file():
            raise FileNotFoundError(f"{root / file} is missing: copy the whole {file.split('/')[0]} folder of SentEval")
    if name in _BINARY_FILES:
        negative, positive = _BINARY_FILES[name]
        splits = {"all": _read((root / positive, _sentence(1)), (root / negative, _sentence(0)), encoding="latin-1")}
    elif name == "TREC":
        splits = {
            split: _read((root / file, _question), encoding="latin-1") for split, file in _SPLIT_FILES[name].items()
        }
    elif name == "SST2":
        splits = {split: _read((root / file, _phrase)) for split, file in _SPLIT_FILES[name].items()}
    else:
        splits = {split: _read((root / file, _pair), header="Quality") for split, file in _SPLIT_FILES[name].items()}
    return TransferTask(name, splits, {file: sha256_file(root / file) for file in _files(name)})


def _files(name: str) -> tuple[str, ...]:
    return _BINARY_FILES[name] if name in _BINARY_FILES else tuple(_SPLIT_FILES[name].values())


def _present(root: Path, name: str) -> bool:
    return any((root / file).is_file() for file in _files(name))


def _read(*files: tuple[Path, _Reader], encoding: str = "utf-8", header: str | None = None) -> LabelledSentences:
    rows = LabelledSentences([], [], [])
    for path, read in files:
        before = len(rows)
        for number, line in _lines(path, encoding):
            where = f"{path}, line {number}"
            if header is not None and number == 1:
                if not line.lstrip("\ufeff").startswith(header):
                    raise ValueError(f"{where}: no header (it begins with {header}); copy the file again")
                continue
            sentences, label = read(line, where)
            rows.sentences.append(sentences)
            rows.labels.append(label)
            rows.places.append(where)
        if len(rows) == before:
            raise ValueError(f"{path} is empty; copy the file again")
    return rows


def _lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                yield number, raw.decode(encoding).rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not {encoding.upper()}; copy the file again") from error


def _sentence(label: int) -> _Reader:
    return lambda line, where: ((_join(line),), label)


def _phrase(line: str, where: str) -> _Row:
    sentence, label = _columns(line, 2, where)
    return (_join(sentence),), _binary(label, where)


def _question(line: str, where: str) -> _Row:
    label, colon, rest = line.strip().partition(":")
    if not colon or label not in TREC_CLASSES:
        raise ValueError(f"{where}: expected CLASS:subclass and a question, CLASS one of {', '.join(TREC_CLASSES)}")
    words = rest.split(" ", 1)[1:]
    if not words:
        raise ValueError(f"{where}: no question after the class {line.strip()!r}")
    return (_join(words[0]),), TREC_CLASSES.index(label)


def _pair(line: str, where: str) -> _Row:
    quality, _, _, first, second = _columns(line, 5, where)
    return (_join(first), _join(second)), _binary(quality, where)


def _columns(line: str, count: int, where: str) -> list[str]:
    columns = line.split("\t")
    if len(columns) != count:
        raise ValueError(f"{where}: {len(columns)} tab-separated columns, expected {count}; copy the file again")
    return columns


def _binary(label: str, where: str) -> int:
    if label.strip() not in ("0", "1"):
        raise ValueError(f"{where}: the label {label!r} is neither 0 nor 1")
    return int(label)


def _join(sentence: str) -> str:
    return " ".join(sentence.split())
