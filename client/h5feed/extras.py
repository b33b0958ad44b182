"""Optional packages: what to install if one is missing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def needing(what: str, packages: str, how: str) -> Iterator[None]:
    """Say what to install if an import in this context fails.

    Raises
    ------
    ModuleNotFoundError
        ``WHAT needs PACKAGES, but 'name' is not installed: HOW``.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{what} needs {packages}, but {error.name!r} is not installed: {how}", name=error.name
        ) from None
