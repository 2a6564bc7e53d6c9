"""Search by meaning: a model, and an engine that keeps texts by their embeddings.

One module, because it is one class: the interface of all of search, most of it docstrings.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt
from sentence_transformers import SentenceTransformer

from st_kdmcse.data.characters import check_unicode
from st_kdmcse.encoding import encode_documents, encode_queries, encoding_precision
from st_kdmcse.precision import Precision
from st_kdmcse.search.address import MilvusAddress, open_backend, parse_address
from st_kdmcse.search.base import Filter, Hit, Metadata, NewRows, SearchBackend, unit_rows
from st_kdmcse.search.copying import check_whole
from st_kdmcse.search.faiss_backend import FaissBackend, try_factory
from st_kdmcse.search.model_check import check_model, load_expected, load_named, model_header, same_model
from st_kdmcse.search.storage import Verify, check_free, is_index, read_index, read_manifest, write_index
from st_kdmcse.search.tuning import check_recall_target
from st_kdmcse.teachers.base import TeacherImage
from st_kdmcse.teachers.sentence_transformer import encode_images

if TYPE_CHECKING:
    from st_kdmcse.search.milvus_backend import MilvusBackend


_Given = TypeVar("_Given")
_Result = TypeVar("_Result")


class UnknownIdError(KeyError, ValueError):
    """There is no row with that id; the message names it."""

    def __str__(self) -> str:
        return str(self.args[0])


class SemanticIndex:
    """Texts, found by the cosine of their embedding with that of a query.

    Make one with :meth:`build` (or, from a file larger than memory,
    :func:`~st_kdmcse.search.build.build_index`), :meth:`load` one that was saved, or :meth:`open` one wherever it is.

    A saved index is a folder:

    ====================== ==========================================================================================
    File                   Content
    ====================== ==========================================================================================
    ``manifest.json``      format and version; the model (name, checksum of its parameters) and its embedding of a
                           probe sentence; dim and rows; index type, how it was tuned and the recall measured; bytes
                           and SHA-256 of each file; versions, date, and a checksum of all that
    ``data-*/``            ``vectors.faiss``, and ``rows.sqlite`` with ids, texts and metadata
    ``lock``               held by a process that writes
    ====================== ==========================================================================================

    Args:
        backend: the engine.
        model: that made its embeddings, and encodes queries; its prompts for queries and documents apply.
        model_name: hub name or folder that it was loaded from; None takes what the model knows of that.
        images: what :func:`~st_kdmcse.search.images.index_images` notes of the images that the rows are; None where
            they are texts.
        embedded_in: precision that the texts were encoded in, for the manifest; None where that is not known.

    Attributes:
        precision: that texts and queries are encoded in from now on. "auto" is bfloat16 for 256 texts or more where
            that is faster, and float32 for queries.

    Raises:
        ValueError: if the model's embeddings are of another width.

    Example:
        ::

            index = SemanticIndex.build(model, ["A dog runs.", "Two men talk."], ids=["dog", "men"])
            index.search("a running animal", k=1)[0].text
            index.add(["A cat sleeps."], ids=["cat"])
            index.save("my-index")
    """

    def __init__(
        self,
        backend: SearchBackend,
        model: SentenceTransformer,
        model_name: str | None = None,
        images: Mapping[str, Any] | None = None,
        embedded_in: str | None = None,
    ) -> None:
        self.backend = backend
        self.model = model
        self.precision: Precision = "auto"
        self._header = model_header(model, model_name, embedded_in)
        if images is not None:
            self._header["images"] = dict(images)
        self._path: Path | None = None
        self._saved: str | None = None
        self._found_model = False
        self._mmap: bool | None = None
        if model.get_embedding_dimension() != backend.dim:
            raise ValueError(
                f"the model's embeddings are of width {model.get_embedding_dimension()}, those of the index "
                f"{backend.dim}: it was made with another model"
            )

    @classmethod
    def build(
        cls,
        model: SentenceTransformer | str,
        texts: Iterable[str],
        *,
        ids: Iterable[str] | None = None,
        metadata: Iterable[Metadata] | None = None,
        factory: str | None = None,
        recall_target: float = 0.95,
        memory_limit: int | None = None,
        path: str | Path | None = None,
        show_progress_bar: bool | None = None,
        precision: Precision = "auto",
        tune_queries: Sequence[str] | None = None,
    ) -> SemanticIndex:
        """Encode texts and index them with FAISS, in memory.

        Args:
            model: a model, or its hub name or folder.
            texts: n texts; none gives an index to add to.
            ids: n ids, each once; None gives "0", "1", ...
            metadata: n mappings of plain values.
            factory: FAISS's name of an index type; None chooses by rows, dim and memory and logs which: exact search
                below 100,000 rows, above lists of near vectors, compressed where vectors do not fit.
            recall_target: recall@10 that an approximate index is tuned to reach on new queries, with 99.5 % confidence;
                in (0, 1].
            memory_limit: bytes for the vectors.
            path: folder to save to; None saves nothing.
            show_progress_bar: None shows bars in a terminal, once something has taken two seconds.
            precision: that texts, and then queries, are encoded in; "auto" is bfloat16 for texts where that is faster.
            tune_queries: queries such as users ask, which an approximate index is tuned on. None takes up to 2,000 of
                the texts, which are added to the index after that.

        Raises:
            ValueError: for empty texts, ids that are there twice, lengths that differ, an index at ``path`` already, or
                embeddings that are not finite; names the row.
            ImportError: without FAISS; names the extra.
        """
        check_recall_target(recall_target)
        check_tune_queries(tune_queries)
        model, name = load_named(model)
        texts = checked_texts(texts)
        if path is not None:
            check_free(Path(path))
        if factory is not None:
            try_factory(int(model.get_embedding_dimension() or 0), factory)
        computed = encoding_precision(model, precision, len(texts))
        index = cls._from_rows(
            model,
            name,
            _texts_rows(model, texts, _new_ids(ids, texts), metadata, show_progress_bar, computed),
            factory,
            recall_target,
            memory_limit,
            show_progress_bar,
            computed,
            encoded_queries(model, tune_queries),
        )
        index.precision = precision
        if path is not None:
            index.save(path)
        return index

    @classmethod
    def from_embeddings(
        cls,
        model: SentenceTransformer | str,
        embeddings: npt.ArrayLike,
        texts: Iterable[str],
        *,
        ids: Iterable[str] | None = None,
        metadata: Iterable[Metadata] | None = None,
        factory: str | None = None,
        recall_target: float = 0.95,
        memory_limit: int | None = None,
        show_progress_bar: bool | None = None,
        tune_queries: Sequence[str] | None = None,
    ) -> SemanticIndex:
        """Like :meth:`build`, from embeddings that the model has made already.

        Args:
            model: that made them.
            embeddings: (n, dimension), normalised here.
            texts: n texts.
            ids: n ids.
            metadata: n mappings.
            factory: FAISS's name of an index type.
            recall_target: recall@10 to reach.
            memory_limit: bytes for the vectors.
            show_progress_bar: None shows one in a terminal, after two seconds.
            tune_queries: queries such as users ask, which an approximate index is tuned on.

        Raises:
            ValueError: as :meth:`build`; also for embeddings that are zero, not finite or of another width.
        """
        check_recall_target(recall_target)
        check_tune_queries(tune_queries)
        model, name = load_named(model)
        texts = checked_texts(texts)
        rows = NewRows.checked(_new_ids(ids, texts), texts, embeddings, None if metadata is None else list(metadata))
        queries = encoded_queries(model, tune_queries)
        return cls._from_rows(
            model, name, rows, factory, recall_target, memory_limit, show_progress_bar, tune_queries=queries
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: SentenceTransformer | str | None = None,
        mmap: bool | None = None,
        verify: Verify | None = None,
    ) -> SemanticIndex:
        """Open a saved index.

        Args:
            path: its folder.
            model: the model that made it, or its hub name or folder; None loads the one that the manifest names.
            mmap: leave the vectors on disk, and read what a search needs; the index cannot be changed then. None does
                so where they take more than half of the memory that is free, and says so.
            verify: "full" compares every byte with its checksum, "size" the sizes and a sample of each file; None is
                "full" up to 1 GB.

        Raises:
            FileNotFoundError: if there is no index, a file of it is missing, or the model is.
            ValueError: if a file is truncated or altered (names it), or the model is another (says which is expected).
        """
        path = Path(path)
        backend, manifest = read_index(path, mmap=mmap, verify=verify)
        index = cls._known(backend, manifest, model, str(path), path)
        index._mmap = mmap
        return index

    @classmethod
    def open(
        cls,
        address: str | Path,
        model: SentenceTransformer | str | None = None,
        create: bool = False,
        precision: Precision = "auto",
        mmap: bool | None = None,
    ) -> SemanticIndex:
        """Open an index wherever it is.

        Args:
            address: the folder of a saved index, or a collection of Milvus, see
                :func:`~st_kdmcse.search.address.parse_address`.
            model: as in :meth:`load`; needed where the index is made.
            create: make an empty index if there is none yet.
            precision: that texts and queries are encoded in, see the attribute.
            mmap: as in :meth:`load`, for a folder.

        Raises:
            FileNotFoundError: if there is no index and ``create`` is False.
            ValueError: for an address that cannot be read, or as :meth:`load`.
            ImportError: without the library of the engine; names the extra.
            OSError: if a server cannot be reached.
        """
        index = cls._opened(address, model, create, mmap)
        index.precision = precision
        return index

    @classmethod
    def _opened(
        cls, address: str | Path, model: SentenceTransformer | str | None, create: bool, mmap: bool | None
    ) -> SemanticIndex:
        place = parse_address(address)
        if isinstance(place, MilvusAddress):
            return cls._open_milvus(str(address), model, create)
        if create and not is_index(place):
            if model is None:
                raise ValueError(f"there is no index at {place} yet: name the model that it is to be made with")
            index = cls.build(model, [])
            index.save(place)
            return index
        return cls.load(place, model, mmap)

    @overload
    def search(self, queries: str, k: int = 10, where: Filter | None = None) -> list[Hit]: ...  # type: ignore[overload-overlap]

    @overload
    def search(self, queries: Sequence[str], k: int = 10, where: Filter | None = None) -> list[list[Hit]]: ...

    def search(
        self, queries: str | Sequence[str], k: int = 10, where: Filter | None = None
    ) -> list[Hit] | list[list[Hit]]:
        """The nearest texts, best first.

        Args:
            queries: one query, or several; cut off where the model's input ends, however long.
            k: how many texts of each; all where there are fewer.
            where: which rows may be found, by metadata, see :data:`~st_kdmcse.search.base.Filter`.

        Returns:
            For one query a list, for several a list of lists.

        Raises:
            ValueError: for an empty query, k below 1, or a filter that is not one.
        """
        _check_k(k)
        single = isinstance(queries, str)
        wanted = [queries] if isinstance(queries, str) else list(queries)
        if not wanted:
            return []
        for row, query in enumerate(wanted):
            check_unicode(query, f"query {row}")
        # Queries are few, and in float32 they lose half as much of the recall as both in bfloat16.
        precision: Precision = "float32" if self.precision == "auto" else self.precision
        found = self.backend.search(encode_queries(self.model, wanted, precision), k, where)
        return found[0] if single else found

    def search_images(
        self, images: Sequence[TeacherImage], k: int = 10, where: Filter | None = None
    ) -> list[list[Hit]]:
        """The rows that are nearest to images, best first, whether they are texts or images.

        Args:
            images: PIL images, files, or encoded bytes.
            k: how many rows of each; all where there are fewer.
            where: which rows may be found.

        Raises:
            ValueError: if the model encodes no images, an image cannot be decoded (names it), or as :meth:`search`.
        """
        _check_k(k)
        if not self.takes_images:
            raise ValueError("the model of this index encodes no images, so nothing can be found by one")
        if not images:
            return []
        return self.backend.search(unit_rows(encode_images(self.model, images, False)), k, where)

    @property
    def takes_images(self) -> bool:
        """Whether rows can be found by images: the model encodes them too."""
        return bool(self.model.supports("image"))

    def add(
        self,
        texts: Iterable[str],
        ids: Iterable[str] | None = None,
        metadata: Iterable[Metadata] | None = None,
        show_progress_bar: bool | None = None,
    ) -> list[str]:
        """Add texts; all or none.

        Args:
            texts: n texts.
            ids: n new ids; None makes some.
            metadata: n mappings.
            show_progress_bar: None shows one in a terminal, after two seconds.

        Returns:
            The n ids.

        Raises:
            ValueError: as :meth:`build`; also if an id is there already.
        """
        self._check_rows_are_texts()
        texts = checked_texts(texts)
        new = [uuid.uuid4().hex for _ in texts] if ids is None else _ids(ids)
        if texts or new:
            self.backend.add(_texts_rows(self.model, texts, new, metadata, show_progress_bar, self.precision))
        return new

    def update(
        self,
        ids: Iterable[str],
        texts: Iterable[str],
        metadata: Iterable[Metadata] | None = None,
        show_progress_bar: bool | None = None,
    ) -> None:
        """Put texts, and metadata, in the place of others; all or none.

        Args:
            ids: n ids.
            texts: n texts.
            metadata: n mappings; None leaves none.
            show_progress_bar: None shows one in a terminal, after two seconds.

        Raises:
            UnknownIdError: (a ValueError and a KeyError) if an id is not there.
            ValueError: as :meth:`build`.
        """
        self._check_rows_are_texts()
        texts, known = checked_texts(texts), _ids(ids)
        if texts or known:
            _by_id(self.backend.get, known)
            rows = _texts_rows(self.model, texts, known, metadata, show_progress_bar, self.precision)
            _by_id(self.backend.replace, rows)

    def remove(self, ids: Iterable[str]) -> None:
        """Remove texts; all or none.

        Args:
            ids: of the texts.

        Raises:
            UnknownIdError: (a ValueError and a KeyError) if an id is not there.
        """
        _by_id(self.backend.remove, list(dict.fromkeys(_ids(ids))))

    def get(self, ids: Iterable[str]) -> list[Hit]:
        """Texts by id, with score 1.

        Args:
            ids: n ids.

        Raises:
            UnknownIdError: (a ValueError and a KeyError) if an id is not there.
        """
        return _by_id(self.backend.get, _ids(ids))

    def save(self, path: str | Path | None = None) -> Path | None:
        """Save the index, or its changes; killed at any moment, the old or the new one is there, whole.

        Args:
            path: folder; None is where it was loaded from, or saved to before. Another index is not overwritten.

        Returns:
            The folder; None for an engine that saves every change, where there is nothing to do.

        Raises:
            ValueError: if there is no path, another index at ``path``, or another process has changed this one since.
            OSError: if it cannot be written, such as to a full disk; what was written is removed again.
        """
        if not isinstance(self.backend, FaissBackend):
            if path is not None:
                raise ValueError(f"a {type(self.backend).__name__} keeps what is added, and cannot be saved to {path}")
            return None
        target = self._path if path is None else Path(path)
        if target is None:
            raise ValueError("the index was never saved: give the folder to save it to")
        same = self._path is not None and target.resolve() == self._path.resolve()
        if self.backend.mapped:
            if same:
                return target
            raise ValueError(f"the index is memory-mapped, and not written to {target}: copy its folder {self._path}")
        self._saved = write_index(target, self.backend, self._header, self._saved if same else None)
        self._path = target
        return target

    def reloaded(self) -> SemanticIndex:
        """This index, or the one that another process has saved or put in its folder since.

        One that was made with another model is loaded with that, if this one was loaded without naming a model.

        Raises:
            FileNotFoundError: if the folder has no index any more, or its model is missing.
            ValueError: if a file of it is damaged, or it was made with another model than the one that was named.
        """
        if self._path is None or read_manifest(self._path)["checksum"] == self._saved:
            return self
        backend, manifest = read_index(self._path, mmap=self._mmap)
        if not same_model(manifest, self._header):
            if not self._found_model:
                raise ValueError(f"the index {self._path} was made again, with another model: load it with that")
            other = self._known(backend, manifest, None, str(self._path), self._path)
            other.precision = self.precision
            return other
        other = copy.copy(self)
        other.backend, other._saved = backend, manifest["checksum"]
        other._header = {name: value for name, value in self._header.items() if name != "images"}
        if manifest.get("images") is not None:
            other._header["images"] = manifest["images"]
        return other

    def info(self) -> dict[str, Any]:
        """What it is, for people and JSON: the engine's description, the model, and the folder."""
        return {
            **self.backend.info(),
            "model": self._header["model"],
            "path": None if self._path is None else str(self._path),
            "rows_are": "images" if "images" in self._header else "texts",
        }

    @property
    def images(self) -> Path | None:
        """Folder of the image files, where the rows are images and it was named when they were indexed."""
        folder = self._header.get("images", {}).get("folder")
        return None if folder is None else Path(folder)

    def __len__(self) -> int:
        """Number of texts."""
        return len(self.backend)

    def _check_rows_are_texts(self) -> None:
        if "images" in self._header:
            raise ValueError(
                "this is an index of images, which texts cannot be put into: put new images into their folder, and "
                "index that again"
            )

    @classmethod
    def _from_rows(
        cls,
        model: SentenceTransformer,
        name: str | None,
        rows: NewRows,
        factory: str | None,
        recall_target: float,
        memory_limit: int | None,
        show_progress_bar: bool | None,
        embedded_in: str | None = None,
        tune_queries: npt.NDArray[np.float32] | None = None,
    ) -> SemanticIndex:
        if len(rows) and rows.embeddings.shape[1] != model.get_embedding_dimension():
            raise ValueError(
                f"embeddings of width {rows.embeddings.shape[1]}, but the model's are of width "
                f"{model.get_embedding_dimension()}: give the model that made them"
            )
        backend = FaissBackend.build(rows, factory, recall_target, memory_limit, show_progress_bar, tune_queries)
        return cls(backend, model, name, embedded_in=embedded_in)

    @classmethod
    def _known(
        cls,
        backend: SearchBackend,
        header: Mapping[str, Any],
        model: SentenceTransformer | str | None,
        place: str,
        path: Path | None = None,
    ) -> SemanticIndex:
        """An index whose header says what model it belongs to."""
        found_model = model is None
        model, name = load_expected(header, place) if model is None else load_named(model)
        check_model(model, header, place)
        index = cls(backend, model, header["model"]["name"] or name, header.get("images"), header.get("precision"))
        index._found_model = found_model
        if path is not None:
            index._path, index._saved = path, header["checksum"]
        return index

    @classmethod
    def _open_milvus(cls, address: str, model: SentenceTransformer | str | None, create: bool) -> SemanticIndex:
        loaded, name = (None, None) if model is None else load_named(model)
        dim = None if loaded is None else loaded.get_embedding_dimension()
        backend = cast("MilvusBackend", open_backend(address, dim, create))
        header = backend.identity
        if header is not None:
            check_whole(header, address)
            return cls._known(backend, header, loaded, address)
        if loaded is None:
            raise ValueError(f"{address} does not say which model it was made with: name it")
        index = cls(backend, loaded, name)
        backend.identity = index._header
        return index


