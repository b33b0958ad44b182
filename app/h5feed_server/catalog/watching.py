"""Notices what happens in the data folder before anybody asks."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from watchfiles import watch

logger = logging.getLogger(__name__)

SETTLED_SECONDS = 2.0
"""A file is looked at, without being asked for, when nothing has happened to it for so long."""

_TICK_SECONDS = 0.5

_LOOK_SECONDS = 5.0
"""How often the folder is looked at where it cannot be watched."""


def notice(
    root: Path,
    is_wanted: Callable[[str], bool],
    is_due: Callable[[], bool],
    look: Callable[[], None],
    stop: threading.Event,
) -> None:
    """Call `look` when something has happened to a file and it has settled, or when `is_due` says so, until `stop`.

    Where the folder cannot be watched, `look` is called from time to time. Where the system does not tell of changes,
    as for some network mounts, nothing is noticed.

    Parameters
    ----------
    is_wanted : callable
        Whether a path matters.
    """
    told: str | None = None
    while not stop.is_set():
        try:
            _watch(root, is_wanted, is_due, look, stop)
        except Exception as error:
            # It ends where a name is no UTF-8, and says so only in words; such a name may stay for ever.
            if type(error).__name__ != "WatchfilesRustInternalError" and root.is_dir() and str(error) != told:
                told = str(error)
                logger.warning("the data folder cannot be watched (%s): it is looked through now and then", error)
            stop.wait(_LOOK_SECONDS)
        if not stop.is_set():
            look()


def _watch(
    root: Path,
    is_wanted: Callable[[str], bool],
    is_due: Callable[[], bool],
    look: Callable[[], None],
    stop: threading.Event,
) -> None:
    """Watch the folder that is there now, as long as it is the same."""
    if (watched := _place(root)) is None:
        # Nor would anything say so.
        raise FileNotFoundError(root)
    ticks = watch(
        root,
        watch_filter=lambda _, path: is_wanted(path),
        stop_event=stop,
        rust_timeout=int(_TICK_SECONDS * 1000),
        yield_on_timeout=True,
        raise_interrupt=False,
        ignore_permission_denied=True,
    )
    unsettled: set[str] = set()
    with contextlib.closing(ticks):
        for changes in ticks:
            unsettled |= {path for _, path in changes}
            settled = {path for path in unsettled if _quiet_for(path) >= SETTLED_SECONDS}
            if settled or is_due():
                unsettled -= settled
                look()
            if _place(root) != watched:
                return


def _place(root: Path) -> tuple[int, int] | None:
    """Device and inode: those of another folder when a disk was mounted there, or is away."""
    try:
        status = os.stat(root)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _quiet_for(path: str) -> float:
    """Seconds since anything happened to a file: its modification time may be that of another."""
    try:
        return time.time() - os.stat(path).st_ctime
    except OSError:
        return math.inf
