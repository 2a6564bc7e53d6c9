"""Gradient caching: the plain losses again, in value and in every gradient, from parts of the batch."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import gradients, without_dropout
from sentence_transformers import InputExample, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import set_seed

from st_kdmcse import (
    CachedKDMCSELoss,
    CachedMCSELoss,
    CachedSimCSELoss,
    KDMCSEConfig,
    KDMCSELoss,
    KDMCSETrainer,
    MCSEConfig,
    MCSELoss,
    MultimodalInputExample,
    SimCSELoss,
    build_student,
    fit_objectives,
)

N = 13
HALF = MCSEConfig(multimodal_weight=0.5)
CONFIGS = {
    "paper": KDMCSEConfig.paper(multimodal_weight=0.7, image_threshold=0.5, text_threshold=0.5),
    "released": KDMCSEConfig.released(multimodal_weight=0.7),
    "released, filtered": KDMCSEConfig.released(
        multimodal_weight=0.7, filter_negatives=True, image_threshold=0.5, text_threshold=0.5
    ),
    "same image removed": KDMCSEConfig.paper(multimodal_weight=0.7, same_image="remove"),
}
# Sentences in a forward pass and anchors in a chunk: neither divides the batch; one of each; all at once.
SIZES = {"uneven": (5, 4), "single": (1, 1), "whole": (64, 64)}


@pytest.fixture
def store(exact_store):
    """Float32 cosines that are exact."""
    return exact_store


@pytest.fixture
def exact_student(student):
    """A student in float64 without dropout: what differs then is an error of the algorithm."""
    return without_dropout(student).double()


def pair(plain_class, cached_class, *args, mini_batch_size=5, chunk_rows=4, **kwargs):
    """A loss and its cached form with the same student and the same heads, in the student's precision."""
    plain = plain_class(*args, **kwargs)
    cached = cached_class(*args, mini_batch_size=mini_batch_size, chunk_rows=chunk_rows, **kwargs)
    dtype = next(plain.model.parameters()).dtype
    cached.heads.load_state_dict(plain.heads.state_dict())
    return plain.to(dtype), cached.to(dtype)


def kdmcse_pair(student, store, config="paper", **sizes):
    return pair(KDMCSELoss, CachedKDMCSELoss, student, CONFIGS[config], store.dim, store, **sizes)


def texts(student, sentences, columns=1):
    # Sentences of several lengths, so that a mini-batch may be narrower than the batch.
    lines = [" ".join(sentence.split()[: 2 + number % 5]) for number, sentence in enumerate(sentences[:N])]
    return [student.preprocess(lines) for _ in range(columns)]


def labels_of(store, kind):
    if kind == "text":
        return None
    rows = torch.arange(3, 3 + N)
    if kind == "rows":
        return rows.unsqueeze(1)
    batch = store.gather(rows)
    return torch.cat([torch.from_numpy(batch.image_features), torch.from_numpy(batch.text_features)], dim=1)


