"""The numbers of a comparison and the report, of runs whose records are written here."""

# ruff: noqa: RUF001

import itertools
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from scipy.stats import ttest_ind
from small_runs import write_summary

from st_kdmcse.experiments.comparison import PRESENT, compare_runs
from st_kdmcse.experiments.document import Bullets, DataTable, Heading, Paragraph, to_html, to_markdown
from st_kdmcse.experiments.figures import curves_figure, margin_figure, scores_figure
from st_kdmcse.experiments.report import check_output, write_report, write_sweep_report
from st_kdmcse.experiments.runs import find_runs, group_runs, read_run


@pytest.fixture
def root(tmp_path):
    """Three seeds of two methods that differ much, and two of a third."""
    for seed, shift in enumerate((0.0, 0.01, 0.02)):
        write_summary(tmp_path / f"a/seed-{seed}", "kdmcse", seed, best=0.80 + shift, last=0.79, test=0.90 + shift)
        write_summary(tmp_path / f"b/seed-{seed}", "mcse", seed, best=0.70 + shift, last=0.69, test=0.60 + shift)
    write_summary(tmp_path / "c/seed-0", "simcse", 0, test=0.905)
    write_summary(tmp_path / "c/seed-1", "simcse", 1, test=0.915)
    return tmp_path


def compare(*places, **options):
    found = find_runs(places)
    return compare_runs(found.runs, left_out=found.left_out, **options)


class Page(HTMLParser):
    """What a page refers to, and its tags in balance."""

    def __init__(self):
        super().__init__()
        self.open, self.references, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "link", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_scores_over_seeds(root):
    rows = {row.group.label: row for row in compare(root).rows}
    assert list(rows) == ["kdmcse", "mcse", "simcse"]
    assert rows["kdmcse"].compared == [90.0, 91.0, 92.0]
    assert rows["kdmcse"].best["STS-B"] == (pytest.approx(91), pytest.approx(1), 3)
    assert rows["kdmcse"].best["STS12"] is rows["kdmcse"].best["Avg."] is None
    assert rows["kdmcse"].dev["last"].mean == pytest.approx(79)
    assert rows["simcse"].best[PRESENT].n == 2


def test_pairs(root):
    pairs = {(pair.first, pair.second): pair for pair in compare(root).pairs}
    assert len(pairs) == 3
    far, near = pairs["kdmcse", "mcse"], pairs["kdmcse", "simcse"]
    assert far.difference == pytest.approx(30)
    assert far.t_test == pytest.approx(ttest_ind([90, 91, 92], [60, 61, 62]).pvalue)
    assert far.t_test_holm == pytest.approx(3 * far.t_test)
    assert far.over_seeds == "kdmcse higher"
    assert pairs["mcse", "simcse"].over_seeds == "simcse higher"
    assert near.over_seeds == "no difference shown"
    assert near.over_pairs == "not tested"
    assert near.bootstrap is near.low is None


def test_one_seed_is_not_tested(root):
    (pair,) = compare(root / "a/seed-0", root / "b/seed-0").pairs
    assert pair.t_test is pair.welch is None
    assert pair.over_seeds == "not tested"


def test_groups_are_told_apart_by_what_differs(tmp_path):
    write_summary(tmp_path / "0", options={"config": {"margin": 0.2}})
    write_summary(tmp_path / "1", options={"config": {"margin": 0.125}})
    write_summary(tmp_path / "2", seed=1)  # 0.125 is the recipe's
    write_summary(tmp_path / "3", "mcse")
    groups = group_runs(find_runs([tmp_path]).runs)
    assert [(group.label, group.seeds) for group in groups] == [
        ("kdmcse (margin 0.2)", [0]),
        ("kdmcse (margin 0.125)", [0, 1]),
        ("mcse", [0]),
    ]
    named = group_runs(find_runs([f"ours={tmp_path / '0'}", f"theirs={tmp_path / '1'}"]).runs)
    assert [group.label for group in named] == ["ours", "theirs"]


def test_warnings(root, tmp_path):
    assert compare(root / "a", root / "b").warnings == []
    assert "seeds" in compare(root).warnings[0]
    other = write_summary(tmp_path / "x", "mcse", data_sha256={"text": "c" * 64}, options={"model": "other"}, steps=20)
    serious, care = compare(root / "a/seed-0", other).warnings
    assert serious.startswith("The runs are not comparable")
    assert re.search(r"model \(/somewhere/models/tiny, other\), .*text data \(aaaaaaaaaaaa, cccccccccccc\)", serious)
    assert "steps (10, 20)" in care
    again = write_summary(tmp_path / "y", "mcse", seed=0)
    assert any("seed 0 occurs more than once" in text for text in compare(root / "b", again).warnings)


