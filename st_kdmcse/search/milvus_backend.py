"""Rows in Milvus: milvus-lite, a folder on this machine, or a server of many machines.

One module, because all of it is one backend: the same operations as the FAISS backend, in the words of one client.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from st_kdmcse.search.address import MilvusOptions
from st_kdmcse.search.base import MAX_ID_LENGTH, Filter, Hit, Matrix, Metadata, NewRows, conditions

MAX_TEXT_BYTES = 65_535
"""Of a text in UTF-8: the limit of Milvus for a VARCHAR."""
MAX_METADATA_BYTES = 65_536
"""Of a row's metadata as JSON: the limit of Milvus."""
MAX_K = 16_384
"""Rows that one search of Milvus returns, over all its queries."""

_IDENTITY = "st_kdmcse.identity"
_IDS_AT_A_TIME = 1000
_ROWS_AT_A_TIME = 500
_BYTES_AT_A_TIME = 16 * 2**20  # a server refuses messages above 64 MB
_UNFLUSHED_ROWS = 500  # milvus-lite takes 0.1 ms a search for each of them, and hardly anything for the others
_STRONG = {"consistency_level": "Strong"}  # what was added is found
_NEVER = 2**31 - 1
_NOTHING = 'id == ""'  # no row has an empty id
_OPERATORS = {"eq": "==", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}
_DEFAULTS = MilvusOptions()
_SMALLEST = {"text": '""', "number": "-1.7976931348623157e+308"}
_ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"})


