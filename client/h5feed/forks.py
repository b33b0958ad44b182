"""Fork safety: a child process must not use the locks and connections of its parent."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forked(Protocol):
    """An object that must be reset in a forked child process."""

    def after_fork(self) -> None:
        """Called in the child: replace what belongs to the parent. The parent's other threads do not exist here."""


def tell_after_fork(owner: Forked) -> None:
    """Call ``owner.after_fork()`` in every forked child process, as long as `owner` is alive."""
    _OWNERS.add(owner)


_OWNERS: weakref.WeakSet[Forked] = weakref.WeakSet()


def _tell_all() -> None:
    for owner in list(_OWNERS):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell_all)
