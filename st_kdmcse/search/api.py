"""What the search server offers to programs: many queries at once, rows by their ids, and a description of it all."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from st_kdmcse.data.characters import check_unicode
from st_kdmcse.search.base import Filter, Hit
from st_kdmcse.search.filters import checked_filter, parse_filter
from st_kdmcse.search.limits import Limits, RateLimit

MOST_CONDITIONS = 10
"""Of a filter."""

_OTHER_BYTES = 1 << 16  # of a request, beside queries and filter


class Item(BaseModel):
    """A row of the index."""

    id: str
    text: str
    metadata: dict[str, str | float | bool | None]
    thumbnail: str | None = Field(description="path of a JPEG of its image")


class Result(Item):
    """A row that was found."""

    rank: int = Field(description="1 is the nearest")
    score: float = Field(description="cosine with the query")


class Answer(BaseModel):
    """The nearest texts of a query, best first."""

    query: str | None = Field(description="null for an image")
    k: int
    seconds: float
    results: list[Result]


class Answers(BaseModel):
    """The nearest texts of each query, best first, in the order of the queries."""

    queries: list[str]
    k: int
    seconds: float
    results: list[list[Result]]


class Problem(BaseModel):
    """Why a request was refused."""

    error: str


class Queries(BaseModel):
    """Queries that are encoded together, each of which counts as one request."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        title="Search",
        json_schema_extra={
            "examples": [{"queries": ["a dog in the snow", "board games"], "k": 5, "filter": {"year": {"gte": 2000}}}]
        },
    )

    queries: list[str]
    k: int | None = Field(None, description="results of each query")
    filter: dict[str, Any] | list[str] = Field(
        {},
        description='values and comparisons by name, {"lang": ["en", "de"], "year": {"gte": 2000, "lt": 2010}}, or '
        "conditions as they are typed",
    )


def described(answer: type[BaseModel], *problems: int) -> dict[int | str, dict[str, Any]]:
    """What a request is answered with, for the description.

    Args:
        answer: with status 200.
        problems: other statuses, beside those that every request may have.
    """
    return {200: {"model": answer}, **{status: {"model": Problem} for status in (*problems, 429)}}


def checked_search(
    queries: Sequence[str], k: int, where: Sequence[str] | dict[str, Any], limits: Limits
) -> Filter | None:
    """The filter of a search that is within the limits.

    Args:
        queries: of one request.
        k: results of each.
        where: conditions as they are typed, or values and comparisons by name.
        limits: of what is asked for.

    Raises:
        ValueError: if there is too much of something, or nothing to search for.
    """
    most = min(limits.queries, limits.requests_per_minute)
    if not 1 <= len(queries) <= most:
        raise ValueError(f"asked for {len(queries):,} queries: 1 to {most:,} are possible in one request")
    for number, query in enumerate(queries):
        name = "the query" if len(queries) == 1 else f"query {number}"
        if not query.strip():
            raise ValueError(f"{name} is empty: say what to search for")
        if len(query) > limits.query_characters:
            raise ValueError(
                f"{name} has {len(query):,} characters; at most {limits.query_characters:,} are searched for"
            )
        check_unicode(query, name)
    return checked_results(k, where, limits)


def checked_results(k: int, where: Sequence[str] | dict[str, Any], limits: Limits) -> Filter | None:
    """The filter of a search whose results are within the limits, see :func:`checked_search`."""
    if not 1 <= k <= limits.results:
        raise ValueError(f"asked for {k:,} results (k): 1 to {limits.results:,} are possible")
    if len(where) > MOST_CONDITIONS:
        raise ValueError(f"there are {len(where):,} conditions in the filter; at most {MOST_CONDITIONS} are possible")
    typed = [json.dumps(each) for each in where.values()] if isinstance(where, dict) else where
    if any(len(condition) > limits.query_characters for condition in (*typed, *where)):
        raise ValueError(f"a condition of the filter has more than {limits.query_characters:,} characters")
    return checked_filter(where) if isinstance(where, dict) else parse_filter(where)


def check_rate(rate: RateLimit, request: Request, requests: int = 1) -> None:
    """Refuse a client that asks too often.

    Raises:
        HTTPException: 429; says when to try again.
    """
    if wait := math.ceil(rate.wait(request.client.host if request.client else "", requests)):
        text = f"too many requests a minute: try again in {wait} s"
        raise HTTPException(429, text, {"Retry-After": str(wait)})


