"""Weights that clients have given: arrays in the cache folder, named by their digests and shared by all workers.

An array belongs to a dataset: whoever may read the dataset may draw by it. It is forgotten when it was not used for
some time, or when there are too many. Then the caller with most of them loses the one it used least recently.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, InternalError, TooLarge
from h5feed.weights import NOTHING_TO_DRAW, Digest, bad_weight, first_bad

_ENDINGS = {"<f4": "f4", "<f8": "f8"}

_PART = ".part"


class _Kept(NamedTuple):
    """A file of the folder; `caller` is a digest."""

    used: float
    nbytes: int
    caller: str
    path: str


class WeightsFolder:
    """Keeps arrays of weights.

    Parameters
    ----------
    folder : Path
        Created if needed.
    max_bytes, max_arrays : int
        Limits for all callers together.
    seconds : float
        How long an array is kept after its last use.
    """

    def __init__(self, folder: Path, max_bytes: int, max_arrays: int, seconds: float) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_arrays = max_arrays
        self.seconds = seconds

    def check_size(self, nbytes: int) -> None:
        """Refuse an array that is larger than all arrays together may be.

        Raises
        ------
        TooLarge
        """
        if nbytes > self._max_bytes:
            raise TooLarge(f"the weights take {nbytes} bytes, more than H5FEED_WEIGHTS_BYTES = {self._max_bytes}")

    def receive(self, dataset: str, caller: str, dtype: np.dtype[Any]) -> Arriving:
        """A file for an array that is about to arrive.

        Raises
        ------
        InternalError
            The folder is not writable.
        """
        return Arriving(self, dataset, caller, dtype)

    def find(self, dataset: str, digest: str) -> npt.NDArray[Any] | None:
        """The array with this digest, (n,) float32 or float64; None if it is not here, or damaged."""
        begin = _begin(dataset, digest)
        for kept in self._all():
            name = os.path.basename(kept.path)
            if not name.startswith(begin) or name.endswith(_PART):
                continue
            if self._has_expired(kept):
                break
            with contextlib.suppress(OSError, ValueError):
                values = np.fromfile(kept.path, f"<{name.rpartition('.')[2]}")
                found = Digest(values.dtype)
                found.update(memoryview(values).cast("B"))
                if found.text() == digest:
                    os.utime(kept.path)
                    return values
            # Damaged, by a full disk or a power failure.
            with contextlib.suppress(OSError):
                os.unlink(kept.path)
        return None

    def note_use(self, dataset: str, digest: str) -> None:
        """Note that an array is used, which is in memory already."""
        begin = _begin(dataset, digest)
        for kept in self._all():
            if os.path.basename(kept.path).startswith(begin) and not self._has_expired(kept):
                with contextlib.suppress(OSError):
                    os.utime(kept.path)

    def keep(self, file: Path) -> None:
        """Remove what has expired, and what is too much beside `file`, which has just arrived."""
        kept = []
        for one in self._all():
            if one.path != os.fspath(file) and self._has_expired(one):
                _remove(one)
            else:
                kept.append(one)
        kept.sort()
        while sum(one.nbytes for one in kept) > self._max_bytes or len(kept) > self._max_arrays:
            # Arrays of a caller count more the larger they are; one byte more makes a difference between empty ones.
            of_callers = Counter[str]()
            for one in kept:
                of_callers[one.caller] += 1 + one.nbytes
            most = max(of_callers.values())
            losers = [one for one in kept if of_callers[one.caller] == most and one.path != os.fspath(file)]
            others = [one for one in kept if one.path != os.fspath(file)]
            if not others:
                return
            loser = (losers or others)[0]
            _remove(loser)
            kept.remove(loser)

    def create(self) -> tuple[int, str]:
        """A new file of the folder, for an array that arrives: its descriptor and its path.

        Raises
        ------
        OSError
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        return tempfile.mkstemp(dir=self._folder, prefix=".", suffix=_PART)

    def _has_expired(self, kept: _Kept) -> bool:
        # The clock may have been set back.
        return abs(time.time() - kept.used) > self.seconds

    def _all(self) -> list[_Kept]:
        found = []
        with contextlib.suppress(OSError), os.scandir(self._folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):
                    status = entry.stat(follow_symlinks=False)
                    caller = entry.name.split(".")[1] if entry.name.count(".") == 2 else ""
                    found.append(_Kept(status.st_mtime, status.st_size, caller, entry.path))
        return found


class Arriving:
    """An array that is written to the folder piece by piece, and kept when it is complete and valid.

    A context manager: what is not kept by its end is removed.
    """

    def __init__(self, folder: WeightsFolder, dataset: str, caller: str, dtype: np.dtype[Any]) -> None:
        self._folder = folder
        self._dataset = dataset
        self._caller = caller
        self._dtype = dtype
        self._digest = Digest(dtype)
        self._rows = 0
        self._has_weight = False
        self._lock = threading.Lock()
        try:
            descriptor, self._path = folder.create()
        except OSError as error:
            raise _not_kept(error) from None
        self._stream = open(descriptor, "wb", buffering=0)  # noqa: SIM115 - closed at the end of the context

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A thread whose request has timed out may still write: another file must not get its descriptor.
        with self._lock:
            self._stream.close()
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    def write(self, piece: bytes) -> None:
        """Check and write the next whole numbers.

        Raises
        ------
        BadParameter, InternalError
        """
        values = np.frombuffer(piece, self._dtype)
        if (bad := first_bad(values)) is not None:
            raise bad_weight(self._rows + bad, values[bad])
        self._has_weight = self._has_weight or bool(values.any())
        self._rows += len(values)
        self._digest.update(piece)
        with self._lock:
            view = memoryview(piece)
            try:
                while view:
                    view = view[self._stream.write(view) :]
            except (OSError, ValueError) as error:
                raise _not_kept(error) from None

    def finish(self) -> str:
        """Keep the array, and return its digest.

        Raises
        ------
        BadParameter, InternalError
        """
        if not self._has_weight:
            raise BadParameter(NOTHING_TO_DRAW)
        digest = self._digest.text()
        caller = hashlib.blake2b(self._caller.encode(), digest_size=8).hexdigest()
        name = f"{_begin(self._dataset, digest)}{caller}.{_ENDINGS[self._dtype.str]}"
        file = Path(self._path).with_name(name)
        try:
            with self._lock:
                # Not synced to disk: what a power failure damages is found by its digest, and given again.
                os.replace(self._path, file)
        except OSError as error:
            raise _not_kept(error) from None
        self._folder.keep(file)
        return digest


def _begin(dataset: str, digest: str) -> str:
    """How the names of files with this array begin; what follows are the caller and the dtype."""
    of = hashlib.blake2b(dataset.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{of}-{digest}."


def _remove(kept: _Kept) -> None:
    with contextlib.suppress(OSError):
        os.unlink(kept.path)


def _not_kept(error: Exception) -> InternalError:
    reason = getattr(error, "strerror", None) or str(error)
    return InternalError(f"the server's cache folder cannot keep the weights: {reason}")
