"""Crisscrossed Captions: plain and bootstrap correlations, of captions and of captions with images."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from helpers import WORDS, with_large_weights
from PIL import Image
from scipy.stats import spearmanr
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer

from st_kdmcse import FeatureStore, KDMCSEConfig, KDMCSELoss, build_student
from st_kdmcse.cli.main import main
from st_kdmcse.data import load_cxc, load_sits
from st_kdmcse.evaluation.cxc import bootstrap_spearman, evaluate_cxc, evaluate_sits
from st_kdmcse.training.text_image import ImageTower, text_image_model

IMAGES = 6
CAPTIONS = {100 + number: " ".join(np.random.default_rng(number).choice(WORDS, size=7)) for number in range(20)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Caption pairs, captions with images, annotations and images, in the layouts of CxC and MS-COCO."""
    folder = tmp_path_factory.mktemp("cxc")
    generator = np.random.default_rng(0)
    ids = list(CAPTIONS)
    rows = ["sampling_method,agg_score,caption2,caption1"]
    for number, caption in enumerate(ids):
        for step in generator.choice(range(1, 10), size=1 + number % 3, replace=False):  # no pair in both orders
            other = ids[(number + step) % len(ids)]
            method = ("c2c_isim", "c2c_cocaption")[number % 2]
            rows.append(f"{method},{generator.uniform(0, 5):.2f},COCO_val2014:sentid:{other},x:sentid:{caption}")
    (folder / "sts_val.csv").write_text("\ufeff" + "\r\n".join(rows) + "\r\n", encoding="utf-8")
    rows = ["caption,image,agg_score,sampling_method"]
    for number, caption in enumerate(ids):
        for image in generator.choice(IMAGES, size=1 + number % 2, replace=False):
            score, method = f"{generator.uniform(0, 5):.2f}", ("c2i_original", "c2i_intrasim")[number % 2]
            rows.append(f"COCO_val2014:sentid:{caption},COCO_val2014_{image:012d}.jpg,{score},{method}")
    (folder / "sits_val.csv").write_text("\n".join(rows) + "\n")
    annotations = [{"id": key, "image_id": 1, "caption": text} for key, text in CAPTIONS.items()]
    for name, some in (("captions_a.json", annotations[:12]), ("captions_b.json", annotations[12:])):
        (folder / name).write_text(json.dumps({"images": [], "annotations": some}))
    (folder / "val").mkdir()
    for image in range(IMAGES):
        pixels = generator.integers(0, 255, (40, 48), dtype=np.uint8)
        name = f"COCO_val2014_{image:012d}.jpg" if image % 2 else f"{image:012d}.jpg"
        Image.fromarray(pixels).save(folder / "val" / name)  # grey, some by their names of 2017
    return folder


@pytest.fixture
def model(student):
    return with_large_weights(student)


def command(files, scores, *more):
    captions = [f"--captions={files / name}" for name in ("captions_a.json", "captions_b.json")]
    return ["evaluate", "cxc", "--cxc", str(files / scores), *captions, "--device", "cpu", *map(str, more)]


def cosine(one, two):
    return (one * two).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(two, axis=1)


