"""What the API pages make of docstrings: roles of reStructuredText become links, and ``.. math::`` a formula."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|data|attr|mod|exc):`(~?)([\w.]+)`")
_FORMULA = re.compile(r":math:`([^`]+)`")
_DISPLAY = re.compile(r"^( *)\.\. math:: (.+)$", re.MULTILINE)
_CODE = re.compile(r"^( *)(?:\.\. code-block:: python|::)\n\n((?:\1 {4}.*\n?|\n)+)", re.MULTILINE)
_GRID_LINE = re.compile(r"^ *\+-+[-+]*\+\n", re.MULTILINE)
_GRID_HEADER = re.compile(r"^( *)\+(=+)(.*)\+$", re.MULTILINE)
_LITERAL = re.compile(r"(?<!`)``([^`]+)``(?!`)")


class Docstrings(griffe.Extension):
    """Rewrites each docstring as Markdown."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring is not None:
            obj.docstring.value = _to_markdown(obj, obj.docstring.value)


def _to_markdown(obj: griffe.Object, text: str) -> str:
    text = _CODE.sub(_fenced, text)
    text = _GRID_HEADER.sub(lambda line: line[0].replace("+", "|").replace("=", "-"), _GRID_LINE.sub("", text + "\n"))
    text = _DISPLAY.sub(r"\1$$\n\1\2\n\1$$", text)
    text = _FORMULA.sub(r"$\1$", text)
    text = _ROLE.sub(lambda found: _link(obj, bool(found[1]), found[2]), text)
    return _LITERAL.sub(r"`\1`", text)


def _fenced(found: re.Match[str]) -> str:
    indent, code = found[1], re.sub(rf"^{found[1]} {{4}}", found[1], found[2], flags=re.MULTILINE)
    return f"{indent}```python\n{code.rstrip()}\n{indent}```\n"


def _link(obj: griffe.Object, short: bool, name: str) -> str:
    """A link where the name is on a page, and code where it is not."""
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{_path(obj, name)}"><code>{shown}</code></autoref>'


def _path(obj: griffe.Object, name: str) -> str:
    if name.startswith("st_kdmcse."):
        return name
    scope: griffe.Object | griffe.Alias | None = obj
    while scope is not None:  # :meth:`load` of a method's docstring is a neighbour of the method
        if name.partition(".")[0] in scope.members:
            return f"{scope.path}.{name}"
        scope = scope.parent
    return name
