"""A source of image files from a folder, an archive, or a table."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.decode import FORMATS, MAX_PIXELS, MAX_SERVED_PIXELS, SERVED_FORMATS, resizer
from h5feed.errors import BadParameter, Unreadable

from ..catalog.split_names import SPLITS
from ..catalog.split_record import SplitRecord
from ..storage.images.decoding import Decoding, ImageDecoders
from .image_spec import SUFFIXES, UNREAD_SUFFIXES, BrokenImage, image_spec
from .members import BrokenMember, Members
from .moments import moments
from .naming import read_names
from .options import BuildOptions
from .source import ROW, Block, Column, FieldSpec, Work, digest_of, label_column, text_column

_UNIT_BYTES = 8 << 20
"""Bytes of decoded images that one piece of work makes, or little more."""

_UNIT_IMAGES = 16

_PROBED = 50
"""Images of which the first that is whole gives the shape, where none is asked for."""


class ImageSource:
    """Images with their labels and splits.

    Parameters
    ----------
    members : Members
    chosen : sequence of int
        Which of the members are the images, ascending.
    names : sequence of str
        Of each row, as it is written into the file.
    """

    images = True
    split_record: SplitRecord | None = None
    may_break = True

    def __init__(
        self,
        members: Members,
        chosen: Sequence[int],
        names: Sequence[str],
        columns: dict[str, Column],
        label: str | None,
        splits: npt.NDArray[np.uint8] | None,
        options: BuildOptions,
        notes: list[str],
    ) -> None:
        self._members, self._chosen, self._names = members, chosen, names
        self.spec = image_spec(options)
        self.rows = len(chosen)
        if not self.rows:
            raise Unreadable("there are no images with the extensions " + ", ".join(SUFFIXES[:-1]))
        encoded = options.store == "encoded"
        formats, pixels = (SERVED_FORMATS, MAX_SERVED_PIXELS) if encoded else (FORMATS, MAX_PIXELS)
        self._wanted = Decoding(self.spec, formats, pixels, options.image_seconds, options.exact or encoded)
        self._decoders = ImageDecoders(self._wanted.max_bytes)
        try:
            size = self.spec.size or self._probe()
        except BaseException:
            self._decoders.close()
            raise
        dtype = np.dtype(self.spec.dtype)
        shape = (*size, self.spec.channels)
        known = members.listing.members
        attributes: dict[str, Any] = {"channels": self.spec.colour}
        self._lengths: npt.NDArray[np.int64] | None = None
        if not encoded and self.spec.size is not None and self.spec.interpolation == "bilinear":
            attributes["resizer"] = resizer(options.exact)
        if encoded:
            self._lengths = np.array([known[index].size for index in chosen], np.int64)
            attributes |= {
                "encoding": _encoding([known[index].name for index in chosen]),
                "shape": shape,
                "resize": self.spec.resize,
                "interpolation": self.spec.interpolation,
            }
        self.fields: tuple[FieldSpec, ...] = (FieldSpec("images", shape, dtype, attributes, self._lengths),)
        self.columns = {**columns, "filenames": text_column(list(names))}
        self.label, self.splits, self.notes = label, splits, notes
        self.left_out = dict(members.listing.left_out)
        self._shape = shape
        stamps = [(known[index].name, known[index].stamp) for index in chosen]
        values = [column.values.tobytes().hex() for column in columns.values()]
        # A build that is resumed after another resizer was installed starts again.
        self.digest = digest_of([*stamps, *values, resizer(self._wanted.exact)])

    def name(self, row: int) -> str:
        return self._names[row]

    def work(self, done: npt.NDArray[np.bool_]) -> Iterator[Work]:
        nbytes = max(1, self.fields[0].row_bytes)
        unit = max(1, min(_UNIT_IMAGES, _UNIT_BYTES // nbytes))
        wanted = np.flatnonzero(~done)
        if self._members.anywhere:
            for start in range(0, len(wanted), unit):
                yield self._reading(wanted[start : start + unit])
            return
        row_of = {self._chosen[row]: row for row in wanted.tolist()}
        rows: list[int] = []
        contents: list[bytes | BrokenMember] = []
        for index, content in self._members.stream(list(row_of)):
            rows.append(row_of[index])
            contents.append(content)
            if len(rows) == unit:
                yield self._decoding(np.array(rows), contents)
                rows, contents = [], []
        if rows:
            yield self._decoding(np.array(rows), contents)

    def close(self) -> None:
        self._decoders.close()
        self._members.close()

    def _probe(self) -> tuple[int, int]:
        """Height and width of the first readable image."""
        for _, content in self._members.stream(self._chosen[:_PROBED]):
            try:
                decoded = self._decoders.decode(_whole(content), self._wanted)
            except (BrokenImage, BrokenMember):
                continue
            return decoded.height, decoded.width
        raise Unreadable(f"none of the first {min(_PROBED, self.rows)} images can be read")

    def _reading(self, rows: npt.NDArray[np.int64]) -> Work:
        def read(row: int) -> bytes | BrokenMember:
            try:
                return self._members.read(self._chosen[row])
            except BrokenMember as error:
                return error

        self._members.begin([self._chosen[row] for row in rows.tolist()])
        return lambda: self._decode(rows, (read(row) for row in rows.tolist()))

    def _decoding(self, rows: npt.NDArray[np.int64], contents: list[bytes | BrokenMember]) -> Work:
        return lambda: self._decode(rows, iter(contents))

    def _decode(self, rows: npt.NDArray[np.int64], contents: Iterator[bytes | BrokenMember]) -> Block:
        # pixels: (n, height, width, channels)
        pixels = np.empty((len(rows), *self._shape), self.fields[0].dtype)
        details = np.zeros(len(rows), ROW)
        files = [b""] * len(rows)
        block = Block(rows, {"images": pixels if self._lengths is None else files}, details)
        for index, (row, content) in enumerate(zip(rows.tolist(), contents, strict=True)):
            try:
                data = _whole(content)
                if self._lengths is not None and len(data) != self._lengths[row]:
                    raise BrokenMember(f"it has {len(data)} bytes, but had {self._lengths[row]} when it was listed")
                decoded = self._decoders.decode(data, self._wanted)
                if self._lengths is not None:
                    files[index] = data
            except (BrokenImage, BrokenMember) as error:
                details[index]["broken"] = 1
                block.broken[row] = str(error)
                pixels[index] = 0
                continue
            if decoded.pixels.shape != self._shape:
                raise BadParameter(
                    f"{self.name(row)} has {decoded.height}×{decoded.width} pixels, but the first image has "
                    f"{self._shape[0]}×{self._shape[1]}: rows need one shape, so pass a size and resize=aspect, "
                    "stretch or pad"
                )
            pixels[index] = decoded.pixels
            details[index]["height"], details[index]["width"] = decoded.height, decoded.width
            details[index]["digest"] = np.void(hashlib.blake2b(data, digest_size=16).digest())
        details["sums"], details["squares"], details["missing"] = moments(pixels)
        return block


def _encoding(names: Sequence[str]) -> str:
    """Encoding of the files, in one word."""
    suffixes = {name.lower().rpartition(".")[2] for name in names}
    return "jpeg" if suffixes <= {"jpg", "jpeg", "jpe", "jfif"} else "png" if suffixes == {"png"} else "mixed"


def _whole(content: bytes | BrokenMember) -> bytes:
    if isinstance(content, BrokenMember):
        raise content
    return content


def listed_images(members: Members, options: BuildOptions) -> ImageSource:
    """The images in a folder, zip or tar; classes and splits come from folder and file names.

    Raises
    ------
    Unreadable, BadParameter
    """
    known = members.listing.members
    chosen = [index for index, member in enumerate(known) if member.name.lower().endswith(SUFFIXES)]
    other = [member.name for member in known if not member.name.lower().endswith(SUFFIXES)]
    unread = [name for name in other if name.lower().endswith(UNREAD_SUFFIXES)]
    members.listing.left_out |= dict.fromkeys(unread, "its format is not supported: convert it to JPEG or PNG")
    other = sorted(set(other) - set(unread))
    tables = [name for name in other if name.lower().endswith((".csv", ".tsv"))]
    if not chosen:
        hint = f"; to build another source, pass one of these files: {', '.join(other[:5])}" if other else ""
        raise Unreadable(f"there are no images with the extensions {', '.join(SUFFIXES)}{hint}")
    names = [known[index].name for index in chosen]
    said = read_names(names, members.listing.folders, options.label_pattern)
    notes = list(said.notes)
    if other:
        counted = "1 file is not an image and is" if len(other) == 1 else f"{len(other):,} files are not images and are"
        notes.append(f"{counted} ignored: {', '.join(other[:5])}{' …' if len(other) > 5 else ''}")
    if said.labels is None and tables:
        notes.append(f"labels may be in {tables[0]}: to use them, pass that file as the source")
    columns: dict[str, Column] = {}
    if said.labels is not None:
        columns["labels"] = label_column(said.labels, said.classes)
    splits = split_codes(said.splits)
    label = "labels" if columns else None
    return ImageSource(members, chosen, names, columns, label, splits, options, notes)


def split_codes(splits: list[str] | None) -> npt.NDArray[np.uint8] | None:
    """Split names as indices into `SPLITS`."""
    return None if splits is None else np.array([SPLITS.index(name) for name in splits], np.uint8)
