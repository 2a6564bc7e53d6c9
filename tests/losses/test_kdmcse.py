"""KDMCSE: both recipes against the literal method, and the loss as a module."""

import pytest
import reference
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss

from st_kdmcse import KDMCSEConfig, KDMCSELoss, MCSELoss, functional

N, T = 6, 5


def batch(seed=0, hidden=32):
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(N, hidden, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2)]
    image, text = (torch.randn(N, T, generator=generator, dtype=torch.float64) for _ in range(2))
    return views, image, text + image


def tokens(model, sentences):
    return model.preprocess(sentences)


@pytest.mark.parametrize("recipe", ["paper", "released"])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_a_recipe_is_its_arithmetic_with_gradients(student, recipe, filtered, margin):
    # 0.5 as a dot product and as a cosine both remove some pairs of this batch and keep some.
    options = {"margin": margin, "filter_negatives": filtered, "image_threshold": 0.5, "text_threshold": 0.5}
    config = getattr(KDMCSEConfig, recipe)(multimodal_weight=0.7, projection_dim=4, **options)
    loss = KDMCSELoss(student, config, teacher_dim=T)
    loss.heads.double()
    views, image, text = batch()
    inputs = [*views, *loss.heads.parameters()]
    components = loss.compute_loss_from_embeddings(tuple(views), image, text)
    expected = reference.kdmcse(
        loss.heads, views, image, text, recipe=recipe, weight=0.7, margin=margin, threshold=0.5 if filtered else None
    )
    torch.testing.assert_close(sum(components.values()), expected)
    for actual, exact in zip(
        torch.autograd.grad(sum(components.values()), inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(actual, exact)
    if filtered:
        assert 0 < components.metrics["image_negatives_removed"] < N * (N - 1)


def test_the_reductions_of_the_recipes_are_the_same_number(student):
    views, image, text = batch()
    loss = KDMCSELoss(student, KDMCSEConfig(), teacher_dim=T)
    other = KDMCSELoss(student, KDMCSEConfig(view_reduction="mean", modality_reduction="sum"), teacher_dim=T)
    other.heads = loss.heads
    arguments = (tuple(view.float() for view in views), image.float(), text.float())
    assert loss.compute_loss_from_embeddings(*arguments) == other.compute_loss_from_embeddings(*arguments)


def test_heads_have_the_names_and_shapes_of_the_method(student):
    heads = KDMCSELoss(student, teacher_dim=512).heads
    shapes = {name: tuple(head.dense.weight.shape) for name, head in heads.items()}
    assert shapes == {
        "text": (32, 32),
        "grounding": (256, 32),
        "teacher_text": (256, 512),
        "teacher_image": (256, 512),
    }


def test_text_alone_is_the_text_loss_alone(student, sentences):
    loss = KDMCSELoss(student, teacher_dim=T)
    components = loss([tokens(student, sentences[:8])], None)
    assert list(components) == ["text"]
    components.total.backward()
    assert loss.heads["text"].dense.weight.grad is not None
    assert loss.heads["grounding"].dense.weight.grad is None


def test_rows_and_values_give_the_same_loss(student, sentences, store):
    student.eval()
    loss = KDMCSELoss(student, features=store)
    rows = torch.tensor([3, 0, 40, 71])
    features = [tokens(student, [store.caption(int(row)) for row in rows])]
    gathered = store.gather(rows)
    values = torch.from_numpy(gathered.image_features), torch.from_numpy(gathered.text_features)
    by_row = loss(features, rows)
    assert by_row == loss(features, rows.unsqueeze(1)) == loss(features, torch.cat(values, dim=1))
    assert list(by_row) == ["text", "image", "caption"]


def test_one_forward_of_the_doubled_batch_gives_two_views(student, sentences):
    sizes = []
    student[0].register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0]["input_ids"])))
    views = []
    loss = KDMCSELoss(student, teacher_dim=T)
    original = loss.compute_loss_from_embeddings
    loss.compute_loss_from_embeddings = lambda pair, **teacher: views.extend(pair) or original(pair, **teacher)
    features = tokens(student, sentences[:8])
    before = set(features)
    student.train()
    loss([features], None)
    assert sizes == [16]
    assert set(features) == before, "the caller's features must not be written to"
    assert not torch.equal(views[0], views[1])
    student.eval()
    loss([features], None)
    torch.testing.assert_close(views[2], views[3])


