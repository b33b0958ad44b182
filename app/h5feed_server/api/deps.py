"""What endpoints have injected, and how they run work that blocks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Annotated, TypeVar

from fastapi import Depends, Path, Request
from h5feed.buffers import PoolExhausted
from h5feed.errors import Overloaded, ReadTimeout

from ..services import Services

T = TypeVar("T")


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]

NamePath = Annotated[str, Path(description="Name of a dataset, as the catalogue lists it.")]


async def in_thread(services: Services, work: Callable[[], T]) -> T:
    """Run blocking `work` in a thread of the server's own pool.

    Raises
    ------
    ReadTimeout
        It took longer than the settings allow; the thread is left to end by itself.
    """
    future = asyncio.get_running_loop().run_in_executor(services.threads, work)
    done, _ = await asyncio.wait((future,), timeout=services.settings.read_timeout)
    if not done:
        # Its outcome is nobody's any more, and must not be reported as unheard.
        future.add_done_callback(lambda late: late.cancelled() or late.exception())
        raise ReadTimeout(f"reading took more than {services.settings.read_timeout:g} s")
    try:
        return future.result()
    except PoolExhausted as error:
        raise Overloaded(f"{error}; come again in a moment", retry_after=1) from None
