"""The plan of an order and its batches: the way of a batch begins and ends here."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from h5feed.errors import TooLarge
from h5feed.wire import Tensor

from ..batching import BatchPlan
from ..services import Services
from .bodies import BINARY_RESPONSE, BlockStream, Bytes, binary, cache_headers, is_known, negotiate, not_modified
from .deps import NamePath, ServicesDep, in_thread
from .queries import BatchQuery, PlanQuery, StreamQuery

router = APIRouter(prefix="/v1/datasets/{name}", tags=["batches"])

REMEMBERED_QUERIES = 256
"""Valid query strings kept, of at most `REMEMBERED_LENGTH` bytes each."""

REMEMBERED_LENGTH = 2048


class RememberedQuery(APIRoute):
    """A route that validates a query string once: in an epoch only the index in the path changes, and validating is
    most of what a request costs beside its bytes."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        validated = super().get_route_handler()

        async def handle(request: Request) -> Response:
            query = request.app.state.queries.get(request.scope["query_string"])
            index = request.path_params["index"]
            if query is None or not (index.isascii() and index.isdigit() and len(index) < 18):
                return await validated(request)
            return await get_batch(request, request.app.state.services, request.path_params["name"], int(index), query)

        return handle


single = APIRouter(prefix="/v1/datasets/{name}", tags=["batches"], route_class=RememberedQuery)


def _remember(request: Request, query: BatchQuery) -> None:
    queries: dict[bytes, BatchQuery] = request.app.state.queries
    text = request.scope["query_string"]
    if text not in queries and len(text) <= REMEMBERED_LENGTH:
        if len(queries) >= REMEMBERED_QUERIES:
            del queries[next(iter(queries))]
        queries[text] = query


BLOCK_BYTES = 4 << 20
"""Bytes: small batches of a stream are put together up to this much and sent by one write."""

MAX_STREAM_BLOCKS = 4096
"""Bound on what one streamed request may ask for, in blocks."""


@router.get("/plan", summary="What an epoch of an order will be")
async def get_plan(services: ServicesDep, name: NamePath, query: Annotated[PlanQuery, Query()]) -> dict[str, Any]:
    """Rows, batches, rows of the last one and bytes per batch: what a client needs before the first fetch."""
    plan = await in_thread(services, partial(_plan, services, name, query))
    grid = plan.grid
    return {
        "dataset": plan.dataset.name,
        "revision": plan.dataset.revision,
        "split": query.split,
        "rows": grid.rows,
        "batch_size": grid.batch_size,
        "batches": grid.batches,
        "last": grid.last,
        "last_rows": grid.size(grid.batches - 1) if grid.batches else 0,
        "batch_bytes": plan.full.nbytes,
        "last_bytes": plan.tail.nbytes if grid.batches else 0,
        "tensors": [_describe(tensor) for tensor in plan.full.tensors],
        "limits": {"body_bytes": services.settings.max_body_bytes, "rows": services.settings.max_rows},
    }


@single.get("/batches/{index}", summary="One batch", responses=BINARY_RESPONSE, response_class=Response)
async def get_batch(
    request: Request,
    services: ServicesDep,
    name: NamePath,
    index: Annotated[int, Path(ge=0, description="Number of the batch in the epoch.", examples=[0])],
    query: Annotated[BatchQuery, Query()],
) -> Response:
    """Batch `index` of an order, binary: a pure function of this URL."""
    _remember(request, query)
    form = negotiate(request, query.format, ("safetensors", "npz", "npy"))

    def work() -> Response:
        began = time.perf_counter()
        plan = _plan(services, name, query)
        nbytes = plan.body(index).nbytes
        headers = cache_headers(request, plan.dataset.revision, form)
        if is_known(request, headers):
            return not_modified(headers)
        planned = time.perf_counter()
        buffer = _filled(services, plan, index, index + 1, nbytes)
        headers["server-timing"] = (
            f"plan;dur={(planned - began) * 1e3:.2f}, read;dur={(time.perf_counter() - planned) * 1e3:.2f}"
        )
        return binary(buffer, form, headers)

    return await in_thread(services, work)


@router.get("/batches", summary="Many batches in one answer", responses=BINARY_RESPONSE, response_class=Response)
async def stream_batches(
    request: Request, services: ServicesDep, name: NamePath, query: Annotated[StreamQuery, Query()]
) -> Response:
    """Batches `start` … `stop`-1, back to back: for small batches many times faster than a request each."""
    form = negotiate(request, query.format, ("safetensors",))
    plan = await in_thread(services, partial(_plan, services, name, query))
    nbytes = plan.nbytes(query.start, query.stop)
    headers = cache_headers(request, plan.dataset.revision, form)
    if is_known(request, headers):
        return not_modified(headers)
    per_block = max(1, BLOCK_BYTES // plan.full.nbytes)
    starts = range(query.start, query.stop, per_block)
    if len(starts) > MAX_STREAM_BLOCKS:
        raise TooLarge(f"batches {query.start} … {query.stop - 1} are too many at once: ask for {per_block} at a time")
    blocks: list[Callable[[], Bytes]] = []
    for start in starts:
        stop = min(start + per_block, query.stop)
        blocks.append(partial(_filled, services, plan, start, stop, plan.nbytes(start, stop)))
    return BlockStream(blocks, partial(in_thread, services), nbytes, headers)


def _plan(services: Services, name: str, query: PlanQuery) -> BatchPlan:
    return services.batcher.plan(name, query.spec, query.batch_size, query.revision)


def _filled(services: Services, plan: BatchPlan, start: int, stop: int, nbytes: int) -> Bytes:
    buffer = services.pool.lease(nbytes, services.settings.admit_timeout)
    plan.fill(start, stop, buffer)
    return buffer


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}
