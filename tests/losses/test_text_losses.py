"""SimCSE, ArcCSE, MCSE: their arithmetic, and what the losses share."""

import pytest
import reference
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss, MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize

from st_kdmcse import ArcCSELoss, KDMCSEConfig, KDMCSELoss, MCSEConfig, MCSELoss, SimCSELoss

N, T = 6, 5


def batch(hidden=32):
    generator = torch.Generator().manual_seed(0)
    views = tuple(torch.randn(N, hidden, generator=generator, dtype=torch.float64) for _ in range(2))
    return views, *(torch.randn(N, T, generator=generator, dtype=torch.float64) for _ in range(2))


def test_simcse(student):
    loss = SimCSELoss(student, temperature=0.1)
    loss.heads.double()
    views, image, text = batch()
    expected = reference.info_nce(*(reference.head(loss.heads["text"], view) for view in views), 0.1)
    torch.testing.assert_close(loss.compute_loss_from_embeddings(views).total, expected)
    assert loss.compute_loss_from_embeddings(views, image, text) == loss.compute_loss_from_embeddings(views)


def test_the_released_margin_on_the_negatives(student):
    views, image, text = batch()
    for loss in (SimCSELoss(student, text_margin=0.15), MCSELoss(student, MCSEConfig(text_margin=0.15), teacher_dim=T)):
        loss.heads.double()
        heads = [reference.head(loss.heads["text"], view) for view in views]
        expected = reference.adap_acse(*heads, torch.zeros(N, N), 0.15, 0.05)
        torch.testing.assert_close(loss.compute_loss_from_embeddings(views, image, text)["text"], expected)


def test_simcse_without_a_head_is_the_stock_loss(student, sentences):
    loss = SimCSELoss(student)
    loss.heads["text"] = torch.nn.Identity()
    student.eval()
    features = student.preprocess(sentences[:8])
    stock = MultipleNegativesRankingLoss(student, scale=20)([dict(features), dict(features)], None)
    torch.testing.assert_close(loss([features], None).total, stock)


def test_arccse(student):
    loss = ArcCSELoss(student, margin=0.2, temperature=0.1)
    loss.heads.double()
    views, _, _ = batch()
    expected = reference.arc_cse(*(reference.head(loss.heads["text"], view) for view in views), 0.2, 0.1)
    torch.testing.assert_close(loss.compute_loss_from_embeddings(views).total, expected)


@pytest.mark.parametrize("use_captions", [False, True])
def test_mcse(student, use_captions):
    config = MCSEConfig(multimodal_weight=0.3, projection_dim=4)
    loss = MCSELoss(student, config, use_captions=use_captions, teacher_dim=T)
    loss.heads.double()
    views, image, text = batch()
    expected = reference.info_nce(*(reference.head(loss.heads["text"], view) for view in views), 0.05)
    teachers = [("teacher_image", image)] + [("teacher_text", text)] * use_captions
    for view in views:
        for name, features in teachers:
            s, m = reference.head(loss.heads["grounding"], view), reference.head(loss.heads[name], features)
            expected = expected + 0.3 * reference.info_nce(s, m, 0.05)
    torch.testing.assert_close(loss.compute_loss_from_embeddings(views, image, text).total, expected)


def test_mcse_on_images_needs_no_captions_features(student):
    loss = MCSELoss(student, teacher_dim=T)
    loss.heads.double()
    views, image, text = batch()
    assert "teacher_text" not in loss.heads
    assert loss.compute_loss_from_embeddings(views, image) == loss.compute_loss_from_embeddings(views, image, text)


LOSSES = {
    "simcse": lambda model: SimCSELoss(model),
    "arccse": lambda model: ArcCSELoss(model),
    "mcse": lambda model: MCSELoss(model, teacher_dim=T),
    "kdmcse": lambda model: KDMCSELoss(model, teacher_dim=T),
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_has_what_the_library_expects(student, sentences, name):
    loss = LOSSES[name](student)
    components = loss([student.preprocess(sentences[:8])], None)
    assert components.total.ndim == 0
    assert isinstance(loss.get_config_dict(), dict)
    assert loss.citation.strip().startswith("@")
    for section in ("Args:", "References:", "Requirements:", "Inputs:", "Relations:", "Example:"):
        assert section in type(loss).__doc__
    wrapped = MatryoshkaLoss(student, loss, [32, 8])
    wrapped([student.preprocess(sentences[:8])], None).total.backward()


@pytest.mark.parametrize("name", LOSSES)
def test_heads_survive_saving(student, name, tmp_path):
    loss, other = LOSSES[name](student), LOSSES[name](student)
    loss.save_heads(tmp_path / "heads")
    other.load_heads(tmp_path / "heads")
    for key, value in loss.heads.state_dict().items():
        assert torch.equal(value, other.heads.state_dict()[key])


@pytest.mark.parametrize("normalized", [False, True])
def test_heads_tell_sentences_apart_whatever_the_length_of_embeddings(student, normalized):
    if normalized:
        student = SentenceTransformer(modules=[*student, Normalize()])
    loss = KDMCSELoss(student, KDMCSEConfig(projection_dim=64), teacher_dim=T)
    embeddings = torch.randn(100, loss.hidden_dim)  # of an encoder, whose last layer is normalised
    if normalized:
        embeddings = torch.nn.functional.normalize(embeddings)
    for name in ("text", "grounding"):
        outputs = torch.nn.functional.normalize(loss.heads[name](embeddings))
        cosines = (outputs @ outputs.T)[~torch.eye(100, dtype=torch.bool)]
        assert cosines.mean().abs() < 0.15  # unit vectors would give about 0.5 beside the bias


def test_heads_of_another_shape_are_refused_by_name(student, tmp_path):
    KDMCSELoss(student, KDMCSEConfig(projection_dim=8), teacher_dim=T).save_heads(tmp_path)
    loss = KDMCSELoss(student, KDMCSEConfig(projection_dim=8), teacher_dim=T + 1)
    before = {name: value.clone() for name, value in loss.heads.state_dict().items()}
    with pytest.raises(ValueError, match=r"teacher_image.dense.weight has shape \(8, 5\) in the file, \(8, 6\)"):
        loss.load_heads(tmp_path)
    with pytest.raises(ValueError, match=r"grounding.dense.weight is unknown"):
        SimCSELoss(student).load_heads(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in loss.heads.state_dict().items())


def test_missing_or_truncated_heads_are_refused(student, tmp_path):
    loss = SimCSELoss(student)
    with pytest.raises(FileNotFoundError, match="heads.safetensors"):
        loss.load_heads(tmp_path)
    loss.save_heads(tmp_path)
    file = tmp_path / "heads.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="truncated"):
        loss.load_heads(tmp_path)
