"""Tests of st_kdmcse.data.resident."""

import torch

from st_kdmcse.data.resident import ResidentFeatures


def test_rows_are_those_of_the_store(store):
    rows = [71, 0, 5, 5]
    wanted = store.gather(rows)
    images, texts, image_rows = ResidentFeatures(store, torch.device("cpu")).gather(torch.tensor(rows))
    assert torch.equal(images, torch.from_numpy(wanted.image_features))
    assert torch.equal(texts, torch.from_numpy(wanted.text_features))
    assert image_rows.tolist() == wanted.image_rows.tolist()


def test_on_a_cpu_they_stay_on_disk(store):
    assert ResidentFeatures.fitting(store, torch.device("cpu")) is None
