"""A local cache folder: rows are fetched once and read from disk in later epochs.

The folder holds rows, not batches, because a shuffled batch never occurs twice. Each field is stored separately, under
its revision (`h5feed.cache.store` describes the files and why rows are never torn). Training loops use the cache
through ``Dataset.fetch_of(…, cache=…)``, which wraps its fetch function with `h5feed.fetching.cached`.

The folder has a size limit, is shared by all processes of a machine, and may be deleted at any time. A full folder
keeps its rows: an epoch needs every row once, so replacing one by another would gain nothing. Only other revisions of
the same dataset that no process has open are deleted.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import numpy as np

from ..errors import BadParameter
from ..forks import tell_after_fork
from .lists import AnyStore, ListStore, Values
from .locks import exclusive, hold
from .row_ids import RowIds
from .store import FieldStore, Int64s

LAYOUT_VERSION = 1
"""Part of every file name, so that old and new layouts never mix."""

LEFT_FREE = 1 << 30
"""Bytes of disk space left free without `max_bytes`, or a tenth of the disk if that is more."""

_LOCK_SECONDS = 2.0
"""Maximum wait for other processes that store rows. After that, rows are not stored until a later epoch."""

logger = logging.getLogger("h5feed.cache")

S = TypeVar("S", FieldStore, ListStore)


@dataclass(frozen=True)
class Piece:
    """Rows from the server, to be stored.

    Attributes
    ----------
    rows : (k,) int64
    fields : dict of FieldStore to (k, …) array, and of ListStore to Lists
    """

    rows: Int64s
    fields: Mapping[Any, Values]


class RowCache:
    """The rows of one dataset revision in a cache folder; made by `Dataset.cache`.

    Parameters
    ----------
    folder : path
        Created if missing. A read-only folder is used as it is. If the folder cannot be used at all, nothing is cached
        and one warning is issued.
    dataset, revision : str
    rows : int
        Number of rows of the dataset.
    max_bytes : int, optional
        Maximum size of all files in the folder, including other datasets. Default: the free disk space, minus
        `LEFT_FREE` or a tenth of the disk.

    Raises
    ------
    BadParameter
        `max_bytes` is below 1.

    The repr shows how many rows are cached. The logger ``h5feed.cache`` logs the progress at INFO for every 10%.
    """

    def __init__(
        self, folder: str | os.PathLike[str], dataset: str, revision: str, rows: int, max_bytes: int | None = None
    ) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise BadParameter(f"cache_bytes={max_bytes} must be 1 or more; omit it to use the free disk space")
        self.folder = Path(folder).expanduser().absolute()
        self.dataset = dataset
        self.revision = revision
        self.rows = rows
        self.max_bytes = max_bytes
        self.pid = os.getpid()
        self._of_dataset = self.folder / _file_name(dataset, LAYOUT_VERSION)
        self._own = self._of_dataset / _file_name(revision)
        self.row_ids = RowIds()
        """Row ids of recently requested orders."""
        self._lock = threading.RLock()
        self._stores: dict[tuple[str, str], AnyStore] = {}
        self._counted = self._since = 0
        self._tenths = -1
        self._stopped: str | None = None
        """Why storing has stopped."""
        self._broken = False
        try:
            self._in_use = hold(self._own)
        except (OSError, ImportError) as error:
            self._broken = True
            self._stop(f"cannot be used ({error}): every epoch will be fetched from the server")
        else:
            weakref.finalize(self, os.close, self._in_use).atexit = False
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In the child: a lock held by a thread of the parent would never be released."""
        self._lock = threading.RLock()
        self.row_ids.after_fork()

    def __reduce__(self) -> tuple[Any, ...]:
        return RowCache, (self.folder, self.dataset, self.revision, self.rows, self.max_bytes)

    def __repr__(self) -> str:
        counts = sorted((name, store.count()) for (name, _), store in self._stores.items())
        fields = ", ".join(f"{name}: {count:,}" for name, count in counts) or "no fields requested yet"
        size = f"{self.nbytes / 1e6:,.1f} MB" + ("" if self.max_bytes is None else f" of {self.max_bytes / 1e6:,.1f}")
        why = f"; {self._stopped}" if self._stopped else ""
        return f"<RowCache of {self.dataset!r}, rows of {self.rows:,}: {fields}; {self.folder} uses {size}{why}>"

    @property
    def is_full(self) -> bool:
        """Whether no more rows will be stored."""
        return self._stopped is not None

    @property
    def cached_rows(self) -> int:
        """Number of rows that are cached with every field requested so far, by any process."""
        with self._lock:
            stores = list(self._stores.values())
        return min((store.count() for store in stores), default=0)

    @property
    def nbytes(self) -> int:
        """Disk space used by the folder in bytes, including other datasets."""
        return sum(status.st_blocks * 512 for status in _files(self.folder))

    def check(self, dataset: str, revision: str) -> None:
        """Raise `BadParameter` if the cache belongs to another dataset or revision."""
        if (dataset, revision) != (self.dataset, self.revision):
            raise BadParameter(
                f"the cache belongs to {self.dataset!r}, revision {self.revision}, not to {dataset!r}, revision "
                f"{revision}: pass the folder instead, or create a cache with this dataset's cache()"
            )

    def store(self, field: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> FieldStore | None:
        """The store of a field's rows; None if they cannot be cached.

        Parameters
        ----------
        shape : tuple of int
            Shape of one row.
        """
        row_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        name = f"{_file_name(field, dtype.str, *shape)}.rows"
        if not row_bytes:
            return None
        return self._opened(field, FieldStore, lambda: FieldStore(self._own / name, self.rows, row_bytes))

    def list_store(self, field: str, dtype: np.dtype[Any]) -> ListStore | None:
        """The same of a field whose rows differ in length, with items of this dtype."""
        name = f"{_file_name(field, 'lists', dtype.str)}.lists"
        return self._opened(field, ListStore, lambda: ListStore(self._own / name, self.rows, dtype))

    def _opened(self, field: str, kind: type[S], make: Callable[[], S]) -> S | None:
        if self._broken or not self.rows:
            return None
        with self._lock:
            found = self._stores.get((field, kind.__name__))
            if not isinstance(found, kind):
                try:
                    found = make()
                except (OSError, ValueError) as error:
                    self._stop(f"cannot hold the field {field!r} ({error}): it will be fetched in every epoch")
                    return None
                self._stores[field, kind.__name__] = found
        return found

    def put(self, pieces: Sequence[Piece]) -> None:
        """Store as many rows as fit. On a full or broken disk, storing stops with one warning."""
        if self._stopped is not None:
            return
        stored, full = 0, False
        try:
            with exclusive(self.folder / ".lock", _LOCK_SECONDS) as locked:
                if locked:
                    stored, full = self._put(pieces)
        except OSError as error:
            self._stop(f"cannot store more rows ({error}): missing rows will be fetched in every epoch")
        if full:
            self._stop(
                f"is full at {self.nbytes:,} bytes: missing rows will be fetched in every epoch. If the disk has "
                "space, raise cache_bytes="
            )
        self._tell(stored)

    def _put(self, pieces: Sequence[Piece]) -> tuple[int, bool]:
        """The number of rows stored, and whether the folder is full."""
        stored = allowed = 0
        for piece in pieces:
            begin, cost = 0, sum(store.most_for_a_row(values) for store, values in piece.fields.items())
            while begin < len(piece.rows):
                if not allowed:
                    # Neighbouring rows share disk blocks, so there is usually more room than estimated.
                    allowed = self._room() // cost
                    if allowed < 1 and self._drop_other_revisions():
                        allowed = self._room() // cost
                    if allowed < 1:
                        return stored, True
                end = min(len(piece.rows), begin + allowed)
                for store, values in piece.fields.items():
                    store.put(piece.rows[begin:end], values[begin:end])
                stored, allowed, begin = stored + end - begin, allowed - (end - begin), end
        return stored, False

    def _room(self) -> int:
        """Number of bytes that can still be stored."""
        disk = os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize
        if self.max_bytes is not None:
            return min(free, self.max_bytes - self.nbytes)
        return free - max(LEFT_FREE, disk.f_blocks * disk.f_frsize // 10)

    def _tell(self, stored: int) -> None:
        with self._lock:
            self._since += stored
            # Counting scans all rows: do it rarely.
            if 100 * self._since < self.rows and self._counted + self._since < self.rows:
                return
            self._counted, self._since = self.cached_rows, 0
            tenths = 10 * self._counted // self.rows
            if tenths <= self._tenths:
                return
            self._tenths = tenths
        logger.info("%s: %s of %s rows are cached in %s", self.dataset, self._counted, self.rows, self.folder)

    def _stop(self, why: str) -> None:
        with self._lock:
            if self._stopped is not None:
                return
            self._stopped = why
        warnings.warn(f"the cache folder {self.folder} {why}", RuntimeWarning, stacklevel=2)

    def _drop_other_revisions(self) -> bool:
        """Delete other revisions of this dataset that no process has open."""
        dropped = False
        for other in sorted(self._of_dataset.iterdir()):
            if other != self._own and other.is_dir():
                with contextlib.suppress(FileNotFoundError), exclusive(other / ".in-use", 0.0) as unused:
                    if unused:
                        # Rename first, so that no process creates files in a folder that is being deleted.
                        gone = other.with_name(f".gone-{os.getpid()}-{time.monotonic_ns()}")
                        other.rename(gone)
                        shutil.rmtree(gone, ignore_errors=True)
                        dropped = True
        return dropped


def _file_name(label: str, *key: object) -> str:
    """A readable file name, unique for the label and key, without path separators."""
    digest = hashlib.blake2b(repr((label, *key)).encode(), digest_size=8).hexdigest()
    return f"{quote(label, safe=' ')[:80]}-{digest}"


def _files(folder: Path) -> Iterator[os.stat_result]:
    """The stat results of all files below a folder. Other processes may delete files meanwhile."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path))
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield entry.stat(follow_symlinks=False)
