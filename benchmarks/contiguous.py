"""Shuffled batches of big images from a contiguous dataset, against raw sockets and against h5py."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections.abc import Mapping

import h5feed
import h5py
import numpy as np

from . import local
from .data import BATCH, CONTIGUOUS_ROWS, IMAGE, Files
from .measure import Figure, Rates, Turn, in_threads, take_turns
from .served import CONNECTIONS, WORKERS, epochs_of, variants
from .servers import hot_buffer_servers, reading_servers, receive

_BATCHES = CONTIGUOUS_ROWS // BATCH
_FANCY_BATCHES = 8
"""h5py's own selection is slow: so many batches tell."""

FIGURES = (
    Figure("contiguous_vs_socket", variants("h5feed"), dict.fromkeys(WORKERS, "socket"), 0.85),
    Figure("contiguous_vs_reading_socket", variants("h5feed"), dict.fromkeys(WORKERS, "reading socket"), 1.0),
    Figure("contiguous_vs_h5py_rows", variants("h5feed"), dict.fromkeys(WORKERS, "h5py rows"), 2.0),
    Figure("contiguous_vs_h5py_fancy", variants("h5feed"), dict.fromkeys(WORKERS, "h5py fancy"), 9.0),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second of every contestant."""
    row_bytes = int(np.prod(IMAGE))
    with contextlib.ExitStack() as stack:
        images = stack.enter_context(h5py.File(files.contiguous))["images"]
        hot = stack.enter_context(hot_buffer_servers(BATCH * row_bytes, CONNECTIONS))
        reading = stack.enter_context(reading_servers(files.contiguous, BATCH, CONNECTIONS))
        contestants: dict[str, Turn] = {}
        for variant, name in variants("h5feed").items():
            contestants[name] = epochs_of(feeds[variant][files.contiguous.stem], BATCH)
        contestants["socket"] = _from_sockets(stack, hot, row_bytes)
        contestants["reading socket"] = _from_sockets(stack, reading, row_bytes)
        contestants["h5py rows"] = local.by_row(images, BATCH, _BATCHES)
        contestants["h5py fancy"] = local.by_selection(images, BATCH, _FANCY_BATCHES)
        # Close neighbours where the ratio matters most.
        order = ("h5feed 1", "socket", "h5feed 2", "reading socket", "h5py rows", "h5py fancy")
        return take_turns({name: contestants[name] for name in order}, rounds)


def _from_sockets(stack: contextlib.ExitStack, ports: list[int], row_bytes: int) -> Turn:
    """An epoch from raw servers, every connection in a thread with one buffer that is used again and again."""
    connections = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for port in ports]
    buffers = [np.ones(BATCH * row_bytes, np.uint8).data for _ in ports]
    epochs = itertools.count()

    def turn() -> int:
        epoch = next(epochs)

        def work(number: int) -> int:
            batches = len(range(number, _BATCHES, len(ports)))
            return receive(connections[number], epoch, number, len(ports), batches, buffers[number])

        return in_threads(work, len(ports)) // row_bytes

    return turn
