"""The OpenAPI description, with the datasets that are there, and its page, with no help from other hosts."""

from __future__ import annotations

import copy
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.staticfiles import StaticFiles

from .auth import WATCHED_PATHS, is_stranger
from .deps import ServicesDep, in_thread

router = APIRouter(include_in_schema=False)

MAX_NAMES = 500
"""Datasets in the drop-down of the page; more are typed in."""

_SCHEME = "token"
_GUARDED = "\nThis server has tokens: the names come when you have given one of them to **Authorize**.\n"
_BEARER = {"type": "http", "scheme": "bearer", "description": "One of the server's tokens (`H5FEED_TOKENS`)."}

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>h5feed – API</title>
<link rel="stylesheet" href="/static/swagger-ui.css">
<link rel="icon" href="/static/favicon.png">
</head>
<body>
<div id="swagger-ui"></div>
<script src="/static/swagger-ui-bundle.js"></script>
<script>
// The description names the datasets to those who have a token: it is fetched anew when one is given or taken back.
let token = null
function fetchWith(tokenOf) {
  return (original, system) => (payload) => {
    const result = original(payload)
    token = tokenOf(payload)
    system.specActions.download("/openapi.json")
    return result
  }
}
const ui = SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  layout: "BaseLayout",
  deepLinking: true,
  showExtensions: true,
  showCommonExtensions: true,
  tryItOutEnabled: true,
  displayRequestDuration: true,
  docExpansion: "list",
  presets: [SwaggerUIBundle.presets.apis],
  requestInterceptor: (request) => {
    if (request.loadSpec && token) request.headers.Authorization = `Bearer ${token}`
    return request
  },
  plugins: [
    () => ({
      statePlugins: {
        auth: {
          wrapActions: {
            authorize: fetchWith((payload) => Object.values(payload)[0].value),
            logout: fetchWith(() => null),
          },
        },
      },
    }),
  ],
})
</script>
</body>
</html>
"""


@router.get("/")
async def root() -> Response:
    return RedirectResponse("/docs")


@router.get("/openapi.json")
async def openapi(request: Request, services: ServicesDep) -> Response:
    """The description, with the names of the datasets as the values of the parameter ``name``.

    To those without a token, where one is needed, no names are told.
    """
    app: FastAPI = request.app
    schema = copy.deepcopy(app.openapi())
    names = [] if is_stranger(request) else await in_thread(services, services.catalog.names)
    for path in schema["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", []):
                if parameter["in"] == "path" and parameter["name"] == "name" and 0 < len(names) <= MAX_NAMES:
                    parameter["schema"] |= {"enum": names, "default": names[0]}
    if services.settings.token_list:
        schema.setdefault("components", {})["securitySchemes"] = {_SCHEME: _BEARER}
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
    """Serve Swagger UI's files, which a package of their own brings."""
    folder: Any = files("fastapi_offline") / "static"
    app.mount("/static", StaticFiles(directory=str(folder)), name="static")
