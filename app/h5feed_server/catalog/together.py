"""Inspects the files of one dataset in groups: a process for each of thousands of small files takes long to start.

HDF5's library may corrupt its memory while it reads one file, and get others wrong after that. So a group never has
files of several datasets, and its results are used only if all of its files are fine. Else each is inspected by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import islice

from h5feed.stored.layout import FileLayout
from h5feed.stored.local_file import Identity

from ..storage.hdf5.inspector import MOST_TOGETHER, Inspector


class Together:
    """Inspects files of one dataset; used by one thread.

    Parameters
    ----------
    inspector : Inspector
    load : callable
        Loads their layouts, see `Inspector.inspect_together`.
    files : iterable of (str, Identity)
        Their paths and identities, in the order in which they will be inspected, if they are.
    """

    def __init__(
        self, inspector: Inspector, load: Callable[[bytes], FileLayout], files: Iterable[tuple[str, Identity]]
    ) -> None:
        self._inspector = inspector
        self._load = load
        self._left = dict(files)
        """Files that were not inspected."""
        self._found: dict[str, bytes] = {}
        """Layouts of files that were inspected, until they are asked for."""

    def inspect(self, path: str) -> bytes:
        """Return the layout of a file, see `Inspector.inspect`. The next ones are inspected with it."""
        if path in self._left:
            self._inspect_from(path)
        layout = self._found.pop(path, None)
        return self._inspector.inspect(path) if layout is None else layout

    def _inspect_from(self, path: str) -> None:
        """Inspect a file and those that follow, if they can be inspected together."""
        while (first := next(iter(self._left))) != path:
            # Its layout was known.
            del self._left[first]
        now = time.time()
        # The results are used later. By then, a young file could have changed without another identity.
        old = (one for one, identity in self._left.items() if not identity.is_young(now))
        group = [*islice(old, MOST_TOGETHER)]
        if group[:1] == [path] and len(group) > 1:
            found = self._inspector.inspect_together(group, self._load)
            for one in group if found is None else found:
                del self._left[one]
            self._found = found or {}
        self._left.pop(path, None)
