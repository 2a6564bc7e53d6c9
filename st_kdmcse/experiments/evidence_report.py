"""The report of the grounding experiment, in Markdown and JSON."""

# ruff: noqa: RUF001 - true minus and times signs in what people read

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from st_kdmcse.experiments.document import Block, Bullets, DataTable, Heading, Paragraph, to_markdown
from st_kdmcse.experiments.evidence import PRIMARY, ArmScores, Evidence, Outcome
from st_kdmcse.experiments.report import cell, p_cell, plain_setting, setting_text
from st_kdmcse.experiments.runs import Run, differing_settings
from st_kdmcse.experiments.statistics import PairedDifference, summarize
from st_kdmcse.files import atomic_file, write_json
from st_kdmcse.provenance import provenance

_DASH = "–"


def write_evidence(evidence: Evidence, output: str | Path) -> str:
    """Write ``report.md`` and ``report.json``.

    Args:
        evidence: from :func:`~st_kdmcse.experiments.evidence.gather_evidence`.
        output: folder; it is made.

    Returns:
        The tables of scores and contrasts as Markdown, for the terminal.
    """
    output = Path(output)
    with atomic_file(output / "report.md") as file:
        file.write(to_markdown(list(_blocks(evidence))))
    write_json(output / "report.json", _json(evidence))
    return to_markdown([*_scores(evidence), *_tests(evidence)]).rstrip()


def _blocks(evidence: Evidence) -> Iterator[Block]:
    names = ", ".join(task.name for task in evidence.tasks)
    yield Heading("Grounding: arms compared seed by seed", 1)
    yield Paragraph(
        f"Spearman × 100 of the last step, in float32; nothing was chosen on these data. The primary measure is the "
        f"mean of {names}. Captions and general are means over the pairs of each kind, task by task."
    )
    if evidence.left_out:
        yield Paragraph("Left out:", warning=True)
        yield Bullets(evidence.left_out)
    yield Heading("Scores")
    yield from _scores(evidence)
    yield Heading("Seed by seed")
    yield from _by_seed(evidence)
    yield from _tests(evidence)
    yield Heading("Where the differences are")
    yield from _by_measure(evidence)
    yield Heading("Cost")
    yield from _cost(evidence)
    yield Heading("Settings and provenance")
    yield from _settings(evidence)


def _scores(evidence: Evidence) -> Iterator[Block]:
    yield Paragraph("Mean ± standard deviation over seeds (n − 1):")
    before = ["before training", _DASH, *(f"{score:.2f}" for score in evidence.before.values())]
    rows = [
        [arm.arm.title, str(len(arm.runs)), *(cell(summarize(arm.scores[name])) for name in evidence.measures)]
        for arm in evidence.arms
    ]
    yield DataTable(["arm", "seeds", *evidence.measures], [before, *rows])


def _by_seed(evidence: Evidence) -> Iterator[Block]:
    seeds = sorted({seed for arm in evidence.arms for seed in arm.seeds})
    yield Paragraph(f"The {PRIMARY} of each run:")
    rows = []
    for arm in evidence.arms:
        by_seed = dict(zip(arm.seeds, arm.scores[PRIMARY], strict=True))
        rows.append([arm.arm.title, *(f"{by_seed[seed]:.2f}" if seed in by_seed else _DASH for seed in seeds)])
    yield DataTable(["arm", *(f"seed {seed}" for seed in seeds)], rows)


def _tests(evidence: Evidence) -> Iterator[Block]:
    yield Heading("Contrasts")
    yield from _contrasts(evidence, evidence.tested)
    if evidence.options:
        yield Heading("One option at a time")
        yield from _contrasts(evidence, evidence.options)


def _contrasts(evidence: Evidence, family: Sequence[Outcome]) -> Iterator[Block]:
    if not family:
        yield Paragraph("No contrast has both of its arms.")
        return
    yield Paragraph(
        f"Paired t-tests over seeds of the {PRIMARY}, two-sided; in brackets is p after Holm's correction for the "
        f"contrasts of this table ({len(family)}), which the words follow at 0.05."
    )
    titles = {arm.name: arm.arm.title for arm in evidence.arms}
    rows = []
    for tested in family:
        difference = tested.differences[PRIMARY]
        first, second, expected = tested.contrast
        rows.append(
            [
                f"{titles[first]} − {titles[second]}",
                str(difference.n),
                f"> {expected:g}",
                f"{difference.mean:+.2f}",
                _interval(difference),
                p_cell(difference.p, tested.p_holm),
                tested.reading,
            ]
        )
    yield DataTable(["first − second", "seeds", "expected", "difference", "95 % interval", "p", "outcome"], rows)


