"""The journal of a build: which rows are finished, so that an interrupted build can continue."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import FeedError

from .source import ROW, Block

_FORMAT = 2
_FRAME = struct.Struct("<II")
"""Bytes of what follows, and their CRC-32: the last frame of a killed build may be torn."""

_COUNTS = struct.Struct("<II")
"""Rows, and bytes of the text."""

_TEXT_BYTES = 64 << 10
"""Header, reasons, names of files."""


def journal_bytes(rows: int) -> int:
    """Maximum size of a journal for this many rows, except with unusually many broken rows."""
    return rows * (_FRAME.size + _COUNTS.size + 8 + ROW.itemsize) + _TEXT_BYTES


class Journal:
    """The finished rows of one build; locked while the build runs.

    Parameters
    ----------
    path : Path
    digest : str
        Of the source, the options and the version: a journal of another build is begun anew.
    rows : int
        Of the source.

    Attributes
    ----------
    done : (rows,) bool
    details : (rows,) `ROW`
    broken : dict of int to str
    renames : list of (str, str) or None
        Files that are whole, and the names that they are to get.

    Raises
    ------
    FeedError
        Another process is building the same file.
    """

    def __init__(self, path: Path, digest: str, rows: int) -> None:
        self._path = path
        # As "a+b" does, but that it is written where we are and not after what is reserved.
        self._stream = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._stream.close()
            raise FeedError(f"another process is building {path.name[1:].removesuffix('.journal')} now") from None
        self._header: dict[str, Any] = {"format": _FORMAT, "digest": digest, "rows": rows}
        self.renames: list[tuple[str, str]] | None = None
        self._forget()
        if not self._load():
            try:
                self.begin()
            except OSError:
                self.remove()
                raise

    def begin(self) -> None:
        """Start from scratch."""
        self._forget()
        self._stream.seek(0)
        self._stream.truncate()
        self._stream.write(json.dumps(self._header).encode() + b"\n")
        self._reserve()
        self.sync()

    def add(self, blocks: Iterable[Block]) -> None:
        """Record rows whose bytes are on disk."""
        for block in blocks:
            reasons = json.dumps({str(row): reason for row, reason in block.broken.items()}).encode()
            payload = _COUNTS.pack(len(block.rows), len(reasons)) + block.rows.astype("<i8").tobytes()
            self._append(payload + block.details.tobytes() + reasons)
            self._take(block.rows, block.details, block.broken)
        self.sync()

    def add_renames(self, renames: list[tuple[str, str]]) -> None:
        """Record that everything is written, and which files to rename."""
        text = json.dumps({"renames": renames}).encode()
        self._append(_COUNTS.pack(0, len(text)) + text)
        self.renames = renames
        self.sync()

    def sync(self) -> None:
        self._stream.flush()
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()

    def remove(self) -> None:
        """Delete the journal at the end of the build."""
        self._path.unlink(missing_ok=True)
        self.close()

    def _forget(self) -> None:
        rows = self._header["rows"]
        self.done = np.zeros(rows, np.bool_)
        self.details = np.zeros(rows, ROW)
        self.broken: dict[int, str] = {}
        self.renames = None

    def _reserve(self) -> None:
        """Reserve space, so that finished rows can be recorded even if the disk is full."""
        self._stream.flush()
        os.posix_fallocate(self._stream.fileno(), 0, self._stream.tell() + journal_bytes(self._header["rows"]))

    def _append(self, payload: bytes) -> None:
        self._stream.write(_FRAME.pack(len(payload), zlib.crc32(payload)) + payload)

    def _take(self, rows: npt.NDArray[np.int64], details: npt.NDArray[np.void], broken: dict[int, str]) -> None:
        self.done[rows] = True
        self.details[rows] = details
        self.broken.update(broken)

    def _load(self) -> bool:
        """Load the journal of an interrupted build; False if there is none."""
        self._stream.seek(0)
        try:
            header: Any = json.loads(self._stream.readline(1 << 12))
        except ValueError:
            return False
        if header != self._header:
            return False
        end = self._stream.tell()
        while frame := self._stream.read(_FRAME.size):
            if len(frame) < _FRAME.size:
                break
            length, checksum = _FRAME.unpack(frame)
            payload = self._stream.read(length)
            # Of length zero is what is reserved.
            if not length or len(payload) < length or zlib.crc32(payload) != checksum:
                break
            self._understand(payload)
            end = self._stream.tell()
        self._stream.seek(end)
        self._stream.truncate()
        with contextlib.suppress(OSError):
            # As far as there is room: it matters again only when there is some.
            self._reserve()
        return True

    def _understand(self, payload: bytes) -> None:
        count, _ = _COUNTS.unpack_from(payload)
        numbers = np.frombuffer(payload, "<i8", count, _COUNTS.size)
        details = np.frombuffer(payload, ROW, count, _COUNTS.size + numbers.nbytes)
        text = json.loads(payload[_COUNTS.size + numbers.nbytes + details.nbytes :])
        if "renames" in text:
            self.renames = [(old, new) for old, new in text["renames"]]
            return
        self._take(numbers, details, {int(row): reason for row, reason in text.items()})
