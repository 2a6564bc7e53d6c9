"""A web page that searches an index, and the JSON behind it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import ipaddress
import logging
import math
import os
import re
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

from st_kdmcse.data.images import ImageError, load_image
from st_kdmcse.search.base import Filter, Hit
from st_kdmcse.search.filters import parse_filter
from st_kdmcse.search.semantic_index import SemanticIndex, UnknownIdError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

logger = logging.getLogger(__name__)

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""Names of this machine for itself."""

THUMBNAIL_SIZE = 320
"""Pixels of the longer side of a thumbnail, at most."""

_NEEDED = 'the search page needs FastAPI, uvicorn and Pillow: pip install "st-kdmcse[serve]"'
_MOST = {"query_characters": 5_000, "results": 1_000, "requests_per_minute": 1_000_000, "waiting": 1_000}
_FILTERS = 10
_THUMBNAILS_KEPT = 512
_IMAGE_BYTES = 64 << 20
_CLIENTS = 10_000
_GRACE = 3
_HEAD_BYTES = 1 << 20  # of a request, so that a query that is far too long is told so
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Limits:
    """What one user may ask for, so that all are served.

    Attributes:
        query_characters: of a query, and of a condition of its filter; 1 to 5,000, which fit into a URL.
        results: of a search; 1 to 1,000.
        requests_per_minute: searches of a client's address, as many at once; 1 to 1,000,000. Of thumbnails it may ask
            for one a result.
        waiting: searches that may wait for the one that runs; 0 to 1,000.

    Raises:
        ValueError: if one is out of its range; names it.
    """

    query_characters: int = 1_000
    results: int = 100
    requests_per_minute: int = 120
    waiting: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least, most = getattr(self, field.name), int(field.name != "waiting"), _MOST[field.name]
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{field.name} is {value!r}, expected an integer of {least} to {most:,}")


def create_app(
    index: SemanticIndex,
    *,
    images: Path | None = None,
    image_column: str = "image",
    limits: Limits = Limits(),
    hosts: Iterable[str] | None = None,
) -> FastAPI:
    """An application that searches an index: a page with a search box, and the JSON behind it.

    - ``GET /``: the page;

    - ``GET /api/search?q=a+dog&k=10&filter=year>=2000``: the results, see below; ``filter`` any number of times, see
      :func:`~st_kdmcse.search.filters.parse_filter`;
    - ``GET /api/info``: rows, model, engine, index type, limits, and whether there are images;
    - ``GET /thumbnail?id=ID``: a JPEG of the image of a row.

    A search gives ``query``, ``k``, ``seconds`` and ``results``, of which each has ``rank``, ``score`` (cosine),
    ``id``, ``text``, ``metadata`` and ``thumbnail`` (a URL or null). Errors are ``{"error": "..."}`` with a status of
    4xx, or 503 when too many searches wait; searches take turns. Queries are not logged.

    Args:
        index: to be searched.
        images: folder of image files, the only one that thumbnails are made from; None is that of the index, if any.
        image_column: metadata with the path of a row's image in that folder.
        limits: of what is asked for.
        hosts: that the Host header may name, without a port; None for any. On this machine alone, only its own names
            keep out the pages of other sites whose name is made to point here: :data:`LOCAL_HOSTS`.

    Raises:
        ImportError: without FastAPI; names the extra.
        FileNotFoundError: if there is no folder ``images``.
    """
    try:
        from fastapi import FastAPI, Header, HTTPException, Query
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import HTMLResponse, JSONResponse, Response
        from starlette.exceptions import HTTPException as AnyHTTPException
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    headers = _headers(page)
    names = None if hosts is None else {host.lower() for host in hosts}
    gallery = _gallery(index, images, image_column)
    description = _description(index, limits, gallery)
    search_turns = _Turns(limits.waiting)
    other_turns = _Turns((limits.waiting + 1) * limits.results)
    search_rate = RateLimit(limits.requests_per_minute)
    other_rate = RateLimit(limits.requests_per_minute * limits.results)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)

    @app.get("/")
    async def show_page() -> Any:
        return HTMLResponse(page)

    @app.get("/api/info")
    async def info() -> Any:
        return {"rows": await other_turns.take(lambda: len(index)), **description}

    @app.get("/api/search")
    async def search(
        q: str = "",
        k: int = min(10, limits.results),
        conditions: list[str] = Query([], alias="filter"),  # noqa: B008 - how FastAPI is told
    ) -> Any:
        try:
            where = _checked(q, k, conditions, limits)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        seconds, hits = await search_turns.take(lambda: _timed_search(index, q, k, where))
        results = [_result(rank, hit, gallery) for rank, hit in enumerate(hits, start=1)]
        return {"query": q, "k": k, "seconds": round(seconds, 4), "results": results}

    @app.get("/thumbnail")
    async def thumbnail(row: str = Query("", alias="id"), if_none_match: str = Header("")) -> Any:
        try:
            jpeg = await other_turns.take(lambda: _thumbnail(index, gallery, row))
        except FileNotFoundError as error:
            raise HTTPException(404, str(error)) from error
        except ImageError as error:
            raise HTTPException(422, "the image cannot be shown: it is damaged or too large") from error
        tag = f'"{hashlib.sha256(jpeg).hexdigest()[:32]}"'
        known = {"ETag": tag, "Cache-Control": "private, no-cache"}  # another index may have another image of this id
        if if_none_match == tag:
            return Response(status_code=304, headers=known)
        return Response(jpeg, media_type="image/jpeg", headers=known)

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> Any:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def misunderstood(request: Request, error: RequestValidationError) -> Any:
        return JSONResponse({"error": "; ".join(f"{each['loc'][-1]}: {each['msg']}" for each in error.errors())}, 422)

    @app.exception_handler(_BusyError)
    async def busy(request: Request, error: _BusyError) -> Any:
        text = "too many are searching at once: try again in a moment"
        return JSONResponse({"error": text}, 503, {"Retry-After": "1"})

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Any]) -> Any:
        path = request.scope["path"]  # that of request.url depends on the Host header
        rate = search_rate if path == "/api/search" else other_rate
        response: Response
        if names is not None and _host_name(request) not in names:
            response = JSONResponse({"error": "this page is for the machine it is on: open it as localhost"}, 400)
        elif wait := math.ceil(rate.wait(request.client.host if request.client else "")):
            text = f"too many requests a minute: try again in {wait} s"
            response = JSONResponse({"error": text}, 429, {"Retry-After": str(wait)})
        else:
            try:
                response = await answer(request)
            except Exception:
                logger.exception("an unexpected error at %r", path)
                response = JSONResponse({"error": "something went wrong here; the server's log says what"}, 500)
        for name, value in headers.items():
            response.headers.setdefault(name, value)
        return response

    return app


