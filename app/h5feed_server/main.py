"""The application, built from settings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI

from . import __version__
from .api import batches, datasets, docs, explorer, health, images, jobs, plots, problems, rows, splits, stats
from .api.access_log import AccessLog
from .api.auth import BearerAuth
from .api.counting import Counting
from .api.hosts import HostCheck
from .api.identity import Callers, TrustedProxies
from .api.openapi import PROBLEM_RESPONSE, operation_id
from .api.shortcut import BatchShortcut, KnownQueries
from .api.uploads import Uploads, longest_body
from .services import Services
from .settings import Settings

_DESCRIPTION = """
Training batches from HDF5 files.

A batch is a pure function of its URL: the dataset, the split, the order and the index. Try **One batch** below: the
datasets in the drop-down are those that this server serves now.
"""


def create_app(settings: Settings) -> FastAPI:
    """The ASGI application that serves ``settings.data_dir``."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = Services.start(settings)
        app.state.services = services
        services.traffic.begin()
        try:
            yield
        finally:
            services.close()

    app = FastAPI(
        title="h5feed",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        responses={"default": PROBLEM_RESPONSE},
        generate_unique_id_function=operation_id,
        max_body_size=longest_body(settings.max_rows),
    )
    app.state.queries = KnownQueries()
    app.state.ready = health.ReadyState()
    app.state.uploads = Uploads()
    problems.install(app)
    for module in (datasets, splits, batches, rows, stats, images, plots, jobs, health, docs):
        app.include_router(module.router)
    docs.mount_static(app)
    explorer.install(app)
    app.add_middleware(Counting, state=app.state)
    app.add_middleware(BatchShortcut, state=app.state)
    proxies = TrustedProxies(settings.proxy_list)
    app.add_middleware(Callers, tokens=settings.token_list, address=proxies.address)
    if settings.token_list:
        app.add_middleware(BearerAuth, tokens=settings.token_list)
    else:
        app.add_middleware(HostCheck, settings=settings)
    if settings.access_log:
        app.add_middleware(AccessLog, address=proxies.address)
    return app
