"""What is served: finds the HDF5 files below the data folder, has them inspected, and notices when they change."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FuturesTimeout
from dataclasses import dataclass
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
from .grouping import alike, fuel, weights
from .grouping.classes import InDoubt
from .grouping.families import Family, alone, dotted, families, glob_of, shown
from .grouping.pieces import Hints, InspectedFile
from .grouping.tables import PartMissing, tables_of
from .loading import PASSING, Beside, FileLoader, LoadedFile
from .roles import class_names

logger = logging.getLogger(__name__)

SUFFIXES = (".h5", ".hdf5", ".hdf", ".he5")
RESCAN_SECONDS = 1.0
"""A listing may be this old. An unknown or changed name is always looked for anew."""

MANY_FILES = 4
MANY_FILES_SECONDS = 0.05
FILE_SECONDS = 100e-6
"""The files of a dataset of more files are looked at this often, and not for every request; of very many, after so long
for each of them."""

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
class Refused:
    """What might be a dataset, and why it is none."""

    files: tuple[str, ...]
    reason: str


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
    refused: dict[str, Refused] = dataclasses.field(default_factory=dict)
    """What of them cannot be served though other of it can, by name; as far as is known."""
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
                lines += [
                    Listed(name, one.files, "unreadable", one.reason, None) for name, one in entry.refused.items()
                ]
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
        files = len(entry.paths) + len(entry.beside)
        if files > MANY_FILES and now - checked < max(MANY_FILES_SECONDS, files * FILE_SECONDS):
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
                if name in entry.refused:
                    failure = Unreadable(f"dataset {name!r} cannot be read: {entry.refused[name].reason}")
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
            for family in families(self._walk(), declared):
                name, files = family.name, family.files
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
                    refused: dict[str, Refused] = {}
                    outcome = self._executor.submit(self._load, family, paths, identities, beside, refused, declaration)
                    known = Entry(name, files, paths, identities, outcome, beside, refused, began)
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
        family: Family,
        paths: tuple[str, ...],
        identities: tuple[Identity, ...],
        beside: Beside,
        refused: dict[str, Refused],
        declaration: bytes,
    ) -> tuple[Dataset, ...]:
        name, files = family.name, family.files
        try:
            # It may have waited for long, while a file was being written, for each of its states.
            if any(_identity(path) != identity for path, identity in zip(paths, identities, strict=True)):
                raise changed()
            loaded: dict[str, LoadedFile] = {}
            failed: dict[str, Unreadable] = {}
            for file, path, identity in zip(files, paths, identities, strict=True):
                try:
                    loaded[file] = self._loader.load(path, identity, beside)
                except Unreadable as error:
                    if family.kind not in ("numbers", "words"):
                        raise
                    failed[file] = error
            return self._divided(family, loaded, failed, refused, declaration)
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

    def _divided(
        self,
        family: Family,
        loaded: Mapping[str, LoadedFile],
        failed: Mapping[str, Unreadable],
        refused: dict[str, Refused],
        declaration: bytes,
    ) -> tuple[Dataset, ...]:
        """The datasets in the files of a family: one of all, or those of each file."""
        notes: tuple[str, ...] = ()
        together = family.kind != "alone"
        hints = Hints()
        if family.declared is not None:
            hints = Hints(family.declared.stack, family.declared.classes, family.declared.episodes)
        elif family.kind in ("numbers", "words"):
            try:
                verdict = _verdict(family, loaded)
            except InDoubt as error:
                raise Unreadable(_in_doubt(str(error), family.name, family.files, "stack")) from None
            together = verdict.kind != "apart"
            notes = (verdict.note,) if verdict.note else ()
            hints = Hints(stack=verdict.kind == "samples" or None, classes=verdict.kind == "classes" or None)
            if together and failed:
                file, first = next(iter(failed.items()))
                raise Unreadable(f"{shown(file)}, one of its {len(family.files)} files, cannot be read: {first.detail}")
        if together:
            try:
                return self._datasets(family, list(loaded.values()), hints, refused, declaration, notes)
            except PartMissing as error:
                raise Unreadable(str(error)) from None
            except ValueError as error:
                if family.declared is not None:
                    raise Unreadable(str(error)) from None
        # Their names look like parts of one dataset, their content does not.
        found: list[Dataset] = []
        for one in alone(family.files):
            try:
                if one.files[0] in failed:
                    raise failed[one.files[0]]
                found += self._datasets(one, [loaded[one.files[0]]], Hints(), refused, declaration, notes)
            except (Unreadable, ValueError) as error:
                reason = error.detail if isinstance(error, Unreadable) else str(error)
                refused[one.name] = Refused(one.files, reason)
                if family.kind == "alone":
                    raise Unreadable(reason) from None
                logger.warning("%s: %s", one.files[0], reason)
        return tuple(found)

    def _datasets(
        self,
        family: Family,
        loaded: Sequence[LoadedFile],
        hints: Hints,
        refused: dict[str, Refused],
        declaration: bytes,
        notes: tuple[str, ...],
    ) -> tuple[Dataset, ...]:
        """The datasets in files that belong together.

        Raises
        ------
        Unreadable
            There is none.
        ValueError
            The files do not fit together.
        """
        name, files, declared = family.name, family.files, family.declared
        for file, one in zip(files, loaded, strict=True):
            if declared is None and (reason := weights.reason_for(one.layout.attributes, one.segments)):
                raise Unreadable(reason if len(files) == 1 else f"{shown(file)}: {reason}")
        inspected = _inspected(family, loaded)
        tables = tables_of(inspected, hints)
        if len(loaded) == 1:
            fuel.apply(loaded[0].layout.attributes.get(fuel.ATTRIBUTE), tables)
        identities = tuple(
            dict.fromkeys(part for one in loaded for segment in one.segments.values() for part in segment.source.key)
        )
        # What rows and classes are called is served as well.
        called = family.rows if hints.stack or hints.classes else ()
        revision = _revision([digest for one in loaded for digest in one.digests], declaration, called)
        decode = _images_declared(declared, [field.name for table in tables for field in table.fields])
        notes = (*dict.fromkeys(note for one in loaded for note in one.layout.notes), *notes)
        datasets = []
        reasons: list[str] = []
        for table in tables:
            main = not table.path or len(tables) == 1
            own = name if main else f"{name}.{dotted(table.path)}"
            if table.problem is not None:
                refused[own] = Refused(files, _in_doubt(table.problem, name, files, "classes"))
                reasons.append(refused[own].reason)
                continue
            fields = describe_fields(table, declared.roles if declared else None, decode)
            if not any(field.unreadable is None for field in fields):
                reasons += [f"{field.name}: {field.unreadable}" for field in fields[:5]]
                continue
            label = next((field for field in fields if field.role == "label" and not field.unreadable), None)
            names = class_names(label.array, table.text) if label else None
            if table.class_names is not None:
                names = list(table.class_names)
            datasets.append(
                Dataset(
                    name=own,
                    files=files,
                    revision=revision,
                    digest_in_full=all(identity.size <= self._settings.digest_limit for identity in identities),
                    rows=table.rows,
                    fields=fields,
                    attributes=loaded[0].layout.attributes,
                    native=declared.native(table.rows) if main and declared and declared.splits else table.native,
                    class_names=declared.class_names if declared and declared.class_names else names,
                    identity=identities,
                    notes=(*notes, *table.notes),
                )
            )
        if not datasets:
            raise Unreadable("; ".join(reasons[:5]) or "it holds no arrays")
        return tuple(datasets)


def _inspected(family: Family, loaded: Sequence[LoadedFile]) -> list[InspectedFile]:
    """The arrays of each file, by the names that are declared for them.

    Raises
    ------
    Unreadable
        One is declared that is not there.
    """
    inspected = []
    for file, tags, row, one in zip(family.files, family.tags, family.rows, loaded, strict=True):
        segments = one.segments
        if family.declared is not None and family.declared.fields is not None:
            missing = [path for path in family.declared.fields.values() if path not in segments]
            if missing:
                raise Unreadable(f"{DECLARATION} names the array {missing[0]!r}, which {shown(file)} does not have")
            segments = {name: segments[path] for name, path in family.declared.fields.items()}
        inspected.append(InspectedFile(segments, tags, shown(row)))
    return inspected


def _verdict(family: Family, loaded: Mapping[str, LoadedFile]) -> alike.Verdict:
    """What files are to each other whose names are alike."""
    there = [place for place, file in enumerate(family.files) if file in loaded]
    files = [
        InspectedFile(loaded[family.files[place]].segments, family.tags[place], family.rows[place]) for place in there
    ]
    if len(files) < 2 or any(weights.reason_for(one.layout.attributes, one.segments) for one in loaded.values()):
        return alike.APART
    return alike.of_words(files) if family.kind == "words" else alike.of_numbers(files, family.files)


def _in_doubt(reason: str, name: str, files: Sequence[str], key: Literal["stack", "classes"]) -> str:
    """Why something is not served, and the lines that decide."""
    line = f"datasets.{json.dumps(name)} = {{ files = [{json.dumps(shown(glob_of(files)))}], {key} = "
    ways = {"stack": ("one row a file", "rows along the first axis"), "classes": ("one class each", "fields")}[key]
    lines = f"{line}true }} ({ways[0]}) or {line}false }} ({ways[1]})"
    return f"{reason}. One of these lines in {DECLARATION} decides: {lines}"


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


def _revision(digests: Sequence[bytes], declaration: bytes, called: Sequence[str] = ()) -> str:
    parts = hashlib.blake2b(digest_size=8)
    parts.update(f"{ORDER_VERSION} {len(declaration)} ".encode() + declaration + b"".join(digests))
    if called:
        parts.update(json.dumps(called).encode())
    return parts.hexdigest()


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
