"""Endpoints for long-running work."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import JSONResponse
from h5feed.errors import JobWanted, Overloaded, PageNotFound

from ..jobs.registry import InProgress, JobState
from ..services import Services
from .dependencies import ASKER, ServicesDep, attempted, in_thread, job_result, wait_for
from .forwarded import here
from .problem_responses import problems
from .response_models import Job, answers

T = TypeVar("T")

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

WAIT_SECONDS = 2.0
"""How long an answer waits for work to be over, where the caller names no time."""

MAX_WAIT_SECONDS = 60.0

Prefer = Annotated[
    str | None,
    Header(description="`wait=5`: how many seconds the answer may wait for the work (RFC 7240; at most 60)."),
]

JOB_RESPONSE: dict[int | str, dict[str, Any]] = {
    202: {"description": "It takes long: how far it is, with the job's URL in `Location`. Ask again.", "model": Job}
}


@router.get("/{job}", summary="Progress of a job", **answers(Job, problems(PageNotFound)))
async def get_job(
    services: ServicesDep,
    job: Annotated[str, Path(description="As `Location` named it.")],
    prefer: Prefer = None,
) -> Response:
    """`status` is `queued`, `running`, `done` (see `result` for the URL) or `failed` (see `code` and `detail`).

    All callers and workers share a job. If its worker dies, the worker that handles this request takes it over. A
    job that nobody asks for is stopped after a while and restarted on demand.
    """
    look = partial(services.jobs.state, job, ASKER.get())
    state = await in_thread(services, look, threads=services.page_threads)
    if state is None:
        raise _no_job(job)
    state = await wait_for(services, state, 0.0 if prefer is None else wait_seconds(prefer))
    return JSONResponse(describe(state), headers={"cache-control": "no-store"})


@router.delete(
    "/{job}",
    summary="Stop a job",
    status_code=204,
    responses=problems(PageNotFound, JobWanted),
    response_class=Response,
)
async def delete_job(
    services: ServicesDep, job: Annotated[str, Path(description="As `Location` named it.")]
) -> Response:
    """Stop and forget a job; results it has already stored are kept.

    409 `job_wanted` if somebody else asked for it within the last 30 seconds.
    """
    delete = partial(services.jobs.delete, job, ASKER.get())
    if not await in_thread(services, delete, threads=services.page_threads):
        raise _no_job(job)
    return Response(status_code=204)


def _no_job(job: str) -> PageNotFound:
    return PageNotFound(
        f"no job {job[:40]!r}: jobs are kept for a day, or until they are deleted; those about a provisional revision, "
        "until the server stops"
    )


async def at_hand(services: Services, look: Callable[[], T], prefer: str | None) -> T | Response:
    """What `look` finds, when the job that it needs is over; 202 where that takes longer than ``Prefer: wait=``."""
    # Rows may need two jobs, one after the other: for the filter, and for the split.
    for _ in range(3):
        try:
            return await attempted(services, look)
        except InProgress as progress:
            state = await job_result(services, progress.state, wait_seconds(prefer))
            if not state.is_over:
                return accepted(state)
    raise Overloaded("the result was computed but could not be stored; try again in a moment", retry_after=1)


def wait_seconds(prefer: str | None) -> float:
    """Seconds from ``Prefer: wait=``."""
    match = re.search(r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,9})", prefer or "")
    return WAIT_SECONDS if match is None else min(MAX_WAIT_SECONDS, float(match[1]))


def accepted(state: JobState) -> Response:
    """Response 202: try again later."""
    headers = {"location": here(f"/v1/jobs/{state.id}"), "retry-after": "1", "cache-control": "no-store"}
    return JSONResponse(describe(state), 202, headers)


def describe(state: JobState) -> dict[str, Any]:
    """A job as the API returns it."""
    return {
        "job": state.id,
        "url": here(f"/v1/jobs/{state.id}"),
        "status": state.status,
        "done": state.done,
        "total": state.total,
        "unit": state.unit,
        "request": state.request,
        "result": here(state.result),
        "code": state.code,
        "detail": state.detail,
    }
