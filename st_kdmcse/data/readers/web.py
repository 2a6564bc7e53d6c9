"""Shards in the webdataset layout, such as CC12M downloaded by img2dataset, in tar files or folders."""

from __future__ import annotations

import itertools
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from st_kdmcse.data.images import FileSlice, regular_bytes
from st_kdmcse.data.json_files import parse_json
from st_kdmcse.data.readers.base import CaptionedImage, ImageCaptionReader
from st_kdmcse.data.readers.columns import captions_in, named_columns
from st_kdmcse.data.readers.parsing import IMAGE_SUFFIXES

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_BLOCK = 512
_CAPTION_BYTES = 1 << 24
_FILES_LOOKED_AT = 1000

_Members = dict[str, Path | FileSlice]


class WebDataset(ImageCaptionReader):
    """Uncompressed ``.tar`` shards of images and captions, or folders of the same files, read in their order.

    The files of a sample follow one another and have the same path up to the first point of their name, its key:
    ``000000017.jpg``, ``000000017.txt``, ``000000017.json``. The image id is the name of the shard, a slash and the
    key, ``00003/000000017``; where shards in several folders have the same name, the folders are part of it. An image
    is a file, or a slice of the tar: its bytes are read when it is decoded.

    Args:
        shards: a tar; several; a folder of them; or a pattern such as ``cc12m/{00000..00331}.tar`` or
            ``cc12m/*.tar``. Or a folder that img2dataset wrote with ``output_format="files"``: its folders are shards.
        caption_key: "auto" takes the ``.txt``, or "caption" of the ``.json`` where there is no ``.txt``; any
            other name is a key of the ``.json``, or several with commas between them. A value is a text, or a list.
        options: those of :class:`~st_kdmcse.data.readers.base.ImageCaptionReader`.

    Raises:
        FileNotFoundError: if a shard is missing, or the folder holds no shard.
        ValueError: if a shard is given twice, or an option is out of range.
    """

    streaming = True

    def __init__(self, shards: str | Path | Sequence[str | Path], caption_key: str = "auto", **options: Any) -> None:
        super().__init__(**options)
        self._shards = _named(_find_shards(shards))
        self._caption_key = caption_key
        self.name = str(shards) if isinstance(shards, (str, Path)) else f"{shards[0]} and {len(shards) - 1} more"

    def _records(self) -> Iterator[CaptionedImage]:
        for name, path in self._shards:
            if path.is_dir():
                for key, files in _files_by_key(path):
                    record = self._record(path, None, f"{name}/{key}", files)
                    if record is not None:
                        yield record
                continue
            with path.open("rb") as file:
                for key, members in self._samples(path, file):
                    record = self._record(path, file, f"{name}/{key}", members)
                    if record is not None:
                        yield record

    def _samples(self, path: Path, file: BinaryIO) -> Iterator[tuple[str, _Members]]:
        """Key and files, by suffix, of each sample; of a tar that is cut off, the whole ones."""
        key = ""
        members: _Members = {}
        try:
            for member in _members(file):
                stem, suffix = _split_name(member.name)
                if not stem:
                    continue
                if stem != key or suffix in members:
                    if members:
                        yield key, members
                    key, members = stem, {}
                members[suffix] = FileSlice(path, member.offset_data, member.size, member.name)
        except (tarfile.TarError, ValueError) as error:
            if _image_suffixes(members) and {".txt", ".json"} & set(members):
                yield key, members
            after = f"after {key!r}" if key else "at its beginning"
            message = f"not a whole, uncompressed tar: {error} {after}; decompress it or download it again"
            self.problems.add("broken shard", str(path), message)
        else:
            if members:
                yield key, members

    def _record(self, path: Path, file: BinaryIO | None, image_id: str, members: _Members) -> CaptionedImage | None:
        where = f"{path}, sample {image_id!r}"
        suffixes = _image_suffixes(members)
        if len(suffixes) != 1:
            kind, what = ("several images", "several images") if suffixes else ("no image file", "no image")
            self.problems.add(kind, where, _sample_problem(what, members))
            return None
        captions = self._captions(file, members, where)
        if not captions:
            return None
        return CaptionedImage(image_id, members[suffixes[0]], captions, where)

    def _captions(self, file: BinaryIO | None, members: _Members, where: str) -> tuple[str, ...]:
        """The captions with text; a sample without any is a problem."""
        suffix = ".txt" if self._caption_key == "auto" and ".txt" in members else ".json"
        if suffix in members:
            try:
                content = _content(file, members[suffix])
            except ValueError as error:
                self.problems.add("no caption", where, f"the {suffix} {error}: correct it, or leave the sample out")
                return ()
            found = self._text(content, where) if suffix == ".txt" else self._values(content, where)
        else:
            wanted = ".txt or .json" if self._caption_key == "auto" else ".json"
            self.problems.add("no caption", where, _sample_problem(f"no {wanted}", members))
            return ()
        return tuple(caption for caption in found if self._has_text(caption, where))

    def _text(self, content: bytes, where: str) -> list[str]:
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            message = f"the .txt is not UTF-8 ({error.reason} at byte {error.start}): convert it, or leave it out"
            self.problems.add("encoding", where, message)
            return []
        if "\0" in text:
            self.problems.add("encoding", where, "a NUL byte in the .txt: convert it to UTF-8, or leave it out")
            return []
        return [text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")]

    def _values(self, content: bytes, where: str) -> list[Any]:
        key = "caption" if self._caption_key == "auto" else self._caption_key
        try:
            values = parse_json(content)
        except ValueError as error:
            self.problems.add(
                "no caption", where, f"the .json is not valid JSON ({error}): correct it, or leave it out"
            )
            return []
        names = list(values) if isinstance(values, dict) else []
        found = captions_in(*(values[name] for name in named_columns(names, key)))
        if not found:
            message = f"the .json has no {key!r}; its keys: {', '.join(names) or 'none'}"
            self.problems.add("no caption", where, message)
        return found


def is_shard_pattern(shards: str | Path) -> bool:
    """Whether a name has a part such as ``{00000..00331}``, or is a pattern such as ``cc12m/*.tar``."""
    return bool(_RANGE.search(str(shards))) or _is_glob(str(shards))


def _is_glob(name: str) -> bool:
    return "*" in name and name.endswith(".tar")


def _find_shards(shards: str | Path | Sequence[str | Path]) -> list[Path]:
    given = [shards] if isinstance(shards, (str, Path)) else list(shards)
    if not given:
        raise ValueError("no shards are given: give at least one .tar")
    found: list[Path] = []
    for shard in given:
        path = Path(shard)
        if path.is_dir():
            inside = sorted(path.glob("*.tar")) or folder_shards(path)
            if not inside:
                raise FileNotFoundError(f"there is no .tar in the folder {path}, and no folder of images and captions")
            found += inside
        else:
            found += [path] if path.is_file() else _globbed(path) if _is_glob(str(shard)) else _expanded(str(shard))
    missing = [path for path in found if not path.is_file() and not path.is_dir()]
    if missing:
        raise FileNotFoundError(f"there is no shard {missing[0]}; {len(missing)} of {len(found)} shards are missing")
    return found


def folder_shards(folder: Path) -> list[Path]:
    """Folders of samples, each an image with its ``.txt`` or ``.json``: those in a folder, or the folder itself."""
    inside = [each for each in sorted(folder.iterdir()) if each.is_dir() and _has_sample(each)]
    return inside or ([folder] if _has_sample(folder) else [])


def _has_sample(folder: Path) -> bool:
    """Whether there is an image with a caption among the first files of a folder."""
    names = {entry.name for entry in itertools.islice(os.scandir(folder), _FILES_LOOKED_AT)}
    stems = {_split_name(name)[0] for name in names if _split_name(name)[1] in IMAGE_SUFFIXES}
    return any(f"{stem}{suffix}" in names for stem in stems for suffix in (".txt", ".json"))


def _files_by_key(folder: Path) -> Iterator[tuple[str, _Members]]:
    """Key and files, by suffix, of each sample in a folder."""
    names = sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
    for key, of_key in itertools.groupby(names, lambda name: _split_name(name)[0]):
        if key:
            yield key, {_split_name(name)[1]: folder / name for name in of_key}


def _globbed(pattern: Path) -> list[Path]:
    found = sorted(Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor))))
    if not found:
        raise FileNotFoundError(f"there is no file {pattern}")
    return found


