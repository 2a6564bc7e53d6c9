"""What the site does beyond its plugins: formulas become MathML, which needs no scripts, and results are published."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Replace the formulas of a page."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    formula = html.unescape(found[2]).strip()[2:-2].strip()
    return convert(formula, display="block" if found[1] == "div" else "inline")


def on_files(files: Files, config: MkDocsConfig, **kwargs: Any) -> Files:
    """Put the figures of the benchmarks on the site, as ``results/``."""
    folder = Path(config.docs_dir).parent / "benchmarks" / "results"
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = f"results/{path.relative_to(folder).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
