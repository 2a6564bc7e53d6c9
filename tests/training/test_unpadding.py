"""Leaving padding out: the same embeddings, losses and gradients from fewer tokens."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import gradients
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import AdaptiveLayerLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import AutoModel, CamembertConfig, DistilBertConfig, ElectraConfig, XLMRobertaConfig, set_seed

from st_kdmcse import (
    CachedKDMCSELoss,
    CachedSimCSELoss,
    KDMCSEConfig,
    KDMCSELoss,
    KDMCSETrainer,
    SimCSELoss,
    build_student,
    unpadded,
)
from st_kdmcse.training.unpadding import unchecked_masks

N = 12


@pytest.fixture
def uneven(sentences):
    """Sentences of 1 to 12 words."""
    words = " ".join(sentences).split()
    return [" ".join(words[start : start + 1 + start % 12]) for start in range(40)]


@pytest.fixture(params=["bert", "roberta"])
def encoder(request):
    """Folder of a tiny encoder."""
    return str(request.getfixturevalue(f"tiny_{request.param}"))


def make_model(folder, dropout=0.0, pooling="cls"):
    set_seed(0)
    options = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    transformer = Transformer(folder, max_seq_length=32, config_kwargs=options)
    width = transformer.get_embedding_dimension()
    return SentenceTransformer(modules=[transformer, Pooling(width, pooling)], device="cpu").double().train()


def count_tokens(model):
    """Tokens that the encoder computes, batch by batch."""
    seen = []
    words = model[0].auto_model.get_input_embeddings()
    words.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0].numel()))
    return seen


def value_and_gradients(loss, features, labels=None):
    set_seed(5)
    value = loss([dict(features)], labels).total
    return value.detach(), gradients(loss, value)


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("make", [KDMCSELoss, CachedKDMCSELoss])
def test_losses_and_gradients_are_the_same(encoder, uneven, store, pairs, make):
    model = make_model(encoder)
    config = KDMCSEConfig(multimodal_weight=0.5, image_threshold=0.5)
    options = {"mini_batch_size": 5} if make is CachedKDMCSELoss else {}
    loss = make(model, config, features=store, **options).double()
    features, labels = model.preprocess(uneven[:N]), torch.arange(N) if pairs else None
    expected, expected_gradients = value_and_gradients(loss, features, labels)
    seen = count_tokens(model)
    with unpadded(model):
        seen.clear()
        value, found = value_and_gradients(loss, features, labels)
    columns = 2 * (2 if make is CachedKDMCSELoss else 1)
    assert sum(seen) < columns * 0.8 * features["input_ids"].numel()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max", "lasttoken"])
def test_what_comes_out_has_the_usual_shapes(encoder, uneven, pooling):
    model = make_model(encoder, pooling=pooling)
    features = model.preprocess(uneven[:N])
    expected = model(dict(features))
    with unpadded(model):
        given = dict(features)
        found = model(given)
    assert found is given  # as the library does: what comes out is added to what went in
    assert found.keys() == expected.keys()
    mask = features["attention_mask"].bool()
    torch.testing.assert_close(found["sentence_embedding"], expected["sentence_embedding"])
    torch.testing.assert_close(found["token_embeddings"][mask], expected["token_embeddings"][mask])
    assert found["token_embeddings"].shape == expected["token_embeddings"].shape
    assert not found["token_embeddings"][~mask].any()
    torch.testing.assert_close(found["attention_mask"], features["attention_mask"])


def test_dropout_is_replayed_by_gradient_caching(tiny_bert, uneven):
    model = make_model(str(tiny_bert), dropout=0.3)
    loss = CachedSimCSELoss(model, mini_batch_size=5).double()
    features = model.preprocess(uneven[:N])
    bias = model[0].auto_model.encoder.layer[0].output.dense.bias
    values = []
    with unpadded(model):
        _, found = value_and_gradients(loss, features)
        for step in (1e-6, -1e-6):  # the same seed, so the same dropout
            with torch.no_grad():
                bias[3] += step
            values.append(value_and_gradients(loss, features)[0])
            with torch.no_grad():
                bias[3] -= step
    (gradient,) = [each for name, each in found.items() if name.endswith("layer.0.output.dense.bias")]
    torch.testing.assert_close(gradient[3], (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("where", ["attention", "elsewhere"])
def test_dropout_is_as_strong(tiny_bert, uneven, where):
    model = make_model(str(tiny_bert), dropout=0.1).train()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5 if (".self." in name) == (where == "attention") else 0.0
    features = {name: value.repeat(40, 1) for name, value in model.preprocess(uneven[:N]).items() if name != "modality"}
    spreads = []
    for context in (nullcontext(), unpadded(model)):
        with context, torch.no_grad():
            set_seed(7)
            views = [model(dict(features))["sentence_embedding"] for _ in range(2)]
        spreads.append(1 - torch.cosine_similarity(*views))
    error = (spreads[0].var() / len(spreads[0]) + spreads[1].var() / len(spreads[1])).sqrt()
    assert (spreads[0].mean() - spreads[1].mean()).abs() < 3 * error
    assert error < 0.1 * spreads[0].mean()


@pytest.mark.parametrize("kind", [XLMRobertaConfig, CamembertConfig, ElectraConfig])
def test_relatives_of_bert_and_roberta(kind, tiny_bert, uneven, tmp_path):
    tokenizer = build_student(str(tiny_bert)).tokenizer
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    AutoModel.from_config(kind(**sizes, intermediate_size=16, pad_token_id=0)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = make_model(str(tmp_path)).eval()
    features = model.preprocess([*uneven[:N], "woman [PAD] ball blue"])  # RoBERTa does not count that one
    expected, seen = model(dict(features))["sentence_embedding"], count_tokens(model)
    with unpadded(model):
        seen.clear()
        torch.testing.assert_close(model(dict(features))["sentence_embedding"], expected)
    assert sum(seen) == features["attention_mask"].sum()


def test_batches_with_hardly_any_padding_stay_as_they_are(tiny_bert, sentences):
    model = make_model(str(tiny_bert))
    seen = count_tokens(model)
    features = model.preprocess(sentences[:N])
    with unpadded(model):
        seen.clear()
        model(dict(features))
    assert seen == [features["input_ids"].numel()]


def test_afterwards_and_on_disk_the_model_is_a_stock_one(tiny_bert, uneven, tmp_path):
    model = make_model(str(tiny_bert))
    expected = model.encode(uneven, convert_to_tensor=True)
    model.train()
    with unpadded(model):
        assert model.training
        model.save(str(tmp_path / "model"))
    assert "attn" not in (tmp_path / "model" / "config.json").read_text()
    assert model[0].auto_model.config._attn_implementation == "sdpa"
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu").double()
    for each in (model, loaded):
        torch.testing.assert_close(each.encode(uneven, convert_to_tensor=True), expected)
    seen = count_tokens(model)
    features = model.preprocess(uneven)
    model(features)
    assert seen == [features["input_ids"].numel()]


def test_where_it_would_be_wrong_it_is_refused(tiny_bert, tmp_path):
    eager = make_model(str(tiny_bert))
    eager[0].auto_model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="its attention is eager, not sdpa"), unpadded(eager):
        pass
    config = DistilBertConfig(vocab_size=100, dim=8, n_layers=1, n_heads=1, hidden_dim=8)
    folder = tmp_path / "distilbert"
    AutoModel.from_config(config).save_pretrained(folder)
    build_student(str(tiny_bert)).tokenizer.save_pretrained(folder)
    other = SentenceTransformer(modules=[Transformer(str(folder)), Pooling(8)], device="cpu")
    with pytest.raises(ValueError, match="the encoder is a distilbert, not one of bert"), unpadded(other):
        pass
    pooler = {"text": {"method": "forward", "method_output_name": "pooler_output"}}
    whole = Transformer(str(tiny_bert), modality_config=pooler, module_output_name="sentence_embedding")
    decoder = make_model(str(tiny_bert))
    decoder[0].auto_model.config.is_decoder = True
    for model in (SentenceTransformer(modules=[whole], device="cpu"), decoder):
        with pytest.raises(ValueError, match="is a decoder, or does not give embeddings of tokens"), unpadded(model):
            pass
    short = make_model(str(tiny_bert))
    short.max_seq_length = 2
    with pytest.raises(ValueError, match="sentences of 2 tokens have no padding"), unpadded(short):
        pass
    twice = make_model(str(tiny_bert))
    with unpadded(twice), pytest.raises(ValueError, match="are taken care of already"), unpadded(twice):
        pass


def test_whatever_happens_inside_the_model_is_a_stock_one_afterwards(tiny_bert):
    model = make_model(str(tiny_bert))
    model[0].auto_model.embeddings.eval()  # frozen, as some have it
    with pytest.raises(KeyboardInterrupt), unpadded(model):
        raise KeyboardInterrupt
    assert model[0].auto_model.config._attn_implementation == "sdpa"
    assert not model[0]._forward_pre_hooks
    assert not model[0]._forward_hooks
    assert model.training
    assert not model[0].auto_model.embeddings.training


@pytest.mark.parametrize("context", [unpadded, unchecked_masks])
def test_a_model_that_is_sent_to_another_process_works_there(context, tiny_bert, uneven, tmp_path):
    model = make_model(str(tiny_bert)).eval()
    expected = model(model.preprocess(uneven[:N]))["sentence_embedding"]
    with context(model):
        torch.save((model, model.preprocess(uneven[:N]), expected), tmp_path / "model.pt")
    code = f"""if True:
        import torch
        model, features, expected = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        torch.testing.assert_close(model(features)["sentence_embedding"], expected)
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_encoder_that_gives_other_embeddings_is_refused(tiny_bert):
    model = make_model(str(tiny_bert))
    model[0].auto_model.embeddings.position_ids.copy_(torch.arange(64).flip(0))  # an encoder that counts otherwise
    with pytest.raises(ValueError, match="without padding, its embeddings differ by"), unpadded(model):
        pass
    assert model[0].auto_model.config._attn_implementation == "sdpa"
    assert not model[0]._forward_pre_hooks


