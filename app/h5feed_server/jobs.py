"""Long work that all callers and all workers share.

A job is of some kind, and named by the digest of its request. Whoever works on it holds a lock of the operating system
on a file in the cache folder, so that the lock is free the moment the worker dies; its request and its progress lie
beside it. Any worker that is asked for a job which nobody works on takes it up again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from h5feed.errors import FeedError, InternalError, Overloaded

from .storage.sealed import read_sealed, write_sealed

logger = logging.getLogger(__name__)

MAX_WAITING = 64
"""Jobs that one worker has taken on."""

_THREADS = 2
"""Jobs of each kind that one worker works on at the same time."""

_WRITE_SECONDS = 0.25
"""How often progress is written down, at most."""

_KEPT_SECONDS = 24 * 3600.0
"""How long it can be asked what became of a job."""

WAIT_SECONDS = 60.0
"""How long a job waits for a dataset that is being looked at, after a restart."""

_ID = re.compile("[0-9a-f]{32}")

Request = Mapping[str, Any]
Status = Literal["queued", "running", "done", "failed"]


class Cancelled(Exception):
    """The process is to end: what is half done is dropped."""


@dataclass(frozen=True)
class JobState:
    """Where a job stands.

    Attributes
    ----------
    kind : str
        What `Jobs.register` named the work.
    done, total : int
        In `unit`; total is 0 until it is known.
    unit : str
        ``bytes`` or ``rows``.
    result : str
        Path of the URL that has the result.
    code, detail : str or None
        Of the error, where it failed.
    """

    id: str
    kind: str
    request: dict[str, Any]
    result: str
    status: Status = "queued"
    done: int = 0
    total: int = 0
    unit: str = "bytes"
    code: str | None = None
    detail: str | None = None

    @property
    def is_over(self) -> bool:
        return self.status in ("done", "failed")


class InProgress(Exception):
    """What was asked for is not there yet, but a job is at work on it.

    Attributes
    ----------
    state : JobState
    """

    def __init__(self, state: JobState) -> None:
        super().__init__(state.id)
        self.state = state


class Progress:
    """What work tells of itself; safe to call from any thread."""

    def __init__(self, tell: Callable[[int, int], None], cancelled: threading.Event) -> None:
        self.cancelled = cancelled
        self._tell = tell
        self._lock = threading.Lock()
        self._done = 0
        self._total = 0

    def expect(self, total: int) -> None:
        """So many more units are to be done than were known of."""
        with self._lock:
            self._total += total
            self._tell(self._done, self._total)

    def advance(self, units: int) -> None:
        """So many more are done.

        Raises
        ------
        Cancelled
        """
        if self.cancelled.is_set():
            raise Cancelled
        with self._lock:
            self._done = min(self._done + units, self._total)
            self._tell(self._done, self._total)


@dataclass(frozen=True)
class _Kind:
    unit: str
    work: Callable[[Request, Progress], None]
    threads: ThreadPoolExecutor


@dataclass
class _Mine:
    """A job that this process has taken on; `lock` is None where the folder cannot be written."""

    state: JobState
    lock: int | None
    written: float = field(default=0.0)


class Jobs:
    """Takes jobs on; one per process.

    Parameters
    ----------
    folder : Path
        Shared by all workers.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kinds: dict[str, _Kind] = {}
        self._cancelled = threading.Event()
        self._mine: dict[str, _Mine] = {}
        self._lock = threading.Lock()
        with contextlib.suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            self._forget_old()

    def close(self) -> None:
        """Stop working; whoever is asked next goes on."""
        self._cancelled.set()
        for kind in self._kinds.values():
            kind.threads.shutdown(wait=False, cancel_futures=True)

    def register(self, kind: str, unit: str, work: Callable[[Request, Progress], None]) -> None:
        """Say how jobs of a kind are done; no kind waits for another.

        Parameters
        ----------
        unit : str
            In which their progress is told.
        work : callable
            Does what a request says; what comes of it is kept elsewhere, by the work itself.
        """
        self._kinds[kind] = _Kind(unit, work, ThreadPoolExecutor(_THREADS, f"h5feed-{kind}"))

    def start(self, kind: str, request: Request, result: str) -> JobState:
        """Have a request worked on, here, unless somebody works on it.

        Parameters
        ----------
        result : str
            Path of the URL under which the result will be.

        Raises
        ------
        Overloaded
        """
        text = json.dumps([kind, request], sort_keys=True)
        job = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return self._take(JobState(job, kind, dict(request), result, unit=self._kinds[kind].unit), anew=True)

    def state(self, job: str) -> JobState | None:
        """Where a job stands; None where nobody knows of it. One that nobody works on is taken up again."""
        if not _ID.fullmatch(job):
            return None
        with self._lock:
            mine = self._mine.get(job)
        if mine is not None:
            return mine.state
        state = self._read(job)
        if state is None or state.is_over or state.kind not in self._kinds:
            return state
        return self._take(state, anew=False)

    def _take(self, wanted: JobState, *, anew: bool) -> JobState:
        with self._lock:
            mine = self._mine.get(wanted.id)
            if mine is not None and not mine.state.is_over:
                return mine.state
            if sum(not each.state.is_over for each in self._mine.values()) >= MAX_WAITING:
                raise Overloaded(f"{MAX_WAITING} jobs are waiting already; come again in a moment", retry_after=5)
            lock: int | None = None
            with contextlib.suppress(OSError):
                lock = self._lock_file(wanted.id)
                if lock is None:
                    # Another worker has it.
                    return self._read(wanted.id) or wanted
                now = self._read(wanted.id)
                if not anew and now is not None and now.is_over:
                    # That worker was done between our two looks.
                    self._unlock_file(wanted.id, lock)
                    return now
            fresh = replace(wanted, status="queued", done=0, total=0, code=None, detail=None)
            mine = self._mine[wanted.id] = _Mine(fresh, lock)
            self._write(mine)
            self._kinds[fresh.kind].threads.submit(self._run, mine)
            return mine.state

    def _run(self, mine: _Mine) -> None:
        def tell(done: int, total: int) -> None:
            mine.state = replace(mine.state, status="running", done=done, total=total)
            if time.monotonic() - mine.written > _WRITE_SECONDS:
                self._write(mine)

        state = mine.state
        try:
            tell(0, 0)
            self._kinds[mine.state.kind].work(mine.state.request, Progress(tell, self._cancelled))
            state = replace(mine.state, status="done", done=mine.state.total)
        except Cancelled:
            # Stays as it is written down: unfinished, and nobody's.
            state = mine.state
        except FeedError as error:
            state = replace(mine.state, status="failed", code=error.code, detail=error.detail)
        except BaseException:
            logger.exception("job %s failed", mine.state.id)
            state = replace(
                mine.state, status="failed", code=InternalError.code, detail="the server failed; its log has the reason"
            )
        finally:
            mine.state = state
            self._write(mine)
            with self._lock:
                if mine.lock is not None:
                    self._unlock_file(mine.state.id, mine.lock)
                    # Where it stands lies in the folder now.
                    del self._mine[mine.state.id]
                elif len(self._mine) > MAX_WAITING:
                    over = [job for job, each in self._mine.items() if each.state.is_over]
                    for job in over[: len(over) // 2]:
                        del self._mine[job]

    def _file(self, job: str) -> Path:
        return self._folder / f"{job}.json"

    def _read(self, job: str) -> JobState | None:
        data = read_sealed(self._file(job))
        return None if data is None else JobState(**json.loads(data))

    def _write(self, mine: _Mine) -> None:
        mine.written = time.monotonic()
        if mine.lock is None:
            return
        with contextlib.suppress(OSError):
            # Progress is told often, and is worth nothing after a power failure: it need not be lasting.
            write_sealed(self._file(mine.state.id), json.dumps(asdict(mine.state)).encode(), lasting=False)

    def _lock_file(self, job: str) -> int | None:
        """A descriptor that holds the job's lock; None where another process holds it."""
        path = self._folder / f"{job}.lock"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Who held it last may have deleted the file in between: then this lock keeps nobody out.
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _unlock_file(self, job: str, descriptor: int) -> None:
        with contextlib.suppress(OSError):
            os.unlink(self._folder / f"{job}.lock")
        os.close(descriptor)

    def _forget_old(self) -> None:
        for file in self._old_files():
            with contextlib.suppress(OSError):
                file.unlink()

    def _old_files(self) -> Iterator[Path]:
        oldest = time.time() - _KEPT_SECONDS
        for file in self._folder.iterdir():
            with contextlib.suppress(OSError):
                if file.suffix in (".json", ".part") and file.stat().st_mtime < oldest:
                    yield file
