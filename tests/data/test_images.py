import io
import os
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image

from st_kdmcse.data import images as images_module
from st_kdmcse.data.images import FileSlice, ImageError, load_image


def encoded(mode="RGB", kind="JPEG", size=(40, 30)):
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *(("RGB", kind) for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")),
        *(("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("RGBA", "PNG")),
    ],
)
def test_every_mode_loads(tmp_path, mode, kind):
    path = tmp_path / "image"
    path.write_bytes(encoded(mode, kind))
    for source in (path, str(path), path.read_bytes()):
        image = load_image(source)
        assert image.size == (40, 30)
        with Image.open(path) as expected:
            assert image.mode == expected.mode
            assert image.mode in (mode, "P")  # a GIF has a palette
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "big TIFF"])
def test_16_bits_become_8(kind):
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    buffer = io.BytesIO()
    if kind == "big TIFF":  # the other order of bytes
        content = np.asarray(values, dtype=">u2") * np.uint16(257)
        image = Image.frombytes("I;16B", (16, 16), content.astype(">u2").tobytes())
    else:
        image = Image.fromarray(values.astype(np.uint16) * 257)
    image.save(buffer, kind.removeprefix("big "))
    loaded = load_image(buffer.getvalue())
    assert loaded.mode == "L"
    np.testing.assert_array_equal(np.asarray(loaded), values)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bits_are_refused(mode):
    kind, message = error_of(encoded(mode, "TIFF"))
    assert kind == "undecodable image"
    assert f"its mode {mode} has 32 bits a channel, of unknown range: save it with 8 or 16" in message


def test_what_is_no_image_has_the_same_message_each_time():
    messages = {error_of(b"no image at all")[1] for _ in range(3)}
    assert messages == {"the image cannot be decoded (no known image format): replace it"}


def error_of(source):
    with pytest.raises(ImageError) as caught:
        load_image(source)
    assert isinstance(caught.value, ValueError)
    again = pickle.loads(pickle.dumps(caught.value))  # worker processes send it
    assert (again.kind, str(again)) == (caught.value.kind, str(caught.value))
    return caught.value.kind, str(caught.value)


def test_no_file(tmp_path):
    path = tmp_path / "missing.jpg"
    assert error_of(path) == ("no image file", f"{path} does not exist: add it, or leave it out")
    kind, message = error_of(FileSlice(path, 0, 10, "a.jpg"))
    assert (kind, f"{path}, a.jpg does not exist" in message) == ("no image file", True)


def test_a_folder_and_an_impossible_name(tmp_path):
    kind, message = error_of(tmp_path)
    assert (kind, f"{tmp_path} cannot be read" in message) == ("undecodable image", True)
    assert error_of(str(tmp_path / "a\0b.jpg"))[0] == "undecodable image"


@pytest.mark.parametrize("in_memory", [False, True])
def test_zero_bytes(tmp_path, in_memory):
    path = tmp_path / "empty.jpg"
    path.touch()
    kind, message = error_of(b"" if in_memory else path)
    assert (kind, message) == (
        "empty image file",
        f"{'the image' if in_memory else path} is empty (0 bytes): copy it again, or leave it out",
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("part", [0.02, 0.1, 0.5, 0.9])
def test_a_truncated_image(tmp_path, kind, part):
    whole = encoded(kind=kind, size=(120, 90))
    path = tmp_path / "cut.jpg"
    path.write_bytes(whole[: int(len(whole) * part)])
    found, message = error_of(path)
    assert (found, f"{path} cannot be decoded" in message) == ("undecodable image", True)


@pytest.mark.parametrize("content", [b"<html>404 Not Found</html>", b"\0" * 1000, b"\xff\xd8\xff", b"GIF89a", b"x"])
def test_no_image(tmp_path, content):
    path = tmp_path / "page.jpg"
    path.write_bytes(content)
    kind, message = error_of(path)
    assert (kind, str(path) in message) == ("undecodable image", True)


@pytest.mark.parametrize("most", [1199, 599, 1])
def test_a_decompression_bomb(tmp_path, monkeypatch, most):
    """PIL itself only warns up to twice its limit."""
    path = tmp_path / "bomb.png"
    path.write_bytes(encoded(kind="PNG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    kind, message = error_of(path)
    assert (kind, f"{path} is too large an image" in message) == ("decompression bomb", True)


@pytest.mark.parametrize("most", [1200, None])
def test_an_image_at_the_limit_loads(monkeypatch, recwarn, most):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", most)
    assert load_image(encoded()).size == (40, 30)
    assert not recwarn.list


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["AVIF", "DDS", "TIFF", "GIF"])
def test_any_damage_is_an_image_error(kind):
    """Decoders raise more than OSError: RuntimeError, NotImplementedError, AttributeError, ..."""
    generator = np.random.default_rng(0)
    buffer = io.BytesIO()
    try:
        Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, kind)
    except (OSError, KeyError):
        pytest.skip(f"this PIL cannot write {kind}")
    encoded = np.frombuffer(buffer.getvalue(), dtype=np.uint8)
    kinds = set()
    for _ in range(300):
        damaged = encoded.copy()
        damaged[generator.integers(0, len(damaged), 3)] = generator.integers(0, 256, 3)
        try:
            load_image(damaged.tobytes())
        except ImageError as error:
            kinds.add(error.kind)
    assert "undecodable image" in kinds
    assert kinds <= {"undecodable image", "decompression bomb"}


def test_slices_of_a_tar(tmp_path):
    contents = {"a.png": encoded("RGB", "PNG"), "b.png": encoded("L", "PNG"), "c.jpg": encoded()[:50]}
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with tarfile.open(path) as tar:
        slices = {m.name: FileSlice(path, m.offset_data, m.size, m.name) for m in tar}
    for name in ("a.png", "b.png"):
        np.testing.assert_array_equal(np.asarray(load_image(slices[name])), np.asarray(load_image(contents[name])))
    kind, message = error_of(slices["c.jpg"])
    assert (kind, f"{path}, c.jpg cannot be decoded" in message) == ("undecodable image", True)


def test_real_images(shared_data):
    paths = sorted((shared_data / "coco" / "val2017").glob("*.jpg"))
    sizes = [load_image(path).size for path in paths]
    assert len(sizes) == 40
    for path, size in zip(paths, sizes, strict=True):
        with Image.open(path) as image:
            assert image.size == size


def test_only_regular_files_of_some_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "endless.jpg").symlink_to("/dev/zero")
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(images_module.MAX_BYTES + 1)
    slice_of_it = FileSlice(tmp_path / "large.jpg", 0, images_module.MAX_BYTES + 1, "a.jpg")
    for source, message in (
        (tmp_path / "pipe.jpg", "is no regular file"),
        (tmp_path / "endless.jpg", "is no regular file"),
        (tmp_path, "is a folder"),
        (tmp_path / "large.jpg", "has 536,870,913 bytes, more than 536,870,912"),
        (slice_of_it, "has 536,870,913 bytes"),
    ):
        with pytest.raises(ImageError, match=message):
            load_image(source)
