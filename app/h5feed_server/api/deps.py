"""What endpoints have injected, and how they run work that blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import Depends, Path, Request
from h5feed.buffers import PoolExhausted
from h5feed.errors import CLASS_BY_CODE, InternalError, Overloaded, ReadTimeout

from ..jobs import InProgress, JobState
from ..services import Services

T = TypeVar("T")

_JOB_SHARE = 0.5
"""Of the read timeout that a request waits for a job: what it came for takes time as well, and callers whose own
patience is the same time are to hear how far it is."""

_POLL_SECONDS = (0.005, 0.25)
"""How often it is looked how far work is: ever more rarely, from the first to the second."""


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]

NamePath = Annotated[str, Path(description="Name of a dataset, as the catalogue lists it.")]


async def in_thread(services: Services, work: Callable[[], T], patience: float | None = None) -> T:
    """Run blocking `work` in a thread of the server's own pool.

    Where the bound on bytes in flight leaves no room, `work` is begun anew when its turn comes, within `patience`
    seconds (default: the settings' ``admit_timeout``); where it needs what a job is at work on, when that is over. No
    thread waits meanwhile: others may need less room, or none.

    Raises
    ------
    ReadTimeout
        It took longer than the settings allow; the thread is left to end by itself.
    Overloaded
        There was no room, or the job takes longer.
    """
    loop = asyncio.get_running_loop()
    job_deadline = loop.time() + _JOB_SHARE * services.settings.read_timeout
    while True:
        try:
            return await attempted(services, work, patience)
        except InProgress as progress:
            state = await over(services, progress.state, job_deadline - loop.time())
            if not state.is_over or loop.time() >= job_deadline:
                raise Overloaded(
                    f"{_how_far(state)}; the server goes on, come again in a moment", retry_after=1
                ) from None


async def attempted(services: Services, work: Callable[[], T], patience: float | None = None) -> T:
    """As `in_thread`, but what a job is at work on is not waited for.

    Raises
    ------
    InProgress
    """
    loop = asyncio.get_running_loop()
    since = loop.time()
    deadline = since + (services.settings.admit_timeout if patience is None else patience)
    begin = work
    while True:
        try:
            async with asyncio.timeout(services.settings.read_timeout):
                return await loop.run_in_executor(services.threads, begin)
        except TimeoutError:
            seconds = services.settings.read_timeout
            raise ReadTimeout(f"reading took more than {seconds:g} s (H5FEED_READ_TIMEOUT)") from None
        except MemoryError:
            raise Overloaded("there is no memory for this now; come again in a moment", retry_after=5) from None
        except PoolExhausted as error:
            nbytes, why = error.nbytes, str(error)
        if not await services.pool.turn(nbytes, since, deadline):
            raise Overloaded(f"{why}; come again in a moment", retry_after=1)
        begin = services.pool.called(work)


async def over(services: Services, state: JobState, seconds: float) -> JobState:
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
    """The job's state when it is done or has failed, or after so many seconds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    job = state.id
    pause, longest = _POLL_SECONDS
    while not state.is_over and loop.time() < deadline:
        await asyncio.sleep(min(pause, max(0.0, deadline - loop.time())))
        pause = min(longest, 2 * pause)
        # No thread is held between two looks: many may wait for one job.
        latest: JobState | None = await attempted(services, lambda: services.jobs.state(job))
        state = latest or state
    return state


def _how_far(state: JobState) -> str:
    far = f"{state.done:,} of {state.total:,} {state.unit} are done" if state.total else "it has just begun"
    return f"what this needs of {state.request['dataset']!r} is being computed: {far}"
