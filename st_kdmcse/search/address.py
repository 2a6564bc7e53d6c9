"""Where an index is: a directory, a file of milvus-lite, or a collection on a Milvus server."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, quote, unquote, urlsplit

if TYPE_CHECKING:
    from st_kdmcse.search.base import SearchBackend

TOKEN_VARIABLE = "MILVUS_TOKEN"
"""Environment variable with the token of a Milvus server, or "user:password": an address is printed, a token is not."""

_DEFAULT_PORT = 19530
_FORMS = (
    "milvus://HOST[:19530]/COLLECTION, milvus+https://HOST[:PORT]/COLLECTION, "
    "milvus:///path/to/file.db?collection=NAME or a directory"
)


@dataclass(frozen=True)
class MilvusAddress:
    """A collection of Milvus.

    Attributes:
        uri: of a server, such as "http://localhost:19530", or the path of a file of milvus-lite.
        collection: its name.
    """

    uri: str
    collection: str

    def __str__(self) -> str:
        """The address that :func:`parse_address` reads this from."""
        if "://" not in self.uri:
            return f"milvus:{'//' if self.uri.startswith('/') else ''}{quote(self.uri)}?collection={self.collection}"
        scheme, place = self.uri.split("://")
        return f"{'milvus' if scheme == 'http' else 'milvus+https'}://{place}/{self.collection}"


def parse_address(address: str | Path) -> Path | MilvusAddress:
    """Read an address.

    >>> parse_address("indexes/wiki")
    PosixPath('indexes/wiki')
    >>> parse_address("milvus://search.example.org/wiki")
    MilvusAddress(uri='http://search.example.org:19530', collection='wiki')
    >>> parse_address("milvus:///data/index.db?collection=wiki")
    MilvusAddress(uri='/data/index.db', collection='wiki')

    Args:
        address: a directory; ``milvus://HOST[:19530]/COLLECTION`` or ``milvus+https://HOST[:PORT]/COLLECTION`` (443
            unless given); ``milvus:///path/to/file.db?collection=NAME`` or, relative to the working directory,
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
    if unknown := [name for name in options if name != "collection"]:
        raise ValueError(f"{text}: unknown option {unknown[0]!r}: there is only collection")
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
        return MilvusBackend(place.uri, place.collection, dim=dim, create=create, token=token)
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
    if options or not collection or "/" in collection:
        raise ValueError(f"{text}: expected one collection after the host: milvus://HOST[:{_DEFAULT_PORT}]/COLLECTION")
    try:
        port = parts.port
    except ValueError as error:
        raise ValueError(f"{text}: the port is not a number of 0 to 65535") from error
    if not parts.hostname:
        raise ValueError(f"{text}: there is no host: expected {_FORMS}")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    secure = scheme == "milvus+https"
    return MilvusAddress(
        f"http{'s' if secure else ''}://{host}:{port or (443 if secure else _DEFAULT_PORT)}", collection
    )


def _file(text: str, scheme: str, path: str, options: dict[str, list[str]]) -> MilvusAddress:
    if scheme != "milvus" or not path.endswith(".db"):
        raise ValueError(f"{text}: there is neither a host nor a file that ends in .db: expected {_FORMS}")
    names = options.get("collection", [])
    if len(names) != 1 or not names[0]:
        raise ValueError(f"{text}: which collection? expected milvus://{path}?collection=NAME")
    return MilvusAddress(path, names[0])
