"""Runs a command that ends when the thread that has started it ends.

Usage: ``python -m h5feed_server.cluster.die_with_parent PID COMMAND …``. A parent that is killed cannot end its child,
so the kernel does.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def run(arguments: list[str]) -> None:
    """Become the command that follows the number of the parent process."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(arguments[0]):
        # It has ended before the kernel was told.
        return
    os.execv(arguments[1], arguments[1:])


if __name__ == "__main__":
    run(sys.argv[1:])
