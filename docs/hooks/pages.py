"""What the site does beyond its plugins: formulas as MathML, results, the command line, messages."""

from __future__ import annotations

import ast
import html
import re
import zlib
from collections.abc import Iterator
from importlib import import_module
from inspect import ismodule
from pathlib import Path
from typing import Any

import click
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from st_kdmcse.cli.main import main

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(.*?)</\1>', re.DOTALL)


def on_page_content(content: str, **kwargs: Any) -> str:
    """Replace the formulas of a page."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    formula = html.unescape(found[2]).strip()[2:-2].strip()
    mathml: str = convert(formula, display="block" if found[1] == "div" else "inline")
    return mathml


def on_files(files: Files, config: MkDocsConfig, **kwargs: Any) -> Files:
    """Put the figures of the benchmarks on the site, as ``results/``."""
    folder = Path(config.docs_dir).parent / "benchmarks" / "results"
    for path in sorted(each for each in folder.rglob("*") if each.is_file()):
        name = f"results/{path.relative_to(folder).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    files.append(File.generated(config, "messages.md", content=_messages(folder.parents[1] / "st_kdmcse")))
    files.append(File.generated(config, "index.md", content=_home(folder.parents[1] / "README.md")))
    files.append(File.generated(config, "cli.md", content="".join(_commands("st-kdmcse", main))))
    return files


def _home(readme: Path) -> str:
    """The README with links that lead to the pages of the site."""
    text = readme.read_text(encoding="utf-8")
    for link, page in (
        ("(docs/tutorials)", "(tutorials/own_images.ipynb)"),
        ("(docs/", "("),
        ("(benchmarks/", "("),
        ("(CHANGELOG.md)", "(changelog.md)"),
        ("(CONTRIBUTING.md)", "(contributing.md)"),
    ):
        text = text.replace(link, page)
    return text


def _commands(name: str, command: click.Command, parent: click.Context | None = None) -> Iterator[str]:
    """The help of a command and of those below it, as the terminal shows it."""
    context = click.Context(command, parent, info_name=name.rpartition(" ")[2], terminal_width=84)
    if parent is None:
        yield "# Command line\n\nWhat `--help` says, command by command.\n"
    yield f"\n## {name}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for below in command.list_commands(context):
            found = command.get_command(context, below)
            assert found is not None
            yield from _commands(f"{name} {below}", found, context)


def _messages(package: Path) -> str:
    """All error messages of the package, by module."""
    lines = ["# List of messages\n", "What is different each time is written as …\n"]
    for path in sorted(package.rglob("*.py")):
        found = dict.fromkeys(filter(None, map(_message, ast.walk(ast.parse(path.read_text(encoding="utf-8"))))))
        if found:
            lines.append(f"\n## {path.relative_to(package).as_posix()}\n")
            lines += [f"- {html.escape(message)}" for message in found]
    return "\n".join(lines)


def _message(node: ast.AST) -> str | None:
    """The text of a ``raise``; None if there is none."""
    if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
        return None
    parts = getattr(node.exc.args[0], "values", [node.exc.args[0]])
    texts = [part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else "…" for part in parts]
    text = " ".join("".join(texts).split())
    return text if len(text.replace("…", "").split()) > 2 else None


def on_post_build(config: MkDocsConfig, **kwargs: Any) -> None:
    """Refuse a site that lacks a public name."""
    inventory = (Path(config.site_dir) / "objects.inv").read_bytes().split(b"\n", 4)[4]
    documented = {line.split(" ")[0] for line in zlib.decompress(inventory).decode().splitlines()}
    parts = ("data", "evaluation", "extraction", "functional", "losses", "search", "teachers", "training")
    missing = []
    for module in map(import_module, ("st_kdmcse", *(f"st_kdmcse.{part}" for part in parts))):
        for name in module.__all__:
            public = getattr(module, name)
            origin = f"{getattr(public, '__module__', '')}.{name}"  # a function may have the name of its module
            if not ({f"{module.__name__}.{name}", origin} & documented or ismodule(public) or name == "__version__"):
                missing.append(f"{module.__name__}.{name}")
    if missing:
        raise PluginError(f"public names that are on no page of docs/api: {', '.join(missing)}")
