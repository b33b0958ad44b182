"""Endpoints for statistics of fields, per split."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Annotated

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, Response
from h5feed.errors import NotAcceptable, RowOutOfRange, UnsupportedField
from h5feed.order import SPLIT_ALIASES
from h5feed.wire import Body, Tensor
from pydantic import Field, field_validator

from ..batches.joins import Joined
from ..catalog.dataset import Dataset
from ..jobs.registry import InProgress
from ..services import Services
from ..splits.joins_spec import JoinsSpec
from ..stats.field_stats import FieldStats
from .binary import (
    NOT_MODIFIED,
    Format,
    binary,
    binary_response,
    cache_headers,
    is_known,
    negotiate,
    not_modified,
    query_items,
    url_headers,
)
from .dependencies import NamePath, ServicesDep, in_thread
from .jobs import JOB_RESPONSE, Prefer, at_hand
from .problem_responses import DATASET, FIELDS, JOINS, SPLITS, problems
from .queries import SplitsQuery
from .response_models import Statistics, answers

router = APIRouter(prefix="/v1/datasets/{name}/stats", tags=["statistics"])

_FORMATS: tuple[Format, ...] = ("safetensors", "npz", "npy", "json")

STATS_PROBLEMS = (*DATASET, *FIELDS, *SPLITS, *JOINS)
STATS_RESPONSES = {**NOT_MODIFIED, **JOB_RESPONSE, **problems(*STATS_PROBLEMS)}


class StatsQuery(SplitsQuery):
    split: str = Field("all", description="`all`, `train`, `val`, `test`, or a stored split. Only its rows are read.")
    field: str | None = Field(None, description="Field to compute statistics of. Default: all readable fields.")

    @field_validator("split")
    @classmethod
    def _canonical(cls, value: str) -> str:
        return SPLIT_ALIASES.get(value, value)


class JoinedStatsQuery(StatsQuery, JoinsSpec):
    pass


class MeanImageQuery(JoinedStatsQuery):
    field: str = Field(description="Image field.")
    format: Format | None = Field(None, description="Overrides the Accept header.")


@router.get("", summary="Statistics of fields", **answers(Statistics, STATS_RESPONSES))
async def get_stats(
    request: Request,
    services: ServicesDep,
    name: NamePath,
    query: Annotated[JoinedStatsQuery, Query()],
    prefer: Prefer = None,
) -> Response:
    """For each field, over the rows of one split: count, min, max, mean, std (`ddof=0`; exact for integers), zeros, NaN
    and infinities, histogram; the same per channel; rows per class with balanced weights; the most frequent texts.

    Those of a field `OTHER/field` of a joined dataset are of the partners of these rows, each as often as it is one.

    Statistics are computed once per revision. If that takes longer than `Prefer: wait=`, the response is 202 with
    the URL of a job.
    """
    answer = await found_stats(request, services, name, query, prefer)
    if isinstance(answer, Response):
        return answer
    joined, fields = answer
    dataset, splits = joined.dataset, None
    if query.split != "all":
        splits = await in_thread(services, partial(services.batcher.splitter.splits, dataset, query.spec.split_spec))
    content = {
        "dataset": dataset.name,
        "revision": dataset.revision,
        "split": query.split,
        "stored": None if splits is None else query.split in splits.stored,
        "note": None if splits is None else splits.note,
        "replaces": None if splits is None else splits.replaces,
        "where": query.where,
        "rows": next(iter(fields.values())).report["rows"] if fields else dataset.rows,
        "fields": {name: stats.report for name, stats in fields.items()},
    }
    return JSONResponse(content, headers=stats_headers(request, dataset, joined))


@router.get(
    "/mean-image",
    summary="Mean image",
    responses={**binary_response(*_FORMATS), **JOB_RESPONSE, **problems(*STATS_PROBLEMS, NotAcceptable, RowOutOfRange)},
    response_class=Response,
)
async def get_mean_image(
    request: Request,
    services: ServicesDep,
    name: NamePath,
    query: Annotated[MeanImageQuery, Query()],
    prefer: Prefer = None,
) -> Response:
    """The mean of a field's samples over the rows of a split, element by element, as the float32 tensor
    `mean_image`.
    """
    form = negotiate(request, query.format, _FORMATS)
    wanted = JoinedStatsQuery(**{key: getattr(query, key) for key in JoinedStatsQuery.model_fields})
    answer = await found_stats(request, services, name, wanted, prefer)
    if isinstance(answer, Response):
        return answer
    joined, fields = answer
    dataset = joined.dataset
    ((field, stats),) = fields.items()
    image = mean_image_of(dataset, field, stats, query)

    def work() -> Response:
        about = {"dataset": dataset.name, "revision": dataset.revision, "epoch": "0", "batches": "1"}
        body = Body([Tensor("mean_image", np.dtype("<f4"), image.shape)], about)
        buffer = services.pool.lease(body.nbytes)
        body.place(buffer, 0)["mean_image"][...] = image
        headers = cache_headers(request, joined.revisions, form, may_pin=joined.is_pinned)
        return binary(request, buffer, form, headers)

    return await in_thread(services, work)


def mean_image_of(dataset: Dataset, field: str, stats: FieldStats, query: StatsQuery) -> npt.NDArray[np.float32]:
    """The mean of the images that `query` is about, (*sample,).

    Raises
    ------
    UnsupportedField, RowOutOfRange
    """
    if stats.mean_image is None:
        raise UnsupportedField(f"field {field!r} has no mean image: its samples are not images, or are too large")
    if not stats.report["rows"]:
        raise RowOutOfRange(f"split {query.split!r} of {dataset.name!r} has no rows{query.spec.where_text}")
    return stats.mean_image


async def found_stats(
    request: Request, services: Services, name: str, query: JoinedStatsQuery, prefer: str | None
) -> tuple[Joined, dict[str, FieldStats]] | Response:
    """The statistics that a query asks for, or the answer that they are known (304) or still to come (202)."""

    def look() -> tuple[Joined, dict[str, FieldStats]] | Response:
        dataset = services.catalog.dataset(name, query.revision)
        joined = services.batcher.joined(dataset, query)
        headers = stats_headers(request, dataset, joined)
        if is_known(request, headers):
            return not_modified(headers)
        statistics = services.statistics
        fields, others = statistics.fields(joined, query.field), joined if joined.others else None
        spec = query.spec
        known = statistics.find(dataset, fields, query.split, spec, others)
        if known is not None:
            return joined, known
        # What is wrong with the split is said now, not by the job; of a split that takes long, by the job.
        with contextlib.suppress(InProgress):
            joined.check_complete(statistics.rows(dataset, query.split, spec))
        path = f"{request.scope['path']}?{request.scope['query_string'].decode('ascii', 'replace')}"
        raise InProgress(statistics.start(dataset, fields, query.split, spec, path, others))

    return await at_hand(services, look, prefer)


def stats_headers(request: Request, dataset: Dataset, joined: Joined | None = None) -> dict[str, str]:
    """ETag and Cache-Control of an answer that is a pure function of its URL and the revision, or revisions."""
    private, path, items = request.app.state.services.is_guarded, request.scope["path"], query_items(request)
    revisions, may_pin = (dataset.revision, True) if joined is None else (joined.revisions, joined.is_pinned)
    return url_headers(path, items, revisions, "json", private=private, may_pin=may_pin)
