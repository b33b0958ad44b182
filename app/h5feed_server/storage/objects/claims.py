"""Which ranges other workers are fetching at the moment, in a small file that all of them have mapped.

A worker claims a range before it fetches it ahead, and releases it when it is on the disk. Another that needs it waits
for that. Whose owner has died counts as released: a worker holds a lock on a byte of the file for as long as it lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from .parts import Piece

_SLOTS = 1 << 15
"""A claim has one place where it may be. If another has it, the range is not claimed."""

_WORDS = 2
"""Of 8 bytes for each slot: the range, and its owner with the time when the claim ends."""

_MOST_OWNERS = 4096

_MUTEX = 0
"""The byte of the file that is locked for changes; behind it are those of the owners."""

_MUTEX_SECONDS = 0.1
_MUTEX_POLL_SECONDS = 50e-6
"""A change takes microseconds. If it takes longer, nothing is claimed: some ranges may be fetched twice."""

_POLL_SECONDS = 0.003
_ALIVE_SECONDS = 0.25

_MASK = (1 << 64) - 1


class Claims:
    """Those of one worker, and of the others.

    Parameters
    ----------
    path : Path
        The file, which is created if it is missing.
    seconds : float
        How long a fetch may take.

    Raises
    ------
    OSError
    """

    def __init__(self, path: Path, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Only one descriptor per process: closing any would release all of its locks.
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        nbytes = 8 * _WORDS * _SLOTS
        try:
            # A page that finds no room on the disk when it is written would kill the process.
            os.posix_fallocate(self._fd, 0, nbytes)
            self._own = self._become_owner()
        except OSError:
            os.close(self._fd)
            raise
        self._map = mmap.mmap(self._fd, nbytes)
        self._words = memoryview(self._map).cast("Q")
        self._forget_predecessor()

    def take(self, version: bytes, pieces: Iterable[Piece]) -> set[Piece]:
        """Claim ranges of an object. Returns those that another worker has claimed."""
        theirs = set()
        now = int(time.monotonic())
        own = self._own << 32 | now + int(self._seconds) + 1
        with self._changing() as is_held:
            for piece in pieces if is_held else ():
                word, key = _place(version, piece)
                if self._words[word] and self._is_live(word, now):
                    if self._words[word] == key:
                        theirs.add(piece)
                    continue
                self._words[word + 1] = own
                self._words[word] = key
        return theirs

    def release(self, version: bytes, pieces: Iterable[Piece]) -> None:
        """Ranges that this worker has claimed are on the disk, or will not be."""
        with self._changing():
            # Also without the mutex: it is this worker's own place.
            for piece in pieces:
                word, key = _place(version, piece)
                if self._words[word] == key and self._words[word + 1] >> 32 == self._own:
                    self._words[word] = 0

    def wait(self, version: bytes, piece: Piece, seconds: float | None = None) -> bool:
        """Wait until no other worker has claimed a range, which then is on the disk if it has succeeded.

        Parameters
        ----------
        seconds : float, optional
            Default: as long as a fetch may take.

        Returns
        -------
        bool
            False: the time was not enough.
        """
        word, key = _place(version, piece)
        look = time.monotonic() + _ALIVE_SECONDS
        # Its owner may give up, and claim it again.
        until = time.monotonic() + (self._seconds if seconds is None else seconds)
        while self._words[word] == key:
            now = time.monotonic()
            if now > until:
                return False
            if not self._is_live(word, int(now)):
                return True
            if now > look:
                look = now + _ALIVE_SECONDS
                if not self._is_alive(self._words[word + 1] >> 32):
                    return True
            time.sleep(_POLL_SECONDS)
        return True

    def theirs(self, version: bytes, pieces: Iterable[Piece]) -> set[Piece]:
        """Those of some ranges that other workers have claimed."""
        now = int(time.monotonic())
        found = set()
        for piece in pieces:
            word, key = _place(version, piece)
            if self._words[word] == key and self._is_live(word, now):
                found.add(piece)
        return found

    def _is_live(self, word: int, now: int) -> bool:
        """Whether the claim is another worker's and not too old."""
        about = self._words[word + 1]
        # A claim that ends later is from before the machine was started, or another server's.
        left = (about & 0xFFFFFFFF) - now
        return about >> 32 != self._own and 0 < left <= int(self._seconds) + 1

    def _become_owner(self) -> int:
        with self._lock:
            for owner in range(1, _MOST_OWNERS):
                with contextlib.suppress(OSError):
                    fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, owner)
                    return owner
        raise OSError(f"{self._fd}: more than {_MOST_OWNERS} processes")

    def _forget_predecessor(self) -> None:
        """Release what was claimed by a worker that has died: with its number, it seems to live again."""
        with self._changing():
            for word in range(0, len(self._words), _WORDS):
                if self._words[word + 1] >> 32 == self._own:
                    self._words[word] = 0

    def _is_alive(self, owner: int) -> bool:
        with self._lock:
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, owner)
            except OSError:
                return True
            fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, owner)
            return False

    @contextlib.contextmanager
    def _changing(self) -> Iterator[bool]:
        """Hold the mutex. False if a worker does not let go of it: it may be suspended."""
        with self._lock:
            is_held, until = False, time.monotonic() + _MUTEX_SECONDS
            while not is_held:
                with contextlib.suppress(OSError):
                    fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _MUTEX)
                    is_held = True
                if not is_held:
                    if time.monotonic() > until:
                        break
                    time.sleep(_MUTEX_POLL_SECONDS)
            try:
                yield is_held
            finally:
                if is_held:
                    fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, _MUTEX)


def _place(version: bytes, piece: Piece) -> tuple[int, int]:
    """The word that a claim of a range begins at, and what it has there: the same in all processes, and not 0."""
    mixed = int.from_bytes(version[:8], "little") ^ (piece[0] * 0x9E3779B97F4A7C15 + piece[1] * 0xC2B2AE3D27D4EB4F)
    key = (mixed & _MASK) | 1
    return (key >> 16) % _SLOTS * _WORDS, key
