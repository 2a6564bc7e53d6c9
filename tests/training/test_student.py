"""Students from real encoder folders."""

import json

import pytest
import torch
from helpers import copy_tree
from sentence_transformers import SentenceTransformer
from transformers import BertModel, BertTokenizerFast, T5Config, T5EncoderModel, XLNetConfig, XLNetModel

from st_kdmcse import build_student
from st_kdmcse.training.inputs import encoder_type


def test_the_embedding_is_the_cls_vector_before_the_pooler(student, sentences):
    features = student.preprocess(sentences[:4])
    student.eval()
    with torch.no_grad():
        output = student[0].auto_model(**{name: features[name] for name in ("input_ids", "attention_mask")})
    torch.testing.assert_close(student.encode(sentences[:4], convert_to_tensor=True), output.last_hidden_state[:, 0])


def test_the_embedding_can_be_the_mean_of_the_tokens(tiny_bert, sentences, tmp_path):
    model = build_student(str(tiny_bert), pooling="mean").to("cpu")
    tokens = model.encode(sentences[0], output_value="token_embeddings")
    torch.testing.assert_close(model.encode(sentences[0], convert_to_tensor=True), tokens.mean(dim=0))
    model.save_pretrained(str(tmp_path / "model"))
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert (loaded.encode(sentences[:8]) == model.encode(sentences[:8])).all()


def test_the_saved_student_is_a_stock_model(student, sentences, tmp_path):
    student.save_pretrained(str(tmp_path / "model"))
    loaded = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert [type(module).__name__ for module in loaded] == ["Transformer", "Pooling"]
    assert (loaded.encode(sentences[:8]) == student.encode(sentences[:8])).all()


def test_saved_prompts_stay(student, sentences, tmp_path, caplog):
    student.prompts = {"query": "question: ", "document": ""}
    student.default_prompt_name = "query"
    student.save_pretrained(str(tmp_path / "model"))
    again = build_student(str(tmp_path / "model")).to("cpu")
    assert (again.prompts["query"], again.default_prompt_name) == ("question: ", "query")
    assert "and is trained without it" in caplog.text
    assert (again.encode(sentences[:4]) == student.encode(sentences[:4])).all()


def test_older_folders_of_sentence_transformers_are_students(student, sentences, tmp_path):
    folder = tmp_path / "old"
    student.save_pretrained(str(folder))
    (folder / "0_Transformer").mkdir()
    modules = json.loads((folder / "modules.json").read_text())
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))
    for path in folder.iterdir():
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            path.rename(folder / "0_Transformer" / path.name)
    assert encoder_type(str(folder)) == "bert"
    again = build_student(str(folder)).to("cpu")
    assert (again.encode(sentences[:4]) == student.encode(sentences[:4])).all()


def test_sentences_are_cut_off(tiny_bert):
    model = build_student(str(tiny_bert), max_seq_length=5)
    assert model.preprocess(["dog " * 50])["input_ids"].shape == (1, 5)


def test_roberta_is_a_student(tiny_roberta):
    model = build_student(str(tiny_roberta), max_seq_length=39)
    assert model.encode(["a dog " * 50]).shape == (1, 16)
    with pytest.raises(ValueError, match="from 2 to the 39 positions"):  # one of 40 is taken by padding
        build_student(str(tiny_roberta), max_seq_length=40)


def test_an_encoder_without_cls_is_refused(tmp_path, tiny_bert):
    tokenizer = BertTokenizerFast.from_pretrained(tiny_bert)
    tokenizer.cls_token = None
    tokenizer.save_pretrained(tmp_path)
    T5EncoderModel(T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"\[CLS\]"):
        build_student(str(tmp_path))


def test_a_checkpoint_in_half_precision_is_trained_in_full(tiny_bert, tmp_path):
    BertModel.from_pretrained(tiny_bert).half().save_pretrained(tmp_path)
    BertTokenizerFast.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    assert {parameter.dtype for parameter in build_student(str(tmp_path)).parameters()} == {torch.float32}


@pytest.mark.parametrize("length", [1, 65])
def test_a_length_that_the_encoder_does_not_have_is_refused(tiny_bert, length):
    with pytest.raises(ValueError, match="`max_seq_length` must be from 2 to the 64 positions"):
        build_student(str(tiny_bert), max_seq_length=length)


def test_an_encoder_without_a_limit_of_positions(tmp_path, tiny_bert):
    copy_tree(tiny_bert, tmp_path / "xlnet")
    size = build_student(tiny_bert).tokenizer.vocab_size
    XLNetModel(XLNetConfig(vocab_size=size, d_model=16, n_layer=1, n_head=2, d_inner=16)).save_pretrained(
        tmp_path / "xlnet"
    )
    assert build_student(tmp_path / "xlnet", 600).max_seq_length == 600
