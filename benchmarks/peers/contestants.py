"""One peer, as a process in its own environment: takes the row ids of a turn, and reads them as its users would.

Run by `benchmarks.peers.run`, as a script: the environments have neither h5feed nor this package.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

BATCH = 64

Rows = npt.NDArray[np.int64]
Read = Callable[[Rows], Iterator[tuple[Rows, npt.NDArray[np.uint8]]]]
"""Reads rows in this order, in batches of row ids and images."""

Opened = tuple[Read, dict[str, Any]]
"""And what to tell of it: versions, and the time and size of a conversion."""

_START_SECONDS = 60.0


def _batches(rows: Rows) -> Iterator[Rows]:
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]


def _about(*packages: str) -> dict[str, Any]:
    return {"versions": ", ".join(f"{name} {version(name)}" for name in packages)}


def h5feed_two_workers(path: Path, folder: Path, extra: str) -> Opened:
    """Our server is at the address `extra`; the rows are those of its own shuffled epochs."""
    import h5feed

    dataset = h5feed.connect(extra)[path.stem]
    epochs = iter(range(1 << 30))

    def read(rows: Rows) -> Iterator[tuple[Rows, npt.NDArray[np.uint8]]]:
        left = len(rows)
        batches = dataset.batches(batch_size=BATCH, shuffle=True, epoch=next(epochs), fields=["images"], limit=left)
        for batch in batches:
            yield batch.rows, batch["images"]

    return read, _about("h5feed")


def h5py_rows(path: Path, folder: Path, extra: str) -> Opened:
    """Row by row, into a batch that is used again and again."""
    images = h5py.File(path)["images"]
    batch = np.zeros((BATCH, *images.shape[1:]), np.uint8)

    def read(rows: Rows) -> Iterator[tuple[Rows, npt.NDArray[np.uint8]]]:
        for wanted in _batches(rows):
            for place, row in enumerate(wanted.tolist()):
                images.read_direct(batch, np.s_[row], np.s_[place])
            yield wanted, batch

    return read, _about("h5py")


def h5py_fancy(path: Path, folder: Path, extra: str) -> Opened:
    """A sorted index."""
    images = h5py.File(path)["images"]

    def read(rows: Rows) -> Iterator[tuple[Rows, npt.NDArray[np.uint8]]]:
        for wanted in _batches(rows):
            order = np.argsort(wanted)
            batch = np.empty((len(wanted), *images.shape[1:]), np.uint8)
            batch[order] = images[wanted[order]]
            yield wanted, batch

    return read, _about("h5py")


class _TorchRows:
    """A map-style dataset that opens the file in each worker."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._images: Any = None

    def __len__(self) -> int:
        with h5py.File(self._path) as file:
            return len(file["images"])

    def __getitem__(self, row: int) -> Any:
        if self._images is None:
            self._images = h5py.File(self._path)["images"]
        return row, self._images[row]


class _Order:
    """A sampler whose order is set before each epoch."""

    rows: Rows = np.zeros(0, np.int64)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows.tolist())

    def __len__(self) -> int:
        return len(self.rows)


def torch_loader(path: Path, folder: Path, extra: str) -> Opened:
    """`DataLoader` with two workers that stay."""
    from torch.utils.data import DataLoader

    order = _Order()
    loader: Any = DataLoader(
        _TorchRows(path),
        batch_size=BATCH,
        sampler=order,
        num_workers=2,
        persistent_workers=True,
    )

    def read(rows: Rows) -> Iterator[tuple[Rows, npt.NDArray[np.uint8]]]:
        order.rows = rows
        for ids, images in loader:
            yield ids.numpy(), images.numpy()

    return read, _about("torch", "h5py")


def _generated(path: Path, rows: Callable[[], Rows]) -> Any:
    import tensorflow as tf

    images = h5py.File(path)["images"]

    def generate() -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
        for row in rows().tolist():
            yield row, images[row]

    signature = (tf.TensorSpec((), tf.int64), tf.TensorSpec(images.shape[1:], tf.uint8))
    return tf.data.Dataset.from_generator(generate, output_signature=signature).batch(BATCH)


