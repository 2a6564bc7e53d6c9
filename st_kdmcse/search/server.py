"""A web page that searches an index, and the JSON behind it."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_kdmcse._version import __version__
from st_kdmcse.data.images import ImageError, load_image
from st_kdmcse.search.base import Filter, Hit
from st_kdmcse.search.filters import FilterError, search_typed
from st_kdmcse.search.headers import docs_policy, page_headers
from st_kdmcse.search.limits import BusyError, Limits, RateLimit, SharedTurns, Turns
from st_kdmcse.search.semantic_index import SemanticIndex
from st_kdmcse.search.thumbnails import Gallery, find_gallery, thumbnail_of

if TYPE_CHECKING:
    from fastapi import FastAPI, Request

logger = logging.getLogger(__name__)

LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
"""Names of this machine for itself."""


_NEEDED = 'the search page needs FastAPI, uvicorn and Pillow: pip install "st-kdmcse[serve]"'
_GRACE = 30
_OTHER_HEAD_BYTES = 1 << 16  # of a request, beside query and filters
_CONNECTIONS = 256
_REQUEST_SECONDS = 10
_ANSWER_SECONDS = 60
_LAST_SECONDS = 0.05
_LOOK_SECONDS = 1.0
_QUERY_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_QUERY_PIXELS = 50_000_000


def create_app(
    index: SemanticIndex,
    *,
    images: Path | None = None,
    image_column: str = "image",
    limits: Limits = Limits(),  # noqa: B008 - frozen
    hosts: Iterable[str] | None = None,
    docs: bool = False,
) -> FastAPI:
    """An application that searches an index: a page with a search box, and the JSON behind it.

    - ``GET /``: the page;

    - ``GET /api/search?q=a+dog&k=10&filter=year>=2000``: the results, see below; ``filter`` any number of times, see
      :func:`~st_kdmcse.search.filters.parse_filter`;
    - ``POST /api/search`` with ``{"queries": ["a dog", "snow"], "k": 10, "filter": {"year": {"gte": 2000}}}``: the
      results of several queries, which are encoded together; ``filter`` may also be a list of what GET takes;
    - ``GET /api/items/ID``: ``id``, ``text``, ``metadata`` and ``thumbnail`` of a row;
    - ``POST /api/search/image?k=10&filter=year>=2000``: the same for an image (JPEG, PNG, WebP, GIF or BMP, at most 50
      million pixels), which is the body, with its media type as Content-Type; where the model of the index encodes
      images;
    - ``GET /api/info``: rows, model, engine, index type, limits, and whether there are images;
    - ``GET /thumbnail?id=ID``: a JPEG of the image of a row.

    A search gives ``query``, ``k``, ``seconds`` and ``results``, of which each has ``rank``, ``score`` (cosine),
    ``id``, ``text``, ``metadata`` and ``thumbnail`` (a URL or null). For several queries, ``queries`` and ``results``
    are lists with an entry for each. Errors are ``{"error": "..."}`` with a status of
    4xx, or 503 when too many searches wait. Searches take turns; those that wait, with one k and filter, are encoded
    and searched together. Queries are not logged.

    When another process saves or replaces the index, it is loaded in the background, after the next request, with
    another model if it was made with one; the old one answers until then, and memory holds both for that time. Where it
    cannot be loaded, the old one goes on, and the log says so.

    Args:
        index: to be searched.
        images: folder of image files, the only one that thumbnails are made from; None is that of the index, if any.
        image_column: metadata with the path of a row's image in that folder.
        limits: of what is asked for.
        hosts: names that the Host header may have, without a port; None for any. For a server that only this machine
            can reach, :data:`LOCAL_HOSTS` keep out other sites whose name has been pointed here (DNS rebinding).
        docs: describe the requests at ``/openapi.json`` (OpenAPI), and on a page at ``/docs``.

    Raises:
        ImportError: without FastAPI; names the extra.
        FileNotFoundError: if there is no folder ``images``.
    """
    try:
        from fastapi import FastAPI, Header, HTTPException, Query
        from fastapi.exceptions import RequestValidationError
        from fastapi.responses import HTMLResponse, JSONResponse, Response
        from starlette.exceptions import HTTPException as AnyHTTPException
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from st_kdmcse.search import api
    except ImportError as error:
        raise ImportError(_NEEDED) from error
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    headers = page_headers(page)
    gallery_of = lru_cache(maxsize=1)(lambda index: find_gallery(index, images, image_column))
    described = lru_cache(maxsize=1)(lambda index: _description(index, limits, gallery_of(index)))
    gallery_of(index)
    current = _Current(index)
    search_turns = SharedTurns(limits.waiting, limits.queries)
    other_turns = Turns(max(1, limits.waiting) * limits.results)
    search_rate = RateLimit(limits.requests_per_minute)
    other_rate = RateLimit(limits.requests_per_minute * limits.results)
    app = FastAPI(
        title="Semantic search",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url="/openapi.json" if docs else None,
        redirect_slashes=False,
    )
    app.state.head_bytes = (1 + api.MOST_CONDITIONS) * 12 * limits.query_characters + _OTHER_HEAD_BYTES  # %F0%9F%90%95
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)

    def get(path: str, **described: Any) -> Callable[[Any], Any]:
        return lambda answer: app.head(path, include_in_schema=False)(app.get(path, **described)(answer))

    def shown(hit: Hit) -> dict[str, Any]:
        gallery = gallery_of(current.get())
        thumbnail = None if gallery is None else gallery.url(hit)
        return {"id": hit.id, "text": hit.text, "metadata": hit.metadata, "thumbnail": thumbnail}

    async def find(queries: Sequence[str], k: int, where: Filter | None) -> tuple[float, list[list[Hit]]]:
        try:
            found = await search_turns.take(
                lambda queries: _timed_search(current.get(), queries, k, where), queries, json.dumps([k, where])
            )
        except FilterError as error:
            raise HTTPException(422, str(error)) from error
        return found[0][0], [hits for _, hits in found]

    async def get_row(row: str) -> Hit:
        (hit,) = await other_turns.take(lambda: current.get().get([row]))
        return hit

    @get("/", include_in_schema=False)
    async def show_page() -> Any:
        return HTMLResponse(page)

    @get("/api/info", summary="Say what is searched, and what may be asked for")
    async def info() -> Any:
        now = current.get()
        return await other_turns.take(lambda: {"rows": len(now), **described(now)})

    @get("/api/search", summary="Search", responses=api.described(api.Answer, 422, 503))
    async def search(
        q: str = "",
        k: int = api.default_k(limits),
        conditions: list[str] = Query([], alias="filter"),  # noqa: B008 - how FastAPI is told
    ) -> Any:
        try:
            where = api.checked_search([q], k, conditions, limits)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        seconds, (hits,) = await find([q], k, where)
        results = api.ranked(hits, shown)
        return JSONResponse({"query": q, "k": k, "seconds": round(seconds, 4), "results": results})

    async def find_near(image: bytes, k: int, where: Filter | None) -> tuple[float, list[Hit]]:
        now = current.get()
        if not now.takes_images:
            raise HTTPException(422, "the model of this index encodes no images, so nothing can be found by one")
        try:
            (found,) = await search_turns.take(
                lambda images: [_timed_image_search(now, each, k, where) for each in images],
                [image],
                object(),  # in a turn of its own: an image that cannot be decoded is nobody else's error
            )
        except (ImageError, FilterError) as error:
            raise HTTPException(422, str(error)) from error
        return found

    app.include_router(api.router(find, find_near, get_row, shown, search_rate, limits, _REQUEST_SECONDS))
    if docs:
        api.add_docs(app, docs_policy)

    @get("/thumbnail", summary="Show the image of a row", response_class=Response)
    async def thumbnail(row: str = Query("", alias="id"), if_none_match: str = Header("")) -> Any:
        try:
            now = current.get()
            jpeg = await other_turns.take(lambda: thumbnail_of(now, gallery_of(now), row))
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
        problems = [f"{'.'.join(map(str, each['loc'][1:])) or 'the request'}: {each['msg']}" for each in error.errors()]
        return JSONResponse({"error": "; ".join(problems)}, 422)

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> Any:
        text = "too many are searching at once: try again in a moment"
        return JSONResponse({"error": text}, 503, {"Retry-After": "1"})

    @app.middleware("http")
    async def guard(request: Request, answer: Callable[[Request], Any]) -> Any:
        path = request.scope["path"]  # that of request.url depends on the Host header
        by_query = path == "/api/search" and request.method != "POST"  # which counts its queries
        response: Response
        try:
            api.check_rate(search_rate if by_query else other_rate, request)
        except HTTPException as error:
            response = await refused(request, error)
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
            listener = socket.create_server(address[:2], family=family)
        except OSError as error:
            problem = error
        else:
            # Its connections inherit this; asyncio sets it only for sockets that name their protocol. Without it, each
            # answer on a connection that is kept waits 40 ms for the client's acknowledgement.
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return listener
    reason = os.strerror(problem.errno) if problem.errno else problem
    raise OSError(f"cannot serve at {host}, port {port}: {reason}; choose another host or port") from problem


def is_local(listener: socket.socket) -> bool:
    """Whether only this machine can connect."""
    return ipaddress.ip_address(listener.getsockname()[0]).is_loopback


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM, and then answer every request that has come, for up to 30 seconds.

    A connection over which no whole request comes within ten seconds is closed; of more than 256 at a time, the one
    that has waited for longest.

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
        http=_protocol(),
        ws="none",
        h11_max_incomplete_event_size=app.state.head_bytes,
        timeout_graceful_shutdown=_GRACE,
    )
    uvicorn.Server(config).run(sockets=[listener])
    raise KeyboardInterrupt  # uvicorn raises none in a process that was started with Ctrl-C ignored, as by nohup


class _Current:
    """An index in the state that its folder has; a new state is loaded while the old one is searched."""

    def __init__(self, index: SemanticIndex) -> None:
        self._index = index
        self._look = threading.Thread()
        self._next = 0.0
        self._problem = ""

    def get(self) -> SemanticIndex:
        """The index; now and then, a thread looks whether its folder has changed."""
        if time.monotonic() >= self._next and not self._look.is_alive():
            self._next = time.monotonic() + _LOOK_SECONDS
            self._look = threading.Thread(target=self._reload, daemon=True)
            self._look.start()
        return self._index

    def _reload(self) -> None:
        try:
            found, problem = self._index.reloaded(), ""
            if found is not self._index:
                logger.info("the index has changed: %s texts are served now", f"{len(found):,}")
            self._index = found
        except (ValueError, OSError) as error:
            problem = str(error)
        if problem and problem != self._problem:
            logger.warning("the index has changed and cannot be loaded, the one of before is served: %s", problem)
        self._problem = problem


def _protocol() -> type:
    """The HTTP of uvicorn, with an end to what clients keep open."""
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        timer: asyncio.TimerHandle

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.timer = self.loop.call_later(_REQUEST_SECONDS, self.give_up)
            if len(self.connections) > _CONNECTIONS:
                everyone: set[Any] = self.connections
                min(everyone, key=lambda each: (each.answers(), each.timer.when())).transport.abort()

        def shutdown(self) -> None:
            self.loop.call_later(_LAST_SECONDS, super().shutdown)  # answers what is on its way on this connection

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.timer.cancel()
            self.timer = self.loop.call_later(_REQUEST_SECONDS, self.give_up)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self.timer.cancel()

        def answers(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def give_up(self) -> None:
            if not self.answers():
                self.transport.close()  # when all is sent
                self.timer = self.loop.call_later(_ANSWER_SECONDS, self.transport.abort)

    return Impatient


def _timed_search(
    index: SemanticIndex, queries: list[str], k: int, where: Filter | None
) -> list[tuple[float, list[Hit]]]:
    start = time.perf_counter()
    found = search_typed(index, queries, k, where)
    seconds = time.perf_counter() - start
    return [(seconds, hits) for hits in found]


def _timed_image_search(index: SemanticIndex, content: bytes, k: int, where: Filter | None) -> tuple[float, list[Hit]]:
    start = time.perf_counter()
    image = load_image(content, _QUERY_FORMATS, _QUERY_PIXELS)
    (hits,) = search_typed(index, [image], k, where, images=True)
    return time.perf_counter() - start, hits


def _description(index: SemanticIndex, limits: Limits, gallery: Gallery | None) -> dict[str, Any]:
    known = index.info()
    name = known["model"]["name"]
    return {
        "model": Path(name).name if name and name.startswith(("/", ".")) else name,
        "engine": known["engine"],
        "index": known.get("factory", known.get("index")),
        "limits": asdict(limits),
        "images": gallery is not None,
        "image_queries": index.takes_images,
        "rows_are": known["rows_are"],
    }
