"""Metrics of all workers, for Prometheus."""

from __future__ import annotations

from collections import Counter

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from h5feed.errors import HostNotAllowed, Overloaded, Unauthorized

from ..catalog.entry import Status
from ..sharing.metrics import Everywhere
from ..tokens.scope import SCOPE
from .dependencies import ServicesDep
from .exposition import OPENMETRICS, OPENMETRICS_TYPE, TEXT_TYPE, exposition
from .one_at_a_time import OneAtATime, StillRunning
from .problem_responses import ANYWHERE, problems

router = APIRouter(tags=["health"])

Collected = tuple[Everywhere, list[tuple[str, Status]], dict[str, float]]

_SECONDS = 5.0
"""Deadline of a response, which normally takes milliseconds."""

# A separate thread, so that metrics are available even if all other threads wait for a disk.
_collecting = OneAtATime[Collected]("h5feed-exposition")


@router.get(
    "/metrics",
    summary="Metrics of all workers",
    responses={
        200: {
            "description": "In Prometheus's text format, or in OpenMetrics if the `Accept` header asks for it.",
            "content": {"text/plain": {"schema": {"type": "string"}}, OPENMETRICS: {"schema": {"type": "string"}}},
        },
        **problems(Unauthorized, HostNotAllowed, Overloaded, base=ANYWHERE),
    },
    response_class=PlainTextResponse,
)
async def metrics(request: Request, services: ServicesDep) -> Response:
    """Counters since the start of the server, and gauges, summed over all workers. Every worker returns the same
    numbers; those of the other workers are up to a second old.
    """
    openmetrics = OPENMETRICS in request.headers.get("accept", "")

    def work() -> Collected:
        store = services.catalog.stores.shared_numbers()
        return services.metrics.everywhere(), services.catalog.statuses(), store

    try:
        found, statuses, store = await _collecting.run(work, _SECONDS)
    except StillRunning as late:
        slow = Overloaded(f"collecting the metrics has taken {late.seconds:.0f} s so far; try again", retry_after=5)
        raise slow.because_of("threads") from None
    # Those who ask at the same time share what was collected, and may have different tokens.
    covers = SCOPE.get().covers
    datasets = Counter[str](status for name, status in statuses if covers(name))
    text = exposition(found, datasets, store, openmetrics=openmetrics)
    media_type = OPENMETRICS_TYPE if openmetrics else TEXT_TYPE
    return Response(text, media_type=None, headers={"content-type": media_type, "cache-control": "no-store"})