def slow_bootstrap(similarities, scores, queries, draws):
    """The protocol in its words, with another generator."""
    generator = np.random.default_rng(99)
    correlations = []
    for _ in range(draws):
        distinct = sorted(set(queries))
        rows = []
        for query in generator.choice(distinct, size=len(distinct) // 2, replace=False):
            rows.append(generator.choice([row for row, each in enumerate(queries) if each == query]))
        correlations.append(spearmanr(similarities[rows], scores[rows]).statistic)
    return np.array(correlations)


def test_the_bootstrap_is_that_of_the_paper():
    generator = np.random.default_rng(2)
    queries = generator.integers(40, size=120).tolist()
    scores = generator.uniform(0, 5, size=120)
    similarities = scores + generator.normal(scale=2, size=120)
    found = bootstrap_spearman(similarities, scores, queries, draws=500)
    expected = slow_bootstrap(similarities, scores, queries, draws=500)
    assert found.mean() == pytest.approx(expected.mean(), abs=0.025)  # 5 standard errors
    assert found.std() == pytest.approx(expected.std(), rel=0.2)
    again = bootstrap_spearman(similarities, scores, queries, draws=5)
    np.testing.assert_array_equal(again, found[:5])
    assert (again != bootstrap_spearman(similarities, scores, queries, draws=5, seed=1)).all()
    with pytest.raises(ValueError, match="`draws` is 0"):
        bootstrap_spearman(similarities, scores, queries, draws=0)


def test_a_draw_has_one_pair_of_a_query():
    queries = np.repeat(np.arange(9), [1, 5, 2, 1, 7, 3, 1, 1, 4])
    scores = queries / 2.0
    # Within a query, similarities fall where the gold rises: two pairs of one query would show.
    falling = scores + 0.01 * np.arange(len(queries))
    similarities = scores - 0.01 * np.arange(len(queries))
    assert bootstrap_spearman(similarities, falling, queries.tolist(), draws=50) == pytest.approx(np.ones(50))


def test_caption_pairs(files, model, tmp_path):
    model.save_pretrained(str(tmp_path / "model"))
    output = tmp_path / "cxc.json"
    result = CliRunner().invoke(
        main, command(files, "sts_val.csv", "--model", tmp_path / "model", "--output", output, "--seed", 3)
    )
    assert result.exit_code == 0, result.output
    record = json.loads(output.read_text())
    task = load_cxc(files / "sts_val.csv", [files / "captions_a.json", files / "captions_b.json"])
    similarities = cosine(model.encode(task.sentences1), model.encode(task.sentences2))
    scores = np.array(task.scores)
    assert record["spearman"] == pytest.approx(100 * spearmanr(similarities, scores).statistic, abs=1e-3)
    assert record["pairs"] == len(scores) == 39
    assert record["queries"] == len(set(task.queries)) == 20
    assert [CAPTIONS[query] for query in task.queries] == task.sentences1
    draws = bootstrap_spearman(similarities, scores, task.queries, seed=3)
    assert record["bootstrap_mean"] == pytest.approx(100 * draws.mean(), abs=1e-3)
    assert record["bootstrap_std"] == pytest.approx(100 * draws.std(ddof=1), abs=1e-3)
    first = len(task.subsets[0])
    assert record["subsets"]["c2c_cocaption"] == {
        "pairs": first,
        "spearman": pytest.approx(100 * spearmanr(similarities[:first], scores[:first]).statistic, abs=1e-3),
    }
    assert (record["task"], record["seed"], record["precision"]) == ("STS", 3, "float32")
    assert record["data_sha256"] == {"cxc": task.checksum}
    assert len(record["model"]["parameters_sha256"]) == 64
    assert f"{record['bootstrap_mean']:.2f} ± {record['bootstrap_std']:.2f} (1,000 draws)" in result.output


def test_truncation_and_prompts_of_the_model_count(files, model):
    task = load_cxc(files / "sts_val.csv", [files / "captions_a.json", files / "captions_b.json"])
    plain = evaluate_cxc(model, task, draws=2).spearman
    model.truncate_dim = 4
    vectors = [model.encode(each) for each in (task.sentences1, task.sentences2)]
    assert vectors[0].shape == (39, 4)
    truncated = evaluate_cxc(model, task, draws=2).spearman
    assert truncated == pytest.approx(100 * spearmanr(cosine(*vectors), task.scores).statistic, abs=1e-3)
    model.truncate_dim = None
    model.prompts, model.default_prompt_name = {"images": "the red ball "}, "images"
    vectors = [model.encode(each) for each in (task.sentences1, task.sentences2)]
    prompted = evaluate_cxc(model, task, draws=2).spearman
    assert prompted == pytest.approx(100 * spearmanr(cosine(*vectors), task.scores).statistic, abs=1e-3)
    assert len({plain, truncated, prompted}) == 3


def test_a_collapsed_model_has_no_score(files, model, caplog):
    task = load_cxc(files / "sts_val.csv", [files / "captions_a.json", files / "captions_b.json"])
    for weight in model.parameters():
        weight.data.zero_()
    result = evaluate_cxc(model, task, draws=3)
    assert (result.spearman, result.bootstrap_mean, result.bootstrap_std) == (None, None, None)
    assert "no bootstrap correlation" in caplog.text
    json.dumps(result.to_dict(), allow_nan=False)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_bert, tiny_clip, files):
    """A student with its heads, a store of the images' features, and the same as one text-image model."""
    folder = tmp_path_factory.mktemp("run")
    student = with_large_weights(build_student(str(tiny_bert)).to("cpu"))
    clip = SentenceTransformer(modules=[Transformer(str(tiny_clip))], device="cpu")
    paths = sorted((files / "val").iterdir(), key=lambda path: path.name[-16:])
    features = clip.encode([Image.open(path).convert("RGB") for path in paths])
    store = FeatureStore.from_arrays(
        folder / "store",
        features,
        features,
        ["a caption"] * IMAGES,
        np.arange(IMAGES),
        [f"val2017/{number:012d}.jpg" for number in range(IMAGES)],
        teacher="tiny",
        dtype="float32",
    )
    loss = KDMCSELoss(student, KDMCSEConfig(), features=store)
    student.save_pretrained(str(folder / "run"))
    loss.save_heads(folder / "run" / "heads")
    clip = Transformer(str(tiny_clip))
    tower = ImageTower("clip", [clip], clip.get_embedding_dimension())
    joined = text_image_model(student, loss.heads["grounding"], tower, loss.heads["teacher_image"], False)
    joined.save_pretrained(str(folder / "joined"))
    return folder


