"""Decodes images: plain ones right here, all others in processes of their own.

A crafted file of some kilobytes can keep its decoder busy for minutes, take all memory or crash it. There it costs a
process, and is a broken row; builds and servers go on. A process would cost a JPEG of usual size a fifth of its rate,
so that those are spared it which cannot take long.
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
from h5feed.decode import MAX_SERVED_PIXELS, SERVED_FORMATS, BrokenImage, Decoded, decode_image
from h5feed.errors import Overloaded
from h5feed.images import ImageSpec

from ..hdf5.child import LENGTH, Child, confine, write_frame
from .plain import is_plain

MEMORY_BYTES = 8 << 30
"""Address space of a process that decodes: the largest image that is let through needs half of it."""

SERVED_MEMORY_BYTES = 4 << 30
"""The same for images that are served, which are a quarter as large; libraries that are mapped count too."""

SERVED_SECONDS = 10.0
"""That decoding one image may take while somebody waits for a batch of them."""

_GRACE_SECONDS = 10.0
"""A process whose parent did not end it in time, as it is gone, ends itself so much later."""

_PIPE_BYTES = 1 << 20

_ANSWER = struct.Struct("<?7xqqqqq")
"""Whether it is whole; height and width of the file; height, width and channels of the pixels that follow."""


@dataclass(frozen=True)
class Decoding:
    """What a process decodes, and how.

    Attributes
    ----------
    formats, max_pixels
        See `h5feed.decode.decode_image`.
    seconds : float
        That one image may take.
    """

    spec: ImageSpec
    formats: tuple[str, ...]
    max_pixels: int
    seconds: float

    @property
    def max_bytes(self) -> int:
        """Of the pixels of one image."""
        pixels = math.prod(self.spec.size) if self.spec.size is not None else self.max_pixels
        return pixels * self.spec.channels * np.dtype(self.spec.dtype).itemsize

    def as_text(self) -> bytes:
        about = {**self.spec.about(), "size": self.spec.size}
        return json.dumps([about, self.formats, self.max_pixels, self.seconds]).encode()

    @classmethod
    @lru_cache(maxsize=64)
    def of(cls, text: bytes) -> Decoding:
        about, formats, max_pixels, seconds = json.loads(text)
        size = about.pop("size")
        return cls(ImageSpec(None if size is None else tuple(size), **about), tuple(formats), max_pixels, seconds)


def served(spec: ImageSpec, timeout: float) -> Decoding:
    """What a server decodes, whose requests take `timeout` seconds at most."""
    return Decoding(spec, SERVED_FORMATS, MAX_SERVED_PIXELS, min(SERVED_SECONDS, timeout / 2))


class ImageDecoders:
    """Decodes images, with processes that are started when needed, one for each thread that asks; ended by `close`.

    Parameters
    ----------
    max_bytes : int
        Bound on the pixels of one image.
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
            return decode_image(data, wanted.spec, formats=wanted.formats, max_pixels=wanted.max_pixels)
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
        """A process's answer; where one is found dead, a new one's: it may not have been this image that ended it."""
        about = wanted.as_text()
        request = LENGTH.pack(len(about)) + LENGTH.pack(len(data)) + about + data
        for attempt in (1, 2):
            with self._lock:
                # Whatever ended one may have ended all that were idle.
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
        # Nothing is wrong with an image where it is the process that does not start.
        try:
            child = Child(__name__, (str(self._memory_bytes),), self._max_bytes)
        except OSError as error:
            raise Overloaded(f"no process that decodes images can be started: {error.strerror}") from None
        try:
            child.ask(LENGTH.pack(0) * 2, _GRACE_SECONDS)
        except (OSError, EOFError) as error:
            child.kill()
            child.end()
            raise Overloaded(f"no process that decodes images can be started: {error or 'it ended'}") from None
        return child


# The child process ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer each image with its pixels, or with what is wrong with it, until there are no more."""
    # Ctrl-C is for the parent, which tells what becomes of this process by closing its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    import cv2

    # All cores have a process.
    cv2.setNumThreads(1)
    for descriptor in (0, 1):
        # An image at once, not in sixteenths.
        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    answers = confine(int(sys.argv[1]))
    with contextlib.suppress(EOFError, BrokenPipeError), os.fdopen(0, "rb") as images:
        while header := images.read(2 * LENGTH.size):
            about, data = (images.read(*LENGTH.unpack(length)) for length in (header[:8], header[8:]))
            if not about:
                write_frame(answers, b"")
                continue
            decoding = Decoding.of(about)
            # The kernel ends the process at once, whichever library it is in.
            signal.setitimer(signal.ITIMER_REAL, decoding.seconds + _GRACE_SECONDS)
            try:
                decoded = decode_image(data, decoding.spec, formats=decoding.formats, max_pixels=decoding.max_pixels)
                pixels = np.ascontiguousarray(decoded.pixels)
                answer = _ANSWER.pack(True, decoded.height, decoded.width, *pixels.shape)
                write_frame(answers, answer, memoryview(pixels.reshape(-1).view(np.uint8)))
            except BrokenImage as error:
                write_frame(answers, _ANSWER.pack(False, 0, 0, 0, 0, 0), str(error).encode()[: 1 << 10])
            signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
