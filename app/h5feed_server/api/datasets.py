"""Endpoints for the catalogue and for dataset metadata."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse
from h5feed.errors import SourceUnavailable

from ..catalog.croissant import croissant
from ..catalog.description import describe_dataset
from ..catalog.discovery import shown
from ..catalog.entry import Listed
from ..catalog.names import tell_list
from .client_wheel import server_url
from .dependencies import NamePath, ServicesDep, all_known, in_thread
from .problem_responses import DATASET, problems
from .queries import CatalogQuery
from .response_models import Catalogue, DatasetDescription, answers

router = APIRouter(prefix="/v1/datasets", tags=["datasets"])

_IN_LIST = (
    *("name", "status", "reason", "revision", "provisional", "content", "hashing"),
    *("rows", "native_splits", "files"),
)
_FIELD_IN_LIST = ("name", "role", "shape", "dtype", "readable", "reason")


@router.get("", summary="All datasets", **answers(Catalogue, problems(SourceUnavailable)))
async def list_datasets(services: ServicesDep, query: Annotated[CatalogQuery, Query()]) -> dict[str, Any]:
    """The catalogue, one page at a time.

    `status` is `ok`, `preparing`, `unreadable` (`reason` says why) or `unavailable` (for example, because its disk
    is not mounted).
    """
    await all_known(services)

    def work() -> dict[str, Any]:
        needle = (query.q or "").lower()
        lines = [line for line in services.catalog.listed() if needle in line.name.lower()]
        page = lines[query.offset : query.offset + query.limit]
        tell_list(line.dataset.revision for line in page if line.dataset is not None)
        return {
            "datasets": [_summary(line) for line in page],
            "total": len(lines),
            "limit": query.limit,
            "offset": query.offset,
        }

    return await in_thread(services, work, threads=services.page_threads)


@router.get("/{name}", summary="One dataset and its fields", **answers(DatasetDescription, problems(*DATASET)))
async def get_dataset(
    services: ServicesDep,
    name: NamePath,
    revision: Annotated[str | None, Query(description="Answer 409 if the data are not this revision's.")] = None,
) -> dict[str, Any]:
    """Fields with shape, dtype, role (and why), chunks, filters and sizes; attributes; the cost of a shuffled batch.

    `provisional`: the revision is a provisional name, which only this server knows, because the files have not all been
    hashed (`hashing` says how far it is), or because the request names it. `content`: the revision by content, if it is
    known.
    """
    return await in_thread(services, lambda: describe_dataset(services.catalog.dataset(name, revision)))


class JsonLd(JSONResponse):
    """JSON-LD, as dataset search engines request it."""

    media_type = "application/ld+json"


@router.get(
    "/{name}/croissant",
    summary="Croissant document",
    response_class=JsonLd,
    responses=problems(*DATASET),
)
async def get_croissant(
    request: Request,
    services: ServicesDep,
    name: NamePath,
    revision: Annotated[str | None, Query(description="Answer 409 if the data are not this revision's.")] = None,
) -> JsonLd:
    """The dataset in the vocabulary of MLCommons (Croissant 1.1): its card, fields, splits, and the URL of its rows."""
    base_url = server_url(request)
    return await in_thread(services, lambda: JsonLd(croissant(services.catalog.dataset(name, revision), base_url)))


def _summary(line: Listed) -> dict[str, Any]:
    if line.dataset is not None:
        whole = describe_dataset(line.dataset)
        fields = [{key: field[key] for key in _FIELD_IN_LIST} for field in whole["fields"]]
        return {key: whole[key] for key in _IN_LIST} | {"fields": fields}
    return {
        "name": line.name,
        "status": line.status,
        "reason": line.reason,
        "revision": None,
        "provisional": False,
        "content": None,
        "hashing": None,
        "rows": None,
        "native_splits": [],
        "files": [shown(file) for file in line.files],
        "fields": [],
    }