def test_losses_of_all_layers_get_padded_ones(tiny_bert, uneven):
    model = make_model(str(tiny_bert))
    loss = AdaptiveLayerLoss(model, MultipleNegativesRankingLoss(model), n_layers_per_step=-1)
    columns = [model.preprocess(uneven[:N]), model.preprocess(uneven[N : 2 * N])]
    values = []
    for context in (nullcontext(), unpadded(model)):
        with context:
            values.append(loss([dict(column) for column in columns], None).item())
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def make_trainer(folder, output, uneven, store, unpad, dropout=0.0, **options):
    model = make_model(folder, dropout).float()
    arguments = SentenceTransformerTrainingArguments(
        str(output),
        max_steps=8,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    data = DatasetDict(text=Dataset.from_dict({"sentence": uneven}), pairs=store.dataset())
    loss = KDMCSELoss(model, KDMCSEConfig(multimodal_weight=0.5), features=store)
    return KDMCSETrainer(model, arguments, data, loss=loss, pair_every=2, unpad=unpad)


def test_training_leaves_padding_out_on_a_cpu_and_learns_the_same(encoder, uneven, store, tmp_path):
    curves, counts = [], []
    for unpad in (False, None, True):
        trainer = make_trainer(encoder, tmp_path / str(unpad), uneven, store, unpad)
        seen = count_tokens(trainer.model)
        trainer.train()
        counts.append(sum(seen))
        curves.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    assert curves[1] == curves[2]
    assert counts[2] == counts[1] < 0.85 * counts[0]
    assert not trainer.model[0]._forward_pre_hooks


def test_an_encoder_that_cannot_is_trained_with_padding(tiny_bert, uneven, store, tmp_path, caplog):
    for unpad in (None, True):
        trainer = make_trainer(str(tiny_bert), tmp_path / str(unpad), uneven, store, unpad)
        trainer.model[0].auto_model.set_attn_implementation("eager")
        if unpad:
            with pytest.raises(ValueError, match="its attention is eager"):
                trainer.train()
            continue
        with caplog.at_level("INFO", "st_kdmcse"):
            trainer.train()
        assert "padding is computed: its attention is eager, not sdpa" in caplog.text
        assert trainer.state.global_step == 8


def test_it_excludes_a_compiled_student(tiny_bert, uneven, store, tmp_path):
    with pytest.raises(ValueError, match="`unpad` and compilation exclude each other"):
        make_trainer(str(tiny_bert), tmp_path, uneven, store, True, torch_compile=True)


def test_the_stock_trainer_takes_it_too(tiny_bert, uneven, tmp_path):
    model = make_model(str(tiny_bert), dropout=0.1).float()
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path), max_steps=3, per_device_train_batch_size=8, report_to="none", disable_tqdm=True, use_cpu=True
    )
    data = Dataset.from_dict({"sentence": uneven})
    trainer = SentenceTransformerTrainer(model, arguments, data, loss=SimCSELoss(model))
    before = model[0].auto_model.encoder.layer[0].output.dense.weight.detach().clone()
    packed = []
    model[0].register_forward_hook(lambda _, inputs, output: packed.append("packing" in inputs[0]))
    with unpadded(model):
        packed.clear()
        trainer.train()
    assert any(packed)
    assert not torch.equal(model[0].auto_model.encoder.layer[0].output.dense.weight, before)
