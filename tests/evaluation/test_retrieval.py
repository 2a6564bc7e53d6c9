"""Ranks by a slow loop, chance, folds, and what is refused."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from sentence_transformers import SentenceTransformer

from st_kdmcse.cli.main import main
from st_kdmcse.data import open_captions, sha256_file
from st_kdmcse.evaluation import retrieval
from st_kdmcse.evaluation.retrieval import CUTOFFS, DIRECTIONS, evaluate_images, evaluate_retrieval


def made(images=30, each=3, dim=8, seed=0, noise=1.0):
    generator = np.random.default_rng(seed)
    pictures = generator.normal(size=(images, dim)).astype(np.float32)
    rows = generator.permutation(np.repeat(np.arange(images), each))
    texts = pictures[rows] + noise * generator.normal(size=(len(rows), dim)).astype(np.float32)
    return texts, pictures, rows


def slow(texts, images, rows):
    """Ranks of both directions, by sorting."""
    texts, images = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (texts, images))
    scores = texts @ images.T
    to_image = [1 + list(np.argsort(-scores[n])).index(row) for n, row in enumerate(rows)]
    orders = [np.argsort(-scores[:, m]) for m in range(len(images))]
    to_text = [1 + next(place for place, n in enumerate(order) if rows[n] == m) for m, order in enumerate(orders)]
    return np.array(to_image), np.array(to_text)


@pytest.mark.parametrize("block", [1, 100, 2**22])
def test_ranks_are_those_of_sorting(monkeypatch, block):
    monkeypatch.setattr(retrieval, "_SCORES_AT_A_TIME", block)
    data = made()
    found = evaluate_retrieval(*data)
    assert list(found) == list(DIRECTIONS)
    for result, ranks in zip(found.values(), slow(*data), strict=True):
        assert result.median_rank == np.median(ranks)
        for k in CUTOFFS:
            assert result.recall[k] == pytest.approx(100 * (ranks <= k).mean())
    assert (found["text to image"].queries, found["text to image"].candidates) == (90, 30)
    assert (found["image to text"].queries, found["image to text"].candidates) == (30, 90)


def test_chance_is_what_random_vectors_get():
    results = []
    for seed in range(60):
        texts, images, rows = made(seed=seed)
        results.append(evaluate_retrieval(np.random.default_rng(seed + 1000).normal(size=texts.shape), images, rows))
    for direction in DIRECTIONS:
        for k in CUTOFFS:
            mean = np.mean([result[direction].recall[k] for result in results])
            assert mean == pytest.approx(results[0][direction].chance[k], abs=2.5)
    assert results[0]["text to image"].chance[1] == pytest.approx(100 / 30)


def test_perfect_and_collapsed():
    texts, images, rows = made(noise=0.0)
    perfect = evaluate_retrieval(5 * texts, images, rows)
    assert all(result.recall[1] == 100 and result.median_rank == 1 for result in perfect.values())
    collapsed = evaluate_retrieval(np.ones_like(texts), np.ones_like(images), rows)
    assert all(result.recall[10] == 0 for result in collapsed.values())
    nothing = evaluate_retrieval(np.zeros_like(texts), images, rows)
    assert nothing["text to image"].median_rank == 30


def test_folds_are_searched_by_themselves():
    texts, images, rows = made()
    whole, parts = evaluate_retrieval(texts, images, rows), evaluate_retrieval(texts, images, rows, folds=3)
    assert parts["text to image"].candidates == 10
    assert parts["text to image"].queries == 90
    assert parts["text to image"].recall[1] > whole["text to image"].recall[1]
    by_hand = []
    for start in (0, 10, 20):
        inside = (rows >= start) & (rows < start + 10)
        by_hand.append(evaluate_retrieval(texts[inside], images[start : start + 10], rows[inside] - start))
    for direction in DIRECTIONS:
        for k in CUTOFFS:
            assert parts[direction].recall[k] == pytest.approx(np.mean([each[direction].recall[k] for each in by_hand]))
    few = evaluate_retrieval(texts[:0:-1], images, rows[:0:-1])
    assert few["image to text"].candidates == 89


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, i, r: (t[:, :3], i, r), "expected .N, d. texts"),
        (lambda t, i, r: (t, i, r[:-1]), "expected .N, d. texts"),
        (lambda t, i, r: (t, i, r + 1), "image rows must be from 0 to 29"),
        (lambda t, i, r: (t, np.vstack([i, i[:1]]), r), "image 30 has no caption"),
        (lambda t, i, r: (t, np.where(i == i[4], np.nan, i), r), "images, row 4: the embedding is not finite"),
        (lambda t, i, r: (t[0], i, r), "texts must be a matrix"),
        (lambda t, i, r: (t, i, r, 4), "30 images cannot be divided into 4 parts"),
        (lambda t, i, r: (t, i, r, 0), "cannot be divided into 0 parts"),
        (lambda t, i, r: (t[:0], i[:0], r[:0]), "no images"),
    ],
)
def test_what_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        evaluate_retrieval(*change(*made()))


class TestImagesAndCaptions:
    @pytest.fixture(scope="class")
    def model(self, tiny_multimodal):
        return SentenceTransformer(str(tiny_multimodal), device="cpu")

    @pytest.fixture
    def table(self, photos, tmp_path):
        """Six images with seven captions each, of which two come too late to count."""
        words = ["dog", "man", "snow", "ball", "beach", "red", "grass"]
        rows = [f"{photo}\t{word} {photo.stem[:6]}\n" for photo in photos[:6] for word in words]
        (tmp_path / "captions.tsv").write_text("image\tcaption\n" + "".join(rows))
        return tmp_path / "captions.tsv"

    def test_the_first_five_captions_of_each_image_count(self, model, table, photos):
        reader = open_captions(table, images="/")
        found = evaluate_images(model, reader)
        captions = [caption for record in reader for caption in record.captions[:5]]
        texts = model.encode([{"text": caption} for caption in captions])
        pictures = model.encode([Image.open(photo) for photo in photos[:6]])
        expected = evaluate_retrieval(texts, pictures, np.repeat(np.arange(6), 5))
        assert found == expected
        assert (found["text to image"].queries, found["image to text"].candidates) == (30, 30)
        in_folds = evaluate_images(model, reader, folds=3)
        assert (in_folds["text to image"].queries, in_folds["text to image"].candidates) == (30, 2)
        with pytest.raises(ValueError, match="6 images cannot be divided into 4 parts"):
            evaluate_images(model, reader, folds=4)

    def test_the_command(self, model, table, tiny_multimodal, tmp_path):
        arguments = ["evaluate", "retrieval", str(tiny_multimodal), "--captions", str(table), "--images", "/"]
        result = CliRunner().invoke(main, [*arguments, "--device", "cpu", "--output", str(tmp_path / "out.json")])
        assert result.exit_code == 0, result.output
        assert "text to image: 30 queries, 6 candidates" in result.output
        assert "  chance   16.67   83.33  100.00\n" in result.output
        record = json.loads((tmp_path / "out.json").read_text())
        found = evaluate_images(model, open_captions(table, images="/"))
        for direction, each in found.items():
            assert record["retrieval"]["model"][direction]["median_rank"] == each.median_rank
        assert record["data_sha256"] == {"captions": sha256_file(table)}

    def test_what_is_refused(self, table, tiny_multimodal, photo_set, student, tmp_path):
        student.save_pretrained(str(tmp_path / "texts"))
        for arguments, message in (
            ([str(tmp_path / "texts"), "--captions", str(table), "--images", "/"], "the model takes no images"),
            (
                [str(tiny_multimodal), "--captions", str(photo_set / "captions.txt")],
                "holds no images: give their folder as --images",
            ),
            ([str(tiny_multimodal)], "give either --captions"),
            ([str(tiny_multimodal), "--features", "x", "--images", "/"], "go with --captions"),
            ([str(tiny_multimodal), "--captions", str(table), "--only", "x"], "--only goes with --features"),
        ):
            result = CliRunner().invoke(main, ["evaluate", "retrieval", *arguments])
            assert (result.exit_code, message in result.output) == (2, True), result.output

    def test_an_image_that_cannot_be_decoded(self, model, tmp_path):
        (tmp_path / "broken.jpg").write_bytes(b"no image")
        (tmp_path / "captions.tsv").write_text("image\tcaption\nbroken.jpg\ta dog\n")
        with pytest.raises(ValueError, match=r"broken\.jpg cannot be decoded"):
            evaluate_images(model, open_captions(tmp_path / "captions.tsv", images=tmp_path))
