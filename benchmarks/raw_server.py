"""A server without HTTP: what the sockets of this machine can do, and what they can do when rows are read as well.

A client sends three little-endian int64 numbers: the epoch, the first batch and the step; then how many batches. The
bytes of so many batches follow, with nothing between them. One process serves one connection after the other.
"""

from __future__ import annotations

import argparse
import os
import socket
import struct

import numpy as np
import numpy.typing as npt
from h5feed.order import order_key, permute

REQUEST = struct.Struct("<4q")
"""Epoch, first batch, step, number of batches."""

SEND_BUFFER_BYTES = 256 << 10
"""SO_SNDBUF: what the real server sets, so that nobody has the better socket."""

Buffer = npt.NDArray[np.uint8]


def main() -> None:
    """Serve until killed; prints the port."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch-bytes", type=int, required=True, help="size of a batch")
    parser.add_argument("--file", help="file to read rows from; without it, the same bytes are sent repeatedly")
    parser.add_argument("--offset", type=int, default=0, help="position of the first row in the file, in bytes")
    parser.add_argument("--rows", type=int, default=0, help="number of rows in the file")
    parser.add_argument("--row-bytes", type=int, default=1, help="size of a row")
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
    print(listener.getsockname()[1], flush=True)
    buffer = np.ones(options.batch_bytes, np.uint8)
    descriptor = os.open(options.file, os.O_RDONLY) if options.file else None
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while request := connection.recv(REQUEST.size, socket.MSG_WAITALL):
                epoch, first, step, batches = REQUEST.unpack(request)
                if descriptor is None:
                    for _ in range(batches):
                        connection.sendall(buffer.data)
                else:
                    order = permute(np.arange(options.rows), options.rows, order_key(0, epoch, "all"))
                    per_batch = options.batch_bytes // options.row_bytes
                    for index in range(first, first + step * batches, step):
                        rows = order[index * per_batch : (index + 1) * per_batch]
                        _read_rows(descriptor, options.offset, options.row_bytes, rows, buffer)
                        connection.sendall(buffer.data)


def _read_rows(descriptor: int, offset: int, row_bytes: int, rows: npt.NDArray[np.int64], buffer: Buffer) -> None:
    view = buffer.data
    for number, row in enumerate(rows.tolist()):
        target = view[number * row_bytes : (number + 1) * row_bytes]
        if os.preadv(descriptor, (target,), offset + row * row_bytes) != row_bytes:
            raise EOFError("the file is too short")


if __name__ == "__main__":
    main()