def router(
    find: Callable[[Sequence[str], int, Filter | None], Awaitable[tuple[float, list[list[Hit]]]]],
    find_near: Callable[[bytes, int, Filter | None], Awaitable[tuple[float, list[Hit]]]],
    get: Callable[[str], Awaitable[Hit]],
    shown: Callable[[Hit], dict[str, Any]],
    rate: RateLimit,
    limits: Limits,
    seconds: float,
) -> APIRouter:
    """The requests of programs.

    Args:
        find: gives seconds and hits of queries.
        find_near: gives those of an image.
        get: gives a row by its id; raises KeyError.
        shown: a row for JSON.
        rate: how often a client may ask for the results of a query.
        limits: of what is asked for.
        seconds: in which a whole request must have come.
    """
    api = APIRouter()
    most_bytes = (limits.queries + MOST_CONDITIONS) * 12 * limits.query_characters + _OTHER_BYTES  # as "\\ud83d\\udc15"

    @api.post(
        "/api/search",
        summary="Search for several queries at once",
        responses=described(Answers, 408, 413, 422, 503),
        openapi_extra={
            "requestBody": {"required": True, "content": {"application/json": {"schema": Queries.model_json_schema()}}}
        },
    )
    async def search_all(request: Request) -> Any:
        try:
            asked = Queries.model_validate_json(await _body(request, most_bytes, seconds))
        except ValidationError as error:
            raise RequestValidationError(
                [{**each, "loc": ("body", *each["loc"])} for each in error.errors()]
            ) from error
        k = default_k(limits) if asked.k is None else asked.k
        try:
            where = checked_search(asked.queries, k, asked.filter, limits)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        check_rate(rate, request, len(asked.queries))
        taken, found = await find(asked.queries, k, where)
        results = [ranked(hits, shown) for hits in found]
        return JSONResponse({"queries": asked.queries, "k": k, "seconds": round(taken, 4), "results": results})

    @api.post(
        "/api/search/image",
        summary="Search by an image",
        responses=described(Answer, 408, 413, 415, 422, 503),
        openapi_extra={"requestBody": {"required": True, "content": {"image/*": {}}}},
    )
    async def search_by_image(
        request: Request,
        k: int = default_k(limits),
        conditions: list[str] = Query([], alias="filter"),  # noqa: B008 - how FastAPI is told
    ) -> Any:
        if not request.headers.get("content-type", "").startswith(("image/", "application/octet-stream")):
            raise HTTPException(415, "the request is no image: send one, with its media type as Content-Type")
        try:
            where = checked_results(k, conditions, limits)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        check_rate(rate, request)
        taken, hits = await find_near(await _body(request, limits.image_bytes, seconds), k, where)
        return JSONResponse({"query": None, "k": k, "seconds": round(taken, 4), "results": ranked(hits, shown)})

    @api.get("/api/items/{id:path}", summary="Get a row by its id", responses=described(Item, 404))
    async def item(id: str) -> Any:  # noqa: A002 - the name in the description
        try:
            return JSONResponse(shown(await get(id)))
        except KeyError as error:
            raise HTTPException(404, str(error)) from error

    return api


def default_k(limits: Limits) -> int:
    """Results of a search that does not say how many."""
    return min(10, limits.results)


def ranked(hits: Sequence[Hit], shown: Callable[[Hit], dict[str, Any]]) -> list[dict[str, Any]]:
    """The results of a query for JSON."""
    return [{"rank": rank, "score": hit.score, **shown(hit)} for rank, hit in enumerate(hits, start=1)]


def add_docs(app: FastAPI, page_policy: Callable[[str], str]) -> None:
    """Put a page at ``/docs`` that shows the description of the requests, and tries them, without another host.

    Args:
        app: with a description at its ``openapi_url``.
        page_policy: gives the content security policy of a page.

    Raises:
        ImportError: without fastapi-offline.
    """
    import fastapi_offline

    app.mount("/docs/assets", StaticFiles(directory=Path(fastapi_offline.__file__).with_name("static")))
    page = get_swagger_ui_html(
        openapi_url=str(app.openapi_url),
        title=app.title,
        swagger_js_url="/docs/assets/swagger-ui-bundle.js",
        swagger_css_url="/docs/assets/swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    page.headers["Content-Security-Policy"] = page_policy(bytes(page.body).decode())

    @app.get("/docs", include_in_schema=False)
    async def show_docs() -> HTMLResponse:
        return page


async def _body(request: Request, most: int, seconds: float) -> bytes:
    """The body of a request, of bounded size, in bounded time.

    Raises:
        HTTPException: if it is too large, or does not come.
    """

    async def read() -> bytes:
        content = bytearray()
        async for part in request.stream():
            content += part
            if len(content) > most:
                raise HTTPException(413, f"the request has more than {most:,} bytes", {"Connection": "close"})
        return bytes(content)

    try:
        return await asyncio.wait_for(read(), seconds)
    except asyncio.TimeoutError:
        raise HTTPException(408, f"the request did not come within {seconds:g} s", {"Connection": "close"}) from None
    except ClientDisconnect:
        raise HTTPException(400, "the request ended early") from None
