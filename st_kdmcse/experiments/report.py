"""The report of a comparison: Markdown with plots, one HTML page, and JSON."""

# ruff: noqa: RUF001 - true minus and times signs in what people read

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from st_kdmcse.data.sts import STS_TASKS
from st_kdmcse.evaluation.plots import new_figure
from st_kdmcse.experiments.comparison import AVERAGE, PRESENT, SIGNIFICANCE, Comparison, Pair
from st_kdmcse.experiments.document import (
    Block,
    Bullets,
    DataTable,
    Heading,
    Paragraph,
    Plot,
    save_plots,
    to_html,
    to_markdown,
)
from st_kdmcse.experiments.figures import curves_figure, margin_figure, margin_of, measure_of, scores_figure
from st_kdmcse.experiments.runs import Run, differing_settings
from st_kdmcse.experiments.statistics import Summary, summarize
from st_kdmcse.files import atomic_file, write_json
from st_kdmcse.provenance import provenance

_DASH = "–"


def write_report(comparison: Comparison, output: str | Path, title: str = "Comparison of methods") -> str:
    """Write ``report.md`` with ``plots/*.png``, ``report.html`` and ``report.json``.

    Args:
        comparison: from :func:`~st_kdmcse.experiments.comparison.compare_runs`.
        output: folder; it is made.
        title: of the report.

    Returns:
        The warnings and the tables of scores as Markdown, for the terminal.
    """
    return _write(comparison, output, title, list(_blocks(comparison)))


def write_sweep_report(comparison: Comparison, output: str | Path) -> str:
    """Like :func:`write_report`, for runs that differ in the margin: with the score against the margin (Figure 7).

    Args:
        comparison: of runs of one method with several margins.
        output: folder; it is made.

    Raises:
        ValueError: if a run has no margin, or two groups of runs have the same.
    """
    margins = [margin_of(row.group) for row in comparison.rows]
    if len(set(margins)) < len(margins):
        raise ValueError("two groups of runs have the same margin: a sweep differs in nothing else")
    best = max(comparison.rows, key=lambda row: row.dev["best"].mean if row.dev["best"] else -np.inf)
    blocks: list[Block] = [
        Heading("Score against the margin"),
        Plot(
            "margin", margin_figure(comparison), "Spearman against the margin of AdapACSE, mean and spread over seeds"
        ),
    ]
    if best.dev["best"]:
        blocks.append(
            Paragraph(
                f"The margin with the highest mean on STS-B dev is **{margin_of(best.group):g}** radians "
                f"({cell(best.dev['best'])}). Choose a margin on STS-B dev: the score of a margin that was chosen on "
                "the test tasks is too high."
            )
        )
    return _write(comparison, output, "Margin sweep", [*blocks, *_blocks(comparison)])


def check_output(output: str | Path) -> None:
    """Check that a report can be written, before the work for it is done.

    Args:
        output: the folder that the report will go to.

    Raises:
        ValueError: if it is a file, or in one.
        ImportError: without matplotlib; names the extra.
    """
    output = Path(output)
    there = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not there.is_dir():
        what = "is a file" if there == output else f"cannot be made, {there} is a file"
        raise ValueError(f"`output` {output} {what}: name a folder for the report")
    new_figure()


def _write(comparison: Comparison, output: str | Path, title: str, blocks: Sequence[Block]) -> str:
    output = Path(output)
    check_output(output)
    document = [Heading(title, 1), *blocks]
    save_plots(document, output)
    for name, text in (("report.md", to_markdown(document)), ("report.html", to_html(document, title))):
        with atomic_file(output / name) as file:
            file.write(text)
    write_json(output / "report.json", _json(comparison))
    return to_markdown([*_notes(comparison), *_score_tables(comparison)]).rstrip()


def _blocks(comparison: Comparison) -> Iterator[Block]:
    yield from _notes(comparison)
    yield Heading("Scores")
    yield from _score_tables(comparison)
    yield Plot("scores", scores_figure(comparison), f"{measure_of(comparison)}: each seed, and the mean of each method")
    yield Heading("Methods compared in pairs")
    yield from _pair_blocks(comparison)
    if any(run.curve for run in comparison.runs):
        yield Heading("Training curves")
        yield Plot(
            "curves", curves_figure(comparison), "STS-B dev against the training step, mean and spread over seeds"
        )
    yield Heading("Cost of training")
    yield from _cost(comparison)
    yield Heading("Settings and provenance")
    yield from _provenance(comparison)


def _notes(comparison: Comparison) -> Iterator[Block]:
    for warning in comparison.warnings:
        yield Paragraph(warning, warning=True)
    if comparison.left_out:
        yield Paragraph("Left out:")
        yield Bullets(comparison.left_out)


