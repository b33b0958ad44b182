"""What is served: finds the HDF5 files below the data folder, has them inspected, and notices when they change."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from h5feed.errors import BadParameter, DatasetNotFound, FeedError, Overloaded, RevisionChanged, Unreadable
from h5feed.images import ImageSpec
from h5feed.order import ORDER_VERSION
from watchfiles import watch

from ..settings import Settings
from ..storage.folder import CacheFolder
from ..storage.inspector import Inspector
from ..storage.reader_pool import ReaderPool
from ..storage.source import Identity, OpenFiles, changed
from .dataset import Dataset, Field, describe_fields
from .declared import NAME as DECLARATION
from .declared import DeclaredDataset, read_declared
from .loading import PASSING, Beside, FileLoader, LoadedFile
from .packed import with_packing
from .roles import class_names
from .tables import InspectedFile, PartMissing, Tags, tables_of, tags_of

logger = logging.getLogger(__name__)

SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")
RESCAN_SECONDS = 1.0
"""A listing may be this old. An unknown or changed name is always looked for anew."""

MANY_FILES = 4
MANY_FILES_SECONDS = 0.05
"""The files of a dataset of more files are looked at this often, and not for every request."""

_DEAR = 2.0
"""Bytes decoded for each served above which a field gets advice."""

SETTLED_SECONDS = 2.0
"""A file is looked at, without being asked for, when it has not been written to for so long."""

_WATCH_SECONDS = 0.5

RETRY_SECONDS = 2.0
"""What failed for a reason that may pass is looked at again after so long, when it is asked for."""

PATIENCE_SECONDS = 5.0
"""How long a request waits for a file that is still being inspected and digested before it is asked to come again."""


@dataclass(frozen=True)
class Entry:
    """Files that belong together, most often one alone, and the datasets that they turned out to be."""

    name: str
    files: tuple[str, ...]
    """Relative to the data folder."""
    paths: tuple[str, ...]
    identities: tuple[Identity, ...]
    outcome: Future[tuple[Dataset, ...]]
    beside: Beside
    """Other files that they lead to, as far as is known."""
    began: float = 0.0
    """When they were looked at, by the monotonic clock."""

    def reason(self) -> str | None:
        """Why it cannot be read; None where it can, or is not known yet."""
        if not self.outcome.done():
            return None
        error = self.outcome.exception()
        return None if error is None else str(error)

    def datasets(self) -> tuple[Dataset, ...]:
        """Those that are known and can be read."""
        if not self.outcome.done() or self.outcome.exception() is not None:
            return ()
        return self.outcome.result()

    def may_pass(self) -> bool:
        """Whether what is wrong may be over: the operating system refused it, or it changed meanwhile."""
        if not self.outcome.done() or time.monotonic() - self.began < RETRY_SECONDS:
            return False
        error = self.outcome.exception()
        return isinstance(error, Overloaded) or (error is not None and isinstance(error.__cause__, OSError))

    def has_changed(self) -> bool:
        """Whether its files are others now."""
        known = [*zip(self.paths, self.identities, strict=True), *self.beside.copy().items()]
        return any(_identity(path) != identity for path, identity in known)


def _quiet_for(path: str) -> float:
    """Seconds since a file was last written to."""
    try:
        return time.time() - os.stat(path).st_mtime
    except OSError:
        return math.inf


def _identity(path: str) -> Identity | None:
    try:
        return Identity.of(os.stat(path))
    except OSError:
        return None


@dataclass(frozen=True)
class Listed:
    """One line of the catalogue."""

    name: str
    files: tuple[str, ...]
    status: Literal["ok", "unreadable", "preparing"]
    reason: str | None
    dataset: Dataset | None


class Catalog:
    """The datasets below ``settings.data_dir``."""

    def __init__(self, settings: Settings, folder: CacheFolder, hdf5: ReaderPool) -> None:
        self._root = settings.data_dir.resolve()
        self._settings = settings
        self._files = OpenFiles(settings.open_files)
        self._inspector = Inspector(settings.inspect_timeout)
        self._loader = FileLoader(self._root, settings, folder, self._files, self._inspector, hdf5)
        self._executor = ThreadPoolExecutor(2, "h5feed-inspect")
        self._entries: dict[str, Entry] = {}
        self._found: dict[str, tuple[Entry, Dataset, float]] = {}
        self._declaration = b""
        self._scanned = float("-inf")
        self._lock = threading.Lock()
        self._loading = 0
        self._loading_lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="h5feed-watch", daemon=True).start()

    def close(self) -> None:
        """End the threads and the inspector, close the files."""
        self._closed.set()
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._inspector.rest()
        self._loader.close()
        self._files.close()

    def entries(self) -> list[Entry]:
        """All files, by name."""
        self._rescan(time.monotonic() - RESCAN_SECONDS)
        return sorted(self._entries.values(), key=lambda entry: entry.name)

    def listed(self) -> list[Listed]:
        """All datasets, by name, and what can be none."""
        lines = []
        entries = self.entries()
        # Parts of others that are nothing by themselves.
        parts = {path for entry in entries if entry.datasets() for path in entry.beside}
        for entry in entries:
            if entry.paths and not entry.datasets() and parts.issuperset(entry.paths):
                continue
            reason = entry.reason()
            if not entry.outcome.done():
                lines.append(Listed(entry.name, entry.files, "preparing", "it is being inspected and digested", None))
            elif reason is not None:
                lines.append(Listed(entry.name, entry.files, "unreadable", reason, None))
            else:
                lines += [Listed(one.name, one.files, "ok", None, one) for one in entry.datasets()]
        return sorted(lines, key=lambda line: line.name)

    def names(self) -> list[str]:
        """Names of what can be read, as far as is known."""
        return [line.name for line in self.listed() if line.status != "unreadable"]

    def dataset(self, name: str, revision: str | None = None) -> Dataset:
        """The dataset as it is now.

        Raises
        ------
        DatasetNotFound, Unreadable, Overloaded
        RevisionChanged
            It is not `revision` any more.
        """
        found = self._found.get(name)
        if found is None or not self._is_current(name, *found):
            found = self._find(name)
        dataset = found[1]
        if revision is not None and revision != dataset.revision:
            raise RevisionChanged(
                f"dataset {name!r} has revision {dataset.revision} now, not {revision}: its file was changed. Ask for "
                "the dataset again and begin a new epoch."
            )
        return dataset

    def _is_current(self, name: str, entry: Entry, dataset: Dataset, checked: float) -> bool:
        now = time.monotonic()
        if len(entry.paths) + len(entry.beside) > MANY_FILES and now - checked < MANY_FILES_SECONDS:
            return True
        if entry.has_changed():
            return False
        self._found[name] = (entry, dataset, now)
        return True

    def _find(self, name: str) -> tuple[Entry, Dataset, float]:
        """Look for a dataset among the files that are there now."""
        self._found.pop(name, None)
        self._rescan(time.monotonic())
        deadline = time.monotonic() + PATIENCE_SECONDS
        # The entry of that name, or one whose file has several datasets.
        candidates = [e for e in self._entries.values() if name == e.name or name.startswith(f"{e.name}.")]
        candidates += [e for e in self._entries.values() if e not in candidates and len(e.files) > 1]
        failure: FeedError | None = None
        for entry in candidates:
            try:
                datasets = entry.outcome.result(max(0.0, deadline - time.monotonic()))
            except FuturesTimeout:
                failure = Overloaded(f"dataset {name!r} is still being inspected", retry_after=1)
            except Unreadable as error:
                if entry.name == name:
                    failure = Unreadable(f"dataset {name!r} cannot be read: {error.detail}")
            else:
                for dataset in datasets:
                    if dataset.name == name:
                        found = self._found[name] = (entry, dataset, time.monotonic())
                        return found
        if failure is not None:
            raise failure
        names = self.names()
        shown = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
        raise DatasetNotFound(f"there is no dataset {name!r}: valid are {shown or 'none, the data folder is empty'}")

    def _rescan(self, since: float) -> None:
        """Walk the folder, unless a walk began after `since`: many who wait for one share it."""
        with self._lock:
            if self._scanned >= since:
                return
            began = time.monotonic()
            entries: dict[str, Entry] = {}
            try:
                declaration, declared = read_declared(self._root)
            except Unreadable as error:
                declaration, declared = b"", {}
                failed: Future[tuple[Dataset, ...]] = Future()
                failed.set_exception(error)
                entries[DECLARATION] = Entry(DECLARATION, (DECLARATION,), (), (), failed, {})
            for name, files, declared_as in _groups(self._walk(), declared):
                paths = tuple(str(self._root / file) for file in files)
                try:
                    identities = tuple(Identity.of(os.stat(path)) for path in paths)
                except OSError:
                    continue
                known = self._entries.get(name)
                same = known is not None and (known.paths, known.identities) == (paths, identities)
                if known is not None and (not same or known.may_pass() or known.has_changed()):
                    known = None
                if known is None or declaration != self._declaration:
                    with self._loading_lock:
                        self._loading += 1
                    beside: Beside = {}
                    outcome = self._executor.submit(
                        self._load, name, files, paths, identities, beside, declared_as, declaration
                    )
                    known = Entry(name, files, paths, identities, outcome, beside, began)
                entries[name] = known
            for name in [name for name, (entry, _, _) in self._found.items() if entries.get(entry.name) is not entry]:
                self._found.pop(name, None)
            self._entries = entries
            self._declaration = declaration
            self._scanned = began

    def _watch(self) -> None:
        """Have files that appear or change inspected before anybody asks for them.

        Where the system does not tell of changes, as for some network mounts, they are noticed when they are asked for.
        """
        unsettled: set[str] = set()
        ticks = watch(
            self._root,
            watch_filter=lambda _, path: path.lower().endswith((*SUFFIXES, DECLARATION)),
            stop_event=self._closed,
            rust_timeout=int(_WATCH_SECONDS * 1000),
            yield_on_timeout=True,
            raise_interrupt=False,
            ignore_permission_denied=True,
        )
        try:
            for changes in ticks:
                unsettled |= {path for _, path in changes}
                settled = {path for path in unsettled if _quiet_for(path) >= SETTLED_SECONDS}
                if settled:
                    unsettled -= settled
                    self._rescan(time.monotonic())
        except Exception as error:
            logger.warning("the data folder cannot be watched (%s): changes are noticed when they are asked for", error)

    def _walk(self) -> list[str]:
        found = []
        for folder, folders, files in os.walk(self._root):
            folders[:] = sorted(item for item in folders if not item.startswith("."))
            for file in files:
                if file.lower().endswith(SUFFIXES) and not file.startswith("."):
                    found.append(os.path.relpath(os.path.join(folder, file), self._root))
        return sorted(found)

    def _load(
        self,
        name: str,
        files: tuple[str, ...],
        paths: tuple[str, ...],
        identities: tuple[Identity, ...],
        beside: Beside,
        declared: DeclaredDataset | None,
        declaration: bytes,
    ) -> tuple[Dataset, ...]:
        try:
            # It may have waited for long, while a file was being written, for each of its states.
            if any(_identity(path) != identity for path, identity in zip(paths, identities, strict=True)):
                raise changed()
            loaded = [
                self._loader.load(path, identity, beside) for path, identity in zip(paths, identities, strict=True)
            ]
            try:
                return self._datasets(name, files, loaded, declared, declaration)
            except PartMissing as error:
                raise Unreadable(str(error)) from None
            except ValueError as error:
                if len(files) == 1 or declared is not None:
                    raise Unreadable(str(error)) from None
                # Their names look like parts of one dataset, their content does not.
                alone: list[Dataset] = []
                for file, one in zip(files, loaded, strict=True):
                    alone += self._datasets(_dotted(os.path.splitext(file)[0]), (file,), [one], None, declaration)
                return tuple(alone)
        except PASSING as error:
            raise Overloaded(f"dataset {name!r} cannot be looked at now: {error.detail}", retry_after=1) from None
        except FeedError as error:
            logger.warning("%s: %s", ", ".join(files[:3]), error)
            raise
        except OSError as error:
            raise Unreadable(f"{error.strerror or 'it cannot be opened'}") from error
        except Exception:
            logger.exception("%s could not be described", files[0])
            raise Unreadable("describing it failed; the server's log has the reason") from None
        finally:
            with self._loading_lock:
                self._loading -= 1
                idle = not self._loading
            if idle:
                # The children do not outlive their work.
                self._inspector.rest()

    def _datasets(
        self,
        name: str,
        files: tuple[str, ...],
        loaded: Sequence[LoadedFile],
        declared: DeclaredDataset | None,
        declaration: bytes,
    ) -> tuple[Dataset, ...]:
        """The datasets in files that belong together."""
        inspected = []
        alike: Counter[tuple[str | None, str | None]] = Counter()
        for file, one in zip(files, loaded, strict=True):
            stem = os.path.splitext(os.path.basename(file))[0]
            tags = tags_of(stem) if len(files) > 1 else Tags(stem)
            if declared is not None:
                # In the order declared, one after the other, but for those that are splits or halves.
                tags = replace(tags, shard=alike[tags.split, tags.half], shards=1)
                alike[tags.split, tags.half] += 1
            segments = one.segments
            if declared is not None and declared.fields is not None:
                missing = [path for path in declared.fields.values() if path not in segments]
                if missing:
                    raise Unreadable(f"{DECLARATION} names the array {missing[0]!r}, which {file} does not have")
                segments = {field: segments[path] for field, path in declared.fields.items()}
            inspected.append(InspectedFile(segments, tags))
        tables = tables_of(inspected)
        identities = tuple(
            dict.fromkeys(part for one in loaded for segment in one.segments.values() for part in segment.source.key)
        )
        revision = _revision([digest for one in loaded for digest in one.digests], declaration)
        decode = _images_declared(declared, [field.name for table in tables for field in table.fields])
        datasets = []
        reasons: list[str] = []
        for table in tables:
            table.fields[:] = with_packing(table.fields, declared is not None and declared.apply == "scale")
            fields = describe_fields(table, declared.roles if declared else None, decode)
            if not any(field.unreadable is None for field in fields):
                reasons += [f"{field.name}: {field.unreadable}" for field in fields[:5]]
                continue
            label = next((field for field in fields if field.role == "label" and not field.unreadable), None)
            names = class_names(label.array, table.text) if label else None
            main = not table.path or len(tables) == 1
            datasets.append(
                Dataset(
                    name=name if main else f"{name}.{_dotted(table.path)}",
                    files=files,
                    revision=revision,
                    digest_in_full=all(identity.size <= self._settings.digest_limit for identity in identities),
                    rows=table.rows,
                    fields=fields,
                    attributes=loaded[0].layout.attributes,
                    native=declared.native(table.rows) if main and declared and declared.splits else table.native,
                    class_names=declared.class_names if declared and declared.class_names else names,
                    identity=identities,
                    notes=tuple(note for one in loaded for note in one.layout.notes),
                )
            )
        if not datasets:
            raise Unreadable("; ".join(reasons[:5]) or "it holds no arrays")
        return tuple(datasets)


def _images_declared(declared: DeclaredDataset | None, fields: Sequence[str]) -> dict[str, ImageSpec]:
    """What fields are declared to be decoded to.

    Raises
    ------
    Unreadable
        There is no such field, or it cannot be decoded to that.
    """
    found = {}
    for name, images in (declared.decode if declared else {}).items():
        if name not in fields:
            raise Unreadable(f"{DECLARATION} says what {name!r} is decoded to, which is no field: there are {fields}")
        try:
            found[name] = images.spec
        except BadParameter as error:
            raise Unreadable(f"{DECLARATION}: decode.{name}: {error.detail}") from None
    return found


def _revision(digests: Sequence[bytes], declaration: bytes) -> str:
    parts = hashlib.blake2b(digest_size=8)
    parts.update(f"{ORDER_VERSION} {len(declaration)} ".encode() + declaration + b"".join(digests))
    return parts.hexdigest()


def _groups(
    files: list[str], declared: Mapping[str, DeclaredDataset]
) -> list[tuple[str, tuple[str, ...], DeclaredDataset | None]]:
    """Files that belong together, by what is declared and by their names; and the name of what they are."""
    groups: list[tuple[str, tuple[str, ...], DeclaredDataset | None]] = []
    taken: set[str] = set()
    for name, dataset in declared.items():
        matching = tuple(dataset.matching(files))
        if matching:
            groups.append((name, matching, dataset))
            taken.update(matching)
    parts: dict[tuple[str, str], list[tuple[Tags, str]]] = {}
    for file in files:
        tags = tags_of(os.path.splitext(os.path.basename(file))[0])
        if file not in taken and tags.is_part:
            parts.setdefault((os.path.dirname(file), tags.stem.lower()), []).append((tags, file))
    names = {_dotted(os.path.splitext(file)[0]) for file in files} | set(declared)
    for (folder, _), members in parts.items():
        splits = {tags.split for tags, _ in members}
        whole = splits == {None} or ("train" in splits and None not in splits)
        if len(members) < 2 or not whole:
            continue
        stem = members[0][0].stem
        name = _dotted(os.path.join(folder, stem) if stem else folder or "data")
        if name in names:
            continue
        order = (None, "train", "val", "test")
        members.sort(key=lambda member: (order.index(member[0].split), member[0].shard, member[1]))
        groups.append((name, tuple(file for _, file in members), None))
        taken.update(file for _, file in members)
        names.add(name)
    groups += [(name, (file,), None) for name, file in _names([f for f in files if f not in taken]).items()]
    return groups


def _names(files: list[str]) -> dict[str, str]:
    """Name of each file: its path without the ending, dots for slashes; two alike keep their endings."""
    stems: dict[str, list[str]] = {}
    for file in files:
        stems.setdefault(_dotted(os.path.splitext(file)[0]), []).append(file)
    return {(stem if len(alike) == 1 else _dotted(file)): file for stem, alike in stems.items() for file in alike}


def _dotted(path: str) -> str:
    return shown(Path(path).as_posix().replace("/", "."))


def shown(path: str) -> str:
    """A path as it can travel: names that are no UTF-8 fit neither in a URL nor in JSON."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _advice(field: Field) -> str | None:
    """What to do about a field whose shuffled batches are dear."""
    if field.read_amplification < _DEAR or field.unreadable:
        return None
    rows = field.array.chunk_shape[0] if field.array.chunk_shape else 1
    return (
        f"a shuffled batch decodes {field.read_amplification:.0f} bytes for each it serves, unless they are in the "
        f"cache of chunks: shuffle with window={64 * rows}, or lay the file out for it once: h5feed-server build "
        "OLD.h5 -o NEW.h5"
    )


