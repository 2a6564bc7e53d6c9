"""One process of a two-process run, started by test_distributed: usage RANK WORLD PORT FOLDER."""

import os
import sys
from pathlib import Path

rank, world, port, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
os.environ.update(
    RANK=str(rank),
    LOCAL_RANK=str(rank),
    WORLD_SIZE=str(world),
    MASTER_ADDR="127.0.0.1",
    MASTER_PORT=port,
    ACCELERATE_USE_CPU="true",
    OMP_NUM_THREADS="1",
)

import torch
from datasets import Dataset, DatasetDict
from helpers import without_dropout
from sentence_transformers import SentenceTransformerTrainingArguments
from transformers import set_seed

from st_kdmcse import CachedKDMCSELoss, FeatureStore, KDMCSEConfig, KDMCSELoss, KDMCSETrainer, build_student

steps, batch, lr, resume, mini_batch = (float(value) for value in sys.argv[5:10])
set_seed(3 + rank)  # heads that differ between processes must be made equal
# In float64, heads too: what remains then is an error of the algorithm, not of rounding.
student = without_dropout(build_student(str(folder / "bert")).to("cpu")).double()
store = FeatureStore.open(folder / "store")
sentences = (folder / "sentences.txt").read_text().splitlines()
config = KDMCSEConfig(
    multimodal_weight=0.5,
    text_threshold=0.5,
    image_threshold=0.5,
    same_image="positive",
    soft_label_calibration="quantile",
    list_weight=0.5,
    consistency_weight=0.5,
    retention_weight=0.5,
)
options = {"teacher_dim": store.dim, "features": store, "gather_across_devices": True}
if mini_batch:
    loss = CachedKDMCSELoss(student, config, **options, mini_batch_size=int(mini_batch), chunk_rows=int(mini_batch))
else:
    loss = KDMCSELoss(student, config, **options)
if rank == 0:
    loss.load_heads(folder / "heads")
loss.double()
trainer = KDMCSETrainer(
    model=student,
    args=SentenceTransformerTrainingArguments(
        output_dir=str(folder / f"run-{world}"),
        max_steps=int(steps),
        per_device_train_batch_size=int(batch),
        learning_rate=lr,
        optim="sgd",
        max_grad_norm=0.05,
        save_strategy="steps",
        save_steps=7,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        lr_scheduler_type="constant",
        ddp_backend="gloo",
    ),
    train_dataset=DatasetDict(text=Dataset.from_dict({"sentence": sentences}), pairs=store.dataset()),
    loss=loss,
    pair_every=2,
)
batches = []
forward = loss.forward
loss.forward = lambda features, labels=None: batches.append(labels) or forward(features, labels)
trainer.train(resume_from_checkpoint=str(folder / f"run-{world}" / f"checkpoint-{int(resume)}") if resume else None)
state = {name.removeprefix("module."): value for name, value in student.state_dict().items()}
torch.save(
    {
        "student": state,
        "heads": loss.heads.state_dict(),
        "labels": batches,
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    },
    folder / f"result-{world}-{rank}.pt",
)
trainer.accelerator.state.destroy_process_group()  # threads that outlive the interpreter would abort the process
