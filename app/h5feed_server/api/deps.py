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
    try:
        async with asyncio.timeout(services.settings.read_timeout):
            return await asyncio.get_running_loop().run_in_executor(services.threads, work)
    except TimeoutError:
        raise ReadTimeout(f"reading took more than {services.settings.read_timeout:g} s") from None
    except PoolExhausted as error:
        raise Overloaded(f"{error}; come again in a moment", retry_after=1) from None
