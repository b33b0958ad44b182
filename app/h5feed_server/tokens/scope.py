"""The datasets that the current request may see. `Catalog` and `Jobs` check the scope; all access goes through them."""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class DatasetScope:
    """Names of datasets, as patterns with ``*``, ``?`` and ``[…]`` as in a shell.

    Attributes
    ----------
    patterns : tuple of str or None
        None: all datasets, and all other files in the data folder.
    """

    patterns: tuple[str, ...] | None = None

    @property
    def is_everything(self) -> bool:
        return self.patterns is None

    def covers(self, name: str) -> bool:
        """Whether the scope includes a dataset of this name, even if there is none."""
        return self.patterns is None or self._regex.fullmatch(name) is not None

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        # Without a pattern, nothing matches.
        return re.compile("|".join(fnmatch.translate(one) for one in self.patterns or ()) or r"(?!)")


EVERYTHING = DatasetScope()
NOTHING = DatasetScope(())

SCOPE: ContextVar[DatasetScope] = ContextVar("scope", default=EVERYTHING)
"""Set for each request if the server has tokens. The server's own work sees everything."""


@contextlib.contextmanager
def unrestricted() -> Iterator[None]:
    """Remove the limits for work that is done on behalf of all callers."""
    before = SCOPE.set(EVERYTHING)
    try:
        yield
    finally:
        SCOPE.reset(before)
