"""Filters as people type them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from st_kdmcse.search.base import Filter
from st_kdmcse.search.base import conditions as checked_conditions

_CONDITION = re.compile(r"(?P<name>[^=!<>]+)(?P<operator>>=|<=|!=|=|>|<)(?P<value>.*)", re.DOTALL)
_OPERATORS = {"=": "eq", "!=": "ne", ">": "gt", ">=": "gte", "<": "lt", "<=": "lte"}


def parse_filter(conditions: Iterable[str]) -> Filter | None:
    """A filter from conditions as they are typed.

    >>> parse_filter(["lang=en", "year>=2000", "year<2010"])
    {'lang': {'eq': 'en'}, 'year': {'gte': 2000, 'lt': 2010}}
    >>> parse_filter(['code="007"', 'lang=["en", "de"]'])
    {'code': {'eq': '007'}, 'lang': ['en', 'de']}

    Args:
        conditions: such as ``year>=2000``; a value is JSON if it can be read as that, else text.

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
        name, operator, value = parts["name"].strip(), _OPERATORS[parts["operator"]], parts["value"].strip()
        with suppress(ValueError, RecursionError):
            value = json.loads(value, parse_constant=lambda name: name)
        known = where.get(name, {})
        if isinstance(known, list) or operator in known or (known and isinstance(value, list)):
            raise ValueError(f"filter {condition!r}: there is another condition on {name} that it does not go with")
        if isinstance(value, list) and operator != "eq":
            raise ValueError(f"filter {condition!r}: several values go with = alone")
        for each in value if isinstance(value, list) else [value]:
            _check_value(condition, each)
        where[name] = value if isinstance(value, list) else {**known, operator: value}
    checked_conditions(where)
    return where or None


def _check_value(condition: str, value: Any) -> None:
    """Refuse what the databases cannot compare with."""
    if isinstance(value, int) and not -(2**63) < value < 2**63:
        raise ValueError(f"filter {condition!r}: {value} has more than 64 bits: write it with a decimal point")
    try:
        f"{condition}{value}".encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"filter {condition!r}: it is not valid Unicode: {error.reason}") from error
