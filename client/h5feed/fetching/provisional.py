"""Fetch with a local cache, once the content of the data is known: nothing on disk has a provisional name."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from ..batch import Batch
from ..blocks import Block, Fetch
from ..net.names import Names

logger = logging.getLogger("h5feed.cache")


class LaterCached:
    """A function that fetches blocks: without the cache as long as the revision has a provisional name only.

    Parameters
    ----------
    fetch : callable
        Fetches without the cache.
    with_cache : callable
        ``with_cache(content)`` returns the function that uses the cache of this revision.
    names : Names
    provisional : str
        The name by which the data are known so far.
    dataset : str
        Name of the dataset, for the log.
    """

    def __init__(
        self,
        fetch: Fetch[Batch],
        with_cache: Callable[[str], Fetch[Batch]],
        names: Names,
        provisional: str,
        dataset: str,
    ) -> None:
        self._fetch = fetch
        self._with_cache = with_cache
        self._names = names
        self._provisional = provisional
        self._cached: Fetch[Batch] | None = None
        self._lock = threading.Lock()
        logger.warning(
            "rows of %r are not cached yet: its revision %s is provisional until the server has hashed its files",
            dataset,
            provisional,
        )

    def __call__(self, block: Block, cancelled: threading.Event) -> list[Batch]:
        content = self._names.current(self._provisional)
        if content == self._provisional:
            return self._fetch(block, cancelled)
        with self._lock:
            if self._cached is None:
                self._cached = self._with_cache(content)
        return self._cached(block, cancelled)
