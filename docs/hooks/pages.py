"""What the site makes of a page: formulas become MathML, which browsers draw without scripts or fonts from elsewhere."""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Replace the formulas of a page."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    formula = html.unescape(found[2]).strip()[2:-2].strip()
    return convert(formula, display="block" if found[1] == "div" else "inline")