class MilvusBackend:
    """A collection of Milvus as a :class:`~st_kdmcse.search.base.SearchBackend`.

    Everything that is added is in the collection when the call returns, and is found from then on: there is nothing to
    save. milvus-lite compares with every row (FLAT), a server chooses its index (AUTOINDEX) unless told.

    A collection has the fields ``id``, ``embedding``, ``text`` and ``metadata``. Metadata are grouped by type,
    ``{"text": {"lang": "en"}, "number": {"year": 1999}, "truth": {"seen": true}, "none": ["source"]}``, so that
    comparisons never mix types, whatever the version of Milvus makes of that. Names are percent-encoded but for letters
    and digits of ASCII, ``_``, ``-`` and ``.``.

    Args:
        uri: file of milvus-lite, ending in .db, or the URI of a server, such as "http://localhost:19530".
        collection: its name: letters, digits and _, at most 255, no digit first.
        dim: width of the embeddings, needed to make a collection.
        create: make the collection, and the folders of the file, if there is none yet.
        token: of a server: a key, or "user:password".
        options: of a server: index, parameters and consistency.

    Raises:
        ImportError: without pymilvus; names the extra.
        FileNotFoundError: if there is no such collection and ``create`` is False.
        ValueError: for an unusable name, a collection of other fields, another width or another index, or no ``dim`` to
            create with.
        OSError: if the server cannot be reached, or the file is locked by another process.
    """

    def __init__(
        self,
        uri: str,
        collection: str,
        *,
        dim: int | None = None,
        create: bool = False,
        token: str | None = None,
        options: MilvusOptions = _DEFAULTS,
    ) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,254}", collection):
            raise ValueError(
                f"{collection!r} cannot name a collection: use letters, digits and _, at most 255, no digit first"
            )
        self._uri = uri
        self._collection = collection
        self._options = options
        self._file = None if "://" in uri else Path(uri)
        self._client = self._connect(create, token)
        with self._errors():
            if not self._client.has_collection(collection):
                if not create:
                    raise FileNotFoundError(f"there is no collection {collection} in {uri}")
                if dim is None or dim < 1:
                    raise ValueError(f"a collection needs the width of its embeddings to be made, got dim={dim}")
                self._create(dim)
            self._check_index()
            self._client.load_collection(collection)
            self._dim = self._read_dim()
            self._unflushed = 0
            self._flush(_UNFLUSHED_ROWS)  # those that a killed process left
        if dim is not None and dim != self._dim:
            raise ValueError(f"collection {collection} in {uri} has embeddings of width {self._dim}, not {dim}")

    @property
    def dim(self) -> int:
        """Width of the embeddings."""
        return self._dim

    @property
    def identity(self) -> dict[str, Any] | None:
        """What the collection says about the model that made its embeddings; None if it says nothing.

        It is kept with the collection, so that whoever opens it can refuse another model. Can be set, to what JSON can
        hold.
        """
        with self._errors():
            properties = self._client.describe_collection(self._collection).get("properties") or {}
        return json.loads(properties[_IDENTITY]) if _IDENTITY in properties else None

    @identity.setter
    def identity(self, identity: Mapping[str, Any]) -> None:
        content = json.dumps(dict(identity), allow_nan=False)
        with self._errors():
            self._client.alter_collection_properties(self._collection, properties={_IDENTITY: content})

    def __len__(self) -> int:
        """Number of rows."""
        with self._errors():
            counted = self._client.query(self._collection, filter="", output_fields=["count(*)"], **_STRONG)
        return int(counted[0]["count(*)"])

    def add(self, rows: NewRows) -> None:
        """Store new rows; all or none: after an error, or Ctrl-C, those that were stored already are removed again.

        A server that goes down during the call may have some of them; what was added before is not lost.

        Args:
            rows: n rows of this width.

        Raises:
            ValueError: if an id is there already, the width does not fit, or a text, metadata or an integer is larger
                than Milvus holds; names the id.
            OSError: if the server fails.
        """
        batches = self._batches(rows)
        if there := self.known(rows.ids):
            first = next(key for key in rows.ids if key in there)
            raise ValueError(f"the id {first!r} is there already: ids name one row each; update it, or remove it first")
        try:
            self._upsert(batches)
        except BaseException:
            with suppress(OSError):
                self._delete(rows.ids)
            raise

    def replace(self, rows: NewRows) -> None:
        """Store rows in the place of those with the same ids.

        A server that fails during the call leaves the rows of some messages, of 16 MiB each, replaced: repeat the call.

        Args:
            rows: n rows of this width.

        Raises:
            KeyError: if an id is not there; names it, and nothing is changed.
            ValueError: as in :meth:`add`; nothing is changed.
            OSError: if the server fails.
        """
        batches = self._batches(rows)
        self._require(rows.ids)
        self._upsert(batches)

    def remove(self, ids: Sequence[str]) -> None:
        """Remove rows.

        Raises:
            KeyError: if an id is not there; names it, and nothing is changed.
            OSError: if the server fails.
        """
        self._require(ids)
        self._delete(ids)

    def get(self, ids: Sequence[str]) -> list[Hit]:
        """Rows by id, in the order of the ids, with score 1.

        Raises:
            KeyError: if an id is not there; names it.
            OSError: if the server fails.
        """
        found = {row["id"]: row for row in self._query(ids, ["id", "text", "metadata"])}
        _require_all(ids, found)
        return [Hit(key, found[key]["text"], 1.0, _ungrouped(found[key]["metadata"])) for key in ids]

    def known(self, ids: Sequence[str]) -> set[str]:
        """Those ids that are there.

        Raises:
            OSError: if the server fails.
        """
        return {row["id"] for row in self._query(ids, ["id"])}

    def all_rows(self, after: str = "") -> Iterator[NewRows]:
        """All rows with their embeddings, some at a time, ordered by the code points of their ids.

        Args:
            after: only those whose ids come after this one.

        Raises:
            OSError: if the server fails.
        """
        with self._errors():
            pages = self._client.query_iterator(
                self._collection,
                batch_size=_ROWS_AT_A_TIME,
                filter=f"id > {_literal('id', after)}",
                output_fields=["id", "text", "metadata", "embedding"],
                **_STRONG,
            )
        try:
            while True:
                with self._errors():
                    page = pages.next()
                if not page:
                    return
                embeddings = np.array([row["embedding"] for row in page], dtype=np.float32)
                metadata = [_ungrouped(row["metadata"]) for row in page]
                yield NewRows([row["id"] for row in page], [row["text"] for row in page], embeddings, metadata)
        finally:
            pages.close()

    def search(self, queries: Matrix, k: int, where: Filter | None = None) -> list[list[Hit]]:
        """The k nearest rows of each query, best first; fewer where there are fewer.

        Args:
            queries: (n, dim) float32 of length 1.
            k: at least 1, and at most 16,384 or the number of rows.
            where: which rows may be returned.

        Returns:
            n lists of hits.

        Raises:
            ValueError: for queries of another width, k out of range, or a filter that cannot be read.
            OSError: if the server fails.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"the queries have shape {queries.shape}; the index is of width {self.dim}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        if k > MAX_K and (k := max(1, min(k, len(self)))) > MAX_K:
            raise ValueError(f"Milvus returns at most {MAX_K:,} rows a query; {k:,} were asked for")
        allowed = expression(where) if where else ""
        hits: list[list[Hit]] = []
        step = max(1, MAX_K // k)
        for start in range(0, len(queries), step):
            with self._errors():
                found = self._client.search(
                    self._collection,
                    data=np.asarray(queries[start : start + step], dtype=np.float32).tolist(),
                    anns_field="embedding",
                    limit=k,
                    filter=allowed,
                    output_fields=["text", "metadata"],
                    search_params={"metric_type": "COSINE", "params": dict(self._options.search_parameters)},
                    consistency_level=self._options.consistency,
                )
            hits += [[_hit(row) for row in rows] for rows in found]
        return hits

    def info(self) -> dict[str, Any]:
        """What it is: engine, uri, collection, index, rows, dim, bytes on disk (None of a server).

        Of a server also the parameters of index and search, and the consistency of searches.
        """
        with self._errors():
            index = self._client.describe_index(self._collection, "embedding")
        options = {
            "index_parameters": {name: index[name] for name, _ in self._options.index_parameters if name in index},
            "search_parameters": dict(self._options.search_parameters),
            "consistency": self._options.consistency,
        }
        return {
            "engine": "milvus" if self._file is None else "milvus-lite",
            "uri": self._uri,
            "collection": self._collection,
            "index": index["index_type"],
            "rows": len(self),
            "dim": self.dim,
            "bytes": None if self._file is None else _bytes_below(self._file),
            **(options if self._file is None else {}),
        }

    def close(self) -> None:
        """End the connection. milvus-lite keeps its file locked until the process ends."""
        self._client.close()

    def _connect(self, create: bool, token: str | None) -> Any:
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise ImportError('Milvus needs pymilvus: pip install "st-kdmcse[milvus]"') from error
        noisy = ["pymilvus", "pymilvus.milvus_client"]  # they log, with a traceback, what they raise anyway
        if self._file is not None:
            noisy += ["milvus_lite", "grpc._server"]  # the server is in this process, and lacks what is optional
            _prepare_file(self._file, create)
        for name in noisy:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with self._errors():
            # The server of milvus-lite, in this process, ends connections on which it is pinged.
            options = {} if self._file is None else {"grpc_options": {"grpc.keepalive_time_ms": _NEVER}}
            return MilvusClient(self._uri, token=token or "", **options)

    def _create(self, dim: int) -> None:
        from pymilvus import DataType
        from pymilvus.exceptions import MilvusException

        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False)
        schema.add_field("id", DataType.VARCHAR, is_primary=True, max_length=4 * MAX_ID_LENGTH)  # bytes of UTF-8
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=dim)
        schema.add_field("text", DataType.VARCHAR, max_length=MAX_TEXT_BYTES)
        schema.add_field("metadata", DataType.JSON)
        index = self._client.prepare_index_params()
        chosen, parameters = "FLAT", {}
        if self._file is None:
            chosen, parameters = self._options.index, dict(self._options.index_parameters)
        index.add_index("embedding", index_type=chosen, metric_type="COSINE", params=parameters)
        try:
            self._client.create_collection(self._collection, schema=schema, index_params=index, **_STRONG)
        except BaseException:  # such as parameters that the index does not have
            with suppress(MilvusException):
                self._client.drop_collection(self._collection)
            raise

    def _check_index(self) -> None:
        """Refuse a collection that has another index than the one asked for."""
        if self._options.index == _DEFAULTS.index and not self._options.index_parameters:
            return
        index = self._client.describe_index(self._collection, "embedding")
        there = {"index": index["index_type"], **{name: index.get(name) for name, _ in self._options.index_parameters}}
        wanted = {"index": self._options.index, **dict(self._options.index_parameters)}
        for name, value in wanted.items():
            if str(there[name]) != str(value):
                raise ValueError(
                    f"collection {self._collection} in {self._uri} has {name}={there[name]}, not {value}: an index is "
                    "chosen when its collection is made; copy it into another one with st-kdmcse index copy"
                )

    def _read_dim(self) -> int:
        fields = {field["name"]: field for field in self._client.describe_collection(self._collection)["fields"]}
        if set(fields) != {"id", "embedding", "text", "metadata"} or "dim" not in fields["embedding"]["params"]:
            raise ValueError(
                f"collection {self._collection} in {self._uri} is not of this package: it has the fields "
                f"{', '.join(fields)} instead of id, embedding, text and metadata"
            )
        return int(fields["embedding"]["params"]["dim"])

    def _batches(self, rows: NewRows) -> list[list[dict[str, Any]]]:
        """The rows as Milvus takes them, in messages of bounded size; raises what is wrong with them."""
        if rows.embeddings.shape[1:] != (self.dim,):
            raise ValueError(f"the embeddings have shape {rows.embeddings.shape}; the index is of width {self.dim}")
        batches: list[list[dict[str, Any]]] = [[]]
        size = 0
        for key, text, embedding, metadata in zip(rows.ids, rows.texts, rows.embeddings, rows.metadata, strict=True):
            grouped = _grouped(metadata, key)
            needed = len(key) * 4 + self.dim * 4 + _text_bytes(text, key) + _json_bytes(grouped, key)
            if batches[-1] and size + needed > _BYTES_AT_A_TIME:
                batches.append([])
                size = 0
            size += needed
            batches[-1].append({"id": key, "embedding": embedding, "text": text, "metadata": grouped})
        return batches if batches[0] else []

    def _upsert(self, batches: list[list[dict[str, Any]]]) -> None:
        for batch in batches:  # not insert, which would store an id twice if another process adds it in the same moment
            with self._errors():
                self._client.upsert(self._collection, batch)
                self._flush(len(batch))

    def _delete(self, ids: Sequence[str]) -> None:
        for wanted in _id_expressions(ids):
            with self._errors():
                self._client.delete(self._collection, filter=wanted)

    def _flush(self, rows: int) -> None:
        """Have milvus-lite index its rows, now and then; a server decides that alone."""
        self._unflushed += rows
        if self._file is not None and self._unflushed >= _UNFLUSHED_ROWS:
            self._client.flush(self._collection)
            self._unflushed = 0

    def _query(self, ids: Sequence[str], fields: list[str]) -> Iterator[dict[str, Any]]:
        for wanted in _id_expressions(ids):
            with self._errors():
                yield from self._client.query(self._collection, filter=wanted, output_fields=fields, **_STRONG)

    def _require(self, ids: Sequence[str]) -> None:
        _require_all(ids, self.known(ids))

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from pymilvus.exceptions import ConnectionConfigException, MilvusException

        try:
            yield
        except ConnectionConfigException as error:
            if self._file is None:
                raise ValueError(f"{self._uri} is not the URI of a Milvus server: {error.message}") from error
            raise OSError(
                f"{self._file} cannot be opened: another process has it open, milvus-lite is not installed "
                '(pip install "st-kdmcse[milvus]"), or it is not a database of milvus-lite 3'
            ) from error
        except MilvusException as error:
            raise OSError(f"Milvus at {self._uri}: {error.message}") from error


def expression(where: Filter) -> str:
    """A filter as a boolean expression of Milvus over the field ``metadata``.

    It has neither ``!=`` nor ``exists``, of which versions of Milvus differ on rows without the name.

    Raises:
        ValueError: for an unknown comparison, or a value that is not plain or an integer of more than 64 bits.
    """
    return " and ".join(f"({_condition(*condition)})" for condition in conditions(where)) or 'id != ""'


def _condition(name: str, comparison: str, value: Any) -> str:
    if comparison == "in":
        return _any([_condition(name, "eq", each) for each in value])
    kind, path, literal = _kind(value), _path(_kind(value), name), _literal(name, value)
    if comparison != "ne":
        return f"{path} {_OPERATORS[comparison]} {literal}"
    other_types = [_present(other, name) for other in ("text", "number", "truth") if other != kind]
    if isinstance(value, bool):
        return _any([f"{path} == {_literal(name, not value)}", *other_types])
    return _any([f"{path} < {literal}", f"{path} > {literal}", *other_types])


def _present(kind: str, name: str) -> str:
    path = _path(kind, name)
    if kind == "truth":
        return f"({path} == true or {path} == false)"
    return f"{path} >= {_SMALLEST[kind]}"


def _any(expressions: list[str]) -> str:
    """Or, as a balanced tree: parsers limit the depth of an expression."""
    if len(expressions) <= 1:
        return expressions[0] if expressions else _NOTHING
    middle = len(expressions) // 2
    return f"({_any(expressions[:middle])} or {_any(expressions[middle:])})"


def _kind(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "truth"
    return "text" if isinstance(value, str) else "number"


def _path(kind: str, name: str) -> str:
    return f'metadata["{kind}"]["{_encoded(name)}"]'


def _literal(what: str, value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return f'"{value.translate(_ESCAPES)}"'
    if isinstance(value, float):
        return repr(float(value))
    _check_integer(f"filter on {what!r}", value)
    return str(int(value))


def _encoded(name: str) -> str:
    return quote(name, safe="").replace("~", "%7E")


def _check_integer(what: str, value: int) -> None:
    if not -(2**63) < value < 2**63:
        raise ValueError(f"{what}: {value} has more than the 64 bits that Milvus holds; use a float")


def _grouped(metadata: Metadata, key: str) -> dict[str, Any]:
    groups: dict[str, Any] = {}
    for name, value in metadata.items():
        if value is None:
            groups.setdefault("none", []).append(name)
            continue
        if isinstance(value, int):
            _check_integer(f"id {key!r}: metadata {name!r}", value)
        groups.setdefault(_kind(value), {})[_encoded(name)] = value
    return groups


def _ungrouped(groups: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = dict.fromkeys(groups.get("none", []))
    for kind in ("text", "number", "truth"):
        found |= {unquote(name): value for name, value in groups.get(kind, {}).items()}
    return found


def _text_bytes(text: str, key: str) -> int:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"id {key!r}: the text is not valid Unicode: {error}") from error
    if size > MAX_TEXT_BYTES:
        raise ValueError(
            f"id {key!r}: the text has {size:,} bytes in UTF-8, and Milvus holds {MAX_TEXT_BYTES:,}: shorten it, or "
            "split it into several rows"
        )
    return size


def _json_bytes(grouped: Mapping[str, Any], key: str) -> int:
    size = len(json.dumps(grouped, ensure_ascii=False).encode())
    if size > MAX_METADATA_BYTES:
        raise ValueError(
            f"id {key!r}: the metadata have {size:,} bytes as JSON, and Milvus holds {MAX_METADATA_BYTES:,}"
        )
    return size


def _hit(row: Mapping[str, Any]) -> Hit:
    score = min(1.0, max(-1.0, float(row["distance"])))
    return Hit(row["id"], row["entity"]["text"], score, _ungrouped(row["entity"]["metadata"]))


def _id_expressions(ids: Sequence[str]) -> Iterator[str]:
    for start in range(0, len(ids), _IDS_AT_A_TIME):
        yield f"id in [{', '.join(_literal('id', key) for key in ids[start : start + _IDS_AT_A_TIME])}]"


def _require_all(ids: Sequence[str], there: Mapping[str, Any] | set[str]) -> None:
    for key in ids:
        if key not in there:
            raise KeyError(f"there is no row with the id {key!r}")


def _prepare_file(file: Path, create: bool) -> None:
    if file.suffix != ".db":
        raise ValueError(f"a file of milvus-lite ends in .db, got {file}")
    if create:
        file.parent.mkdir(parents=True, exist_ok=True)
    elif not file.exists():
        raise FileNotFoundError(f"there is no file {file}")


def _bytes_below(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # milvus-lite merges its files now and then
            size += path.stat().st_size if path.is_file() else 0
    return size
