"""What one user of the search page may ask for, so that all are served."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any, Generic, TypeVar

_MOST = {
    "query_characters": 5_000,
    "results": 1_000,
    "requests_per_minute": 1_000_000,
    "waiting": 1_000,
    "queries": 1_000,
    "image_bytes": 1 << 26,
}
_CLIENTS = 10_000
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Limits:
    """What one user may ask for, so that all are served.

    Attributes:
        query_characters: of a query, and of a condition of its filter; 1 to 5,000, which fit into a URL.
        results: of a search; 1 to 1,000.
        requests_per_minute: queries of a client's address, as many at once; 1 to 1,000,000. Of all else it may ask for
            one a result.
        waiting: queries that may run or wait when a search comes; with more of them it is refused; 0 to 1,000.
        queries: of one request, which may not be more than those of a minute; 1 to 1,000.
        image_bytes: of an image that is searched by; 1 to 64 MiB.

    Raises:
        ValueError: if one is out of its range; names it.
    """

    query_characters: int = 1_000
    results: int = 100
    requests_per_minute: int = 120
    waiting: int = 512
    queries: int = 64
    image_bytes: int = 10 << 20

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least, most = getattr(self, field.name), int(field.name != "waiting"), _MOST[field.name]
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"`{field.name}` is {value!r}, expected an integer of {least} to {most:,}")


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

    def wait(self, client: str, requests: int = 1) -> float:
        """Seconds until a client may ask; 0 if it may now, which counts.

        Args:
            client: that asks.
            requests: so many at once, and no more than in a minute.
        """
        now = self._clock()
        tokens, since = self._clients.pop(client, (float(self._per_minute), now))
        tokens = min(self._per_minute, tokens + (now - since) * self._per_minute / 60)
        allowed = tokens >= requests
        self._clients[client] = (tokens - requests * allowed, now)
        if len(self._clients) > _CLIENTS:
            self._clients.popitem(last=False)
        return 0 if allowed else (requests - tokens) * 60 / self._per_minute


class BusyError(Exception):
    """Too many are waiting."""


class Turns:
    """A thread in which calls take turns.

    Args:
        waiting: items of calls that may run or wait when a call comes.
    """

    def __init__(self, waiting: int) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._waiting = waiting
        self._items = 0
        self._lock = threading.Lock()

    async def take(self, call: Callable[[], _Result], items: int = 1) -> _Result:
        """The result of a call, after its turn has come.

        Args:
            call: what to do.
            items: how much it is.

        Raises:
            BusyError: if too much runs and waits.
        """
        with self._lock:
            if self._items > self._waiting:
                raise BusyError
            self._items += items
        future = self._thread.submit(call)
        future.add_done_callback(lambda _: self._done(items))
        return await asyncio.wrap_future(future)

    def _done(self, items: int) -> None:
        with self._lock:
            self._items -= items


class SharedTurns:
    """Turns in which questions that wait, and can be answered at once, are answered at once.

    Args:
        waiting: items of questions that may run or wait when a question comes.
        most: of the items of one turn.
    """

    def __init__(self, waiting: int, most: int) -> None:
        self._turns = Turns(waiting)
        self._most = most
        self._asked: list[_Asked[Any, Any]] = []
        self._lock = threading.Lock()

    async def take(
        self, answer: Callable[[list[_Item]], list[_Result]], items: Sequence[_Item], kind: Hashable
    ) -> list[_Result]:
        """What belongs to each of some items, after their turn has come.

        Args:
            answer: gives what belongs to each item.
            items: n items.
            kind: of the question; the items of questions of one kind may be given to the ``answer`` of any of them.

        Raises:
            BusyError: if too much runs and waits.
        """
        mine = _Asked[_Item, _Result](items, kind)
        with self._lock:
            self._asked.append(mine)
        try:
            return await self._turns.take(lambda: self._turn(answer, mine), len(items))
        finally:
            with self._lock, suppress(ValueError):
                self._asked.remove(mine)

    def _turn(self, answer: Callable[[list[_Item]], list[_Result]], mine: _Asked[_Item, _Result]) -> list[_Result]:
        if mine.answer is None:
            together, count = [mine], len(mine.items)
            with self._lock:
                for each in self._asked:
                    if each is not mine and each.kind == mine.kind and count + len(each.items) <= self._most:
                        together.append(each)
                        count += len(each.items)
                self._asked = [each for each in self._asked if each not in together]
            results = iter(answer([item for each in together for item in each.items]))
            for each in together:
                each.answer = list(islice(results, len(each.items)))
        assert mine.answer is not None
        return mine.answer


@dataclass(eq=False)
class _Asked(Generic[_Item, _Result]):
    items: Sequence[_Item]
    kind: Hashable
    answer: list[_Result] | None = None
