"""Parquet and Arrow files, including those of Hugging Face: columns of images, numbers, fixed-length lists and texts.

Needs pyarrow: ``pip install 'h5feed-server[parquet]'``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, FeedError, Unreadable

from ..catalog.split_names import SPLITS, without_split
from .array_source import ArraySource, NamedArray, named_array
from .image_source import ImageSource, split_codes
from .members import MAX_MEMBER_BYTES, BrokenMember, Listing, Member
from .options import BuildOptions
from .source import Column, label_column, text_column

PARQUET_SUFFIXES = (".parquet", ".arrow", ".feather")

_BATCH_ROWS = 64
_LABEL_NAMES = ("label", "labels", "class", "target", "fine_label", "y", "category")
_IMAGE_NAMES = ("image", "images", "img", "jpg", "png", "photo")


class _Tables:
    """Files with the same schema, read in batches."""

    def __init__(self, paths: Sequence[Path]) -> None:
        try:
            import pyarrow as arrow
            import pyarrow.dataset as datasets
        except ModuleNotFoundError:
            raise FeedError("Parquet and Arrow files need pyarrow: pip install 'h5feed-server[parquet]'") from None
        self._arrow = arrow
        self.paths = list(paths)
        try:
            self._datasets = [
                datasets.dataset(path, format="parquet" if path.suffix == ".parquet" else "ipc") for path in paths
            ]
            self.schema = self._datasets[0].schema
            self.counts = [dataset.count_rows() for dataset in self._datasets]
        except (arrow.ArrowException, OSError) as error:
            raise Unreadable(f"{paths[0].name} cannot be read as {paths[0].suffix[1:]}: {error}") from None
        for path, dataset in zip(paths, self._datasets, strict=True):
            if not dataset.schema.equals(self.schema):
                raise Unreadable(f"{path.name} does not have the same columns as {paths[0].name}")

    def batches(self, names: Sequence[str], number: int | None = None) -> Iterator[Any]:
        """Record batches of these columns, of one file or all files."""
        chosen = self._datasets if number is None else [self._datasets[number]]
        try:
            for dataset in chosen:
                # No more than one batch is read ahead: images are large.
                yield from dataset.to_batches(
                    columns=list(names), batch_size=_BATCH_ROWS, batch_readahead=1, fragment_readahead=1
                )
        except (self._arrow.ArrowException, OSError) as error:
            raise Unreadable(f"{self.paths[0].name} cannot be read: {error}") from None

    def column(self, name: str) -> list[Any]:
        """All values of a small column."""
        return [value for batch in self.batches([name]) for value in batch.column(0).to_pylist()]

    def missing(self, name: str) -> int:
        """Number of rows, or list items, without a value."""
        count = 0
        for batch in self.batches([name]):
            flat = batch.column(0)
            while hasattr(flat, "flatten") and not hasattr(flat, "field"):
                count += flat.null_count
                flat = flat.flatten()
            count += flat.null_count
        return count

    def class_names(self, name: str) -> list[str] | None:
        """Class names that Hugging Face datasets store in the schema."""
        about = (self.schema.metadata or {}).get(b"huggingface", b"")
        try:
            feature = json.loads(about)["info"]["features"][name]
            return list(feature["names"]) if "names" in feature else None
        except (TypeError, ValueError, KeyError, RecursionError):
            return None

    @property
    def stamp(self) -> str:
        return " ".join(f"{p.name} {p.stat().st_size} {p.stat().st_mtime_ns}" for p in self.paths)


def parquet_rows(path: Path, options: BuildOptions) -> ImageSource | ArraySource:
    """Rows of a Parquet or Arrow file or a folder of them; file names determine the splits.

    Raises
    ------
    Unreadable, BadParameter, FeedError
    """
    paths = [path]
    if path.is_dir():
        found_files = [item for item in path.rglob("*") if item.suffix in PARQUET_SUFFIXES]
        order = {split: number for number, split in enumerate(("", *SPLITS))}
        paths = sorted(found_files, key=lambda item: (order[without_split(item.stem)[1] or ""], str(item)))
    tables = _Tables(paths)
    names = tables.schema.names
    image = _image_column(tables, options.image_column)
    label = options.label_column or next((name for name in _LABEL_NAMES if name in names), None)
    for wanted, option in ((options.image_column, "image_column"), (options.label_column, "label_column")):
        if wanted is not None and wanted not in names:
            raise Unreadable(f"{option}={wanted!r} is not a column of {path.name}: choose from {', '.join(names)}")
    words = [without_split(item.stem)[1] for item in tables.paths]
    splits = None
    if all(words) and "train" in words:
        splits = split_codes([word or "" for word, n in zip(words, tables.counts, strict=True) for _ in range(n)])
    if image is not None:
        return _images(tables, image, label, splits, options)
    return _arrays(tables, label, words if splits is not None else [""] * len(words), options)


def _image_column(tables: _Tables, wanted: str | None) -> str | None:
    """The column with images: structs with `bytes`, as Hugging Face writes them, or bytes."""
    import pyarrow as arrow

    kinds = {}
    for field in tables.schema:
        if arrow.types.is_struct(field.type) and "bytes" in [child.name for child in field.type]:
            kinds[field.name] = "struct"
        elif arrow.types.is_binary(field.type) or arrow.types.is_large_binary(field.type):
            kinds[field.name] = "bytes"
    if wanted is not None:
        return wanted if wanted in kinds else None
    named = [name for name in _IMAGE_NAMES if name in kinds]
    return next(iter([*named, *kinds]), None)


class _ImageColumn:
    """Images of a column, in file order."""

    def __init__(self, tables: _Tables, name: str, rows: int) -> None:
        self._tables, self._name = tables, name
        total = sum(path.stat().st_size for path in tables.paths)
        self.listing = Listing([Member(f"row {row}", total // max(1, rows), tables.stamp) for row in range(rows)])

    @property
    def anywhere(self) -> bool:
        return False

    def begin(self, indices: Sequence[int]) -> None:
        """They are read in order."""

    def read(self, index: int) -> bytes:
        raise NotImplementedError

    def stream(self, wanted: Sequence[int]) -> Iterator[tuple[int, bytes | BrokenMember]]:
        left, last = set(wanted), max(wanted, default=-1)
        row = 0
        for batch in self._tables.batches([self._name]):
            for value in batch.column(0):
                if row in left:
                    content = value.as_py()
                    data = content.get("bytes") if isinstance(content, dict) else content
                    yield row, _checked(data)
                row += 1
            if row > last:
                return

    def close(self) -> None:
        """Nothing to close."""


def _checked(data: bytes | None) -> bytes | BrokenMember:
    if data is None:
        return BrokenMember("it has a path, but no bytes: images must be stored in the file")
    if len(data) > MAX_MEMBER_BYTES:
        return BrokenMember(f"it has {len(data)} bytes, more than the limit of {MAX_MEMBER_BYTES}")
    return data


def _images(
    tables: _Tables, image: str, label: str | None, splits: npt.NDArray[np.uint8] | None, options: BuildOptions
) -> ImageSource:
    if options.store == "encoded":
        raise BadParameter(
            "store=encoded needs images whose sizes are known before they are read: unpack the images into a folder"
        )
    rows = sum(tables.counts)
    columns: dict[str, Column] = {}
    if label is not None and label != image:
        values = tables.column(label)
        missing = next((row for row, value in enumerate(values) if value is None), None)
        if missing is not None:
            raise Unreadable(f"row {missing} has no {label!r}: choose another column with label_column")
        columns["labels"] = label_column(values)
        names = tables.class_names(label)
        if names is not None:
            columns["labels"] = Column(columns["labels"].values, {"class_names": names})
    members = _ImageColumn(tables, image, rows)
    for name in tables.schema.names:
        if name not in (image, label):
            column = _small_column(tables, name)
            if isinstance(column, str):
                members.listing.left_out[f"column {name}"] = column
            else:
                columns[name if name not in ("images", "labels", "filenames") else f"{name}_"] = column
    notes: list[str] = []
    if not label:
        notes.append("no column has the name of a label, so no labels are written: choose one with label_column")
    texts = [f"{number}" for number in range(rows)]
    return ImageSource(members, range(rows), texts, columns, "labels" if columns else None, splits, options, notes)


def _small_column(tables: _Tables, name: str) -> Column | str:
    """A column beside the images, in memory; or the reason it is left out."""
    import pyarrow as arrow

    kind = _plain(tables.schema.field(name).type)
    if _is_text(kind):
        return text_column([value or "" for value in tables.column(name)])
    if not (arrow.types.is_boolean(kind) or arrow.types.is_integer(kind) or arrow.types.is_floating(kind)):
        return f"it holds {kind}, not numbers of one shape"
    values = tables.column(name)
    if any(value is None for value in values):
        return Column(np.array([np.nan if value is None else value for value in values], np.float64))
    return Column(np.array(values, np.dtype(kind.to_pandas_dtype())))


def _plain(kind: Any) -> Any:
    """The type of a column without dictionary encoding."""
    import pyarrow as arrow

    return kind.value_type if arrow.types.is_dictionary(kind) else kind


def _is_text(kind: Any) -> bool:
    import pyarrow as arrow

    return bool(arrow.types.is_string(kind) or arrow.types.is_large_string(kind))


class _Columns:
    """Opens columns of numbers or texts as arrays."""

    def __init__(self, tables: _Tables, kinds: dict[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
        self._tables, self._kinds = tables, kinds

    def open(self, name: str) -> _ColumnArray:
        number, _, column = name.partition("/")
        sample, dtype = self._kinds[column]
        numbers = [int(item) for item in number.split(",")]
        rows = sum(self._tables.counts[item] for item in numbers)
        return _ColumnArray(self._tables, numbers, column, (rows, *sample), dtype)

    def close(self) -> None:
        """Nothing to close."""


class _ColumnArray:
    """A column of some of the files."""

    step = 1

    def __init__(
        self, tables: _Tables, numbers: Sequence[int], name: str, shape: tuple[int, ...], dtype: np.dtype[Any]
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.attributes: Mapping[str, Any] = {}
        self._batches = (batch.column(0) for number in numbers for batch in tables.batches([name], number))
        self._rest = np.zeros((0, *shape[1:]), dtype)
        self._at, self._name = 0, name

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        parts = [self._rest]
        end = self._at + len(self._rest)
        while end < stop:
            column = next(self._batches)
            part = self._values(column)
            end += len(part)
            if end <= start:
                parts = [part[:0]]
                continue
            parts.append(part)
        together = np.concatenate(parts)
        first = end - len(together)
        self._rest, self._at = together[stop - first :], stop
        return together[start - first : stop - first]

    def close(self) -> None:
        self._batches.close()

    def _values(self, column: Any) -> npt.NDArray[Any]:
        if self.dtype.kind == "S":
            return np.array([(value or "").encode() for value in column.to_pylist()], self.dtype)
        flat = column.dictionary_decode() if hasattr(column, "dictionary_decode") else column
        for _ in self.shape[1:]:
            if flat.null_count:
                raise Unreadable(f"column {self._name!r} has rows without a list: fill them")
            flat = flat.flatten()
        if flat.null_count:
            flat = flat.cast("float64")
        return np.asarray(flat.to_numpy(zero_copy_only=False), self.dtype).reshape(len(column), *self.shape[1:])


def _arrays(tables: _Tables, label: str | None, words: Sequence[str | None], options: BuildOptions) -> ArraySource:
    import pyarrow as arrow

    kinds: dict[str, tuple[tuple[int, ...], np.dtype[Any]]] = {}
    left_out = {}
    notes: list[str] = []
    for field in tables.schema:
        sample: tuple[int, ...] = ()
        kind = _plain(field.type)
        while arrow.types.is_fixed_size_list(kind):
            sample, kind = (*sample, kind.list_size), kind.value_type
        if not sample and (arrow.types.is_list(kind) or arrow.types.is_large_list(kind)):
            lengths = {None if value is None else len(value) for value in tables.column(field.name)}
            length = lengths.pop() if len(lengths) == 1 else None
            if length is not None:
                sample, kind = (length,), kind.value_type
        if _is_text(kind) and not sample:
            longest = max((len(value.encode()) for value in tables.column(field.name) if value), default=1)
            kinds[field.name] = ((), np.dtype(f"S{longest}"))
        elif arrow.types.is_boolean(kind) or arrow.types.is_integer(kind) or arrow.types.is_floating(kind):
            dtype = np.dtype(kind.to_pandas_dtype())
            missing = tables.missing(field.name)
            if missing:
                # As pandas has it.
                dtype = dtype if dtype.kind == "f" else np.dtype("float64")
                notes.append(f"column {field.name!r} has {missing:,} rows without a value: they are written as NaN")
            kinds[field.name] = (sample, dtype)
        else:
            left_out[f"column {field.name}"] = f"it holds {field.type}, not numbers of one shape"
    arrays: list[NamedArray] = []
    for split in dict.fromkeys(words):
        numbers = [number for number, word in enumerate(words) if word == split]
        rows = sum(tables.counts[number] for number in numbers)
        for name, (sample, dtype) in kinds.items():
            path = f"{','.join(map(str, numbers))}/{name}"
            names = tables.class_names(name)
            one = named_array(name, (rows, *sample), dtype, {"class_names": names} if names else {})
            arrays.append(NamedArray(name, one.shape, dtype, split or "", path, one.attributes))
    opener = _Columns(tables, kinds)
    source = ArraySource(arrays, opener, options, tables.stamp)
    source.left_out.update(left_out)
    source.notes += notes
    if label is not None and source.label is None and label in kinds and kinds[label][1].kind == "S":
        source.notes.append(f"{label!r} holds text, and is written as text")
    return source
