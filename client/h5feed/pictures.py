"""Pictures that the server draws: notebooks display them, and they can be saved."""

from __future__ import annotations

import base64
import os
import struct
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any, Literal

from .errors import BadAnswer, BadParameter

PNG = "image/png"

PlotKind = Literal["classes", "histogram", "mean_image"]
"""What a plot of statistics shows: see ``GET …/stats/plot`` in the HTTP API."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK = struct.Struct(">I4s")
_CHECKSUM_BYTES = 4


class Picture:
    """A PNG image from the server. Notebooks display it; elsewhere, `save` it.

    Attributes
    ----------
    png : bytes
        The file.
    text : str
        What the picture shows, in words.
    width, height : int
        In pixels.
    """

    def __init__(self, png: bytes) -> None:
        self.png = png
        self.text = ""
        self.width = self.height = 0
        for kind, data in _chunks(png):
            if kind == b"IHDR" and len(data) >= 8:
                self.width, self.height = struct.unpack_from(">II", data)
            elif kind in (b"tEXt", b"iTXt"):
                self.text = self.text or _description(kind, data)
        if not self.width:
            raise BadAnswer("the response is not a PNG image: its header is missing")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file, replacing one that is there.

        Raises
        ------
        BadParameter
            The name does not end in ``.png``.
        """
        target = Path(path).expanduser()
        if target.suffix.lower() != ".png":
            raise BadParameter(f"the picture is a PNG file, so {target.name!r} must end in .png")
        target.write_bytes(self.png)

    def __repr__(self) -> str:
        about = f": {self.text.rstrip('.')}" if self.text else ""
        return f"<Picture, {self.width} × {self.height} pixels{about}; save it with .save('NAME.png')>"

    def _repr_png_(self) -> bytes:
        return self.png

    def _repr_mimebundle_(
        self, include: Container[str] | None = None, exclude: Container[str] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The picture for notebooks, with its text for those who do not see it."""
        data = {PNG: base64.b64encode(self.png).decode(), "text/plain": repr(self)}
        return data, {PNG: {"alt": self.text, "width": self.width, "height": self.height}}


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of each part of a PNG file.

    Raises
    ------
    BadAnswer
        It is not a PNG file, or not all of one.
    """
    if not png.startswith(_SIGNATURE):
        raise BadAnswer(f"the response is not a PNG image, but begins with {png[:8]!r}")
    at, kind = len(_SIGNATURE), b""
    while kind != b"IEND":
        begin = at + _CHUNK.size
        if begin > len(png):
            raise BadAnswer(f"the PNG image ends after {len(png):,} bytes, before it is complete")
        length, kind = _CHUNK.unpack_from(png, at)
        at = begin + length + _CHECKSUM_BYTES
        yield kind, png[begin : begin + length]


def _description(kind: bytes, data: bytes) -> str:
    """The text of a chunk if it is the description, else empty."""
    keyword, _, rest = data.partition(b"\0")
    if keyword != b"Description":
        return ""
    if kind == b"tEXt":
        return rest.decode("latin-1")
    # A flag and a method of compression, a language and the keyword in it come first.
    if rest[:1] != b"\0":
        return ""
    return rest[2:].partition(b"\0")[2].partition(b"\0")[2].decode("utf-8", "replace")
