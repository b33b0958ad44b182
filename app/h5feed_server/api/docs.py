"""The OpenAPI description and its pages, served without resources from other hosts."""

from __future__ import annotations

import copy
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from h5feed.errors import SourceUnavailable

from ..catalog.dataset import Dataset
from ..services import Services
from .auth import WATCHED_PATHS, is_stranger
from .client_wheel import install_line
from .dependencies import ServicesDep, all_known, in_thread
from .examples import illustrate
from .forwarded import here

router = APIRouter(include_in_schema=False)

_CLIENT = "\nThe Python client that fits this server:\n\n```sh\n{}\n```\n"
_SCHEME = "token"
_GUARDED = "\nThis server requires a token. Click **Authorize** and enter it; the names then appear.\n"
_BEARER = {"type": "http", "scheme": "bearer", "description": "One of the server's tokens."}

_FOLDER = files(__package__)
_DOCS = _FOLDER.joinpath("docs.html").read_text("utf-8")
_REDOC = _FOLDER.joinpath("redoc.html").read_text("utf-8")

_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Redoc makes its style sheets itself, brings a font in them, and searches in a worker of its own.
_REDOC_POLICY = _POLICY.replace(
    "style-src 'self'", "style-src 'self' 'unsafe-inline'; font-src 'self' data:; worker-src blob:"
)


@router.get("/openapi.json")
async def openapi(request: Request, services: ServicesDep) -> Response:
    """The OpenAPI description, with examples of the data that are there.

    Without a token, where one is required, nothing of the data is told.
    """
    schema = copy.deepcopy(request.app.openapi())
    if not is_stranger(request):
        await all_known(services)
        datasets, names = await in_thread(services, lambda: _mounted(services), threads=services.page_threads)
        illustrate(schema, datasets, names)
    if prefix := here(""):
        schema["servers"] = [{"url": prefix}]
    line = install_line(request)
    if line is not None:
        schema["info"]["description"] += _CLIENT.format(line)
    if services.is_guarded:
        schema["components"]["securitySchemes"] = {_SCHEME: _BEARER}
        schema["security"] = [{_SCHEME: []}]
        schema["info"]["description"] += _GUARDED
        for path in WATCHED_PATHS:
            schema["paths"][path]["get"]["security"] = []
    # It is another one with a token, and when files come or go.
    return JSONResponse(schema, headers={"cache-control": "no-store"})


def _mounted(services: Services) -> tuple[list[Dataset], list[str]]:
    """The readable datasets, and the names of all that are not known to be unreadable."""
    try:
        lines = [line for line in services.catalog.listed() if line.status != "unreadable"]
    except SourceUnavailable:
        return [], []
    return [line.dataset for line in lines if line.dataset is not None], [line.name for line in lines]


@router.get("/docs")
async def docs() -> Response:
    """The description as a page where every endpoint can be tried."""
    return HTMLResponse(_DOCS, headers={"content-security-policy": _POLICY})


@router.get("/redoc")
async def redoc() -> Response:
    """The description as a page to read."""
    return HTMLResponse(_REDOC, headers={"content-security-policy": _REDOC_POLICY})


def mount_static(app: FastAPI) -> None:
    """Serve the scripts and style sheets of the pages."""
    folder: Any = _FOLDER / "static"
    app.mount("/static", StaticFiles(directory=str(folder)), name="static")