def test_find_runs_looks_into_folders_but_not_into_runs(root):
    write_summary(root / "a/seed-0/last")
    write_summary(root / "a/seed-0/checkpoints/checkpoint-5")
    (root / "d").mkdir()
    (root / "d/run.json").write_text("{}")
    found = find_runs([root, root / "a/seed-1"])
    assert len(found.runs) == 8
    assert found.left_out == [f"{root / 'd'} is not finished: it has no training_summary.json"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "damaged"),
        ("{}", "damaged"),
        ("[]", "damaged"),
        ("NaN", "not a number"),
    ],
)
def test_a_damaged_summary_is_named(tmp_path, content, message):
    path = write_summary(tmp_path / "run") / "training_summary.json"
    path.write_text(path.read_text().replace("0.77", "NaN") if content == "NaN" else content)
    with pytest.raises(ValueError, match=f"run/training_summary.json.*{message}"):
        read_run(path.parent)


def test_folders_without_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*absent"):
        find_runs([tmp_path / "absent"])
    with pytest.raises(ValueError, match="holds no finished run: name the folder"):
        find_runs([tmp_path])
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no finished run \(.* is not finished"):
        find_runs([tmp_path])


@pytest.mark.parametrize("place", ["ours=", "=a"])
def test_half_a_label(tmp_path, place):
    with pytest.raises(ValueError, match=f"{place}: give LABEL=FOLDER"):
        find_runs([place])


def test_a_run_has_one_label(root):
    assert len(find_runs([f"ours={root / 'a'}", f"ours={root / 'a/seed-0'}"]).runs) == 3
    with pytest.raises(ValueError, match="seed-0 is named twice, as ours and as theirs"):
        find_runs([f"ours={root / 'a'}", f"theirs={root / 'a'}"])
    with pytest.raises(ValueError, match="seed-0 is named twice, without a label and as ours"):
        find_runs([root, f"ours={root / 'a/seed-0'}"])


@pytest.mark.parametrize(
    ("options", "changes", "label"),
    [
        ({"text_column": "title"}, {}, "text column title"),
        ({}, {"bf16": True}, "bf16 True"),
        ({"config": {"temperature": 0.1 + 0.2}}, {}, "temperature 0.3"),
        ({}, {"data_sha256": {"text": "a" * 64, "features": "b" * 64, "sts-dev": "c" * 64}}, "sts-dev data cccccc"),
    ],
)
def test_what_decides_the_result_makes_another_group(tmp_path, options, changes, label):
    write_summary(tmp_path / "0")
    write_summary(tmp_path / "1", seed=1, options=options, **changes)
    first, second = group_runs(find_runs([tmp_path]).runs)
    assert first.label.startswith("kdmcse (")
    assert f"({label}" in second.label


def test_runs_without_any_score(tmp_path):
    never = {"sts_dev_before": None, "sts_dev_curve": [], "sts_dev_best": None, "sts_dev_last": None}
    write_summary(tmp_path, sts_test_of_best=None, **never)
    with pytest.raises(ValueError, match="without evaluation: give a SentEval folder as `data_dir`"):
        compare(tmp_path)


def test_report(root, tmp_path):
    output = tmp_path / "report"
    tables = write_report(compare(root), output, "Methods & seeds")
    markdown = (output / "report.md").read_text()
    assert all(block in markdown for block in tables.split("\n\n"))
    assert "| kdmcse | 3 | – | – | – | – | – | **91.00 ± 1.00** | – | – | **91.00 ± 1.00** |" in markdown
    assert "| kdmcse | 81.00 ± 1.00 | 79.00 ± 0.00 | -2.00 |" in markdown
    assert "| kdmcse and simcse | no difference shown | not tested |" in markdown
    for link in re.findall(r"\((plots/.+?)\)", markdown):
        assert (output / link).read_bytes().startswith(b"\x89PNG")
    page = Page()
    page.feed((output / "report.html").read_text())
    assert page.open == []
    assert len(page.references) == 2
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "Methods & seeds" in page.text
    assert "91.00 ± 1.00" in page.text
    content = json.loads((output / "report.json").read_text())
    assert content["methods"][0]["best"]["STS-B"] == {"mean": 91.0, "std": pytest.approx(1), "n": 3}
    assert content["methods"][0]["runs"][1]["best"]["STS-B"] == 91.0
    assert content["pairs"][0]["over_seeds"] == "kdmcse higher"
    assert content["seed"] == 0
    assert "/somewhere" not in markdown + json.dumps(content)
    assert str(tmp_path) not in markdown + json.dumps(content)


def test_report_of_one_run_names_what_was_left_out(root, tmp_path):
    (root / "d").mkdir()
    (root / "d/run.json").write_text("{}")
    found = find_runs([root / "a/seed-0"])
    comparison = compare_runs(found.runs, left_out=["d is not finished"])
    write_report(comparison, tmp_path / "report")
    markdown = (tmp_path / "report/report.md").read_text()
    assert "- d is not finished" in markdown
    assert "| kdmcse | 1 | – | – | – | – | – | 90.00 | – | – | 90.00 |" in markdown
    assert "one method only" in markdown


def test_settings_show_what_a_method_has(tmp_path):
    write_summary(tmp_path / "0", "kdmcse", options={"config": {"margin": 0.2}})
    write_summary(tmp_path / "1", "kdmcse-without-adapacse")
    write_summary(tmp_path / "2", "simcse")
    write_report(compare(tmp_path), tmp_path / "report")
    markdown = (tmp_path / "report/report.md").read_text()
    assert "| method | margin |" in markdown
    assert "| kdmcse | 0.2 |" in markdown
    assert "| kdmcse-without-adapacse | 0.0 |" in markdown
    assert "| simcse | – |" in markdown


def test_a_file_in_the_place_of_the_report(root, tmp_path):
    (tmp_path / "report").touch()
    with pytest.raises(ValueError, match="is a file: name a folder"):
        write_report(compare(root), tmp_path / "report")
    with pytest.raises(ValueError, match=r"cannot be made, .*/report is a file"):
        check_output(tmp_path / "report/of/today")
    check_output(tmp_path / "of/today")


def test_a_report_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plots need matplotlib"):
        check_output(tmp_path / "report")


def test_tiny_p_values_are_not_zero(tmp_path):
    for seed in range(3):
        write_summary(tmp_path / f"a/{seed}", "kdmcse", seed, test=0.9 + 0.001 * seed)
        write_summary(tmp_path / f"b/{seed}", "mcse", seed, test=0.5 + 0.001 * seed)
    write_report(compare(tmp_path), tmp_path / "report")
    assert "| +40.00 | <0.001 (<0.001) | <0.001 |" in (tmp_path / "report/report.md").read_text()


def test_long_labels_do_not_overlap(tmp_path):
    for number in range(14):
        config = {"temperature": 0.05 + number / 100, "multimodal_weight": 0.1 + number}
        options = {"config": config, "max_seq_length": 20 + number, "model": f"organisation/encoder-number-{number}"}
        write_summary(tmp_path / str(number), "kdmcse-without-adapacse", test=0.7 + number / 100, options=options)
    figure = scores_figure(compare(tmp_path))
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert len(boxes) == 14
    assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(boxes))


