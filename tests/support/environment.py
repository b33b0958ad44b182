"""Tests begin alike whoever runs them, and wherever."""

from __future__ import annotations

import os
import signal

MOST_CPUS = 4
"""As many as tests and servers use: memory that is bounded for each thread is the same on every machine."""


def begin_alike() -> None:
    """Whoever runs the tests, and wherever: servers and commands begin with the same signals, variables and CPUs."""
    for name in [name for name in os.environ if name.startswith("H5FEED_")]:
        del os.environ[name]
    # Most tests are about TCP, or look at what comes through it.
    os.environ["H5FEED_LOCAL"] = "0"
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR"):
        os.environ.pop(name, None)
    # netCDF4 would set it to filters that are linked with its own libhdf5, which h5py in child processes would load.
    os.environ.setdefault("HDF5_PLUGIN_PATH", "")
    for name in ("NO_PROXY", "no_proxy"):
        os.environ[name] = ",".join(filter(None, [os.environ.get(name), "127.0.0.1", "localhost"]))
    # A shell has what it runs in the background ignore the one, `nohup` the other, and children inherit that.
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:MOST_CPUS])
