"""Watches the data folder, so that new files are inspected before they are requested."""

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
"""A file that was not requested is inspected after it has not changed for this long."""

_TICK_SECONDS = 0.5

_LOOK_SECONDS = 5.0
"""Interval of scans if the folder cannot be watched."""


def notice(
    root: Path,
    is_wanted: Callable[[str], bool],
    is_due: Callable[[], bool],
    look: Callable[[], None],
    stop: threading.Event,
) -> None:
    """Call `look` after a file has changed and settled, or if `is_due` returns True, until `stop` is set.

    If the folder cannot be watched, `look` is called periodically. If the system does not report changes, as with some
    network mounts, they are not noticed.

    Parameters
    ----------
    root : Path
        The data folder.
    is_wanted : callable
        Returns whether changes of a path matter.
    is_due : callable
    look : callable
    stop : threading.Event
    """
    told: str | None = None
    while not stop.is_set():
        try:
            _watch(root, is_wanted, is_due, look, stop)
        except Exception as error:
            # watchfiles fails on names that are not UTF-8, which may stay there. Do not warn about it each time.
            if type(error).__name__ != "WatchfilesRustInternalError" and root.is_dir() and str(error) != told:
                told = str(error)
                logger.warning("the data folder cannot be watched (%s): it is scanned periodically", error)
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
    """Watch the folder until it is replaced by another one, for instance by mounting a disk."""
    if (watched := _place(root)) is None:
        # watchfiles would not raise an error.
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
    """Device and inode of a folder, which change if a disk is mounted or unmounted there; None if it is missing."""
    try:
        status = os.stat(root)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _quiet_for(path: str) -> float:
    """Seconds since a file's change time, which is more reliable than its modification time; infinite if it is gone.

    Also if it will change only later: the clock was set back after it did.
    """
    try:
        seconds = time.time() - os.stat(path).st_ctime
        return seconds if seconds >= 0 else math.inf
    except OSError:
        return math.inf
