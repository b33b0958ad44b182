"""A data folder whose files stand for the objects of a store."""

from __future__ import annotations

import logging
from pathlib import Path

from h5feed.errors import Unreadable
from h5feed.stored.layout import ArrayLayout
from h5feed.stored.local_file import Identity

from ..settings import Settings
from ..sharing.metrics import STORE_OUTCOMES
from ..storage.hdf5.drivers import driver_of
from ..storage.hdf5.inspector import Inspector
from ..storage.objects.claims import Claims
from ..storage.objects.listing import Listing, stored_object
from ..storage.objects.object_file import ObjectFile
from ..storage.objects.range_cache import RangeCache
from ..storage.objects.store import ObjectStore
from ..suffixes import ALL_SUFFIXES
from . import declared

logger = logging.getLogger(__name__)

_TIMEOUT_SHARE = 1 / 3
"""A range may take this share of the time limit of a request, so that the client gets the reason."""

_FIRST_SECONDS = 10.0
"""How long a scan waits for the first listing."""


class ObjectFolder:
    """The objects of the store that is served; one per process.

    Parameters
    ----------
    settings : Settings
        Those of a server for an object store.
    """

    def __init__(self, settings: Settings) -> None:
        assert settings.store is not None
        only = settings.only[0] if settings.only else None
        kept = settings.store_cache_bytes
        cache = RangeCache(settings.cache_dir / "ranges", kept) if kept else None
        timeout, is_alone = settings.read_timeout * _TIMEOUT_SHARE, settings.workers == 1
        self._store = ObjectStore(
            settings.store,
            timeout,
            cache,
            ahead_bytes=settings.store_ahead_bytes,
            request_rate=settings.store_request_rate / settings.workers,
            claims=None if is_alone or cache is None else _claims(settings.cache_dir, timeout),
            is_alone=is_alone,
        )
        self._listing = Listing(
            self._store,
            settings.data_dir,
            only,
            ALL_SUFFIXES,
            settings.listing_seconds,
            settings.digest_limit,
            # One byte more shows that it is too long.
            {} if only else {declared.NAME: declared.MAX_BYTES + 1},
        )

    def close(self) -> None:
        """Stop listing, and give up what is being fetched."""
        self._listing.close()
        self._store.close()
        self._listing.join()

    def drop_old(self, seconds: float) -> None:
        """Drop what was fetched for orders that nobody has read for this many seconds."""
        self._store.ahead.drop_old(seconds)

    def why_not_listed(self) -> str | None:
        """Why the objects are not known; None if they are."""
        return self._listing.wait(_FIRST_SECONDS)

    def trouble(self) -> str | None:
        """Why the store could not be listed the last time; None if it could."""
        return self._listing.trouble()

    def numbers(self) -> dict[tuple[str, str | None], float | list[float]]:
        """What this process has asked the store for, by metric and value of its label."""
        traffic, cache = self._store.traffic, self._store.cache
        found: dict[tuple[str, str | None], float | list[float]] = {
            ("store_requests_total", outcome): traffic.outcomes[outcome] for outcome in STORE_OUTCOMES
        }
        found["store_request_duration_seconds", None] = list(traffic.durations)
        found["store_read_bytes_total", None] = traffic.nbytes
        found["store_requests_running", None] = traffic.running
        if cache is not None:
            found["store_cache_hits_total", None] = cache.hits
            found["store_cache_read_bytes_total", None] = cache.hit_bytes
        return found

    def shared_numbers(self) -> dict[str, float]:
        """What all processes of the server have in common, by metric."""
        cache = self._store.cache
        found = {"store_cache_bytes": 0.0 if cache is None else cache.used_bytes()}
        if (listed := self._listing.listed()) is not None:
            found["store_listed_timestamp_seconds"] = listed
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
