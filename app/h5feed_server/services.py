"""What every endpoint needs, built once per process from the settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from h5feed.stored import io_ring
from h5feed.stored.byte_cache import ByteCache

from .batches.batcher import Batcher
from .cache_folder.folder import CacheFolder
from .catalog.catalog import Catalog
from .jobs.registry import NO_SCRATCH, Jobs
from .keys.key_index import KeyIndexes
from .keys.partners import Partners
from .settings import Settings
from .sharing.body_pool import BodyPool
from .sharing.fair_threads import FairThreads
from .sharing.metrics import Catalogue, Metrics
from .sharing.scoreboard import Scoreboard
from .sharing.traffic import Traffic
from .sharing.trimming import GivesBack
from .stats.row_checks import Checker
from .stats.row_search import RowSearch
from .stats.service import Statistics
from .storage.hdf5.browser import Browser
from .storage.hdf5.reader_pool import ReaderPool
from .storage.reader import Reader

_PAGE_THREADS = 2
"""Threads for pages that one caller may use; there are more for others, see `FairThreads`."""


@dataclass(frozen=True)
class Shared:
    """What a worker is given by the process that started it: the scoreboard, its place on it, and a folder for what is
    forgotten when the server stops.
    """

    board: Scoreboard
    place: int
    scratch: Path = NO_SCRATCH

    @classmethod
    def alone(cls) -> Shared:
        """For an application without a supervisor."""
        board = Scoreboard(1)
        board.occupy(1, os.getpid())
        return cls(board, 1)


@dataclass(frozen=True)
class Services:
    """The long-lived objects of a serving process."""

    settings: Settings
    catalog: Catalog
    batcher: Batcher
    statistics: Statistics
    search: RowSearch
    keys: KeyIndexes
    checks: Checker
    jobs: Jobs
    pool: BodyPool
    threads: FairThreads
    page_threads: FairThreads
    """For what reads no rows, such as listings and the progress of jobs: it is there when all others are busy."""
    hdf5: ReaderPool
    browser: Browser
    folder: CacheFolder
    memory: GivesBack
    traffic: Traffic
    metrics: Metrics

    @classmethod
    def start(
        cls,
        settings: Settings,
        only: Sequence[str] | None = None,
        *,
        numbers: Catalogue | None = None,
        shared: Shared | None = None,
    ) -> Services:
        """Build everything and begin to inspect the data folder, or `only` some files of it (default: what the settings
        say).

        Parameters
        ----------
        numbers : Catalogue, optional
            Of the metrics to count; by default, those without endpoints.
        shared : Shared, optional
            Where they are published.
        """
        if not settings.io_uring:
            io_ring.allow(False)
        # A lock's holder may be hashing a file of the size of the digest limit.
        folder = CacheFolder(
            settings.cache_dir, timeout=10 * settings.read_timeout, max_bytes=settings.disk_cache_bytes
        )
        hdf5 = ReaderPool(settings.readers, settings.read_timeout, settings.max_body_bytes)
        browser = Browser(settings.readers, settings.read_timeout, settings.max_body_bytes)
        catalog = Catalog(settings, folder, hdf5, settings.only if only is None else only)
        reader = Reader(
            len(os.sched_getaffinity(0)),
            ByteCache(settings.cache_bytes, settings.read_timeout),
            settings.chunk_cache_bytes,
            settings.read_timeout,
            hdf5,
            settings.max_body_bytes,
        )
        threads = FairThreads(settings.request_threads, "h5feed-request", settings.idle_seconds)
        page_threads = FairThreads(_PAGE_THREADS, "h5feed-page", settings.idle_seconds)
        threads.submit(catalog.entries)
        shared = shared or Shared.alone()
        jobs = Jobs(folder.path / "jobs", settings.job_patience, shared.scratch)
        keys = KeyIndexes(catalog, reader, folder, jobs, settings.read_timeout)
        partners = Partners(catalog, keys, folder, jobs, settings.order_cache_bytes, settings.read_timeout)
        batcher = Batcher(settings, catalog, reader, folder, jobs, partners)
        statistics = Statistics(catalog, batcher, folder, jobs, settings.max_job_bytes)
        search = RowSearch(catalog, reader, folder, jobs, settings.read_timeout)
        checks = Checker(catalog, batcher, folder, jobs, settings.read_timeout, settings.max_job_bytes)
        traffic = Traffic(folder.path / "traffic", lambda: reader.decoded_bytes)
        pool = BodyPool(settings.inflight_bytes)

        def let_go(seconds: float) -> None:
            batcher.drop_old(seconds)
            catalog.drop_old(seconds)
            search.drop_old(seconds)
            keys.drop_old(seconds)
            pool.drop_idle()
            browser.rest()

        metrics = Metrics(numbers or Catalogue((), ()), shared.board, shared.place)
        metrics.watch(partial(_sizes, settings, catalog, batcher, pool, threads, hdf5, browser))
        memory = GivesBack(settings.idle_seconds, pool.idle_seconds, let_go)
        return cls(
            settings,
            catalog,
            batcher,
            statistics,
            search,
            keys,
            checks,
            jobs,
            pool,
            threads,
            page_threads,
            hdf5,
            browser,
            folder,
            memory,
            traffic,
            metrics,
        )

    @cached_property
    def is_guarded(self) -> bool:
        """See `Settings.is_guarded`; asked for each batch."""
        return self.settings.is_guarded

    def close(self, *, wait: bool = False) -> None:
        """End all threads, files and child processes.

        Parameters
        ----------
        wait : bool
            Return only when nothing looks at a file, or writes to the cache folder, any more.
        """
        self.memory.close()
        self.traffic.close()
        self.metrics.close()
        for threads in (self.threads, self.page_threads):
            threads.shutdown(wait=wait, cancel_futures=True)
        self.jobs.close()
        self.batcher.reader.close()
        self.catalog.close(wait=wait)
        self.hdf5.close()
        self.browser.close()
        self.folder.close()


def _sizes(
    settings: Settings,
    catalog: Catalog,
    batcher: Batcher,
    pool: BodyPool,
    threads: FairThreads,
    hdf5: ReaderPool,
    browser: Browser,
) -> dict[tuple[str, str | None], float | list[float]]:
    """What a worker holds and has done, as far as its parts count it themselves. See `Metrics.watch`."""
    reader, inspections = batcher.reader, catalog.inspections
    found: dict[tuple[str, str | None], float | list[float]] = {
        ("decoded_chunks_total", None): reader.decoded_chunks,
        ("decoded_bytes_total", None): reader.decoded_bytes,
        ("inflight_bytes", None): sum(pool.held().values()),
        ("inflight_limit_bytes", None): settings.inflight_bytes,
        ("inflight_waiting_requests", None): pool.waiting,
        ("request_threads_busy", None): threads.busy,
        ("inspections_total", "ok"): inspections.succeeded,
        ("inspections_total", "failed"): inspections.failed,
        ("inspections_pending", None): inspections.left,
    }
    for name, usage in batcher.cache_usage().items():
        found["cache_bytes", name] = usage.nbytes
        found["cache_limit_bytes", name] = usage.max_bytes
        found["cache_hits_total", name] = usage.hits
        found["cache_misses_total", name] = usage.misses
    for name, children in (("rows", hdf5.children), ("tree", browser.children)):
        running, busy = children.count()
        found["readers_running", name] = running
        found["readers_busy", name] = busy
        found["reader_failures_total", name] = children.failures
    found.update(catalog.stores.numbers())
    return found
