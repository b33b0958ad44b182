"""The read-only endpoints of h5grove (https://silx-kit.github.io/h5grove/), with which h5web and others open files.

Paths, parameters and responses are h5grove's. Errors are problem+json, with h5grove's ``message`` in addition. The
OpenAPI description does not include these endpoints, because another project specifies them.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute
from h5feed.errors import BadParameter, FeedError
from pydantic import BaseModel, BeforeValidator, ConfigDict

from ..catalog.served_files import served_file
from ..services import Services
from .dependencies import ServicesDep, in_thread
from .problems import bad_parameters, problem, shown_detail

_JSON = {"content-type": "application/json"}

_HEADERS = {
    "json": _JSON,
    "bin": {"content-type": "application/octet-stream"},
    "npy": {"content-type": "application/octet-stream", "content-disposition": 'attachment; filename="data.npy"'},
    "csv": {"content-type": "text/csv", "content-disposition": 'attachment; filename="data.csv"'},
    "tiff": {"content-type": "image/tiff", "content-disposition": 'attachment; filename="data.tiff"'},
}
"""Response headers of each format."""

_OLD_LINKS = {"true": "all", "false": "none"}
"""Values that earlier versions of h5grove used."""


class _Route(APIRoute):
    """Returns errors in the form that clients of h5grove expect."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        name = self.path.rpartition("/")[2]

        async def handle_errors(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                return _problem(bad_parameters(error, {"query": list(_QUERIES[name].model_fields)}))
            except FeedError as error:
                return _problem(error)

        return handle_errors


router = APIRouter(prefix="/h5grove", route_class=_Route, include_in_schema=False)


class _PathQuery(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    path: str = "/"


class _LinksQuery(_PathQuery):
    resolve_links: Annotated[
        Literal["none", "only_valid", "all"],
        BeforeValidator(lambda value: _OLD_LINKS.get(str(value).lower(), str(value).lower())),
    ] = "only_valid"


class _AttrQuery(_PathQuery):
    attr_keys: list[str] | None = None


class _StatsQuery(_PathQuery):
    selection: str | None = None


class _DataQuery(_StatsQuery):
    format: Literal["json", "bin", "csv", "npy", "tiff"] = "json"
    dtype: Literal["origin", "safe"] = "origin"
    flatten: bool = False


_QUERIES: dict[str, type[_PathQuery]] = {
    "meta": _LinksQuery,
    "attr": _AttrQuery,
    "data": _DataQuery,
    "stats": _StatsQuery,
    "paths": _LinksQuery,
}


@router.get("/meta")
async def get_meta(services: ServicesDep, query: Annotated[_LinksQuery, Query()]) -> Response:
    """Describe an object, and the members of a group."""
    return await _answer(services, "meta", query)


@router.get("/attr")
async def get_attr(services: ServicesDep, query: Annotated[_AttrQuery, Query()]) -> Response:
    """Return values of attributes."""
    return await _answer(services, "attr", query)


@router.get("/data")
async def get_data(services: ServicesDep, query: Annotated[_DataQuery, Query()]) -> Response:
    """Return values of an array."""
    return await _answer(services, "data", query, _HEADERS[query.format])


@router.get("/stats")
async def get_grove_stats(services: ServicesDep, query: Annotated[_StatsQuery, Query()]) -> Response:
    """Return the range, mean and standard deviation of the finite values of an array."""
    return await _answer(services, "stats", query)


@router.get("/paths")
async def get_paths(services: ServicesDep, query: Annotated[_LinksQuery, Query()]) -> Response:
    """Return the paths of everything in a group."""
    return await _answer(services, "paths", query)


async def _answer(services: Services, what: str, query: _PathQuery, headers: dict[str, str] = _JSON) -> Response:
    def work() -> Response:
        served = served_file(services.catalog, query.file)
        options = query.model_dump(exclude={"file"})
        # The memoryview keeps the buffer from being reused until the last byte is sent.
        content = services.browser.ask(what, served.files, services.pool.lease, **options)
        return Response(content, headers={**headers, "cache-control": "no-cache"})

    return await in_thread(services, work)


def _problem(error: FeedError) -> Response:
    # h5grove uses 422 for invalid parameters.
    status = 422 if isinstance(error, BadParameter) else None
    return problem(error, status=status, more={"message": shown_detail(error)})
