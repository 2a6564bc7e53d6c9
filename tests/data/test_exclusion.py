"""Lists of images to leave out."""

import pytest

from st_kdmcse.data.exclusion import read_left_out


@pytest.mark.parametrize(
    "content",
    [
        "3.jpg\n\n0.jpg\n3.jpg\n",
        "\ufeff3.jpg\r\n0.jpg\r\n",
        "image,image_row\n3.jpg,3\n0.jpg,0\n",
        'number,image\n"1\n2",3.jpg\n\n5,"0.jpg"\n',
    ],
)
def test_lines_or_a_table(store, tmp_path, content):
    (tmp_path / "list").write_text(content, encoding="utf-8")
    left_out = read_left_out(tmp_path / "list", store)
    assert left_out.images == 2
    assert left_out.rows.tolist() == [0, 1, 2, 9, 10, 11]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("3.jpg\n\n77.jpg\n78.jpg\n", r"list, line 3: the feature store .* has no image '77\.jpg'; remove the line"),
        ('n,image\n"1\n2",3.jpg\n3,7.png\n', r"list, line 4: .* no image '7\.png'"),
        ("n,image\n1,3.jpg\n2\n", r"list, line 3: no value in the column 'image'"),
        ("\n\n", "list lists no image"),
        ("image\n", "list lists no image"),
        ("\n".join(f"{image}.jpg" for image in range(24)), "list lists all images"),
        (b"3.jpg\ncaf\xe9.jpg\n", "list, line 2: not UTF-8"),
    ],
)
def test_a_list_that_does_not_fit_the_store(store, tmp_path, content, message):
    (tmp_path / "list").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_left_out(tmp_path / "list", store)


def test_no_list(store, tmp_path):
    with pytest.raises(FileNotFoundError, match="give a list of images"):
        read_left_out(tmp_path / "absent", store)


def test_the_images_of_the_shared_data(shared_data):
    from st_kdmcse import FeatureStore

    folder = shared_data / "flickr8k_features"
    left_out = read_left_out(folder / "overlap.csv", FeatureStore.open(folder))
    assert (left_out.images, len(left_out.rows)) == (143, 715)
