"""A small document of headings, paragraphs, tables and figures, written as Markdown and as one HTML page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from st_kdmcse.evaluation.plots import html_image, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLOTS = "plots"
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 0 auto;
  padding: 1rem; overflow-wrap: break-word; }}
h1, h2 {{ line-height: 1.25; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ddd; }}
.table {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .75rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; color: #555; padding-bottom: .4rem; }}
th, td {{ padding: .3rem .25rem; border-bottom: 1px solid #e5e5e5; text-align: right; vertical-align: top; }}
th {{ border-bottom: 2px solid #888; }}
th:first-child, td:first-child, .text th, .text td {{ text-align: left; }}
td {{ white-space: nowrap; }}
td:first-child, .text td {{ white-space: normal; }}
td:first-child {{ min-width: 8rem; overflow-wrap: anywhere; }}
.warning {{ background: #fff4e0; border-left: 4px solid #d55e00; padding: .6rem 1rem; }}
figure {{ margin: 1rem 0; }}
img {{ max-width: 100%; height: auto; }}
code {{ background: #f3f3f3; padding: 0 .2em; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""


@dataclass(frozen=True)
class Heading:
    """A heading."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """A paragraph; ``**bold**`` and ```code``` are marked as in Markdown."""

    text: str
    warning: bool = False


@dataclass(frozen=True)
class Bullets:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class DataTable:
    """A table: the first column is text, the others are numbers unless ``text`` is set."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: bool = False


@dataclass(frozen=True)
class Plot:
    """A figure, saved as ``plots/NAME.png``; ``alt`` says what it shows."""

    name: str
    figure: Figure
    alt: str


Block = Heading | Paragraph | Bullets | DataTable | Plot


def to_markdown(blocks: Sequence[Block]) -> str:
    """The document as Markdown, with plots as links to ``plots/NAME.png``."""
    return "\n\n".join(_markdown(block) for block in blocks) + "\n"


def to_html(blocks: Sequence[Block], title: str) -> str:
    """The document as one HTML page that needs no other file.

    Args:
        blocks: the document.
        title: of the page.
    """
    return _PAGE.format(title=escape(title), body="\n".join(_html(block) for block in blocks))


def save_plots(blocks: Sequence[Block], folder: str | Path) -> list[Path]:
    """Write the plots of a document to where its Markdown looks for them, beside it.

    Args:
        blocks: the document.
        folder: where the Markdown is.
    """
    return [
        save_figure(block.figure, Path(folder) / _PLOTS / f"{block.name}.png")
        for block in blocks
        if isinstance(block, Plot)
    ]


def _markdown(block: Block) -> str:
    if isinstance(block, Heading):
        return f"{'#' * block.level} {block.text}"
    if isinstance(block, Paragraph):
        return f"> **Warning.** {block.text}" if block.warning else block.text
    if isinstance(block, Bullets):
        return "\n".join(f"- {item}" for item in block.items)
    if isinstance(block, Plot):
        return f"![{block.alt}]({_PLOTS}/{block.name}.png)"
    rule = ["---", *(["---"] if block.text else ["---:"]) * (len(block.header) - 1)]
    rows = [block.header, rule, *block.rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in row)} |" for row in rows)


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{_inline(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        text = f"<strong>Warning.</strong> {_inline(block.text)}" if block.warning else _inline(block.text)
        return f'<p class="warning">{text}</p>' if block.warning else f"<p>{text}</p>"
    if isinstance(block, Bullets):
        return "<ul>" + "".join(f"<li>{_inline(item)}</li>" for item in block.items) + "</ul>"
    if isinstance(block, Plot):
        return f"<figure>{html_image(block.figure, block.alt)}</figure>"
    head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in block.header)
    body = "\n".join(f"<tr>{''.join(f'<td>{_inline(cell)}</td>' for cell in row)}</tr>" for row in block.rows)
    kind = "table text" if block.text else "table"
    return f'<div class="{kind}"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def _inline(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text, quote=False))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)
