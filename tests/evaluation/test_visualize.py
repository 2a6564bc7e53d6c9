import gzip
import json
from itertools import combinations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import load_command, with_large_weights, without_dropout
from matplotlib.backends.backend_agg import FigureCanvasAgg

from st_kdmcse import build_student
from st_kdmcse.evaluation.visualize import (
    DEFAULT_SENTENCES,
    Neighbour,
    dropout_copies,
    dropout_map,
    nearest_neighbours,
    neighbours_dict,
    neighbours_markdown,
    neighbours_text,
    plot_dropout_maps,
)


@pytest.fixture
def still(student):
    """A student without dropout."""
    return without_dropout(student)


def test_copies_differ_under_dropout_and_the_seed_decides(student, sentences):
    before = torch.get_rng_state()
    student.eval()
    copies, again, other = (dropout_copies(student, sentences[:70], 3, seed) for seed in (1, 1, 2))
    assert copies.shape == (70, 3, 32)
    np.testing.assert_array_equal(copies, again)
    assert not np.allclose(copies, other)
    assert not np.allclose(copies[:, 0], copies[:, 1])
    np.testing.assert_allclose(np.linalg.norm(copies, axis=2), 1, atol=1e-5)
    assert not student.training
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in student.parameters())


def test_copies_stay_in_the_order_of_the_sentences(still, sentences):
    copies = dropout_copies(still, sentences[:70], 2)
    expected = still.encode(sentences[:70], normalize_embeddings=True)
    for copy in (0, 1):
        np.testing.assert_allclose(copies[:, copy], expected, atol=1e-5)


def test_metrics_against_a_slow_loop(student, sentences):
    copies = dropout_copies(student, sentences[:4], 3, seed=5)
    found = dropout_map(student, sentences[:4], 3, seed=5)
    within = [float(a @ b) for copy in copies for a, b in combinations(copy, 2)]
    between = [float(a @ b) for i, j in combinations(range(4), 2) for a in copies[i] for b in copies[j]]
    assert found.within == pytest.approx(np.mean(within), abs=1e-6)
    assert found.between == pytest.approx(np.mean(between), abs=1e-6)
    assert found.has_dropout
    assert found.points.shape == (4, 3, 2)


def test_the_map_is_deterministic_and_keeps_copies_together(student):
    with_large_weights(student)
    for module in student.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.01
    sentences = ["a dog runs", "two small red balls", "woman sits on grass", "the child plays in snow"]
    one, again = (dropout_map(student, sentences, 12, seed=0) for _ in range(2))
    np.testing.assert_array_equal(one.points, again.points)
    centres = one.points.mean(axis=1)
    distances = np.linalg.norm(one.points[:, :, None] - centres, axis=3)
    assert (distances.argmin(axis=2) == np.arange(4)[:, None]).mean() > 0.9


def test_an_encoder_without_dropout_is_told(still, sentences):
    found = dropout_map(still, sentences[:5], 3)
    assert not found.has_dropout
    assert found.within == pytest.approx(1, abs=1e-6)
    assert "no dropout" in plot_dropout_maps([found]).axes[0].get_title()


def test_what_cannot_be_drawn(student, sentences):
    for chosen, repeats, message in (
        (sentences[:1], 2, "1 sentences: 2 to 64"),
        (sentences[:65], 2, "65 sentences: 2 to 64"),
        (["a dog", "a dog"], 2, "occurs twice"),
        (sentences[:3], 1, "from 2 copies on"),
    ):
        with pytest.raises(ValueError, match=message):
            dropout_map(student, chosen, repeats)
    with torch.no_grad():
        next(student.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="'a dog' is not finite"):
        dropout_map(student, ["a dog", "a ball"], 2)


def test_panels_and_a_shared_legend(student):
    one = dropout_map(student, DEFAULT_SENTENCES, 2)
    figure = plot_dropout_maps([one, one, one, one])
    FigureCanvasAgg(figure).draw()
    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == 4
    assert all(len(axes.collections) == len(DEFAULT_SENTENCES) for axes in shown)
    boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert len(boxes) == len(DEFAULT_SENTENCES)
    panels = [axes.get_tightbbox() for axes in shown]
    assert not any(a.overlaps(b) for n, a in enumerate(boxes) for b in [*boxes[:n], *panels])


def test_neighbours_against_a_slow_loop(student, sentences):
    corpus, queries = sentences[:50], [sentences[7], sentences[60]]
    vectors = {text: student.encode(text, normalize_embeddings=True) for text in [*corpus, *queries]}
    found = nearest_neighbours(student, [*corpus, *corpus[:9]], queries, k=4)
    for query, hits in zip(queries, found, strict=True):
        cosines = {text: float(vectors[query] @ vectors[text]) for text in corpus if text != query}
        best = sorted(cosines.values(), reverse=True)[:4]
        assert [hit.cosine for hit in hits] == pytest.approx(best, abs=1e-5)
        assert len({hit.sentence for hit in hits}) == 4
        assert all(hit.cosine == pytest.approx(cosines[hit.sentence], abs=1e-5) for hit in hits)


