"""Notices what happens in the data folder before anybody asks."""

from __future__ import annotations

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

_LONGEST_PAUSE = 30.0


def notice(
    root: Path,
    is_wanted: Callable[[str], bool],
    is_due: Callable[[], bool],
    look: Callable[[], None],
    stop: threading.Event,
) -> None:
    """Call `look` when something has happened to a file and it has settled, or when `is_due` says so, until `stop`.

    Where the system does not tell of changes, as for some network mounts, nothing is noticed.

    Parameters
    ----------
    is_wanted : callable
        Whether a path matters.
    """
    pause = _TICK_SECONDS
    unsettled: set[str] = set()
    while not stop.is_set():
        try:
            ticks = watch(
                root,
                watch_filter=lambda _, path: is_wanted(path),
                stop_event=stop,
                rust_timeout=int(_TICK_SECONDS * 1000),
                yield_on_timeout=True,
                raise_interrupt=False,
                ignore_permission_denied=True,
            )
            for changes in ticks:
                pause = _TICK_SECONDS
                unsettled |= {path for _, path in changes}
                settled = {path for path in unsettled if _quiet_for(path) >= SETTLED_SECONDS}
                if settled or is_due():
                    unsettled -= settled
                    look()
        except Exception as error:
            if type(error).__name__ != "WatchfilesRustInternalError":
                logger.warning("the data folder cannot be watched (%s): changes show when they are asked for", error)
                return
            # It ends where a name is no UTF-8, and says so only in words: the folder stands for whatever changed there.
            unsettled.add(str(root))
            stop.wait(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)


def _quiet_for(path: str) -> float:
    """Seconds since anything happened to a file: its modification time may be that of another."""
    try:
        return time.time() - os.stat(path).st_ctime
    except OSError:
        return math.inf