def test_curves_show_mean_and_band(root):
    (axes,) = curves_figure(compare(root)).axes
    line = axes.get_lines()[0]
    np.testing.assert_allclose(line.get_xdata(), [0, 5, 10])
    np.testing.assert_allclose(line.get_ydata(), [70, 81, 79])
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(70)
    assert band[:, 1].max() == pytest.approx(82)
    looks = {(each.get_color(), each.get_marker()) for each in axes.get_lines()}
    assert len(looks) == 3


def test_sweep_marks_the_highest_mean(tmp_path):
    for margin, best, test in ((0.025, 0.80, 0.75), (0.125, 0.82, 0.76), (0.225, 0.81, 0.77)):
        write_summary(tmp_path / f"{margin}", options={"config": {"margin": margin}}, best=best, test=test)
    comparison = compare(tmp_path)
    dev, other = margin_figure(comparison).axes
    np.testing.assert_allclose(dev.get_lines()[-1].get_xydata(), [[0.125, 82]])
    np.testing.assert_allclose(other.get_lines()[-1].get_xydata(), [[0.225, 77]])
    assert "radians" in dev.get_xlabel()
    write_sweep_report(comparison, tmp_path / "report")
    assert "highest mean on STS-B dev is **0.125** radians (82.00)" in (tmp_path / "report/report.md").read_text()
    write_summary(tmp_path / "twice", "kdmcse-without-filter")
    with pytest.raises(ValueError, match="the same margin"):
        write_sweep_report(compare(tmp_path), tmp_path / "report")


def test_document_in_both_formats():
    blocks = [
        Heading("A < B", 1),
        Paragraph("see `x` and **y**", warning=True),
        Bullets(["one"]),
        DataTable(["name", "value"], [["a|b", "<1>"]]),
    ]
    markdown = to_markdown(blocks)
    assert "# A < B" in markdown
    assert "> **Warning.** see" in markdown
    assert "| a&#124;b | <1> |" in markdown
    html = to_html(blocks, "A < B")
    assert "<h1>A &lt; B</h1>" in html
    assert '<p class="warning"><strong>Warning.</strong> see <code>x</code> and <strong>y</strong></p>' in html
    assert "<td>a|b</td><td>&lt;1&gt;</td>" in html
