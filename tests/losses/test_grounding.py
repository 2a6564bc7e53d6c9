"""What goes beyond the paper: lists, calibrated scores, captions of one image, retention, and the balanced weight."""

import pickle

import pytest
import reference
import torch
from datasets import Dataset, DatasetDict
from helpers import gradients, without_dropout
from sentence_transformers import SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from transformers import set_seed

from st_kdmcse import (
    CachedKDMCSELoss,
    FeatureStore,
    KDMCSEConfig,
    KDMCSELoss,
    KDMCSETrainer,
    MCSEConfig,
    MCSELoss,
    SimCSELoss,
    build_student,
    functional,
)
from st_kdmcse.config import SCORE_KINDS

N = 9
ROWS = torch.tensor([0, 3, 1, 8, 30, 31, 50, 2, 71])  # 0, 1 and 2 share an image; so do 30 and 31
SAME = ROWS[:, None] // 3 == ROWS // 3


def views_of(seed=0, hidden=32):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(N, hidden, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))


def features_of(store, rows=ROWS):
    batch = store.gather(rows)
    return {
        "image_features": torch.from_numpy(batch.image_features).double(),
        "text_features": torch.from_numpy(batch.text_features).double(),
        "image_ids": torch.from_numpy(batch.image_rows),
    }


def make(student, store, loss_class=KDMCSELoss, **options):
    loss = loss_class(student, KDMCSEConfig(**options), features=store)
    loss.heads.double()
    return loss