def tf_generator(path: Path, folder: Path, extra: str) -> Opened:
    """`tf.data.Dataset.from_generator`, batched and prefetched."""
    import tensorflow as tf

    current: list[Rows] = [np.zeros(0, np.int64)]
    dataset = _generated(path, lambda: current[0]).prefetch(tf.data.AUTOTUNE)

    def read(rows: Rows) -> Iterator[tuple[Rows, npt.NDArray[np.uint8]]]:
        current[0] = rows
        yield from dataset.as_numpy_iterator()

    return read, _about("tensorflow-cpu", "h5py")


def tf_service(path: Path, folder: Path, extra: str) -> Opened:
    """The same through the tf.data service: a dispatcher and a worker."""
    import tensorflow as tf

    dispatcher = tf.data.experimental.service.DispatchServer()
    address = dispatcher.target.split("://")[1]
    worker = tf.data.experimental.service.WorkerServer(
        tf.data.experimental.service.WorkerConfig(dispatcher_address=address)
    )
    current: list[Rows] = [np.zeros(0, np.int64)]
    # from_generator works only in a worker of the same process.
    dataset = _generated(path, lambda: current[0]).apply(
        tf.data.experimental.service.distribute(processing_mode="parallel_epochs", service=dispatcher.target)
    )
    kept = dispatcher, worker

    def read(rows: Rows) -> Iterator[tuple[Rows, npt.NDArray[np.uint8]]]:
        assert kept
        current[0] = rows
        yield from dataset.as_numpy_iterator()

    return read, _about("tensorflow-cpu", "h5py")


_FLIGHT_SERVER = """
import sys, json, h5py, numpy as np, pyarrow as pa, pyarrow.flight as flight
images = h5py.File(sys.argv[1])["images"]
width = int(np.prod(images.shape[1:]))
class Server(flight.FlightServerBase):
    def do_get(self, context, ticket):
        rows = np.frombuffer(ticket.ticket, np.int64)
        data = np.empty((len(rows), width), np.uint8)
        view = data.reshape(len(rows), *images.shape[1:])
        for place, row in enumerate(rows.tolist()):
            images.read_direct(view, np.s_[row], np.s_[place])
        array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(rows), [None, pa.py_buffer(data)])
        table = pa.table({"images": array})
        return flight.RecordBatchStream(table)
server = Server("grpc://127.0.0.1:0")
print(server.port, flush=True)
server.serve()
"""


