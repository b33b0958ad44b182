"""A training loop fed from far away: how much of its time it works, and how long it waits between epochs.

The loop takes a fixed time for each batch, during which it leaves the processor alone, as one with a card does. First
it runs through the server, asking for half of what the server can feed over that link, then on arrays in memory. Round
trips come from `benchmarks.link`; where such a link cannot be made, only the loopback is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
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

_EPOCH_SECONDS = 3.0
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
            if not _links_are_possible():
                print(f"no link of {name} can be made here: it takes unshare, ip and /dev/net/tun", file=sys.stderr)
                continue
            command = [*_NAMESPACE, *command]
        # In a process of its own: the network namespace is the process's.
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=300)
        measured = json.loads(done.stdout.splitlines()[-1])
        rates |= {f"{contestant} {name}": each for contestant, each in measured.items()}
    return rates


_NAMESPACE = ["unshare", "--map-root-user", "--net", "--"]


def _links_are_possible() -> bool:
    """Whether network devices can be made in a namespace of our own."""
    if not (shutil.which("unshare") and shutil.which("ip")):
        return False
    attempt = [*_NAMESPACE, "ip", "tuntap", "add", "attempt", "mode", "tun"]
    return subprocess.run(attempt, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False).returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one round trip, within the namespace of this process; prints the rates as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.far")
    parser.add_argument("file", type=Path)
    parser.add_argument("round_trip", type=float, help="seconds; 0 is the loopback")
    parser.add_argument("rounds", type=int)
    options = parser.parse_args(argv)
    # Keras computes nothing here, but wants to know with what it would.
    os.environ.setdefault("KERAS_BACKEND", "jax")
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
        rates = _through_the_server(dataset, rows, step, options.rounds)
    rates["memory"] = _in_memory(options.file, rows, step, options.rounds)
    rates["step"] = [1 / step] * options.rounds
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
        h5feed_server(path.parent, 2, through=through, **environment) as server,
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


def _through_the_server(dataset: h5feed.Dataset, rows: int, step: float, rounds: int) -> dict[str, list[float]]:
    """Rates of `rounds` epochs in a row, after one to warm up, and the pauses before each of them."""
    sequence = dataset.sequence(batch_size=_BATCH, shuffle=True, limit=rows)
    rates, pauses = [], []
    ended = time.perf_counter()
    for epoch in range(1 + rounds):
        began = ended
        for index in range(len(sequence)):
            images, _ = sequence[index]
            if index == 0 and epoch > 0:
                pauses.append(1 / (time.perf_counter() - ended))
            _work(images, step)
        ended = time.perf_counter()
        if epoch > 0:
            rates.append(rows / (ended - began))
        sequence.on_epoch_end()
    sequence.close()
    return {"served": rates, "pause": pauses}


def _in_memory(path: Path, rows: int, step: float, rounds: int) -> list[float]:
    """Rates of the same loop over an array."""
    with h5py.File(path) as file:
        images = file["images"][:rows]
    rates = []
    for _ in range(rounds):
        began = time.perf_counter()
        for start in range(0, rows, _BATCH):
            _work(images[start : start + _BATCH], step)
        rates.append(rows / (time.perf_counter() - began))
    return rates


def _work(images: npt.NDArray[np.uint8], step: float) -> None:
    """What the processor sees of a card that computes: it waits."""
    assert len(images) == _BATCH
    time.sleep(step)


if __name__ == "__main__":
    sys.exit(main())
