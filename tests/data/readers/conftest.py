"""Files in the formats that the readers read."""

import io

import pytest
from PIL import Image


@pytest.fixture(scope="session")
def jpeg():
    """The bytes of a small JPEG, another one for each number."""

    def encode(number=0):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 6), (number % 256, 60, 200)).save(buffer, "JPEG")
        return buffer.getvalue()

    return encode


@pytest.fixture
def images(tmp_path, jpeg):
    """A folder with a.jpg, b.jpg and c.jpg."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, name in enumerate("abc"):
        (folder / f"{name}.jpg").write_bytes(jpeg(number))
    return folder


@pytest.fixture
def write(tmp_path):
    """Write a file: text as UTF-8, bytes as they are."""

    def to_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return to_file


@pytest.fixture(scope="session")
def read():
    """Captions by image id, and the bad rows as (kind, place, message), of a reader that skips bad rows."""

    def all_of(reader):
        found = {record.image_id: list(record.captions) for record in reader}
        return found, [(problem.kind, problem.where, problem.message) for problem in reader.problems.listed]

    return all_of
