"""Filters as people type them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from st_kdmcse.search.base import Filter, Hit
from st_kdmcse.search.base import conditions as checked_conditions

if TYPE_CHECKING:
    from st_kdmcse.search.semantic_index import SemanticIndex

_CONDITION = re.compile(r"(?P<name>[^=!<>]+)(?P<operator>==|>=|<=|!=|=|>|<)(?P<value>.*)", re.DOTALL)
_OPERATORS = {"=": "eq", "==": "eq", "!=": "ne", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}
_ANY: dict[str, Any] = {
    "texts": {"gte": ""},
    "numbers": {"gte": -sys.float_info.max},
    "truth values": [True, False],
}
_NAMES_OF = 100  # rows whose metadata are looked through for a name like a wrong one


class FilterError(ValueError):
    """No row can fulfil a filter; the message says why."""


def parse_filter(conditions: Iterable[str]) -> Filter | None:
    """A filter from conditions as they are typed.

    >>> parse_filter(["lang=en", "year>=2000", "year<2010"])
    {'lang': {'eq': 'en'}, 'year': {'gte': 2000, 'lt': 2010}}
    >>> parse_filter(['code="007"', 'lang=["en", "de"]'])
    {'code': {'eq': '007'}, 'lang': ['en', 'de']}

    Args:
        conditions: such as ``year>=2000``; a value is JSON if it can be read as that, or True or False, else text.

    Returns:
        A filter that every engine takes; None without conditions.

    Raises:
        ValueError: if one is no condition, two contradict each other, or no row can have such a value;
            names the condition.
    """
    where: dict[str, Any] = {}
    for condition in conditions:
        parts = _CONDITION.fullmatch(condition)
        if parts is None or not parts["name"].strip() or not parts["value"].strip():
            raise ValueError(f"filter {condition!r}: expected NAME=VALUE, or !=, <, <=, > or >=, in quotes in a shell")
        name, operator, value = parts["name"].strip(), _OPERATORS[parts["operator"]], _value(parts["value"].strip())
        if isinstance(value, str) and parts["value"].strip()[0] in "=!<>":
            raise ValueError(
                f"filter {condition!r}: expected =, !=, <, <=, > or >= after the name; a text that begins with "
                f"{value[0]} goes in double quotes"
            )
        known = where.get(name, {})
        if isinstance(known, list) or operator in known or (known and isinstance(value, list)):
            raise ValueError(f"filter {condition!r}: there is another condition on {name} that it does not go with")
        if value == []:
            raise ValueError(f"filter {condition!r}: the list is empty, and no text would be found")
        if isinstance(value, list) and operator != "eq":
            raise ValueError(f"filter {condition!r}: several values go with = alone")
        for each in value if isinstance(value, list) else [value]:
            _check_value(condition, each)
        where[name] = value if isinstance(value, list) else {**known, operator: value}
    checked_conditions(where)
    return where or None


def checked_filter(where: Mapping[str, Any]) -> Filter | None:
    """A filter that a program has sent, see :data:`~st_kdmcse.search.base.Filter`.

    >>> checked_filter({"lang": ["en", "de"], "year": {"gte": 2000}})
    {'lang': ['en', 'de'], 'year': {'gte': 2000}}

    Args:
        where: values and comparisons by name, as they are in JSON.

    Returns:
        The filter; None without conditions.

    Raises:
        ValueError: for an unknown comparison, an empty list, or a value that no row can have; names the condition.
    """
    for name, comparison, wanted in checked_conditions(where):
        if wanted == []:
            raise ValueError(f"filter on {name!r}: the list is empty, and no text would be found")
        for value in wanted if comparison == "in" else [wanted]:
            _check_value(name, value)
    return where or None


def search_typed(
    index: SemanticIndex, queries: Sequence[Any], k: int, where: Filter | None = None, images: bool = False
) -> list[list[Hit]]:
    """Search with a filter that was typed, where a typing mistake must not look like a result.

    Args:
        index: to be searched.
        queries: n queries: texts, or with ``images`` what
            :meth:`~st_kdmcse.search.semantic_index.SemanticIndex.search_images` takes.
        k: results of each.
        where: of :func:`parse_filter`.
        images: whether the queries are images.

    Returns:
        n lists of hits.

    Raises:
        FilterError: if nothing is found because no row has metadata of a name, or none with values of that kind; names
            what there is.
        ValueError: as :meth:`~st_kdmcse.search.semantic_index.SemanticIndex.search`.
    """
    search = index.search_images if images else index.search
    found = search(queries, k, where)
    if where and queries and not any(found) and len(index):
        for name in where:
            _check_name(search, queries[0], name, where)
    return found


def typed(value: str | int | float | bool) -> str:
    """A value as it is typed in a filter.

    >>> [typed(value) for value in (True, 2004, "2004", "en")]
    ['true', '2004', '"2004"', 'en']
    """
    plain = (
        isinstance(value, str) and value == value.strip() != "" and _value(value) == value and value[0] not in "=!<>"
    )
    return str(value) if plain else json.dumps(value, ensure_ascii=False)


def _value(text: str) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(text, parse_constant=lambda name: name)
    return {"true": True, "false": False}.get(text.lower(), text)


def _check_name(search: Callable[..., Any], query: Any, name: str, where: Filter) -> None:
    """Refuse a name that no row has, or values of another kind than all that rows have."""
    there = [kind for kind, any_value in _ANY.items() if search([query], 1, {name: any_value})[0]]
    if not there:
        names = sorted({each for hit in search([query], _NAMES_OF)[0] for each in hit.metadata})
        near = get_close_matches(name, names, 1)
        meant = f"did you mean {near[0]!r}? There are" if near else "there are"
        raise FilterError(
            f"filter on {name!r}: no text has such metadata; {meant} {', '.join(map(repr, names)) or 'none'}"
        )
    for _, comparison, wanted in checked_conditions({name: where[name]}):
        values = wanted if comparison == "in" else [wanted]
        if not any(_kind(value) in there for value in values):
            raise FilterError(
                f"filter on {name!r}: there are {' and '.join(there)}, and {typed(values[0])} is not one of them; in a "
                "filter texts may be in double quotes, numbers and truth values are not"
            )


def _kind(value: Any) -> str:
    return "texts" if isinstance(value, str) else "truth values" if isinstance(value, bool) else "numbers"


def _check_value(condition: str, value: Any) -> None:
    """Refuse what the databases cannot compare with."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ValueError(f"filter {condition!r}: {value} has more than 64 bits: write it with a decimal point")
    try:
        f"{condition}{value}".encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"filter {condition!r}: it is not valid Unicode: {error.reason}") from error
