"""The explorer: pages to look at datasets with, rendered by the server and usable without JavaScript."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles

from . import activity, catalogue, dataset, row, rows, samples, signing_in, splits, tree

ROUTERS = tuple(
    module.router for module in (catalogue, dataset, rows, row, samples, splits, tree, activity, signing_in)
)


def install(app: FastAPI) -> None:
    """Serve the pages, their script and their stylesheet."""
    for router in ROUTERS:
        app.include_router(router)
    folder: Any = files(__package__) / "assets"
    app.mount("/explorer", StaticFiles(directory=str(folder)), name="explorer")
