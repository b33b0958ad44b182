"""A wheel of the client that fits this server, made from the client that the server itself runs with.

It is made when a process starts, from the installed package, so it is the same in an editable checkout, in the Docker
image and behind the server's own wheel. Nothing in it depends on the time, the machine or a compression library: each
worker and each replica of the same version has the same bytes, and so the same hash.
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import h5feed
from fastapi import Request

from .. import __version__
from .auth import CLIENT_FOLDER
from .forwarded import here, public_origin

PROJECT = "h5feed"

_ENTRY_POINTS, _METADATA, _LICENSES = "entry_points.txt", "METADATA", "licenses"

_HOST = re.compile(r"(?:[\w.-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?", re.IGNORECASE | re.ASCII)

_UNKNOWN = "SERVER"
"""Shown as the host if a request does not say a valid one."""

_EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of each member: the earliest that a zip file can hold."""

_UNIX, _MODE = 3, 0o100644


@dataclass(frozen=True)
class ClientWheel:
    """A wheel, and what an index says about it."""

    version: str
    requires_python: str
    content: bytes
    sha256: str

    @property
    def filename(self) -> str:
        return f"{PROJECT}-{self.version}-py3-none-any.whl"

    @classmethod
    def of_installed(cls) -> ClientWheel | None:
        """The wheel of the client that is installed; None if it is only on the path, without metadata."""
        try:
            package = distribution(PROJECT)
        except PackageNotFoundError:
            return None
        content = _packed([*_modules(), *_metadata(package)], f"{PROJECT}-{package.version}.dist-info")
        about = package.metadata
        return cls(package.version, about["Requires-Python"] or "", content, hashlib.sha256(content).hexdigest())


def server_origin(request: Request) -> str:
    """Scheme and host by which the server was reached, such as ``http://gpu-box:8000``. Safe in HTML and Markdown.

    ``http://SERVER`` if the request does not say.
    """
    scheme, host = public_origin(request)
    return f"{scheme}://{host if _HOST.fullmatch(host) else _UNKNOWN}"


def server_url(request: Request) -> str:
    """The same with the path prefix, if there is one: what a client connects to."""
    return server_origin(request) + here("")


def wheel_url(request: Request) -> str | None:
    """The URL of the wheel with its hash, by the address by which the server was reached; None if there is none."""
    wheel: ClientWheel | None = request.app.state.client_wheel
    if wheel is None:
        return None
    return f"{server_url(request)}{CLIENT_FOLDER}{PROJECT}/{wheel.filename}#sha256={wheel.sha256}"


def install_line(request: Request) -> str | None:
    """The command that installs the client of this version; None if the server has no wheel of it.

    It names the wheel itself, not an index: pip refuses an index over plain http by host name, and next to another
    index it would prefer a package of the same name there.
    """
    url = wheel_url(request)
    return None if url is None else f"pip install {url}"


def _modules() -> Iterator[tuple[str, bytes]]:
    """Path and content of each file of the package, without what Python or an editor adds."""
    folder = Path(h5feed.__file__).parent
    for path in folder.rglob("*"):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part == "__pycache__" for part in parts)
        if path.is_file() and not hidden and path.suffix != ".pyc" and not path.name.endswith("~"):
            yield "/".join((PROJECT, *parts)), path.read_bytes()


def _metadata(package: Distribution) -> Iterator[tuple[str, bytes]]:
    """Path and content of each file of the metadata that does not belong to one installation."""
    folder = f"{PROJECT}-{package.version}.dist-info"
    for name in (_METADATA, _ENTRY_POINTS):
        text = package.read_text(name)
        if text is not None:
            yield f"{folder}/{name}", text.encode()
    for path in package.files or ():
        if path.parts[:2] == (folder, _LICENSES):
            yield path.as_posix(), path.read_binary()
    about = f"Wheel-Version: 1.0\nGenerator: h5feed-server {__version__}\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    yield f"{folder}/WHEEL", about.encode()


def _packed(files: list[tuple[str, bytes]], dist_info: str) -> bytes:
    """A wheel of these files. Not compressed: compressed bytes differ between versions of zlib."""
    files = sorted(files)
    record = [f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files]
    record.append(f"{dist_info}/RECORD,,\n")
    files.append((f"{dist_info}/RECORD", "".join(record).encode()))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files:
            member = zipfile.ZipInfo(name, _EPOCH)
            member.create_system, member.external_attr = _UNIX, _MODE << 16
            archive.writestr(member, content)
    return stream.getvalue()


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