def listen(host: str, port: int) -> socket.socket:
    """A port of this machine, to be given to :func:`serve`; connections wait until then.

    Args:
        host: a name or address of this machine.
        port: 0 takes one that is free.

    Raises:
        OSError: if there is no such address here, or the port is taken.
    """
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise OSError(f"there is no host {host!r}: give a name or an address of this machine") from error
    problem = OSError()
    for family, _, _, _, address in addresses:
        try:
            return socket.create_server(address[:2], family=family)
        except OSError as error:
            problem = error
    reason = os.strerror(problem.errno) if problem.errno else problem
    raise OSError(f"cannot serve at {host}, port {port}: {reason}; choose another host or port") from problem


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until Ctrl-C, and then finish what is being answered, for up to three seconds.

    Args:
        app: of :func:`create_app`.
        listener: of :func:`listen`; closed in the end.

    Raises:
        KeyboardInterrupt: after Ctrl-C.
        ImportError: without uvicorn; names the extra.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        h11_max_incomplete_event_size=_HEAD_BYTES,
        timeout_graceful_shutdown=_GRACE,
    )
    uvicorn.Server(config).run(sockets=[listener])
    raise KeyboardInterrupt  # uvicorn raises none in a process that was started with Ctrl-C ignored, as by nohup


class RateLimit:
    """How often clients may ask: a token bucket for each, of the last 10,000 that asked.

    Args:
        per_minute: requests, as many of them at once.
        clock: seconds.
    """

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute = per_minute
        self._clock = clock
        self._clients: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait(self, client: str) -> float:
        """Seconds until a client may ask; 0 if it may now, which counts."""
        now = self._clock()
        tokens, since = self._clients.pop(client, (float(self._per_minute), now))
        tokens = min(self._per_minute, tokens + (now - since) * self._per_minute / 60)
        allowed = tokens >= 1
        self._clients[client] = (tokens - allowed, now)
        if len(self._clients) > _CLIENTS:
            self._clients.popitem(last=False)
        return 0 if allowed else (1 - tokens) * 60 / self._per_minute


class _BusyError(Exception):
    """Too many are waiting."""


class _Turns:
    """A thread in which calls take turns, and a place for some to wait."""

    def __init__(self, waiting: int) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._places = threading.BoundedSemaphore(waiting + 1)

    async def take(self, call: Callable[[], _Result]) -> _Result:
        if not self._places.acquire(blocking=False):
            raise _BusyError
        future = self._thread.submit(call)
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)


