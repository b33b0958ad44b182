"""Command-line arguments of ``h5feed bench``, in a module that loads nothing."""

from __future__ import annotations

import argparse
import re

from ..errors import BadParameter
from .asked import BATCH_SIZE, MAX_BYTES, SECONDS
from .workloads import WORKLOADS

EXAMPLES = """\
  h5feed bench http://gpu-box:8000 photos
  h5feed bench http://gpu-box:8000 photos --split train --test 0.1 --batch-size 32 --step-ms 50
  h5feed bench http://a:8000,http://b:8000 photos --seconds 60 --cache ~/.cache/rows
  h5feed bench http://gpu-box:8000 photos --json > bench.json
  h5feed bench http://gpu-box:8000 retinanet --workload retinanet --accelerators 4
"""

ABOUT = """Read shuffled batches like a training loop and report how many rows per second
arrive, what limits the rate, and which options would raise it.
Nothing is stored except the rows in the folder of --cache."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command, except those for splits."""
    command.add_argument("dataset", metavar="DATASET")
    command.add_argument("--split", default="all", help="all, train, val or test (default all)")
    command.add_argument("--batch-size", metavar="N", type=int, help=f"rows per batch (default {BATCH_SIZE})")
    command.add_argument("--fields", metavar="NAMES", help="comma-separated field names (default: inputs and labels)")
    command.add_argument("--window", metavar="N", type=int, help="shuffle chunks, then rows in windows of N")
    command.add_argument(
        "--step-ms", metavar="MS", type=float, help="duration of a training step in milliseconds, to report utilisation"
    )
    command.add_argument("--cache", metavar="FOLDER", help="also measure a row cache in this folder")
    command.add_argument(
        "--seconds", metavar="S", type=float, default=SECONDS, help="approximate duration in seconds (default 20)"
    )
    command.add_argument(
        "--max-bytes",
        metavar="BYTES",
        type=size,
        help="approximate limit on the bytes fetched, such as 500MB (default 16GB)",
    )
    command.add_argument(
        "--workload",
        choices=sorted(WORKLOADS),
        help="instead, find out how many accelerators of this workload of MLPerf Storage the server feeds; "
        "`h5feed-server workload` builds its data",
    )
    command.add_argument(
        "--accelerators", metavar="N", type=int, help="with --workload: try this number first (default 1)"
    )
    command.add_argument(
        "--server-memory",
        metavar="BYTES",
        type=size,
        help="with --workload: memory of the server's machine, to tell whether the data are in its page cache",
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def check_together(options: argparse.Namespace) -> None:
    """Refuse options that would have no effect, and fill in the defaults of the others.

    Raises
    ------
    BadParameter
    """
    if options.workload is None:
        alone: tuple[str, ...] = ("accelerators", "server_memory")
        why = "needs --workload"
    else:
        alone = ("batch_size", "step_ms", "cache", "window", "max_bytes")
        why = f"cannot be used with --workload {options.workload}, which determines it or has no use for it"
    for name in alone:
        if getattr(options, name) is not None:
            raise BadParameter(f"--{name.replace('_', '-')} {why}")
    defaults = {"batch_size": BATCH_SIZE, "max_bytes": MAX_BYTES, "accelerators": 1}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def size(text: str) -> int:
    """Parse a number of bytes such as ``500MB``, ``64MiB`` or ``1000000``."""
    match = re.fullmatch(r"([0-9.]+)\s*([kmg]i?|)b?", text.strip().lower())
    try:
        if match is not None:
            return int(float(match[1]) * _UNITS[match[2]])
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be a number of bytes such as 500MB or 2GiB")
