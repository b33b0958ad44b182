"""Files in a folder, zip or tar, read in place.

Nothing is extracted, so names in an archive cannot escape from a folder. A compressed tar can only be read
sequentially; everything else at any position and from any thread.
"""

from __future__ import annotations

import gzip
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from h5feed.errors import Unreadable

if TYPE_CHECKING:
    from .store_files import StoreFiles

MAX_MEMBER_BYTES = 256 << 20
"""Of one file, unpacked: no image that anybody trains on is larger."""

MAX_RATIO = 200
"""How many times its size a file may unpack to, above `RATIO_FREE_BYTES`: images do not shrink so."""

RATIO_FREE_BYTES = 1 << 20

_DEFLATE_RATIO = 1100
"""A little more than deflate can reach: what is said to be more lies."""

_BEGUN = 16
"""Files that are read one after the other, of which the next ones are prepared together."""

TAR_SUFFIXES = (".tar",)
PACKED_TAR_SUFFIXES = (".tar.gz", ".tgz")


class BrokenMember(ValueError):
    """A file that cannot be read; the message says why."""


@dataclass(frozen=True)
class Member:
    """One file.

    Attributes
    ----------
    name : str
        With ``/``, relative to the folder or the archive.
    size : int
        Bytes, unpacked, as the folder or the archive says.
    stamp : str
        Changes with its content.
    """

    name: str
    size: int
    stamp: str


@dataclass
class Listing:
    """The files, in the best order for reading, and those left out, with reasons."""

    members: list[Member] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)
    left_out: dict[str, str] = field(default_factory=dict)


class Members(Protocol):
    """Reads the files of a listing."""

    listing: Listing

    @property
    def anywhere(self) -> bool:
        """Whether `read` works from any thread; if not, only `stream` does."""

    def begin(self, indices: Sequence[int]) -> None:
        """Prepare to read these files soon."""

    def read(self, index: int) -> bytes:
        """The whole file."""

    def stream(self, wanted: Sequence[int]) -> Iterator[tuple[int, bytes | BrokenMember]]:
        """These files, in ascending order."""

    def close(self) -> None: ...


def open_members(source: Path, files: StoreFiles | None = None) -> Members:
    """The files of a folder or archive.

    Parameters
    ----------
    files : StoreFiles, optional
        What the files of a folder stand for.

    Raises
    ------
    Unreadable
    """
    name = source.name.lower()
    try:
        if source.is_dir():
            return FolderMembers(source, files)
        if name.endswith(PACKED_TAR_SUFFIXES):
            return PackedTarMembers(source)
        if name.endswith(TAR_SUFFIXES):
            return TarMembers(source)
        return ZipMembers(source)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        raise Unreadable(f"{source} is damaged or not an archive: {error}") from None
    except OSError as error:
        raise Unreadable(f"{source} cannot be read: {error.strerror or error}") from None