def _expanded(pattern: str) -> list[Path]:
    """The paths that a pattern stands for: ``{08..11}`` is 08, 09, 10 and 11."""
    pieces = _RANGE.split(pattern)
    ranges = [
        [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
        for first, last in zip(pieces[1::3], pieces[2::3], strict=True)
    ]
    if not all(ranges):
        raise ValueError(f"{pattern} stands for no shard: write the smaller number first")
    return [
        Path("".join(itertools.chain.from_iterable(zip(pieces[::3], [*numbers, ""], strict=True))))
        for numbers in itertools.product(*ranges)
    ]


def _named(paths: list[Path]) -> list[tuple[str, Path]]:
    """Shards, each with a name that no two of them share."""
    absolute = [path.absolute() for path in paths]
    twice = [path for path in absolute if absolute.count(path) > 1] if len(set(absolute)) < len(absolute) else []
    if twice:
        raise ValueError(f"the shard {twice[0]} is given twice: give each once")
    if len({path.stem for path in paths}) == len(paths):
        return [(path.stem, path) for path in paths]
    root = os.path.commonpath([path.parent for path in absolute])
    return [
        (str(full.relative_to(root)).removesuffix(".tar"), path) for full, path in zip(absolute, paths, strict=True)
    ]


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The plain files of a tar, in its order.

    Raises:
        tarfile.TarError: after the last whole file, if the tar is cut off or damaged, or at the start if it is no tar.
    """
    size = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined]  # or they would pile up
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f"it ends within {member.name!r}")
            if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                yield member
        # A damaged header and the end of the file look like the end of the archive to tarfile.
        file.seek(tar.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise tarfile.ReadError("its end mark is missing")


def _split_name(name: str) -> tuple[str, str]:
    """Key and suffix of a file in a shard; no key if it is not part of a sample."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, point, suffix = base.partition(".")
    return (folder + slash + stem, f".{suffix.lower()}") if stem and point else ("", "")


def _image_suffixes(members: _Members) -> list[str]:
    return [suffix for suffix in members if suffix in IMAGE_SUFFIXES]


def _sample_problem(what: str, members: _Members) -> str:
    """What is wrong with the files of a sample, and the remedy."""
    return (
        f"{what} among its files ({', '.join(sorted(members))}): the files of a sample must follow one another and "
        "share their name up to its first point"
    )


def _content(file: BinaryIO | None, member: Path | FileSlice) -> bytes:
    """A small file of a sample.

    Raises:
        ValueError: if it is too large for a caption, or cannot be read.
    """
    if isinstance(member, Path):
        return regular_bytes(member, _CAPTION_BYTES)
    if member.size > _CAPTION_BYTES:
        raise ValueError(f"has {member.size:,} bytes, more than the {_CAPTION_BYTES:,} of a caption")
    return member.read(file)
