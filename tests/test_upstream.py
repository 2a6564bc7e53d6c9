"""Private parts of the libraries: each test fails by name when a version moves its part."""

import inspect
from contextlib import contextmanager

import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.losses import gradcache
from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss, MatryoshkaLoss
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from st_kdmcse import SimCSELoss, upstream
from st_kdmcse.upstream import HookedTrainer

MEND = "mend st_kdmcse/upstream.py: "


class Recorder(HookedTrainer):
    """Notes which hooks the library reaches."""

    def __init__(self, *args, **kwargs):
        self.reached = []
        super().__init__(*args, **kwargs)

    @contextmanager
    def around_training(self):
        self.reached.append("around_training")
        yield
        self.reached.append("after_training")

    def parameters_to_clip(self, model):
        self.reached.append("parameters_to_clip")
        return super().parameters_to_clip(model)

    def gradients_clipped(self, norm):
        self.reached.append(("gradients_clipped", norm.ndim))

    def training_batches(self, loader, dataset):
        self.reached.append("training_batches")
        return super().training_batches(loader, dataset)

    def save_extra(self, directory):
        self.reached.append(("save_extra", (directory / "config.json").is_file() or (directory / "0").exists()))

    def load_extra(self, directory):
        self.reached.append("load_extra")

    def checkpoint_loaded(self):
        self.reached.append("checkpoint_loaded")
        self.loss.heads_fit()


@pytest.fixture
def trainer(student, sentences, tmp_path):
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, per_device_train_batch_size=4, use_cpu=True, report_to="none"
    )
    data = DatasetDict(text=Dataset.from_dict({"sentence": sentences[:16]}))
    return Recorder(student, arguments, data, loss=SimCSELoss(student))


OVERRIDDEN = ["_inner_training_loop", "_clip_grad_norm", "_build_dataloader", "_save", "_load_from_checkpoint"]


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_the_trainer_has_the_private_method(name):
    assert callable(getattr(SentenceTransformerTrainer, name, None)), f"{MEND}the trainer has no {name} any more"
    theirs = list(inspect.signature(getattr(SentenceTransformerTrainer, name)).parameters)
    ours = list(inspect.signature(getattr(HookedTrainer, name)).parameters)
    if ours[1:] != ["args", "kwargs"]:
        assert ours == theirs, f"{MEND}{name} takes {theirs} now"


def test_the_trainer_overrides_nothing_else_that_is_private():
    private = {
        name
        for name, value in vars(HookedTrainer).items()
        if name.startswith("_") and not name.startswith("__") and inspect.isfunction(value)
    }
    assert private == set(OVERRIDDEN)


@pytest.mark.parametrize(
    ("hook", "method"),
    [
        ("around_training", "_inner_training_loop"),
        ("parameters_to_clip", "_clip_grad_norm"),
        (("gradients_clipped", 0), "_clip_grad_norm"),
        ("training_batches", "_build_dataloader"),
        (("save_extra", True), "_save"),
    ],
)
def test_training_reaches_the_hook(trainer, hook, method):
    trainer.train()
    assert hook in trainer.reached, f"{MEND}train() does not call {method} any more"
    assert trainer.reached[-1] == "after_training", f"{MEND}the loop ends outside of _inner_training_loop"


def test_resuming_reaches_the_hook(trainer, tmp_path):
    trainer.train()
    assert "load_extra" not in trainer.reached
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert trainer.reached.index("load_extra") < trainer.reached.index("checkpoint_loaded")
    assert "load_extra" in trainer.reached, f"{MEND}resuming does not call _load_from_checkpoint any more"


def test_loading_the_best_model_reaches_the_hook(trainer, tmp_path):
    trainer.train()
    assert "load_extra" not in trainer.reached
    trainer.state.best_model_checkpoint = str(tmp_path / "checkpoint-1")
    trainer._load_best_model()
    assert "load_extra" in trainer.reached, f"{MEND}_load_best_model does not call _load_from_checkpoint any more"


def test_clipping_takes_the_parameters_that_it_is_given(trainer):
    only = next(trainer.model.parameters())
    trainer.parameters_to_clip = lambda model: [only]
    for parameter in trainer.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.create_optimizer_and_scheduler(1)
    trainer.args.max_grad_norm = 1e-3
    trainer._clip_grad_norm(trainer.model)
    assert only.grad.norm() <= 1.001e-3, f"{MEND}_clip_grad_norm is not what clips"
    assert all((p.grad == 1).all() for p in trainer.model.parameters() if p is not only)


def test_the_gradient_cache_hook_takes_these_arguments():
    parameters = list(inspect.signature(upstream.backward_of_mini_batches).parameters)
    expected = ["grad_output", "sentence_features", "loss_obj", "cache", "random_states", "ranges"]
    assert parameters == expected, f"{MEND}_backward_hook takes {parameters} now"
    assert upstream.backward_of_mini_batches is gradcache._backward_hook


def test_the_gradient_cache_mixin_embeds_in_mini_batches(student, sentences):
    loss = CachedMultipleNegativesRankingLoss(student, mini_batch_size=3)
    assert isinstance(loss, upstream.CachedLossMixin), f"{MEND}CachedLossMixin is not the library's base any more"
    features = student.preprocess(sentences[:7])
    parts = list(loss.embed_minibatch_iter(features, with_grad=False, copy_random_state=True))
    assert [len(rows) for rows, _ in parts] == [3, 3, 1], f"{MEND}embed_minibatch_iter has another signature"
    assert all(isinstance(random, upstream.RandContext) for _, random in parts)


