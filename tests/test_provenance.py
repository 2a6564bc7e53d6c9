import json

import pytest
import torch
from sentence_transformers import SentenceTransformer

from st_kdmcse.files import check_output_file, write_json
from st_kdmcse.provenance import claim, differences, parameters_checksum, provenance


def test_the_checksum_follows_the_parameters(student, tmp_path):
    first = parameters_checksum(student)
    student.save_pretrained(str(tmp_path / "model"))
    assert parameters_checksum(SentenceTransformer(str(tmp_path / "model"), device="cpu")) == first
    # No embedding comes from the pooler, and a checkpoint may lack it.
    student[0].auto_model.pooler.dense.bias.data[0] += 1
    assert parameters_checksum(student) == first
    student[0].auto_model.embeddings.LayerNorm.bias.data[0] += 1e-6
    assert parameters_checksum(student) != first
    assert parameters_checksum(student.to(torch.bfloat16)) != parameters_checksum(student.to(torch.float32))


def test_provenance_is_json(student):
    found = provenance(student, "my-model", {"STS12": "0" * 64}, seed=3)
    assert json.loads(json.dumps(found)) == found
    assert found["model"]["name"] == "my-model"
    assert found["model"]["modules"] == ["Transformer", "Pooling"]
    assert (found["seed"], found["data_sha256"]) == (3, {"STS12": "0" * 64})
    assert {"torch", "sentence-transformers", "scipy", "python", "st-kdmcse"} <= set(found["versions"])
    assert found["device"].startswith("cpu, ")
    assert provenance()["model"] is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "results.json"
    write_json(path, {"score": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"score": float("nan")})
    assert json.loads(path.read_text()) == {"score": 1}
    assert [each.name for each in path.parent.iterdir()] == ["results.json"]


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    check_output_file(None)
    check_output_file(tmp_path / "new" / "results.json")
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        check_output_file(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"the folder of .*results\.json cannot be made"):
        check_output_file(tmp_path / "file" / "results.json")


def test_a_claim_keeps_the_first_settings_and_names_what_differs(tmp_path):
    path = tmp_path / "work" / "run.json"
    assert claim(path, {"seed": 1, "paths": ("a", "b")}, "begin again") == {"seed": 1, "paths": ["a", "b"]}
    assert claim(path, {"seed": 1, "paths": ("a", "b")}, "begin again")["seed"] == 1
    with pytest.raises(ValueError, match=r"work in .*work was begun .*\(seed was 1, is 2\): begin again"):
        claim(path, {"seed": 2, "paths": ("a", "b")}, "begin again")


def test_differences_leave_out_what_is_free():
    assert differences({"a": 1, "b": 2, "gone": 3}, {"a": 2, "b": 3, "new": 4}, {"b"}) == [
        "a was 1, is 2",
        "new was None, is 4",
    ]
