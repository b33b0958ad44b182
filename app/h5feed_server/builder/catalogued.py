"""HDF5 files as a source, read as the server reads them: same datasets, axes, roles, splits and class names.

The server's catalogue determines the fields and its reader reads the rows, so a build contains what would be served
from the file.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import TimeoutError as FuturesTimeout
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, FeedError, Unreadable

from ..catalog.dataset import Dataset, Field
from ..catalog.declared import read_declared
from ..catalog.grouping.stacking import FEWEST, is_sample
from ..catalog.single_file import files_of_family
from ..catalog.split_names import SPLITS
from ..services import Services
from ..settings import Settings
from ..storage.reader import Reader
from ..suffixes import ALL_SUFFIXES
from .array_source import converted
from .options import BuildOptions
from .source import Block, Column, FieldSpec, Work, digest_of
from .stored_fields import Lists, Numbers, Scattered, SparsePart, StoredField, Texts, attributes_of, whole

_BLOCK_BYTES = 4 << 20
"""Bytes that are read at a time."""

_MAX_LABEL_BYTES = 1 << 10
"""Of a row: labels are held in memory."""

_MAX_TEXT_BYTES = 4 << 30
"""Bytes of texts that are padded to the length of the longest one."""

_SECONDS = 600.0
"""That inspecting a file, and reading a block of it, may take: nobody waits for an answer here."""

_SHOWN = 20


def catalogued(path: Path, options: BuildOptions) -> CataloguedSource:
    """The rows of a dataset in an HDF5 file or a folder of HDF5 files.

    Raises
    ------
    Unreadable, BadParameter
    """
    where = path.resolve()
    root = where if where.is_dir() else where.parent
    files = [where.name] if root != where else hdf5_files(where)
    with contextlib.ExitStack() as opened:
        cache = opened.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-build-"))
        settings = Settings.model_validate(
            {
                "data_dir": root,
                "cache_dir": Path(cache),
                "digest_limit": _BLOCK_BYTES,
                "provisional_bytes": 1 << 62,
                "max_body_bytes": 1 << 32,
                "transposed_bytes": 1 << 62,
                "inspect_timeout": _SECONDS,
                "read_timeout": _SECONDS,
                "follow_links": True,
            }
        )
        services = Services.start(settings, only=files)
        opened.callback(services.close, wait=True)
        dataset, unread = _chosen(services, path, options.dataset)
        dataset = replace(dataset, fields=tuple(_transposed(services, field) for field in dataset.fields))
        if root != where:
            _check_alone(where, dataset)
        source = CataloguedSource(services.batcher.reader, dataset, options)
        if options.dataset is None:
            source.left_out |= unread
        source.held = opened.pop_all()
        return source


def hdf5_files(folder: Path) -> list[str]:
    """Names of the HDF5 files below a folder, relative to it."""
    names = [item.relative_to(folder) for item in sorted(folder.rglob("*")) if item.suffix.lower() in ALL_SUFFIXES]
    return [name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts)]


def _chosen(services: Services, path: Path, wanted: str | None) -> tuple[Dataset, dict[str, str]]:
    """The requested dataset, or the only one; and the files that cannot be read, with reasons."""
    datasets: list[Dataset] = []
    unread: dict[str, str] = {}
    for entry in services.catalog.entries():
        try:
            datasets += entry.outcome.result(2 * _SECONDS)
        except FuturesTimeout:
            raise Unreadable(f"{path} takes too long to inspect") from None
        except FeedError as error:
            unread[entry.name] = error.detail
        unread |= {name: refused.reason for name, refused in entry.refused.items()}
    if not datasets:
        name, reason = next(iter(unread.items()))
        raise Unreadable(f"{path} cannot be read: {reason}" if path.is_file() else f"{path}: {name}: {reason}")
    known = ", ".join(f"{dataset.name!r} ({dataset.rows:,} rows)" for dataset in datasets[:_SHOWN])
    known += f" and {len(datasets) - _SHOWN:,} more" if len(datasets) > _SHOWN else ""
    if wanted is not None:
        named = [dataset for dataset in datasets if dataset.name == wanted or dataset.name.endswith(f".{wanted}")]
        if len(named) != 1:
            raise BadParameter(f"dataset={wanted!r} is not in {path}: choose from {known}")
        return named[0], unread
    if len(datasets) > 1:
        raise BadParameter(
            f"{path} holds {len(datasets)} datasets, but a build takes only one: choose with dataset=NAME from {known}"
        )
    return datasets[0], unread


def _transposed(services: Services, field: Field) -> Field:
    """The field; of a sparse matrix that is stored by columns, when its rows can be read."""
    try:
        services.batcher.transposing.ensure(field, lambda _: None)
    except FeedError as error:
        return replace(field, unreadable=error.detail)
    return field


def _check_alone(path: Path, dataset: Dataset) -> None:
    """Refuse a file that is one sample of many: on its own, the lines of its image would be taken for rows."""
    if is_sample({field.name: field.array for field in dataset.fields}) != "yes":
        return
    declared = read_declared(path.parent, follow_links=True).datasets.values()
    is_declared = any(one.stack is not None for one in declared if one.matching([path.name]))
    if not is_declared and (alike := len(files_of_family(path.parent, path.name))) >= FEWEST:
        raise BadParameter(
            f"{path.name} seems to be one of {alike} files with one sample each: build their folder, {path.parent}, or "
            "set stack = false in h5feed.toml"
        )


class CataloguedSource:
    """A dataset as the server would serve it.

    Attributes
    ----------
    held : ExitStack
        What is to be closed with it.
    """

    images = False
    may_break = False

    def __init__(self, reader: Reader, dataset: Dataset, options: BuildOptions) -> None:
        self._options = options
        self.held = contextlib.ExitStack()
        self.left_out: dict[str, str] = {}
        self.notes = list(dataset.notes)
        self._rows, self.splits = self._divided(dataset)
        self.rows = len(self._rows)
        # What the rows were drawn by holds for all of them together.
        self.split_record = dataset.split_record if self.rows == dataset.rows else None
        if not self.rows:
            raise Unreadable(f"dataset {dataset.name!r} has no rows")
        usable = [stored for field in dataset.fields for stored in self._stored(field, dataset, reader)]
        known = ", ".join(dict.fromkeys(stored.field.name for stored in usable))
        names = options.rename or {}
        unknown = next((name for name in names if name not in [stored.field.name for stored in usable]), None)
        if unknown is not None:
            raise BadParameter(f"rename: there is no field {unknown!r}: choose from {known}")
        label = options.label_column or (dataset.label.name if dataset.label else None)
        if label is not None and label not in [stored.field.name for stored in usable]:
            raise BadParameter(f"label_column={label!r} is not a field of {dataset.name}: choose from {known}")
        self.label: str | None = None
        self.columns: dict[str, Column] = {}
        chosen_fields: list[tuple[StoredField, FieldSpec]] = []
        for stored in usable:
            name = names.get(stored.field.name, stored.field.name)
            attributes = attributes_of(stored.field)
            attributes["role"] = _role(stored.field, options.label_column)
            if stored.field.name == label and dataset.class_names:
                attributes["class_names"] = list(dataset.class_names)
            elif stored.field.class_names and "class_names" not in attributes:
                attributes["class_names"] = list(stored.field.class_names)
            small = stored.field.row_bytes <= _MAX_LABEL_BYTES and not isinstance(stored, Lists)
            if stored.field.name == label and small and len(usable) > 1:
                self.columns[name] = whole(stored, self._rows, attributes)
                self.label = name
            else:
                chosen_fields.append((stored, stored.spec(name, attributes)))
        if not chosen_fields:
            raise Unreadable(f"dataset {dataset.name!r} has no field that can be built")
        # Inputs come first, then what is largest: the first one is the main one.
        chosen_fields.sort(key=lambda item: (item[0].field.role != "input", -item[1].row_bytes))
        self._fields = [stored for stored, _ in chosen_fields]
        self.fields: tuple[FieldSpec, ...] = (self._main(chosen_fields[0][1]), *(spec for _, spec in chosen_fields[1:]))
        self.digest = digest_of([dataset.revision, dataset.name, dataset.rows, dataset.identity])

    def name(self, row: int) -> str:
        return f"row {self._rows[row]}"

    def work(self, done: npt.NDArray[np.bool_]) -> Iterator[Work]:
        step = max(1, _BLOCK_BYTES // max(1, sum(spec.row_bytes for spec in self.fields)))
        together = max(stored.field.block_rows for stored in self._fields)
        step = max(1, round(step / together)) * together
        for start in range(0, self.rows, step):
            missing = start + np.flatnonzero(~done[start : start + step])
            if len(missing):
                yield self._converting(missing, [stored.read(self._rows[missing]) for stored in self._fields])

    def close(self) -> None:
        self.held.close()

    def _converting(self, rows: npt.NDArray[np.int64], read: list[npt.NDArray[Any] | list[bytes]]) -> Work:
        def work() -> Block:
            arrays: dict[str, npt.NDArray[Any] | list[bytes]] = {}
            for number, (spec, own) in enumerate(zip(self.fields, read, strict=True)):
                if isinstance(own, list):
                    arrays[spec.name] = own
                    continue
                if spec.dtype.kind == "c":
                    own = own.view(spec.dtype)
                rescale = self._options.rescale if number == 0 else 1.0
                shaped = own.reshape(len(rows), *spec.shape)
                arrays[spec.name] = converted(shaped, spec.dtype, rescale, spec.name)
            block = Block.of(0, arrays, *self._main_parts)
            block.rows = rows
            return block

        return work

    @cached_property
    def _main_parts(self) -> list[str]:
        """Names of the main field, or of both parts of a sparse one."""
        main = self._fields[0].field
        return [spec.name for stored, spec in zip(self._fields, self.fields, strict=True) if stored.field is main]

    def _stored(self, field: Field, dataset: Dataset, reader: Reader) -> Sequence[StoredField]:
        """How to read a field, or its parts; empty if it is left out."""
        if field.unreadable is not None:
            if Scattered.is_one(field, dataset.rows):
                return [Scattered(field)]
            is_class_names = field.array.text is not None and list(field.array.text) == dataset.class_names
            if not is_class_names:
                self.left_out[f"field {field.name}"] = field.unreadable
            return []
        if field.is_text:
            texts = Texts(field, reader, self._rows)
            if texts.longest * self.rows <= _MAX_TEXT_BYTES:
                return [texts]
            self.left_out[f"field {field.name}"] = (
                f"its texts have up to {texts.longest:,} bytes, which is too much for so many rows"
            )
            return []
        if field.is_sparse:
            return [SparsePart(field, part, reader, self._rows) for part in field.parts]
        if field.column.encoded.has_lists:
            return [Lists(field, reader, self._rows)]
        return [Numbers(field, reader)]

    def _main(self, spec: FieldSpec) -> FieldSpec:
        """The first field with the requested dtype."""
        if self._options.dtype is None:
            return spec
        if spec.lengths is not None or spec.dtype.kind not in "biuf" or spec.is_bfloat16:
            raise BadParameter(f"dtype={self._options.dtype}: {spec.name!r} cannot be converted to it")
        return replace(spec, dtype=np.dtype(self._options.dtype), enum_names=None)

    def _divided(self, dataset: Dataset) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8] | None]:
        """The rows to build, ascending, and the split of each."""
        rows = np.arange(dataset.rows, dtype=np.int64)
        codes = np.full(dataset.rows, len(SPLITS), np.uint8)
        for split, runs in dataset.native.items():
            for begin, end in runs:
                if split in SPLITS:
                    codes[begin:end] = np.minimum(codes[begin:end], SPLITS.index(split))
        inside = codes < len(SPLITS)
        for split, runs in dataset.native.items():
            own = np.concatenate([rows[begin:end] for begin, end in runs])
            if split not in SPLITS and not (inside.any() and not inside[own].all()):
                self.notes.append(
                    f"the {len(own):,} rows of the split {split!r} are written, but not as a split: a build "
                    f"writes only {', '.join(SPLITS)}"
                )
        if not inside.any():
            return rows, None
        if not inside.all():
            names = ", ".join(dataset.native)
            self.left_out[f"rows outside the splits of {dataset.name}"] = (
                f"{int((~inside).sum()):,} rows are in none of {', '.join(SPLITS)}: its splits are {names}"
            )
        return rows[inside], codes[inside]


def _role(field: Field, label: str | None) -> str:
    """The role of a field; `label` is the name of the only label, if one was requested."""
    if field.name == label:
        return "label"
    return "other" if field.role == "label" and label is not None else field.role