def _describe_images(field: Field) -> dict[str, Any] | None:
    """What images are decoded to, and the fingerprint of what this server's decoder makes of some."""
    if field.images is None or field.unreadable:
        return None
    # Loads OpenCV, which many servers need not.
    from h5feed.decode import fingerprint

    return {**field.images.about(), "decoder": fingerprint()}


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
                "dtype": field.type_name,
                "ragged": field.is_ragged,
                "rows": field.column.rows,
                "readable": field.unreadable is None,
                "reason": field.unreadable,
                "note": field.note,
                "stored_dtype": array.dtype,
                "chunks": list(array.chunk_shape) if array.chunk_shape else None,
                "filters": [item.name for item in array.filters],
                "pieces": len(field.column.segments),
                "stored_bytes": sum(segment.array.stored_bytes for segment in field.column.segments),
                "logical_bytes": field.column.nbytes,
                "enum": array.enum_names,
                "attributes": array.attributes,
                "decode": _describe_images(field),
                "decoded_per_served_byte": round(field.read_amplification, 3),
                "advice": _advice(field),
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
        "native_splits": [
            {"name": split, "rows": sum(end - begin for begin, end in runs)} for split, runs in dataset.native.items()
        ],
        "files": [shown(file) for file in dataset.files],
        "notes": list(dataset.notes),
        "attributes": dataset.attributes,
    }
