import pytest

from st_kdmcse.cli.named_models import named_models


def test_labels_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "margin=0.1").mkdir()
    found = named_models(["SimCSE=runs/a=b", "runs/mcse/", "margin=0.1", "org/name", "."])
    assert list(found.items()) == [
        ("SimCSE", "runs/a=b"),
        ("mcse", "runs/mcse/"),
        ("margin=0.1", "margin=0.1"),
        ("name", "org/name"),
        (tmp_path.name, "."),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["runs/1/last", "runs/2/last"], "runs/1/last and runs/2/last would both be called 'last'"),
        (["=path"], "names no model"),
        (["label="], "names no model"),
        ([""], "names no model"),
    ],
)
def test_models_that_cannot_be_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        named_models(arguments)
