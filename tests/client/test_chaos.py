"""Whatever breaks on the way, each row comes once; what a client takes of its machine is bounded, and given back."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import h5feed
import h5py
import numpy as np
import pytest

from tests.support.listener import Listener, hand_on
from tests.support.server_process import ServerProcess


class Order(TypedDict):
    """Options of the batches that are read."""

    batch_size: int
    shuffle: bool
    seed: int


ORDER: Order = {"batch_size": 8, "shuffle": True, "seed": 5}


class CuttingProxy:
    """A TCP proxy on a port of its own that ends every connection after some bytes of answers, by FIN or by RST."""

    def __init__(self, port: int, seed: int) -> None:
        self._to = ("127.0.0.1", port)
        self._chance = random.Random(seed)
        self.cuts = 0
        self._listener = Listener(self._serve)
        self.url = self._listener.url

    def close(self) -> None:
        self._listener.close()

    def _serve(self, client: socket.socket) -> None:
        allowed, reset = self._chance.randrange(1, 2_000_000), self._chance.random() < 0.5
        client.settimeout(30)
        try:
            server = socket.create_connection(self._to, 5)
        except OSError:
            return
        with server:
            server.settimeout(30)
            threading.Thread(target=hand_on, args=(client, server), daemon=True).start()
            try:
                while allowed > 0 and (data := server.recv(min(1 << 16, allowed))):
                    client.sendall(data)
                    allowed -= len(data)
            except OSError:
                pass
            self.cuts += allowed == 0
            if reset:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            for end in (client, server):
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(("rows", "kills"), [(600, 3), pytest.param(2000, 10, marks=pytest.mark.slow)])
def test_each_row_once_whatever_breaks(
    serve: Callable[..., ServerProcess], tmp_path: Path, rows: int, kills: int
) -> None:
    """Two shuffled epochs through a proxy that cuts connections in mid-body, from a server that is killed and restarted
    several times: each row once, in the order of an undisturbed run, byte by byte."""
    data = tmp_path / "data"
    data.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (rows, 64, 64, 3), dtype=np.uint8)
    with h5py.File(data / "images.h5", "w") as file:
        file["images"], file["labels"] = images, np.arange(rows) % 7
    process = serve(data, "--workers", "2")
    with h5feed.connect(process.url) as direct:
        calm = [
            [batch.rows.tolist() for batch in direct["images"].batches(**ORDER, epoch=epoch, fields=[])]
            for epoch in range(2)
        ]
    assert calm[0] != calm[1]
    proxy = CuttingProxy(process.port, seed=1)
    total = sum(map(len, calm))
    at = iter(range(total // kills // 2, total, total // kills))
    next_kill: int | None = next(at)
    restarting = threading.Thread(target=lambda: None)
    restarting.start()
    restarts = 0
    numbers = itertools.count()
    with h5feed.connect(proxy.url, deadline=60) as feed:
        dataset = feed["images"]
        for epoch in range(2):
            seen = []
            for batch in dataset.batches(**ORDER, epoch=epoch, readahead=2 << 20):
                np.testing.assert_array_equal(batch["images"], images[batch.rows])
                np.testing.assert_array_equal(batch["labels"], batch.rows % 7)
                seen.append(batch.rows.tolist())
                if next(numbers) == next_kill:
                    restarting.join()
                    process.kill()
                    restarting = threading.Thread(target=process.start)
                    restarting.start()
                    restarts += 1
                    next_kill = next(at, None)
            assert seen == calm[epoch]
            assert sorted(itertools.chain(*seen)) == list(range(rows))
    restarting.join()
    proxy.close()
    assert restarts == kills and proxy.cuts >= kills


EPOCH = r"""
import gc, json, os, pathlib, re, sys, tempfile, threading, time
import h5feed

def report():
    return {
        "peak": int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) << 10,
        "threads": [thread.name for thread in threading.enumerate()],
        "sockets": len([fd for fd in pathlib.Path("/proc/self/fd").iterdir() if fd.is_socket()]),
        "files": os.listdir(tempfile.gettempdir()),
    }

def settle(is_over):
    until = time.monotonic() + 60
    while time.monotonic() < until and not is_over():
        time.sleep(0.02)

feed = h5feed.connect(sys.argv[1])
stream = feed["big"].batches(batch_size=64, shuffle=True, readahead=int(sys.argv[2]))
nbytes = 0
for number, batch in enumerate(stream):
    nbytes += sum(array.nbytes for array in batch.values())
settle(lambda: threading.active_count() == 1)
whole = report()
unfinished = feed["big"].batches(batch_size=64, shuffle=True)
next(unfinished)
busy = report()
del stream, unfinished, batch, feed
gc.collect()
settle(lambda: threading.active_count() == 1 and not report()["sockets"])
print(json.dumps({"nbytes": nbytes, "whole": whole, "busy": busy, "dropped": report()}))
"""


@pytest.mark.slow
def test_memory_and_what_is_left(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """An epoch of 1.2 GB takes at most the read-ahead and 150 MB; no thread, socket or temporary file stays."""
    data, temporary = tmp_path / "data", tmp_path / "temporary"
    data.mkdir()
    temporary.mkdir()
    rows = 6400
    with h5py.File(data / "big.h5", "w") as file:
        # Space that is taken up but never written to: a real file of that length, made in no time.
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((rows, 256, 256, 3))
        h5py.h5d.create(file.id, b"images", h5py.h5t.NATIVE_UINT8, space, properties)
        file["labels"] = np.arange(rows) % 10
    process = serve(data)
    readahead = 64 << 20
    command = [sys.executable, "-c", EPOCH, process.url, str(readahead)]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    done = subprocess.run(command, stdout=subprocess.PIPE, timeout=120, check=True, env=environment)
    told = json.loads(done.stdout)
    assert told["nbytes"] > 1_200_000_000
    assert told["whole"]["peak"] <= readahead + 150_000_000
    assert told["whole"]["threads"] == told["dropped"]["threads"] == ["MainThread"]
    assert told["busy"]["sockets"] > 0 == told["dropped"]["sockets"]
    assert told["dropped"]["files"] == []


@pytest.mark.parametrize("ends", ["exit", "interrupt", "error"])
def test_processes_end_at_once(server: ServerProcess, tmp_path: Path, ends: str) -> None:
    """A process in the middle of an epoch ends when it wants to, whatever is under way, and says nothing of threads."""
    interrupt = "signal.raise_signal(signal.SIGINT)"
    last = {"exit": "sys.exit(3)", "interrupt": interrupt, "error": "raise ValueError"}[ends]
    script = (
        "import signal, sys, h5feed\n"
        f"stream = h5feed.connect({server.url!r})['tall'].batches(batch_size=1, shuffle=True)\n"
        "next(stream)\n"
        f"{last}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == {"exit": 3, "interrupt": -2, "error": 1}[ends]
    assert "thread" not in done.stderr.lower().replace("_thread", "")
