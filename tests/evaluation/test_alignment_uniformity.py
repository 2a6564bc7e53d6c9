import json
import math
from itertools import combinations

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import WORDS, load_command, with_large_weights
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy.stats import spearmanr

from st_kdmcse.data import STSPairs, load_sts_benchmark
from st_kdmcse.evaluation.alignment_uniformity import (
    AlignmentUniformity,
    alignment_uniformity,
    plot_alignment_uniformity,
    table,
)


@pytest.fixture(scope="module")
def pairs():
    """60 distinct pairs, of which some are positive, of sentences that occur more than once."""
    generator = np.random.default_rng(3)
    sentences = [" ".join(generator.choice(WORDS, size=generator.integers(3, 9))) for _ in range(40)]
    drawn = generator.permutation(list(combinations(sentences, 2)))[:60]
    return STSPairs(
        drawn[:, 0].tolist(), drawn[:, 1].tolist(), [*generator.uniform(0, 5, size=58), 4.0, 3.999], "sts-dev"
    )


@pytest.fixture
def student(student):
    return with_large_weights(student)


def test_against_a_slow_loop(student, pairs):
    result = alignment_uniformity(student, pairs, "tiny")
    one, two = (
        np.stack([student.encode(sentence, normalize_embeddings=True).astype(np.float64) for sentence in column])
        for column in (pairs.sentences1, pairs.sentences2)
    )
    squared = [float(((a - b) ** 2).sum()) for a, b, gold in zip(one, two, pairs.scores, strict=True) if gold >= 4.0]
    points = [*one, *two]
    potentials = [
        math.exp(-2 * float(((points[i] - points[j]) ** 2).sum())) for i in range(120) for j in range(i + 1, 120)
    ]
    assert result.alignment == pytest.approx(np.mean(squared), abs=1e-5)
    assert result.uniformity == pytest.approx(math.log(np.mean(potentials)), abs=1e-5)
    assert result.spearman == pytest.approx(100 * spearmanr((one * two).sum(axis=1), pairs.scores).statistic, abs=0.05)
    assert (result.label, result.positives, result.sentences) == ("tiny", len(squared), 120)


def test_the_order_of_the_pairs_does_not_matter(student, pairs):
    order = np.random.default_rng(0).permutation(60)
    mixed = STSPairs(
        *([column[i] for i in order] for column in (pairs.sentences1, pairs.sentences2, pairs.scores)), "m"
    )
    one, other = (alignment_uniformity(student, each) for each in (pairs, mixed))
    assert (one.alignment, one.uniformity) == pytest.approx((other.alignment, other.uniformity), abs=1e-6)


def test_pairs_that_cannot_be_measured(student, pairs):
    with pytest.raises(ValueError, match="no pair with a gold similarity of 4 or more"):
        alignment_uniformity(student, STSPairs(pairs.sentences1, pairs.sentences2, [3.9] * 60, "sts-dev"))
    with pytest.raises(ValueError, match="all the same"):
        alignment_uniformity(student, STSPairs(pairs.sentences1, pairs.sentences2, [4.0] * 60, "sts-dev"))


def test_legend_labels_do_not_overlap_and_have_the_score():
    results = [
        AlignmentUniformity(f"a model with quite a long name of seed {n}", 0.1 + n / 1e6, -2.0, 70 + n, 10, 100)
        for n in range(20)
    ]
    figure = plot_alignment_uniformity(results)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    boxes = [text.get_window_extent() for text in axes.get_legend().get_texts()]
    assert len(boxes) == 20
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])
    assert all(figure.bbox.containsx(box.x1) and figure.bbox.containsy(box.y0) for box in boxes)
    assert all(
        f"{result.spearman:.2f}" in text.get_text()
        for result, text in zip(results, axes.get_legend().texts, strict=True)
    )
    looks = {
        (tuple(points.get_facecolor()[0]), points.get_paths()[0].vertices.tobytes()) for points in axes.collections
    }
    assert len(looks) == 20


def test_table_lines_up():
    rows = table([AlignmentUniformity(name, 0.2, -2.5, 81.234, 9, 1234) for name in ("a", "a longer name")]).split("\n")
    assert len(set(map(len, rows[1:3]))) == 1
    assert "81.23" in rows[1]
    assert "9 positive pairs, 1,234 sentences" in rows[3]


@pytest.fixture(scope="module")
def main():
    return load_command("evaluation/alignment_uniformity.py")


@pytest.fixture
def senteval(tmp_path, pairs):
    folder = tmp_path / "senteval" / "STS" / "STSBenchmark"
    folder.mkdir(parents=True)
    rows = zip(pairs.scores, pairs.sentences1, pairs.sentences2, strict=True)
    lines = [f"main\tfile\t2012\t{number}\t{gold}\t{one}\t{two}" for number, (gold, one, two) in enumerate(rows)]
    (folder / "sts-dev.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path / "senteval"


def test_the_script(main, senteval, student, pairs, tiny_bert, tmp_path):
    student.save(str(tmp_path / "student"))
    paths = [tmp_path / "result.json", tmp_path / "plot.png"]
    models = [f"mean={tiny_bert}", str(tmp_path / "student")]
    options = ["--data-dir", str(senteval), "--output", str(paths[0]), "--plot", str(paths[1])]
    result = CliRunner().invoke(main, [*models, *options])
    assert result.exit_code == 0, result.output
    written = json.loads(paths[0].read_text())
    assert [entry["label"] for entry in written["models"]] == ["mean", "student"]
    expected = alignment_uniformity(student, pairs)
    assert written["models"][1]["uniformity"] == pytest.approx(expected.uniformity, abs=1e-6)
    assert written["models"][0]["uniformity"] != pytest.approx(expected.uniformity, abs=1e-6)
    assert written["models"][0]["model"]["name"] == str(tiny_bert)
    assert len(written["data_sha256"]["sts-dev"]) == 64
    assert f"{expected.alignment:.4f}" in result.output
    assert paths[1].read_bytes().startswith(b"\x89PNG")


def test_a_wrong_model_is_found_before_anything_is_measured(main, senteval, tiny_bert):
    result = CliRunner().invoke(main, [str(tiny_bert), "/nowhere/bert", "--data-dir", str(senteval)])
    assert result.exit_code == 2
    assert "there is no model folder /nowhere/bert" in result.output
    assert "alignment" not in result.output


def test_a_malformed_file_is_named_with_its_line(main, senteval, tiny_bert):
    file = senteval / "STS" / "STSBenchmark" / "sts-dev.csv"
    file.write_text(file.read_text().replace("\t3.999\t", "\t39.99\t"))
    result = CliRunner().invoke(main, [str(tiny_bert), "--data-dir", str(senteval)])
    assert result.exit_code == 2
    assert "sts-dev.csv, line 60" in result.output


def test_minilm(minilm, shared_data):
    from sentence_transformers import SentenceTransformer

    whole = load_sts_benchmark(shared_data / "senteval", "dev")
    some = STSPairs(whole.sentences1[:200], whole.sentences2[:200], whole.scores[:200], whole.name)
    result = alignment_uniformity(SentenceTransformer(minilm, device="cpu"), some)
    assert 0.05 < result.alignment < 0.4
    assert -4 < result.uniformity < -1
    assert result.spearman > 80
