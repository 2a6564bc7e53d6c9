"""The trainer: schedule, heads, exact resumption, logs."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import without_dropout
from packaging.version import Version
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, Matryoshka2dLoss, MatryoshkaLoss
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import set_seed

from st_kdmcse import (
    CachedKDMCSELoss,
    KDMCSEConfig,
    KDMCSEDataCollator,
    KDMCSELoss,
    KDMCSETrainer,
    SimCSELoss,
    build_student,
)
from st_kdmcse.losses.components import LossComponents
from st_kdmcse.training.student import views_differ
from st_kdmcse.training.trainer import CUDA_GRAPH_MODES

OF_TRAINER = ("head_learning_rate", "captions_per_image_in_batch")


def sources(sentences, store):
    return DatasetDict(text=Dataset.from_dict({"sentence": sentences[:64]}), pairs=store.dataset())


def make_trainer(
    tiny_bert, output, data, store, wrap=lambda model, loss: loss, pretokenize=True, multiple=1, unpad=None, **options
):
    arguments = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 5,
        "logging_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    evaluator = arguments.pop("evaluator", None)
    of_trainer = {name: arguments.pop(name) for name in OF_TRAINER if name in arguments}
    set_seed(3)
    model = build_student(str(tiny_bert)).to("cpu")
    loss = KDMCSELoss(model, KDMCSEConfig(multimodal_weight=0.5), features=store)
    return KDMCSETrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(output_dir=str(output), **arguments),
        train_dataset=data,
        loss=wrap(model, loss),
        evaluator=evaluator,
        pretokenize=pretokenize,
        pad_to_multiple_of=multiple,
        unpad=unpad,
        pair_every=3,
        **of_trainer,
    )


def everything(trainer):
    """All tensors that training changes, by name."""
    optimizer = {
        f"{number}.{name}": value
        for number, state in trainer.optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }
    return {**trainer.model.state_dict(), **trainer.head_losses[0].heads.state_dict(), **optimizer}


@pytest.mark.parametrize(
    ("step", "options"), [(5, {}), (20, {}), (20, {"head_learning_rate": 1e-2, "captions_per_image_in_batch": 2})]
)
def test_a_resumed_run_is_bit_for_bit_one_that_never_stopped(tiny_bert, sentences, store, tmp_path, step, options):
    data = sources(sentences, store)
    whole = make_trainer(tiny_bert, tmp_path / "whole", data, store, **options)
    whole.train()
    assert whole.state.global_step == 2 * 27  # 9 pair batches, every third
    resumed = make_trainer(tiny_bert, tmp_path / "resumed", data, store, **options)
    torch.rand(17)  # a new process is in another state
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    expected, actual = everything(whole), everything(resumed)
    assert expected.keys() == actual.keys()
    different = [
        name for name in expected if not torch.equal(torch.as_tensor(expected[name]), torch.as_tensor(actual[name]))
    ]
    assert different == []
    losses = [
        {
            entry["step"]: entry["loss"]
            for entry in trainer.state.log_history
            if "loss" in entry and entry["step"] > step + 4
        }
        for trainer in (whole, resumed)
    ]
    assert losses[0] == losses[1]  # of the windows of four steps that lie behind the checkpoint


def test_resuming_in_the_second_epoch_keeps_the_order(tiny_bert, sentences, store, tmp_path):
    data = sources(sentences, store)
    whole = make_trainer(tiny_bert, tmp_path / "whole", data, store)
    whole.train()
    resumed = make_trainer(tiny_bert, tmp_path / "resumed", data, store)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-35"))
    expected, actual = everything(whole), everything(resumed)
    assert all(torch.equal(torch.as_tensor(expected[name]), torch.as_tensor(actual[name])) for name in expected)


@pytest.mark.parametrize("name", ["heads/heads.safetensors", "optimizer.pt", "rng_state.pth"])
def test_without_one_of_its_files_a_checkpoint_is_not_resumed(tiny_bert, sentences, store, tmp_path, name):
    data = sources(sentences, store)
    make_trainer(tiny_bert, tmp_path, data, store, max_steps=5).train()
    (tmp_path / "checkpoint-5" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} is missing"):
        make_trainer(tiny_bert, tmp_path, data, store).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_the_best_model_comes_back_with_its_heads(tiny_bert, sentences, store, tmp_path):
    class Worsening(EmbeddingSimilarityEvaluator):
        """A score that is best at the first evaluation."""

        calls = 0

        def __call__(self, *args, **kwargs):
            self.calls += 1
            return {"score": -float(self.calls)}

    trainer = make_trainer(
        tiny_bert,
        tmp_path,
        sources(sentences, store),
        store,
        evaluator=Worsening(["a"], ["b"], [1.0]),
        max_steps=15,
        eval_strategy="steps",
        eval_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="eval_score",
    )
    trainer.train()
    best = tmp_path / "checkpoint-5"
    assert Path(trainer.state.best_model_checkpoint) == best
    reference = KDMCSELoss(SentenceTransformer(str(best), device="cpu"), teacher_dim=store.dim)
    reference.load_heads(best / "heads")
    for name, value in {**reference.model.state_dict(), **reference.heads.state_dict()}.items():
        assert torch.equal(value, everything(trainer)[name]), name


@pytest.mark.parametrize("kind", ["plain", "cached", "matryoshka"])
def test_heads_have_a_learning_rate_of_their_own(tiny_bert, sentences, store, tmp_path, kind):
    wrap = {
        "plain": lambda model, loss: loss,
        "cached": lambda model, loss: CachedKDMCSELoss(model, features=store, mini_batch_size=4),
        "matryoshka": lambda model, loss: MatryoshkaLoss(model, loss, [32, 16]),
    }[kind]
    options = {"head_learning_rate": 1e-2, "weight_decay": 0.1, "max_steps": 4, "warmup_steps": 0}
    trainer = make_trainer(tiny_bert, tmp_path, sources(sentences, store), store, wrap=wrap, **options)
    heads = {id(parameter) for parameter in trainer.head_parameters}
    assert len(heads) == 8
    trainer.create_optimizer_and_scheduler(4)
    for _ in range(2):
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    for group in trainer.optimizer.param_groups:
        of_heads = {id(parameter) in heads for parameter in group["params"]}
        assert of_heads in ({True}, {False})
        assert group["initial_lr"] == (1e-2 if of_heads == {True} else 1e-3)
        assert group["lr"] == group["initial_lr"] / 2
    decay = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert {(p.ndim, decay[id(p)]) for p in trainer.head_parameters} == {(2, 0.1), (1, 0.0)}
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert len(decay) == len(trained) + len(heads)


def test_the_arguments_of_the_caller_stay_as_they_are(tiny_bert, store, tmp_path):
    arguments = SentenceTransformerTrainingArguments(str(tmp_path), use_cpu=True, learning_rate_mapping={"dense": 1e-4})
    model = build_student(str(tiny_bert)).to("cpu")
    trainer = KDMCSETrainer(
        model, arguments, store.dataset(), loss=KDMCSELoss(model, features=store), head_learning_rate=1e-2
    )
    assert arguments.learning_rate_mapping == {"dense": 1e-4}
    assert list(trainer.args.learning_rate_mapping.values()) == [1e-4, 1e-2]


def test_pair_batches_hold_several_captions_of_an_image(tiny_bert, sentences, store, tmp_path):
    options = {"captions_per_image_in_batch": 3, "per_device_train_batch_size": 12}
    trainer = make_trainer(tiny_bert, tmp_path, sources(sentences, store), store, **options)
    batches = [batch["label"] for batch in trainer.get_train_dataloader() if "label" in batch]
    assert len(batches) == 6
    for rows in batches:
        assert torch.unique(torch.as_tensor(store.image_rows[rows]), return_counts=True)[1].tolist() == [3] * 4
    model = trainer.model
    simcse = KDMCSETrainer(model, trainer.args, store.dataset(), loss=SimCSELoss(model), captions_per_image_in_batch=3)
    with pytest.raises(ValueError, match="needs the images of the pairs: give `features`"):
        simcse.get_train_dataloader()


def test_gradients_are_clipped_by_the_norm_of_student_and_heads(tiny_bert, sentences, store, tmp_path):
    trainer = make_trainer(tiny_bert, tmp_path, sources(sentences, store), store, max_grad_norm=1e-3, max_steps=3)
    norms = []
    clip = trainer._clip_grad_norm

    def spy(model):
        gradients = [p.grad for p in [*model.parameters(), *trainer.head_parameters] if p.grad is not None]
        before = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        returned = clip(model)
        after = torch.linalg.vector_norm(torch.stack([g.norm() for g in gradients]))
        norms.append((before, returned, after))
        return returned

    trainer._clip_grad_norm = spy
    trainer.train()
    for before, returned, after in norms:
        torch.testing.assert_close(before, returned)
        torch.testing.assert_close(after, torch.tensor(1e-3), rtol=1e-2, atol=0)


def test_logs_show_each_term_over_the_batches_that_have_it(tiny_bert, sentences, store, tmp_path):
    trainer = make_trainer(tiny_bert, tmp_path, sources(sentences, store), store, logging_steps=3, max_steps=6)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for entry in logs:
        # One of three steps has the cross-modal terms: the mean loss has a third of them.
        assert entry["loss"] == pytest.approx(entry["text"] + (entry["image"] + entry["caption"]) / 3, abs=2e-3)
        assert entry["caption_negatives_removed"] >= 0


def test_a_wrapped_loss_keeps_its_heads_and_its_terms(tiny_bert, sentences, store, tmp_path):
    trainer = make_trainer(
        tiny_bert,
        tmp_path,
        sources(sentences, store),
        store,
        max_steps=5,
        logging_steps=5,
        wrap=lambda model, loss: MatryoshkaLoss(model, loss, [32, 16]),
    )
    trainer.train()
    assert (tmp_path / "checkpoint-5" / "heads" / "heads.safetensors").is_file()
    assert "image" in next(entry for entry in trainer.state.log_history if "loss" in entry)


def test_checkpoints_are_stock_models(tiny_bert, sentences, store, tmp_path):
    trainer = make_trainer(tiny_bert, tmp_path, sources(sentences, store), store, max_steps=5)
    trainer.train()
    loaded = SentenceTransformer(str(tmp_path / "checkpoint-5"), device="cpu")
    assert (loaded.encode(sentences[:8]) == trainer.model.encode(sentences[:8])).all()
    config = json.loads((tmp_path / "checkpoint-5" / "heads" / "heads_config.json").read_text())
    assert config["loss"] == "KDMCSELoss"
    assert config["teacher_dim"] == store.dim


def test_the_model_card_names_the_loss_its_options_and_the_papers(tiny_bert, sentences, store, tmp_path):
    trainer = make_trainer(tiny_bert, tmp_path, sources(sentences, store), store, max_steps=5)
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    card = (tmp_path / "model" / "README.md").read_text()
    for expected in ("KDMCSELoss", '"multimodal_weight": 0.5', "nguyen2024kdmcse", "gao2021simcse"):
        assert expected in card
    assert max(len(line) for line in card.splitlines()) < 1000, "statistics of row numbers"


@pytest.mark.parametrize("in_parts", ["accumulation", "gradient caching"])
def test_cuda_graphs_are_not_asked_to_add_gradients_up(tiny_bert, sentences, store, tmp_path, in_parts):
    def cached(model, loss):
        return CachedKDMCSELoss(model, features=store)

    changes = {"gradient_accumulation_steps": 2} if in_parts == "accumulation" else {"wrap": cached}
    for mode in CUDA_GRAPH_MODES:
        with pytest.raises(ValueError, match="overwrites gradients"):
            make_trainer(
                tiny_bert, tmp_path, sources(sentences, store), store, torch_compile_mode=mode, max_steps=6, **changes
            )
    make_trainer(tiny_bert, tmp_path, sources(sentences, store), store, torch_compile=True, max_steps=6, **changes)


def test_gradient_accumulation_takes_a_step_from_one_source(tiny_bert, sentences, store, tmp_path):
    trainer = make_trainer(
        tiny_bert, tmp_path, sources(sentences, store), store, gradient_accumulation_steps=2, max_steps=6
    )
    seen = []
    forward = trainer.loss.forward
    trainer.loss.forward = lambda features, labels=None: seen.append(labels is not None) or forward(features, labels)
    trainer.train()
    assert seen == [False, False, False, False, True, True] * 2


def test_one_dataset_alone_and_the_stock_trainer(tiny_bert, sentences, store, tmp_path):
    make_trainer(tiny_bert, tmp_path / "pairs", store.dataset(), store, max_steps=2).train()
    model = build_student(str(tiny_bert)).to("cpu")
    for name, loss in (
        ("simcse", SimCSELoss(model)),
        ("kdmcse", KDMCSELoss(model, features=store)),
    ):
        trainer = SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                str(tmp_path / name), max_steps=2, logging_steps=1, report_to="none", use_cpu=True, disable_tqdm=True
            ),
            train_dataset=store.dataset(),
            data_collator=KDMCSEDataCollator(model.preprocess),
            loss=loss,
        )
        trainer.train()
        assert ("image" in trainer.state.log_history[0]) == (name == "kdmcse")


def test_a_stock_trainer_is_not_resumed_with_random_heads(tiny_bert, store, tmp_path):
    def stock(max_steps):
        model = build_student(str(tiny_bert)).to("cpu")
        return SentenceTransformerTrainer(
            model=model,
            args=SentenceTransformerTrainingArguments(
                str(tmp_path), max_steps=max_steps, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True
            ),
            train_dataset=store.dataset(),
            data_collator=KDMCSEDataCollator(model.preprocess),
            loss=KDMCSELoss(model, features=store),
        )

    stock(2).train()
    with pytest.raises(ValueError, match="its heads are random still.*Use KDMCSETrainer"):
        stock(4).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("wrapper", [AdaptiveLayerLoss, Matryoshka2dLoss])
def test_losses_of_layers_are_refused(tiny_bert, store, tmp_path, wrapper):
    def wrap(model, loss):
        return wrapper(model, loss, **({"matryoshka_dims": [32, 16]} if wrapper is Matryoshka2dLoss else {}))

    with pytest.raises(ValueError, match="AdaptiveLayerLoss and Matryoshka2dLoss do not work"):
        make_trainer(tiny_bert, tmp_path, store.dataset(), store, wrap)
    model = build_student(str(tiny_bert)).to("cpu")
    loss = wrap(model, KDMCSELoss(model, features=store))
    with pytest.raises(ValueError, match="AdaptiveLayerLoss and Matryoshka2dLoss do not work"):
        loss([model.preprocess(["a dog", "a cat"])], torch.tensor([0, 1]))


def test_streaming_datasets_are_refused(tiny_bert, store, tmp_path):
    streaming = store.dataset().to_iterable_dataset()
    for data, name in ((streaming, "train"), ({"pairs": streaming}, "pairs")):
        with pytest.raises(ValueError, match=f"dataset '{name}' is a streaming one.*streaming=False"):
            make_trainer(tiny_bert, tmp_path, data, store)


def test_a_student_that_truncates_is_refused(tiny_bert, store):
    model = build_student(str(tiny_bert)).to("cpu")
    model.truncate_dim = 16
    with pytest.raises(ValueError, match="truncate_dim 16"):
        KDMCSELoss(model, features=store)


def test_columns_that_would_be_trained_on_as_text_are_refused(tiny_bert, sentences, store, tmp_path):
    data = Dataset.from_dict({"sentence": sentences[:8], "image_path": ["a.jpg"] * 8, "row": list(range(8))})
    with pytest.raises(ValueError, match="select_columns"):
        make_trainer(tiny_bert, tmp_path, data, store)


def test_tokenizing_once_changes_nothing(tiny_bert, sentences, store, tmp_path, caplog):
    trainers = []
    with caplog.at_level("INFO", "st_kdmcse"):
        for once in (True, False):
            data = sources(sentences, store)
            trainers.append(make_trainer(tiny_bert, tmp_path / str(once), data, store, pretokenize=once))
            trainers[-1].train()
    assert "batch by batch" not in caplog.text
    loaders = [type(trainer.get_train_dataloader().dataset).__name__ for trainer in trainers]
    assert loaders == ["TokenBatches", "ConcatDataset"]
    once, again = map(everything, trainers)
    assert [name for name in once if not torch.equal(torch.as_tensor(once[name]), torch.as_tensor(again[name]))] == []


def test_a_collator_of_ones_own_is_used(tiny_bert, sentences, store, tmp_path, caplog):
    trainer = make_trainer(tiny_bert, tmp_path, sources(sentences, store), store)
    trainer.data_collator.prompts = "query: "
    with caplog.at_level("INFO", "st_kdmcse"):
        loader = trainer.get_train_dataloader()
    assert type(loader.dataset).__name__ == "ConcatDataset"
    assert "sentences are tokenized batch by batch: the collator has its own prompts" in caplog.text


def test_padding_to_multiples_changes_only_rounding(tiny_bert, sentences, store, tmp_path):
    trainers = []
    for multiple in (1, 16):
        data = sources(sentences, store)
        trainer = make_trainer(
            tiny_bert, tmp_path / str(multiple), data, store, multiple=multiple, unpad=False, learning_rate=1e-5
        )
        without_dropout(trainer.model)
        trainer.train()
        trainers.append(trainer)
    (ids,) = {batch["sentence_input_ids"].shape[1] for batch in trainers[1].get_train_dataloader()}
    assert ids == 16
    for name, value in trainers[0].model.state_dict().items():
        torch.testing.assert_close(trainers[1].model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


def test_rows_that_the_store_does_not_have_are_named(tiny_bert, sentences, store, tmp_path):
    data = sources(sentences, store)
    data["pairs"] = Dataset.from_dict({"sentence": ["a", "b"] * 8, "row": [0] * 15 + [len(store)]})
    trainer = make_trainer(tiny_bert, tmp_path, data, store)
    with pytest.raises(ValueError, match=r"'pairs', example 15: row 72 is not one of the 72 of the feature store"):
        trainer.train()


@pytest.mark.skipif(Version(torch.__version__) < Version("2.14"), reason="PyTorch 2.7 asks at each step, 2.14 does not")
def test_no_step_asks_for_the_value_of_a_tensor(tiny_bert, sentences, store, tmp_path):
    # Each such question would have a GPU finish what it was given before it is given more.
    counts = []
    for steps in (4, 12):
        data = sources(sentences, store)
        options = {"max_steps": steps, "logging_steps": 100, "save_strategy": "no", "logging_nan_inf_filter": False}
        trainer = make_trainer(tiny_bert, tmp_path / str(steps), data, store, unpad=False, **options)
        with _Questions() as questions:
            trainer.train()
        counts.append(questions.count)
    assert counts[0] == counts[1]
    assert counts[0] > 0  # the mean loss, at the end


@pytest.mark.parametrize("dropout", [True, False])
def test_a_student_without_dropout_is_warned_of(tiny_bert, sentences, store, tmp_path, caplog, dropout):
    trainer = make_trainer(tiny_bert, tmp_path, sources(sentences, store), store, max_steps=1)
    if not dropout:
        without_dropout(trainer.model)
    trainer.model.eval()
    torch.manual_seed(3)
    assert views_differ(trainer.model) is dropout
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), after)
    assert not trainer.model.training
    trainer.train()
    assert ("the student (a bert) has no dropout: both views of a sentence are equal" in caplog.text) is not dropout


class _Diverging(SimCSELoss):
    """Its value, or its gradient, is no number from the third call on."""

    def __init__(self, model, where):
        super().__init__(model)
        self.where, self.calls = where, 0

    def compute_loss_from_embeddings(self, views, **given):
        self.calls += 1
        terms = super().compute_loss_from_embeddings(views, **given)
        if self.calls < 3:
            return terms
        if self.where == "loss":
            return math.nan * terms
        return LossComponents({"text": terms["text"] + (views[0].sum() * 0).abs().sqrt()})  # 0, of infinite slope


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("asked", [{"logging_steps": 4}, {"save_steps": 4}, {"max_steps": 4}])
def test_training_that_diverges_ends_with_the_step_and_saves_nothing(tiny_bert, sentences, tmp_path, where, asked):
    model = build_student(str(tiny_bert)).to("cpu")
    options = {"max_steps": 8, "logging_steps": 100, "save_steps": 100, **asked}
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, report_to="none", use_cpu=True, **options
    )
    loss = _Diverging(model, where)
    dataset = Dataset.from_dict({"sentence": sentences})
    trainer = KDMCSETrainer(model, arguments, dataset, loss=loss, token_cache=tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"training diverged: the loss or a gradient of step 3 is not finite"):
        trainer.train()
    assert loss.calls == 4
    assert not list(tmp_path.glob("checkpoint-*"))


class _Questions(TorchDispatchMode):
    """Counts operations that hand a value to Python, or whose result has a size that depends on values.

    Not ``tolist`` and ``numpy``, which on a CPU read memory without an operation.
    """

    SIZES = (torch.ops.aten.nonzero, torch.ops.aten.masked_select, torch.ops.aten._unique2)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket is torch.ops.aten.index and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        asks = func.overloadpacket in (torch.ops.aten._local_scalar_dense, *self.SIZES)
        self.count += asks or by_mask
        return func(*args, **(kwargs or {}))
