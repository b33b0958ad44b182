"""The OpenAPI description, with the datasets that are there, and its page, with no help from other hosts."""

from __future__ import annotations

import copy
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles

from .deps import ServicesDep, in_thread

router = APIRouter(include_in_schema=False)

MAX_NAMES = 500
"""Datasets in the drop-down of the page; more are typed in."""


@router.get("/")
async def root() -> Response:
    return RedirectResponse("/docs")


@router.get("/openapi.json")
async def openapi(request: Request, services: ServicesDep) -> Response:
    """The description, with the names of the datasets as the values of the parameter ``name``."""
    app: FastAPI = request.app
    names = await in_thread(services, services.catalog.names)
    schema = copy.deepcopy(app.openapi())
    for path in schema["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path" and parameter["name"] == "name" and 0 < len(names) <= MAX_NAMES:
                    parameter["schema"] |= {"enum": names, "default": names[0]}
    return JSONResponse(schema)


@router.get("/docs")
async def docs(request: Request) -> Response:
    app: FastAPI = request.app
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=f"{app.title} – API",
        swagger_js_url="/static/swagger-ui-bundle.js",
        swagger_css_url="/static/swagger-ui.css",
        swagger_favicon_url="/static/favicon.png",
        swagger_ui_parameters={"tryItOutEnabled": True, "displayRequestDuration": True, "docExpansion": "list"},
    )


def mount_static(app: FastAPI) -> None:
    """Serve Swagger UI's files, which a package of their own brings."""
    folder: Any = files("fastapi_offline") / "static"
    app.mount("/static", StaticFiles(directory=str(folder)), name="static")
