"""The same single big batches from the same server, through our transport and through httpx as it comes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

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

FIGURES = (Figure("transport_vs_httpx", {_VARIANT: "h5feed"}, {_VARIANT: "httpx"}, 4.0),)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Bytes per second of both."""
    feed = feeds[_VARIANT]
    dataset = feed[files.contiguous.stem]
    path = f"/v1/datasets/{dataset.name}/batches"
    params = {"split": "all", "shuffle": "true", "batch_size": str(BATCH), "revision": dataset.revision}
    ours = Client(feed.url)
    theirs = httpx.Client(base_url=feed.url, headers={"accept": MEDIA_TYPE, "accept-encoding": "identity"})

    def our_body(index: int, epoch: int) -> int:
        query = {**params, "epoch": str(epoch)}
        return len(ours.body(f"{path}/{index}", query, max_bytes=MAX_BODY_BYTES))

    def their_body(index: int, epoch: int) -> int:
        answer = theirs.get(f"{path}/{index}", params={**params, "epoch": str(epoch)})
        return len(answer.raise_for_status().content)

    try:
        return take_turns({"h5feed": _bodies(our_body), "httpx": _bodies(their_body)}, rounds)
    finally:
        ours.close()
        theirs.close()


def _bodies(fetch: Callable[[int, int], int]) -> Turn:
    epochs = itertools.count()

    def turn() -> int:
        epoch = next(epochs)
        return in_threads(split_work(_BATCHES, lambda index: fetch(index, epoch)), CONNECTIONS)

    return turn
