"""What endpoints have injected, and how they run work that blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import Annotated, TypeVar

from fastapi import Depends, Path, Request
from h5feed.buffers import PoolExhausted
from h5feed.errors import CLASS_BY_CODE, InternalError, Overloaded, ReadTimeout

from ..catalog.hanging import ATTEMPT, Attempt
from ..catalog.inspections import NotYet
from ..jobs.registry import InProgress, JobState
from ..services import Services
from ..sharing.caller import CALLER
from ..sharing.fair_threads import FairThreads
from ..sharing.slots import MAY_RESTART, QueueFull

T = TypeVar("T")

PREPARING_SECONDS = 5.0
"""How long a request waits for files that are being looked at for the first time, or for the next walk through the data
folder."""

_JOB_SHARE = 0.5
"""Of the read timeout that a request waits for a job: what it came for takes time as well, and callers whose own
patience is the same time are to hear how far it is."""

_POLL_SECONDS = (0.005, 0.25)
"""How often it is looked how far work is: ever more rarely, from the first to the second."""


ASKER: ContextVar[str] = ContextVar("asker", default="")
"""Who asks, and by which program: to tell whether it is somebody else who wants a job."""


async def _services(request: Request) -> Services:
    ASKER.set(f"{CALLER.get()} {request.headers.get('user-agent', '')}")
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]

NamePath = Annotated[str, Path(description="Name of a dataset, as the catalogue lists it.")]


_LIST_SECONDS = 2.0
"""How long a listing waits for files that are still being inspected before it shows them as `preparing`."""

_LIST_POLL_SECONDS = 0.05


async def all_known(services: Services, seconds: float = _LIST_SECONDS) -> None:
    """Wait until all files are inspected, for a moment: in a folder that was just mounted, most are soon."""
    # Holds no thread meanwhile.
    deadline = time.monotonic() + seconds
    while (
        not await in_thread(services, services.catalog.is_known, threads=services.page_threads)
        and time.monotonic() < deadline
    ):
        await asyncio.sleep(_LIST_POLL_SECONDS)


async def in_thread(
    services: Services, work: Callable[[], T], patience: float | None = None, threads: FairThreads | None = None
) -> T:
    """Run blocking `work` in a thread of the server's own pool (or of `threads`).

    Where the bound on bytes in flight leaves no room, or many wait for a reader already, `work` is begun anew when its
    turn comes, within `patience` seconds (default: the settings' ``admit_timeout``); where it needs what a job is at
    work on, or what is being inspected, when that is over. No thread waits meanwhile: others may need less room, or
    none.

    Raises
    ------
    ReadTimeout
        It took longer than the settings allow; the thread is left to end by itself.
    Overloaded
        There was no room, or the job takes longer.
    Preparing
        The dataset is still being looked at.
    """
    loop = asyncio.get_running_loop()
    job_deadline = loop.time() + _JOB_SHARE * services.settings.read_timeout
    while True:
        try:
            return await attempted(services, work, patience, threads)
        except InProgress as progress:
            state = await job_result(services, progress.state, job_deadline - loop.time())
            if not state.is_over or loop.time() >= job_deadline:
                raise Overloaded(
                    f"{_how_far(state)}; the server goes on, try again in a moment", retry_after=1
                ).because_of("jobs") from None


async def attempted(
    services: Services, work: Callable[[], T], patience: float | None = None, threads: FairThreads | None = None
) -> T:
    """As `in_thread`, but what a job is at work on is not waited for.

    Raises
    ------
    InProgress
    """
    loop = asyncio.get_running_loop()
    since = loop.time()
    deadline = since + (services.settings.admit_timeout if patience is None else patience)
    pause, longest = _POLL_SECONDS
    threads = threads or services.threads
    doing = Attempt()
    ATTEMPT.set(doing)
    attempt = begin = work
    MAY_RESTART.set(True)
    while True:
        try:
            future = threads.submit(begin)
            async with asyncio.timeout(services.settings.read_timeout):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            seconds = services.settings.read_timeout
            if future.running():
                services.catalog.hanging.add(doing.dataset, future, time.monotonic() - seconds)
                threads.give_up(future)
            raise ReadTimeout(f"reading took more than {seconds:g} s (H5FEED_READ_TIMEOUT)") from None
        except MemoryError:
            full = Overloaded("there is no memory for this now; try again in a moment", retry_after=5)
            raise full.because_of("memory") from None
        except QueueFull as full:
            pause = min(longest, 2 * pause)
            if loop.time() + pause > deadline:
                raise full.problem from None
            await asyncio.sleep(pause)
            continue
        except PoolExhausted as error:
            nbytes, why = error.nbytes, str(error)
        except NotYet as late:
            pause = min(longest, 2 * pause)
            if loop.time() + max(late.seconds, pause) > since + PREPARING_SECONDS:
                raise late.problem from None
            attempt = begin = partial(services.catalog.asked_at, late.asked, work)
            await asyncio.sleep(max(late.seconds, pause))
            continue
        if not await services.pool.turn(nbytes, since, deadline):
            raise Overloaded(f"{why}; try again in a moment", retry_after=1).because_of("memory")
        begin = services.pool.called(attempt)


async def job_result(services: Services, state: JobState, seconds: float) -> JobState:
    """The job's state when it is done, or after so many seconds.

    Raises
    ------
    FeedError
        The job's own, where it failed.
    """
    state = await wait_for(services, state, seconds)
    if state.status == "failed":
        raise CLASS_BY_CODE.get(str(state.code), InternalError)(str(state.detail))
    return state


async def wait_for(services: Services, state: JobState, seconds: float) -> JobState:
    """The job's state when it is done or has failed, or after so many seconds.

    Raises
    ------
    Overloaded
        It was deleted, or had to make room for others.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    look = partial(services.jobs.state, state.id, ASKER.get())
    pause, longest = _POLL_SECONDS
    while not state.is_over:
        # No thread is held between two looks: many may wait for one job.
        latest: JobState | None = await attempted(services, look, threads=services.page_threads)
        if latest is None:
            raise Overloaded("this work was stopped before it was done; try again in a moment", retry_after=1)
        state = latest
        if state.is_over or loop.time() >= deadline:
            break
        await asyncio.sleep(min(pause, max(0.0, deadline - loop.time())))
        pause = min(longest, 2 * pause)
    return state


def _how_far(state: JobState) -> str:
    far = f"{state.done:,} of {state.total:,} {state.unit} are done" if state.total else "it has just begun"
    return f"what this needs of {state.request['dataset']!r} is being computed: {far}"
