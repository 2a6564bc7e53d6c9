"""The precision to compute in: what the CPU is measured to be faster at, and what follows from it."""

import logging
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import cpu_with_bfloat16

from st_kdmcse import precision
from st_kdmcse.encoding import computing, encode_distinct, encode_documents, encode_queries, encoding_precision
from st_kdmcse.precision import autocast, bfloat16_is_faster, resolve_precision
from st_kdmcse.search import SemanticIndex

CPU = torch.device("cpu")
PROGRAM = """
from st_kdmcse.precision import bfloat16_is_faster
print(bfloat16_is_faster("cpu"))
"""


def test_a_cpu_that_emulates_bfloat16_is_measured_to_be_slower():
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the variable that switches instructions off is for x86")
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]


@pytest.mark.parametrize(("ratio", "faster"), [(3.0, True), (1.6, True), (1.4, False), (0.1, False)])
def test_bfloat16_must_win_by_a_margin_and_is_measured_once(monkeypatch, caplog, ratio, faster):
    measured = []

    def seconds(dtype):
        measured.append(dtype)
        return ratio if dtype == torch.float32 else 1.0

    with cpu_with_bfloat16(True), monkeypatch.context() as patch, caplog.at_level(logging.INFO, "st_kdmcse"):
        patch.setattr(precision, "_seconds", seconds)
        assert [bfloat16_is_faster("cpu") for _ in range(3)] == [faster] * 3
    assert len(measured) == 2
    assert caplog.text.count(f"{ratio:.1f} times as fast as in float32") == 1
    assert ("bfloat16 is the default" in caplog.text) == faster


def test_the_measurement_is_one_of_this_machine():
    assert 0 < precision._seconds(torch.bfloat16) < 5
    assert 0 < precision._seconds(torch.float32) < 5


def test_other_devices_keep_float32():
    assert not bfloat16_is_faster("mps")
    assert resolve_precision("auto", torch.device("mps")) == "float32"


def test_what_is_asked_for(bfloat16):
    assert [resolve_precision(each, CPU) for each in precision.PRECISIONS] == ["bfloat16", "float32", "bfloat16"]
    with pytest.raises(ValueError, match="`precision` is 'half', expected one of auto, float32, bfloat16"):
        resolve_precision("half", CPU)
    with cpu_with_bfloat16(False):
        assert resolve_precision("auto", CPU) == "float32"
        with pytest.raises(ValueError, match="this CPU has no instructions for bfloat16.* set `precision` to float32"):
            resolve_precision("bfloat16", CPU)


def test_matrix_products_are_in_the_precision():
    matrix = torch.ones(2, 2)
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        with autocast(name, CPU):
            assert (matrix @ matrix).dtype == dtype


def test_embeddings_are_float32_and_near_those_of_float32(bfloat16, student, sentences):
    texts = sentences[:100]
    exact = encode_documents(student, texts, precision="float32")
    assert np.array_equal(exact, encode_documents(student, texts))
    rounded = encode_documents(student, texts, precision="bfloat16")
    assert rounded.dtype == np.float32
    assert 1e-6 < np.abs(rounded - exact).max() < 0.05
    distinct = encode_distinct(student, texts, precision="bfloat16")(texts)
    distinct /= np.linalg.norm(distinct, axis=1, keepdims=True)
    np.testing.assert_allclose(distinct, rounded, atol=0.03)


def test_few_texts_stay_in_float32_unless_told_otherwise(bfloat16, student, sentences):
    found = [encoding_precision(student, "auto", count) for count in (1, 255, 256)]
    assert found == ["float32", "float32", "bfloat16"]
    assert encoding_precision(student, "bfloat16", 1) == "bfloat16"
    one = encode_queries(student, sentences[:1])
    assert np.array_equal(one, encode_queries(student, sentences[:1], "auto"))
    assert not np.array_equal(one, encode_queries(student, sentences[:1], "bfloat16"))


def test_embeddings_to_search_are_of_length_one_in_any_precision(bfloat16, student, sentences):
    for name in ("float32", "bfloat16"):
        lengths = np.linalg.norm(encode_documents(student, sentences, precision=name), axis=1)
        np.testing.assert_allclose(lengths, 1, atol=1e-6)


def test_the_copy_shares_all_but_the_weights(student, sentences):
    class Trainer:
        def __deepcopy__(self, memo):
            raise AssertionError("the trainer is copied")

    student.model_card_data.trainer = Trainer()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with computing(student, "bfloat16") as copied:
        assert {each.dtype for each in copied.parameters()} == {torch.bfloat16}
        assert copied.tokenizer is student.tokenizer
        copied.encode(sentences[:3])
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert all(each.requires_grad for each in student.parameters())
    with computing(student, "float32") as same:
        assert same is student


def test_processes_compute_in_the_precision(student, sentences):
    texts = sentences[:10]
    with computing(student, "bfloat16") as copied:
        here = encode_documents(copied, texts)
        pool = copied.start_multi_process_pool(["cpu"])
        try:
            there = encode_documents(copied, texts, pool)
        finally:
            student.stop_multi_process_pool(pool)
    np.testing.assert_allclose(there, here, atol=0.02)
    assert not np.allclose(there, encode_documents(student, texts), atol=1e-6)


def test_repeated_texts_are_encoded_in_the_precision_that_the_index_records(bfloat16, student, sentences):
    texts = sentences[:10] * 30  # many texts, few distinct ones
    index = SemanticIndex.build(student, texts)
    assert index._header["precision"] == "bfloat16"
    vectors = index.backend.index.reconstruct_n(0, 10)
    assert not np.allclose(vectors, encode_documents(student, texts[:10]), atol=1e-6)