def assert_equal(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def assert_same_loss(plain, cached, features, labels):
    expected, actual = plain(features, labels), cached(features, labels)
    assert list(actual) == list(expected)
    assert_equal(dict(actual), dict(expected))
    assert actual.metrics == expected.metrics
    assert_equal(gradients(cached, actual.total), gradients(plain, expected.total))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", ["text", "rows", "values"])
@pytest.mark.parametrize("config", CONFIGS)
def test_value_and_every_gradient_are_those_of_the_plain_loss(exact_student, sentences, store, config, kind, sizes):
    if config == "same image removed" and kind == "values":
        pytest.skip("features by value say nothing about images")
    mini_batch_size, chunk_rows = SIZES[sizes]
    plain, cached = kdmcse_pair(exact_student, store, config, mini_batch_size=mini_batch_size, chunk_rows=chunk_rows)
    assert_same_loss(plain, cached, texts(exact_student, sentences), labels_of(store, kind))
    if kind == "rows" and config != "released":
        assert plain(texts(exact_student, sentences), labels_of(store, kind)).metrics["caption_negatives_removed"] > 0


def test_gradients_reach_all_that_is_trained(exact_student, sentences, store):
    _, cached = kdmcse_pair(exact_student, store)
    found = gradients(cached, cached(texts(exact_student, sentences), labels_of(store, "rows")).total)
    heads = {name for name in found if name.startswith("heads.")}
    assert heads == {
        f"heads.{head}.dense.{part}"
        for head in ("text", "grounding", "teacher_image", "teacher_text")
        for part in ("weight", "bias")
    }
    assert all(found[name].abs().sum() > 0 for name in heads)
    # The pooler of a BERT gets none, here as there.
    assert {name for name, _ in cached.named_parameters()} - found.keys() == {
        name for name, _ in cached.named_parameters() if ".pooler." in name
    }


@pytest.mark.parametrize("kind", ["text", "rows"])
def test_two_columns_are_two_views(exact_student, sentences, store, kind):
    plain, cached = kdmcse_pair(exact_student, store)
    assert_same_loss(plain, cached, texts(exact_student, sentences, columns=2), labels_of(store, kind))


@pytest.mark.parametrize(
    ("plain_class", "cached_class", "options"),
    [
        (SimCSELoss, CachedSimCSELoss, {"text_margin": 0.15}),
        (
            MCSELoss,
            CachedMCSELoss,
            {"teacher_dim": 8, "use_captions": True, "config": MCSEConfig(multimodal_weight=0.5)},
        ),
        (MCSELoss, CachedMCSELoss, {"teacher_dim": 8, "config": MCSEConfig(multimodal_weight=0.5)}),
    ],
)
def test_the_ablations_have_it_too(exact_student, sentences, store, plain_class, cached_class, options):
    plain, cached = pair(plain_class, cached_class, exact_student, **options)
    assert_same_loss(plain, cached, texts(exact_student, sentences), labels_of(store, "values"))


def test_each_term_has_its_own_gradients(exact_student, sentences, store):
    plain, cached = kdmcse_pair(exact_student, store)
    features, labels = texts(exact_student, sentences), labels_of(store, "rows")
    for name in ("text", "image", "caption"):
        assert_equal(gradients(cached, cached(features, labels)[name]), gradients(plain, plain(features, labels)[name]))


def reference_views(cached, features):
    """The mini-batches of a cached loss, embedded once and with gradient."""
    rows = [
        embeddings
        for column in (features[0], features[0])
        for embeddings, _ in cached.embed_minibatch_iter(dict(column), with_grad=True, copy_random_state=False)
    ]
    return torch.cat(rows).chunk(2)


def test_dropout_masks_are_replayed(student, sentences, store):
    student.double().train()
    plain, cached = kdmcse_pair(student, store)
    features, labels = texts(student, sentences), labels_of(store, "rows")
    set_seed(5)
    views = reference_views(cached, features)
    assert not torch.allclose(*views)
    expected = plain.compute_loss_from_embeddings(views, **plain.teacher_batch(labels, views[0].device))
    after = torch.get_rng_state()
    expected_gradients = gradients(plain, expected.total)
    set_seed(5)
    actual = cached(features, labels)
    assert torch.equal(torch.get_rng_state(), after), "the next batch draws what it would have drawn"
    assert_equal(dict(actual), dict(expected))
    torch.rand(7)  # what happens in between does not matter
    between = torch.get_rng_state()
    assert_equal(gradients(cached, actual.total), expected_gradients)
    assert torch.equal(torch.get_rng_state(), between), "the second pass leaves the random state alone"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_dropout_masks_of_the_device_are_replayed(student, sentences, store, compiled):
    student.to("cuda").double().train()
    plain, cached = kdmcse_pair(student, store)
    if compiled:  # as the Trainer does
        plain.model = cached.model = torch.compile(student)
    features = [{name: value.to("cuda") for name, value in texts(student, sentences)[0].items()}]
    set_seed(5)
    expected = gradients(plain, plain.compute_loss_from_embeddings(reference_views(cached, features)).total)
    set_seed(5)
    assert_equal(gradients(cached, cached(features, None).total), expected)


def test_the_loss_may_be_scaled_and_accumulated(exact_student, sentences, store):
    plain, cached = kdmcse_pair(exact_student, store)
    batches = [
        (texts(exact_student, sentences), labels_of(store, "rows")),
        (texts(exact_student, sentences[N:]), None),
    ]
    totals = [sum(loss(*batch).total * 0.5 for batch in batches) for loss in (plain, cached)]
    expected = gradients(plain, totals[0])
    assert_equal(gradients(cached, totals[1]), expected)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = gradients(cached, scaler.scale(sum(cached(*batch).total for batch in batches)))
    assert_equal(scaled, {name: 2048 * value for name, value in expected.items()}, 1e-8)


def test_both_passes_run_under_the_autocast_of_the_first(student, sentences, store):
    without_dropout(student)
    plain, cached = kdmcse_pair(student, store)
    dtypes = []
    student[0].auto_model.encoder.layer[0].attention.output.dense.register_forward_hook(
        lambda module, inputs, output: dtypes.append((output.dtype, torch.is_grad_enabled()))
    )
    features, labels = texts(student, sentences), labels_of(store, "rows")
    totals = []
    for loss in (plain, cached):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            totals.append(loss(features, labels).total)
    expected, actual = gradients(plain, totals[0]), gradients(cached, totals[1])
    assert dtypes[1:] == [(torch.bfloat16, False)] * 6 + [(torch.bfloat16, True)] * 6
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-2, atol=1e-2)
    expected, actual = (torch.cat([g[name].flatten() for name in expected]) for g in (expected, actual))
    assert torch.linalg.vector_norm(actual - expected) < 0.02 * torch.linalg.vector_norm(expected)
    dtypes.clear()
    total = cached(features, labels).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total.backward()
    assert {dtype for dtype, _ in dtypes} == {torch.float32}


