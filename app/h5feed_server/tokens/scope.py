"""Which datasets the current request may see. `Catalog` and `Jobs` look; everything else is found through them."""

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
    """Names of datasets, as patterns in which ``*``, ``?`` and ``[…]`` mean what they mean in a shell.

    Attributes
    ----------
    patterns : tuple of str or None
        None: every dataset, and all that is in the data folder beside them.
    """

    patterns: tuple[str, ...] | None = None

    @property
    def is_everything(self) -> bool:
        return self.patterns is None

    def covers(self, name: str) -> bool:
        """Whether it has the dataset of this name, if there is one."""
        return self.patterns is None or self._regex.fullmatch(name) is not None

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        # Without a pattern, nothing matches.
        return re.compile("|".join(fnmatch.translate(one) for one in self.patterns or ()) or r"(?!)")


EVERYTHING = DatasetScope()
NOTHING = DatasetScope(())

SCOPE: ContextVar[DatasetScope] = ContextVar("scope", default=EVERYTHING)
"""Set for each request where the server has tokens; the server's own work sees everything."""


@contextlib.contextmanager
def unrestricted() -> Iterator[None]:
    """For work that is done for all callers, whoever has asked for it."""
    before = SCOPE.set(EVERYTHING)
    try:
        yield
    finally:
        SCOPE.reset(before)
