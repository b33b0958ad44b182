"""``python -m benchmarks``: make files, serve them, let everybody take turns, print the ratios."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import h5feed
import h5py
import numpy as np

from . import (
    browsing,
    building,
    cached,
    chunked,
    cold,
    compressed,
    connections,
    contiguous,
    crops,
    encoded,
    far,
    filtering,
    mixing,
    on_host,
    pieces,
    placement,
    replicas,
    report,
    sequences,
    slow,
    small,
    sparse,
    splitting,
    statistics,
    store,
    transport,
)
from .data import KEPT, Files, make_files
from .measure import Measured, compare, count
from .peers.run import run_peers
from .served import WORKERS
from .servers import H5feedServer, h5feed_server

GROUPS: dict[str, ModuleType] = {
    "a": contiguous,
    "b": compressed,
    "c": small,
    "d": transport,
    "e": chunked,
    "f": cold,
    "g": far,
    "h": cached,
    "i": mixing,
    "j": encoded,
    "k": browsing,
    "l": on_host,
    "m": replicas,
    "n": connections,
    "o": store,
    "p": building,
    "q": pieces,
    "r": slow,
    "s": splitting,
    "t": statistics,
    "v": placement,
    "w": filtering,
    "x": sequences,
    "y": sparse,
    "z": crops,
}

_EXAMPLES = """groups:
  a  shuffled batches of large images, contiguous     c  shuffled batches of small images
  b  the same, gzipped, one chunk per image           d  h5feed's transport and stock httpx
  e  other filters, and chunks of many rows           f  a cold start with a thousand files
  g  a training loop at round trips of 0, 30, 100 ms  h  later epochs from the local cache
  p  building from 3,000 JPEGs (needs 6 GB of disk)   j  images stored as JPEG, and Keras' own loader
  s  splits of ten million labels                     t  statistics of 1.26 GB of images
  k  pages of the explorer                            w  filtered rows of ten million
  v  what the caches of three replicas hold           x  sequences of a robot's demonstrations
  y  shuffled cells of an AnnData file in CSR         z  random crops of volumes
  l  rows that the client reads from the files        q  compressed chunks over a link of 1 Gbit/s
  m  one to three replicas behind links of 100 Mbit/s
  n  the number of connections that the client finds  r  rows compressed for links of 100 Mbit/s and 1 Gbit/s
  o  rows of an object store that answers after 20 ms
  i  a mixture of two datasets, and one dataset

examples:
  python -m benchmarks                       everything, in about 15 minutes
  python -m benchmarks --only a,d            only these groups
  python -m benchmarks --only a --rounds 15  more rounds, for steadier medians
  python -m benchmarks --keep                keep the files in benchmarks/data, and reuse them next time
  python -m benchmarks --peers               h5py, DataLoader, tf.data, Flight, LitData, Lance, nginx, h5grove, HSDS
  python -m benchmarks.on_card               another benchmark: how busy a CUDA GPU is
  python -m benchmarks.trouble               another benchmark: how training is affected when things go wrong
  python -m benchmarks.load                  another benchmark: 200 clients at once
  python -m benchmarks.sizing                another benchmark: what one core of the server feeds
  python -m benchmarks.scale_sim             a simulation: what replicas of the server feed
  python -m benchmarks.growth                another benchmark: how cost grows with files, columns, rows …
  python -m benchmarks.first_batch           another benchmark: the first batch of files that are new to a server
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures how many times as fast h5feed is as the alternatives, and prints the ratios.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        type=_groups,
        default=list(GROUPS),
        metavar="GROUPS",
        help="comma-separated groups, such as a,b (default: all)",
    )
    parser.add_argument(
        "--rounds", type=count, default=7, help="rounds of each group (default 7); the results are medians"
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the files (1.7 GB) in benchmarks/data, and reuse them"
    )
    parser.add_argument(
        "--peers",
        nargs="?",
        const="",
        metavar="NAMES",
        help="instead, measure what users would pick instead of h5feed, each in an environment of its own in "
        ".venv-peers (5 GB): all, or those with these comma-separated names",
    )
    options = parser.parse_args(argv)
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {what}", flush=True)

    if options.peers is not None:
        return run_peers(
            options.rounds, [name.strip() for name in options.peers.split(",") if name.strip()] or None, say
        )
    measured: list[Measured] = []
    peaks: dict[str, list[int]] = {}
    with contextlib.ExitStack() as stack:
        folder = (
            KEPT if options.keep else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-bench-")))
        )
        files = make_files(folder, say)
        say("starting the servers")
        servers: dict[str, H5feedServer] = {}
        feeds: dict[str, h5feed.Feed] = {}
        for variant, workers in WORKERS.items():
            servers[variant] = stack.enter_context(h5feed_server(folder, workers))
            feeds[variant] = stack.enter_context(h5feed.connect(servers[variant].url, local=False))
        for feed in feeds.values():
            _check(feed, files)
        for letter in options.only:
            group = GROUPS[letter]
            say(f"measuring {letter}: {', '.join(figure.name for figure in group.FIGURES)}")
            rates = group.measure(files, feeds, options.rounds)
            for figure in group.FIGURES:
                # A group leaves out what this machine cannot do.
                if rates.keys() >= {*figure.ours.values(), *figure.theirs.values()}:
                    measured += compare(figure, rates)
            if group is contiguous:
                peaks = {variant: server.worker_peaks() for variant, server in servers.items()}
        say("stopping the servers")
    print()
    report.print_table(measured, peaks, options.rounds)
    return 0


def _check(feed: h5feed.Feed, files: Files) -> None:
    """What is measured must be right: a shuffled batch of each dataset, row by row as in its file."""
    for path in (files.contiguous, files.compressed, files.small):
        batch = feed[path.stem].batch(0, batch_size=16, shuffle=True)
        with h5py.File(path) as file:
            for name, array in batch.items():
                for row, value in zip(batch.rows, array, strict=True):
                    np.testing.assert_array_equal(value, file[name][row])


def _groups(text: str) -> list[str]:
    letters = [letter.strip() for letter in text.split(",") if letter.strip()]
    for letter in letters:
        if letter not in GROUPS:
            raise argparse.ArgumentTypeError(f"{letter!r} is not a group: choose from {', '.join(GROUPS)}")
    return letters


if __name__ == "__main__":
    sys.exit(main())