def test_a_plain_loss_in_the_same_autocast_keeps_its_gradients(student, sentences, store):
    plain, cached = kdmcse_pair(student, store)
    features = texts(student, sentences)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached(features, None)
        total = plain(features, None).total
    assert "model.0.model.encoder.layer.0.attention.output.dense.weight" in gradients(plain, total)


def test_without_gradient_there_is_one_pass_and_no_graph(exact_student, sentences, store):
    plain, cached = kdmcse_pair(exact_student, store)
    passes = []
    exact_student[0].register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0]["input_ids"])))
    features, labels = texts(exact_student, sentences), labels_of(store, "rows")
    for context in (torch.no_grad, torch.inference_mode):
        passes.clear()
        with context():
            actual = cached(features, labels)
        assert passes == [5, 5, 3, 5, 5, 3]
        assert not actual.total.requires_grad
        assert_equal(dict(actual), {name: value.detach() for name, value in plain(features, labels).items()})


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that a result had."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and not func.is_view:
                self.elements = max(self.elements, value.numel())
        return result


def test_no_matrix_of_all_pairs_ever_exists(student, sentences, store):
    count = 400
    plain, cached = kdmcse_pair(student, store, "paper", mini_batch_size=16, chunk_rows=8)
    features = [student.preprocess([sentences[number % len(sentences)] for number in range(count)])]
    labels = (torch.arange(count) % len(store)).unsqueeze(1)
    passes = []
    student[0].register_forward_pre_hook(lambda module, inputs: passes.append(len(inputs[0]["input_ids"])))
    largest = {}
    for loss in (plain, cached):
        with LargestTensor() as seen:
            loss(features, labels).total.backward()
        largest[loss] = seen.elements
    assert largest[plain] >= count * count
    assert largest[cached] <= count * 256, "the head outputs, (N, 256)"
    assert passes[0] == 2 * count
    assert passes[1:] == [16] * (2 * 2 * count // 16)


@pytest.mark.parametrize("n_dims_per_step", [-1, 1])
def test_it_works_inside_matryoshka(exact_student, sentences, store, n_dims_per_step, monkeypatch):
    plain, cached = kdmcse_pair(exact_student, store)
    monkeypatch.setattr("random.sample", lambda values, count: list(values)[-count:])
    wrapped = [
        MatryoshkaLoss(exact_student, loss, [32, 16, 8], [1.0, 0.5, 0.3], n_dims_per_step) for loss in (plain, cached)
    ]
    features, labels = texts(exact_student, sentences), labels_of(store, "rows")
    expected, actual = (loss(features, labels) for loss in wrapped)
    assert_equal(dict(actual), dict(expected))
    assert actual.metrics == expected.metrics
    assert_equal(gradients(cached, 3 * actual.total), gradients(plain, 3 * expected.total))


@pytest.mark.parametrize("name", ["mini_batch_size", "chunk_rows"])
def test_sizes_below_one_are_refused(student, name):
    with pytest.raises(ValueError, match=f"`{name}` must be at least 1, got 0"):
        CachedKDMCSELoss(student, **{name: 0})


@pytest.mark.parametrize("loss_class", [CachedKDMCSELoss, CachedMCSELoss, CachedSimCSELoss])
def test_documentation_is_as_of_the_other_losses(student, loss_class):
    loss = loss_class(student, mini_batch_size=7)
    assert loss.get_config_dict()["mini_batch_size"] == 7
    assert "gao2021scaling" in loss.citation
    assert "gao2021simcse" in loss.citation
    for section in ("Args:", "References:", "Requirements:", "Inputs:", "Relations:", "Example:"):
        assert section in loss_class.__doc__


def test_heads_are_those_of_the_plain_loss(student, store, tmp_path):
    plain, cached = kdmcse_pair(student, store)
    cached.save_heads(tmp_path)
    other = KDMCSELoss(student, CONFIGS["paper"], store.dim, store)
    other.load_heads(tmp_path)
    assert all(torch.equal(value, plain.heads.state_dict()[name]) for name, value in other.heads.state_dict().items())


def make_trainer(tiny_bert, sentences, store, output, cached, exact=False, **options):
    set_seed(3)
    student = build_student(str(tiny_bert)).to("cpu")
    if exact:
        without_dropout(student).double()
    plain_loss, cached_loss = kdmcse_pair(student, store, "same image removed")
    return KDMCSETrainer(
        model=student,
        args=SentenceTransformerTrainingArguments(
            str(output),
            per_device_train_batch_size=12,
            learning_rate=1e-3,
            logging_steps=1,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **options,
        ),
        train_dataset=DatasetDict(text=Dataset.from_dict({"sentence": sentences[:96]}), pairs=store.dataset()),
        loss=cached_loss if cached else plain_loss,
        pair_every=2,
    )


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_is_that_with_the_plain_loss(tiny_bert, sentences, store, tmp_path, accumulation):
    trainers = []
    for cached in (False, True):
        trainer = make_trainer(
            tiny_bert, sentences, store, tmp_path, cached, True, max_steps=6, gradient_accumulation_steps=accumulation
        )
        trainer.train()
        trainers.append(trainer)
    plain, cached = trainers
    assert_equal(cached.model.state_dict(), plain.model.state_dict(), 1e-8)
    assert_equal(cached.loss.heads.state_dict(), plain.loss.heads.state_dict(), 1e-8)
    for expected, actual in zip(plain.state.log_history[:-1], cached.state.log_history[:-1], strict=True):
        assert actual == pytest.approx(expected)
    assert any(entry.get("caption_negatives_removed", 0) > 0 for entry in cached.state.log_history)


def test_fit_is_that_with_the_plain_loss(tiny_bert, sentences, store, tmp_path):
    texts = [InputExample(texts=[sentence]) for sentence in sentences[:48]]
    captions = [MultimodalInputExample(texts=[store.caption(row)], row=row) for row in range(24)]
    states = []
    for number in range(2):
        set_seed(3)
        student = without_dropout(build_student(str(tiny_bert)).to("cpu")).double()
        loss = kdmcse_pair(student, store)[number]
        objectives = fit_objectives(
            *(DataLoader(part, batch_size=12, shuffle=True) for part in (texts, captions)), loss
        )
        student.fit(
            objectives,
            warmup_steps=0,
            optimizer_params={"lr": 1e-3},
            show_progress_bar=False,
            checkpoint_path=str(tmp_path),
        )
        states.append({**student.state_dict(), **loss.heads.state_dict()})
    assert_equal(states[1], states[0], 1e-8)


def test_a_resumed_run_with_dropout_is_bit_for_bit_one_that_never_stopped(tiny_bert, sentences, store, tmp_path):
    whole = make_trainer(tiny_bert, sentences, store, tmp_path / "whole", True, max_steps=8, save_steps=5)
    whole.train()
    resumed = make_trainer(tiny_bert, sentences, store, tmp_path / "resumed", True, max_steps=8, save_steps=5)
    torch.rand(17)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for part in (lambda trainer: trainer.model.state_dict(), lambda trainer: trainer.loss.heads.state_dict()):
        assert all(torch.equal(value, part(resumed)[name]) for name, value in part(whole).items())
    card = (tmp_path / "whole" / "checkpoint-8" / "README.md").read_text()
    assert "CachedKDMCSELoss" in card
    assert "mini_batch_size" in card
