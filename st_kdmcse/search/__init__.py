"""Semantic search: an index of texts that a sentence encoder finds by meaning."""

from st_kdmcse.search.base import Filter, Hit, Metadata, SearchBackend
from st_kdmcse.search.build import build_index
from st_kdmcse.search.copying import copy_index
from st_kdmcse.search.faiss_backend import FaissBackend
from st_kdmcse.search.images import index_images
from st_kdmcse.search.records import RecordFile, TextRecord
from st_kdmcse.search.semantic_index import SemanticIndex, UnknownIdError

__all__ = [
    "FaissBackend",
    "Filter",
    "Hit",
    "Metadata",
    "RecordFile",
    "SearchBackend",
    "SemanticIndex",
    "TextRecord",
    "UnknownIdError",
    "build_index",
    "copy_index",
    "index_images",
]
