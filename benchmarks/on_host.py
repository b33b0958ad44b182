"""A server and a training loop on one machine: rows that the client reads from the files, against every other way."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
from h5feed.order import order_key, permute

from . import local
from .data import BATCH, CONTIGUOUS_ROWS, IMAGE, Files
from .measure import Figure, Rates, Turn, take_turns
from .served import CONNECTIONS, epochs_of
from .servers import H5feedServer, h5feed_server, hot_buffer_servers, receive

_ONE = "2 workers"
_BATCHES = CONTIGUOUS_ROWS // BATCH

FIGURES = (
    Figure("local_vs_preadv", {_ONE: "files"}, {_ONE: "preadv"}, 0.85),
    Figure("local_vs_hot_socket", {_ONE: "files"}, {_ONE: "socket"}, 1.8),
    Figure("local_vs_tcp", {_ONE: "files"}, {_ONE: "tcp"}, 2.2),
    Figure("local_vs_h5py_rows", {_ONE: "files"}, {_ONE: "h5py rows"}, 4.0),
    Figure("local_gzip_vs_decode", {_ONE: "gzip files"}, {_ONE: "decode"}, 0.9),
    Figure("local_server_cpu", {_ONE: "cpu files"}, {_ONE: "cpu tcp"}, 0.05, smaller=True),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second of every contestant; for the server's CPU, seconds a row."""
    row_bytes = int(np.prod(IMAGE))
    cores = os.cpu_count() or 1
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-socket-"))) / "socket"
        server = stack.enter_context(h5feed_server(files.contiguous.parent, 2, None, (), ("--uds", str(path))))
        near = stack.enter_context(h5feed.connect(f"unix://{path}"))
        far = stack.enter_context(h5feed.connect(server.url, local=False))
        images = stack.enter_context(h5py.File(files.contiguous))["images"]
        hot = stack.enter_context(hot_buffer_servers(BATCH * row_bytes, CONNECTIONS))
        threads = stack.enter_context(ThreadPoolExecutor(cores))
        name, gzip = files.contiguous.stem, files.compressed.stem
        contestants: dict[str, Turn] = {
            "files": epochs_of(near[name], BATCH),
            "preadv": _preadv(stack, images, row_bytes),
            "tcp": epochs_of(far[name], BATCH, decode="server"),
            "socket": _from_sockets(stack, hot, row_bytes),
            "h5py rows": local.by_row(images, BATCH, _BATCHES),
            "gzip files": epochs_of(near[gzip], BATCH),
            "decode": local.decoding(files.compressed, threads, cores),
        }
        loader = near[name].loader(batch_size=BATCH)
        next(iter(loader))
        if not loader.stats().from_files:
            raise RuntimeError(f"rows were not read from files: {loader.stats().why}")
        rates = dict(take_turns(contestants, rounds))
        return rates | {f"cpu {name}": _cpu_seconds(server, contestants[name], rounds) for name in ("files", "tcp")}


def _cpu_seconds(server: H5feedServer, turn: Turn, rounds: int) -> list[float]:
    """CPU seconds that the server's workers take for each row, of as many turns. Not of those that are timed: after
    each, this waits for what the workers do just after the last batch."""
    seconds = []
    for _ in range(rounds):
        before = server.cpu_seconds()
        rows = turn()
        time.sleep(0.05)
        seconds.append(max(server.cpu_seconds() - before, 1e-9) / rows)
    return seconds


def _from_sockets(stack: contextlib.ExitStack, ports: list[int], row_bytes: int) -> Turn:
    """An epoch from raw servers, every connection in a thread with one buffer that is used again and again."""
    connections = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for port in ports]
    buffers = [np.ones(BATCH * row_bytes, np.uint8).data for _ in ports]
    threads = stack.enter_context(ThreadPoolExecutor(len(ports)))

    def work(number: int) -> int:
        batches = len(range(number, _BATCHES, len(ports)))
        return receive(connections[number], 0, number, len(ports), batches, buffers[number])

    return lambda: sum(threads.map(work, range(len(ports)))) // row_bytes


def _preadv(stack: contextlib.ExitStack, images: h5py.Dataset, row_bytes: int) -> Turn:
    """An epoch by processes that read the shuffled rows into a buffer that is used again and again, and do no more."""
    context = multiprocessing.get_context("spawn")
    offset, rows = images.id.get_offset(), len(images)
    pipes = []
    for number in range(CONNECTIONS):
        here, there = context.Pipe()
        arguments = (there, images.file.filename, offset, rows, row_bytes, number)
        process = context.Process(target=_read, args=arguments, daemon=True)
        process.start()
        stack.callback(process.join, 10)
        stack.callback(here.send, None)
        pipes.append(here)
    epochs = itertools.count()

    def turn() -> int:
        epoch = next(epochs)
        for pipe in pipes:
            pipe.send(epoch)
        return sum(pipe.recv() for pipe in pipes)

    return turn


def _read(pipe: Connection[Any, Any], path: str, offset: int, rows: int, row_bytes: int, number: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    buffer = np.ones((BATCH, row_bytes), np.uint8)
    while (epoch := pipe.recv()) is not None:
        order = permute(np.arange(rows), rows, order_key(0, epoch, "all"))
        read = 0
        for index in range(number, rows // BATCH, CONNECTIONS):
            wanted = order[index * BATCH : (index + 1) * BATCH].tolist()
            for row, target in zip(wanted, buffer, strict=True):
                os.preadv(descriptor, (target.data,), offset + row * row_bytes)
            read += len(wanted)
        pipe.send(read)
