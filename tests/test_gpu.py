"""What only a CUDA device shows: run with `pytest -m gpu`."""

import warnings

import pytest
import torch
from datasets import Dataset, DatasetDict
from helpers import without_dropout
from photo_set import content
from sentence_transformers import SentenceTransformerTrainingArguments

from st_kdmcse import KDMCSEConfig, KDMCSELoss, KDMCSETrainer, build_student, functional
from st_kdmcse.data import STSPairs, STSTask
from st_kdmcse.evaluation.sts import evaluate_sts
from st_kdmcse.extraction import ExtractionOptions, extract_dataset, merge

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def make_trainer(tiny_bert, sentences, store, output, unpad=None, **options):
    torch.manual_seed(0)
    model = build_student(str(tiny_bert)).to("cuda")
    config = KDMCSEConfig(multimodal_weight=0.5, text_threshold=0.5, image_threshold=0.5, same_image="remove")
    arguments = {"max_steps": 12, "save_steps": 6, "per_device_train_batch_size": 16, "logging_steps": 1, **options}
    return KDMCSETrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(str(output), report_to="none", disable_tqdm=True, **arguments),
        train_dataset=DatasetDict(text=Dataset.from_dict({"sentence": sentences}), pairs=store.dataset()),
        loss=KDMCSELoss(model, config, features=store),
        pair_every=2,
        unpad=unpad,
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_training_and_resuming(tiny_bert, sentences, store, tmp_path, bf16):
    whole = make_trainer(tiny_bert, sentences, store, tmp_path / "whole", bf16=bf16)
    whole.train()
    resumed = make_trainer(tiny_bert, sentences, store, tmp_path / "resumed", bf16=bf16)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    for name, value in whole.loss.heads.state_dict().items():
        assert value.is_cuda
        assert value.dtype == torch.float32
        torch.testing.assert_close(resumed.loss.heads.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert all(entry["loss"] > 0 for entry in whole.state.log_history if "loss" in entry)


def test_features_on_the_device_are_those_of_the_store(tiny_bert, sentences, store):
    model = build_student(str(tiny_bert)).to("cuda").eval()
    loss = KDMCSELoss(model, features=store)
    features = [
        {name: value.to("cuda") for name, value in model.preprocess(sentences[:8]).items() if name != "modality"}
    ]
    rows = torch.arange(5, 45, 5, device="cuda")
    values = []
    for loss.keep_features_on_device in (True, False):
        values.append(loss([dict(features[0])], rows).total.item())
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_the_device_computes_what_the_cpu_computes():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(64, 256, generator=generator) for _ in range(2))
    alpha = torch.rand(64, 64, generator=generator)
    keep = functional.threshold_filter(alpha, 0.8)
    values = []
    for device in ("cpu", "cuda"):
        anchors = x.to(device).detach().requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = functional.adap_acse(anchors, y.to(device), alpha.to(device), keep=keep.to(device))
        loss.backward()
        values.append((loss.cpu(), anchors.grad.cpu(), functional.uniformity(anchors).detach().cpu()))
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


def test_extraction_in_half_precision_resumed_by_shards(tmp_path, photo_set, tiny_open_clip):
    def features(name, **options):
        settings = ExtractionOptions(
            str(photo_set / "captions.txt"), photo_set / "Images", teacher=str(tiny_open_clip), batch_size=8, **options
        )
        return settings, tmp_path / name

    exact = extract_dataset(*features("float32", precision="float32", dtype="float32")).store
    options, path = features("half")
    half = extract_dataset(options, path).store
    assert options.load_teacher().precision in ("bfloat16", "float16")
    scale = exact.image_features.std()
    assert abs(half.image_features - exact.image_features).max() < 0.2 * scale
    options, again = features("again")
    for index in (1, 0):
        extract_dataset(options, again, shard=(index, 2))
    merge(again)
    assert content(again) == content(path)


