"""The application, built from settings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI

from . import __version__
from .api import (
    batches,
    datasets,
    docs,
    explorer,
    h5grove,
    health,
    images,
    jobs,
    plots,
    problems,
    rows,
    simple_index,
    splits,
    stats,
    tree,
)
from .api.access_log import AccessLog
from .api.auth import BearerAuth
from .api.client_wheel import ClientWheel
from .api.counting import Counting
from .api.forwarded import Forwarded
from .api.hosts import HostCheck
from .api.identity import Callers, TrustedProxies
from .api.openapi import describe, operation_id
from .api.shortcut import BatchShortcut, KnownQueries
from .api.uploads import Uploads, longest_body
from .services import Services
from .settings import Settings

_DESCRIPTION = """
Training batches from HDF5 files.

A batch depends on nothing but its URL, which names the dataset, the split, the order and the number of the batch, and
on the revision of the data. All of it can be tried at [/docs](docs), with datasets, splits and fields chosen from what
this server has now; [/redoc](redoc) has the same to read.
"""


def create_app(settings: Settings, *, behind_any_server: bool = False) -> FastAPI:
    """The ASGI application that serves ``settings.data_dir``.

    With `behind_any_server`, requests may come from a server other than that of `serve`.
    """

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
        generate_unique_id_function=operation_id,
        max_body_size=longest_body(settings.max_rows),
    )
    app.state.queries = KnownQueries()
    app.state.ready = health.ReadyState()
    app.state.uploads = Uploads()
    app.state.client_wheel = ClientWheel.of_installed()
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    problems.install(app)
    for module in (
        *(datasets, tree, rows, images, splits, stats, plots, batches, jobs),
        *(health, h5grove, docs, simple_index),
    ):
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
    if settings.root_path or settings.proxy_list or behind_any_server:
        app.add_middleware(Forwarded, root_path=settings.root_path, trusts=proxies.trusts)
    if settings.access_log:
        app.add_middleware(AccessLog, address=proxies.address)
    return app
