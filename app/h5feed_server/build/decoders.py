"""Decodes images: plain ones right here, all others in processes of their own.

A crafted file that a zip shrinks to some kilobytes can keep its decoder busy for minutes, take all memory or crash it.
There it costs a process, and is a broken row; the build goes on. A process would cost a JPEG of usual size a fifth of
its rate, so that those are spared it which cannot take long.
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

import numpy as np
from h5feed.errors import FeedError
from h5feed.images import ImageSpec

from ..storage.child import LENGTH, Child, confine, write_frame
from .images import BrokenImage, Decoded, decode_image
from .plain import is_plain

MEMORY_BYTES = 8 << 30
"""Address space of a process that decodes: the largest image that is let through needs half of it."""

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

    def as_text(self) -> str:
        about = {**self.spec.about(), "size": self.spec.size}
        return json.dumps([about, self.formats, self.max_pixels, self.seconds])

    @classmethod
    def of(cls, text: str) -> Decoding:
        about, formats, max_pixels, seconds = json.loads(text)
        size = about.pop("size")
        return cls(ImageSpec(None if size is None else tuple(size), **about), tuple(formats), max_pixels, seconds)


class Decoders:
    """Decodes images, with processes that are started when needed, one for each thread that asks; ended by `close`."""

    def __init__(self, decoding: Decoding) -> None:
        self._decoding = decoding
        self._dtype = np.dtype(decoding.spec.dtype)
        pixels = math.prod(decoding.spec.size) if decoding.spec.size is not None else decoding.max_pixels
        self._max_bytes = _ANSWER.size + max(1 << 16, pixels * decoding.spec.channels * self._dtype.itemsize)
        self._idle: list[Child] = []
        self._lock = threading.Lock()

    def decode(self, data: bytes) -> Decoded:
        """Decode one image, from any thread.

        Raises
        ------
        BrokenImage
            It cannot be decoded, or not in time, or it crashed its process.
        FeedError
            No process can be started.
        """
        wanted = self._decoding
        if is_plain(data):
            return decode_image(data, wanted.spec, formats=wanted.formats, max_pixels=wanted.max_pixels)
        try:
            answer = self._ask(data)
        except TimeoutError:
            raise BrokenImage(f"decoding it took more than {wanted.seconds:g} s") from None
        except (OSError, EOFError):
            raise BrokenImage("decoding it crashed the decoder") from None
        whole, height, width, *shape = _ANSWER.unpack_from(answer)
        if not whole:
            raise BrokenImage(bytes(answer[_ANSWER.size :]).decode("utf-8", "replace"))
        return Decoded(np.frombuffer(answer[_ANSWER.size :], self._dtype).reshape(shape), height, width)

    def close(self) -> None:
        with self._lock:
            children, self._idle = self._idle, []
        for child in children:
            child.end()

    def _ask(self, data: bytes) -> memoryview:
        """A process's answer; where one is found dead, another's: it may not have been this image that ended it."""
        for attempt in (1, 2):
            with self._lock:
                child = self._idle.pop() if self._idle else None
            child = child or self._start()
            try:
                answer = child.ask(LENGTH.pack(len(data)) + data, self._decoding.seconds)
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
        child = Child(__name__, (self._decoding.as_text(),), self._max_bytes)
        try:
            # Nothing is wrong with an image where it is the process that does not start.
            child.ask(LENGTH.pack(0), _GRACE_SECONDS)
        except (OSError, EOFError) as error:
            child.kill()
            child.end()
            raise FeedError(f"no process that decodes images can be started: {error or 'it ended'}") from None
        return child


# The child process ---------------------------------------------------------------------------------------------------


def main() -> None:
    """Answer each image with its pixels, or with what is wrong with it, until there are no more."""
    decoding = Decoding.of(sys.argv[1])
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
    answers = confine(MEMORY_BYTES)
    with contextlib.suppress(EOFError, BrokenPipeError), os.fdopen(0, "rb") as images:
        while header := images.read(LENGTH.size):
            data = images.read(*LENGTH.unpack(header))
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
