"""Decodes images: plain ones in the calling thread, all others in child processes.

A crafted file of a few kilobytes can keep a decoder busy for minutes, exhaust the memory or crash the process. In a
child process, it costs only that process: the row counts as broken, and the server or build continues. For JPEGs of
usual size, a child process would reduce the rate by a fifth, so images that cannot take long are decoded directly.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import signal
import struct
import sys
import threading
import warnings
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from h5feed.decode import MAX_SERVED_PIXELS, SERVED_FORMATS, BrokenImage, Decoded, decode_image, resizer
from h5feed.errors import Overloaded
from h5feed.images import ImageSpec
from h5feed.plain_images import is_plain

from ..hdf5.child import LENGTH, Child, confine, write_frame

MEMORY_BYTES = 8 << 30
"""Address space of a decoder process. The largest image that is accepted needs half of it."""

SERVED_MEMORY_BYTES = 4 << 30
"""The same for served images, which are at most a quarter as large. It includes mapped libraries."""

SERVED_SECONDS = 10.0
"""Seconds that decoding one image may take while a client waits for the batch."""

_GRACE_SECONDS = 10.0
"""A decoder process whose parent is gone ends itself this long after its timeout; also the timeout of its start."""

_PIPE_BYTES = 1 << 20

_ANSWER = struct.Struct("<?7xqqqqq")
"""Whether it was decoded; height and width of the stored image; height, width, channels of the pixels that follow."""


@dataclass(frozen=True)
class Decoding:
    """How to decode images.

    Attributes
    ----------
    spec : ImageSpec
        What to decode to.
    formats, max_pixels
        See `h5feed.decode.decode_image`.
    seconds : float
        Timeout for one image.
    exact : bool
        Whether to get the same pixels on all machines: see `h5feed.decode.decode_image`.
    """

    spec: ImageSpec
    formats: tuple[str, ...]
    max_pixels: int
    seconds: float
    exact: bool = False

    @property
    def max_bytes(self) -> int:
        """Upper bound on the bytes of one decoded image."""
        pixels = math.prod(self.spec.size) if self.spec.size is not None else self.max_pixels
        return pixels * self.spec.channels * np.dtype(self.spec.dtype).itemsize

    def as_text(self) -> bytes:
        about = {**self.spec.about(), "size": self.spec.size}
        return json.dumps([about, self.formats, self.max_pixels, self.seconds, self.exact]).encode()

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, text: bytes) -> Decoding:
        about, formats, max_pixels, seconds, exact = json.loads(text)
        size = about.pop("size")
        spec = ImageSpec(None if size is None else tuple(size), **about)
        return cls(spec, tuple(formats), max_pixels, seconds, exact)

    def decode(self, data: bytes) -> Decoded:
        """Decode one image in this process.

        Raises
        ------
        BrokenImage
        """
        return decode_image(data, self.spec, formats=self.formats, max_pixels=self.max_pixels, exact=self.exact)


def served(spec: ImageSpec, timeout: float) -> Decoding:
    """The decoding that a server uses for requests with a timeout of `timeout` seconds."""
    return Decoding(spec, SERVED_FORMATS, MAX_SERVED_PIXELS, min(SERVED_SECONDS, timeout / 2), True)


class ImageDecoders:
    """Decodes images. Starts processes when needed, one for each calling thread; `close` ends them.

    Parameters
    ----------
    max_bytes : int
        Upper bound on the bytes of one decoded image.
    memory_bytes : int
        Address space of each process.
    """

    def __init__(self, max_bytes: int, memory_bytes: int = MEMORY_BYTES) -> None:
        self._max_bytes = _ANSWER.size + max(1 << 16, max_bytes)
        self._memory_bytes = memory_bytes
        self._idle: list[Child] = []
        self._lock = threading.Lock()

    def decode(self, data: bytes, wanted: Decoding) -> Decoded:
        """Decode one image, from any thread.

        Raises
        ------
        BrokenImage
            It cannot be decoded, or not in time, or it crashed its process.
        Overloaded
            No process can be started.
        """
        if is_plain(data):
            return wanted.decode(data)
        try:
            answer = self._ask(data, wanted)
        except TimeoutError:
            raise BrokenImage(f"decoding it took more than {wanted.seconds:g} s") from None
        except (OSError, EOFError):
            raise BrokenImage("decoding it crashed the decoder") from None
        whole, height, width, *shape = _ANSWER.unpack_from(answer)
        if not whole:
            raise BrokenImage(bytes(answer[_ANSWER.size :]).decode("utf-8", "replace"))
        pixels = np.frombuffer(answer[_ANSWER.size :], wanted.spec.dtype).reshape(shape)
        return Decoded(pixels, height, width)

    def close(self) -> None:
        with self._lock:
            children, self._idle = self._idle, []
        for child in children:
            child.end()

    def _ask(self, data: bytes, wanted: Decoding) -> memoryview:
        """Send an image to a process. If the process has died, try a new one: the image may not have been the cause."""
        about = wanted.as_text()
        request = LENGTH.pack(len(about)) + LENGTH.pack(len(data)) + about + data
        for attempt in (1, 2):
            with self._lock:
                # What killed one process may have killed all idle ones, so start a new one.
                child = self._idle.pop() if self._idle and attempt == 1 else None
            child = child or self._start()
            try:
                answer = child.ask(request, wanted.seconds)
            except (OSError, EOFError) as error:
                child.kill()
                child.end()
                if isinstance(error, TimeoutError) or attempt == 2:
                    raise
                continue
            except BaseException:
                child.kill()
                child.end()
                raise
            with self._lock:
                self._idle.append(child)
            return answer
        raise EOFError

    def _start(self) -> Child:
        # A process that does not start is not a fault of the image, so do not raise BrokenImage.
        try:
            child = Child(__name__, (str(self._memory_bytes),), self._max_bytes)
        except OSError as error:
            raise Overloaded(f"cannot start a process to decode images: {error.strerror}") from None
        try:
            child.ask(LENGTH.pack(0) * 2, _GRACE_SECONDS)
        except (OSError, EOFError) as error:
            child.kill()
            child.end()
            raise Overloaded(f"cannot start a process to decode images: {error or 'it ended'}") from None
        return child


# The child process ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Read images from standard input until it ends, and respond with the pixels or an error for each."""
    # Ignore Ctrl-C: the parent handles it, and ends this process by closing its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    import cv2

    # One thread each, because several processes decode at the same time.
    cv2.setNumThreads(1)
    for descriptor in (0, 1):
        # Larger than the default of 64 KiB, so that most images need a single write.
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    # Load what a confined process may not find any more.
    resizer(exact=False)
    answers = confine(int(sys.argv[1]))
    with contextlib.suppress(EOFError, BrokenPipeError), os.fdopen(0, "rb") as images:
        while header := images.read(2 * LENGTH.size):
            about, data = (images.read(*LENGTH.unpack(length)) for length in (header[:8], header[8:]))
            if not about:
                write_frame(answers, b"")
                continue
            decoding = Decoding.of(about)
            # SIGALRM kills by default, whatever library code is running.
            signal.setitimer(signal.ITIMER_REAL, decoding.seconds + _GRACE_SECONDS)
            try:
                decoded = decoding.decode(data)
                pixels = np.ascontiguousarray(decoded.pixels)
                answer = _ANSWER.pack(True, decoded.height, decoded.width, *pixels.shape)
                write_frame(answers, answer, memoryview(pixels.reshape(-1).view(np.uint8)))
            except BrokenImage as error:
                write_frame(answers, _ANSWER.pack(False, 0, 0, 0, 0, 0), str(error).encode()[: 1 << 10])
            signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