def _checked_name(name: str) -> str | None:
    """A name from an archive, with ``/``; None if it leads out of the archive."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    outside = name.startswith(("/", "\\")) or ".." in parts or (parts and ":" in parts[0][1:2])
    return None if outside or not parts or "\0" in name else "/".join(parts)


def _is_hidden(name: str) -> bool:
    """Whether it is a file that operating systems leave behind."""
    return any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def _too_large(size: int, packed: int | None = None) -> str | None:
    if size > MAX_MEMBER_BYTES:
        return f"it unpacks to {size} bytes, more than the limit of {MAX_MEMBER_BYTES}"
    if packed is not None and size > RATIO_FREE_BYTES and size > MAX_RATIO * max(1, packed):
        return f"it unpacks from {packed} to {size} bytes: a decompression bomb"
    return None


class Everywhere:
    """Base of members that can be read at any position."""

    @property
    def anywhere(self) -> bool:
        return True

    def begin(self, indices: Sequence[int]) -> None:
        """Local files need no preparation."""

    def read(self, index: int) -> bytes:
        raise NotImplementedError

    def stream(self, wanted: Sequence[int]) -> Iterator[tuple[int, bytes | BrokenMember]]:
        for place, index in enumerate(wanted):
            if place % _BEGUN == 0:
                self.begin(wanted[place : place + _BEGUN])
            try:
                yield index, self.read(index)
            except BrokenMember as error:
                yield index, error


class FolderMembers(Everywhere):
    """Files below a folder, sorted by name; links to folders are not followed."""

    def __init__(self, root: Path, files: StoreFiles | None = None) -> None:
        self._root, self._files = root, files
        self.listing = Listing()
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(item for item in folders if not _is_hidden(item))
            relative = os.path.relpath(folder, root).replace(os.sep, "/")
            self.listing.folders.update(item if relative == "." else f"{relative}/{item}" for item in folders)
            for file in names:
                name = file if relative == "." else f"{relative}/{file}"
                if not _is_hidden(file):
                    self._add(name, os.path.join(folder, file))
        self.listing.members.sort(key=lambda member: member.name)

    def _add(self, name: str, path: str) -> None:
        try:
            status = os.stat(path)
        except OSError as error:
            self.listing.left_out[name] = f"it cannot be read: {error.strerror}"
            return
        if not stat.S_ISREG(status.st_mode):
            self.listing.left_out[name] = "it is not a regular file"
        elif problem := _too_large(status.st_size):
            self.listing.left_out[name] = problem
        else:
            self.listing.members.append(Member(name, status.st_size, f"{status.st_size} {status.st_mtime_ns}"))

    def begin(self, indices: Sequence[int]) -> None:
        if self._files is not None:
            self._files.begin(self._root / self.listing.members[index].name for index in indices)

    def read(self, index: int) -> bytes:
        member = self.listing.members[index]
        if self._files is not None and (content := self._files.read(self._root / member.name)) is not None:
            return content
        try:
            with open(self._root / member.name, "rb", buffering=0) as stream:
                # Asking for the most that is allowed would allocate that much for each file.
                data = stream.read(member.size + 1)
                return data if len(data) <= member.size else data + stream.read(MAX_MEMBER_BYTES - len(data))
        except OSError as error:
            raise BrokenMember(f"it cannot be read: {error.strerror}") from None

    def close(self) -> None:
        """Nothing to close."""


class ZipMembers(Everywhere):
    """Files in a zip, by name. If a name occurs twice, the later file counts, as in other programs."""

    def __init__(self, path: Path) -> None:
        self._archive = zipfile.ZipFile(path)
        if any(info.flag_bits & 1 for info in self._archive.infolist()):
            self._archive.close()
            raise Unreadable(f"{path} is encrypted: unpack it first, and pass the folder")
        self.listing = Listing()
        infos: dict[str, zipfile.ZipInfo] = {}
        for info in self._archive.infolist():
            name = _checked_name(info.filename)
            if name is None:
                self.listing.left_out[info.filename] = "its name leads out of the archive"
            elif _is_hidden(name):
                continue
            elif info.is_dir():
                self.listing.folders.add(name)
            elif problem := _too_large(info.file_size, info.compress_size):
                self.listing.left_out[name] = problem
            else:
                if name in infos:
                    self.listing.left_out[f"{name} (the first)"] = "its name occurs twice: the later file is used"
                infos[name] = info
        self._infos = [infos[name] for name in sorted(infos)]
        self.listing.members = [
            Member(name, infos[name].file_size, f"{infos[name].file_size} {infos[name].CRC:08x}")
            for name in sorted(infos)
        ]

    def read(self, index: int) -> bytes:
        try:
            return self._archive.read(self._infos[index])
        except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
            raise BrokenMember(f"it cannot be unpacked: {error}") from None
        except OSError as error:
            raise BrokenMember(f"it cannot be read: {error.strerror or error}") from None

    def close(self) -> None:
        self._archive.close()


def _list_tar(archive: tarfile.TarFile, listing: Listing) -> list[tuple[str, tarfile.TarInfo]]:
    """Names and headers of the files, in the order of the archive; the later one of two of one name."""
    infos: dict[str, tarfile.TarInfo] = {}
    for info in archive:
        # All that is remembered of it: an archive may have millions.
        archive.members.clear()  # type: ignore[attr-defined]
        name = _checked_name(info.name)
        if name is None:
            listing.left_out[info.name] = "its name leads out of the archive"
        elif _is_hidden(name):
            continue
        elif info.isdir():
            listing.folders.add(name)
        elif not info.isreg():
            listing.left_out[name] = "it is a link or a device, not a file"
        elif problem := _too_large(info.size):
            listing.left_out[name] = problem
        else:
            if infos.pop(name, None) is not None:
                listing.left_out[f"{name} (the first)"] = "its name occurs twice: the later file is used"
            infos[name] = info
    return list(infos.items())


class TarMembers(Everywhere):
    """Files in an uncompressed tar."""

    def __init__(self, path: Path) -> None:
        self.listing = Listing()
        with tarfile.open(path, "r:") as archive:
            infos = _list_tar(archive, self.listing)
        infos.sort(key=lambda item: item[0])
        self._places = [(info.offset_data, info.size) for _, info in infos]
        self.listing.members = [Member(name, info.size, _tar_stamp(info)) for name, info in infos]
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, index: int) -> bytes:
        offset, size = self._places[index]
        data = os.pread(self._descriptor, size, offset)
        if len(data) != size:
            raise BrokenMember("the archive ends in the middle of it")
        return data

    def close(self) -> None:
        os.close(self._descriptor)


class PackedTarMembers:
    """Files in a compressed tar, read sequentially from the start each time."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.listing = Listing()
        with self._open() as archive:
            infos = _list_tar(archive, self.listing)
        self._at = {info.offset: index for index, (_, info) in enumerate(infos)}
        self.listing.members = [Member(name, info.size, _tar_stamp(info)) for name, info in infos]

    @contextmanager
    def _open(self) -> Iterator[tarfile.TarFile]:
        limit = RATIO_FREE_BYTES + MAX_RATIO * self._path.stat().st_size
        with gzip.open(self._path) as stream:
            bounded: Any = _Bounded(stream, limit)
            with tarfile.open(fileobj=bounded, mode="r|") as archive:
                yield archive

    @property
    def anywhere(self) -> bool:
        return False

    def begin(self, indices: Sequence[int]) -> None:
        """They are read in order."""

    def read(self, index: int) -> bytes:
        raise NotImplementedError

    def stream(self, wanted: Sequence[int]) -> Iterator[tuple[int, bytes | BrokenMember]]:
        left = set(wanted)
        if not left:
            return
        with self._open() as archive:
            for info in archive:
                archive.members.clear()  # type: ignore[attr-defined]
                index = self._at.get(info.offset)
                if index not in left:
                    continue
                extracted = archive.extractfile(info)
                assert extracted is not None
                yield index, extracted.read()
                left.discard(index)
                if not left:
                    return
        for index in sorted(left):
            yield index, BrokenMember("it is no longer in the archive")

    def close(self) -> None:
        """Nothing to close."""


class _Bounded:
    """A stream that raises an error if it decompresses to more than is plausible."""

    def __init__(self, stream: gzip.GzipFile, limit: int) -> None:
        self._stream, self._limit, self._read = stream, limit, 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._read += len(data)
        if self._read > self._limit:
            raise tarfile.ReadError(f"it unpacks to more than {MAX_RATIO} times its size: a decompression bomb")
        return data


def _tar_stamp(info: tarfile.TarInfo) -> str:
    return f"{info.size} {info.mtime} {info.offset_data}"