def test_captions_and_images(files, run_folder, tmp_path):
    given = {
        "joined": ["--model", run_folder / "joined", "--images", files / "val"],
        "run": ["--model", run_folder / "run", "--features", run_folder / "store"],
    }
    records = {}
    for name, arguments in given.items():
        output = tmp_path / f"{name}.json"
        result = CliRunner().invoke(main, command(files, "sits_val.csv", *arguments, "--output", output))
        assert result.exit_code == 0, result.output
        records[name] = json.loads(output.read_text())
    model = SentenceTransformer(str(run_folder / "joined"), device="cpu")
    pairs = load_sits(files / "sits_val.csv", [files / "captions_a.json", files / "captions_b.json"])
    numbers = [int(name[-16:-4]) for name in pairs.images]
    paths = sorted((files / "val").iterdir(), key=lambda path: path.name[-16:])
    images = model.encode([Image.open(paths[number]).convert("RGB") for number in numbers])
    expected = spearmanr(cosine(model.encode(pairs.captions), images), pairs.scores).statistic
    for record in records.values():
        assert record["spearman"] == pytest.approx(100 * expected, abs=0.2)  # of 30 pairs, rounding may swap two
        assert (record["task"], record["pairs"], record["queries"]) == ("SITS", 30, 20)
        assert set(record["subsets"]) == {"c2i_original", "c2i_intrasim"}
        assert record["data_sha256"]["cxc"] == pairs.checksum
    assert "features" in records["run"]["data_sha256"]


@pytest.mark.parametrize(
    ("scores", "arguments", "message"),
    [
        ("nowhere.csv", [], "nowhere.csv does not exist: give sts_val.csv or sits_val.csv"),
        ("captions_a.json", [], "has neither the columns caption1 and caption2 nor caption and image"),
        ("sts_val.csv", ["--images", "{files}/val"], "leave out --images and --features"),
        ("sits_val.csv", [], "give either --images or --features"),
        ("sits_val.csv", ["--images", "a", "--features", "b"], "give either --images or --features"),
        ("sits_val.csv", ["--images", "{files}/val"], "the model knows no images: give a model of sentences and"),
        ("sits_val.csv", ["--features", "{files}"], "image_features.npy"),
        ("sits_val.csv", ["--model", "{run}/joined", "--images", "{files}/none"], "there is no folder"),
        (
            "sits_val.csv",
            ["--model", "{run}/joined", "--images", "{run}"],
            "6 of 6 images are not in {run}, the first is COCO_val2014_",
        ),
    ],
)
def test_what_is_refused(files, run_folder, tmp_path, tiny_bert, scores, arguments, message):
    arguments = [each.format(files=files, run=run_folder) for each in arguments]
    output = tmp_path / "out.json"
    result = CliRunner().invoke(
        main, command(files, scores, "--model", run_folder / "run", *arguments, "--output", output)
    )
    assert result.exit_code == 2, result.output
    assert message.format(run=run_folder) in result.output
    assert not output.exists()


def test_captions_that_are_in_no_annotation_file(files, tiny_bert, tmp_path):
    arguments = ["evaluate", "cxc", "--model", str(tiny_bert), "--cxc", str(files / "sits_val.csv"), "--captions"]
    output = ["--images", str(files / "val"), "--output", str(tmp_path / "out.json")]
    result = CliRunner().invoke(main, [*arguments, str(files / "captions_a.json"), *output])
    assert result.exit_code == 2
    assert "line 20: caption 112 and 7 others are not in" in result.output
    assert "give the annotations of MS-COCO that hold them as well" in result.output
    assert not (tmp_path / "out.json").exists()


def test_an_image_that_cannot_be_read(files, run_folder, tmp_path):
    pairs = load_sits(files / "sits_val.csv", [files / "captions_a.json", files / "captions_b.json"])
    for name in set(pairs.images):
        (tmp_path / name).write_bytes(b"no image")
    model = SentenceTransformer(str(run_folder / "joined"), device="cpu")
    with pytest.raises(ValueError, match=r"COCO_val2014_\d+\.jpg cannot be decoded"):
        evaluate_sits(model, pairs, tmp_path)


def test_features_that_lack_an_image(files, run_folder, tmp_path, store):
    whole = FeatureStore.open(run_folder / "store")
    features = np.array(whole.image_features[:4])
    names = [f"{number:012d}.jpg" for number in range(4)]
    FeatureStore.from_arrays(
        tmp_path / "few", features, features, ["a caption"] * 4, np.arange(4), names, teacher="tiny", dtype="float32"
    )
    arguments = ["--model", run_folder / "run", "--features", tmp_path / "few"]
    result = CliRunner().invoke(main, command(files, "sits_val.csv", *arguments))
    assert result.exit_code == 2
    assert "2 of 6 images are not in the feature store" in result.output


@pytest.mark.slow
def test_all_minilm_scores_what_it_is_known_to_score(shared_data, minilm):
    task = load_cxc(shared_data / "cxc/sts_val.csv", shared_data / "coco/annotations/captions_val2017.json")
    result = evaluate_cxc(SentenceTransformer(minilm, device="cpu"), task)
    assert result.spearman == pytest.approx(71.54, abs=0.01)
    assert (result.bootstrap_mean, result.bootstrap_std) == pytest.approx((70.05, 1.08), abs=0.02)
