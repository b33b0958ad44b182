"""Folders whose files stand for the objects of stores."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from h5feed.errors import Overloaded, Unreadable
from h5feed.stored.layout import ArrayLayout
from h5feed.stored.local_file import Identity

from ..settings import Settings
from ..sharing.metrics import STORE_OUTCOMES
from ..storage.hdf5.drivers import driver_of
from ..storage.hdf5.inspector import Inspector
from ..storage.objects.claims import Claims
from ..storage.objects.fetching_ahead import FetchingAhead
from ..storage.objects.listing import Listing, stored_object
from ..storage.objects.object_file import ObjectFile
from ..storage.objects.range_cache import RangeCache
from ..storage.objects.request_rate import RequestRate
from ..storage.objects.store import MOST_SLOW, ObjectStore
from ..store_address import STORES, StoreAddress
from ..suffixes import ALL_SUFFIXES
from . import declared

logger = logging.getLogger(__name__)

_TIMEOUT_SHARE = 1 / 3
"""A range may take this share of the time limit of a request, so that the client gets the reason."""

_FIRST_SECONDS = 10.0
"""How long a scan waits for the first listing."""


Numbers = dict[tuple[str, str | None], float | list[float]]
"""Of metrics, by name and value of the label."""


class ObjectFolders:
    """The stores that a process serves. Together, they keep to the bounds of the settings.

    Parameters
    ----------
    settings : Settings
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._below = f"{settings.cache_dir.resolve() / STORES}{os.sep}"
        self._open: tuple[ObjectFolder, ...] = ()
        self._ended: Numbers = {}
        """What was counted of those that are closed."""
        self._lock = threading.Lock()

    @cached_property
    def _cache(self) -> RangeCache | None:
        kept = self._settings.store_cache_bytes
        return RangeCache(self._settings.cache_dir / "ranges", kept) if kept else None

    @cached_property
    def _ahead(self) -> FetchingAhead:
        is_alone = self._settings.workers == 1
        claims = None if is_alone or self._cache is None else _claims(self._settings.cache_dir, self._timeout)
        return FetchingAhead(self._cache, self._settings.store_ahead_bytes, claims, is_alone)

    @cached_property
    def _rate(self) -> RequestRate:
        return RequestRate(self._settings.store_request_rate / self._settings.workers)

    @property
    def _timeout(self) -> float:
        return self._settings.read_timeout * _TIMEOUT_SHARE

    def open(self, address: StoreAddress, mount: str = "", listing_seconds: float | None = None) -> ObjectFolder:
        """Begin to serve a store.

        Parameters
        ----------
        address : StoreAddress
        mount : str
            The name below which its datasets are served; empty if there is nothing else.
        listing_seconds : float, optional
            Seconds between listings; by default, those of the settings.

        Raises
        ------
        BadParameter
            The store cannot be used with this installation and environment.
        """
        store = ObjectStore(
            address,
            self._timeout,
            self._cache,
            ahead=self._ahead,
            rate=self._rate,
            # Other sources need threads while a whole store does not answer.
            most_slow=max(MOST_SLOW, self._settings.request_threads // 4) if mount else None,
        )
        folder = ObjectFolder(store, address, self._settings, mount, listing_seconds or self._settings.listing_seconds)
        with self._lock:
            self._open = (*self._open, folder)
        return folder

    def end(self, folder: ObjectFolder) -> None:
        """Cease to serve a store. What reads from it gets SourceUnavailable."""
        with self._lock:
            self._open = tuple(one for one in self._open if one is not folder)
            self._ended = _added([self._ended, folder.numbers()])
            # Those that are under way are given up.
            self._ended["store_requests_running", None] = 0
        # Nobody is to wait for that.
        threading.Thread(target=folder.close, name="h5feed-end", daemon=True).start()

    def close(self) -> None:
        """Cease to serve all stores."""
        if self._open:
            for folder in self._open:
                folder.close()
            self._ahead.close()

    def of(self, path: str) -> ObjectFolder | None:
        """The store of the object that a file stands for; None if it is an ordinary file.

        Raises
        ------
        Overloaded
            It stands for an object of a store that is not served any more.
        """
        if not path.startswith(self._below):
            return None
        for folder in self._open:
            if path.startswith(folder.below):
                return folder
        raise Overloaded("its object store is not served any more", retry_after=1)

    def root_of(self, path: str, otherwise: Path) -> Path:
        """The folder of the store of an object; `otherwise` for ordinary files."""
        if not path.startswith(self._below):
            return otherwise
        return next((folder.root for folder in self._open if path.startswith(folder.below)), Path(self._below))

    def drop_old(self, seconds: float) -> None:
        """Drop what was fetched for orders that nobody has read for this many seconds."""
        if self._open:
            self._ahead.drop_old(seconds)

    def troubles(self) -> list[str]:
        """A phrase for each store that could not be listed the last time, with the reason."""
        found = ((folder.called, folder.trouble()) for folder in self._open)
        return [f"{called} cannot be listed: {trouble}" for called, trouble in found if trouble is not None]

    def numbers(self) -> Numbers:
        """What this process has asked stores for; empty if it has served none."""
        with self._lock:
            found = _added([self._ended, *(folder.numbers() for folder in self._open)])
        if found and (cache := self._cache) is not None:
            found["store_cache_hits_total", None] = cache.hits
            found["store_cache_read_bytes_total", None] = cache.hit_bytes
        return found

    def shared_numbers(self) -> dict[str, float]:
        """What all processes of the server have in common, by metric; empty without stores."""
        if not self._open:
            return {}
        found = {"store_cache_bytes": 0.0 if self._cache is None else self._cache.used_bytes()}
        if listed := [moment for folder in self._open if (moment := folder.listed()) is not None]:
            found["store_listed_timestamp_seconds"] = min(listed)
        return found


class ObjectFolder:
    """The objects of one store, and the folder with a file for each of them.

    Parameters
    ----------
    store : ObjectStore
    address : StoreAddress
        That of the store.
    settings : Settings
    mount : str
        See `ObjectFolders.open`.
    listing_seconds : float

    Attributes
    ----------
    root : Path
        The folder, without links in its path.
    below : str
        How the paths of files in it begin.
    called : str
        The store, in messages.
    """

    def __init__(
        self, store: ObjectStore, address: StoreAddress, settings: Settings, mount: str, listing_seconds: float
    ) -> None:
        self._store = store
        self.root = address.folder(settings.cache_dir).resolve()
        with contextlib.suppress(OSError):
            # Whoever watches it may come before the first listing, which tells if this fails.
            self.root.mkdir(parents=True, exist_ok=True)
        self.below = f"{self.root}{os.sep}"
        self.called = f"the object store {mount!r}" if mount else "the object store"
        self._listing = Listing(
            store,
            self.root,
            address.only or None,
            ALL_SUFFIXES,
            listing_seconds,
            settings.digest_limit,
            # One byte more shows that it is too long.
            {} if address.only else {declared.NAME: declared.MAX_BYTES + 1},
            self.called,
        )

    def close(self) -> None:
        """Stop listing, and give up what is being fetched."""
        self._listing.close()
        self._store.close()
        self._listing.join()

    def why_not_listed(self, seconds: float = _FIRST_SECONDS) -> str | None:
        """Why the objects are not known; None if they are. Waits for the first listing."""
        return self._listing.wait(seconds)

    def trouble(self) -> str | None:
        """Why the store could not be listed the last time; None if it could."""
        return self._listing.trouble()

    def listed(self) -> float | None:
        """When the last listing began, in seconds of Unix time; None if there was none."""
        return self._listing.listed()

    def numbers(self) -> Numbers:
        """What this process has asked the store for."""
        traffic = self._store.traffic
        found: Numbers = {("store_requests_total", outcome): traffic.outcomes[outcome] for outcome in STORE_OUTCOMES}
        found["store_request_duration_seconds", None] = list(traffic.durations)
        found["store_read_bytes_total", None] = traffic.nbytes
        found["store_requests_running", None] = traffic.running
        return found

    def source(self, path: str, identity: Identity) -> ObjectFile:
        """The object that a file stands for.

        Raises
        ------
        RevisionChanged, Overloaded
            The file has changed.
        """
        return ObjectFile(self._store, stored_object(path, identity), path, identity)

    def inspect(self, inspector: Inspector, path: str, identity: Identity) -> bytes:
        """The layout of the object, see `Inspector.inspect`."""
        source = self.source(path, identity)

        def head_of(_: str, nbytes: int) -> bytes:
            head = bytearray(min(nbytes, source.object.size))
            source.fill(-1, 0, memoryview(head))
            return bytes(head)

        if (driver := driver_of(path, head_of)) is not None:
            raise Unreadable(
                f"it is a part of a file in several parts (HDF5's {driver} driver), which is not read from an object "
                "store: copy it with h5repack to have it as one"
            )
        return inspector.inspect_remote(source)


def _added(several: Sequence[Numbers]) -> Numbers:
    """The sums of some numbers."""
    total: Numbers = {}
    for numbers in several:
        for key, value in numbers.items():
            before = total.get(key)
            if isinstance(value, list):
                earlier = before if isinstance(before, list) else [0.0] * len(value)
                total[key] = [one + other for one, other in zip(earlier, value, strict=True)]
            else:
                total[key] = value + (before if isinstance(before, (int, float)) else 0)
    return total


def _claims(folder: Path, timeout: float) -> Claims | None:
    try:
        return Claims(folder / "claims", timeout)
    except OSError as error:
        logger.warning("workers may fetch the same ranges twice: %s", error.strerror or error)
        return None


def why_not_remote(array: ArrayLayout) -> str | None:
    """Why an array cannot be read from an object store; None if it can."""
    if array.unreadable is None and array.external is not None:
        return "its data is in another file, which is not read from an object store"
    return None
