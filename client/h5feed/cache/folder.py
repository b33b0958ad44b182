"""A local folder in which the rows of datasets are kept: fetched once, read from there in every later epoch.

Whole batches are useless to keep, since shuffled ones never come again; so rows are kept, each field for itself, under
the revision that they belong to (see `h5feed.cache.store` for how they lie there, and why none is ever torn). Training
loops use it by ``Dataset.read_ahead(…, cache=…)``, which wraps what it fetches with in `h5feed.fetching.cached`.

The folder is bounded in bytes, shared by all processes of a machine, and may be deleted at any time. When it is full,
what is in it stays: an epoch has no rows that are needed less than others, so making room for one by dropping another
would fetch both again. Only what nobody can need goes: other revisions of the same dataset that no process has open.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from ..errors import BadParameter
from ..forks import tell_after_fork
from .locks import exclusive, hold
from .row_ids import RowIds
from .store import FieldStore, Int64s

LAYOUT_VERSION = 1
"""Part of every name in the folder, so that a changed layout never mixes with an old one."""

LEFT_FREE = 1 << 30
"""Bytes of the disk that are left to others where the caller names no bound, or a tenth of it if that is more."""

_LOCK_SECONDS = 2.0
"""How long to wait for other processes that are storing rows; then rows go unstored until a later epoch."""

logger = logging.getLogger("h5feed.cache")


@dataclass(frozen=True)
class Piece:
    """Rows that have come from the server.

    Attributes
    ----------
    rows : (k,) int64
    fields : dict of FieldStore to (k, …) array
    """

    rows: Int64s
    fields: Mapping[FieldStore, npt.NDArray[Any]]


class RowCache:
    """The rows of one dataset's revision that a folder holds; made by `Dataset.cache`.

    Parameters
    ----------
    folder : path
        Made where it is missing. On a disk that cannot be written, what is there is read; failing that, nothing is
        cached, which is warned of once.
    dataset, revision : str
    rows : int
        Of the dataset.
    max_bytes : int, optional
        Bound on all files in the folder, those of other datasets included. Default: what the disk has, less
        `LEFT_FREE` or a tenth of it.

    Raises
    ------
    BadParameter
        `max_bytes` is below 1.

    Printing it tells how many rows are there; so do INFO lines of the logger ``h5feed.cache``, at every tenth.
    """

    def __init__(
        self, folder: str | os.PathLike[str], dataset: str, revision: str, rows: int, max_bytes: int | None = None
    ) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise BadParameter(f"cache_bytes={max_bytes} must be 1 or more; leave it out for what the disk has")
        self.folder = Path(folder).expanduser().absolute()
        self.dataset = dataset
        self.revision = revision
        self.rows = rows
        self.max_bytes = max_bytes
        self.pid = os.getpid()
        self._of_dataset = self.folder / _file_name(dataset, LAYOUT_VERSION)
        self._own = self._of_dataset / _file_name(revision)
        self.row_ids = RowIds()
        """Of orders that were asked for lately."""
        self._lock = threading.RLock()
        self._stores: dict[str, FieldStore] = {}
        self._counted = self._since = 0
        self._tenths = -1
        self._stopped: str | None = None
        """Why nothing more is stored."""
        self._broken = False
        try:
            self._in_use = hold(self._own)
        except (OSError, ImportError) as error:
            self._broken = True
            self._stop(f"cannot be used ({error}): every epoch is fetched from the server")
        else:
            weakref.finalize(self, os.close, self._in_use).atexit = False
        tell_after_fork(self)

    def after_fork(self) -> None:
        """In the child: a lock that a thread of the parent holds is never released here."""
        self._lock = threading.RLock()
        self.row_ids.after_fork()

    def __reduce__(self) -> tuple[Any, ...]:
        return RowCache, (self.folder, self.dataset, self.revision, self.rows, self.max_bytes)

    def __repr__(self) -> str:
        counts = {name: store.count() for name, store in sorted(self._stores.items())}
        fields = ", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "nothing asked for yet"
        size = f"{self.nbytes / 1e6:,.1f} MB" + ("" if self.max_bytes is None else f" of {self.max_bytes / 1e6:,.1f}")
        why = f"; {self._stopped}" if self._stopped else ""
        return f"<RowCache of {self.dataset!r}, rows of {self.rows:,}: {fields}; {self.folder} takes {size}{why}>"

    @property
    def cached_rows(self) -> int:
        """Rows of which every field asked for so far is there, whichever process stored them."""
        with self._lock:
            stores = list(self._stores.values())
        return min((store.count() for store in stores), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes that the folder takes on the disk, other datasets included."""
        return sum(status.st_blocks * 512 for status in _files(self.folder))

    def check(self, dataset: str, revision: str) -> None:
        """Raise `BadParameter` where these are not the dataset and revision that it was made for."""
        if (dataset, revision) != (self.dataset, self.revision):
            raise BadParameter(
                f"the cache is one of {self.dataset!r}, revision {self.revision}, not of {dataset!r}, revision "
                f"{revision}: give the folder, or make one with this dataset's own cache()"
            )

    def store(self, field: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> FieldStore | None:
        """Where a field's rows lie; None where they cannot be kept.

        Parameters
        ----------
        shape : tuple of int
            Of one row.
        """
        row_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if self._broken or not self.rows * row_bytes:
            return None
        with self._lock:
            field_store = self._stores.get(field)
            if field_store is None:
                try:
                    field_store = FieldStore(
                        self._own / f"{_file_name(field, dtype.str, *shape)}.rows", self.rows, row_bytes
                    )
                except (OSError, ValueError) as error:
                    self._stop(f"cannot hold the field {field!r} ({error}): it is fetched in every epoch")
                    return None
                self._stores[field] = field_store
        return field_store

    def put(self, pieces: Sequence[Piece]) -> None:
        """Store rows as far as there is room; on a full or broken disk nothing more, which is warned of once."""
        if self._stopped is not None:
            return
        stored, full = 0, False
        try:
            with exclusive(self.folder / ".lock", _LOCK_SECONDS) as locked:
                if locked:
                    stored, full = self._put(pieces)
        except OSError as error:
            self._stop(f"takes no more rows ({error}): those that it lacks are fetched in every epoch")
        if full:
            self._stop(
                f"is full at {self.nbytes:,} bytes: rows that it lacks are fetched in every epoch; where the disk has "
                "more, give it more with cache_bytes="
            )
        self._tell(stored)

    def _put(self, pieces: Sequence[Piece]) -> tuple[int, bool]:
        """How many rows were stored, and whether there was no room for all."""
        stored = allowed = 0
        for piece in pieces:
            begin, cost = 0, sum(store.most_for_a_row for store in piece.fields)
            while begin < len(piece.rows):
                if not allowed:
                    # Neighbours share blocks of the disk: mostly there is room for more than was thought.
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
        """Bytes that may still be stored."""
        disk = os.statvfs(self.folder)
        free = disk.f_bavail * disk.f_frsize
        if self.max_bytes is not None:
            return min(free, self.max_bytes - self.nbytes)
        return free - max(LEFT_FREE, disk.f_blocks * disk.f_frsize // 10)

    def _tell(self, stored: int) -> None:
        with self._lock:
            self._since += stored
            # Counting looks at every row: not after each few of them.
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
        """Delete what no process has open and no server of this dataset's present content can ask for."""
        dropped = False
        for other in sorted(self._of_dataset.iterdir()):
            if other != self._own and other.is_dir():
                with contextlib.suppress(FileNotFoundError), exclusive(other / ".in-use", 0.0) as unused:
                    if unused:
                        # Under another name first: nobody may make it anew in a folder that is being deleted.
                        gone = other.with_name(f".gone-{os.getpid()}-{time.monotonic_ns()}")
                        other.rename(gone)
                        shutil.rmtree(gone, ignore_errors=True)
                        dropped = True
        return dropped


def _file_name(label: str, *key: object) -> str:
    """A name for people to read, which no other label and key share, and which can leave no folder."""
    digest = hashlib.blake2b(repr((label, *key)).encode(), digest_size=8).hexdigest()
    return f"{quote(label, safe=' ')[:80]}-{digest}"


def _files(folder: Path) -> Iterator[os.stat_result]:
    """What is known of the files below a folder; others may delete them meanwhile."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _files(Path(entry.path))
            else:
                with contextlib.suppress(FileNotFoundError):
                    yield entry.stat(follow_symlinks=False)
