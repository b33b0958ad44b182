"""How much the caches of three replicas hold together, against the cache of one: bytes, not time.

The replicas read from an object store on this machine. Each keeps ranges on the local disk, at most an eighth of the
data.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import h5feed
import h5py
import numpy as np

from .data import Files
from .measure import Figure, Rates
from .servers import START_SECONDS, ServerFailed, h5feed_server

_ROWS, _ROW_BYTES = 6000, 8192

_SHARE = 8
"""The cache of a replica holds the data divided by this: far less than a third, so that each is filled."""

_HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")

_ROUNDS = 3

_KEY, _SECRET, _REGION = "a-key", "a-secret", "eu-west-2"

_ENTRY = struct.Struct("<QQII")
"""Of the index of the cache: offset and size of a range, and two checksums."""

_VARIANT = "caches of an eighth"

FIGURES = (Figure("placement_cache_three_to_one", {_VARIANT: "placed"}, {_VARIANT: "one"}, 2.7),)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Distinct bytes that the caches hold after a shuffled epoch: of one replica, and of three."""
    if importlib.util.find_spec("hadro") is None or importlib.util.find_spec("obstore") is None:
        print("cannot start an object store here: it needs hadro and obstore", file=sys.stderr)
        return {}
    held: dict[str, list[float]] = {"one": [], "placed": []}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-bench-")))
        (folder / "data").mkdir()
        with h5py.File(folder / "data" / "rows.h5", "w") as file:
            file["images"] = np.random.default_rng(7).integers(0, 256, (_ROWS, _ROW_BYTES), np.uint8)
        store = stack.enter_context(_object_store(folder))
        for epoch in range(min(rounds, _ROUNDS)):
            held["one"].append(_held(store, 1, epoch, None))
            held["placed"].append(_held(store, 3, epoch, "cache"))
    for name, sizes in held.items():
        print(f"{name}: {', '.join(f'{size / 1e6:.1f} MB' for size in sizes)}", file=sys.stderr)
    return held


def _held(store: Mapping[str, str], replicas: int, epoch: int, placement: Literal["cache"] | None) -> float:
    """Bytes of the distinct ranges that replicas keep after an epoch."""
    with contextlib.ExitStack() as stack:
        caches = [Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(replicas)]
        limits = {"H5FEED_CACHE_BYTES": "0", "H5FEED_STORE_CACHE_BYTES": str(_ROWS * _ROW_BYTES // _SHARE)}
        # On a busy machine, the store takes long to answer.
        limits["H5FEED_READ_TIMEOUT"] = "100"
        servers = [
            stack.enter_context(h5feed_server("s3://data", 1, cache, (), ("--host", host), **store, **limits))
            for host, cache in zip(_HOSTS, caches, strict=False)
        ]
        urls = ",".join(server.url for server in servers)
        feed = stack.enter_context(h5feed.connect(urls, local=False, placement=placement))
        for _ in feed["rows"].batches(batch_size=128, shuffle=True, epoch=epoch):
            pass
        kept = {
            (offset, nbytes)
            for cache in caches
            for index in (cache / "ranges").glob("*.index")
            for offset, nbytes, _, _ in _ENTRY.iter_unpack(index.read_bytes())
        }
    return float(sum(nbytes for _, nbytes in kept))


@contextlib.contextmanager
def _object_store(folder: Path) -> Iterator[dict[str, str]]:
    """Serve the subfolders of a folder as buckets; yields the environment of servers that read from them."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    program = str(Path(sys.executable).parent / "hadro")
    keys = ["--access-key", _KEY, "--secret-key", _SECRET, "--region", _REGION]
    command = [program, str(folder), "--port", str(port), *keys]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ}) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                if time.monotonic() > deadline or process.poll() is not None:
                    raise ServerFailed("the object store did not start")
                time.sleep(0.05)
            yield {
                "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
                "AWS_ACCESS_KEY_ID": _KEY,
                "AWS_SECRET_ACCESS_KEY": _SECRET,
                "AWS_REGION": _REGION,
            }
        finally:
            process.kill()
