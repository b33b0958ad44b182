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

_ADMIT_SECONDS = 0.02
"""How often it is looked whether there is room."""


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(_services)]

NamePath = Annotated[str, Path(description="Name of a dataset, as the catalogue lists it.")]


async def in_thread(services: Services, work: Callable[[], T], patience: float | None = None) -> T:
    """Run blocking `work` in a thread of the server's own pool.

    Where the bound on bytes in flight leaves no room, `work` is begun anew until there is, for `patience` seconds
    (default: the settings' ``admit_timeout``). No thread waits meanwhile: others may need less room, or none.

    Raises
    ------
    ReadTimeout
        It took longer than the settings allow; the thread is left to end by itself.
    Overloaded
        There was no room.
    """
    loop = asyncio.get_running_loop()
    deadline = loop.time() + (services.settings.admit_timeout if patience is None else patience)
    while True:
        try:
            async with asyncio.timeout(services.settings.read_timeout):
                return await loop.run_in_executor(services.threads, work)
        except TimeoutError:
            raise ReadTimeout(f"reading took more than {services.settings.read_timeout:g} s") from None
        except MemoryError:
            raise Overloaded("there is no memory for this now; come again in a moment", retry_after=5) from None
        except PoolExhausted as error:
            if loop.time() >= deadline:
                raise Overloaded(f"{error}; come again in a moment", retry_after=1) from None
        await asyncio.sleep(_ADMIT_SECONDS)
