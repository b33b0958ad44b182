"""The same single big batches from the same server: by our transport, by httpx as it comes, and by http.client.

``http.client`` with ``readinto`` into one buffer that is used again is the least that Python can do. It is measured
once more beside a thread that holds the interpreter's lock as a training loop in Python does.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import urlencode, urlsplit

import h5feed
import httpx
from h5feed.frames import MAX_BODY_BYTES
from h5feed.net.client import Client
from h5feed.wire import MEDIA_TYPE

from .data import BATCH, Files
from .measure import Figure, Rates, Turn, in_threads, take_turns
from .served import CONNECTIONS, split_work

_BATCHES = 50
"""Batches of one turn: 630 MB."""

_VARIANT = "2 workers"

_BUFFER_BYTES = 64 << 20
"""More than a batch has."""

_BUSY = 200_000
"""Steps of a loop in Python between two pauses: some ten milliseconds."""

FIGURES = (
    Figure("transport_vs_httpx", {_VARIANT: "h5feed"}, {_VARIANT: "httpx"}, 4.0),
    Figure("transport_vs_http_client", {_VARIANT: "h5feed one"}, {_VARIANT: "http.client one"}, 0.9),
    Figure("transport_vs_http_client_busy", {_VARIANT: "h5feed busy"}, {_VARIANT: "http.client busy"}, 0.9),
)

Fetch = Callable[[int, int], int]
"""Fetches a batch of an epoch; returns its bytes."""


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Bytes per second of all."""
    feed = feeds[_VARIANT]
    dataset = feed[files.contiguous.stem]
    path = f"/v1/datasets/{dataset.name}/batches"
    params = {"split": "all", "shuffle": "true", "batch_size": str(BATCH), "revision": dataset.revision}
    ours = Client(feed.url)
    theirs = httpx.Client(base_url=feed.url, headers={"accept": MEDIA_TYPE, "accept-encoding": "identity"})
    address = urlsplit(feed.url)
    plain = http.client.HTTPConnection(str(address.hostname), address.port or 80)
    buffer = memoryview(bytearray(_BUFFER_BYTES))

    def our_body(index: int, epoch: int) -> int:
        query = {**params, "epoch": str(epoch)}
        return len(ours.body(f"{path}/{index}", query, max_bytes=MAX_BODY_BYTES))

    def their_body(index: int, epoch: int) -> int:
        answer = theirs.get(f"{path}/{index}", params={**params, "epoch": str(epoch)})
        return len(answer.raise_for_status().content)

    def plain_body(index: int, epoch: int) -> int:
        query = urlencode({**params, "epoch": str(epoch)})
        plain.request("GET", f"{path}/{index}?{query}", headers={"accept": MEDIA_TYPE})
        answer = plain.getresponse()
        assert answer.status == 200
        length, done = int(answer.headers["content-length"]), 0
        while done < length:
            done += answer.readinto(buffer[done:length])
        answer.read()
        return length

    try:
        return take_turns(
            {
                "h5feed": _bodies(our_body, CONNECTIONS),
                "httpx": _bodies(their_body, CONNECTIONS),
                "h5feed one": _bodies(our_body, 1),
                "http.client one": _bodies(plain_body, 1),
                "h5feed busy": _bodies(our_body, 1, busy=True),
                "http.client busy": _bodies(plain_body, 1, busy=True),
            },
            rounds,
        )
    finally:
        ours.close()
        theirs.close()
        plain.close()


def _bodies(fetch: Fetch, connections: int, *, busy: bool = False) -> Turn:
    epochs = itertools.count()

    def turn() -> int:
        epoch = next(epochs)
        with _busy_loop() if busy else contextlib.nullcontext():
            return in_threads(split_work(_BATCHES, lambda index: fetch(index, epoch), connections), connections)

    return turn


@contextlib.contextmanager
def _busy_loop() -> Iterator[None]:
    """A thread that computes in Python, as a loop does between two steps of an accelerator."""
    ended = threading.Event()

    def compute() -> None:
        while not ended.wait(0.01):
            total = 0
            for number in range(_BUSY):
                total += number

    thread = threading.Thread(target=compute, name="busy")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
