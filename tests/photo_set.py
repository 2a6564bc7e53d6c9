"""A small data set of real image files in the layout of Flickr8k."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

IMAGES = 45


def make_images(folder: Path, count: int) -> Path:
    """A captions.txt as of Flickr8k, with 1 to 3 captions an image, and its folder of images of several kinds."""
    generator = np.random.default_rng(0)
    (folder / "Images").mkdir(parents=True)
    with (folder / "captions.txt").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number in range(count):
            name = f"photo {number:03d}.{'png' if number % 5 == 0 else 'jpg'}"
            size = (int(generator.integers(20, 60)), int(generator.integers(20, 60)))
            pixels = generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            image = Image.fromarray(pixels).convert("L" if number % 7 == 0 else "RGB")
            image.save(folder / "Images" / name)
            for caption in range(1 + number % 3):
                writer.writerow([name, f'Photo {number}, "seen" for the {"very " * caption}first time.'])
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