def _check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ValueError(f"k is {k!r}, expected an integer of at least 1")


def checked_texts(texts: Iterable[str]) -> list[str]:
    """Texts as a list.

    Raises:
        ValueError: if one is empty, or they are one text; names the row.
    """
    if isinstance(texts, str):
        raise ValueError("texts is one text: give a list of them")
    listed = list(texts)
    for row, text in enumerate(listed):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"row {row}: the text is {text!r}, expected one that is not empty")
        check_unicode(text, f"row {row}: the text")
    return listed


def check_tune_queries(queries: Sequence[str] | None) -> None:
    """Raise a ValueError if there are no queries to tune on, or one is not a text."""
    if queries is None:
        return
    if isinstance(queries, str) or not queries:
        raise ValueError(f"`tune_queries` are {queries!r}: give a list of queries, some hundred or more")
    for row, query in enumerate(queries):
        check_unicode(query, f"`tune_queries`, row {row}")


def encoded_queries(model: SentenceTransformer, queries: Sequence[str] | None) -> npt.NDArray[np.float32] | None:
    """Embeddings of the distinct queries to tune on."""
    return None if queries is None else encode_queries(model, list(dict.fromkeys(queries)))


def _texts_rows(
    model: SentenceTransformer,
    texts: Sequence[str],
    ids: Sequence[str],
    metadata: Iterable[Metadata] | None,
    show_progress_bar: bool | None,
    precision: Precision,
) -> NewRows:
    """Rows with the embeddings of their texts; all else is checked before the texts are encoded."""
    listed = None if metadata is None else list(metadata)
    NewRows.checked(ids, texts, np.ones((len(texts), 1)), listed)
    if not texts:
        return NewRows([], [], np.zeros((0, model.get_embedding_dimension() or 0), dtype=np.float32), [])
    embeddings = encode_documents(model, texts, show_progress_bar=show_progress_bar, precision=precision)
    return NewRows.checked(ids, texts, embeddings, listed)


def _ids(ids: Iterable[str]) -> list[str]:
    if isinstance(ids, str):
        raise ValueError(f"ids is one text, {ids!r}: give a list of them")
    return list(ids)


def _new_ids(ids: Iterable[str] | None, texts: Sequence[str]) -> list[str]:
    return [str(row) for row in range(len(texts))] if ids is None else _ids(ids)


def _by_id(act: Callable[[_Given], _Result], given: _Given) -> _Result:
    """Do something that needs ids which are there."""
    try:
        return act(given)
    except KeyError as error:
        raise UnknownIdError(error.args[0]) from None
