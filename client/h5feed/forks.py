"""What a forked child must not share with its parent: locks that a thread of the parent may hold, and connections."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Forked(Protocol):
    """Something that a child of a fork cannot use as it is."""

    def after_fork(self) -> None:
        """In the child: let go of what is the parent's. Other threads of the parent do not exist here."""


def tell_after_fork(owner: Forked) -> None:
    """Call ``owner.after_fork()`` in every child that this process forks as long as `owner` lives."""
    _OWNERS.add(owner)


_OWNERS: weakref.WeakSet[Forked] = weakref.WeakSet()


def _tell_all() -> None:
    for owner in list(_OWNERS):
        owner.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tell_all)
