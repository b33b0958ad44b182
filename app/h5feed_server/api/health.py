"""Liveness and readiness."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from h5feed.errors import FeedError, Overloaded, Preparing, ReadTimeout, SourceUnavailable

from ..catalog.catalog import AWAY_RETRY_SECONDS
from ..catalog.inspections import NotYet
from ..services import Services
from ..tokens.scope import SCOPE, unrestricted
from .dependencies import ServicesDep
from .one_at_a_time import OneAtATime, StillRunning
from .problem_responses import ANYWHERE, problems

router = APIRouter(tags=["health"])

READY_SECONDS = 5.0
"""How long a successful read stays valid before it is repeated."""

READY_DEADLINE = 4.0
"""Deadline of a check in seconds. The system reports no error for a disk that hangs, so only the time shows it."""


@dataclass
class ReadyState:
    """When a read last succeeded; one per process."""

    worked: float = float("-inf")
    # Checks have their own thread. If a disk hangs, they would otherwise block the threads that serve requests.
    checking: OneAtATime[None] = field(default_factory=lambda: OneAtATime("h5feed-ready"))


@router.get(
    "/healthz",
    summary="Whether the server runs",
    responses=problems(base=ANYWHERE),
    response_class=PlainTextResponse,
)
async def healthz() -> Response:
    """Responds as long as the process is running."""
    return PlainTextResponse("ok")


@router.get(
    "/readyz",
    summary="Whether the server can read its data",
    responses=problems(SourceUnavailable, Preparing, Overloaded, ReadTimeout, base=ANYWHERE),
    response_class=PlainTextResponse,
)
async def readyz(request: Request, services: ServicesDep) -> Response:
    """Responds with 200 if the server has recently read from a dataset and everything that it served is still
    available. Unreadable files are ignored. If the check takes more than a few seconds, because a disk hangs, the
    response is 503. If only the listing of an object store fails, the response is 200 and says so. Datasets in stores
    that `h5feed.toml` mounts are not checked.
    """
    state: ReadyState = request.app.state.ready
    try:
        await state.checking.run(partial(_check, services, state), READY_DEADLINE)
    except StillRunning as late:
        state.worked = float("-inf")
        raise SourceUnavailable(
            f"the check has been waiting for the {_storage(services)} for {late.seconds:.0f} s",
            retry_after=AWAY_RETRY_SECONDS,
        ) from None
    except SourceUnavailable as error:
        if not SCOPE.get().is_everything:
            # The message names folders. Without a full token, give only this summary; the log has the details.
            detail = "files that were served are not available at the moment"
            raise SourceUnavailable(detail, retry_after=error.retry_after) from None
        raise
    if (troubles := services.catalog.stores.troubles()) and SCOPE.get().is_everything:
        # What was listed before is served all the same, and so is everything else.
        return PlainTextResponse(f"ok, but {'; '.join(troubles)}")
    return PlainTextResponse("ok")


def _storage(services: Services) -> str:
    return "disk" if services.settings.store is None else "object store"


def _check(services: Services, state: ReadyState) -> None:
    trouble = services.catalog.trouble()
    if trouble is not None:
        state.worked = float("-inf")
        raise SourceUnavailable(trouble, retry_after=AWAY_RETRY_SECONDS)
    if time.monotonic() - state.worked > READY_SECONDS:
        _read_something(services)
        state.worked = time.monotonic()


def _read_something(services: Services) -> None:
    with unrestricted():
        _read_sample(services)


def _read_sample(services: Services) -> None:
    # A mounted store that does not answer must not take the rest of the data out of service.
    entries = [entry for entry in services.catalog.entries() if not services.catalog.is_mounted(entry.name)]
    if entries and not any(entry.outcome.done() for entry in entries):
        raise Preparing("the data folder is still being scanned", retry_after=1)
    candidates = [dataset for entry in entries for dataset in entry.datasets()]
    failure: FeedError | None = None
    # Try different datasets each time, to notice partial failures, and up to three, so that one bad file is no failure.
    for offset in range(min(3, len(candidates))):
        name = candidates[(int(time.monotonic()) + offset) % len(candidates)].name
        try:
            dataset = services.catalog.dataset(name)
            field = next(
                (f for f in dataset.fields if not f.unreadable and not f.is_ragged and f.row_bytes < 64 << 20), None
            )
            if field is not None and dataset.rows:
                row = np.array([int(time.monotonic()) % dataset.rows], np.int64)
                out = np.empty((1, *field.sample_shape), field.dtype)
                services.batcher.reader.read_from_source(field.column, row, out)
            return
        except FeedError as error:
            failure = error
        except NotYet as late:
            failure = late.problem
    if failure is not None:
        raise Overloaded(f"no dataset could be read: {failure.code}", retry_after=5)
