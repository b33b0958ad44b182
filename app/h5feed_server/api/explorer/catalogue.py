"""The first page: every dataset with a few of its samples, what cannot be served and why, and what the server does."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict
from pydantic import Field as Param

from ...catalog.dataset import Dataset
from ...catalog.description import rows_of
from ...catalog.discovery import shown
from ...catalog.entry import Listed
from ...storage.signatures import NOT_HDF5
from ..dependencies import ServicesDep, all_known, in_thread
from .activity import in_scope, rates
from .dataset import summary
from .samples import strip_field
from .snippets import curl, python
from .web import REFRESH_SECONDS, Page, answer, link, pages, parsed

router = pages()

PER_PAGE = 30
_MOST_FIELDS = 6
_PATIENCE_SECONDS = 1.0
"""How long a page that is opened right after the start waits for the first inspections."""


class CatalogueQuery(BaseModel):
    """Which datasets are listed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    q: str | None = Param(None, max_length=200, description="Only names that contain this.")
    sort: Literal["name", "rows", "bytes"] = "name"
    offset: int = Param(0, ge=0, le=2**62)
    limit: int = Param(PER_PAGE, ge=1, le=1000)


@router.get("/")
async def catalogue_page(request: Request, services: ServicesDep) -> Response:
    """The catalogue."""
    query = parsed(CatalogueQuery, request)
    await all_known(services, _PATIENCE_SECONDS)

    def work() -> Page:
        needle = (query.q or "").lower()
        everything = services.catalog.listed()
        lines = [line for line in everything if needle in line.name.lower()]
        # What can be looked at comes first.
        measure = {"name": _is_served, "rows": _rows, "bytes": _bytes}[query.sort]
        lines.sort(key=lambda line: -measure(line))
        shown_lines = lines[query.offset : query.offset + query.limit]
        data = {
            "datasets": [_described(line) for line in shown_lines],
            "total": len(lines),
            "all": len(everything),
            "offset": query.offset,
            "limit": query.limit,
            "preparing": sum(line.status == "preparing" for line in everything),
            "now": rates(in_scope(services)),
        }
        view = {
            "query": query,
            "strips": [_strip(line) for line in shown_lines],
            "trees": [_tree(line) for line in shown_lines],
            "page_url": lambda offset: link(q=query.q, sort=_changed(query.sort), offset=offset or None),
            "sort_url": lambda sort: link(q=query.q, sort=_changed(sort)),
            "last_offset": max(0, len(lines) - 1) // query.limit * query.limit,
        }
        listing = f"print(feed.datasets({repr(query.q) if query.q else ''}))"
        snippets = [python(request, None, listing), curl(request, link("v1", "datasets", q=query.q or None))]
        reload = REFRESH_SECONDS if data["preparing"] else None
        return Page("catalogue.html", "Datasets", data, view, snippets=snippets, reload=reload)

    return answer(request, await in_thread(services, work, threads=services.page_threads))


def _changed(sort: str) -> str | None:
    return None if sort == "name" else sort


def _is_served(line: Listed) -> int:
    return int(line.dataset is not None)


def _rows(line: Listed) -> int:
    return -1 if line.dataset is None else line.dataset.rows


def _bytes(line: Listed) -> int:
    return -1 if line.dataset is None else _stored(line.dataset)


def _stored(dataset: Dataset) -> int:
    return dataset.stored_bytes


def _described(line: Listed) -> dict[str, Any]:
    dataset = line.dataset
    described: dict[str, Any] = {
        "name": line.name,
        "status": line.status,
        "reason": line.reason,
        "files": [shown(file) for file in line.files[:3]],
        "more_files": max(0, len(line.files) - 3),
        "rows": None,
        "bytes": None,
        "revision": None,
        "summary": None,
        "fields": [],
        "more_fields": 0,
        "splits": {},
    }
    if dataset is not None:
        described |= {
            "rows": dataset.rows,
            "bytes": _stored(dataset),
            "revision": dataset.revision,
            "summary": summary(dataset),
            "fields": [field.name for field in dataset.fields[:_MOST_FIELDS]],
            "more_fields": max(0, len(dataset.fields) - _MOST_FIELDS),
            "splits": rows_of(dataset.native),
        }
    return described


def _tree(line: Listed) -> str | None:
    """Where the contents of files are shown that cannot be served; None where they are not HDF5."""
    if line.status != "unreadable" or not line.files or NOT_HDF5 in (line.reason or ""):
        return None
    return link("datasets", line.name, "tree")


def _strip(line: Listed) -> str | None:
    dataset = line.dataset
    if dataset is None or strip_field(dataset) is None:
        return None
    return link("datasets", dataset.name, "strip", revision=dataset.revision)
