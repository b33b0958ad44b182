"""Long-running work, shared by all callers and workers.

A job has a kind and is named by the digest of its request. The worker that runs it holds an operating system lock on a
file in the cache folder, which is released when the worker dies. The job's request and progress are stored next to it.
If no worker runs a job, the first worker that receives a request for it takes it over.

Jobs about a provisional revision (see `h5feed.revisions`) have another folder, which is deleted when the server stops.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from h5feed.errors import FeedError, InternalError, JobWanted, Overloaded
from h5feed.revisions import is_provisional

from ..cache_folder.locks import hold, release
from ..cache_folder.sealed import read_sealed, write_sealed
from ..tokens.scope import SCOPE, unrestricted
from .askers import Askers
from .turns import Turns

logger = logging.getLogger(__name__)

MAX_WAITING = 64
"""Maximum number of unfinished jobs per worker. At the limit, a new job replaces the latest job of the dataset that has
the most. If its own dataset has about as many, it is refused."""

MAX_OF_DATASET = 16
"""Maximum number of unfinished jobs per worker and dataset."""

_AT_ONCE = 2
"""Number of jobs of each kind that a worker runs at the same time."""

WANTED_SECONDS = 30.0
"""A client cannot delete a job that another client has requested within this time."""

_TICK_SECONDS = 1.0
"""Interval between checks whether jobs are still wanted."""

_WRITE_SECONDS = 0.25
"""Minimum interval between two writes of a job's progress."""

_KEPT_SECONDS = 24 * 3600.0
"""How long the files of a job are stored after they last changed."""

WAIT_SECONDS = 60.0
"""How long a job waits for a dataset that the catalogue is still inspecting, for example after a restart."""

_ID = re.compile("[0-9a-f]{32}")

_PROVISIONAL_ID = "000000"
"""How the ids of jobs about provisional revisions begin. If another one does by chance, it is only stored less long."""

NO_SCRATCH = Path(os.devnull) / "jobs"
"""A folder that cannot be created."""

Request = Mapping[str, Any]
Status = Literal["queued", "running", "done", "failed"]


class Cancelled(Exception):
    """The job must stop: its worker is shutting down, or the result is no longer wanted. Unfinished work is lost."""


