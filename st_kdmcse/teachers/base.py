"""What all teachers share: devices, precision, batches, and the order of texts."""

from __future__ import annotations

import hashlib
import pickle
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import nn
from tqdm import tqdm

from st_kdmcse.data.images import FileSlice, ImageError, ImageSource, in_eight_bits, load_image
from st_kdmcse.files import progress_bar
from st_kdmcse.precision import autocast, bfloat16_is_faster, no_bfloat16

if TYPE_CHECKING:
    from PIL import Image

TeacherPrecision = Literal["auto", "float32", "bfloat16", "float16"]
"""What a teacher can be asked to compute in."""

TeacherImage: TypeAlias = "Image.Image | ImageSource | str"
"""An image for a teacher: of Pillow, encoded, or the path of a file."""

Preprocess: TypeAlias = "Callable[[Image.Image], torch.Tensor]"
Pixels: TypeAlias = "torch.Tensor | list[npt.NDArray[np.uint8]]"
"""(B, 3, H, W) pixels of a batch; arrays of (3, H, W) where the images differ in size."""

_MANY_BATCHES = 4
_LONGEST = 100  # times the shorter edge
_THREE_LETTERS = ["dog", "man", "the", "red", "two", "cat"]
# What unpickling a broken file raises is more than UnpicklingError.
_BROKEN_WEIGHTS = (
    *(RuntimeError, ValueError, TypeError, AttributeError, LookupError, EOFError),
    *(pickle.UnpicklingError, SafetensorError),
)