def assert_same_with_gradients(term, expected, inputs):
    torch.testing.assert_close(term, expected)
    for actual, exact in zip(
        torch.autograd.grad(term, inputs, retain_graph=True), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(actual, exact)


def scores_of(given):
    """The teacher's scores by kind, as the specification has them."""
    text, image = given["text_features"], given["image_features"]

    def cosine(x, y):
        return torch.tensor(reference.soft_labels(x, y), dtype=torch.float64)

    return {
        "text-text": cosine(text, text),
        "cross": (cosine(text, image) + cosine(image, text)) / 2,
        "image-image": cosine(image, image),
        "text-image": cosine(text, image),
        "image-text": cosine(image, text),
    }


@pytest.mark.parametrize("loss", ["listnet", "listmle"])
def test_lists_are_of_the_fused_scores_and_leave_captions_of_the_image_out(student, store, loss):
    options = {"list_weight": 0.7, "list_text_weight": 0.9, "list_image_weight": 0.3, "list_length": 3}
    model = make(student, store, list_loss=loss, list_temperature=0.4, list_student_temperature=0.1, **options)
    views, given = views_of(), features_of(store)
    term = model.compute_loss_from_embeddings(views, **given)["list"]
    scores, statistics = scores_of(given), model.statistics
    fused = reference.fuse(
        [scores[kind] for kind in SCORE_KINDS[:3]],
        [0.9, 0.5, 0.3],
        statistics.mean,
        statistics.std,
        statistics.correlation,
    )
    expected = 0.0
    for one, other in (views, views[::-1]):
        if loss == "listnet":
            expected = expected + reference.listnet(one, other, fused, 0.1, 0.4, ~SAME) / 2
        else:
            expected = expected + reference.listmle(one, other, fused, 0.1, 3, ~SAME) / 2
    assert_same_with_gradients(term, 0.7 * expected, views)


def test_without_a_store_the_statistics_are_those_of_the_batch(student, store):
    views, given = views_of(), features_of(store)
    loss = KDMCSELoss(student, KDMCSEConfig(list_weight=1.0, multimodal_weight=0), teacher_dim=store.dim)
    loss.heads.double()
    for ids, listed in ((given["image_ids"], ~SAME), (None, ~torch.eye(N, dtype=torch.bool))):
        scores = torch.stack([scores_of(given)[kind] for kind in SCORE_KINDS[:3]])
        sample = scores[:, listed]
        centred = sample - sample.mean(1, keepdim=True)
        fused = reference.fuse(
            scores, [1.0, 0.5, 0.25], sample.mean(1), centred.square().mean(1).sqrt(), torch.corrcoef(sample)
        )
        expected = sum(reference.listnet(*pair, fused, 0.05, 0.5, listed) / 2 for pair in (views, views[::-1]))
        components = loss.compute_loss_from_embeddings(
            views, given["image_features"], given["text_features"], image_ids=ids
        )
        assert list(components) == ["text", "list"]
        torch.testing.assert_close(components["list"], expected)


def test_a_batch_of_one_and_of_one_image_are_finite(student, store):
    options = {"list_weight": 1.0, "same_image": "positive", "soft_label_calibration": "quantile"}
    loss = KDMCSELoss(student, KDMCSEConfig(**options), teacher_dim=store.dim)
    for rows in (torch.tensor([5]), torch.tensor([3, 4, 5])):
        views = tuple(torch.randn(len(rows), 32, requires_grad=True) for _ in range(2))
        given = features_of(store, rows)
        total = loss.compute_loss_from_embeddings(views, **{k: v.float() if "f" in k else v for k, v in given.items()})
        total.total.backward()
        assert total.total.isfinite()
        assert all(view.grad.isfinite().all() for view in views)


@pytest.mark.parametrize("same_image", ["remove", "positive"])
def test_captions_of_one_image_in_every_term(student, store, same_image):
    loss = make(student, store, same_image=same_image, same_image_weight=0.8, filter_negatives=False, margin=0.2)
    views, given = views_of(), features_of(store)
    components = loss.compute_loss_from_embeddings(views, **given)
    scores = scores_of(given)
    shares = torch.eye(N, dtype=torch.float64)
    if same_image == "positive":
        statistics = loss.statistics
        alike = (scores["text-text"] - float(statistics.same_image_mean)) / float(statistics.same_image_std)
        shares = shares + 0.8 * torch.sigmoid(alike) * (SAME & ~torch.eye(N, dtype=torch.bool))
        shares = shares / shares.sum(1, keepdim=True)
    heads = dict(loss.heads.items())
    text = [reference.head(heads["text"], view) for view in views]
    assert_same_with_gradients(
        components["text"], reference.soft_info_nce(*text, 0.05, shares, ~SAME), [*views, *heads["text"].parameters()]
    )
    for term, head, labels in (
        ("image", "teacher_image", scores["text-image"]),
        ("caption", "teacher_text", scores["text-text"]),
    ):
        features = reference.head(heads[head], given[f"{head.removeprefix('teacher_')}_features"])
        expected = 0.0
        for view in views:
            anchors = reference.head(heads["grounding"], view)
            if same_image == "remove":
                expected = expected + reference.adap_acse(anchors, features, labels, 0.2, 0.05, ~SAME)
            else:
                expected = expected + functional.adap_acse(anchors, features, labels, 0.2, 0.05, ~SAME, shares)
        torch.testing.assert_close(components[term], 0.01 * expected / 2)
        removed = components.metrics[f"{term}_negatives_removed"]
        assert removed == components.metrics["text_negatives_removed"] == (8 if same_image == "remove" else 0)


def test_weight_zero_of_soft_positives_is_removal(student, store):
    views, given = views_of(), features_of(store)
    results = []
    for options in ({"same_image": "remove"}, {"same_image": "positive", "same_image_weight": 0}):
        set_seed(0)
        results.append(make(student, store, **options).compute_loss_from_embeddings(views, **given))
    torch.testing.assert_close(dict(results[0]), dict(results[1]))
    assert results[0].metrics == results[1].metrics


def shares_below(scores, kind, statistics, calibration):
    row = SCORE_KINDS.index("text-image" if kind == "image-text" else kind)
    if calibration == "quantile":
        quantiles = statistics.quantiles[row].tolist()
        flat = [reference.distribution(float(score), quantiles) for score in scores[kind].flatten()]
        return torch.tensor(flat, dtype=torch.float64).view(N, N)
    normal = torch.distributions.Normal(float(statistics.mean[row]), float(statistics.std[row]))
    return normal.cdf(scores[kind])


@pytest.mark.parametrize("calibration", ["standard", "quantile"])
@pytest.mark.parametrize("soft_label", ["text-image", "image-text", "image-image"])
@pytest.mark.parametrize("reverse", [False, True])
def test_calibrated_margins(student, store, calibration, soft_label, reverse):
    loss = make(
        student,
        store,
        soft_label_calibration=calibration,
        image_soft_label=soft_label,
        filter_negatives=False,
        reverse_margin=reverse,
        margin=0.25,
    )
    views, given = views_of(), features_of(store)
    shares = shares_below(scores_of(given), soft_label, loss.statistics, calibration)
    assert 0.15 < shares.std() < 0.45
    features = reference.head(loss.heads["teacher_image"], given["image_features"])
    expected = sum(
        reference.adap_acse(
            reference.head(loss.heads["grounding"], view), features, 1 - shares if reverse else shares, 0.25, 0.05
        )
        for view in views
    )
    term = loss.compute_loss_from_embeddings(views, **given)["image"]
    torch.testing.assert_close(term, 0.01 * expected / 2, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("calibration", ["standard", "quantile"])
def test_a_calibrated_filter_drops_a_share_of_the_pairs(student, store, calibration):
    options = {"filter_calibration": calibration, "image_threshold": 0.8, "text_threshold": 0.9}
    loss = make(student, store, **options)
    views, given = views_of(), features_of(store)
    scores, metrics = scores_of(given), loss.compute_loss_from_embeddings(views, **given).metrics
    others = ~torch.eye(N, dtype=torch.bool)
    for term, kind, threshold in (("image", "text-image", 0.8), ("caption", "text-text", 0.9)):
        share = shares_below(scores, kind, loss.statistics, calibration)
        assert metrics[f"{term}_negatives_removed"] == ((share >= threshold) & others).sum() > 0


def test_the_relative_filter(student, store):
    views, given = views_of(), features_of(store)
    loss = make(student, store, filter_relative=True, filter_slack=0.4, image_threshold=None)
    scores, metrics = scores_of(given), loss.compute_loss_from_embeddings(views, **given).metrics
    others = ~torch.eye(N, dtype=torch.bool)
    for term, kind in (("image", "text-image"), ("caption", "text-text")):
        leaves = (scores[kind] > scores[kind].diagonal()[:, None] - 0.4) & others
        assert metrics[f"{term}_negatives_removed"] == leaves.sum() > 0


@pytest.mark.parametrize("make_loss", [KDMCSELoss, MCSELoss])
def test_without_cross_modal_terms_it_is_simcse_to_the_bit(student, store, sentences, make_loss):
    config = KDMCSEConfig if make_loss is KDMCSELoss else MCSEConfig
    results = []
    for build in (
        lambda: make_loss(student, config(multimodal_weight=0), features=store),
        lambda: SimCSELoss(student),
    ):
        set_seed(7)
        loss = build()
        student.train()
        components = loss([student.preprocess(sentences[:8])], torch.arange(8))
        results.append((components, gradients(loss, components.total), torch.get_rng_state()))
    (one, found, state), (other, expected, other_state) = results
    assert dict(one) == dict(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert torch.equal(state, other_state)


def test_consistency_is_of_text_alone(student, store):
    loss = make(student, store, consistency_weight=0.6, list_student_temperature=0.1)
    views = views_of()
    components = loss.compute_loss_from_embeddings(views)
    assert list(components) == ["text", "consistency"]
    assert_same_with_gradients(components["consistency"], 0.6 * reference.list_consistency(*views, 0.1), list(views))
    assert "consistency" not in loss.compute_loss_from_embeddings(views, **features_of(store))


def test_retention_holds_on_to_the_student_as_it_was(student, store, sentences):
    without_dropout(student).double()
    loss = make(student, store, retention_weight=0.5, list_temperature=0.4)
    features = student.preprocess(sentences[:N])
    student.eval()
    initial = student(dict(features))["sentence_embedding"].detach()
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.05 * torch.randn_like(weight)
    student.train()
    components = loss([features], None)
    assert list(components) == ["text", "retention"]
    now = student(dict(features))["sentence_embedding"]
    alike = torch.tensor(reference.soft_labels(initial, initial), dtype=torch.float64)
    sample = alike[~torch.eye(N, dtype=torch.bool)]
    scores = (alike - sample.mean()) / sample.std(correction=0)
    expected = 0.5 * reference.listnet(now, now, scores, 0.05, 0.4)
    torch.testing.assert_close(components["retention"], expected)
    assert "retention" not in loss([features], torch.arange(N))
    # Neither trained nor saved.
    assert {name.split(".")[0] for name, _ in loss.named_parameters()} == {"model", "heads"}
    assert {name.split(".")[0] for name in loss.state_dict()} == {"model", "heads"}
    before = [weight.clone() for weight in loss._initial[0].parameters()]
    components.total.backward()
    assert all(weight.grad is None for weight in loss._initial[0].parameters())
    again = pickle.loads(pickle.dumps(loss))
    torch.testing.assert_close(dict(again([features], None)), dict(components))
    assert all(torch.equal(one, other) for one, other in zip(before, again._initial[0].parameters(), strict=True))


def test_shuffled_lists_are_drawn_anew_and_leave_other_losses_alone(student, store):
    views, given = views_of(), features_of(store)
    plain = make(student, store, list_weight=1.0)
    state = torch.get_rng_state()
    first = plain.compute_loss_from_embeddings(views, **given)["list"]
    assert torch.equal(torch.get_rng_state(), state)
    loss = make(student, store, list_weight=1.0, list_shuffle=True)
    set_seed(1)
    terms = [loss.compute_loss_from_embeddings(views, **given)["list"].item() for _ in range(3)]
    set_seed(1)
    assert loss.compute_loss_from_embeddings(views, **given)["list"].item() == terms[0]
    assert len({*terms, first.item()}) == 4


def test_the_weight_balances_the_gradients_and_is_kept(student, store, tmp_path):
    loss = make(student, store, multimodal_weight="auto", view_reduction="mean")
    given, ratios = features_of(store), []
    for seed in range(22):
        views = views_of(seed)
        components = loss.compute_loss_from_embeddings(views, **given)
        weight = components.metrics["multimodal_weight"].item()
        norms = [
            torch.cat(torch.autograd.grad(term, views, retain_graph=True)).norm().item()
            for term in (components["text"], components["image"] + components["caption"])
        ]
        ratios.append(norms[0] / (norms[1] / weight))
        assert weight == pytest.approx(0.3 * sum(ratios[:20]) / len(ratios[:20]))
    assert loss.heads["balance"].settled
    loss.save_heads(tmp_path)
    other = make(student, store, multimodal_weight="auto", view_reduction="mean")
    with torch.no_grad():
        assert other.compute_loss_from_embeddings(views_of(), **given)["image"] == 0
    other.load_heads(tmp_path)
    assert other.heads["balance"].weight == loss.heads["balance"].weight
    assert dict(other.compute_loss_from_embeddings(views, **given)) == dict(components)
    with pytest.raises(ValueError, match="balance"):
        make(student, store).load_heads(tmp_path)


def test_mcse_has_the_balanced_weight_too(student, store):
    loss = MCSELoss(student, MCSEConfig(multimodal_weight="auto"), features=store)
    loss.heads.double()
    components = loss.compute_loss_from_embeddings(views_of(), **features_of(store))
    assert components.metrics["multimodal_weight"] > 0
    assert components["image"] > 0


def test_a_store_of_two_teachers_has_no_scores_of_texts_with_images(student, store, monkeypatch):
    monkeypatch.setattr(FeatureStore, "shared_space", False)
    with pytest.raises(ValueError, match="`list_cross_weight` is 0.5, but the images and texts .* set it to 0"):
        KDMCSELoss(student, KDMCSEConfig(multimodal_weight=0, list_weight=1.0), features=store)
    config = KDMCSEConfig(multimodal_weight=0, list_weight=1.0, list_cross_weight=0)
    assert KDMCSELoss(student, config, features=store).statistics is not None
    with pytest.raises(ValueError, match="`image_filter` is 'text-image'"):
        KDMCSELoss(student, KDMCSEConfig(margin=0, filter_relative=True, image_threshold=None), features=store)


def test_statistics_are_read_where_an_option_needs_them(student, store):
    assert make(student, store).statistics is None
    assert make(student, store, soft_label_calibration="quantile", margin=0).statistics is None
    assert make(student, store, filter_calibration="quantile", filter_negatives=False).statistics is None
    assert make(student, store, soft_label_calibration="standard", multimodal_weight=0).statistics is None
    loss = make(student, store, list_weight=1.0)
    assert loss.get_config_dict()["teacher_scores"]["text-text"]["mean"] == loss.statistics.mean[0].item()
    assert "teacher_scores" not in make(student, store).get_config_dict()


EVERYTHING = {
    "list_weight": 0.8,
    "soft_label_calibration": "quantile",
    "filter_calibration": "quantile",
    "image_threshold": 0.9,
    "text_threshold": 0.9,
    "same_image": "positive",
    "consistency_weight": 0.3,
    "retention_weight": 0.4,
    "multimodal_weight": "auto",
}
VARIANTS = {
    "everything": EVERYTHING,
    "everything else": EVERYTHING
    | {
        "list_loss": "listmle",
        "list_length": 3,
        "soft_label_calibration": "standard",
        "filter_relative": True,
        "same_image": "remove",
        "text_margin": 0.1,
    },
    "shuffled": {"list_weight": 1.0, "list_shuffle": True, "retention_weight": 1.0},
    "lists alone": {"list_weight": 1.0, "multimodal_weight": 0},
}


def both(student, store, **options):
    """A loss and its cached form, in float64 and without dropout."""
    without_dropout(student).double()
    plain = make(student, store, **options)
    cached = CachedKDMCSELoss(student, KDMCSEConfig(**options), features=store, mini_batch_size=4, chunk_rows=2)
    cached.heads.double()
    cached.heads.load_state_dict(plain.heads.state_dict())
    return plain, cached


def assert_same_losses(losses, wrapped, features, labels):
    results = []
    for loss, outer in zip(losses, wrapped, strict=True):
        set_seed(5)
        components = outer([dict(features)], labels)
        # Of what was saved for the backward pass, nothing may depend on the random state then.
        set_seed(6)
        results.append((dict(components), components.metrics, gradients(loss, components.total)))
    for expected, actual in zip(*results, strict=True):
        assert actual.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-9, atol=1e-10, check_dtype=False)
    return results[0][0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("labels", [None, ROWS])
@pytest.mark.parametrize("dims", [None, [32, 16]])
def test_cached_losses_are_the_same(student, exact_store, variant, labels, dims):
    options = VARIANTS[variant]
    losses, store = both(student, exact_store, **options), exact_store
    wrapped = losses if dims is None else [MatryoshkaLoss(student, loss, dims, [1.0, 0.5]) for loss in losses]
    features = student.preprocess([store.caption(int(row)) for row in ROWS])
    with torch.no_grad():  # away from the initial student
        student[0].auto_model.embeddings.word_embeddings.weight += 0.5
    terms = assert_same_losses(losses, wrapped, features, labels)
    if labels is None:
        assert ("retention" in terms) == ("retention_weight" in options)
    else:
        assert "list" in terms
        assert ("image" in terms) == (options.get("multimodal_weight") != 0)


def test_everything_by_value(student, store):
    options = {**EVERYTHING, "same_image": "negative"}
    losses = both(student, store, **options)
    features = student.preprocess([store.caption(int(row)) for row in ROWS])
    given = features_of(store)
    labels = torch.cat([given["image_features"], given["text_features"]], dim=1)
    assert_same_losses(losses, losses, features, labels)


@pytest.mark.parametrize("cached", [False, True])
def test_a_resumed_run_is_bit_for_bit_one_that_never_stopped(tiny_bert, sentences, store, tmp_path, cached):
    def trainer(output):
        set_seed(3)
        student = build_student(str(tiny_bert)).to("cpu")
        config = KDMCSEConfig(**EVERYTHING, list_shuffle=True)
        if cached:
            loss = CachedKDMCSELoss(student, config, features=store, mini_batch_size=5, chunk_rows=4)
        else:
            loss = KDMCSELoss(student, config, features=store)
        return KDMCSETrainer(
            model=student,
            args=SentenceTransformerTrainingArguments(
                str(tmp_path / output),
                per_device_train_batch_size=12,
                learning_rate=1e-3,
                max_steps=8,
                save_steps=5,
                logging_steps=1,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=DatasetDict(text=Dataset.from_dict({"sentence": sentences[:96]}), pairs=store.dataset()),
            loss=loss,
            pair_every=2,
        )

    whole, resumed = trainer("whole"), trainer("resumed")
    initial = [weight.clone() for weight in whole.loss._initial[0].parameters()]
    set_seed(4)
    whole.train()
    torch.rand(17)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    for part in (lambda each: each.model.state_dict(), lambda each: each.loss.heads.state_dict()):
        assert all(torch.equal(value, part(resumed)[name]) for name, value in part(whole).items())
    for each in (whole, resumed):
        assert all(torch.equal(*pair) for pair in zip(initial, each.loss._initial[0].parameters(), strict=True))
    terms = {name for entry in whole.state.log_history for name in entry}
    assert {"text", "image", "caption", "list", "consistency", "retention", "multimodal_weight"} <= terms


def test_a_frozen_copy_is_kept_only_where_it_is_needed(student, store):
    assert make(student, store)._initial == ()
    loss = make(student, store, retention_weight=1.0)
    copied = loss._initial[0]
    assert copied is not student
    assert not copied.training
    assert not any(weight.requires_grad for weight in copied.parameters())


def test_the_student_itself_is_trained_as_before(tiny_bert, store, sentences):
    """The frozen copy takes part in no random draw."""
    results = []
    for weight in (0.0, 1e-9):
        set_seed(2)
        student = build_student(str(tiny_bert)).to("cpu")
        loss = KDMCSELoss(student, KDMCSEConfig(retention_weight=weight), features=store)
        student.train()
        results.append(loss([student.preprocess(sentences[:8])], None)["text"])
    assert torch.equal(*results)


def test_the_text_loss_has_a_weight(student, store):
    set_seed(0)
    plain = make(student, store, list_weight=1, consistency_weight=1)
    views, given = views_of(), features_of(store)
    for weight in (0.5, 0.0):
        set_seed(0)
        loss = make(student, store, list_weight=1, consistency_weight=1, text_weight=weight)
        for batch in (given, {}):
            terms, expected = (each.compute_loss_from_embeddings(views, **batch) for each in (loss, plain))
            assert terms.keys() == expected.keys() - ({"text"} if not weight else set())
            for name, term in terms.items():
                torch.testing.assert_close(term, expected[name] * (weight if name == "text" else 1))


@pytest.mark.parametrize(
    "options",
    [
        {"text_weight": 0},
        {"text_weight": 0, "retention_weight": 1, "multimodal_weight": 0},
        {"text_weight": 0, "retention_weight": 1, "multimodal_weight": "auto"},
    ],
)
def test_without_the_text_loss_each_kind_of_batch_needs_a_term(options):
    with pytest.raises(ValueError, match="`text_weight` must be above 0"):
        KDMCSEConfig(**options)
