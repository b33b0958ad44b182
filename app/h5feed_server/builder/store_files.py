"""Presents a source in an object store as a local folder, so that the code for folders can read it.

Images are fetched when they are needed, or a little earlier: in the folder, sparse files of the same size stand for
them. All other objects are copied. So names, order, classes and splits are found by the same code as in a folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from h5feed.errors import FeedError, RevisionChanged, SourceUnavailable, TooLarge, Unreadable
from h5feed.stored.scratch import Bytes

from ..catalog.declared import NAME as DECLARATION
from ..storage.objects.backend import StoredObject
from ..storage.objects.store import ObjectStore
from ..store_address import StoreAddress
from .image_spec import SUFFIXES
from .numpy_files import IDX_NAME
from .parquet import PARQUET_SUFFIXES
from .progress import OnProgress, Progress
from .table_file import TABLE_SUFFIXES

MOST_OBJECTS = 4_000_000
"""Objects below the prefix of a source, of any kind."""

_LIST_SECONDS = 1800.0

_TIMEOUT_SECONDS = 180.0
"""How long a range may take, all attempts together: a build can wait."""

_PART_BYTES = 8 << 20
"""Objects are fetched in ranges of this size."""

_AHEAD_BYTES = 256 << 20
"""Bytes of objects that are fetched before they are used."""

_COPY_PARTS = 16
"""Ranges that are fetched at the same time while an object is copied."""


class StoreFiles:
    """The objects of a source, and the folder that stands for them.

    Parameters
    ----------
    address : StoreAddress
        Of the prefix above the source.
    name : str
        The last part of its URL; empty for a whole bucket.
    scratch : Path
        Where the folder is made. What an earlier call has copied into it is used again.

    Attributes
    ----------
    path : Path
        The source.
    left_out : dict of str to str
        Objects whose names cannot be those of files, and why.
    """

    def __init__(self, address: StoreAddress, name: str, scratch: Path, on_progress: OnProgress) -> None:
        self._scratch, self._on_progress = scratch, on_progress
        self._url = f"{address.url}/{name}".rstrip("/")
        self._stores: list[ObjectStore] = []
        self._store = self._opened(address)
        self._objects: dict[str, StoredObject] = {}
        self._begun: dict[str, list[Future[Bytes]]] = {}
        self._ahead = 0
        self._lock = threading.Lock()
        self.left_out: dict[str, str] = {}
        try:
            single = self._store.find(name) if name else None
            if single is not None and single.unreadable:
                other = "; a source on a web server must be a single file" if address.is_web else ""
                raise Unreadable(f"{self._url}: {single.unreadable}{other}")
            self.path = self._folder(address, name) if single is None else self._file(address, single)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up what is being fetched."""
        for store in self._stores:
            store.close()

    def begin(self, paths: Iterable[Path]) -> None:
        """Start to fetch files that will be read soon, as far as they fit into memory."""
        for path in paths:
            if (one := self._object(path)) is None:
                continue
            with self._lock:
                if one.key in self._begun or self._ahead + one.size > _AHEAD_BYTES:
                    continue
                self._ahead += one.size
                self._begun[one.key] = self._start(one)

    def read(self, path: Path) -> bytes | None:
        """The content of a file that is not copied; None if it is an ordinary file.

        Raises
        ------
        RevisionChanged
            The object was replaced or deleted since it was listed.
        SourceUnavailable
            The store does not answer, or refuses it.
        """
        if (one := self._object(path)) is None:
            return None
        with self._lock:
            if (futures := self._begun.pop(one.key, None)) is not None:
                self._ahead -= one.size
        return b"".join(self._part(one, future).tobytes() for future in futures or self._start(one))

    def _opened(self, address: StoreAddress) -> ObjectStore:
        store = ObjectStore(address, _TIMEOUT_SECONDS)
        self._stores.append(store)
        return store

    def _object(self, path: Path) -> StoredObject | None:
        with suppress(ValueError):
            return self._objects.get(path.relative_to(self._root).as_posix())
        return None

    def _start(self, one: StoredObject) -> list[Future[Bytes]]:
        return self._store.begin(one, _ranges(one))

    def _part(self, one: StoredObject, future: Future[Bytes]) -> Bytes:
        try:
            return self._store.wait(one, future)
        except RevisionChanged:
            changed = f"{self._url}: {one.key} was replaced in the store during the build: run the same command again"
            raise RevisionChanged(changed) from None
        except Unreadable as error:
            if isinstance(error.__cause__, PermissionError):
                # Credentials expire: what is finished is kept, and no row is left out for it.
                raise SourceUnavailable(f"{self._url}: {one.key}: {error.detail}") from None
            raise RevisionChanged(f"{self._url}: {one.key} was deleted from the store during the build") from None
        except FeedError as error:
            raise SourceUnavailable(f"{self._url}: {one.key}: {error.detail}") from None

    # What stands for the objects --------------------------------------------------------------------------------------

    def _folder(self, address: StoreAddress, name: str) -> Path:
        """A folder for all objects below the prefix."""
        prefix = "/".join(part for part in (address.prefix, name) if part)
        self._store = self._opened(replace(address, prefix=prefix))
        found = self._possible(self._listed())
        if not found:
            raise Unreadable(f"{self._url}: there is no such object, and no object below it")
        is_streamed = _is_streamed(found)
        self._root = self._scratch / ("listed" if is_streamed else "copied") / (name or address.bucket)
        if is_streamed:
            self._objects = found
            self._stand_in(found.values())
        else:
            self._clear(found)
            self._copy(list(found.values()))
        return self._root

    def _file(self, address: StoreAddress, single: StoredObject) -> Path:
        """A copy of an object; and for a table, a folder for what is beside it, which it may name."""
        is_table = single.key.lower().endswith(TABLE_SUFFIXES)
        above = address.prefix.rpartition("/")[2] or address.bucket
        self._root = self._scratch / ("listed" if is_table else "copied") / above
        copied = [single]
        if is_table:
            # Web servers are listed for HDF5 files only.
            found = {} if address.is_web else self._possible(self._listed())
            found.pop(single.key, None)
            self._objects = found
            self._stand_in(found.values(), kept=single.key)
        else:
            if (declaration := self._store.find(DECLARATION)) is not None:
                copied.append(declaration)
            self._clear({one.key: one for one in copied})
        self._copy(copied)
        return self._root / single.key

    def _listed(self) -> list[StoredObject]:
        try:
            return self._store.list(MOST_OBJECTS, _LIST_SECONDS)
        except FeedError as error:
            error.detail = f"{self._url}: {error.detail}"
            raise

    def _possible(self, objects: Sequence[StoredObject]) -> dict[str, StoredObject]:
        """Objects by name, without hidden ones, which are skipped in folders, too."""
        shown = [one for one in objects if not any(part.startswith((".", "__MACOSX")) for part in one.key.split("/"))]
        folders = {one.key[:end] for one in shown for end in _slashes(one.key)}
        possible: dict[str, StoredObject] = {}
        for one in shown:
            if one.key in folders:
                # Some programs write an empty object for each folder.
                if one.size:
                    self.left_out[one.key] = "its name is also the folder of another object"
            elif "" in (parts := one.key.split("/")) or any(len(os.fsencode(part)) > 255 for part in parts):
                self.left_out[one.key] = "its name is not a valid file name"
            elif one.unreadable:
                self.left_out[one.key] = one.unreadable
            else:
                possible[one.key] = one
        return possible

    def _clear(self, wanted: dict[str, StoredObject]) -> None:
        """Delete what an earlier call has copied of other versions."""
        for folder, _, names in os.walk(self._root):
            for name in names:
                path = Path(folder, name)
                one = wanted.get(path.relative_to(self._root).as_posix())
                if one is None or not _is_copy(path, one):
                    path.unlink()

    def _stand_in(self, objects: Iterable[StoredObject], kept: str = "") -> None:
        """Make files of the right size and time, without content."""
        for path in self._root.iterdir() if self._root.is_dir() else ():
            if path.name == kept:
                continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for one in objects:
            path = self._root / one.key
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                file.truncate(one.size)
            _stamp(path, one)

    def _copy(self, objects: list[StoredObject]) -> None:
        missing = [one for one in objects if not _is_copy(self._root / one.key, one)]
        needed = sum(one.size for one in missing)
        self._root.mkdir(parents=True, exist_ok=True)
        if needed > (free := shutil.disk_usage(self._root).free):
            raise TooLarge(
                f"the copy of {self._url} needs {needed:,} bytes, and {self._scratch} has {free:,} left: free some "
                "space, or choose another folder with scratch"
            )
        done = 0

        def on_bytes(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            self._on_progress(Progress("fetch", done, needed, done))

        for one in missing:
            self._copy_one(one, on_bytes)

    def _copy_one(self, one: StoredObject, on_bytes: Callable[[int], None]) -> None:
        path = self._root / one.key
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._scratch / ".unfinished"
        ranges = _ranges(one)
        with open(unfinished, "wb") as file:
            for first in range(0, len(ranges), _COPY_PARTS):
                for future in self._store.begin(one, ranges[first : first + _COPY_PARTS]):
                    on_bytes(file.write(np.ascontiguousarray(self._part(one, future)).data))
        _stamp(unfinished, one)
        os.replace(unfinished, path)


def _is_streamed(found: dict[str, StoredObject]) -> bool:
    """Whether it is a folder of images, see `opening.open_source`."""
    names = [key.rpartition("/")[2] for key in found]
    top = [key for key in found if "/" not in key]
    is_other = any(name.endswith(PARQUET_SUFFIXES) for name in names) or any(
        IDX_NAME.match(name) or name.endswith(".npy") for name in top
    )
    return not is_other and any(name.lower().endswith(SUFFIXES) for name in names)


def _ranges(one: StoredObject) -> list[tuple[int, int]]:
    return [(begin, min(_PART_BYTES, one.size - begin)) for begin in range(0, one.size, _PART_BYTES)]


def _slashes(key: str) -> list[int]:
    return [index for index, letter in enumerate(key) if letter == "/"]


def _time_of(one: StoredObject) -> int:
    """Stands for the version: a source is known by sizes and times, and the times of objects have only seconds."""
    return int.from_bytes(hashlib.blake2b(f"{one.key} {one.e_tag}".encode(), digest_size=7).digest()) >> 1


def _stamp(path: Path, one: StoredObject) -> None:
    os.utime(path, ns=(_time_of(one), _time_of(one)))


def _is_copy(path: Path, one: StoredObject) -> bool:
    """Whether a file is a whole copy of this version."""
    try:
        status = path.stat()
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (one.size, _time_of(one))