def test_two_columns_are_the_two_views(student, sentences):
    student.eval()
    loss = KDMCSELoss(student, teacher_dim=T)
    one = loss([tokens(student, sentences[:8])], None)
    torch.testing.assert_close(dict(one), dict(loss([tokens(student, sentences[:8]) for _ in range(2)], None)))
    with pytest.raises(ValueError, match="two views"):
        loss([tokens(student, sentences[:8]) for _ in range(3)], None)


def test_same_image_negatives_can_be_removed_exactly(student):
    views, image, text = batch()
    ids = ["a", "b", "a", "c", "b", "a"]
    off = {"filter_negatives": False, "margin": 0.2}
    loss = KDMCSELoss(student, KDMCSEConfig(same_image="remove", **off), teacher_dim=T)
    loss.heads.double()
    components = loss.compute_loss_from_embeddings(tuple(views), image, text, image_ids=ids)
    assert components.metrics["image_negatives_removed"] == 8  # 3 * 2 pairs of "a", 2 of "b"
    keep = [[i == j or ids[i] != ids[j] for j in range(N)] for i in range(N)]
    teacher = reference.head(loss.heads["teacher_image"], image)
    expected = sum(
        reference.adap_acse(
            reference.head(loss.heads["grounding"], view), teacher, reference.soft_labels(text, image), 0.2, 0.05, keep
        )
        for view in views
    )
    torch.testing.assert_close(components["image"], 0.01 * expected / 2)
    as_numbers = loss.compute_loss_from_embeddings(
        tuple(views), image, text, image_ids=torch.tensor([7, 8, 7, 9, 8, 7])
    )
    assert as_numbers == components
    with pytest.raises(ValueError, match="image_ids"):
        loss.compute_loss_from_embeddings(tuple(views), image, text)


def test_automatic_thresholds_are_read_off_the_store(student, store):
    config = KDMCSEConfig(image_threshold="auto", text_threshold="auto")
    resolved = KDMCSELoss(student, config, features=store).config
    assert -1 < resolved.image_threshold < 1
    assert -1 < resolved.text_threshold < 1
    with pytest.raises(ValueError, match="auto"):
        KDMCSELoss(student, config, teacher_dim=store.dim)


def test_it_works_inside_matryoshka(student, sentences, store):
    loss = KDMCSELoss(student, features=store)
    wrapped = MatryoshkaLoss(student, loss, [32, 16], [1.0, 0.5])
    features, rows = [tokens(student, sentences[:8])], torch.arange(8)
    student.eval()
    components = wrapped(features, rows)
    assert list(components) == ["text", "image", "caption"]
    embedding = student(dict(features[0]))["sentence_embedding"]
    gathered = store.gather(rows)
    teacher = torch.from_numpy(gathered.image_features), torch.from_numpy(gathered.text_features)
    expected = 0
    for dim, weight in ((32, 1.0), (16, 0.5)):
        view = torch.nn.functional.normalize(embedding[:, :dim], dim=1)
        expected = expected + weight * loss.compute_loss_from_embeddings((view, view), *teacher).total
    torch.testing.assert_close(components.total, expected)
    components.total.backward()
    assert loss.heads["grounding"].dense.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4, 7), "neither row numbers"),
        (torch.full((4, 2 * T), float("nan")), "example 0 .* NaN"),
        (torch.tensor([0, 1, 2, 3]), "no feature store"),
        (torch.tensor([0.8, 1.0, 0.0, 3.0]), "leave the label out"),
    ],
)
def test_labels_that_do_not_fit_are_refused(student, sentences, labels, message):
    with pytest.raises(ValueError, match=message):
        KDMCSELoss(student, teacher_dim=T)([tokens(student, sentences[:4])], labels)


