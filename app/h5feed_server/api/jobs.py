"""Long work: how far it is."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import JSONResponse
from h5feed.errors import PageNotFound

from ..services import Services
from ..stats.jobs import JobState
from .deps import ServicesDep, in_thread

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

WAIT_SECONDS = 2.0
"""How long an answer waits for work to be over, where the caller names no time."""

MAX_WAIT_SECONDS = 60.0

_POLL_SECONDS = (0.005, 0.25)
"""How often it is looked how far work is: ever more rarely, from the first to the second."""

Prefer = Annotated[
    str | None,
    Header(description="`wait=5`: how many seconds the answer may wait for the work (RFC 7240; at most 60)."),
]

JOB_RESPONSE: dict[int | str, dict[str, Any]] = {
    202: {"description": "It takes long: how far it is, with the job's URL in `Location`. Ask again."}
}


@router.get("/{job}", summary="How far a job is")
async def get_job(
    services: ServicesDep,
    job: Annotated[str, Path(description="As `Location` named it.")],
    prefer: Prefer = None,
) -> Response:
    """`status` is `queued`, `running`, `done` (the result is at `result`) or `failed` (with `code` and `detail`).

    All callers and all workers share a job; one whose worker died is taken up again by the worker that answers here.
    """
    state = await in_thread(services, lambda: services.statistics.jobs.state(job))
    if state is None:
        raise PageNotFound(f"there is no job {job[:40]!r}: jobs are forgotten after a day")
    state = await wait_for(services, state, 0.0 if prefer is None else wait_seconds(prefer))
    return JSONResponse(describe(state), headers={"cache-control": "no-store"})


async def wait_for(services: Services, state: JobState, seconds: float) -> JobState:
    """The job's state when it is over, or after so many seconds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + seconds
    job = state.id

    def look() -> JobState | None:
        return services.statistics.jobs.state(job)

    pause, longest = _POLL_SECONDS
    while not state.is_over and loop.time() < deadline:
        await asyncio.sleep(min(pause, max(0.0, deadline - loop.time())))
        pause = min(longest, 2 * pause)
        # No thread is held between two looks: many may wait for one job.
        latest: JobState | None = await in_thread(services, look)
        state = latest or state
    return state


def wait_seconds(prefer: str | None) -> float:
    """Seconds of ``Prefer: wait=``."""
    found = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,9})", prefer or "")
    return WAIT_SECONDS if found is None else min(MAX_WAIT_SECONDS, float(found[1]))


def accepted(state: JobState) -> Response:
    """202: come again."""
    headers = {"location": f"/v1/jobs/{state.id}", "retry-after": "1", "cache-control": "no-store"}
    return JSONResponse(describe(state), 202, headers)


def describe(state: JobState) -> dict[str, Any]:
    """A job as the API says it."""
    return {
        "job": state.id,
        "url": f"/v1/jobs/{state.id}",
        "status": state.status,
        "done": state.done,
        "total": state.total,
        "unit": state.unit,
        "request": state.request,
        "result": state.result,
        "code": state.code,
        "detail": state.detail,
    }
