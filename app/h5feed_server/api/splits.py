"""Endpoints for splits: rows per class, and row ids."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import Response
from h5feed.errors import NotAcceptable, TooLarge
from h5feed.order import SPLIT_ALIASES
from h5feed.wire import ROWS, Body, Tensor

from ..row_bits import RowRuns
from .binary import Format, binary, binary_response, cache_headers, is_known, negotiate, not_modified
from .dependencies import NamePath, ServicesDep
from .jobs import JOB_RESPONSE, Prefer, at_hand
from .problem_responses import DATASET, FIELDS, SPLITS, problems
from .queries import SplitReportQuery, SplitRowsQuery
from .response_models import Splits, answers

router = APIRouter(prefix="/v1/datasets/{name}/splits", tags=["splits"])

_FORMATS: tuple[Format, ...] = ("safetensors", "npz", "json")


_ROWS_AT_ONCE = 1 << 20

_PROBLEMS = (*DATASET, *FIELDS, *SPLITS)


@router.get("", summary="Rows and classes of each split", **answers(Splits, JOB_RESPONSE | problems(*_PROBLEMS)))
async def get_splits(
    services: ServicesDep, name: NamePath, query: Annotated[SplitReportQuery, Query()], prefer: Prefer = None
) -> Response:
    """For each split: rows, rows and share per class, balanced class weights, the largest deviation of a share from
    that in all rows (`max_deviation`), groups, and a digest of the row ids.

    With `where`, each split has those of its rows that meet it, and shares are of all rows that do.

    `method` names the scikit-learn call that gives the same rows; `note` has remarks. `stored`: whether the rows are
    those stored in the file. `replaces`: stored splits that were replaced, and which split now has how many of their
    rows.
    """

    def work() -> Response:
        dataset = services.catalog.dataset(name, query.revision)
        report = services.batcher.split_jobs.report(dataset, query.spec, query.classes)
        return Response(report, media_type="application/json")

    return await at_hand(services, work, prefer)


@router.get(
    "/{split}/rows",
    summary="Row ids of a split",
    responses={**binary_response(*_FORMATS), **JOB_RESPONSE, **problems(*_PROBLEMS, NotAcceptable)},
    response_class=Response,
)
async def get_split_rows(
    request: Request,
    services: ServicesDep,
    name: NamePath,
    split: Annotated[
        str, Path(description="`train`, `val`, `test`, `all`, or the name of a stored split.", examples=["train"])
    ],
    query: Annotated[SplitRowsQuery, Query()],
    prefer: Prefer = None,
) -> Response:
    """Row ids of a split that meet `where`, ascending, as the int64 tensor `__rows__`; 202 while they are being
    computed.

    If stored splits were replaced, the metadata entry `replaced` has the note of the splits.
    """
    form = negotiate(request, query.format, _FORMATS)

    def work() -> Response:
        dataset = services.catalog.dataset(name, query.revision)
        headers = cache_headers(request, dataset.revision, form)
        if is_known(request, headers):
            return not_modified(headers)
        wanted = SPLIT_ALIASES.get(split, split)
        services.batcher.splitter.check_divisible(dataset, query.spec.split_spec)
        about = {"dataset": dataset.name, "revision": dataset.revision, "epoch": "0", "batches": "1"}
        rows = services.batcher.split_jobs.rows(dataset, wanted, query.spec)
        if wanted != "all":
            splits = services.batcher.split_jobs.splits(dataset, query.spec.split_spec)
            about |= {"replaced": splits.note} if splits.replaces and splits.note else {}
        if rows is None:
            rows = RowRuns([(0, dataset.rows)])
        body = Body([Tensor(ROWS, np.dtype("<i8"), (len(rows),))], about)
        if body.nbytes > services.settings.max_body_bytes:
            limit = services.settings.max_body_bytes
            raise TooLarge(f"{len(rows)} row ids are more than {limit} bytes (H5FEED_MAX_BODY_BYTES)")
        buffer = services.pool.lease(body.nbytes)
        out = body.place(buffer, 0)[ROWS]
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            out[start : start + _ROWS_AT_ONCE] = rows[start : start + _ROWS_AT_ONCE]
        return binary(request, buffer, form, headers)

    return await at_hand(services, work, prefer)