def test_features_that_do_not_fit_are_refused(student, store):
    with pytest.raises(ValueError, match="have 8 dimensions and `teacher_dim` is 512"):
        KDMCSELoss(student, teacher_dim=512, features=store)
    loss = KDMCSELoss(student, teacher_dim=T)
    views, image, text = batch()
    with pytest.raises(ValueError, match="needs `text_features`"):
        loss.compute_loss_from_embeddings(tuple(views), image_features=image)
    with pytest.raises(ValueError, match="`image_features` must have shape"):
        loss.compute_loss_from_embeddings(tuple(views), image[:, :2], text)


def test_config_and_citation_are_for_the_model_card(student):
    loss = KDMCSELoss(student, KDMCSEConfig.released(), teacher_dim=768)
    assert loss.get_config_dict()["image_soft_label"] == "image-image"
    assert loss.get_config_dict()["teacher_dim"] == 768
    assert "nguyen2024kdmcse" in loss.citation
    for section in ("Args:", "References:", "Requirements:", "Inputs:", "Recommendations:", "Relations:", "Example:"):
        assert section in KDMCSELoss.__doc__


def test_half_precision_features_are_enough(student, sentences, store):
    loss = KDMCSELoss(student, teacher_dim=store.dim)
    gathered = store.gather(range(8))
    labels = torch.from_numpy(gathered.image_features), torch.from_numpy(gathered.text_features)
    student.eval()
    features = [tokens(student, sentences[:8])]
    exact = loss(features, torch.cat(labels, dim=1))
    rounded = loss(features, torch.cat(labels, dim=1).half())
    torch.testing.assert_close(dict(exact), dict(rounded), rtol=1e-2, atol=1e-3)


def test_the_teacher_is_a_constant(student):
    views, image, text = batch()
    config = KDMCSEConfig(image_threshold=0.3, text_threshold=0.3)
    loss = KDMCSELoss(student, config, teacher_dim=T)
    loss.heads.double()
    image.requires_grad_()
    text.requires_grad_()
    loss.compute_loss_from_embeddings(tuple(views), image, text).total.backward()
    # Through the heads the features have a gradient; through the soft labels they must not.
    expected = 0
    for head, features, labels in (
        ("teacher_image", image, functional.cosine_similarity_matrix(text, image)),
        ("teacher_text", text, functional.cosine_similarity_matrix(text, text)),
    ):
        assert labels.requires_grad
        labels = labels.detach()
        keep = (labels < 0.3) | torch.eye(N, dtype=torch.bool)
        assert not keep.all()
        for view in views:
            anchors = loss.heads["grounding"](view)
            term = functional.adap_acse(anchors, loss.heads[head](features), labels, config.margin, keep=keep)
            expected = expected + config.multimodal_weight / 2 * term
    for given, gradient in zip((image, text), torch.autograd.grad(expected, (image, text)), strict=True):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(given.grad, gradient)


@pytest.mark.parametrize("make", [KDMCSELoss, MCSELoss])
def test_the_width_of_the_teacher_is_that_of_the_store(student, store, make):
    assert make(student, features=store).teacher_dim == store.dim
    assert make(student, features=store, teacher_dim=store.dim).teacher_dim == store.dim
    assert make(student).teacher_dim == 512
    with pytest.raises(
        ValueError, match=f"have {store.dim} dimensions and `teacher_dim` is 512: leave `teacher_dim` out"
    ):
        make(student, features=store, teacher_dim=512)
    for width in (0, -3):
        with pytest.raises(ValueError, match=f"`teacher_dim` must be at least 1, got {width}"):
            make(student, teacher_dim=width)


def test_a_plain_sentence_transformer_is_a_student_too(tiny_bert, sentences):
    model = SentenceTransformer(str(tiny_bert), device="cpu")
    assert KDMCSELoss(model, teacher_dim=T)([tokens(model, sentences[:4])], None).total.isfinite()
