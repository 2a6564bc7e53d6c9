"""Which students can be trained: each is, and saved, and loaded without this package; or it is refused by name before.

student                               trains   padding left out   else
------------------------------------  -------  -----------------  --------------------------------------------
BERT, RoBERTa, XLM-R, ELECTRA         yes      yes
DistilBERT, MPNet, ALBERT,            yes      no
DeBERTa-v2, ModernBERT
with prompts                          yes      yes                prompts are kept; training is without them
with Dense, LayerNorm, Normalize      yes      yes                kept with `pooling` auto
with two poolings side by side        yes      yes                kept with `pooling` auto
saved in bfloat16                     yes      yes                trained and saved in float32
without dropout                       yes      as its encoder     warned of: the text loss teaches nothing
tokenizer without padding token       refused
`max_seq_length` beyond the positions refused
no Transformer, a Router, other code  refused
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from encoders import ENCODERS, make_encoder
from helpers import copy_tree, without_dropout
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    Dense,
    LayerNorm,
    Normalize,
    Pooling,
    StaticEmbedding,
    Transformer,
)
from small_runs import CHINESE, GERMAN, options, write_data, write_multilingual
from transformers import AutoModel, AutoTokenizer, set_seed

from st_kdmcse import KDMCSEConfig, KDMCSELoss, KDMCSETrainer, build_student, unpadded
from st_kdmcse.encoding import load_model
from st_kdmcse.files import LOCK
from st_kdmcse.losses.heads import ProjectionHead, load_head
from st_kdmcse.training.inputs import check_inputs
from st_kdmcse.training.options import TrainingOptions
from st_kdmcse.training.run import train
from st_kdmcse.training.student import pooling_of
from st_kdmcse.training.text_image import ImageTower, dense_layer, text_image_model
from st_kdmcse.training.unpadding import ENCODERS as WITHOUT_PADDING

PROMPTS = {"query": "question: ", "document": ""}


@pytest.fixture
def uneven(sentences):
    """Sentences of 1 to 12 words."""
    words = " ".join(sentences).split()
    return [" ".join(words[start : start + 1 + start % 12]) for start in range(40)]


def whole(folder, kind="bert", after=(), pooling="mean", **kwargs):
    """A sentence-transformers model with modules after its pooling, saved."""
    transformer = Transformer(str(make_encoder(kind, folder / "encoder")))
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling), *after]
    SentenceTransformer(modules=modules, device="cpu", **kwargs).save_pretrained(str(folder / "model"))
    return folder / "model"


def in_bfloat16(folder):
    encoder = make_encoder("bert", folder)
    AutoModel.from_pretrained(encoder).bfloat16().save_pretrained(encoder)
    return encoder


def without_any_dropout(folder):
    return make_encoder("modernbert", folder, embedding_dropout=0.0, mlp_dropout=0.0, attention_dropout=0.0)


STUDENTS = {
    **{kind: (lambda folder, kind=kind: make_encoder(kind, folder), "cls") for kind in ENCODERS},
    "prompts": (lambda folder: whole(folder, prompts=PROMPTS, default_prompt_name="query"), "mean"),
    "dense": (lambda folder: whole(folder, after=[Dense(16, 12)], pooling="cls"), "cls, Dense"),
    "normalize": (lambda folder: whole(folder, after=[Normalize()]), "mean, Normalize"),
    "all three": (
        lambda folder: whole(folder, "distilbert", [LayerNorm(16), Dense(16, 12), Normalize()]),
        "mean, LayerNorm, Dense, Normalize",
    ),
    "two poolings": (lambda folder: whole(folder, "roberta", pooling=("cls", "max")), "cls+max"),
    "bfloat16": (in_bfloat16, "cls"),
    "no dropout": (without_any_dropout, "cls"),
}


def trained(folder, output, uneven, store, **changes):
    """A trainer of two steps, one on text and one on pairs."""
    set_seed(0)
    student = build_student(str(folder)).to("cpu")
    arguments = SentenceTransformerTrainingArguments(
        str(output),
        max_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    data = DatasetDict(text=Dataset.from_dict({"sentence": uneven}), pairs=store.dataset())
    loss = KDMCSELoss(student, KDMCSEConfig(multimodal_weight=0.5), features=store)
    trainer = KDMCSETrainer(student, arguments, data, loss=loss, pair_every=2, **changes)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", STUDENTS)
def test_it_is_trained_and_loaded_as_a_stock_model(name, uneven, store, tmp_path, caplog):
    make, pooling = STUDENTS[name]
    model = make(tmp_path)
    before = build_student(str(model)).to("cpu").encode(uneven[:8])
    trainer = trained(model, tmp_path / "checkpoints", uneven, store)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    student = trainer.model.eval()
    expected = student.encode(uneven[:8])
    assert np.abs(expected - before).max() > 1e-4  # it has moved
    assert pooling_of(student) == pooling
    assert trainer.head_losses[0].heads["text"].dense.in_features == expected.shape[1]
    assert ("the student (a modernbert) has no dropout" in caplog.text) == (name == "no dropout")

    trainer.save_model(str(tmp_path / "saved"))
    modules = json.loads((tmp_path / "saved" / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert pooling_of(loaded) == pooling
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert loaded.max_seq_length == 32
    np.testing.assert_array_equal(loaded.encode(uneven[:8]), expected)
    prompt = ("question: ", "query") if name == "prompts" else ("", None)
    assert (loaded.prompts["query"], loaded.default_prompt_name) == prompt


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("pairs", [False, True])
def test_padding_left_out_gives_the_same_loss_or_is_refused(name, pairs, uneven, store, tmp_path):
    student = build_student(str(STUDENTS[name][0](tmp_path))).to("cpu")
    loss = KDMCSELoss(without_dropout(student), KDMCSEConfig(multimodal_weight=0.5), features=store)
    student.double()
    loss.double()
    kind = student[0].auto_model.config.model_type
    features, labels = student.preprocess(uneven[:12]), torch.arange(12) if pairs else None
    with torch.no_grad():
        expected = loss([dict(features)], labels).total
        if kind in WITHOUT_PADDING:
            with unpadded(student):
                torch.testing.assert_close(loss([dict(features)], labels).total, expected, rtol=1e-9, atol=1e-9)
            return
    with pytest.raises(ValueError, match=f"the encoder is a {kind}"), unpadded(student):
        pass


def test_a_process_without_this_package_gets_the_same_vectors(uneven, store, tmp_path):
    for name in ("roberta", "all three"):
        trainer = trained(STUDENTS[name][0](tmp_path / name), tmp_path / name / "checkpoints", uneven, store)
        trainer.save_model(str(tmp_path / name / "saved"))
        np.save(tmp_path / name / "expected.npy", trainer.model.eval().encode(uneven[:8]))
    code = f"""if True:
        import sys
        import numpy as np
        from sentence_transformers import SentenceTransformer
        for name in ("roberta", "all three"):
            folder = {str(tmp_path)!r} + "/" + name
            vectors = SentenceTransformer(folder + "/saved", device="cpu").encode({uneven[:8]!r})
            np.testing.assert_array_equal(vectors, np.load(folder + "/expected.npy"))
        assert "st_kdmcse" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def without_padding_token(folder):
    make_encoder("bert", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


def router(folder):
    encoder = Transformer(str(make_encoder("bert", folder / "encoder")))
    routes = Router.for_query_document([encoder, Pooling(16)], [encoder, Pooling(16)])
    SentenceTransformer(modules=[routes], device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


def static(folder):
    tokenizer = AutoTokenizer.from_pretrained(make_encoder("bert", folder / "encoder")).backend_tokenizer
    words = StaticEmbedding(tokenizer, embedding_dim=16)
    SentenceTransformer(modules=[words], device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


def between(folder):
    transformer = Transformer(str(make_encoder("bert", folder / "encoder")))
    modules = [transformer, CNN(16, 8), Pooling(24)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "model"))
    return folder / "model"


def other_code(folder):
    model = whole(folder, after=[Normalize()])
    modules = json.loads((model / "modules.json").read_text())
    modules[2]["type"] = "custom.Normalize"
    (model / "modules.json").write_text(json.dumps(modules))
    return model


def damaged(folder):
    model = whole(folder)
    (model / "modules.json").write_text('[{"type"')
    return model


REFUSED = {
    "padding token": (without_padding_token, {}, "has no padding token"),
    "positions": (lambda folder: make_encoder("bert", folder), {"max_seq_length": 49}, "to the 48 positions"),
    "positions of RoBERTa": (
        lambda folder: make_encoder("roberta", folder),
        {"max_seq_length": 47},
        "the 46 positions",
    ),
    "positions of a whole model": (whole, {"max_seq_length": 49}, "to the 48 positions"),
    "Router": (router, {}, "consists of Router, and a student of Transformer and Pooling"),
    "StaticEmbedding": (static, {}, "consists of StaticEmbedding"),
    "CNN": (between, {}, "consists of Transformer, CNN, Pooling"),
    "other code": (other_code, {}, "consists of Transformer, Pooling, custom.Normalize"),
    "damaged": (damaged, {}, r"modules.json is damaged"),
    "Dense that pooling leaves out": (
        lambda folder: whole(folder, after=[Dense(16, 12), Normalize()]),
        {"pooling": "mean"},
        "`pooling` mean would leave out what .* has learned in its Dense",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_anything_is_trained(name, sentences, store, tmp_path):
    make, changes, message = REFUSED[name]
    (tmp_path / "data").mkdir()
    data = write_data(tmp_path / "data", sentences, store)
    model = make(tmp_path / "student")
    run = tmp_path / "run"
    given = TrainingOptions(**options(data, model, output_dir=run, eval_steps=0, **changes))
    with pytest.raises(ValueError, match=message):
        train(given)
    assert not run.exists() or [path.name for path in run.iterdir()] == [LOCK]
    with pytest.raises(ValueError, match=message):
        check_inputs(given)


def test_a_pooling_that_is_asked_for_replaces_the_models_own(uneven, tmp_path, caplog):
    folder = whole(tmp_path, after=[Normalize()], prompts=PROMPTS)
    with caplog.at_level("INFO", "st_kdmcse"):
        student = build_student(str(folder), pooling="cls").to("cpu")
    assert f"`pooling` cls leaves out the Normalize of {folder}" in caplog.text
    assert (pooling_of(student), student.prompts["query"]) == ("cls", "question: ")
    plain = build_student(str(tmp_path / "encoder")).to("cpu")
    np.testing.assert_array_equal(student.encode(uneven[:4], prompt=""), plain.encode(uneven[:4]))
    kept = build_student(str(folder)).to("cpu").encode(uneven[:4])
    mean = build_student(str(folder), pooling="mean").to("cpu").encode(uneven[:4])
    np.testing.assert_allclose(kept, mean / np.linalg.norm(mean, axis=1, keepdims=True), rtol=1e-5, atol=1e-6)


def test_a_whole_run_of_a_whole_model_goes_on_exactly(sentences, store, tmp_path):
    """Dense and LayerNorm are trained, kept in checkpoints, resumed, scored, exported, and guarded against changes."""
    (tmp_path / "data").mkdir()
    data = write_data(tmp_path / "data", sentences, store)
    model = whole(tmp_path, after=[Dense(16, 12), LayerNorm(12), Normalize()], pooling="cls")
    given = {"lr": 1e-2, "bf16": False, "save_steps": 2, "max_steps": 6}
    runs = [tmp_path / "whole", tmp_path / "resumed"]
    summary = train(TrainingOptions(**options(data, model, output_dir=runs[0], **given)))
    shutil.copytree(runs[0], runs[1])
    for lost in ("training_summary.json", "model.safetensors"):
        (runs[1] / lost).unlink()
    shutil.rmtree(runs[1] / "checkpoints" / "checkpoint-6")
    changed = copy_tree(model, tmp_path / "changed")
    weights = load_file(changed / "2_Dense" / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, changed / "2_Dense" / "model.safetensors")
    again = options(data, model, output_dir=runs[1], resume=True, **given)
    (tmp_path / "kept").mkdir()
    model.rename(tmp_path / "kept" / "model")
    changed.rename(model)
    with pytest.raises(ValueError, match="the modules at `model` have changed"):
        train(TrainingOptions(**again))
    shutil.rmtree(model)
    (tmp_path / "kept" / "model").rename(model)
    resumed = train(TrainingOptions(**again))
    assert resumed["sts_dev_curve"] == summary["sts_dev_curve"]
    for name in (
        "model.safetensors",
        "2_Dense/model.safetensors",
        "last/2_Dense/model.safetensors",
        "3_LayerNorm/model.safetensors",
    ):
        first, second = (load_file(run / name) for run in runs)
        assert all(torch.equal(value, second[key]) for key, value in first.items()), name
    before = load_file(model / "2_Dense" / "model.safetensors")["linear.weight"]
    assert not torch.equal(load_file(runs[0] / "last/2_Dense/model.safetensors")["linear.weight"], before)
    loaded = load_model(str(runs[0]), "cpu")
    dense = dense_layer(load_head(runs[0] / "heads", "grounding"))
    assert dense.in_features == loaded.get_embedding_dimension() == 12


@pytest.mark.parametrize("language", ["de", "zh"])
def test_a_run_is_scored_in_another_language(language, sentences, store, tmp_path):
    (tmp_path / "data").mkdir()
    data = write_data(tmp_path / "data", sentences, store)
    folder = write_multilingual(tmp_path / "stsb_multi_mt", {"de": GERMAN, "zh": CHINESE})
    given = options(data, make_encoder("roberta", tmp_path / "student"), output_dir=tmp_path / "run", bf16=False)
    summary = train(TrainingOptions(**{**given, "eval_data": f"{folder}:{language}", "max_steps": 2}))
    assert [point["step"] for point in summary["sts_dev_curve"]] == [2]
    assert np.isfinite(summary["sts_test_of_best"])


def test_its_text_image_model_has_all_modules(uneven, tmp_path, tiny_clip):
    student = build_student(str(STUDENTS["all three"][0](tmp_path))).to("cpu").eval()
    clip = Transformer(str(tiny_clip))
    tower = ImageTower("clip", [clip], clip.get_embedding_dimension())
    grounding, of_images = ProjectionHead(12, 6), ProjectionHead(tower.dim, 6)
    model = text_image_model(student, grounding, tower, of_images, normalized=True).to("cpu")
    with torch.no_grad():
        expected = grounding(student.encode(uneven[:4], convert_to_tensor=True))
    actual = model.encode(uneven[:4], convert_to_tensor=True)
    torch.testing.assert_close(actual, torch.nn.functional.normalize(expected, dim=1))
