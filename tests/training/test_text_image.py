"""A run as a stock model of sentences and images."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset, DatasetDict
from PIL import Image
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from small_runs import flags, options, write_data
from teacher_models import make_tiny_clip, make_tiny_multimodal, make_tiny_siglip

from st_kdmcse import (
    FeatureStore,
    ImageTextRetrievalEvaluator,
    KDMCSEConfig,
    KDMCSELoss,
    KDMCSETrainer,
    build_student,
)
from st_kdmcse.cli.main import main
from st_kdmcse.evaluation.retrieval import evaluate_retrieval
from st_kdmcse.losses.heads import load_head
from st_kdmcse.teachers import CLIPTeacher, CombinedTeacher, SentenceTransformerTeacher, load_teacher
from st_kdmcse.training import TrainingOptions, train
from st_kdmcse.training.retrieval import RetrievalHeads, image_text_retrieval
from st_kdmcse.training.text_image import export_text_image

IMAGES = 12
CAPTION = "a dog runs on the beach"


@pytest.fixture(scope="module", params=["clip", "siglip normalized", "sentence-transformers"])
def trained(request, tmp_path_factory, tiny_bert, sentences, store):
    """A folder with images, features of a teacher, and a run on them."""
    kind, normalized = request.param.split()[0], "normalized" in request.param
    folder = tmp_path_factory.mktemp("trained")
    write_data(folder, sentences, store)
    if kind == "sentence-transformers":
        make_tiny_multimodal(folder / "teacher", make_tiny_clip(folder / "clip"))
    else:
        {"clip": make_tiny_clip, "siglip": make_tiny_siglip}[kind](folder / "teacher")
    teacher = load_teacher(str(folder / "teacher"), precision="float32")
    run_of_images(folder, teacher, tiny_bert, normalized)
    return folder


def run_of_images(folder, teacher, student, normalized=False, method="kdmcse", **changes):
    generator = np.random.default_rng(3)
    (folder / "images").mkdir(exist_ok=True)
    names = [f"{number}.png" for number in range(IMAGES)]
    for name in names:
        pixels = generator.integers(0, 255, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / name)
    captions = [f"{CAPTION} {number}" for number in range(IMAGES)]
    features = [teacher.encode_images([folder / "images" / name for name in names]), teacher.encode_texts(captions)]
    if normalized:
        features = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in features]
    rows, place = np.arange(IMAGES), folder / "of-images"
    shutil.rmtree(place, ignore_errors=True)
    FeatureStore.from_arrays(place, *features, captions, rows, names, teacher=teacher.name, dtype="float32")
    given = options(folder, student, features=place, output_dir=folder / "run", method=method, eval_steps=0, **changes)
    train(TrainingOptions(**given))


@pytest.fixture(scope="module")
def exported(trained):
    teacher = str(trained / "teacher")
    export_text_image(trained / "run", trained / "exported", teacher=teacher, device="cpu")
    return trained / "exported"


def pictures(folder):
    return [Image.open(folder / "images" / f"{number}.png") for number in range(IMAGES)]


def test_vectors_are_those_that_the_loss_compares(trained, exported):
    model = SentenceTransformer(str(exported), device="cpu")
    store = FeatureStore.open(trained / "of-images")
    head = load_head(trained / "run" / "heads", "teacher_image")
    with torch.inference_mode():
        expected = head(torch.from_numpy(np.array(store.image_features)))
        expected = torch.nn.functional.normalize(expected, dim=1).numpy()
    found = model.encode(pictures(trained))
    assert np.abs(found - expected).max() < 1e-5
    student = SentenceTransformer(str(trained / "run"), device="cpu")
    grounding = load_head(trained / "run" / "heads", "grounding")
    texts = [CAPTION, "two men", CAPTION]
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(grounding(torch.from_numpy(student.encode(texts))), dim=1).numpy()
    assert np.abs(model.encode(texts) - expected).max() < 1e-5
    assert model.encode(CAPTION).shape == (256,)
    assert model.similarity(model.encode(texts), found).shape == (3, IMAGES)


def test_a_run_of_several_sizes_of_embeddings(tmp_path, tiny_bert, sentences, store):
    write_data(tmp_path, sentences, store)
    make_tiny_clip(tmp_path / "teacher")
    teacher = CLIPTeacher(tmp_path / "teacher", precision="float32")
    run_of_images(tmp_path, teacher, tiny_bert, matryoshka_dims=(32, 8))
    arguments = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "exported")]
    result = CliRunner().invoke(main, [*arguments, "--teacher", str(tmp_path / "teacher"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    student = SentenceTransformer(str(tmp_path / "run"), device="cpu")
    with torch.inference_mode():
        expected = load_head(tmp_path / "run" / "heads", "grounding")(torch.from_numpy(student.encode([CAPTION])))
    found = SentenceTransformer(str(tmp_path / "exported"), device="cpu").encode([CAPTION])
    assert np.abs(found - torch.nn.functional.normalize(expected, dim=1).numpy()).max() < 1e-5
    arguments = ["evaluate", "retrieval", str(tmp_path / "run"), "--features", str(tmp_path / "of-images")]
    result = CliRunner().invoke(main, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "R@1" in result.output


def test_it_needs_nothing_of_this_package(trained, exported, tmp_path):
    code = (
        "import sys; sys.modules['st_kdmcse'] = None\n"
        "import numpy as np\nfrom PIL import Image\nfrom sentence_transformers import SentenceTransformer\n"
        "model = SentenceTransformer(sys.argv[1], device='cpu')\n"
        "images = [Image.open(path) for path in sys.argv[3:]]\n"
        f"np.savez(sys.argv[2], texts=model.encode(['{CAPTION}', 'a cat']), images=model.encode(images))\n"
    )
    files = [str(trained / "images" / f"{number}.png") for number in range(IMAGES)]
    subprocess.run([sys.executable, "-c", code, str(exported), str(tmp_path / "out.npz"), *files], check=True)
    model = SentenceTransformer(str(exported), device="cpu")
    with np.load(tmp_path / "out.npz") as there:
        assert np.abs(there["images"] - model.encode(pictures(trained))).max() < 1e-6
        assert np.abs(there["texts"] - model.encode([CAPTION, "a cat"])).max() < 1e-6
    card = (exported / "README.md").read_text()
    assert re.search("(sentence-)?transformers:teacher@", card)
    assert FeatureStore.open(trained / "of-images").checksum in card


def test_the_command(trained):
    out = trained / "by-command"
    result = CliRunner().invoke(main, ["export", str(trained / "run"), "--out", str(out), "--device", "cpu"])
    assert result.exit_code == 2  # of a folder, the features name no model that could be found
    assert "give the folder or name of one with the same weights as --teacher" in result.output
    arguments = ["export", str(trained / "run"), "--out", str(out), "--teacher", str(trained / "teacher")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "(256 dimensions)" in result.output
    again = CliRunner().invoke(main, arguments)
    assert (again.exit_code, "not empty" in again.output) == (2, True)


def test_another_teacher_is_refused(trained, tmp_path):
    other = make_tiny_clip(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="is not the teacher of|has features of width"):
        export_text_image(trained / "run", tmp_path / "out", teacher=str(other))
    assert not (tmp_path / "out").exists()


def test_features_that_are_not_those_of_the_run(trained, store, tmp_path):
    teacher = str(trained / "teacher")
    with pytest.raises(ValueError, match=r"is not the feature store of .*`features`"):
        export_text_image(trained / "run", tmp_path / "out", teacher=teacher, features=store.path)
    with pytest.raises(FileNotFoundError, match="say where they are as `features`"):
        export_text_image(trained / "run", tmp_path / "out", teacher=teacher, features=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


def test_a_teacher_of_another_library_is_compared_on_images(tmp_path, tiny_bert, sentences, store):
    write_data(tmp_path, sentences, store)
    clip = make_tiny_clip(tmp_path / "teacher")
    run_of_images(tmp_path, CLIPTeacher(clip, precision="float32"), tiny_bert)
    place = tmp_path / "of-images"
    features = FeatureStore.open(place)
    rewrite(place, features, "open_clip:ViT-B-32/openai")
    given = options(tmp_path, tiny_bert, features=place, output_dir=tmp_path / "run2", eval_steps=0)
    train(TrainingOptions(**given))
    with pytest.raises(ValueError, match=r"must be seen on images.*`images`"):
        export_text_image(tmp_path / "run2", tmp_path / "out", teacher=str(clip))
    with pytest.raises(FileNotFoundError, match=r"0\.png does not exist"):
        export_text_image(tmp_path / "run2", tmp_path / "out", teacher=str(clip), images=tmp_path)
    other = make_tiny_clip(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="is not the teacher of .* has cosine"):
        export_text_image(tmp_path / "run2", tmp_path / "out", teacher=str(other), images=tmp_path / "images")
    (tmp_path / "damaged").mkdir()
    for number in range(IMAGES):
        (tmp_path / "damaged" / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="cannot be read"):
        export_text_image(tmp_path / "run2", tmp_path / "out", teacher=str(clip), images=tmp_path / "damaged")
    assert not (tmp_path / "out").exists()
    export_text_image(tmp_path / "run2", tmp_path / "out", teacher=str(clip), images=tmp_path / "images")
    assert SentenceTransformer(str(tmp_path / "out")).encode(pictures(tmp_path)).shape == (IMAGES, 256)


def test_with_another_teacher_of_the_captions(tmp_path, tiny_bert, sentences, store):
    write_data(tmp_path, sentences, store)
    clip = CLIPTeacher(make_tiny_clip(tmp_path / "teacher"), precision="float32")
    build_student(str(tiny_bert)).save_pretrained(str(tmp_path / "texts"))
    texts = SentenceTransformerTeacher(tmp_path / "texts", precision="float32")
    assert texts.dim > clip.dim
    run_of_images(tmp_path, CombinedTeacher(clip, texts), tiny_bert)
    model = export_text_image(tmp_path / "run", tmp_path / "out", teacher=str(tmp_path / "teacher"), device="cpu")
    features = torch.from_numpy(np.array(FeatureStore.open(tmp_path / "of-images").image_features))
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(load_head(tmp_path / "run/heads", "teacher_image")(features), dim=1)
    assert np.abs(model.encode(pictures(tmp_path)) - expected.numpy()).max() < 1e-5


def test_models_that_cannot_be_the_image_route(trained, tmp_path, tiny_bert):
    build_student(str(tiny_bert)).save_pretrained(str(tmp_path / "texts"))
    with pytest.raises(ValueError, match="takes no images"):
        export_text_image(trained / "run", tmp_path / "out", teacher=str(tmp_path / "texts"))
    with pytest.raises(ValueError, match="is a model of open_clip"):
        export_text_image(trained / "run", tmp_path / "out", teacher="open_clip:ViT-B-32")
    make_tiny_multimodal(tmp_path / "cut", make_tiny_clip(tmp_path / "clip"))
    model = SentenceTransformer(str(tmp_path / "cut"), truncate_dim=8, device="cpu")
    model.save_pretrained(str(tmp_path / "cut"))
    with pytest.raises(ValueError, match=r"cuts its embeddings off|has features of width|is not the teacher of"):
        export_text_image(trained / "run", tmp_path / "out", teacher=str(tmp_path / "cut"))
    assert not (tmp_path / "out").exists()


def test_training_exports_in_the_end(trained, tiny_bert, tmp_path):
    given = flags(trained, tiny_bert, features=trained / "of-images", output_dir=tmp_path / "run")
    teacher = ["--export-teacher", str(trained / "teacher")]
    result = CliRunner().invoke(main, ["train", *given, "--export", *teacher])
    assert result.exit_code == 0, result.output
    assert f"model of sentences and images: {tmp_path / 'run' / 'text-image'}" in result.output
    expected = export_text_image(tmp_path / "run", tmp_path / "by-hand", teacher=str(trained / "teacher"))
    model = SentenceTransformer(str(tmp_path / "run" / "text-image"), device="cpu")
    for inputs in (pictures(trained), [CAPTION, "two men"]):
        np.testing.assert_array_equal(model.encode(inputs), expected.to("cpu").encode(inputs))
    again = ["train", "--config", str(tmp_path / "run" / "run.json"), "--output-dir", str(tmp_path / "again")]
    assert CliRunner().invoke(main, [*again, "--max-steps", "1"]).exit_code == 0
    assert (tmp_path / "again" / "text-image" / "modules.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--export"], "give the folder or name of one with the same weights as --export-teacher"),
        (["--export", "--export-teacher", "OTHER"], "is not the teacher of|has features of width"),
        (["--export", "heads", "--export-teacher", "TEACHER"], "is a folder of the run itself"),
        (["--export", "--method", "simcse"], "--export needs the heads of images"),
        (["--export", "--multimodal-weight", "0"], "--export needs the heads of images"),
        (["--export-teacher", "TEACHER"], "go with --export"),
    ],
)
def test_what_would_make_the_export_fail_is_refused_before_training(trained, tiny_bert, tmp_path, changes, message):
    places = {"TEACHER": str(trained / "teacher")}
    if "OTHER" in changes:
        places["OTHER"] = str(make_tiny_clip(tmp_path / "other", seed=1))
    given = flags(trained, tiny_bert, features=trained / "of-images", output_dir=tmp_path / "run")
    result = CliRunner().invoke(main, ["train", *given, *[places.get(each, each) for each in changes]])
    assert result.exit_code == 2, result.output
    assert re.search(message, result.output), result.output
    assert not (tmp_path / "run").exists()


def rewrite(place, features, teacher):
    arrays = [np.array(features.image_features), np.array(features.text_features)]
    captions = [caption for _, caption in features.captions()]
    names = [features.image_id(row) for row in range(len(features))]
    shutil.rmtree(place)
    rows = np.arange(len(captions))
    FeatureStore.from_arrays(place, *arrays, captions, rows, names, teacher=teacher, dtype="float32")


def test_runs_without_heads_for_images(tmp_path, tiny_bert, sentences, store):
    data = write_data(tmp_path, sentences, store)
    train(TrainingOptions(**options(data, tiny_bert, method="simcse", output_dir=tmp_path / "run", eval_steps=0)))
    with pytest.raises(ValueError, match="has no grounding head, only text: train with mcse or kdmcse"):
        export_text_image(tmp_path / "run", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a run: there is no training_summary\.json"):
        export_text_image(tmp_path, tmp_path / "out")
    (tmp_path / "run" / "training_summary.json").unlink()
    with pytest.raises(FileNotFoundError, match="is not finished"):
        export_text_image(tmp_path / "run", tmp_path / "out")


def test_a_damaged_summary_is_refused(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "run")
    path = tmp_path / "run" / "training_summary.json"
    summary = json.loads(path.read_text())
    for damaged in ("{", json.dumps({**summary, "options": {}}), json.dumps({"method": "kdmcse", "teacher": "t"})):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"training_summary\.json"):
            export_text_image(tmp_path / "run", tmp_path / "out")


def test_retrieval_of_student_and_teacher(trained, tmp_path, exported):
    store = FeatureStore.open(trained / "of-images")
    arguments = ["evaluate", "retrieval", str(trained / "run"), "--features", str(store.path), "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "out.json")])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out.json").read_text())
    model = SentenceTransformer(str(exported), device="cpu")
    captions = [caption for _, caption in store.captions()]
    expected = {
        "student": evaluate_retrieval(model.encode(captions), model.encode(pictures(trained)), store.image_rows),
        "teacher": evaluate_retrieval(store.text_features[store.text_rows], store.image_features, store.image_rows),
    }
    assert list(record["retrieval"]) == ["student", "teacher"]
    for name, of_model in expected.items():
        for direction, each in of_model.items():
            found = record["retrieval"][name][direction]
            assert found["recall"] == {str(k): pytest.approx(value) for k, value in each.recall.items()}
            assert (found["queries"], found["median_rank"]) == (IMAGES, each.median_rank)
            assert f"{each.recall[5]:8.2f}" in result.output
    assert result.output.count("  chance     8.33   41.67   83.33\n") == 2
    (tmp_path / "some.txt").write_text("3.png\n7.png\n")
    some = CliRunner().invoke(main, [*arguments, "--only", str(tmp_path / "some.txt")])
    assert "2 queries, 2 candidates" in some.output
    assert "  chance    50.00  100.00  100.00\n" in some.output


def test_retrieval_with_features_of_another_teacher(trained, store):
    result = CliRunner().invoke(main, ["evaluate", "retrieval", str(trained / "run"), "--features", str(store.path)])
    assert (result.exit_code, "give features of the teacher" in result.output) == (2, True)
    nothing = CliRunner().invoke(main, ["evaluate", "retrieval", str(trained), "--features", str(store.path)])
    assert (nothing.exit_code, "heads.safetensors does not exist" in nothing.output) == (2, True)


def test_retrieval_while_training(trained, tiny_bert, tmp_path):
    store = FeatureStore.open(trained / "of-images")
    model = build_student(str(tiny_bert))
    loss = KDMCSELoss(model, KDMCSEConfig(multimodal_weight=1.0), features=store)
    evaluator = ImageTextRetrievalEvaluator(store, loss, "held-out")
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", "report_to": "none", "use_cpu": True}
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, bf16=True, **options
    )
    text = Dataset.from_dict({"sentence": ["a dog", "two men", "a cat", "a hat"]})
    data = DatasetDict(text=text, pairs=store.dataset())
    trainer = KDMCSETrainer(model, arguments, train_dataset=data, loss=loss, evaluator=evaluator)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "eval_held-out_mean_recall" in entry]
    assert [entry["step"] for entry in logged] == [1, 2]
    metrics = evaluator(model)
    loss.save_heads(tmp_path / "heads")
    found = image_text_retrieval(model, RetrievalHeads.load(tmp_path / "heads", store), store)["student"]
    for direction, each in found.items():
        for k, recall in each.recall.items():
            assert metrics[f"held-out_{direction.replace(' ', '_')}_recall@{k}"] == pytest.approx(recall / 100)
    assert metrics[evaluator.primary_metric] == pytest.approx(
        np.mean([recall / 100 for each in found.values() for recall in each.recall.values()])
    )


def test_losses_that_have_no_heads_for_images(student, store):
    with pytest.raises(ValueError, match="`multimodal_weight` is 0"):
        ImageTextRetrievalEvaluator(store, KDMCSELoss(student, KDMCSEConfig(multimodal_weight=0), features=store))
    with pytest.raises(ValueError, match="give features of the teacher of the training"):
        ImageTextRetrievalEvaluator(store, KDMCSELoss(student, teacher_dim=store.dim + 1))
