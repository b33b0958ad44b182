"""What is wrong with single rows: inputs that repeat others, and images of one colour. A job reads all inputs once."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import TooLarge
from h5feed.runs import equal_runs
from h5feed.stored.array_file import dump_arrays, load_arrays
from h5feed.stored.byte_cache import ByteCache

from ..batches.batcher import Batcher
from ..cache_folder.folder import CacheFolder
from ..catalog.catalog import Catalog
from ..catalog.dataset import Dataset, Field, state_of
from ..catalog.names import Key, key_of
from ..jobs.registry import WAIT_SECONDS, Jobs, JobState, Progress, Request
from ..row_bits import RowSet, as_list

_KIND = "row-checks"
_KEPT_BYTES = 8 << 20

MAX_ROWS = 1 << 23
"""Rows that are compared: 8 bytes of each are held in memory, and as many again to sort them."""

EXAMPLES = 12
"""Rows that are named of each kind."""

_BLOCK_BYTES = 8 << 20
_LEAST_NUMBERS = 16
"""Numbers of a sample below which it is no wonder that all are the same."""


@dataclass(frozen=True)
class RowChecks:
    """What was found.

    Attributes
    ----------
    report : dict
        ``fields``: those that were looked at, the inputs, or all fields if there are none; ``repeated``: rows that have
        the same values in them as an earlier row, with ``examples``, (row, first row of these values); ``uniform``: by
        field, the rows with all pixels the same.
    repeats : (n, 2) int32
        Each row that repeats an earlier one, and the first row that has its inputs.
    """

    report: dict[str, Any]
    repeats: npt.NDArray[np.int32]

    def across(self, splits: Mapping[str, RowSet], rows: int) -> int:
        """How many rows repeat one that lies in another of these splits."""
        member = np.zeros(rows, np.uint8)
        for number, own in enumerate(list(splits.values())[:255], 1):
            member[as_list(own)] = number
        first, second = member[self.repeats[:, 0]], member[self.repeats[:, 1]]
        return int(np.count_nonzero((first != second) & (first > 0) & (second > 0)))


class Checker:
    """Looks at rows; one per process."""

    def __init__(
        self, catalog: Catalog, batcher: Batcher, folder: CacheFolder, jobs: Jobs, timeout: float, max_job_bytes: int
    ) -> None:
        self._catalog = catalog
        self._reader = batcher.reader
        self._transposing = batcher.transposing
        self._folder = folder
        self._jobs = jobs
        self._max_job_bytes = max_job_bytes
        self._kept: ByteCache[RowChecks] = ByteCache(_KEPT_BYTES, timeout)
        jobs.register(_KIND, "rows", self._work)

    def find(self, dataset: Dataset) -> RowChecks | None:
        """What is known already."""
        file = _file(dataset)
        kept = self._kept.find(file.here)
        if kept is None and (data := self._folder.find(file.kept)) is not None:
            kept = _load(data)
            self._kept.put(file.here, kept, kept.repeats.nbytes)
        return kept

    def start(self, dataset: Dataset) -> JobState:
        """Have a job look; see `Jobs.start`."""
        return self._jobs.start(_KIND, state_of(dataset), "", dataset.names.key)

    def _work(self, request: Request, progress: Progress) -> None:
        dataset = self._catalog.dataset_within(WAIT_SECONDS, request["dataset"], request["revision"])
        fields = _inputs(dataset)
        total = sum(self._row_bytes(field) * dataset.rows for field in fields)
        if dataset.rows > MAX_ROWS or total > self._max_job_bytes:
            raise TooLarge(
                f"the inputs of {dataset.rows:,} rows, {total:,} bytes, are more than the {MAX_ROWS:,} rows and "
                f"{self._max_job_bytes:,} bytes (H5FEED_MAX_JOB_BYTES) that are compared"
            )
        progress.expect(dataset.rows)
        for field in fields:
            self._transposing.ensure(field, lambda _: progress.advance(0))
        file = _file(dataset)
        found = _load(self._folder.get(file.kept, lambda: self._look(dataset, fields, progress)))
        self._kept.put(file.here, found, found.repeats.nbytes)

    def _row_bytes(self, field: Field) -> int:
        if field.is_ragged:
            return max(16, self._reader.typical_items(field.column) * field.dtype.itemsize)
        return max(1, field.row_bytes)

    def _look(self, dataset: Dataset, fields: list[Field], progress: Progress) -> bytes:
        digests = np.empty(dataset.rows, np.uint64)
        uniform: dict[str, list[npt.NDArray[np.int64]]] = {field.name: [] for field in fields if _may_be_uniform(field)}
        each = max(1, sum(self._row_bytes(field) for field in fields))
        step = max(1, min(1 << 16, _BLOCK_BYTES // each))
        for begin in range(0, dataset.rows, step):
            rows = np.arange(begin, min(begin + step, dataset.rows), dtype=np.int64)
            hashes = [hashlib.blake2b(digest_size=8) for _ in range(len(rows))]
            for field in fields:
                parts: Sequence[bytes | memoryview]
                if field.is_sparse:
                    # Compared as they are stored: the same row may be stored in different ways.
                    sparse = self._reader.read_sparse(field.column, rows)
                    parts = [
                        sparse.data[a:b].tobytes() + sparse.indices[a:b].tobytes() for a, b in pairwise(sparse.indptr)
                    ]
                elif field.is_ragged:
                    items, offsets = self._reader.read_ragged(field.column, rows)
                    flat = memoryview(np.ascontiguousarray(items).view(np.uint8))
                    ends = (offsets * items.dtype.itemsize).tolist()
                    parts = [flat[a:b] for a, b in pairwise(ends)]
                else:
                    block = np.empty((len(rows), *field.sample_shape), field.dtype)
                    self._reader.read_from_source(field.column, rows, block)
                    if field.name in uniform:
                        uniform[field.name].append(rows[_is_uniform(block)])
                    flat = memoryview(block.reshape(-1).view(np.uint8))
                    parts = [flat[n * field.row_bytes : (n + 1) * field.row_bytes] for n in range(len(rows))]
                for digest, part in zip(hashes, parts, strict=True):
                    # Where one field ends and the next begins is part of what is compared.
                    digest.update(len(part).to_bytes(8, "little"))
                    digest.update(part)
            digests[rows] = np.frombuffer(b"".join(digest.digest() for digest in hashes), np.uint64)
            progress.advance(len(rows))
        repeats = _repeats(digests)
        found = {name: np.concatenate(parts or [np.zeros(0, np.int64)]) for name, parts in uniform.items()}
        report = {
            "fields": [field.name for field in fields],
            "repeated": len(repeats),
            "examples": repeats[:EXAMPLES].tolist(),
            "uniform": {
                name: {"rows": len(rows), "examples": rows[:EXAMPLES].tolist()}
                for name, rows in found.items()
                if len(rows)
            },
        }
        return dump_arrays(report, {"repeats": repeats})


def _repeats(digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    """Each row whose digest an earlier one has, and the first that has it, (n, 2), by row."""
    order = np.argsort(digests, kind="stable")
    begins, ends = equal_runs(digests[order])
    first = np.repeat(order[begins], ends - begins)
    pairs = np.stack([order, first], axis=1)[order != first]
    repeats: npt.NDArray[np.int32] = pairs[np.argsort(pairs[:, 0])].astype(np.int32)
    return repeats


def compared(dataset: Dataset) -> str:
    """What is compared of each row: its inputs, or all of its values."""
    return "inputs" if any(field.role == "input" and not field.unreadable for field in dataset.fields) else "values"


def _inputs(dataset: Dataset) -> list[Field]:
    """The fields that are compared. Tables often have no field that is known to be an input."""
    readable = [field for field in dataset.fields if not field.unreadable]
    return [field for field in readable if field.role == "input"] or readable


def _may_be_uniform(field: Field) -> bool:
    return field.channels is not None and math.prod(field.sample_shape) >= _LEAST_NUMBERS and not field.is_ragged


def _is_uniform(block: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Whether all pixels of a row are the same."""
    depth = block.shape[-1] if block.ndim == 4 and block.shape[-1] in (1, 3, 4) else 1
    pixels = block.reshape(len(block), -1, depth)
    same: npt.NDArray[np.bool_] = (pixels == pixels[:, :1]).all(axis=(1, 2))
    return same


def _file(dataset: Dataset) -> Key:
    return key_of("row-checks/2", dataset.name, dataset.names, [field.name for field in _inputs(dataset)])


def _load(data: bytes) -> RowChecks:
    report, arrays = load_arrays(data)
    return RowChecks(report, arrays["repeats"].reshape(-1, 2))
