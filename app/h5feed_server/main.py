"""The application, built from settings."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from fastapi.routing import APIRoute
from h5feed.errors import CLASS_BY_CODE
from h5feed.otel import is_wanted
from starlette.datastructures import State
from starlette.types import Scope

from . import __version__
from .api import (
    batches,
    datasets,
    descriptors,
    docs,
    explorer,
    h5grove,
    health,
    images,
    jobs,
    local,
    metrics,
    plots,
    problems,
    rows,
    simple_index,
    splits,
    stats,
    tree,
    weights,
)
from .api.access_log import AccessLog
from .api.auth import BearerAuth
from .api.client_wheel import ClientWheel
from .api.counting import Counting, endpoint_of, note
from .api.forwarded import Forwarded
from .api.hosts import HostCheck
from .api.identity import Callers, TrustedProxies
from .api.naming import Naming
from .api.openapi import describe, operation_id
from .api.redaction import keep_secret
from .api.shortcut import BatchShortcut, KnownQueries
from .api.tracing import Tracers, Tracing
from .api.uploads import Uploads
from .services import Services, Shared
from .settings import Settings
from .sharing.local_socket import LocalSocket
from .sharing.metrics import Catalogue
from .tokens.keyring import Keyring

_DESCRIPTION = """
Training batches from HDF5 files.

A batch depends on nothing but its URL, which names the dataset, the split, the order and the number of the batch, and
on the revision of the data. Try every endpoint at [/docs](docs), where you choose datasets, splits and fields from
lists; [/redoc](redoc) shows the same documentation without forms.
"""


_MODULES = (
    *(datasets, tree, rows, images, splits, stats, plots, batches, weights, descriptors, jobs),
    *(health, metrics, local, h5grove, docs, simple_index),
)


def metrics_catalogue() -> Catalogue:
    """The metrics of this application: the same in every process of a server."""
    routes = [
        route for router in (*(module.router for module in _MODULES), *explorer.ROUTERS) for route in router.routes
    ]
    endpoints = [
        (method, route.path_format)
        for route in routes
        if isinstance(route, APIRoute)
        for method in sorted(route.methods or ())
    ]
    return Catalogue(list(dict.fromkeys(endpoints)), sorted(CLASS_BY_CODE))


def _fill(state: State, settings: Settings, tokens: Keyring, local_socket: LocalSocket | None) -> None:
    """What endpoints find in the application's state."""
    state.keyring = tokens
    state.local = local_socket
    state.queries = KnownQueries()
    state.ready = health.ReadyState()
    state.uploads = Uploads()
    state.uploads_of_weights = Uploads(settings.weights_bytes)
    state.client_wheel = ClientWheel.of_installed()


def create_app(
    settings: Settings,
    keyring: Keyring | None = None,
    shared: Shared | None = None,
    *,
    local_socket: LocalSocket | None = None,
    behind_any_server: bool = False,
) -> FastAPI:
    """The ASGI application that serves ``settings.data_dir``.

    Parameters
    ----------
    keyring : Keyring, optional
        The tokens; default: those of the settings.
    shared : Shared, optional
        What all workers of a server share.
    local_socket : LocalSocket, optional
        The Unix socket that is named to clients on this machine.
    behind_any_server : bool
        Requests may come from a server other than that of `serve`.
    """
    tokens = keyring or Keyring(settings.token_list, settings.token_file)
    is_traced = is_wanted()
    keep_secret(settings.token_list)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        services = Services.start(settings, numbers=metrics_catalogue(), shared=shared)
        services.metrics.watch(problems.sent)
        app.state.services = services
        services.traffic.begin()
        services.metrics.begin()
        watch = tokens.watch()
        if is_traced:
            app.state.tracers = Tracers()
        try:
            yield
        finally:
            if watch is not None:
                watch.close()
            if is_traced:
                app.state.tracers.close()
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
    )
    _fill(app.state, settings, tokens, local_socket)
    app.openapi = partial(describe, app)  # type: ignore[method-assign]
    problems.install(app)
    for module in _MODULES:
        app.include_router(module.router)
    docs.mount_static(app)
    explorer.install(app)
    if local_socket is not None:
        app.add_middleware(local.LocalHint)
    app.add_middleware(Naming)
    app.add_middleware(Counting, state=app.state)
    app.add_middleware(BatchShortcut, state=app.state)
    if is_traced:
        app.add_middleware(Tracing, state=app.state)
    proxies = app.state.proxies = TrustedProxies(settings.proxy_list)
    app.add_middleware(Callers, address=proxies.address)

    def refused(scope: Scope, status: int) -> None:
        note(app.state.services, endpoint_of(app.state.services, scope), scope, status, 0.0, 0)

    if tokens.is_guarding:
        app.add_middleware(BearerAuth, keyring=tokens, refused=refused)
    else:
        app.add_middleware(HostCheck, settings=settings, refused=refused)
    if settings.root_path or settings.proxy_list or behind_any_server:
        app.add_middleware(Forwarded, root_path=settings.root_path, trusts=proxies.trusts_peer)
    if settings.access_log:
        app.add_middleware(AccessLog, address=proxies.address, form=settings.log_format)
    return app
