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
from .api.hosts import HostCheck
from .api.identity import Callers, TrustedProxies
from .api.openapi import describe, operation_id
from .api.shortcut import BatchShortcut, KnownQueries
from .api.uploads import Uploads, longest_body
from .services import Services
from .settings import Settings
from .tokens.keyring import Keyring

_DESCRIPTION = """
Training batches from HDF5 files.

A batch depends on nothing but its URL, which names the dataset, the split, the order and the number of the batch, and
on the revision of the data. Try every endpoint at [/docs](/docs), where you choose datasets, splits and fields from
lists; [/redoc](/redoc) shows the same documentation without forms.
"""


def create_app(settings: Settings, keyring: Keyring | None = None) -> FastAPI:
    """The ASGI application that serves ``settings.data_dir``.

    Parameters
    ----------
    keyring : Keyring, optional
        The tokens; default: those of the settings.
    """
    tokens = keyring or Keyring(settings.token_list, settings.token_file)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = Services.start(settings)
        app.state.services = services
        services.traffic.begin()
        watch = tokens.watch()
        try:
            yield
        finally:
            if watch is not None:
                watch.close()
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
    app.state.keyring = tokens
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
    app.add_middleware(Callers, address=proxies.address)
    if tokens.is_guarding:
        app.add_middleware(BearerAuth, keyring=tokens)
    else:
        app.add_middleware(HostCheck, settings=settings)
    if settings.access_log:
        app.add_middleware(AccessLog, address=proxies.address, secrets=settings.token_list)
    return app
