"""The OpenAPI description and its page, served without resources from other hosts."""

from __future__ import annotations

import copy
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles

from .auth import WATCHED_PATHS, is_stranger
from .dependencies import ServicesDep, in_thread
from .openapi import describe

router = APIRouter(include_in_schema=False)

MAX_NAMES = 500
"""Datasets in the drop-down of the page; more are typed in."""

_SCHEME = "token"
_GUARDED = "\nThis server has tokens: the names come when you have given one of them to **Authorize**.\n"
_BEARER = {"type": "http", "scheme": "bearer", "description": "One of the server's tokens (`H5FEED_TOKENS`)."}

_PAGE = files(__package__).joinpath("docs.html").read_text("utf-8")


@router.get("/openapi.json")
async def openapi(request: Request, services: ServicesDep) -> Response:
    """The OpenAPI description, with dataset names as examples for the parameter ``name``.

    They are examples and not an ``enum``, so generated clients keep working when files change. Without a token,
    where one is required, no names are included.
    """
    schema = copy.deepcopy(describe(request.app))
    names = [] if is_stranger(request) else await in_thread(services, services.catalog.names)
    for path in schema["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path" and parameter["name"] == "name" and names:
                    parameter["examples"] = {name: {"value": name} for name in names[:MAX_NAMES]}
    if services.settings.token_list:
        schema["components"]["securitySchemes"] = {_SCHEME: _BEARER}
        schema["security"] = [{_SCHEME: []}]
        schema["info"]["description"] += _GUARDED
        for path in WATCHED_PATHS:
            schema["paths"][path]["get"]["security"] = []
    # It is another one with a token, and when files come or go.
    return JSONResponse(schema, headers={"cache-control": "no-store"})


@router.get("/docs")
async def docs(request: Request) -> Response:
    return HTMLResponse(_PAGE)


def mount_static(app: FastAPI) -> None:
    """Serve the files of Swagger UI from an installed package."""
    folder: Any = files("fastapi_offline") / "static"
    app.mount("/static", StaticFiles(directory=str(folder)), name="static")
