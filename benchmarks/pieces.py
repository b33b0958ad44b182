"""Compressed images over a link of 1 Gbit/s: chunks that the client decodes, against rows that the server decodes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import h5feed

from . import link
from .data import Files
from .far import LINK_RATE, NAMESPACE, links_are_possible
from .measure import Figure, Rates, take_turns
from .served import epochs_of
from .servers import h5feed_server

_BATCH = 32
_ONE = "1 Gbit/s"

_FORMS: Mapping[str, Literal["server", "client"]] = {"pieces": "client", "decoded": "server"}

FIGURES = (
    Figure("pieces_vs_decoded_1gbit", {_ONE: "pieces"}, {_ONE: "decoded"}, 1.7),
    Figure("pieces_wire_gzip", {_ONE: "wire pieces"}, {_ONE: "wire decoded"}, 0.55, smaller=True),
    Figure("pieces_server_cpu", {_ONE: "cpu pieces"}, {_ONE: "cpu decoded"}, 0.2, smaller=True),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second over the link; bytes a row on the wire; CPU seconds a row of the server."""
    if not links_are_possible():
        print("cannot simulate a link here: it needs unshare, ip and /dev/net/tun", file=sys.stderr)
        return {}
    command = [*NAMESPACE, sys.executable, "-m", "benchmarks.pieces", str(files.compressed), str(rounds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    rates: Rates = json.loads(done.stdout.splitlines()[-1])
    return rates


def main(argv: Sequence[str] | None = None) -> int:
    """Measure within the network namespace of this process; prints the rates as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pieces")
    parser.add_argument("file", type=Path)
    parser.add_argument("rounds", type=int)
    options = parser.parse_args(argv)
    through = [sys.executable, "-m", "benchmarks.link", "--round-trip", "0.0005", "--rate", str(LINK_RATE), "--"]
    # Without caches of decoded chunks, as with more data than memory.
    environment = {"H5FEED_HOST": link.THERE, "H5FEED_PUBLIC": "true", "H5FEED_CHUNK_CACHE_BYTES": "0"}
    found: dict[str, list[float]] = {}
    with (
        h5feed_server(options.file.parent, 2, None, through, (), **environment) as server,
        h5feed.connect(server.url) as feed,
    ):
        dataset = feed[options.file.stem]
        turns = {}
        for name, decode in _FORMS.items():
            turns[name] = epochs_of(dataset, _BATCH, decode=decode)
            # What is done once, such as inspecting the file, does not count.
            turns[name]()
            loader = dataset.loader(batch_size=_BATCH, decode=decode)
            before = server.cpu_seconds()
            for _ in loader:
                pass
            stats = loader.stats()
            found[f"cpu {name}"] = [(server.cpu_seconds() - before) / stats.rows] * options.rounds
            found[f"wire {name}"] = [stats.bytes / stats.rows] * options.rounds
        rates = {name: list(each) for name, each in take_turns(turns, options.rounds).items()}
    print(json.dumps(rates | found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
