"""``python -m benchmarks.load``: 200 clients at once on one server, each as fast as it is answered.

Each client has an address of its own (127.0.1.1 and following), for the server shares its capacity among addresses. It
takes batches over one connection and waits as long as a 503 says. What may not happen: another error, a client that
gets less than half of what the median client gets, and a server that is slower afterwards, or keeps files or threads.
"""

from __future__ import annotations

import argparse
import http.client
import multiprocessing
import multiprocessing.connection
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import h5py
import numpy as np

from . import report
from .measure import count, seconds
from .servers import H5feedServer, h5feed_server

PROCESSES = 4
ROWS, SIDE = 4096, 48
BATCH, STREAM = 16, 8
"""Rows of a batch, and batches of a request: 0.9 MB."""

ALONE_SECONDS = 3.0
"""How long one client is measured alone, before and after."""

SETTLE_SECONDS = 35.0
"""Idle threads end after half a minute."""

_PATIENCE = 60.0
"""Seconds to wait for an answer."""

_FORKS = multiprocessing.get_context("fork")


@dataclass
class Client:
    """What one client got.

    Attributes
    ----------
    waits : list of float
        Seconds from each request to the end of its answer.
    refused : int
        Answers 503 with Retry-After.
    errors : Counter
        Everything else that is no batch.
    """

    nbytes: int = 0
    waits: list[float] = field(default_factory=list)
    refused: int = 0
    errors: Counter[str] = field(default_factory=Counter)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 1 if something happened that may not."""
    options = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="h5feed-load-") as folder:
        with h5py.File(Path(folder) / "pictures.h5", "w") as file:
            shape = (ROWS, SIDE, SIDE, 3)
            file["images"] = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
            file["labels"] = np.arange(ROWS) % 10
        with h5feed_server(Path(folder), options.workers) as server:
            _alone(server)
            before, kept = _alone(server), _held(server)
            idle = server.reset_peaks()
            print(f"{options.clients} clients for {options.seconds:g} s …", flush=True)
            clients = _crowd(server, options.clients, options.seconds)
            peaks = server.worker_peaks()
            time.sleep(SETTLE_SECONDS)
            # As before: the first moments after a rest count for nobody.
            _alone(server)
            after, left = _alone(server), _held(server)
    print()
    report.print_machine()
    return _report(clients, before, after, kept, left, idle, peaks)


def _alone(server: H5feedServer) -> float:
    """Bytes per second of one client."""
    client = Client()
    _work(server.url, "127.0.0.1", time.monotonic() + ALONE_SECONDS, client)
    return client.nbytes / ALONE_SECONDS


def _held(server: H5feedServer) -> tuple[int, int]:
    """Descriptors and threads of all workers."""
    folders = [Path(f"/proc/{pid}") for pid in server.workers()]
    return tuple(sum(len(os.listdir(one / what)) for one in folders) for what in ("fd", "task"))  # type: ignore[return-value]


def _crowd(server: H5feedServer, clients: int, duration: float) -> list[Client]:
    until = time.monotonic() + duration
    pipes = []
    for number in range(PROCESSES):
        ours, theirs = _FORKS.Pipe(duplex=False)
        addresses = [f"127.0.{1 + one // 250}.{1 + one % 250}" for one in range(number, clients, PROCESSES)]

        def work(addresses: Sequence[str] = addresses, theirs: multiprocessing.connection.Connection = theirs) -> None:
            found = [Client() for _ in addresses]
            threads = [
                threading.Thread(target=_work, args=(server.url, address, until, client))
                for address, client in zip(addresses, found, strict=True)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            theirs.send(found)

        _FORKS.Process(target=work, daemon=True).start()
        theirs.close()
        pipes.append(ours)
    return [client for pipe in pipes for client in pipe.recv()]


def _work(url: str, address: str, until: float, client: Client) -> None:
    """Take batches until it is time."""
    host = url.partition("//")[2]
    random = np.random.default_rng(int.from_bytes(map(int, address.split(".")), "big"))
    connection = http.client.HTTPConnection(host, timeout=_PATIENCE, source_address=(address, 0))
    last = ROWS // BATCH - STREAM
    while time.monotonic() < until:
        start, epoch = random.integers(0, last), random.integers(0, 1000)
        query = f"batch_size={BATCH}&shuffle=true&epoch={epoch}&start={start}&stop={start + STREAM}"
        began = time.monotonic()
        try:
            connection.request("GET", f"/v1/datasets/pictures/batches?{query}", headers={"accept": "*/*"})
            answer = connection.getresponse()
            received = len(answer.read())
        except (OSError, http.client.HTTPException) as error:
            client.errors[type(error).__name__] += 1
            connection.close()
            time.sleep(0.1)
            continue
        pause = answer.getheader("retry-after")
        if answer.status == 200:
            client.nbytes += received
            client.waits.append(time.monotonic() - began)
        elif answer.status == 503 and pause is not None:
            client.refused += 1
            # As our own client does: not all at the same moment.
            time.sleep(min(float(pause) * random.uniform(0.5, 1.0), max(0.0, until - time.monotonic())))
        else:
            client.errors[f"{answer.status}{'' if pause else ' without Retry-After'}"] += 1
    connection.close()


def _report(
    clients: Sequence[Client],
    before: float,
    after: float,
    kept: tuple[int, int],
    left: tuple[int, int],
    idle: Sequence[int],
    peaks: Sequence[int],
) -> int:
    errors = sum((client.errors for client in clients), Counter[str]())
    waits = np.sort(np.concatenate([client.waits for client in clients]))
    each = sorted(client.nbytes for client in clients)
    slowest = each[0] / max(1, median(each))
    print(f"answers {len(waits):,}, {sum(each) / 2**20:,.0f} MiB; 503 with Retry-After "
          f"{sum(client.refused for client in clients):,}; other errors {dict(errors) or 'none'}")  # fmt: skip
    if len(waits):
        p50, p99 = (1e3 * waits[int(share * (len(waits) - 1))] for share in (0.5, 0.99))
        print(f"an answer takes {p50:,.0f} ms (median), {p99:,.0f} ms (99 %), {1e3 * waits[-1]:,.0f} ms at most")
    print(f"slowest client: {slowest:.2f} of the median client, {median(each) / 2**20:,.1f} MiB")
    both = ", ".join(f"{now / 2**20:.0f} ({then / 2**20:.0f})" for now, then in zip(peaks, idle, strict=True))
    print(f"most memory of each worker, and before: {both} MiB")
    print(f"one client alone: {before / 2**20:,.0f} MiB/s before, {after / 2**20:,.0f} MiB/s after")
    print(f"descriptors and threads of the workers: {kept[0]} and {kept[1]} before, {left[0]} and {left[1]} after\n")
    print(f"RATIO load_slowest_vs_median {slowest:.3f}")
    print(f"RATIO load_after_vs_before {after / before:.3f}")
    return int(bool(errors) or slowest < 0.5)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load",
        description="Lets many clients take batches from one server at once, and says how they fare.",
        epilog="example: python -m benchmarks.load --clients 50 --seconds 10",
    )
    parser.add_argument("--clients", type=count, default=200, help="clients, each from its own address (default 200)")
    parser.add_argument("--seconds", type=seconds, default=60.0, help="how long (default 60)")
    parser.add_argument("--workers", type=count, default=2, help="workers of the server (default 2)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