@dataclass(frozen=True)
class JobState:
    """State of a job.

    Attributes
    ----------
    id : str
        Digest of kind and request, 32 hexadecimal digits.
    kind : str
        As passed to `Jobs.register`.
    request : dict
        Input of the job; JSON.
    done, total : int
        Progress, in `unit`. `total` is 0 until it is known.
    unit : str
        ``bytes`` or ``rows``.
    result : str
        Path of the URL of the result.
    code, detail : str or None
        Code and message of the error, if the job failed.
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

    @property
    def dataset(self) -> str:
        return str(self.request.get("dataset", ""))

    @property
    def is_in_scope(self) -> bool:
        """Whether the caller may see all datasets that it is about; joins are about two."""
        other = self.request.get("other", {}).get("dataset", self.dataset)
        covers = SCOPE.get().covers
        return covers(self.dataset) and covers(str(other))


class InProgress(Exception):
    """The result is not available yet; a job is computing it.

    Attributes
    ----------
    state : JobState
    """

    def __init__(self, state: JobState) -> None:
        super().__init__(state.id)
        self.state = state


class Progress:
    """Progress reported by a job; safe to call from any thread."""

    def __init__(
        self, tell: Callable[[int, int], None], cancelled: threading.Event, give_way: Callable[[], None] = lambda: None
    ) -> None:
        self.cancelled = cancelled
        self._tell = tell
        self._give_way = give_way
        self._lock = threading.Lock()
        self._done = 0
        self._total = 0

    def expect(self, total: int) -> None:
        """Add to the number of units to do."""
        with self._lock:
            self._total += total
            self._tell(self._done, self._total)

    def advance(self, units: int) -> None:
        """Add to the number of units done. Other jobs may run before this returns.

        Raises
        ------
        Cancelled
        """
        with self._lock:
            # The lock is held meanwhile, so the job's other threads wait too.
            self._give_way()
            if self.cancelled.is_set():
                raise Cancelled
            self._done = min(self._done + units, self._total)
            self._tell(self._done, self._total)


@dataclass(frozen=True)
class _Kind:
    unit: str
    work: Callable[[Request, Progress], None]
    turns: Turns


@dataclass
class _Mine:
    """A job that this process runs; `lock` is None if the folder is not writable."""

    state: JobState
    lock: int | None
    asked: float = field(default_factory=time.monotonic)
    """When it was last requested, as far as `Askers.marks` show."""
    marks: dict[str, float] = field(default_factory=dict)
    written: float = 0.0
    cancelled: threading.Event = field(default_factory=threading.Event)


class Jobs:
    """Runs jobs; one instance per process.

    Parameters
    ----------
    folder : Path
        Shared by all workers.
    patience : float
        A job that nobody has requested for this many seconds is cancelled.
    scratch : Path, optional
        Folder for jobs about provisional revisions, shared by all workers and deleted when the server stops. Default:
        only the worker that runs such a job knows it.
    """

    def __init__(self, folder: Path, patience: float, scratch: Path = NO_SCRATCH) -> None:
        self._folder = folder
        self._scratch = scratch
        self._patience = patience
        self._askers = Askers(self._folder_of)
        self._kinds: dict[str, _Kind] = {}
        self._closed = threading.Event()
        self._watching = False
        self.ticks = 0
        """Number of checks whether jobs are still wanted."""
        self._mine: dict[str, _Mine] = {}
        self._lock = threading.Lock()
        with contextlib.suppress(OSError):
            self._forget_old()

    def close(self) -> None:
        """Stop all jobs of this worker. The next worker that receives a request for one of them takes it over."""
        self._closed.set()
        with self._lock:
            for mine in self._mine.values():
                mine.cancelled.set()

    def register(self, kind: str, unit: str, work: Callable[[Request, Progress], None]) -> None:
        """Register the function for a kind of job; kinds do not wait for each other.

        Parameters
        ----------
        unit : str
            Unit of the progress: ``bytes`` or ``rows``.
        work : callable
            Runs a job, given its request and a `Progress`. It stores the result itself.
        """
        self._kinds[kind] = _Kind(unit, work, Turns(_AT_ONCE))

    def start(self, kind: str, request: Request, result: str, earlier: str = "") -> JobState:
        """Start a job in this worker, unless a worker runs it already.

        Parameters
        ----------
        kind : str
            See `register`.
        request : mapping
            Input of the job; JSON. If it has a ``dataset``, jobs of different datasets take turns.
        result : str
            Path of the URL of the result.
        earlier : str, optional
            What the request's ``revision`` may have been called before. If a job under that name is not finished, it is
            that job which goes on.

        Raises
        ------
        Overloaded
            Too many jobs are waiting, or this job is being stopped.
        """
        job = _id_of(kind, request)
        before = self._unfinished(_id_of(kind, {**request, "revision": earlier})) if earlier else None
        if before is not None and before.id != job:
            return self._take(before, anew=False)
        return self._take(JobState(job, kind, dict(request), result, unit=self._kinds[kind].unit), anew=True)

    def state(self, job: str, asker: str = "") -> JobState | None:
        """State of a job; None if it is unknown or out of scope. If no worker runs the job, this one takes it over.

        Parameters
        ----------
        asker : str
            Identifies the client. A job continues as long as clients request its state.

        Raises
        ------
        Overloaded
            Too many jobs are waiting, or this job is being stopped.
        """
        if not _ID.fullmatch(job) or self._deletion(job).exists():
            return None
        state = self._state(job)
        if state is not None and not state.is_over:
            self._askers.note(job, asker)
        return state

    def delete(self, job: str, asker: str) -> bool:
        """Stop and forget a job; False if it is unknown or out of scope.

        Raises
        ------
        JobWanted
            Another client has requested it within `WANTED_SECONDS`.
        """
        if not _ID.fullmatch(job) or self._deletion(job).exists():
            return False
        with self._lock:
            mine = self._mine.get(job)
        state = mine.state if mine is not None else self._read(job)
        if state is None or not state.is_in_scope:
            return False
        ago = self._askers.others(job, but=asker)
        if not state.is_over and ago < WANTED_SECONDS:
            raise JobWanted(
                f"another client requested this job {ago:.0f} s ago, so it continues: you can delete it once "
                f"no other client has requested it for {WANTED_SECONDS:g} s"
            )
        if mine is not None:
            mine.cancelled.set()
        with contextlib.suppress(OSError):
            # The worker that runs the job notices this file. If no worker does, the lock is free, so clean up here.
            self._deletion(job).touch()
            if (lock := hold(self._lock_of(job))) is not None:
                self._forget(job)
                release(self._lock_of(job), lock)
        return True

    def _unfinished(self, job: str) -> JobState | None:
        """State of a job that is not over, whatever is in scope."""
        with self._lock:
            mine = self._mine.get(job)
        state = self._read(job) if mine is None else None if mine.cancelled.is_set() else mine.state
        return None if state is None or state.is_over else state

    def _state(self, job: str) -> JobState | None:
        with self._lock:
            mine = self._mine.get(job)
        state = mine.state if mine is not None else self._read(job)
        if state is None or not state.is_in_scope:
            return None
        if mine is not None or state.is_over or state.kind not in self._kinds:
            return state
        return self._take(state, anew=False)

    def _take(self, wanted: JobState, *, anew: bool) -> JobState:
        with self._lock:
            mine = self._mine.get(wanted.id)
            if mine is not None and mine.cancelled.is_set():
                raise Overloaded("this job is being stopped; try again in a moment", retry_after=1)
            if mine is not None and not mine.state.is_over:
                return mine.state
            self._make_room(wanted.dataset)
            lock: int | None = None
            with contextlib.suppress(OSError):
                lock, other = self._lock_or_other(wanted, anew)
                if other is not None:
                    return other
            fresh = replace(wanted, status="queued", done=0, total=0, code=None, detail=None)
            mine = self._mine[wanted.id] = _Mine(fresh, lock)
            self._write(mine)
            self._begin(mine)
            return mine.state

    def _lock_or_other(self, wanted: JobState, anew: bool) -> tuple[int | None, JobState | None]:
        """The lock of a job, or the state of the job if another worker runs it or has finished it.

        Raises
        ------
        OSError
        """
        # Created each time: the cache folder may be deleted at any time.
        self._folder_of(wanted.id).mkdir(parents=True, exist_ok=True)
        lock = hold(self._lock_of(wanted.id))
        now = self._read(wanted.id)
        if lock is None:
            return None, now or wanted
        if not anew and now is not None and now.is_over:
            # The job was finished by another worker since its state was read.
            release(self._lock_of(wanted.id), lock)
            return None, now
        return lock, None

    def _begin(self, mine: _Mine) -> None:
        """Start the threads for a job. Call with the lock held.

        Raises
        ------
        Overloaded
            The system starts none: nobody does the job.
        """
        try:
            if not self._watching:
                threading.Thread(target=self._watch, name="h5feed-jobs", daemon=True).start()
                self._watching = True
            # As many threads as unfinished jobs, which are limited; each ends with its job.
            threading.Thread(target=self._run, args=(mine,), name=f"h5feed-{mine.state.kind}", daemon=True).start()
        except RuntimeError:
            del self._mine[mine.state.id]
            if mine.lock is not None:
                self._forget(mine.state.id)
                release(self._lock_of(mine.state.id), mine.lock)
            raise Overloaded("no thread can be started; try again in a moment", retry_after=5).because_of(
                "threads"
            ) from None

    def _make_room(self, dataset: str) -> None:
        """Check the limits for a new job, and cancel a job of another dataset if necessary. Call with the lock held.

        Raises
        ------
        Overloaded
        """
        unfinished = [mine for mine in self._mine.values() if not mine.state.is_over and not mine.cancelled.is_set()]
        each = Counter(mine.state.dataset for mine in unfinished)
        if each[dataset] >= MAX_OF_DATASET:
            raise Overloaded(
                f"{MAX_OF_DATASET} jobs for {dataset!r} are waiting already; try again in a moment", retry_after=5
            ).because_of("jobs")
        if len(unfinished) < MAX_WAITING:
            return
        most, count = each.most_common(1)[0]
        if count <= each[dataset] + 1:
            full = Overloaded(f"{MAX_WAITING} jobs are waiting already; try again in a moment", retry_after=5)
            raise full.because_of("jobs")
        # If a client still wants the cancelled job, its next request starts it again.
        next(mine for mine in reversed(unfinished) if mine.state.dataset == most).cancelled.set()

    def _watch(self) -> None:
        """Cancel jobs that were deleted or that no client has requested recently."""
        while not self._closed.wait(_TICK_SECONDS):
            self.ticks += 1
            with self._lock:
                unfinished = [mine for mine in self._mine.values() if not mine.state.is_over]
                if not unfinished:
                    self._watching = False
                    return
            for mine in unfinished:
                now, marks = time.monotonic(), self._askers.marks(mine.state.id)
                if marks != mine.marks:
                    mine.asked, mine.marks = now, marks
                if now - mine.asked > self._patience or self._deletion(mine.state.id).exists():
                    mine.cancelled.set()

    def _run(self, mine: _Mine) -> None:
        def tell(done: int, total: int) -> None:
            has_begun = mine.state.status == "running"
            mine.state = replace(mine.state, status="running", done=done, total=total)
            # That it has begun is written at once: to other workers, one that hangs soon would be queued for ever.
            if not has_begun or time.monotonic() - mine.written > _WRITE_SECONDS:
                self._write(mine)

        state = mine.state
        try:
            kind = self._kinds[mine.state.kind]
            with kind.turns.of(mine.state.dataset, mine.cancelled.is_set) as turn:
                if mine.cancelled.is_set():
                    raise Cancelled
                tell(0, 0)
                # It is done for all who ask for it.
                with unrestricted():
                    kind.work(mine.state.request, Progress(tell, mine.cancelled, turn.give_way))
            state = replace(mine.state, status="done", done=mine.state.total)
        except BaseException as error:
            state = self._after(error, mine)
        finally:
            mine.state = state
            self._write(mine)
            with self._lock:
                if self._deletion(mine.state.id).exists():
                    self._forget(mine.state.id)
                if mine.lock is None and not mine.state.is_over:
                    del self._mine[mine.state.id]
                elif mine.lock is not None:
                    release(self._lock_of(mine.state.id), mine.lock)
                    # From now on, the state is read from the folder.
                    del self._mine[mine.state.id]
                elif len(self._mine) > MAX_WAITING:
                    over = [job for job, each in self._mine.items() if each.state.is_over]
                    for job in over[: len(over) // 2]:
                        del self._mine[job]

    def _after(self, error: BaseException, mine: _Mine) -> JobState:
        if isinstance(error, Cancelled) or mine.cancelled.is_set():
            # The job stays unfinished, so that another worker can take it over. After a cancellation, other errors
            # count as one too: when the process ends, the threads that read may have ended first.
            return mine.state
        if isinstance(error, FeedError):
            return replace(mine.state, status="failed", code=error.code, detail=error.detail)
        logger.error("job %s failed", mine.state.id, exc_info=error)
        detail = "the server failed; see its log for the reason"
        return replace(mine.state, status="failed", code=InternalError.code, detail=detail)

    def _forget(self, job: str) -> None:
        """Remove all traces of a job. Call with its lock held."""
        for file in (self._file(job), self._deletion(job)):
            with contextlib.suppress(OSError):
                file.unlink()
        self._askers.forget(job)

    def _folder_of(self, job: str) -> Path:
        """Where the files of a job are."""
        return self._scratch if job.startswith(_PROVISIONAL_ID) else self._folder

    def _deletion(self, job: str) -> Path:
        """The file that marks a job as deleted."""
        return self._folder_of(job) / f"{job}.deleted"

    def _lock_of(self, job: str) -> Path:
        return self._folder_of(job) / f"{job}.lock"

    def _file(self, job: str) -> Path:
        return self._folder_of(job) / f"{job}.json"

    def _read(self, job: str) -> JobState | None:
        data = read_sealed(self._file(job))
        return None if data is None else JobState(**json.loads(data))

    def _write(self, mine: _Mine) -> None:
        mine.written = time.monotonic()
        if mine.lock is None:
            return
        with contextlib.suppress(OSError):
            # Progress is written often and is worthless after a power failure, so it is not synced to disk.
            write_sealed(self._file(mine.state.id), json.dumps(asdict(mine.state)).encode(), lasting=False)

    def _forget_old(self) -> None:
        for file in self._old_files():
            with contextlib.suppress(OSError):
                file.unlink()

    def _old_files(self) -> Iterator[Path]:
        oldest = time.time() - _KEPT_SECONDS
        for file in self._folder.iterdir():
            with contextlib.suppress(OSError):
                if file.suffix in (".json", ".part", ".asked", ".deleted") and file.stat().st_mtime < oldest:
                    yield file


def _id_of(kind: str, request: Request) -> str:
    text = json.dumps([kind, request], sort_keys=True)
    job = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return _PROVISIONAL_ID + job[len(_PROVISIONAL_ID) :] if is_provisional(str(request.get("revision"))) else job
