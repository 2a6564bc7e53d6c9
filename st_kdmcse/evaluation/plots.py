"""One look for all plots; no window, no global state."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from st_kdmcse.files import check_output_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555", "#b8a800")
"""Colours that people with colour-blindness can tell apart (Okabe and Ito), in the order of use."""
MARKERS = "osD^vP*X"
"""Markers in the order of use, so that a print in grey stays readable."""

_ENDINGS = (".png", ".svg", ".pdf")
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "savefig.dpi": 150,
}


def new_figure(columns: int = 1, rows: int = 1, width: float = 6.0, height: float = 4.0) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of axes.

    Args:
        columns: panels side by side.
        rows: panels one above the other.
        width: of a panel in inches.
        height: of a panel in inches.

    Returns:
        The figure, and its axes row by row.

    Raises:
        ImportError: without matplotlib; names the extra.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "st-kdmcse[evaluation]"') from error
    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type, unused-ignore]
        figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def check_plot(path: Path | None) -> None:
    """Refuse a plot that could not be written, before the work that it is to show.

    Args:
        path: the file; None for none.

    Raises:
        ImportError: without matplotlib; names the extra.
        ValueError: for an ending other than .png, .svg and .pdf, or a place that cannot be written to.
    """
    if path is None:
        return
    new_figure()
    if path.suffix.lower() not in _ENDINGS:
        raise ValueError(f"{path}: name a file that ends in {', '.join(_ENDINGS)}")
    check_output_file(path)


def elided(text: str, length: int) -> str:
    """A text in at most so many characters, without its middle: names often differ at their ends.

    Example:
        >>> elided("kdmcse-without-filter (margin 0.1)", 20)
        'kdmcse-wit…rgin 0.1)'
    """
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the ending of the path decides the format (.png, .svg, .pdf). Its folder is made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_STYLE["savefig.dpi"])
    return path


def html_image(figure: Figure, alt: str) -> str:
    """A figure as an HTML ``<img>`` element that needs no other file.

    Args:
        figure: the figure.
        alt: what it shows, for those who do not see it.
    """
    from html import escape

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_STYLE["savefig.dpi"])
    data: Any = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img alt="{escape(alt, quote=True)}" src="data:image/png;base64,{data}">'