class _Gallery:
    """Image files of rows, in a folder and nowhere else."""

    def __init__(self, folder: Path, column: str) -> None:
        self._folder = folder.resolve()
        self._column = column
        self.jpeg = lru_cache(maxsize=_THUMBNAILS_KEPT)(_jpeg)

    def url(self, hit: Hit) -> str | None:
        return f"/thumbnail?id={quote(hit.id, safe='')}" if isinstance(hit.metadata.get(self._column), str) else None

    def path(self, hit: Hit) -> Path:
        name = hit.metadata.get(self._column)
        try:
            path = (self._folder / name).resolve() if isinstance(name, str) else None
            if path is not None and path.is_relative_to(self._folder) and path.is_file():
                return path
        except (ValueError, OSError, RuntimeError):  # a NUL in the name, too long a name, a loop of links
            pass
        raise FileNotFoundError("there is no such image")


def _gallery(index: SemanticIndex, images: Path | None, column: str) -> _Gallery | None:
    if images is not None and not images.is_dir():
        raise FileNotFoundError(f"there is no folder of images {images}: give the one that has them")
    if images is None and index.images is not None and not index.images.is_dir():
        logger.warning("the images of the index are not at %s any more, and are not shown", index.images)
        return None
    folder = images or index.images
    return None if folder is None else _Gallery(folder, column)


def _thumbnail(index: SemanticIndex, gallery: _Gallery | None, row: str) -> bytes:
    if gallery is None:
        raise FileNotFoundError("there are no images")
    try:
        path = gallery.path(index.get([row])[0])
    except UnknownIdError:
        raise FileNotFoundError("there is no such row") from None
    status = path.stat()
    if status.st_size > _IMAGE_BYTES:
        raise ImageError("large file", f"{path} has more than {_IMAGE_BYTES:,} bytes")
    return gallery.jpeg(path, status.st_mtime_ns)


def _jpeg(path: Path, changed: int) -> bytes:
    """The thumbnail of a file in the state of a time: upright, on white where it is transparent."""
    from PIL import Image, ImageOps

    image = load_image(path)
    try:
        upright = ImageOps.exif_transpose(image)
        transparent = upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info
        colours = upright.convert("RGBA" if transparent else "RGB")
        colours.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
        if colours.mode == "RGBA":
            colours = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
        encoded = io.BytesIO()
        colours.save(encoded, "JPEG", quality=85)
    except MemoryError:
        raise
    except Exception as error:  # as with decoders, it may be almost anything
        raise ImageError("undecodable image", f"{path} cannot be made small ({error})") from error
    return encoded.getvalue()


def _checked(query: str, k: int, conditions: Sequence[str], limits: Limits) -> Filter | None:
    """The filter of a search that is within the limits."""
    if not query.strip():
        raise ValueError("the query is empty: say what to search for")
    if len(query) > limits.query_characters:
        raise ValueError(
            f"the query has {len(query):,} characters; at most {limits.query_characters:,} are searched for"
        )
    if not 1 <= k <= limits.results:
        raise ValueError(f"asked for {k:,} results (k): 1 to {limits.results:,} are possible")
    if len(conditions) > _FILTERS:
        raise ValueError(f"there are {len(conditions):,} conditions in the filter; at most {_FILTERS} are possible")
    if any(len(condition) > limits.query_characters for condition in conditions):
        raise ValueError(f"a condition of the filter has more than {limits.query_characters:,} characters")
    return parse_filter(conditions)


def _timed_search(index: SemanticIndex, query: str, k: int, where: Filter | None) -> tuple[float, list[Hit]]:
    start = time.perf_counter()
    hits = index.search(query, k, where)
    return time.perf_counter() - start, hits


def _result(rank: int, hit: Hit, gallery: _Gallery | None) -> dict[str, Any]:
    return {"rank": rank, **asdict(hit), "thumbnail": None if gallery is None else gallery.url(hit)}


def _description(index: SemanticIndex, limits: Limits, gallery: _Gallery | None) -> dict[str, Any]:
    known = index.info()
    name = known["model"]["name"]
    return {
        "model": Path(name).name if name and name.startswith(("/", ".")) else name,
        "engine": known["engine"],
        "index": known.get("factory", known.get("index")),
        "limits": asdict(limits),
        "images": gallery is not None,
    }


def _headers(page: str) -> dict[str, str]:
    """Headers of all answers: the page runs its own script and style, and loads from here alone."""
    policy = {
        "default-src": "'none'",
        "script-src": _source(page, "script"),
        "style-src": _source(page, "style"),
        "img-src": "'self' data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cross-Origin-Resource-Policy": "same-origin",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


def _source(page: str, tag: str) -> str:
    """The hash by which a policy allows what is written in the page."""
    written = "".join(re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL))
    return f"'sha256-{base64.b64encode(hashlib.sha256(written.encode()).digest()).decode()}'"


def _host_name(request: Request) -> str:
    return re.sub(r":[0-9]*$", "", request.headers.get("host", "")).lower()
