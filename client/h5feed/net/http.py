"""The HTTP library: httpx2 if installed, else its predecessor httpx. No other module imports either.

Each accepts only its own `Auth` and `Timeout`. Arguments from users are checked here, so that objects of the wrong
library fail immediately with a clear message.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import BadParameter

if TYPE_CHECKING:
    import httpx
else:
    try:
        import httpx2 as httpx
    except ModuleNotFoundError:
        import httpx

__all__ = ["auth_of", "httpx", "timeout_of"]

NAME: str = httpx.__name__
"""Name of the library in use."""


def timeout_of(given: Any) -> httpx.Timeout:
    """Convert seconds, or a `Timeout` of either library, to a `Timeout` of this one.

    Raises
    ------
    BadParameter
    """
    if isinstance(given, httpx.Timeout):
        return given
    if type(given).__name__ == "Timeout" and type(given).__module__.split(".")[0] in ("httpx", "httpx2"):
        return httpx.Timeout(connect=given.connect, read=given.read, write=given.write, pool=given.pool)
    try:
        return httpx.Timeout(given)
    except (TypeError, ValueError):
        raise BadParameter(f"timeout={given!r} must be a number of seconds or a {NAME}.Timeout") from None


def auth_of(given: Any) -> httpx.Auth | tuple[str, str] | None:
    """`given`, if this library accepts it.

    Raises
    ------
    BadParameter
        `given` belongs to the other library.
    """
    if given is None or callable(given) or isinstance(given, (tuple, httpx.Auth)):
        auth: httpx.Auth | tuple[str, str] | None = given
        return auth
    raise BadParameter(f"auth={given!r} must be a (user, password) pair or an Auth of {NAME}, the HTTP library in use")
