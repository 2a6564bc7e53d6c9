"""Where an index is: a directory, a file of milvus-lite, or a collection on a Milvus server."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

if TYPE_CHECKING:
    from st_kdmcse.search.base import SearchBackend

TOKEN_VARIABLE = "MILVUS_TOKEN"
"""Environment variable with the token of a Milvus server, or "user:password": an address is printed, a token is not."""

_DEFAULT_PORT = 19530
_PLAIN = ("index", "consistency")
_PREFIXED = {"index.": "index_parameters", "search.": "search_parameters"}
_FORMS = (
    "milvus://HOST[:19530]/COLLECTION, milvus+https://HOST[:PORT]/COLLECTION, "
    "milvus:///path/to/file.db?collection=NAME or a directory"
)
CONSISTENCY = ("Strong", "Session", "Bounded", "Eventually")
"""Whether a search waits for all that was added (Strong), for what this client added, or for less."""

Parameters = tuple[tuple[str, "str | int | float"], ...]


@dataclass(frozen=True)
class MilvusOptions:
    """What a Milvus server is told of a collection.

    Attributes:
        index: type of the index of a new collection, such as HNSW or IVF_FLAT.
        index_parameters: of a new collection, by name, such as M and efConstruction.
        search_parameters: by name, such as ef or nprobe.
        consistency: of searches, one of :data:`CONSISTENCY`. Ids are looked up as they are, whatever it says.

    Raises:
        ValueError: for another consistency.
    """

    index: str = "AUTOINDEX"
    index_parameters: Parameters = ()
    search_parameters: Parameters = ()
    consistency: str = "Strong"

    def __post_init__(self) -> None:
        if self.consistency not in CONSISTENCY:
            raise ValueError(f"consistency is {self.consistency!r}, expected one of {', '.join(CONSISTENCY)}")


@dataclass(frozen=True)
class MilvusAddress:
    """A collection of Milvus.

    Attributes:
        uri: of a server, such as "http://localhost:19530", or the path of a file of milvus-lite.
        collection: its name.
        options: of a server.
    """

    uri: str
    collection: str
    options: MilvusOptions = MilvusOptions()

    def __str__(self) -> str:
        """The address that :func:`parse_address` reads this from."""
        if "://" not in self.uri:
            return f"milvus:{'//' if self.uri.startswith('/') else ''}{quote(self.uri)}?collection={self.collection}"
        scheme, place = self.uri.split("://")
        given = [(name, getattr(self.options, name)) for name in _PLAIN]
        written = [(name, value) for name, value in given if value != getattr(MilvusOptions(), name)]
        for prefix, name in _PREFIXED.items():
            written += [(prefix + parameter, value) for parameter, value in getattr(self.options, name)]
        query = f"?{urlencode(written)}" if written else ""
        return f"{'milvus' if scheme == 'http' else 'milvus+https'}://{place}/{self.collection}{query}"


def parse_address(address: str | Path) -> Path | MilvusAddress:
    """Read an address.

    >>> parse_address("indexes/wiki")
    PosixPath('indexes/wiki')
    >>> parse_address("milvus://search.example.org/wiki").uri
    'http://search.example.org:19530'
    >>> parse_address("milvus:///data/index.db?collection=wiki").uri
    '/data/index.db'
    >>> parse_address("milvus://db/wiki?index=HNSW&index.M=16&search.ef=64&consistency=Bounded").options
    MilvusOptions(index='HNSW', index_parameters=(('M', 16),), search_parameters=(('ef', 64),), consistency='Bounded')

    Args:
        address: a directory; ``milvus://HOST[:19530]/COLLECTION`` or ``milvus+https://HOST[:PORT]/COLLECTION`` (443
            unless given), with options of :class:`MilvusOptions` as ``?index=TYPE&index.NAME=VALUE&search.NAME=VALUE&
            consistency=LEVEL``; ``milvus:///path/to/file.db?collection=NAME`` or, relative to the working directory,
            ``milvus:file.db?collection=NAME``. Special characters of a path are percent-encoded.

    Raises:
        ValueError: for anything else; says what is missing.
    """
    text = str(address)
    scheme, separator, _ = text.partition(":")
    if scheme not in ("milvus", "milvus+https"):
        if "://" in text:
            raise ValueError(f"{scheme}:// is not an address of an index: expected {_FORMS}")
        if not text:
            raise ValueError(f"an address must not be empty: expected {_FORMS}")
        return Path(address)
    if not separator:
        return Path(address)  # a directory called milvus
    parts = urlsplit(text)
    if "@" in parts.netloc:
        raise ValueError(
            f"an address has no user and password, since it is printed: set {TOKEN_VARIABLE} to USER:PASSWORD instead"
        )
    if parts.fragment:
        raise ValueError(f"{text}: a # in a path is written %23")
    options = parse_qs(parts.query, keep_blank_values=True)
    if parts.netloc:
        return _server(text, scheme, options)
    return _file(text, scheme, unquote(parts.path), options)


def open_backend(address: str | Path, dim: int | None = None, create: bool = False) -> SearchBackend:
    """Open the index at an address.

    A Milvus server is logged in to with the token in the environment variable MILVUS_TOKEN, if there is one.

    Args:
        address: as in :func:`parse_address`.
        dim: width of the embeddings, needed to make the index; compared with that of an index that exists.
        create: make the index if there is none yet; that of a directory is in memory until it is saved.

    Raises:
        ValueError: for an address that cannot be read, or an index of another width.
        FileNotFoundError: if there is no index and ``create`` is False.
        ImportError: without the library of the engine; names the extra.
        OSError: if a server cannot be reached or a file cannot be read.
    """
    place = parse_address(address)
    if isinstance(place, MilvusAddress):
        from st_kdmcse.search.milvus_backend import MilvusBackend

        token = os.environ.get(TOKEN_VARIABLE)
        return MilvusBackend(place.uri, place.collection, dim=dim, create=create, token=token, options=place.options)
    from st_kdmcse.search.faiss_backend import FaissBackend
    from st_kdmcse.search.storage import is_index, read_index

    if create and not is_index(place):
        if dim is None:
            raise ValueError("an index needs the width of its embeddings to be made, got dim=None")
        return FaissBackend.empty(dim)
    backend, _ = read_index(place)
    if dim is not None and dim != backend.dim:
        raise ValueError(f"the index {place} has embeddings of width {backend.dim}, not {dim}")
    return backend


def _server(text: str, scheme: str, options: dict[str, list[str]]) -> MilvusAddress:
    parts = urlsplit(text)
    collection = parts.path.strip("/")
    if parts.netloc.endswith(".db") or parts.path.endswith(".db"):
        raise ValueError(f"{text}: a file is written milvus:///path/to/file.db?collection=NAME, with three slashes")
    if "collection" in options or not collection or "/" in collection:
        raise ValueError(f"{text}: expected one collection after the host: milvus://HOST[:{_DEFAULT_PORT}]/COLLECTION")
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{text}: the port is not a number of 0 to 65535") from error
    if not parts.hostname:
        raise ValueError(f"{text}: there is no host: expected {_FORMS}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    secure = scheme == "milvus+https"
    uri = f"http{'s' if secure else ''}://{host}:{port or (443 if secure else _DEFAULT_PORT)}"
    return MilvusAddress(uri, collection, _server_options(text, options))


def _server_options(text: str, options: dict[str, list[str]]) -> MilvusOptions:
    plain: dict[str, str] = {}
    parameters: dict[str, list[tuple[str, str | int | float]]] = {name: [] for name in _PREFIXED.values()}
    for name, values in options.items():
        if len(values) != 1 or not values[0]:
            raise ValueError(f"{text}: the option {name} takes one value")
        prefix, dot, parameter = name.partition(".")
        if name in _PLAIN:
            plain[name] = values[0]
        elif parameter and prefix + dot in _PREFIXED:
            parameters[_PREFIXED[prefix + dot]].append((parameter, _number(values[0])))
        else:
            raise ValueError(
                f"{text}: unknown option {name!r}: there are index=TYPE, index.NAME=VALUE, search.NAME=VALUE and "
                "consistency=LEVEL"
            )
    try:
        return MilvusOptions(**plain, **{name: tuple(each) for name, each in parameters.items()})  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from error


def _number(text: str) -> str | int | float:
    for number in (int, float):
        with suppress(ValueError):
            return number(text)
    return text


def _file(text: str, scheme: str, path: str, options: dict[str, list[str]]) -> MilvusAddress:
    if scheme != "milvus" or not path.endswith(".db"):
        raise ValueError(f"{text}: there is neither a host nor a file that ends in .db: expected {_FORMS}")
    if unknown := [name for name in options if name != "collection"]:
        raise ValueError(f"{text}: unknown option {unknown[0]!r}: there is only collection; the others are of a server")
    names = options.get("collection", [])
    if len(names) != 1 or not names[0]:
        raise ValueError(f"{text}: which collection? expected milvus://{path}?collection=NAME")
    return MilvusAddress(path, names[0])
