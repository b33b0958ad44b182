"""Determines the role of each column of a table: label, feature, pixels, image, split or running number.

Every guess is reported, and no column is lost: what is neither label nor feature becomes a field of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from h5feed.errors import Unreadable

from ..catalog.split_names import SPLIT_WORDS
from .image_paths import ImageFolder, Place
from .image_source import split_codes
from .options import BuildOptions
from .source import Column
from .table_columns import ID_NAMES, Read, are_numbers, as_number, first_of, gather, labels_of, values_of
from .table_file import Table, is_missing, is_number, is_path

_LABEL_NAMES = re.compile(
    r"^(labels?|class(es|_?id|_?name|_?label)?|targets?|y|category|categories|species|breed|emotion|survived|quality|"
    r"diagnosis|outcome|sentiment|digit|variety|genre)$",
    re.I,
)
_IMAGE_NAMES = re.compile(
    r"^(images?|img|photos?|pictures?)$|(^|[_ ]|image|img|file|photo|picture)(ids?|names?|paths?|files?)$", re.I
)
_SPLIT_NAMES = re.compile(r"^(split|set|subset|partition|fold|usage)$", re.I)
_SPLIT_WORDS = {**SPLIT_WORDS, "publictest": "val", "privatetest": "test"}
"""FER-2013 was a contest: its public test set is what others call validation."""

PIXEL_NAMES = re.compile(r"^(pixel[_ ]?\d+|\d+x\d+|p\d+|\d+)$", re.I)
_PIXELS = re.compile(r"^\s*\d{1,3}([ ,;]+\d{1,3}){63,}\s*$")
"""All pixels of an image in one value."""

_TAKEN = {"images", "features", "labels", "filenames", "heights", "widths", "digests"}
_MAX_TEXT_BYTES = 1 << 30


class Roles:
    """The role of each column.

    Attributes
    ----------
    label, split, image, pixels : int or None
        Columns; `pixels` holds all pixels of an image in one value.
    kept : set of int
        Columns whose texts are needed.
    features, other : list of int
        Numbers that are inputs; and what becomes a field of its own.
    """

    def __init__(self, table: Table, sample: Sequence[Sequence[str]], options: BuildOptions) -> None:
        self._table, self._options = table, options
        self.notes = list(table.notes)
        self.features: list[int] = []
        self.other: list[int] = []
        self._folder = ImageFolder(table.path, options)
        numbers = range(len(table.columns))
        columns = {number: [values[number].strip() for values in sample] for number in numbers}
        written = {number: [value for value in own if not is_missing(value)] for number, own in columns.items()}
        self.split = next(
            (n for n in table.named(_SPLIT_NAMES) if written[n] and all(v.lower() in _SPLIT_WORDS for v in written[n])),
            None,
        )
        self.pixels = next((n for n in numbers if written[n] and all(map(_PIXELS.match, written[n]))), None)
        self.label = self._find_label(sample)
        self.image = None if self.pixels is not None else self._find_image(columns)
        if self.label is not None and self.label == self.image:
            self.label = None
        if self.image is not None and self.label is None and options.label_column is None:
            rest = [n for n in numbers if n not in (self.image, self.split) and not ID_NAMES.search(table.columns[n])]
            if len(rest) == 1:
                self.label = rest[0]
                self.notes.append(f"labels are column {table.columns[rest[0]]!r}, the only one besides the images")
        self.ids = [
            n
            for n in (table.named(ID_NAMES) if table.has_header else ())
            if n not in (self.label, self.image, self.split)
        ]
        texts = [n for n in numbers if not are_numbers(written[n])]
        self.kept = {n for n in (self.label, self.split, self.image, *self.ids, *texts) if n is not None}
        self.kept -= {self.pixels} if self.pixels is not None else set()

    def problem(self, values: Sequence[str]) -> str | None:
        """Why these values are not a valid row."""
        if self.split is not None and values[self.split].strip().lower() not in _SPLIT_WORDS:
            return f"{values[self.split].strip()!r} is not a split: use train, val or test"
        if self.label is not None and is_missing(values[self.label]):
            return "it has no label"
        if self.image is not None and not values[self.image].strip():
            return "it has no image"
        return None

    def settle(self, read: Read) -> None:
        """Decide the remaining columns, after all values were seen."""
        table = self._table
        done = {self.label, self.split, self.image, self.pixels}
        texts: list[str] = []
        for number, kind in enumerate(read.kinds):
            name = table.columns[number]
            if number in done:
                continue
            beside = self.image is not None or self.pixels is not None
            if number in self.ids or beside or kind.is_long or not kind.is_number:
                self.other.append(number)
                if kind.is_long and kind.is_number and number not in self.ids and not beside:
                    self.notes.append(f"column {name!r} holds integers beyond 2⁵³: it becomes a separate field")
                if not kind.is_number and not beside and number not in self.ids:
                    texts.append(f"{name!r} ({kind.text[:20]!r}, line {kind.line})")
            else:
                self.features.append(number)
        own = [repr(table.columns[n] or "index") for n in self.ids]
        if own and self.image is None:
            self.notes.append(f"serial numbers become separate fields, not features: {', '.join(own)}")
        if texts:
            self.notes.append(f"text columns become separate fields, not features: {first_of(texts)}")
        if self.label is None and self._options.label_column is None and not self._one_hot(read):
            last = table.columns[-1]
            self.notes.append(
                "no column has the name of a label, so no labels are written: choose one with label_column, perhaps "
                f"the last column, {last!r}"
            )
        commas = [repr(table.columns[n]) for n in self.features if read.kinds[n].commas]
        if commas:
            self.notes.append(f"decimal commas are read as points: {', '.join(commas[:10])}")

    def columns(self, read: Read) -> tuple[dict[str, Column], str | None]:
        """The small fields, and the name of the label."""
        table = self._table
        missing = [n for n in self.other if n not in read.texts]
        texts = {**read.texts, **gather(table, read.lines, missing)}
        named: dict[str, Column] = {}
        label = None
        if self.label is not None:
            label = "labels"
            named[label] = labels_of(texts[self.label])
        elif self._one_hot(read):
            label = "labels"
            values = [[as_number(text, False) for text in texts[n]] for n in self.other]
            names = [table.columns[n] for n in self.other]
            self.notes.append(f"labels are the columns of 0 and 1: {', '.join(names[:10])}")
            return {label: Column(np.array(values, np.uint8).T.copy(), {"class_names": names})}, label
        for number in self.other:
            name = re.sub(r"[/\0]", "_", table.columns[number]) or "index"
            while name in _TAKEN or name in named:
                name += "_"
            column = values_of(texts[number], read.kinds[number], table.delimiter != ",")
            nbytes = column.values.dtype.itemsize * len(column.values)
            if nbytes > _MAX_TEXT_BYTES:
                read.left_out[f"column {table.columns[number]}"] = f"its texts would take {nbytes:,} bytes"
            else:
                named[name] = column
        return named, label

    def splits(self, read: Read) -> npt.NDArray[np.uint8] | None:
        """Split of each row."""
        if self.split is None:
            return None
        words = [text.lower() for text in read.texts[self.split]]
        if {"publictest", "privatetest"} & {*words}:
            self.notes.append("PublicTest is the split val, PrivateTest is test")
        return split_codes([_SPLIT_WORDS[word] for word in words])

    def place(self, values: Sequence[str]) -> Place:
        """Where the images named by a column are."""
        return self._folder.find(values)

    def _one_hot(self, read: Read) -> bool:
        """Whether images have one 0/1 column per class."""
        kinds = [read.kinds[n] for n in self.other]
        plain = all(k.ones and k.numbers and not (k.texts or k.missing or k.truths) for k in kinds)
        return self.image is not None and self.label is None and len(kinds) > 1 and plain

    def _find_label(self, sample: Sequence[Sequence[str]]) -> int | None:
        table, wanted = self._table, self._options.label_column
        if wanted is not None:
            return table.number(wanted, "label_column")
        named = [number for number in table.named(_LABEL_NAMES) if number not in (self.split, self.pixels)]
        if named:
            self.notes.append(
                f"labels are column {table.columns[named[0]]!r} because of its name; for another, pass label_column"
            )
            return named[0]
        count = len(table.columns)
        if table.has_header or count < 2:
            return None
        # As MNIST is often passed on; or at the end, as the UCI's tables have it.
        first, last = ([values[place] for values in sample] for place in (0, -1))
        side = math.isqrt(count - 1)
        is_square = side * side == count - 1 >= 64
        place = 0 if is_square and not any(map(is_path, first)) and not _are_texts(last) else count - 1
        self.notes.append(f"there is no header: labels are column {place}; for another, pass label_column")
        return place

    def _find_image(self, columns: dict[int, list[str]]) -> int | None:
        table, options = self._table, self._options
        if options.image_column is not None:
            return table.number(options.image_column, "image_column")
        named = [number for number in table.named(_IMAGE_NAMES) if number != self.split]
        others = [number for number in columns if number not in named]
        paths = [
            number for number in (*named, *others) if sum(map(is_path, columns[number])) * 2 > len(columns[number])
        ]
        if paths:
            return paths[0]
        if sum(1 for name in table.columns if PIXEL_NAMES.match(name)) * 2 > len(table.columns):
            return None
        for number in named:
            values = [value for value in columns[number] if not is_missing(value)]
            image_paths = self._folder.find(values).paths if values else []
            if image_paths and sum(path is not None for path in image_paths) * 2 > len(image_paths):
                return number
        if options.image_dir is not None:
            raise Unreadable(
                f"{table.path.name} has no column with the names of images in {options.image_dir}: pass image_column"
            )
        return None


def _are_texts(values: Sequence[str]) -> bool:
    return not all(is_number(value) or is_missing(value) for value in values)
