"""What the server does now: rates, callers, slow requests, and how much was found in memory."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from ...services import Services
from ...sharing.caller import CALLER
from ...sharing.metrics import CACHES, Everywhere
from ...sharing.traffic import Activity
from ...sharing.trimming import resident_bytes
from ...tokens.scope import SCOPE
from ..dependencies import ServicesDep, in_thread
from ..redaction import without_secrets
from .charts import Bar, Chart
from .snippets import python
from .web import Page, answer, pages, size

router = pages()

RATE_SECONDS = 10
"""Over how many seconds rates are taken."""

_RELOAD_SECONDS = 2

_ABOUT = re.compile(r"/(?:v1/)?datasets/([^/]+)")
"""Paths that are about a dataset."""


@router.get("/feed")
async def feed_page(request: Request, services: ServicesDep) -> Response:
    """What the server does now."""

    def work() -> Page:
        activity = in_scope(services)
        found = services.metrics.everywhere()
        held = services.pool.held()
        settings = services.settings
        data = {
            "now": rates(activity),
            "workers": settings.workers,
            "workers_heard_of": activity.workers,
            "totals": activity.totals,
            "found_in_memory": _found_in_memory(activity),
            "readers": settings.readers,
            "in_flight_bytes": sum(held.values()),
            "in_flight_limit": settings.inflight_bytes,
            "in_flight_bytes_of_all": found.value("inflight_bytes"),
            "in_flight_limit_of_all": found.value("inflight_limit_bytes"),
            "each_worker": _each_worker(found),
            "callers": activity.callers,
            "slowest": activity.slowest,
            "seconds": activity.seconds,
        }
        view = {
            "charts": [
                ("Batches per second", _chart("batches per second", activity, "batches")),
                ("Bytes per second", _chart("bytes per second", activity, "bytes")),
                ("Requests per second", _chart("requests per second", activity, "requests")),
            ]
        }
        return Page("feed.html", "Activity", data, view, snippets=[python(request, None)], reload=_RELOAD_SECONDS)

    return answer(request, await in_thread(services, work, threads=services.page_threads))


def in_scope(services: Services) -> Activity:
    """What the server has done, as far as the caller may see it: not who else is there, nor what they ask for, if there
    are datasets that are not for its token."""
    activity = services.traffic.activity()
    slowest = [{**one, "what": without_secrets(one["what"])} for one in activity.slowest]
    callers = activity.callers
    if not SCOPE.get().is_everything:
        names = set(services.catalog.names())
        slowest = [one for one in slowest if (about := _ABOUT.match(one["what"])) and about[1] in names]
        callers = [one for one in callers if one["name"] == CALLER.get()]
    return replace(activity, slowest=slowest, callers=callers)


def rates(activity: Activity) -> dict[str, Any]:
    """Batches, bytes and requests per second, and how many callers fetch batches."""
    lately = activity.seconds[-RATE_SECONDS:]
    return {
        "batches_per_second": sum(one["batches"] for one in lately) / RATE_SECONDS,
        "bytes_per_second": sum(one["bytes"] for one in lately) / RATE_SECONDS,
        "requests_per_second": sum(one["requests"] for one in lately) / RATE_SECONDS,
        "callers": len(activity.callers),
    }


def _found_in_memory(activity: Activity) -> float | None:
    """Share of the bytes of batches that no chunk was decoded for; None where nothing was sent."""
    sent = activity.totals["bytes"]
    return max(0.0, 1 - activity.totals["decoded"] / sent) if sent else None


def _each_worker(found: Everywhere) -> list[dict[str, Any]]:
    """What each worker holds and has done; those of other workers are up to a second old."""
    lines = []
    for place, (pid, numbers) in found.workers.items():

        def of(name: str, label: str | None = None, numbers: list[float] = numbers) -> int:
            return int(found.value(name, label, numbers))

        hits, misses = (sum(of(f"cache_{kind}_total", cache) for cache in CACHES) for kind in ("hits", "misses"))
        lines.append(
            {
                "worker": place,
                "pid": pid,
                "resident_bytes": resident_bytes(pid) or 0,
                "connections": of("connections"),
                "in_flight_bytes": of("inflight_bytes"),
                "busy_threads": of("request_threads_busy"),
                "requests": found.requests(numbers),
                "batches": of("batches_total"),
                "cache_hits": hits / (hits + misses) if hits + misses else None,
            }
        )
    return lines


def _chart(name: str, activity: Activity, what: str) -> Chart:
    counts = [one[what] for one in activity.seconds]
    highest = max(counts, default=0)
    said = size(highest) if what == "bytes" else f"{highest:,}"
    bars = [
        Bar(count / max(1, highest), f"{len(counts) - place} s ago: {size(count) if what == 'bytes' else count}")
        for place, count in enumerate(counts)
    ]
    return Chart(bars, f"{name} over the last {len(counts)} seconds, at most {said}", f"{len(counts)} s ago", "now")
