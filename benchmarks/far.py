"""A training loop fed from far away: how much of its time it works, and how long it waits between epochs.

The loop takes a fixed time for each batch, during which it leaves the processor alone, as one with a card does. By
turns it runs through the server, asking for half of what the server can feed over that link, and on arrays in memory.
Round trips come from `benchmarks.link`; where such a link cannot be made, only the loopback is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import h5feed
import h5py
import numpy as np
import numpy.typing as npt

from . import link
from .data import Files
from .measure import Figure, Rates
from .servers import h5feed_server

LINK_RATE = 125e6
"""Bytes per second: 1 Gbit/s."""

ROUND_TRIPS = {"0ms": 0.0, "30ms": 0.03, "100ms": 0.1}

_BATCH = 32
"""Images: 6.3 MB."""

_EPOCH_SECONDS = 2.0
_MAX_ROWS = 3200
_CAPACITY_SECONDS = 4.0

_VARIANT = {name: "loopback" if name == "0ms" else f"{LINK_RATE * 8e-9:g} Gbit/s" for name in ROUND_TRIPS}

FIGURES = (
    *(
        Figure(
            f"far_utilisation_{name}", {_VARIANT[name]: f"served {name}"}, {_VARIANT[name]: f"memory {name}"}, target
        )
        for name, target in (("0ms", 0.97), ("30ms", 0.95), ("100ms", 0.95))
    ),
    *(
        # One over the seconds of each, so that a pause as long as a step is 1, and less is more.
        Figure(f"far_step_to_pause_{name}", {_VARIANT[name]: f"pause {name}"}, {_VARIANT[name]: f"step {name}"}, 1.0)
        for name in ROUND_TRIPS
    ),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second of every loop, in each round one epoch; for pauses and steps one over their seconds."""
    rates: dict[str, Sequence[float]] = {}
    for name, round_trip in ROUND_TRIPS.items():
        command = [sys.executable, "-m", "benchmarks.far", str(files.contiguous), str(round_trip), str(rounds)]
        if round_trip:
            if not links_are_possible():
                print(f"cannot simulate a link of {name} here: it needs unshare, ip and /dev/net/tun", file=sys.stderr)
                continue
            command = [*NAMESPACE, *command]
        # In a process of its own: the network namespace is the process's.
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
        measured = json.loads(done.stdout.splitlines()[-1])
        rates |= {f"{contestant} {name}": each for contestant, each in measured.items()}
    return rates


NAMESPACE = ["unshare", "--map-root-user", "--net", "--"]


def links_are_possible() -> bool:
    """Whether network devices can be made in a namespace of our own."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    attempt = [*NAMESPACE, "ip", "tuntap", "add", "attempt", "mode", "tun"]
    return subprocess.run(attempt, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one round trip, within the namespace of this process; prints the rates as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.far")
    parser.add_argument("file", type=Path)
    parser.add_argument("round_trip", type=float, help="in seconds; 0 means the plain loopback")
    parser.add_argument("rounds", type=int)
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        # What the server can feed does not depend on how far away it is.
        near = stack.enter_context(contextlib.ExitStack())
        dataset = near.enter_context(_served(options.file, 0.0, linked=options.round_trip > 0))
        rows_per_second = _capacity(dataset) / 2
        if options.round_trip:
            near.close()
            dataset = stack.enter_context(_served(options.file, options.round_trip, linked=True))
        rows = min(_MAX_ROWS, max(5, round(rows_per_second * _EPOCH_SECONDS / _BATCH)) * _BATCH)
        step = _BATCH / rows_per_second
        rates = _by_turns(dataset, options.file, rows, step, options.rounds)
    print(json.dumps(rates))
    return 0


@contextlib.contextmanager
def _served(path: Path, round_trip: float, *, linked: bool) -> Iterator[h5feed.Dataset]:
    """The file's dataset, from a server of two workers over the loopback or behind a link."""
    through: list[str] = []
    environment: dict[str, str] = {}
    if linked:
        through = [sys.executable, "-m", "benchmarks.link", "--round-trip", str(round_trip), "--rate", str(LINK_RATE)]
        through.append("--")
        environment = {"H5FEED_HOST": link.THERE, "H5FEED_PUBLIC": "true"}
    with (
        h5feed_server(path.parent, 2, None, through, **environment) as server,
        h5feed.connect(server.url) as feed,
    ):
        yield feed[path.stem]


def _capacity(dataset: h5feed.Dataset) -> float:
    """Rows per second that the server feeds to a loop which does nothing, after the first tenth."""
    began = time.perf_counter()
    counted_from, rows = began, 0
    epoch = 0
    while True:
        for batch in dataset.batches(batch_size=_BATCH, shuffle=True, epoch=epoch):
            now = time.perf_counter()
            if now - began > _CAPACITY_SECONDS:
                return rows / (now - counted_from)
            if now - began < _CAPACITY_SECONDS / 10:
                counted_from, rows = now, 0
            else:
                rows += len(batch.rows)
        epoch += 1


def _by_turns(dataset: h5feed.Dataset, path: Path, rows: int, step: float, rounds: int) -> dict[str, list[float]]:
    """Rates of two epochs in a row through the server, of the pause between them, and of one in memory, each round."""
    with h5py.File(path) as file:
        images = file["images"][:rows]
    loader = dataset.loader(batch_size=_BATCH, shuffle=True, limit=rows)
    rates: dict[str, list[float]] = {"served": [], "pause": [], "memory": [], "step": []}
    # One more to warm up.
    for number in range(1 + rounds):
        began = time.perf_counter()
        _epoch(loader, step)
        ended = time.perf_counter()
        first = _epoch(loader, step)
        served = time.perf_counter() - began
        began = time.perf_counter()
        for start in range(0, rows, _BATCH):
            _work(images[start : start + _BATCH], step)
        memory = time.perf_counter() - began
        if number > 0:
            rates["served"].append(2 * rows / served)
            rates["pause"].append(1 / (first - ended))
            rates["memory"].append(rows / memory)
            rates["step"].append(1 / step)
    loader.close()
    return rates


def _epoch(loader: h5feed.Loader, step: float) -> float:
    """One pass; returns when its first batch was there."""
    first = 0.0
    for images, _ in loader:
        first = first or time.perf_counter()
        _work(images, step)
    return first


def _work(images: npt.NDArray[np.uint8], step: float) -> None:
    """What the processor sees of a card that computes: it waits."""
    assert len(images) == _BATCH
    time.sleep(step)


if __name__ == "__main__":
    sys.exit(main())
