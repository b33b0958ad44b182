"""Endpoints for the plan of an order and for its batches."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from h5feed.errors import BatchOutOfRange, NotAcceptable
from h5feed.wire import Tensor

from ..batches.plan import BatchPlan
from ..services import Services
from .batch_stream import BatchStream, body_plan_of, filled, part_of, plan_of
from .binary import (
    Format,
    binary,
    binary_response,
    cache_headers,
    is_known,
    media_type,
    negotiate,
    not_modified,
    query_items,
)
from .dependencies import NamePath, ServicesDep, in_thread
from .problem_responses import ORDERS, problems
from .queries import BatchQuery, OneBatchQuery, PlanQuery, StreamQuery
from .response_models import Plan, answers

router = APIRouter(prefix="/v1/datasets/{name}", tags=["batches"])

_PROBLEMS = problems(*ORDERS, BatchOutOfRange, NotAcceptable)


@router.get("/plan", summary="Size of an epoch", **answers(Plan, problems(*ORDERS)))
async def get_plan(services: ServicesDep, name: NamePath, query: Annotated[PlanQuery, Query()]) -> dict[str, Any]:
    """Number of rows and batches, rows of the last batch and bytes per batch: what a client needs before its first
    request.

    `stored`: whether the rows are those of a split stored in the file. `note`: remarks on the splits. `replaces`:
    stored splits that were replaced, and how many of their rows are now in which split.
    """
    plan = await in_thread(services, partial(plan_of, services, name, query))
    grid = plan.grid
    return {
        "dataset": plan.dataset.name,
        "revision": plan.dataset.revision,
        "split": query.split,
        "stored": plan.is_stored,
        "note": plan.note,
        "replaces": plan.replaces,
        "where": query.where,
        "joined": {} if plan.joined is None else plan.joined.about,
        "rows": grid.rows,
        "batch_size": grid.batch_size,
        "batches": grid.batches,
        "last": grid.last,
        "window": query.window,
        "bucket_rows": None if plan.order.bucketed is None else plan.order.bucketed().window,
        "rows_decoded_together": plan.order.block,
        "last_rows": grid.size(grid.batches - 1) if grid.batches else 0,
        "ragged": plan.ragged,
        "batch_bytes": plan.full.nbytes,
        "last_bytes": plan.tail.nbytes if grid.batches else 0,
        "part_rows": plan.part_rows,
        "packed": _packed(plan),
        "tensors": [_describe(tensor) for tensor in plan.full.tensors],
        "limits": {"body_bytes": services.settings.max_body_bytes, "rows": services.settings.max_rows},
    }


def _packed(plan: BatchPlan) -> dict[str, Any] | None:
    if plan.order.packed is None:
        return None
    packed = plan.order.packed()
    return {
        "by": packed.name,
        "rows": packed.samples,
        "empty": packed.empty,
        "items": packed.items,
        "fill": packed.fill,
    }


_FORMATS: tuple[Format, ...] = ("safetensors", "npz", "npy", "json")


@router.get(
    "/batches/{index}",
    summary="One batch",
    responses={**binary_response(*_FORMATS), **_PROBLEMS},
    response_class=Response,
)
async def get_batch(
    request: Request,
    services: ServicesDep,
    name: NamePath,
    index: Annotated[int, Path(ge=0, description="Number of the batch in the epoch.", examples=[0])],
    query: Annotated[OneBatchQuery, Query()],
) -> Response:
    """Batch `index` of an order, in binary. The response depends on nothing but this URL.

    With `from_row` and `to_row`, it has only these rows of the batch.
    """
    form = negotiate(request, query.format, _FORMATS)
    if query.body != "tensors" and form != "safetensors":
        raise NotAcceptable(f"body={query.body} is only sent as safetensors, not as {form}")
    if form == "safetensors":
        return _stream(request, services, name, query, index, index + 1, query)

    def work() -> Response:
        plan = plan_of(services, name, query)
        part = part_of(plan, index, query)
        headers = cache_headers(request, plan.revisions, form, may_pin=plan.is_pinned)
        if is_known(request, headers):
            return not_modified(headers)
        texts = {field.name for field in plan.fields if field.is_text}
        return binary(request, filled(services, plan, index, index + 1, part), form, headers, texts)

    return await in_thread(services, work)


@router.get(
    "/batches",
    summary="Many batches in one response",
    responses={**binary_response("safetensors"), **_PROBLEMS},
    response_class=Response,
)
async def stream_batches(
    request: Request, services: ServicesDep, name: NamePath, query: Annotated[StreamQuery, Query()]
) -> Response:
    """Batches `start` … `stop`-1, one after the other. For small batches this is many times faster than one request
    per batch.
    """
    negotiate(request, query.format, ("safetensors",))
    return _stream(request, services, name, query, query.start, query.stop)


def _stream(
    request: Request,
    services: Services,
    name: str,
    query: BatchQuery,
    start: int,
    stop: int,
    one: OneBatchQuery | None = None,
) -> Response:
    if one is None or one.is_whole:
        request.app.state.queries.remember(request, query)
        one = None
    return BatchStream(
        services,
        partial(body_plan_of, services, name, query, request.scope),
        start,
        stop,
        path=request.scope["path"],
        items=query_items(request),
        if_none_match=request.headers.get("if-none-match", ""),
        media_type=media_type(request, "safetensors"),
        part=one,
    )


def _describe(tensor: Tensor) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype_name, "shape": list(tensor.shape)}
