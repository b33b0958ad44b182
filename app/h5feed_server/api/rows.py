"""Endpoints for rows by id."""

from __future__ import annotations

from typing import Annotated

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Header, Query, Request
from fastapi.responses import Response
from h5feed.errors import AmbiguousKey, BadParameter, KeysNotFound, NotAcceptable, RowOutOfRange, TooManyRequests
from h5feed.stored.no_store import keep_nothing

from ..catalog.dataset import Dataset
from ..services import Services
from ..splits.split_spec import FilteredSpec
from .binary import Format, binary, binary_response, cache_headers, is_known, negotiate, not_modified
from .dependencies import NamePath, ServicesDep, in_thread
from .jobs import JOB_RESPONSE, Prefer, at_hand
from .problem_responses import DATASET, FIELDS, problems
from .queries import RowsPostQuery, RowsQuery, RowsRequest
from .uploads import JSON_BODY, RowsPosted

router = APIRouter(prefix="/v1/datasets/{name}/rows", tags=["rows"])

_FORMATS: tuple[Format, ...] = ("safetensors", "npz", "npy", "json")

_PROBLEMS = (*DATASET, *FIELDS, RowOutOfRange, KeysNotFound, AmbiguousKey, NotAcceptable)

CacheControl = Annotated[
    str | None,
    Header(description="`no-store`: the server's caches do not keep what this request reads (RFC 9111, 5.2.1.5)."),
]


@router.get(
    "",
    summary="A range of rows",
    responses={**binary_response(*_FORMATS), **JOB_RESPONSE, **problems(*_PROBLEMS)},
    response_class=Response,
)
async def get_rows(
    request: Request,
    services: ServicesDep,
    name: NamePath,
    query: Annotated[RowsQuery, Query()],
    prefer: Prefer = None,
    cache_control: CacheControl = None,
) -> Response:
    """Rows `start`, `start`+`step` … below `stop`: of all rows, or of those that meet `where`. Or the rows in which the
    field `key` has each `value`.
    """
    form = negotiate(request, query.format, _FORMATS)

    def work() -> Response:
        dataset = services.catalog.dataset(name, query.revision)
        headers = cache_headers(request, dataset.revision, form)
        if is_known(request, headers):
            return not_modified(headers)
        _heed(cache_control, services)
        if query.key is not None:
            services.batcher.limits.check_count(len(query.value))
            several, limit = query.duplicates == "all", services.settings.max_rows
            wanted = services.keys.rows(dataset, query.key, query.value, are_words=True, several=several, limit=limit)
            return _answer(request, services, dataset, wanted, query, form, headers)
        kept = services.batcher.split_jobs.rows(dataset, "all", FilteredSpec(where=query.where))
        count = dataset.rows if kept is None else len(kept)
        stop = count if query.stop is None else query.stop
        if stop > count or query.start > stop:
            meet = "" if kept is None else f", the rows that meet where={', '.join(query.where)}"
            raise RowOutOfRange(
                f"rows {query.start} … {stop - 1} are not all there: valid is 0 ≤ start ≤ stop ≤ {count}{meet}"
            )
        services.batcher.limits.check_count(len(range(query.start, stop, query.step)))
        if kept is None:
            wanted = np.arange(query.start, stop, query.step)
        else:
            wanted = kept[query.start : stop : query.step].astype(np.int64)
        return _answer(request, services, dataset, wanted, query, form, headers)

    # Only a filter or an index takes long.
    is_long = query.where or query.key is not None
    return await (at_hand(services, work, prefer) if is_long else in_thread(services, work))


@router.post(
    "",
    summary="Rows from a list of ids",
    responses={200: binary_response(*_FORMATS)[200], **problems(*_PROBLEMS, TooManyRequests)},
    response_class=Response,
    openapi_extra=JSON_BODY,
)
async def post_rows(
    request: Request,
    services: ServicesDep,
    name: NamePath,
    query: Annotated[RowsPostQuery, Query()],
    wanted: RowsPosted,
    cache_control: CacheControl = None,
) -> Response:
    """Rows in the order asked, by their ids or by the values of a field; duplicates are kept. This is a POST because
    long lists do not fit into a URL.
    """
    form = negotiate(request, query.format, _FORMATS)

    def work() -> Response:
        dataset = services.catalog.dataset(name, query.revision)
        _heed(cache_control, services)
        listed = wanted.rows if wanted.rows is not None else wanted.keys or []
        services.batcher.limits.check_count(len(listed))
        if wanted.key is not None:
            several, limit = wanted.duplicates == "all", services.settings.max_rows
            rows = services.keys.rows(dataset, wanted.key, listed, several=several, limit=limit)
        else:
            dataset.check_rows(wanted.rows or [])
            rows = np.array(wanted.rows, np.int64)
        return _answer(request, services, dataset, rows, wanted, form, {"cache-control": "no-store"})

    return await in_thread(services, work)


def _heed(cache_control: str | None, services: Services) -> None:
    """Do what the caller says of caches; called in the context of the work for this request alone."""
    if cache_control and "no-store" in (part.strip().lower() for part in cache_control.split(",")):
        keep_nothing(services.settings.read_timeout)


def _answer(
    request: Request,
    services: Services,
    dataset: Dataset,
    rows: npt.NDArray[np.int64],
    wanted: RowsQuery | RowsRequest,
    form: Format,
    headers: dict[str, str],
) -> Response:
    chosen = dataset.chosen(wanted.fields, wanted.encoded)
    if form == "npy" and len(chosen) != 1:
        raise BadParameter(f"format=npy holds one array, but {len(chosen)} fields are asked for: name one with fields=")
    texts = {field.name for field in chosen if field.is_text}
    services.batcher.transposing.check([dataset], chosen)
    return binary(request, services.batcher.rows(dataset, chosen, rows, services.pool.lease), form, headers, texts)
