"""Building an index of more texts than memory holds: block by block, to be resumed after a kill."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from tqdm import tqdm

from st_kdmcse.data.seen import Seen
from st_kdmcse.encoding import computing, encode_documents, encoding_precision
from st_kdmcse.files import atomic_file, locked, manifest_checksum, progress_bar, sha256_file, write_json
from st_kdmcse.precision import Precision
from st_kdmcse.provenance import claim, parameters_checksum
from st_kdmcse.search.base import Matrix, NewRows, unit_rows
from st_kdmcse.search.factory import stays_on_disk
from st_kdmcse.search.faiss_backend import chosen_factory
from st_kdmcse.search.model_check import model_header
from st_kdmcse.search.on_disk import EXACT
from st_kdmcse.search.records import TextRecord
from st_kdmcse.search.semantic_index import SemanticIndex, check_tune_queries, encoded_queries
from st_kdmcse.search.storage import check_free, fill_index, is_index, remove_work, writing
from st_kdmcse.search.table import RowTable
from st_kdmcse.search.tuning import check_recall_target

logger = logging.getLogger(__name__)

BLOCK_ROWS = 4096
"""Records that are encoded, and saved, at a time."""

_RUN, _TABLE = "run.json", "rows.sqlite"
_FULL = "what was encoded is kept there: free space and repeat, or delete that folder"


def build_index(
    records: Callable[[], Iterable[TextRecord]],
    model: SentenceTransformer,
    model_name: str | None,
    path: str | Path,
    *,
    source: Mapping[str, str],
    factory: str | None = None,
    recall_target: float = 0.95,
    memory_limit: int | None = None,
    devices: Sequence[str] | None = None,
    block_rows: int = BLOCK_ROWS,
    show_progress_bar: bool | None = None,
    precision: Precision = "auto",
    tune_queries: Sequence[str] | None = None,
    mmap: bool | None = None,
) -> SemanticIndex:
    """Build and save an index in memory that a block of records and the index bound.

    A first pass over the records counts and checks them. In the second, blocks of 4,096 are encoded, texts of similar
    length together, and saved in the folder ``NAME.parts`` beside ``path``, each with its checksum. Killed at any
    moment, the same call goes on after the last finished block; one that does not fit its checksum is made again. Then
    the index is trained, filled, tuned and saved, and the folder is removed; a kill at any time costs no embeddings.
    The disk holds all embeddings as float32 until then.

    Args:
        records: gives all records, the same ones at each call.
        model: that encodes them; on several devices copies of it do.
        model_name: hub name or folder that it was loaded from, by which the index finds it again.
        path: folder for the index; there must be none.
        source: identity of the input, such as a file's name and SHA-256: what was begun goes on only with the same.
        factory: FAISS's name of the index type; None chooses one, see
            :func:`~st_kdmcse.search.factory.choose_factory`, and logs it.
        recall_target: recall@10 that an approximate index is tuned to reach on new queries, with 99.5 % confidence; in
            (0, 1].
        memory_limit: bytes for the vectors; None is half of the memory that is free.
        devices: that share the encoding, such as ["cuda:0", "cuda:1"]; None takes all GPUs where there are several.
        block_rows: records that are encoded, and saved, at a time.
        show_progress_bar: None shows bars in a terminal, once something has taken two seconds.
        precision: that the texts are encoded in; "auto" is bfloat16 where that is faster.
        tune_queries: queries such as users ask, which an approximate index is tuned on; None takes some of the texts.
        mmap: have the vectors stay on disk, memory-mapped, so that building and searching take little memory; such an
            index cannot be changed. None does so where they do not fit into ``memory_limit``.

    Returns:
        The index, as loaded from ``path``.

    Raises:
        ValueError: if there is no record, one cannot be used (names it), an index is there already, what was begun
            before belongs to other records, another model or another process, or the records changed during the build.
        ImportError: without FAISS; names the extra.
    """
    path = Path(path)
    path = path if path.name.strip(".") else path.resolve()
    if not path.name:
        raise ValueError(f"{path} cannot be an index: name a folder in it")
    check_recall_target(recall_target)
    check_tune_queries(tune_queries)
    unfinished = path.with_name(f"{path.name}.parts")
    if is_index(path) and (unfinished / _RUN).is_file():  # killed after the last step
        with _Parts.claimed(unfinished, model, source, block_rows) as parts:
            parts.remove()
        return SemanticIndex.load(path, model)
    check_free(path)
    total = _check(records(), show_progress_bar)
    dim = int(model.get_embedding_dimension() or 0)
    on_disk = stays_on_disk(total, dim, factory, memory_limit, mmap)
    factory = chosen_factory(total, dim, factory, None if on_disk else memory_limit)
    computed = encoding_precision(model, precision, total)
    queries = encoded_queries(model, tune_queries)
    with _Parts.claimed(unfinished, model, source, block_rows, computed) as parts:
        with computing(model, computed) as encoder, _pool(encoder, devices) as pool:

            def encode(texts: Sequence[str]) -> Matrix:
                return encode_documents(encoder, texts, pool, False)

            _encode(records(), total, encode, parts, show_progress_bar)
        vectors = _PartVectors(parts, total)
        header = model_header(model, model_name, computed)
        fill_index(
            path,
            vectors,
            parts.table,
            header,
            factory,
            recall_target,
            memory_limit,
            show_progress_bar,
            queries,
            parts.path / EXACT if on_disk else None,
            _FULL,
        )
        parts.remove()
    return SemanticIndex.load(path, model)


class _Parts:
    """The folder of an unfinished build.

    Part n holds the embeddings of block n in ``part-n.npy``. ``part-n.json`` comes last: it has the checksum of those,
    of the records that they were made from, and its own. The rows are in the table, in the order of the records; it
    is made again by each run, from the records themselves.
    """

    def __init__(self, path: Path, dim: int, block_rows: int) -> None:
        self.path, self.dim, self.block_rows = path, dim, block_rows
        for old in path.glob(f"{_TABLE}*"):  # its journal too
            old.unlink()
        self.table = RowTable.create(path / _TABLE)

    @classmethod
    @contextmanager
    def claimed(
        cls,
        path: Path,
        model: SentenceTransformer,
        source: Mapping[str, str],
        block_rows: int,
        precision: str | None = None,
    ) -> Iterator[_Parts]:
        """Begin, or go on with what was begun for the same records and model; in a precision, if it still matters."""
        dim = int(model.get_embedding_dimension() or 0)
        run = {
            "source": dict(source),
            "model": parameters_checksum(model),
            "dim": dim,
            "block_rows": block_rows,
            **({"precision": precision} if precision else {}),
        }
        with locked(path):
            with writing(path, _FULL):
                claim(path / _RUN, run, "delete that folder to begin again, or choose another output")
                parts = cls(path, dim, block_rows)
            try:
                yield parts
            finally:
                parts.table.close()

    def finished(self, number: int, records: Sequence[TextRecord]) -> bool:
        """Whether a part is there, whole.

        Raises:
            ValueError: if it was made from other records.
        """
        note = _read_json(self._file(number, "json"))
        if note is None or note.get("checksum") != manifest_checksum(note):
            return False
        if note.get("records") != _digest(records):
            raise ValueError(
                f"{self._file(number, 'npy')} was made from other records, though their source is the same: delete "
                f"{self.path} to begin again"
            )
        array = self._file(number, "npy")
        if not array.is_file() or sha256_file(array) != note.get("sha256"):
            logger.warning("%s is damaged and is made again", array)
            return False
        return True

    def write(self, number: int, records: Sequence[TextRecord], embeddings: Matrix) -> None:
        """Save a part; it is there, whole, when this returns."""
        array = self._file(number, "npy")
        unit = unit_rows(embeddings, lambda row: f"record {records[row].id!r}")
        with writing(self.path, _FULL):
            with atomic_file(array, "wb") as file:
                np.save(file, unit)
            note = {"records": _digest(records), "sha256": sha256_file(array)}
            write_json(self._file(number, "json"), {**note, "checksum": manifest_checksum(note)})

    def store(self, records: Sequence[TextRecord], positions: range) -> None:
        """Put rows into the table."""
        with writing(self.path, _FULL), self.table.transaction():
            ids, texts = [record.id for record in records], [record.text for record in records]
            self.table.insert(positions, ids, texts, [record.metadata for record in records])

    def array(self, number: int) -> npt.NDArray[np.float32]:
        """Embeddings of a part, memory-mapped."""
        array: npt.NDArray[np.float32] = np.load(self._file(number, "npy"), mmap_mode="r", allow_pickle=False)
        return array

    def remove(self) -> None:
        """Delete the folder."""
        self.table.close()
        remove_work(self.path, _RUN)

    def _file(self, number: int, suffix: str) -> Path:
        return self.path / f"part-{number:06d}.{suffix}"


class _PartVectors:
    """All embeddings in the order of the records, read from the parts as they are needed."""

    def __init__(self, parts: _Parts, rows: int) -> None:
        self.shape = (rows, parts.dim)
        self._parts = parts

    def __getitem__(self, wanted: slice | npt.NDArray[np.int64]) -> Matrix:
        if isinstance(wanted, slice):
            wanted = np.arange(*wanted.indices(self.shape[0]))
        found = np.empty((len(wanted), self.shape[1]), dtype=np.float32)
        numbers = wanted // self._parts.block_rows
        for number in np.unique(numbers).tolist():
            here = numbers == number
            found[here] = self._parts.array(number)[wanted[here] % self._parts.block_rows]
        return found


def _check(records: Iterable[TextRecord], show: bool | None) -> int:
    """The number of records; each must be fit for the index."""
    total = 0
    with Seen() as seen, _progress(None, "Checking", show) as progress:
        for total, record in enumerate(records, start=1):
            NewRows.checked([record.id], [record.text], np.ones((1, 1)), [record.metadata])
            if not isinstance(record.text, str) or not record.text.strip():
                raise ValueError(f"record {total} (id {record.id!r}): the text is {record.text!r}, expected one")
            if not seen.add(record.id):
                raise ValueError(f"record {total}: the id {record.id!r} was there before; ids name one record each")
            progress.update()
    if not total:
        raise ValueError("there are no records to index")
    return total


def _encode(
    records: Iterable[TextRecord],
    total: int,
    encode: Callable[[Sequence[str]], Matrix],
    parts: _Parts,
    show: bool | None,
) -> None:
    """Make all parts that are not finished."""
    source = iter(records)
    done = reused = 0
    with _progress(total, "Encoding", show) as progress:
        for number in range(-(-total // parts.block_rows)):
            block = list(islice(source, min(parts.block_rows, total - done)))
            if len(block) < min(parts.block_rows, total - done):
                break
            parts.store(block, range(done, done + len(block)))
            done += len(block)
            if parts.finished(number, block):
                reused += len(block)
            else:
                parts.write(number, block, encode([record.text for record in block]))
            progress.update(len(block))
    if reused:
        logger.info("went on with %s of %s records that were encoded before", f"{reused:,}", f"{total:,}")
    if done < total or next(source, None) is not None:
        raise ValueError(f"there were {total:,} records at first and another number later: leave the source as it is")


@contextmanager
def _pool(model: SentenceTransformer, devices: Sequence[str] | None) -> Iterator[Any]:
    """Processes that encode on several devices; None where there is one."""
    if devices is None and model.device.type == "cuda" and torch.cuda.device_count() > 1:
        devices = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if not devices:
        yield None
        return
    device = model.device
    pool = model.start_multi_process_pool(list(devices))
    try:
        yield pool
    finally:
        model.stop_multi_process_pool(pool)
        model.to(device)  # the pool has moved it to the CPU


def _digest(records: Iterable[TextRecord]) -> str:
    content = hashlib.sha256()
    for record in records:
        content.update(json.dumps([record.id, record.text, record.metadata]).encode())
    return content.hexdigest()


def _read_json(path: Path) -> dict[str, Any] | None:
    """The content of a file; None if it is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _progress(total: int | None, description: str, show: bool | None) -> tqdm[Any]:
    return progress_bar(total, description, "text", show)