def test_neighbours_of_little(student):
    ((only,),) = nearest_neighbours(student, ["a dog", "a ball"], ["a dog"], k=5)
    assert only.sentence == "a ball"
    for corpus, queries, k in ((["a dog"], [], 1), ([], ["a dog"], 1), (["a dog"], ["a ball"], 0)):
        with pytest.raises(ValueError, match="at least"):
            nearest_neighbours(student, corpus, queries, k)


FOUND = {
    "one": [[Neighbour("short", 0.9), Neighbour("a | bar", 0.25)]],
    "another": [[Neighbour("word " * 30, -0.5)]],
}


def test_the_table_wraps_to_the_width():
    lines = neighbours_text(["a query of " + "words " * 20], FOUND, width=60).split("\n")
    assert max(map(len, lines)) <= 60
    table = "\n".join(lines)
    assert table.count("word ") + table.count("word\n") == 30
    assert " 0.250 a | bar" in table
    assert "-0.500 word" in table
    assert next(line for line in lines if line.startswith("one")).split() == ["one", "another"]


def test_markdown_and_json():
    text = neighbours_markdown(["what | who"], FOUND)
    rows = [line for line in text.split("\n") if line.startswith("|")]
    assert all(row.replace("\\|", "").count("|") == 4 for row in rows)
    assert "### what \\| who" in text
    assert "| 2 | 0.250 a \\| bar |  |" in text
    (entry,) = neighbours_dict(["q"], FOUND)
    assert entry["query"] == "q"
    assert entry["neighbours"]["one"][1] == {"sentence": "a | bar", "cosine": 0.25}


@pytest.fixture(scope="module")
def main():
    return load_command("evaluation/visualize.py")


def run(main, *arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path, tiny_bert):
    torch.manual_seed(0)
    build_student(str(tiny_bert)).save(str(tmp_path / "student"))
    return tmp_path


def test_tsne_from_the_command_line(main, folder, tiny_bert, sentences):
    (folder / "six.txt").write_text("\n".join([*sentences[:6], sentences[0]]) + "\n")
    options = ["--sentences", folder / "six.txt", "--repeats", 3, "--seed", 4]
    for number in (1, 2):
        files = ["--output", folder / f"{number}.json", "--plot", folder / f"{number}.png"]
        result = run(main, "tsne", f"mean={tiny_bert}", folder / "student", *options, *files)
        assert result.exit_code == 0, result.output
    one, again = (json.loads((folder / f"{number}.json").read_text()) for number in (1, 2))
    assert one["models"] == again["models"]
    assert one["sentences"] == sentences[:6]
    assert one["seed"] == 4
    assert [entry["label"] for entry in one["models"]] == ["mean", "student"]
    assert f"{one['models'][1]['within']:.4f}" in result.output
    assert (folder / "1.png").read_bytes().startswith(b"\x89PNG")


def test_neighbours_from_the_command_line(main, folder, tiny_bert, sentences):
    with gzip.open(folder / "corpus.txt.gz", "wt", encoding="utf-8") as file:
        file.write("\n".join(sentences[:30]))
    call = ["neighbours", tiny_bert, folder / "student", "--corpus", folder / "corpus.txt.gz", "-k", 2]
    call += ["--query", sentences[40], "--query", sentences[41]]
    for name in ("out.json", "out.md"):
        result = run(main, *call, "--output", folder / name)
        assert result.exit_code == 0, result.output
    written = json.loads((folder / "out.json").read_text())
    assert [entry["query"] for entry in written["queries"]] == sentences[40:42]
    assert {name: len(hits) for name, hits in written["queries"][0]["neighbours"].items()} == {
        tiny_bert.name: 2,
        "student": 2,
    }
    first = written["queries"][1]["neighbours"]["student"][0]
    assert f"{first['cosine']:.3f} {first['sentence']}" in (folder / "out.md").read_text()
    assert f"{first['cosine']:.3f}" in result.output
    assert written["data_sha256"]["corpus.txt.gz"] in (folder / "out.md").read_text()


def test_errors_are_one_line(main, folder, tiny_bert):
    (folder / "corpus.txt").write_text("a dog\n")
    for arguments, message in (
        (["tsne", tiny_bert, "--sentences", folder / "none.txt"], "there is no file"),
        (["tsne", tiny_bert, tiny_bert], "would both be called"),
        (["neighbours", tiny_bert, "--corpus", folder / "corpus.txt", "--query", "a", "--output", "x.doc"], ".md or a"),
        (["neighbours", "/nowhere/x", "--corpus", folder / "corpus.txt", "--query", "a"], "no model folder"),
    ):
        result = run(main, *arguments)
        assert result.exit_code == 2
        assert result.output.startswith("error: ")
        assert result.output.count("\n") == 1
        assert message in result.output


def test_minilm_tells_sentences_apart(minilm):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(minilm, device="cpu")
    found = dropout_map(model, DEFAULT_SENTENCES, 4)
    assert found.within > 0.85 > 0.2 > found.between
    ((hit, *_),) = nearest_neighbours(model, DEFAULT_SENTENCES[1:], [DEFAULT_SENTENCES[5]], k=1)
    assert hit.sentence == DEFAULT_SENTENCES[6]
