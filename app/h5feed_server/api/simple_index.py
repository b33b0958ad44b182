"""A package index with one project, the client: PEP 503 as HTML, PEP 691 as JSON. Open to everybody."""

from __future__ import annotations

from collections.abc import AsyncIterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from h5feed.errors import PageNotFound

from .auth import CLIENT_FOLDER
from .binary import is_known, not_modified
from .client_wheel import PROJECT, ClientWheel, wheel_url

router = APIRouter(prefix=CLIENT_FOLDER.rstrip("/"), include_in_schema=False)

_JSON = "application/vnd.pypi.simple.v1+json"
_API_VERSION = "1.1"
_LATEST = {"cache-control": "no-cache", "vary": "accept"}

_PIECE = 64 << 10
"""Bytes of the wheel that are handed out at a time: a slow peer holds up to this much memory, not the whole wheel."""


@router.get("/")
async def get_projects(request: Request) -> Response:
    """The projects: the client alone."""
    if _wants_json(request):
        return _json({"projects": [{"name": PROJECT}]})
    return _page("Packages", f'<a href="{PROJECT}/">{PROJECT}</a>')


@router.get(f"/{PROJECT}/")
async def get_files(request: Request) -> Response:
    """The files of the client: one wheel, of the version that fits this server."""
    wheel = _wheel(request)
    if _wants_json(request):
        file = {
            "filename": wheel.filename,
            "url": wheel.filename,
            "hashes": {"sha256": wheel.sha256},
            "requires-python": wheel.requires_python,
            "size": len(wheel.content),
        }
        return _json({"name": PROJECT, "versions": [wheel.version], "files": [file]})
    python = escape(wheel.requires_python, quote=True)
    link = f'<a href="{wheel.filename}#sha256={wheel.sha256}" data-requires-python="{python}">{wheel.filename}</a>'
    return _page(PROJECT, link)


@router.get(f"/{PROJECT}/requirements.txt")
async def get_requirements(request: Request) -> Response:
    """The wheel as a requirements file, which keeps its address when the version changes."""
    wheel = _wheel(request)
    return PlainTextResponse(f"# h5feed {wheel.version}\n{PROJECT} @ {wheel_url(request)}\n", headers=_LATEST)


@router.get(f"/{PROJECT}/{{filename}}")
async def get_wheel(request: Request, filename: str) -> Response:
    """The wheel."""
    wheel = _wheel(request)
    if filename != wheel.filename:
        raise PageNotFound(
            f"there is no file {filename!r}: this server has {wheel.filename}, see /docs for its address"
        )
    headers = {"etag": f'"{wheel.sha256}"', "cache-control": "no-cache"}
    if is_known(request, headers):
        return not_modified(headers)
    headers["content-length"] = str(len(wheel.content))
    return StreamingResponse(_pieces(wheel.content), headers=headers, media_type="application/octet-stream")


def _wheel(request: Request) -> ClientWheel:
    """The wheel.

    Raises
    ------
    PageNotFound
    """
    wheel: ClientWheel | None = request.app.state.client_wheel
    if wheel is None:
        raise PageNotFound(
            "this server has no wheel of its client, because h5feed is not installed here, but imported from a folder: "
            "install it with pip"
        )
    return wheel


async def _pieces(content: bytes) -> AsyncIterator[memoryview]:
    for begin in range(0, len(content), _PIECE):
        yield memoryview(content)[begin : begin + _PIECE]


def _wants_json(request: Request) -> bool:
    return _JSON in request.headers.get("accept", "")


def _json(content: dict[str, Any]) -> Response:
    return JSONResponse({"meta": {"api-version": _API_VERSION}, **content}, headers=_LATEST, media_type=_JSON)


def _page(title: str, link: str) -> Response:
    version = f'<meta name="pypi:repository-version" content="{_API_VERSION}">'
    head = f'<meta charset="utf-8">{version}<title>{title}</title>'
    page = f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n<h1>{title}</h1>\n{link}\n</body></html>\n'
    return HTMLResponse(page, headers=_LATEST)
