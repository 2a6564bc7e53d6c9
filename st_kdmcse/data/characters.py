"""Characters that no id may hold."""

from __future__ import annotations

import re

CONTROL_CHARACTERS = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
"""All but tabs and the ends of lines, as a regular expression."""

_CONTROL = re.compile(CONTROL_CHARACTERS)


def control_character(value: object) -> str | None:
    """The first control character of a text that is no tab or end of a line, for a message; None if there is none.

    Programs in C end a text at a NUL: an id with one would be taken for another id.
    """
    found = _CONTROL.search(value) if isinstance(value, str) else None
    return repr(found.group()) if found else None
