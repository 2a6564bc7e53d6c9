"""Plain text sentences, such as the million Wikipedia sentences that SimCSE trains on."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow as pa
from datasets import Dataset

from st_kdmcse.data.files import sha256_file

logger = logging.getLogger(__name__)

_LINES_PER_CHUNK = 65_536


def read_sentences(path: str | Path) -> Dataset:
    """Read a UTF-8 text file with one sentence a line.

    A byte order mark and Windows line ends are tolerated, blank lines are skipped (their number is logged), and a
    sentence is kept as it is apart from surrounding whitespace. The sentences are held in one Arrow column, which takes
    about as much memory as the file is long.

    Args:
        path: the text file.

    Returns:
        A dataset with the column ``sentence``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is a folder, has no sentence, is binary or is not UTF-8; names the line.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give a text file with one sentence a line")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}: give a text file with one sentence a line")
    chunks: list[pa.Array] = []
    lines: list[str] = []
    blank = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            sentence = _decode(line, path, number).strip()
            if not sentence:
                blank += 1
                continue
            lines.append(sentence)
            if len(lines) == _LINES_PER_CHUNK:
                chunks.append(pa.array(lines, pa.string()))
                lines.clear()
    chunks.append(pa.array(lines, pa.string()))
    column = pa.chunked_array(chunks)
    if not len(column):
        raise ValueError(f"{path} has no sentence: it is empty or all its lines are blank")
    if blank:
        logger.info("%s: skipped %d blank lines", path, blank)
    # Without a fingerprint datasets would pickle all the text to make one.
    return Dataset(pa.table({"sentence": column}), fingerprint=sha256_file(path)[:16])


def _decode(line: bytes, path: Path, number: int) -> str:
    if b"\0" in line:
        raise ValueError(
            f"{path}, line {number}: a NUL byte, so this is a binary file or not UTF-8; convert it, for example with "
            "`iconv -f utf-16 -t utf-8`"
        )
    try:
        return line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start} of the line); convert the file, "
            "for example with `iconv -f latin-1 -t utf-8`"
        ) from error