class Teacher(ABC):
    """A frozen encoder of images and texts. Features are raw, as its model gives them: not normalised.

    Attributes:
        name: where the weights come from, with a hash of them where they can change under the same name; feature
            stores keep it.
        dim: dimension T of the features.
        device: where the model is.
        batch_size: images or texts in one forward pass.
        precision: of the forward pass: "float32", "bfloat16" or "float16"; the features are float32 whatever it is.
        shared_space: whether features of images and of texts can be compared with each other.
        knows_images: False for a teacher of texts alone.
    """

    name: str
    dim: int
    device: torch.device
    batch_size: int
    precision: str
    shared_space: bool = True
    knows_images: bool = True

    @property
    @abstractmethod
    def preprocess(self) -> Preprocess:
        """Makes (3, H, W) pixels of an image in any mode; without the model, so that worker processes get it.

        Raises:
            ValueError: if the teacher knows no images.
        """

    @abstractmethod
    def encode_pixels(self, pixels: Pixels) -> torch.Tensor:
        """Features of one batch of images.

        Args:
            pixels: B preprocessed images of :func:`stack_pixels`, on any device.

        Returns:
            (B, T) float32 features, on the device of the teacher.

        Raises:
            ValueError: if the teacher knows no images.
        """

    @abstractmethod
    def encode_texts(self, texts: Sequence[str], show_progress_bar: bool | None = True) -> npt.NDArray[np.float32]:
        """Features of texts.

        Args:
            texts: N texts; the model's tokenizer cuts them at its context length.
            show_progress_bar: show a progress bar if there are more than a few batches; None in a terminal only.

        Returns:
            (N, T) features, in the order of the texts.

        Raises:
            ValueError: if ``texts`` is a single string.
        """

    def encode_images(
        self, images: Sequence[TeacherImage], show_progress_bar: bool | None = True, workers: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Features of images.

        Args:
            images: N PIL images, files, slices of files, or encoded bytes; read batch by batch.
            show_progress_bar: show a progress bar if there are more than a few batches; None in a terminal only.
            workers: threads that decode; by default a few more than there are CPU cores.

        Returns:
            (N, T) features, in the order of the images.

        Raises:
            ValueError: if an image cannot be read, naming it; if the teacher knows no images.
        """
        features = np.empty((len(images), self.dim), dtype=np.float32)
        for rows, found, errors in self.encode_readable(images, show_progress_bar, workers):
            for error in errors.values():
                raise error
            features[rows] = found
        return features

    def encode_readable(
        self, images: Sequence[TeacherImage], show_progress_bar: bool | None = True, workers: int | None = None
    ) -> Iterator[tuple[list[int], npt.NDArray[np.float32], dict[int, ImageError]]]:
        """Features of images batch by batch, and the errors of those that cannot be read.

        Args:
            images: N images, as for :meth:`encode_images`.
            show_progress_bar: show a progress bar if there are more than a few batches; None in a terminal only.
            workers: threads that decode; by default a few more than there are CPU cores.

        Yields:
            For each batch the positions of the readable images, their (B, T) features, and the errors by position.
        """
        preprocess = self.preprocess
        with ThreadPoolExecutor(workers) as pool:  # decoding releases the interpreter lock
            for batch in batches(len(images), self.batch_size, "Images", show_progress_bar):
                loaded = list(pool.map(lambda image: try_load(image, preprocess), images[batch]))
                positions = range(len(images))[batch]
                errors = {
                    row: each for row, each in zip(positions, loaded, strict=True) if isinstance(each, ImageError)
                }
                rows = [row for row in positions if row not in errors]
                pixels = [each for each in loaded if isinstance(each, torch.Tensor)]
                features = np.empty((0, self.dim), dtype=np.float32)
                if pixels:
                    features = self.encode_pixels(stack_pixels(pixels)).cpu().numpy()
                yield rows, features, errors


class ModelTeacher(Teacher):
    """A teacher that is one PyTorch model.

    A subclass sets ``name`` and ``dim`` and takes its model through :meth:`_freeze`.

    Args:
        device: torch device; by default CUDA where there is a CUDA device, else the CPU.
        batch_size: images or texts in one forward pass.
        precision: of the forward pass. "auto" is bfloat16 where the device is faster at it, else float32 on a CPU and
            float16 on a GPU. In bfloat16 the weights are converted too; in float16, whose range is small, only the
            matrix products are computed in it.

    Raises:
        ValueError: if the batch size is below 1, or the device does not have the precision.
    """

    def __init__(
        self, device: str | torch.device | None = None, batch_size: int = 64, precision: TeacherPrecision = "auto"
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.batch_size = batch_size
        self.precision = _on_device(precision, self.device)

    def encode_pixels(self, pixels: Pixels) -> torch.Tensor:
        """See :meth:`Teacher.encode_pixels`."""
        assert isinstance(pixels, torch.Tensor)  # its preprocessing makes all images of one size
        return self._forward(self._image_features, pixels.to(self.device, self._weights_dtype, non_blocking=True))

    def encode_texts(self, texts: Sequence[str], show_progress_bar: bool | None = True) -> npt.NDArray[np.float32]:
        """See :meth:`Teacher.encode_texts`."""
        if isinstance(texts, str):
            raise ValueError(f"texts is one string, expected a list of strings: [{texts[:60]!r}]")
        # Texts of similar length need little padding; the longest come first, so that memory runs out early or never.
        order = np.argsort([-len(text) for text in texts], kind="stable")
        features = np.empty((len(texts), self.dim), dtype=np.float32)
        for rows in batches(len(texts), self.batch_size, "Texts", show_progress_bar):
            batch = [texts[row] for row in order[rows]]
            features[order[rows]] = self._forward(self._text_features, batch).cpu().numpy()
        return features

    @abstractmethod
    def _image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, T) features of (B, 3, H, W) pixels on the device."""

    @abstractmethod
    def _text_features(self, texts: list[str]) -> torch.Tensor:
        """(B, T) features of B texts."""

    def _freeze(self, model: nn.Module) -> Any:
        # Weights are converted once: autocast would convert them at each batch, and keep attention from its fast
        # kernels. They may require gradients, which inference mode does not compute: for weights that do not, PyTorch
        # multiplies the transposed batches of open_clip in a way that is several times as slow.
        return model.eval().to(self.device, self._weights_dtype)

    def _forward(self, encode: Callable[..., torch.Tensor], batch: object) -> torch.Tensor:
        with torch.inference_mode(), autocast("float16" if self.precision == "float16" else "float32", self.device):
            return encode(batch).float()

    @property
    def _weights_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


def load_pixels(image: TeacherImage, preprocess: Preprocess) -> torch.Tensor:
    """Decode and preprocess one image.

    Args:
        image: a PIL image, a file, a slice of a file, or encoded bytes.
        preprocess: of the teacher.

    Returns:
        (3, H, W) pixels.

    Raises:
        ImageError: if the image cannot be read; a ValueError that names it.
    """
    from PIL import Image

    name = image if isinstance(image, str | Path | FileSlice) else getattr(image, "filename", "") or "the image"
    loaded = image if isinstance(image, Image.Image) else load_image(image)
    if max(loaded.size) > _LONGEST * min(loaded.size):
        # Scaled so that its shorter edge fits the model, it would fill the memory.
        raise ImageError(
            "decompression bomb", f"{name} is too long and thin ({loaded.width} x {loaded.height}): cut it"
        )
    try:
        return preprocess(in_eight_bits(loaded))  # a file that the caller opened is read here
    except MemoryError:
        raise
    except Exception as error:  # what decoders raise for broken files is not documented, and is almost anything
        raise ImageError("undecodable image", f"{name} cannot be decoded ({error}): replace it") from error


def try_load(image: TeacherImage, preprocess: Preprocess) -> torch.Tensor | ImageError:
    """(3, H, W) pixels as from :func:`load_pixels`, or the error."""
    try:
        return load_pixels(image, preprocess)
    except ImageError as error:
        return error


def stack_pixels(pixels: Sequence[torch.Tensor]) -> Pixels:
    """Preprocessed images as a batch.

    Args:
        pixels: B images, (3, H, W) each, at least one.
    """
    if all(each.shape == pixels[0].shape for each in pixels):
        return torch.stack(list(pixels))
    return [each.numpy() for each in pixels]  # as tensors, each would take a file of the worker's shared memory


def batches(count: int, batch_size: int, description: str, show_progress_bar: bool | None) -> tqdm[slice]:
    """Slices that cut ``count`` items into batches, with a progress bar if they are more than a few."""
    slices = [slice(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
    show = show_progress_bar if len(slices) > _MANY_BATCHES else False
    return progress_bar(len(slices), description, "batch", show, iterable=slices)


def weights_hash(model: nn.Module) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of a model's parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def check_tokenizer(tokenize: Callable[[list[str]], Any], name: str) -> None:
    """Refuse a tokenizer that takes all words for the same: transformers makes one where the files are missing.

    Args:
        tokenize: makes token numbers of a list of texts.
        name: the model, for the message.

    Raises:
        ValueError: if the tokenizer knows no words.
    """
    tokens = [np.asarray(tokenize([word])).tolist() for word in _THREE_LETTERS]
    if all(numbers == tokens[0] for numbers in tokens):
        raise ValueError(
            f"the tokenizer of {name} knows no words: add its files, such as tokenizer.json, to the folder"
        )


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Name the model, and the remedy, where a library cannot load it.

    Raises:
        FileNotFoundError: if a file is missing or the hub out of reach.
        ValueError: if the weights are broken or belong to another model.
    """
    try:
        yield
    except OSError as error:
        raise FileNotFoundError(
            f"{name} cannot be loaded: {_short(error)}. Give a folder or file that is on this machine, or a name on "
            "the hub, which needs a network the first time"
        ) from error
    except _BROKEN_WEIGHTS as error:
        raise ValueError(
            f"{name} cannot be loaded: {_short(error) or type(error).__name__}. Check that its files are whole and "
            "belong together"
        ) from error


def _short(error: Exception) -> str:
    return textwrap.shorten(str(error), 400).rstrip(".")


def _on_device(precision: TeacherPrecision, device: torch.device) -> Literal["float32", "bfloat16", "float16"]:
    """The precision that "auto" stands for; others as they are, if the device has them."""
    if precision not in get_args(TeacherPrecision):
        raise ValueError(f"precision is {precision!r}, expected one of {', '.join(get_args(TeacherPrecision))}")
    if device.type == "cpu" and precision == "float16":
        raise ValueError(
            "float16 is slower than float32 on a CPU: set `precision` to auto, or take a GPU as the device"
        )
    if precision == "bfloat16" and not bfloat16_is_faster(device.type):
        raise ValueError(f"{no_bfloat16(device.type)}: set `precision` to auto")
    if precision != "auto":
        return precision
    if bfloat16_is_faster(device.type):
        return "bfloat16"
    return "float32" if device.type == "cpu" else "float16"