def _score_tables(comparison: Comparison) -> Iterator[Block]:
    rows = comparison.rows
    has_all = all(row.best[AVERAGE] for row in rows)
    yield Paragraph(
        "Spearman × 100 of the cosine, mean ± standard deviation over seeds (n − 1), of the checkpoint that is best on "
        "STS-B dev; the highest mean of a column is bold."
        + ("" if comparison.tasks else " The STS-B column is the test score of the training itself.")
        + ("" if has_all else f" {_DASH} stands for a task whose data were not there.")
    )
    others = [name for name in comparison.tasks if name not in STS_TASKS]
    columns = [*STS_TASKS, AVERAGE, *others, *([] if has_all and not others else [PRESENT])]
    cells = [_column([row.best[name] for row in rows]) for name in columns]
    yield DataTable(
        ["method", "seeds", *columns],
        [[row.group.label, str(len(row.group.runs)), *scores] for row, *scores in zip(rows, *cells, strict=True)],
    )
    yield Paragraph("Best and last checkpoint side by side:")
    pairs = [
        ("STS-B dev", [row.dev["best"] for row in rows], [row.dev["last"] for row in rows]),
        ("mean of the tasks", [row.best[PRESENT] for row in rows], [row.last[PRESENT] for row in rows]),
    ]
    shown = pairs if comparison.tasks else pairs[:1]
    header = [f"{name}, {which}" for name, *_ in shown for which in ("best", "last", "last − best")]
    yield DataTable(
        ["method", *header],
        [
            [
                row.group.label,
                *(cell for _, best, last in shown for cell in _best_and_last(best[number], last[number])),
            ]
            for number, row in enumerate(rows)
        ],
    )
    yield Paragraph("On STS-B dev the best checkpoint is at least as good by definition: it was chosen there.")


def _pair_blocks(comparison: Comparison) -> Iterator[Block]:
    if not comparison.pairs:
        yield Paragraph("There is one method only, or no score to compare.")
        return
    yield Paragraph(
        f"Compared is the {measure_of(comparison)} of the best checkpoint. Two questions, each two-sided: would the "
        "difference show with other **seeds** (independent t-test; Welch's beside it does not assume equal "
        "variances), and with other **sentence pairs** (paired bootstrap: the same resampled pairs for all models, the "
        f"runs as they are). In brackets is p after Holm's correction for the {len(comparison.pairs)} pairs of "
        f"methods; Welch's p is not corrected. The words follow the corrected p at {SIGNIFICANCE}. “No difference "
        "shown” does not mean that the methods are equal: few seeds show only large differences."
    )
    smallest = 2 * len(comparison.pairs) / (comparison.replicates + 1)
    if not comparison.replicates:
        yield Paragraph("There was no bootstrap: it needs the STS tasks, and at least one replicate.")
    elif smallest > SIGNIFICANCE:
        yield Paragraph(
            f"For {len(comparison.pairs)} pairs of methods, {comparison.replicates:,} replicates are too few: the "
            f"corrected p of the smallest possible one is {min(1, smallest):.3f}. Give more."
        )
    yield DataTable(
        ["first − second", "difference", "t-test p", "Welch p", "bootstrap 95 % interval", "bootstrap p"],
        [_pair_row(pair) for pair in comparison.pairs],
    )
    yield DataTable(
        ["pair", "over seeds", "over sentence pairs"],
        [[f"{pair.first} and {pair.second}", pair.over_seeds, pair.over_pairs] for pair in comparison.pairs],
        text=True,
    )


def _cost(comparison: Comparison) -> Iterator[Block]:
    yield DataTable(
        ["method", "steps", "seconds a run", "seconds a step"],
        [
            [
                row.group.label,
                f"{row.group.runs[0].summary['steps']:,}",
                cell(row.seconds, 1),
                cell(summarize([run.summary["train_seconds"] / run.summary["steps"] for run in row.group.runs]), 3),
            ]
            for row in comparison.rows
        ],
    )
    text = "Training time with evaluation on STS-B dev, without loading."
    resumed = [name for name, run in _names(comparison.runs).items() if run.summary.get("resumed")]
    if resumed:
        text += f" Of resumed runs only the last part is counted: {', '.join(resumed)}."
    yield Paragraph(text)


def _provenance(comparison: Comparison) -> Iterator[Block]:
    runs = [row.group.runs[0] for row in comparison.rows]
    names = dict.fromkeys(name for run in runs for name in run.settings)
    differing = [name for name in differing_settings(runs) if name != "method"]
    yield Paragraph("The same for all:")
    shared = [name for name in names if name not in ("method", *differing)]
    yield Bullets([f"{name.replace('_', ' ')}: {setting_text(runs[0], name)}" for name in shared])
    if differing:
        yield DataTable(
            ["method", *(name.replace("_", " ") for name in differing)],
            [
                [row.group.label, *(setting_text(run, name) for name in differing)]
                for row, run in zip(comparison.rows, runs, strict=True)
            ],
            text=True,
        )
    yield DataTable(
        ["run", "method", "seed", "best step", "device", "date"],
        [
            [
                name,
                str(run.summary["method"]),
                str(run.seed),
                str((run.summary["sts_dev_best"] or {}).get("step", _DASH)),
                str(run.summary.get("device", _DASH)),
                str(run.summary.get("date", _DASH)),
            ]
            for name, run in _names(comparison.runs).items()
        ],
        text=True,
    )
    if comparison.tasks:
        yield DataTable(
            ["task", "pairs", "sha256"],
            [[name, f"{task['pairs']:,}", f"`{task['sha256'][:16]}`"] for name, task in comparison.tasks.items()],
            text=True,
        )
    if comparison.replicates:
        yield Paragraph(f"Bootstrap: {comparison.replicates:,} replicates, seed {comparison.seed}.")
    versions: dict[str, list[str]] = {}
    for run in comparison.runs:
        for library, version in run.summary["versions"].items():
            if version not in versions.setdefault(library, []):
                versions[library].append(version)
    text = ", ".join(f"{library} {' and '.join(found)}" for library, found in versions.items())
    yield Paragraph(f"Trained with {text}.")


