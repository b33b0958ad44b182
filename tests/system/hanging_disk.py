"""A disk that hangs when it is told to: a file system in user space (FUSE), and a program that runs in its sight.

Requests of the kernel are left unanswered, so whoever waits for one of them cannot even be killed, as with a disk or
file server that is gone. Run as a program in user and mount namespaces of its own::

    unshare --user --map-root-user --mount python -m tests.system.hanging_disk SOURCE MOUNTPOINT PROGRAM ARGUMENT …

It reads ``hang reads``, ``hang all`` and ``go on`` from standard input, answers with a line on standard error, and ends
with the program. When it is killed, all who wait get an error.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import stat
import struct
import subprocess
import sys
from pathlib import Path

_HEADER = struct.Struct("<IIQQIIII")
_ANSWER = struct.Struct("<IiQ")
_ATTRIBUTES = struct.Struct("<6Q10I")
_READ = struct.Struct("<QQII")

LOOKUP, FORGET, GETATTR, OPEN, READ, STATFS, RELEASE, FLUSH, INIT = 1, 2, 3, 14, 15, 17, 18, 25, 26
OPENDIR, READDIR, RELEASEDIR, INTERRUPT, DESTROY, BATCH_FORGET = 27, 28, 29, 36, 38, 42
"""Operations, as in the kernel's ``fuse.h``."""

_UNANSWERED = (FORGET, BATCH_FORGET, INTERRUPT, DESTROY)
_DIRECT = 1
"""Nothing of a file is kept in memory: each read is asked for."""

_BUFFER_BYTES = 1 << 20


class HangingDisk:
    """A folder, mounted read-only at another place."""

    def __init__(self, source: Path, mountpoint: Path) -> None:
        self._descriptor = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        options = f"fd={self._descriptor},rootmode=40000,user_id=0,group_id=0,allow_other"
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mount(b"hanging", bytes(mountpoint), b"fuse", 1, options.encode()) != 0:
            raise OSError(ctypes.get_errno(), "the kernel mounts no FUSE file system")
        self._paths = {1: source}
        self._numbers = {source: 1}
        self.hangs = ""
        self._unanswered: list[bytes] = []

    def fileno(self) -> int:
        return self._descriptor

    def serve(self) -> None:
        """Answer one request, or keep it."""
        request = os.read(self._descriptor, _BUFFER_BYTES)
        operation = _HEADER.unpack_from(request)[1]
        if operation in _UNANSWERED:
            return
        if self.hangs == "all" or (self.hangs == "reads" and operation == READ):
            self._unanswered.append(request)
        else:
            self._answer(request)

    def go_on(self) -> None:
        """Answer all requests, from now on and from before."""
        self.hangs = ""
        kept, self._unanswered = self._unanswered, []
        for request in kept:
            self._answer(request)

    def _answer(self, request: bytes) -> None:
        _, operation, unique, node, *_ = _HEADER.unpack_from(request)
        number, answer = 0, b""
        try:
            answer = self._answer_of(operation, node, request[_HEADER.size :])
        except OSError as error:
            number = -(error.errno or errno.EIO)
        try:
            os.write(self._descriptor, _ANSWER.pack(_ANSWER.size + len(answer), number, unique) + answer)
        except OSError as error:
            # Nobody waits for it any more.
            if error.errno != errno.ENOENT:
                raise

    def _answer_of(self, operation: int, node: int, body: bytes) -> bytes:
        path = self._paths.get(node, Path("/nonexistent"))
        if operation == INIT:
            return struct.pack("<4IHHIIHH8I", 7, 31, 0, 0, 16, 12, 1 << 16, 1, 32, 0, *[0] * 8)
        if operation == LOOKUP:
            path = path / body.rstrip(b"\0").decode()
            attributes = self._attributes(path)
            return struct.pack("<4QII", self._number(path), 0, 0, 0, 0, 0) + attributes
        if operation == GETATTR:
            return struct.pack("<QII", 0, 0, 0) + self._attributes(path)
        if operation in (OPEN, OPENDIR):
            return struct.pack("<QII", 0, _DIRECT if operation == OPEN else 0, 0)
        if operation == READ:
            _, offset, size, _ = _READ.unpack_from(body)
            with path.open("rb") as file:
                return os.pread(file.fileno(), size, offset)
        if operation == READDIR:
            return self._listing(path, *_READ.unpack_from(body)[1:3])
        if operation in (RELEASE, RELEASEDIR, FLUSH):
            return b""
        if operation == STATFS:
            return struct.pack("<5Q10I", 1, 0, 0, 1, 0, 4096, 255, 4096, *[0] * 7)
        raise OSError(errno.ENOSYS, "not needed")

    def _number(self, path: Path) -> int:
        number = self._numbers.setdefault(path, len(self._numbers) + 1)
        self._paths[number] = path
        return number

    def _attributes(self, path: Path) -> bytes:
        status = path.stat()
        seconds = [int(status.st_atime), int(status.st_mtime), int(status.st_ctime)]
        rests = [time % 10**9 for time in (status.st_atime_ns, status.st_mtime_ns, status.st_ctime_ns)]
        owner = (status.st_mode, status.st_nlink, 0, 0, 0, 4096, 0)
        return _ATTRIBUTES.pack(self._number(path), status.st_size, status.st_blocks, *seconds, *rests, *owner)

    def _listing(self, folder: Path, offset: int, size: int) -> bytes:
        listing = b""
        for number, path in enumerate(sorted(folder.iterdir())):
            name, kind = path.name.encode(), stat.S_IFMT(path.stat().st_mode) >> 12
            entry = struct.pack("<QQII", self._number(path), number + 1, len(name), kind) + name
            entry += b"\0" * (-len(entry) % 8)
            if number >= offset and len(listing) + len(entry) <= size:
                listing += entry
        return listing


def main(source: str, mountpoint: str, *program: str) -> int:
    """Mount, run the program, and serve the file system until it has ended; returns its exit code."""
    disk = HangingDisk(Path(source), Path(mountpoint))
    process = subprocess.Popen(program, stdin=subprocess.DEVNULL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: process.send_signal(number))
    watched = [disk.fileno(), sys.stdin.fileno()]
    while process.poll() is None:
        for descriptor in select.select(watched, [], [], 0.1)[0]:
            if descriptor == disk.fileno():
                disk.serve()
                continue
            command = os.read(descriptor, 100).decode().strip()
            if command == "go on":
                disk.go_on()
            elif command.startswith("hang "):
                disk.hangs = command.removeprefix("hang ")
            else:
                # Whoever has started it is gone.
                watched.remove(descriptor)
                process.terminate()
            print(f"disk: {command}", file=sys.stderr, flush=True)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
