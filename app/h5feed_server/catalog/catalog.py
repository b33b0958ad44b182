"""What is served: finds the HDF5 files below the data folder, has them inspected, and notices when they change."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h5feed.errors import DatasetNotFound, FeedError, Overloaded, RevisionChanged, Unreadable
from h5feed.order import ORDER_VERSION

from ..settings import Settings
from ..storage.folder import CacheFolder
from ..storage.inspector import Inspector
from ..storage.layout import LAYOUT_VERSION, load_layout
from ..storage.source import Identity, LocalFile, OpenFiles
from .dataset import Dataset, describe_fields
from .revision import content_digest

logger = logging.getLogger(__name__)

SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")
RESCAN_SECONDS = 1.0
"""A listing may be this old. An unknown or changed name is always looked for anew."""

PATIENCE_SECONDS = 20.0
"""How long a request waits for a file that is still being inspected and digested before it is asked to come again."""


@dataclass(frozen=True)
class Entry:
    """One file of the folder and what became of inspecting it."""

    name: str
    file: str
    path: str
    identity: Identity
    outcome: Future[Dataset]

    def reason(self) -> str | None:
        """Why it cannot be read; None where it can, or is not known yet."""
        if not self.outcome.done():
            return None
        error = self.outcome.exception()
        return None if error is None else str(error)


class Catalog:
    """The datasets below ``settings.data_dir``."""

    def __init__(self, settings: Settings, folder: CacheFolder) -> None:
        self._root = settings.data_dir.resolve()
        self._settings = settings
        self._folder = folder
        self._files = OpenFiles(settings.open_files)
        self._inspector = Inspector(settings.inspect_timeout)
        self._executor = ThreadPoolExecutor(2, "h5feed-inspect")
        self._entries: dict[str, Entry] = {}
        self._scanned = float("-inf")
        self._lock = threading.Lock()

    def close(self) -> None:
        """End the threads and the inspector, close the files."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._inspector.rest()
        self._files.close()

    def entries(self) -> list[Entry]:
        """All files, by name."""
        self._rescan(time.monotonic() - RESCAN_SECONDS)
        return sorted(self._entries.values(), key=lambda entry: entry.name)

    def names(self) -> list[str]:
        """Names of what can be read, as far as is known."""
        return [entry.name for entry in self.entries() if entry.reason() is None]

    def dataset(self, name: str, revision: str | None = None) -> Dataset:
        """The dataset as it is now.

        Raises
        ------
        DatasetNotFound, Unreadable, Overloaded
        RevisionChanged
            It is not `revision` any more.
        """
        entry = self._entries.get(name)
        if entry is None:
            self._rescan(time.monotonic())
            entry = self._entries.get(name)
            if entry is None:
                raise self._not_found(name)
        try:
            changed = Identity.of(os.stat(entry.path)) != entry.identity
        except OSError:
            changed = True
        if changed:
            self._rescan(time.monotonic())
            entry = self._entries.get(name)
            if entry is None:
                raise self._not_found(name)
        try:
            dataset = entry.outcome.result(PATIENCE_SECONDS)
        except FuturesTimeout:
            raise Overloaded(f"dataset {name!r} is still being inspected", retry_after=1) from None
        except Unreadable as error:
            raise Unreadable(f"dataset {name!r} cannot be read: {error.detail}") from None
        if revision is not None and revision != dataset.revision:
            raise RevisionChanged(
                f"dataset {name!r} has revision {dataset.revision} now, not {revision}: its file was changed. Ask for "
                "the dataset again and begin a new epoch."
            )
        return dataset

    def _not_found(self, name: str) -> DatasetNotFound:
        names = self.names()
        shown = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
        return DatasetNotFound(f"there is no dataset {name!r}: valid are {shown or 'none, the data folder is empty'}")

    def _rescan(self, since: float) -> None:
        """Walk the folder, unless a walk began after `since`: many who wait for one share it."""
        with self._lock:
            if self._scanned >= since:
                return
            began = time.monotonic()
            entries = {}
            for name, file in _names(self._walk()).items():
                path = str(self._root / file)
                try:
                    identity = Identity.of(os.stat(path))
                except OSError:
                    continue
                known = self._entries.get(name)
                if known is None or known.identity != identity or known.path != path:
                    outcome = self._executor.submit(self._load, name, file, path, identity)
                    known = Entry(name, file, path, identity, outcome)
                entries[name] = known
            if any(not entry.outcome.done() for entry in entries.values()):
                # Behind the last file, so that the child does not outlive its work.
                self._executor.submit(self._inspector.rest)
            self._entries = entries
            self._scanned = began

    def _walk(self) -> list[str]:
        found = []
        for folder, folders, files in os.walk(self._root):
            folders[:] = sorted(item for item in folders if not item.startswith("."))
            for file in files:
                if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                    found.append(os.path.relpath(os.path.join(folder, file), self._root))
        return sorted(found)

    def _load(self, name: str, file: str, path: str, identity: Identity) -> Dataset:
        try:
            data = self._folder.get(f"layouts/{LAYOUT_VERSION}-{identity.key}", lambda: self._inspector.inspect(path))
            layout = load_layout(data)
            limit = self._settings.digest_limit
            digest = self._folder.get(
                f"digests/{limit:x}-{identity.key}", lambda: content_digest(path, identity, limit, data)
            )
            rows, fields = describe_fields(layout)
            if not any(field.unreadable is None for field in fields):
                reasons = "; ".join(f"{field.name}: {field.unreadable}" for field in fields[:5])
                raise Unreadable(reasons or "its root group holds no arrays")
            return Dataset(
                name=name,
                file=file,
                revision=_revision(digest, self._declaration()),
                digest_in_full=identity.size <= limit,
                rows=rows,
                fields=fields,
                attributes=layout.attributes,
                source=LocalFile(self._files, path, identity),
            )
        except FeedError as error:
            logger.warning("%s: %s", file, error)
            raise
        except OSError as error:
            raise Unreadable(f"{error.strerror or 'it cannot be opened'}") from None
        except Exception:
            logger.exception("%s could not be described", file)
            raise Unreadable("describing it failed; the server's log has the reason") from None

    def _declaration(self) -> bytes:
        """Bytes of the folder's ``h5feed.toml``, which is part of every revision."""
        try:
            return (self._root / "h5feed.toml").read_bytes()
        except OSError:
            return b""


