"""The HTTP library: httpx2 where it is installed, else httpx, of which it is the successor. Nobody else imports either.

Each knows its own exceptions, `Auth` and `Timeout` alone. What users hand over is checked here, so that a mixture fails
at once and by name.
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
"""Which of them it is."""


def timeout_of(given: Any) -> httpx.Timeout:
    """Seconds, or a `Timeout` of either library, as a `Timeout` of this one.

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
    """`given`, where this library takes it.

    Raises
    ------
    BadParameter
        It is made with the other library.
    """
    if given is None or callable(given) or isinstance(given, (tuple, httpx.Auth)):
        auth: httpx.Auth | tuple[str, str] | None = given
        return auth
    raise BadParameter(f"auth={given!r} must be a (user, password) pair or made with {NAME}, which is used here")
