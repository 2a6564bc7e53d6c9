"""Characters that no id may hold."""

from __future__ import annotations

import re

CONTROL_CHARACTERS = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
"""All but tabs and the ends of lines, as a regular expression."""

_SURROGATE = re.compile(r"[\ud800-\udfff]")
_CONTROL = re.compile(f"{CONTROL_CHARACTERS}|{_SURROGATE.pattern}")


def control_character(value: object) -> str | None:
    """The first control character of a text that is no tab or end of a line, for a message; None if there is none.

    Programs in C end a text at a NUL: an id with one would be taken for another id. Half of a pair of UTF-16 counts as
    one: it is what bytes that are not UTF-8 become, and no database takes it.
    """
    found = _CONTROL.search(value) if isinstance(value, str) else None
    return repr(found.group()) if found else None


def check_unicode(text: object, name: str) -> None:
    """Refuse a text that no tokenizer and no database takes: one that was made of bytes that are not UTF-8.

    Raises:
        ValueError: names the text.
    """
    if isinstance(text, str) and (found := _SURROGATE.search(text)):
        raise ValueError(f"{name} is not valid UTF-8 (at character {found.start()}): correct its encoding")