def _json(comparison: Comparison) -> dict[str, Any]:
    names = {run.folder: name for name, run in _names(comparison.runs).items()}
    methods = [
        {
            "label": row.group.label,
            "settings": {name: plain_setting(name, value) for name, value in row.group.runs[0].settings.items()},
            "best": _summaries(row.best),
            "last": _summaries(row.last),
            "sts_dev": _summaries(row.dev),
            "train_seconds": row.seconds._asdict(),
            "runs": [
                {
                    "folder": names[run.folder],
                    "seed": run.seed,
                    "best": row.each["best"][number],
                    "last": row.each["last"][number],
                    "sts_dev": {"best": run.dev_score("best"), "last": run.dev_score("last")},
                    "sts_dev_curve": [{"step": step, "spearman": round(score, 2)} for step, score in run.curve],
                    "train_seconds": run.summary["train_seconds"],
                    "device": run.summary.get("device"),
                    "date": run.summary.get("date"),
                    "versions": run.summary["versions"],
                }
                for number, run in enumerate(row.group.runs)
            ],
        }
        for row in comparison.rows
    ]
    pairs = [
        {**asdict(pair), "over_seeds": pair.over_seeds, "over_sentence_pairs": pair.over_pairs}
        for pair in comparison.pairs
    ]
    return {
        "scale": "Spearman x 100",
        "compared": measure_of(comparison),
        "methods": methods,
        "pairs": pairs,
        "tasks": comparison.tasks,
        "bootstrap_replicates": comparison.replicates,
        "warnings": comparison.warnings,
        "left_out": comparison.left_out,
        **provenance(
            data_sha256={name: task["sha256"] for name, task in comparison.tasks.items()}, seed=comparison.seed
        ),
    }


def _summaries(scores: Mapping[Any, Summary | None]) -> dict[str, Any]:
    return {name: score._asdict() if score else None for name, score in scores.items()}


def _pair_row(pair: Pair) -> list[str]:
    interval = _DASH if pair.low is None or pair.high is None else f"{pair.low:+.2f} to {pair.high:+.2f}"
    return [
        f"{pair.first} − {pair.second}",
        f"{pair.difference:+.2f}",
        p_cell(pair.t_test, pair.t_test_holm),
        p_cell(pair.welch),
        interval,
        p_cell(pair.bootstrap, pair.bootstrap_holm),
    ]


def p_cell(p: float | None, corrected: float | None = None) -> str:
    """A p value as text, with the corrected one in brackets if there is one."""
    if p is None:
        return _DASH
    return _small(p) if corrected is None else f"{_small(p)} ({_small(corrected)})"


def _small(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def cell(score: Summary | None, digits: int = 2) -> str:
    """A score as text: mean and standard deviation."""
    if score is None:
        return _DASH
    return f"{score.mean:.{digits}f}" + ("" if score.std is None else f" ± {score.std:.{digits}f}")


def _column(scores: Sequence[Summary | None]) -> list[str]:
    """Cells of a column; the highest mean is bold, unless there is nothing to compare it with."""
    known = [round(score.mean, 2) for score in scores if score]
    return [
        f"**{cell(score)}**" if score and len(known) > 1 and round(score.mean, 2) == max(known) else cell(score)
        for score in scores
    ]


def _best_and_last(best: Summary | None, last: Summary | None) -> list[str]:
    difference = f"{last.mean - best.mean:+.2f}" if best and last else _DASH
    return [cell(best), cell(last), difference]


def _names(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by folder, as far as the folders differ: a report does not show where on a machine they were."""
    folders = [run.folder.resolve() for run in runs]
    root = os.path.commonpath([folder.parent for folder in folders])
    return {str(folder.relative_to(root)): run for folder, run in zip(folders, runs, strict=True)}


def setting_text(run: Run, name: str) -> str:
    """A setting of a run as text."""
    value = plain_setting(name, run.setting(name))
    if value is None:
        return "default" if name in run.settings else _DASH
    return str(value)


def plain_setting(name: str, value: Any) -> Any:
    """A setting without the place on a machine where a model was."""
    return Path(value).name if name == "model" and Path(value).is_absolute() else value