def test_sts_scores_are_those_of_the_cpu(tiny_bert, sentences):
    pairs = STSPairs(sentences[:100], sentences[100:200], torch.linspace(0, 5, 100).tolist(), "random")
    model = build_student(str(tiny_bert))
    for weight in model.parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)  # far apart: rounding does not decide about ranks
    results = [evaluate_sts(model.to(device), [STSTask("STS12", (pairs,))]) for device in ("cpu", "cuda")]
    torch.testing.assert_close(*(torch.tensor(each.similarities["STS12"]) for each in results), rtol=1e-4, atol=1e-5)
    assert abs(results[0].spearman["STS12"] - results[1].spearman["STS12"]) <= 0.02


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF8,PQ16x4fs,RFlat"])
def test_search_on_the_gpu_is_exact_and_follows_changes(factory):
    faiss = pytest.importorskip("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("FAISS's wheel for CPUs")
    from st_kdmcse.search.base import NewRows
    from st_kdmcse.search.faiss_backend import FaissBackend

    vectors = torch.randn(3000, 32, generator=torch.Generator().manual_seed(0)).numpy()
    names = [str(row) for row in range(len(vectors))]
    rows = NewRows.checked(names, names, vectors)
    backend = FaissBackend.build(NewRows.checked(names[:2500], names[:2500], vectors[:2500]), factory)

    def check(count):
        found = backend.search(rows.embeddings[:50], 10)
        expected = (rows.embeddings[:50] @ rows.embeddings[:count].T).argsort(axis=1)[:, :-11:-1]
        assert [[int(hit.id) for hit in hits] for hits in found] == expected.tolist()

    check(2500)
    assert backend.info()["device"] == "gpu"
    backend.add(NewRows.checked(names[2500:], names[2500:], vectors[2500:]))
    check(3000)
    backend.remove(["0"])
    assert "0" not in {hit.id for hit in backend.search(rows.embeddings[:1], 10)[0]}


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_compiled_run_learns_what_a_plain_one_does(tiny_bert, sentences, store, tmp_path, mode):
    losses = []
    for options in ({}, {"torch_compile": True, "torch_compile_mode": mode}):
        trainer = make_trainer(tiny_bert, sentences, store, tmp_path / str(len(options)), **options)
        without_dropout(trainer.model)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize("bf16", [False, True])
def test_no_step_waits_for_the_device(tiny_bert, sentences, store, tmp_path, bf16):
    counts = []
    for steps in (6, 12):
        options = {"max_steps": steps, "logging_steps": 100, "save_strategy": "no", "logging_nan_inf_filter": False}
        options["accelerator_config"] = {"non_blocking": True}
        trainer = make_trainer(tiny_bert, sentences, store, tmp_path / str(steps), bf16=bf16, **options)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                trainer.train()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchroniz" in str(warning.message) for warning in caught))
    assert counts[0] == counts[1]
    assert counts[0] > 0  # the mean loss, at the end


@pytest.mark.parametrize("bf16", [False, True])
def test_without_padding_the_losses_are_the_same(tiny_bert, sentences, store, tmp_path, bf16):
    words = " ".join(sentences).split()
    uneven = [" ".join(words[start : start + 1 + start % 12]) for start in range(80)]
    losses = []
    for unpad in (False, True):
        trainer = make_trainer(tiny_bert, uneven, store, tmp_path / str(unpad), bf16=bf16, unpad=unpad)
        without_dropout(trainer.model)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if bf16 else 1e-4)


@pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,SQ8", "IVF16,PQ16np", "IVF16_HNSW16,Flat"])
def test_lists_are_searched_on_the_gpu_with_the_recall_of_the_cpu(factory, monkeypatch):
    faiss = pytest.importorskip("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("FAISS's wheel for CPUs")
    from st_kdmcse.search.base import NewRows
    from st_kdmcse.search.faiss_backend import FaissBackend

    vectors = torch.randn(8000, 32, generator=torch.Generator().manual_seed(0)).numpy()
    names = [str(row) for row in range(len(vectors))]
    queries = NewRows.checked(names[:500], names[:500], vectors[7500:]).embeddings
    backend = FaissBackend.build(NewRows.checked(names[:7500], names[:7500], vectors[:7500]), factory, 0.9)

    def found():
        return [{hit.id for hit in hits} for hits in backend.search(queries, 10)]

    on_gpu = found()
    assert backend.info()["device"] == "gpu"
    everything = backend.search(queries[:1], 2000)[0]
    assert len({hit.id for hit in everything}) == 2000, "lists with too few rows are made up for on the CPU"
    monkeypatch.setattr(backend, "_gpu", lambda: None)
    same = sum(len(left & right) for left, right in zip(on_gpu, found(), strict=True)) / (10 * len(queries))
    assert same >= 0.98


def test_what_faiss_has_for_cpus_alone_stays_there_and_this_is_said(caplog):
    faiss = pytest.importorskip("faiss")
    if not hasattr(faiss, "StandardGpuResources"):
        pytest.skip("FAISS's wheel for CPUs")
    from st_kdmcse.search.factory import build_faiss
    from st_kdmcse.search.gpu import GpuSearch

    vectors = torch.nn.functional.normalize(torch.randn(3000, 32, generator=torch.Generator().manual_seed(0))).numpy()
    with caplog.at_level("INFO", "st_kdmcse"):
        assert GpuSearch.of(build_faiss(vectors, "IVF16,PQ16x4fs").index) is None
    assert "searched on the CPU: FAISS has no IndexIVFPQFastScan for GPUs" in caplog.text
