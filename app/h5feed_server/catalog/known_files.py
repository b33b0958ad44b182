"""What is known of many files, in one file of the cache folder: reading thousands of small ones takes long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

import numpy as np
from h5feed.stored.array_file import dump_arrays, load_arrays
from h5feed.stored.layout import FileLayout, load_layout
from h5feed.stored.local_file import Identity

MANY = 16
"""A dataset of at least this many files has what is known of them in one place."""

SAVED_AFTER = 1000
"""Files that are learned before all that is known is saved, or half of those that are known, if these are more. So much
is lost if the server is killed."""


class KnownFiles:
    """Digests and layouts of files, by identity; shared by threads. Files with equal layouts share them.

    Parameters
    ----------
    data : bytes or None
        What was saved earlier; None if nothing was.
    save : callable
        Saves bytes.
    """

    def __init__(self, data: bytes | None, save: Callable[[bytes], None]) -> None:
        self._save = save
        self._files: dict[Identity, tuple[bytes, int]] = {}
        self._numbers: dict[bytes, int] = {}
        self._by_digest: dict[bytes, int] = {}
        self._layouts: list[bytes] = []
        self._loaded: dict[int, FileLayout] = {}
        self._unsaved = 0
        self._lock = threading.Lock()
        if data is not None:
            self._load(data)

    def covers(self, identities: Iterable[Identity]) -> bool:
        """Whether the layouts of all these files are known."""
        return all(identity in self._files for identity in identities)

    def digest(self, identity: Identity) -> bytes | None:
        """The digest of a file, if it is known."""
        return self._files[identity][0] or None if identity in self._files else None

    def layout(self, identity: Identity, digest: bytes | None) -> bytes | None:
        """The serialised layout of a file in this state, or of one with the same digest; None if it is not known."""
        _, number = self._files.get(identity, (b"", self._by_digest.get(digest or b"")))
        return None if number is None else self._layouts[number]

    def loaded(self, layout: bytes) -> FileLayout:
        """Load a layout. Equal ones are the same object.

        Raises
        ------
        ValueError
            See `load_layout`.
        """
        with self._lock:
            if (found := self._loaded.get(self._numbers.get(layout, -1))) is None:
                found = load_layout(layout)
                self._loaded[self._number(layout)] = found
            return found

    def learn(self, identity: Identity, digest: bytes | None, layout: bytes, *, keep: bool) -> None:
        """Remember a file.

        Parameters
        ----------
        identity : Identity
        digest : bytes or None
            None if it has not been hashed.
        layout : bytes
            Serialised.
        keep : bool
            Whether this is saved: the file could not have changed since with the same identity.
        """
        with self._lock:
            known = (digest or b"", self._number(layout))
            if not keep or self._files.get(identity) == known:
                return
            self._files[identity] = known
            if digest is not None:
                self._by_digest[digest] = known[1]
            self._unsaved += 1
            if self._unsaved < max(SAVED_AFTER, len(self._files) // 2):
                return
        self.save()

    def _number(self, layout: bytes) -> int:
        number = self._numbers.setdefault(layout, len(self._layouts))
        if number == len(self._layouts):
            self._layouts.append(layout)
        return number

    def save(self, only: Iterable[Identity] | None = None) -> None:
        """Save what was learned since it was saved last; `only` what is known of these files."""
        with self._lock:
            if not self._unsaved:
                return
            self._unsaved = 0
            kept = self._files if only is None else {one: self._files[one] for one in only if one in self._files}
            data = self._dump(kept)
        self._save(data)

    def _dump(self, kept: dict[Identity, tuple[bytes, int]]) -> bytes:
        numbers = sorted({number for _, number in kept.values()})
        places = {number: place for place, number in enumerate(numbers)}
        layouts = [self._layouts[number] for number in numbers]
        return dump_arrays(
            [digest.hex() for digest, _ in kept.values()],
            {
                # Inodes and devices may need all 64 bits.
                "identities": np.array([[part & _WORD for part in one] for one in kept], np.uint64).reshape(-1, 5),
                "layouts": np.array([places[number] for _, number in kept.values()], np.int64),
                "sizes": np.array([len(layout) for layout in layouts], np.int64),
                "bytes": np.frombuffer(b"".join(layouts), np.uint8),
            },
        )

    def _load(self, data: bytes) -> None:
        digests, arrays = load_arrays(data)
        begin = 0
        for nbytes in arrays["sizes"].tolist():
            layout = arrays["bytes"][begin : begin + nbytes].tobytes()
            self._numbers[layout] = len(self._layouts)
            self._layouts.append(layout)
            begin += nbytes
        rows = zip(arrays["identities"].view(np.int64).tolist(), digests, arrays["layouts"].tolist(), strict=True)
        for (device, inode, *rest), digest, number in rows:
            known = bytes.fromhex(digest), number
            self._files[Identity(device & _WORD, inode & _WORD, *rest)] = known
            if digest:
                self._by_digest[known[0]] = number


_WORD = (1 << 64) - 1