def _revision(digest: bytes, declaration: bytes) -> str:
    parts = hashlib.blake2b(digest_size=8)
    parts.update(f"{ORDER_VERSION} {len(declaration)} ".encode() + declaration + digest)
    return parts.hexdigest()


def _names(files: list[str]) -> dict[str, str]:
    """Name of each file: its path without the ending, dots for slashes; two alike keep their endings."""
    stems: dict[str, list[str]] = {}
    for file in files:
        stems.setdefault(_dotted(os.path.splitext(file)[0]), []).append(file)
    return {(stem if len(alike) == 1 else _dotted(file)): file for stem, alike in stems.items() for file in alike}


def _dotted(path: str) -> str:
    # Names that are no UTF-8 cannot travel in a URL or in JSON.
    return Path(path).as_posix().replace("/", ".").encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def describe_dataset(dataset: Dataset) -> dict[str, Any]:
    """All that the API says of a dataset."""
    fields = []
    for field in dataset.fields:
        array = field.array
        fields.append(
            {
                "name": field.name,
                "role": field.role,
                "role_reason": field.role_reason,
                "channels": field.channels,
                "shape": list(field.sample_shape),
                "dtype": field.dtype.name,
                "rows": array.rows,
                "readable": field.unreadable is None,
                "reason": field.unreadable,
                "stored_dtype": array.dtype,
                "chunks": list(array.chunk_shape) if array.chunk_shape else None,
                "filters": [item.name for item in array.filters],
                "stored_bytes": array.stored_bytes,
                "logical_bytes": array.nbytes,
                "enum": array.enum_names,
                "attributes": array.attributes,
                "decoded_per_served_byte": round(field.read_amplification, 3),
            }
        )
    return {
        "name": dataset.name,
        "status": "ok",
        "reason": None,
        "revision": dataset.revision,
        "revision_covers": "all bytes" if dataset.digest_in_full else "size, layout and sampled blocks",
        "rows": dataset.rows,
        "fields": fields,
        "class_names": dataset.class_names,
        "native_splits": [],
        "files": [dataset.file],
        "attributes": dataset.attributes,
    }