def arrow_flight(path: Path, folder: Path, extra: str) -> Opened:
    """A Flight server that reads with h5py; two requests at a time."""
    import pyarrow.flight as flight

    process = subprocess.Popen(
        [sys.executable, "-c", _FLIGHT_SERVER, str(path)], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    _CHILDREN.append(process)
    assert process.stdout is not None
    client = flight.FlightClient(f"grpc://127.0.0.1:{int(process.stdout.readline())}")
    with h5py.File(path) as file:
        shape = file["images"].shape[1:]
    threads = ThreadPoolExecutor(2)

    def get(rows: Rows) -> tuple[Rows, npt.NDArray[np.uint8]]:
        column = client.do_get(flight.Ticket(rows.tobytes())).read_all()["images"].combine_chunks()
        return rows, np.frombuffer(column.buffers()[1], np.uint8)[: len(rows) * int(np.prod(shape))].reshape(-1, *shape)

    def read(rows: Rows) -> Iterator[tuple[Rows, npt.NDArray[np.uint8]]]:
        yield from _two_ahead(threads, get, _batches(rows))

    return read, _about("pyarrow", "h5py")


def _two_ahead(threads: ThreadPoolExecutor, get: Callable[[Rows], Any], wanted: Iterator[Rows]) -> Iterator[Any]:
    """Results in order, with two under way: what is read ahead is bounded."""
    pending = []
    for rows in wanted:
        pending.append(threads.submit(get, rows))
        if len(pending) > 2:
            yield pending.pop(0).result()
    for future in pending:
        yield future.result()


def _bytes_below(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _settled_bytes(folder: Path) -> int:
    """The same, when a server has written everything that it still has in memory."""
    until, before = time.monotonic() + 60, -1
    while (now := _bytes_below(folder)) != before and time.monotonic() < until:
        before = now
        time.sleep(3)
    return now


def _lit_row(place: tuple[str, int]) -> dict[str, Any]:
    path, row = place
    with h5py.File(path) as file:
        return {"row": row, "image": file["images"][row]}


def litdata(path: Path, folder: Path, extra: str) -> Opened:
    """LitData after `optimize`; it shuffles in its own way."""
    from litdata import StreamingDataLoader, StreamingDataset, optimize

    out = folder / "litdata"
    with h5py.File(path) as file:
        count = len(file["images"])
    began = time.monotonic()
    optimize(
        fn=_lit_row,
        inputs=[(str(path), row) for row in range(count)],
        output_dir=str(out),
        chunk_bytes="64MB",
        num_workers=2,
    )
    told = {"convert_seconds": time.monotonic() - began, "converted_bytes": _bytes_below(out)}
    dataset = StreamingDataset(str(out), shuffle=True, drop_last=False)
    loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=2, persistent_workers=True)

    def read(rows: Rows) -> Iterator[tuple[Rows, npt.NDArray[np.uint8]]]:
        # Its own order, and always a whole epoch: an epoch that is left early is not given back.
        for batch in loader:
            yield batch["row"].numpy(), batch["image"].numpy()

    return read, {**_about("litdata", "torch"), **told}


def lance_take(path: Path, folder: Path, extra: str) -> Opened:
    """Lance after `write_dataset`, with `take`; two threads."""
    import lance
    import pyarrow as pa

    out = folder / "images.lance"
    began = time.monotonic()
    with h5py.File(path) as file:
        images = file["images"]
        shape, count = images.shape[1:], len(images)
        width = int(np.prod(shape))
        kind = pa.binary(width)
        schema = pa.schema([("images", kind)])

        def chunks() -> Iterator[Any]:
            for start in range(0, count, 256):
                data = images[start : start + 256].reshape(-1, width)
                array = pa.FixedSizeBinaryArray.from_buffers(kind, len(data), [None, pa.py_buffer(data)])
                yield pa.record_batch([array], schema)

        lance.write_dataset(chunks(), str(out), schema=schema)
    told = {"convert_seconds": time.monotonic() - began, "converted_bytes": _bytes_below(out)}
    dataset = lance.dataset(str(out))
    threads = ThreadPoolExecutor(2)

    def get(rows: Rows) -> tuple[Rows, npt.NDArray[np.uint8]]:
        column = dataset.take(rows.tolist(), columns=["images"])["images"].combine_chunks()
        flat = np.frombuffer(column.buffers()[1], np.uint8)
        begin = column.offset * width
        return rows, flat[begin : begin + len(rows) * width].reshape(-1, *shape)

    def read(rows: Rows) -> Iterator[tuple[Rows, npt.NDArray[np.uint8]]]:
        yield from _two_ahead(threads, get, _batches(rows))

    return read, {**_about("pylance", "pyarrow"), **told}


_NGINX = """
user root; daemon off; worker_processes 2; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  keepalive_timeout 600s; server {{ listen 127.0.0.1:{port}; root {folder}/cut; }}
}}
"""


def nginx_cut(path: Path, folder: Path, extra: str) -> Opened:
    """Batches of one shuffled epoch, cut into files beforehand: each epoch has the same batches. Two connections."""
    cut = folder / "cut"
    cut.mkdir()
    began = time.monotonic()
    with h5py.File(path) as file:
        images = file["images"]
        shape, width = images.shape[1:], int(np.prod(images.shape[1:]))
        order = np.random.default_rng(0).permutation(len(images))
        kept = list(_batches(order))
        for number, rows in enumerate(kept):
            with open(cut / str(number), "wb") as stream:
                for row in rows.tolist():
                    stream.write(images[row].data)
    told = {"convert_seconds": time.monotonic() - began, "converted_bytes": _bytes_below(cut)}
    port = _free_port()
    (folder / "nginx.conf").write_text(_NGINX.format(folder=folder, port=port))
    # Without being root it warns of the user, who must be able to read this folder.
    process = subprocess.Popen(
        ["nginx", "-c", folder / "nginx.conf", "-p", folder], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _CHILDREN.append(process)
    _wait_for(port)
    threads = ThreadPoolExecutor(2)
    connections: list[http.client.HTTPConnection] = []
    buffers = [np.empty((BATCH, *shape), np.uint8) for _ in range(6)]

    def get(numbers: Rows) -> tuple[Rows, npt.NDArray[np.uint8]]:
        number = int(numbers[0])
        connection = connections.pop() if connections else http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        buffer = buffers[number % len(buffers)]
        connection.request("GET", f"/{number}")
        answer = connection.getresponse()
        if answer.status != 200:
            raise RuntimeError(f"nginx: HTTP {answer.status}")
        view = memoryview(buffer).cast("B")[: len(kept[number]) * width]
        done = 0
        while done < len(view) and (came := answer.readinto(view[done:])):
            done += came
        answer.read()
        connections.append(connection)
        return kept[number], buffer[: len(kept[number])]

    def read(rows: Rows) -> Iterator[tuple[Rows, npt.NDArray[np.uint8]]]:
        count = -(-len(rows) // BATCH)
        yield from _two_ahead(threads, get, (np.array([number]) for number in range(count)))

    asked = subprocess.run(["nginx", "-v"], capture_output=True, text=True, check=True).stderr
    return read, {"versions": asked.strip().rpartition(": ")[2], **told}


_H5GROVE_SERVER = """
import sys, uvicorn
from fastapi import FastAPI
from h5grove.fastapi_utils import router, settings
settings.base_dir = sys.argv[1]
app = FastAPI()
app.include_router(router)
uvicorn.run(app, port=int(sys.argv[2]), log_level="error", timeout_keep_alive=600)
"""


def h5grove_rows(path: Path, folder: Path, extra: str) -> Opened:
    """h5grove with FastAPI. It selects ranges only, so a shuffled batch is a request for each row; two connections."""
    port = _free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", _H5GROVE_SERVER, str(path.parent), str(port)], stdin=subprocess.DEVNULL
    )
    _CHILDREN.append(process)
    _wait_for(port)
    with h5py.File(path) as file:
        shape = file["images"].shape[1:]
    threads = ThreadPoolExecutor(2)
    connections: list[http.client.HTTPConnection] = []

    def get(rows: Rows) -> tuple[Rows, npt.NDArray[np.uint8]]:
        connection = connections.pop() if connections else http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        batch = np.empty((len(rows), *shape), np.uint8)
        for place, row in enumerate(rows.tolist()):
            connection.request("GET", f"/data?file={path.name}&path=/images&selection={row}&format=bin")
            answer = connection.getresponse()
            content = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"h5grove: HTTP {answer.status}: {content[:200]!r}")
            batch[place] = np.frombuffer(content, np.uint8).reshape(shape)
        connections.append(connection)
        return rows, batch

    def read(rows: Rows) -> Iterator[tuple[Rows, npt.NDArray[np.uint8]]]:
        yield from _two_ahead(threads, get, _batches(rows))

    return read, _about("h5grove", "h5py")


def hsds_fancy(path: Path, folder: Path, extra: str) -> Opened:
    """HSDS on a folder, after the file was copied into it with h5pyd; one request for each batch."""
    import h5pyd

    root = folder / "hsds"
    (root / "bucket").mkdir(parents=True)
    port = _free_port()
    process = subprocess.Popen(
        [
            sys.executable,
            Path(sys.executable).with_name("hsds"),
            "--root_dir",
            root,
            "--bucket_name",
            "bucket",
            "--port",
            str(port),
            "--hs_username",
            "bench",
            "--hs_password",
            "bench",
            "--count",
            "1",
            "--loglevel",
            "ERROR",
        ],
        stdin=subprocess.DEVNULL,
        stdout=(folder / "hsds.log").open("w"),
        stderr=subprocess.STDOUT,
    )
    _CHILDREN.append(process)
    _wait_for(port, process)
    _wait_until_ready(port)
    access: dict[str, Any] = {
        "endpoint": f"http://127.0.0.1:{port}",
        "username": "bench",
        "password": "bench",
        "bucket": "bucket",
    }
    began = time.monotonic()
    for parent in ("/home/", "/home/bench/"):
        with contextlib.suppress(OSError):
            h5pyd.Folder(parent, mode="x", **access)
    with h5py.File(path) as source, h5pyd.File("/home/bench/images.h5", "w", **access) as target:
        images = source["images"]
        copy = target.create_dataset("images", images.shape, "u1", chunks=(8, *images.shape[1:]))
        for start in range(0, len(images), 64):
            copy[start : start + 64] = images[start : start + 64]
    told = {"convert_seconds": time.monotonic() - began, "converted_bytes": _settled_bytes(root)}
    served = h5pyd.File("/home/bench/images.h5", "r", **access)["images"]

    def read(rows: Rows) -> Iterator[tuple[Rows, npt.NDArray[np.uint8]]]:
        for wanted in _batches(rows):
            order = np.argsort(wanted)
            batch = np.empty((len(wanted), *served.shape[1:]), np.uint8)
            batch[order] = served[wanted[order].tolist(), :, :, :]
            yield wanted, batch

    return read, {**_about("hsds", "h5pyd"), **told}


CONTESTANTS: dict[str, Callable[[Path, Path, str], Opened]] = {
    "h5feed": h5feed_two_workers,
    "h5py rows": h5py_rows,
    "h5py fancy": h5py_fancy,
    "torch DataLoader": torch_loader,
    "tf.data generator": tf_generator,
    "tf.data service": tf_service,
    "Arrow Flight": arrow_flight,
    "LitData": litdata,
    "Lance": lance_take,
    "nginx": nginx_cut,
    "h5grove": h5grove_rows,
    "HSDS": hsds_fancy,
}

_CHILDREN: list[subprocess.Popen[Any]] = []


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _wait_for(port: int, process: subprocess.Popen[Any] | None = None) -> None:
    until = time.monotonic() + _START_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > until or (process is not None and process.poll() is not None):
                raise RuntimeError("its server did not start") from None
            time.sleep(0.1)


def _wait_until_ready(port: int) -> None:
    """Its nodes start one after the other."""
    until = time.monotonic() + _START_SECONDS
    state = ""
    while time.monotonic() < until:
        with contextlib.suppress(OSError, ValueError, http.client.HTTPException):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/about")
            state = json.loads(connection.getresponse().read()).get("state", "")
        if state == "READY":
            return
        time.sleep(0.5)
    raise RuntimeError(f"its state is {state!r}, and not READY")


def _check(path: Path, read: Read, rows: Rows) -> None:
    """Each row that comes must be that of the file."""
    with h5py.File(path) as file:
        for ids, images in read(rows):
            for row, image in zip(ids.tolist(), images, strict=True):
                np.testing.assert_array_equal(image, file["images"][row])


def main() -> None:
    """``contestants.py NAME FILE FOLDER EXTRA``; then a line ``EPOCH ROWS`` for each turn, answered with JSON."""
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(what: dict[str, Any]) -> None:
        print(json.dumps(what), file=answers, flush=True)

    name, path, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    try:
        read, about = CONTESTANTS[name](path, folder, sys.argv[4])
        with h5py.File(path) as file:
            count = len(file["images"])
        _check(path, read, np.random.default_rng(1).permutation(count)[: 2 * BATCH])
        tell(about)
        for line in sys.stdin:
            epoch, rows = map(int, line.split())
            order = np.random.default_rng(epoch).permutation(count)[:rows]
            began = time.perf_counter()
            came = sum(len(ids) for ids, _ in read(order))
            tell({"rows": came, "seconds": time.perf_counter() - began})
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"})
    finally:
        # Interrupted and not terminated: HSDS then ends its nodes, which have sessions of their own.
        for child in _CHILDREN:
            child.send_signal(signal.SIGINT)
        for child in _CHILDREN:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
        answers.flush()
        # Threads and workers of the libraries are not waited for.
        os._exit(0)


if __name__ == "__main__":
    main()