def test_matryoshka_leaves_its_decorator_on_cached_losses(student):
    loss = CachedMultipleNegativesRankingLoss(student)
    MatryoshkaLoss(student, loss, [32, 8])
    found = vars(loss).get("calculate_loss")
    assert isinstance(found, upstream.CachedLossDecorator), f"{MEND}MatryoshkaLoss decorates in another way"
    assert list(found.matryoshka_dims) == [32, 8]
    assert len(found.matryoshka_weights) == 2
    assert found.n_dims_per_step == -1
    assert upstream.shrink(torch.ones(2, 32), 8).shape == (2, 8)


def test_embed_columns_gives_one_embedding_a_column(student, sentences):
    columns = [student.preprocess(sentences[:3]) for _ in range(2)]
    first, second = upstream.embed_columns(student, columns, separate_first=False)
    assert first.shape == second.shape == (3, 32), f"{MEND}embed_columns has moved or changed"


def test_attention_is_registered_and_called(student, sentences, monkeypatch):
    assert upstream.attention_of(student[0].auto_model) == "sdpa", f"{MEND}_attn_implementation has moved"
    calls = []
    plain = upstream.sdpa_attention_forward
    monkeypatch.setattr(upstream, "sdpa_attention_forward", lambda *a, **k: calls.append(1) or plain(*a, **k))
    expected = student.encode(sentences[:3])
    assert not calls
    student[0].auto_model.set_attn_implementation(upstream.ATTENTION)
    found = student.encode(sentences[:3])
    assert len(calls) == 2, f"{MEND}a layer does not call the registered attention any more"
    assert abs(found - expected).max() < 1e-6
    for interface in (AttentionInterface, AttentionMaskInterface):
        assert upstream.ATTENTION in interface().valid_keys()


def test_attention_with_dropout_is_that_of_pytorch_before_anything_is_dropped(student):
    attention = AttentionInterface()[upstream.ATTENTION]
    query, key, value = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], dtype=torch.bool)[:, None, None]
    layer = student[0].auto_model.encoder.layer[0].attention.self
    for given in (None, mask):
        plain, _ = attention(layer, query, key, value, given, dropout=0.0, scaling=0.7)
        ours, _ = attention(layer, query, key, value, given, dropout=1e-9, scaling=0.7)  # rounds to no mask at all
        assert ours.shape == plain.shape == (2, 5, 3, 4)
        assert torch.allclose(ours, plain, atol=1e-6)
        gradients = [torch.autograd.grad(each.square().sum(), (query, key, value)) for each in (plain, ours)]
        assert all(torch.allclose(*pair, atol=1e-5) for pair in zip(*gradients, strict=True))
    torch.manual_seed(0)
    mean = torch.stack([attention(layer, query, key, value, mask, dropout=0.1, scaling=0.7)[0] for _ in range(3000)])
    assert torch.allclose(mean.mean(dim=0), plain, atol=0.05)


def test_masks_are_made_without_a_look_at_them():
    parameters = inspect.signature(upstream.sdpa_mask).parameters
    assert "allow_is_bidirectional_skip" in parameters, f"{MEND}sdpa_mask has no allow_is_bidirectional_skip any more"


@pytest.mark.parametrize("encoder", ["tiny_bert", "tiny_roberta"])
def test_token_positions_are_those_of_the_encoder(request, encoder, sentences):
    from st_kdmcse import build_student

    model = build_student(str(request.getfixturevalue(encoder))).to("cpu").eval()
    features = model.preprocess(["a dog", sentences[0]])
    ids, mask = features["input_ids"], features["attention_mask"]
    bare = model[0].auto_model
    positions = upstream.token_positions(bare, ids)
    with torch.no_grad():
        expected = bare(input_ids=ids, attention_mask=mask).last_hidden_state
        found = bare(input_ids=ids, attention_mask=mask, position_ids=positions).last_hidden_state
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])


def test_nested_gather_keeps_tensors_of_one_process():
    given = {"loss": torch.tensor([1.0, 2.0])}
    assert torch.equal(upstream.nested_gather(given, parallel_mode=None)["loss"], given["loss"])


def test_a_model_leaves_autocast_after_training_and_gets_it_again(student, sentences, tmp_path):
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=4, use_cpu=True, bf16=True, report_to="none"
    )
    data = DatasetDict(text=Dataset.from_dict({"sentence": sentences[:16]}))
    trainer = Recorder(student, arguments, data, loss=SimCSELoss(student))
    computed = set()
    layer = student[0].auto_model.encoder.layer[0].output.dense
    layer.register_forward_hook(lambda _, __, output: computed.add(output.dtype))
    for _ in range(2):
        computed.clear()
        trainer.train()
        assert torch.bfloat16 in computed, f"{MEND}training is not in autocast"
        computed.clear()
        student.encode(sentences[:2])
        assert computed == {torch.float32}, f"{MEND}the model computes in autocast after training"


def test_a_trial_is_gone_on_with_as_it_was(tmp_path):
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    first = optuna.create_study(study_name="s", storage=storage)
    trial = first.ask()
    value = trial.suggest_float("lr", 0.0, 1.0)
    trial.report(0.5, 1)
    again = optuna.load_study(study_name="s", storage=storage)
    (found,) = again.trials
    assert found.state.name == "RUNNING"
    trial = upstream.trial_again(again, found)
    assert trial.suggest_float("lr", 0.0, 1.0) == value, f"{MEND}a trial forgets its parameters"
    again.tell(trial, 0.25)
    assert [(each.value, each.intermediate_values) for each in again.trials] == [(0.25, {1: 0.5})]
