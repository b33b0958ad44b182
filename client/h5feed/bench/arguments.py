"""Command-line arguments of ``h5feed bench``, in a module that loads nothing."""

from __future__ import annotations

import argparse
import re

from .asked import MAX_BYTES, SECONDS

EXAMPLES = """\
  h5feed bench http://gpu-box:8000 photos
  h5feed bench http://gpu-box:8000 photos --split train --test 0.1 --batch-size 32 --step-ms 50
  h5feed bench http://a:8000,http://b:8000 photos --seconds 60 --cache ~/.cache/rows
  h5feed bench http://gpu-box:8000 photos --json > bench.json
"""

ABOUT = """Read shuffled batches like a training loop and report how many rows per second
arrive, what limits the rate, and which options would raise it.
Nothing is stored except the rows in the folder of --cache."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Add the options of the command, except those for splits."""
    command.add_argument("dataset", metavar="DATASET")
    command.add_argument("--split", default="all", help="all, train, val or test (default all)")
    command.add_argument("--batch-size", metavar="N", type=int, default=64, help="rows per batch (default 64)")
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
        default=MAX_BYTES,
        help="approximate limit on the bytes fetched, such as 500MB (default 16GB)",
    )
    command.add_argument("--json", action="store_true", help="print JSON")


def size(text: str) -> int:
    """Parse a number of bytes such as ``500MB``, ``64MiB`` or ``1000000``."""
    match = re.fullmatch(r"([0-9.]+)\s*([kmg]i?|)b?", text.strip().lower())
    try:
        if match is not None:
            return int(float(match[1]) * _UNITS[match[2]])
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} must be a number of bytes such as 500MB or 2GiB")