def _by_measure(evidence: Evidence) -> Iterator[Block]:
    yield Paragraph("Differences with their 95 % intervals, not corrected:")
    names = [name for name in evidence.measures if name != PRIMARY]
    yield DataTable(
        ["first − second", *names],
        [
            [
                f"{tested.contrast.first} − {tested.contrast.second}",
                *(f"{tested.differences[name].mean:+.2f} ({_interval(tested.differences[name])})" for name in names),
            ]
            for tested in (*evidence.tested, *evidence.options)
        ],
    )


def _cost(evidence: Evidence) -> Iterator[Block]:
    reference = summarize(evidence.arms[0].seconds).mean
    yield DataTable(
        ["arm", "seconds a step", f"ratio to {evidence.arms[0].name}"],
        [
            [arm.arm.title, cell(summarize(arm.seconds), 3), f"{summarize(arm.seconds).mean / reference:.3f}"]
            for arm in evidence.arms
        ],
    )
    resumed = [f"{arm.name}, seed {run.seed}" for arm in evidence.arms for run in arm.runs if run.summary["resumed"]]
    if resumed:
        yield Paragraph(f"Of resumed runs only the last part is counted: {'; '.join(resumed)}.")


def _settings(evidence: Evidence) -> Iterator[Block]:
    runs = [arm.runs[0] for arm in evidence.arms]
    differing = differing_settings(runs)
    yield DataTable(
        ["arm", "method", "config", "options"],
        [
            [arm.arm.title, arm.arm.method, *(_listed(each) for each in (arm.arm.config, arm.arm.options))]
            for arm in evidence.arms
        ],
        text=True,
    )
    yield Paragraph("The same for all:")
    shared = [name for name in runs[0].settings if name not in differing]
    yield Bullets([f"{name.replace('_', ' ')}: {setting_text(runs[0], name)}" for name in shared])
    excluded = runs[0].summary.get("excluded")
    if excluded:
        yield Paragraph(f"Left out were {excluded['images']} images with {excluded['captions']} captions.")
    yield Paragraph(f"Teacher: {runs[0].summary['teacher']}.")
    yield DataTable(
        ["task", "pairs", "sha256"],
        [[task.name, f"{len(task):,}", f"`{task.checksum[:16]}`"] for task in evidence.tasks],
        text=True,
    )
    versions = {f"{library} {version}": None for run in runs for library, version in run.summary["versions"].items()}
    devices = {str(run.summary["device"]): None for arm in evidence.arms for run in arm.runs}
    yield Paragraph(f"Trained on {', '.join(devices)}, with {', '.join(versions)}.")


def _json(evidence: Evidence) -> dict[str, Any]:
    return {
        "scale": "Spearman x 100 of the last step, in float32",
        "primary": PRIMARY,
        "before": evidence.before,
        "arms": [_arm(arm) for arm in evidence.arms],
        "contrasts": [_contrast(tested) for tested in evidence.tested],
        "options": [_contrast(tested) for tested in evidence.options],
        "left_out": evidence.left_out,
        **provenance(data_sha256={task.name: task.checksum for task in evidence.tasks}),
    }


def _arm(arm: ArmScores) -> dict[str, Any]:
    return {
        "name": arm.name,
        "title": arm.arm.title,
        "method": arm.arm.method,
        "config": dict(arm.arm.config),
        "options": dict(arm.arm.options),
        "settings": {name: plain_setting(name, value) for name, value in arm.runs[0].settings.items()},
        "seeds": arm.seeds,
        "scores": arm.scores,
        "seconds_a_step": arm.seconds,
        "peak_memory_mib": [_memory(run) for run in arm.runs],
    }


def _memory(run: Run) -> int | None:
    memory = run.summary["peak_memory_mib"]
    found: int | None = memory["device"] or memory["process"]
    return found


def _contrast(tested: Outcome) -> dict[str, Any]:
    return {
        **tested.contrast._asdict(),
        "differences": {name: difference._asdict() for name, difference in tested.differences.items()},
        "p_holm": tested.p_holm,
        "outcome": tested.reading,
    }


def _interval(difference: PairedDifference) -> str:
    return _DASH if difference.low is None else f"{difference.low:+.2f} to {difference.high:+.2f}"


def _listed(options: Any) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in options.items()) or _DASH
