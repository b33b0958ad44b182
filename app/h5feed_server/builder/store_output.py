"""Uploads the finished files of a build to an object store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from h5feed.errors import BadParameter, FeedError

from ..catalog.discovery import LEFT_OUT
from ..catalog.revision import BLOCK, begun_digest, block_digest
from ..storage.objects.content_note import ContentNote, e_tag_of_parts
from ..storage.objects.upload import ObjectState, Uploads, part_bytes
from ..store_address import StoreAddress
from .progress import OnProgress, Progress


class StoreOutput:
    """Where a build goes in an object store. Every file is built on the local disk before it is uploaded.

    Parameters
    ----------
    address : StoreAddress
        Of the prefix above the output.
    folder : Path
        Where the files are built; names below it are those of the objects.
    overwrite : bool
        Whether objects may be replaced.
    """

    def __init__(self, address: StoreAddress, folder: Path, overwrite: bool, on_progress: OnProgress) -> None:
        self._uploads = Uploads(address)
        self._folder, self._overwrite, self._on_progress = folder, overwrite, on_progress

    def url(self, path: Path) -> str:
        """The object for a file."""
        return self._uploads.url(self._key(path))

    def check_free(self, files: Iterable[Path]) -> None:
        """Raise BadParameter if there is an object that must not be replaced; before anything is built.

        Raises
        ------
        Unreadable, SourceUnavailable
            There is no such bucket, or the store does not answer.
        """
        self._uploads.check_bucket()
        if self._overwrite:
            return
        with ThreadPoolExecutor(16, "h5feed-check") as threads:
            for path, state in zip(files, threads.map(self._uploads.look, map(self._key, files)), strict=True):
                if state != ObjectState.ABSENT:
                    raise BadParameter(f"{self.url(path)} already exists: choose another name, or pass overwrite=True")

    def send(self, files: Sequence[Path], output: Path) -> tuple[str, ...]:
        """Upload what has not been uploaded yet, and what lists the rows that were left out. Returns the URLs.

        Raises
        ------
        BadParameter
            There is an object that must not be replaced.
        Unreadable, SourceUnavailable
            The store refuses the upload, or does not answer. The same call goes on where this one stopped.
        """
        total = sum(path.stat().st_size for path in files)
        checked = sent = 0

        def on_checked(nbytes: int) -> None:
            nonlocal checked
            checked += nbytes
            self._on_progress(Progress("check", checked, total, 0))

        notes = [note_of(path, on_checked) for path in files]
        for path, note in zip(files, notes, strict=True):
            key = self._key(path)
            state = self._uploads.look(key, note)
            if state == ObjectState.DIFFERENT and not self._overwrite:
                raise BadParameter(f"{self.url(path)} already exists: choose another name, or pass overwrite=True")
            if state != ObjectState.COMPLETE:

                def on_sent(nbytes: int, before: int = sent) -> None:
                    self._on_progress(Progress("upload", before + nbytes, total, before + nbytes))

                # One that claims to be this one is from an earlier call, if the store confirms no content.
                replace = self._overwrite or state == ObjectState.UNCONFIRMED
                try:
                    self._uploads.put_file(path, key, note, replace=replace, on_sent=on_sent)
                except FeedError as error:
                    if self.url(path) not in error.detail:
                        error.detail = f"{self.url(path)}: {error.detail}"
                    raise
            sent += note.size
        self._send_left_out(output)
        return tuple(self.url(path) for path in files)

    def _send_left_out(self, output: Path) -> None:
        path = output.with_name(f"{output.name}{LEFT_OUT}")
        if path.exists():
            self._uploads.put_bytes(self._key(path), path.read_bytes())
        else:
            self._uploads.remove(self._key(path))

    def _key(self, path: Path) -> str:
        return path.relative_to(self._folder).as_posix()


def note_of(path: Path, on_bytes: Callable[[int], None]) -> ContentNote:
    """What an object with the bytes of this file says of its content."""
    size = path.stat().st_size
    part = part_bytes(size)
    content = begun_digest(size)
    whole = hashlib.md5(usedforsecurity=False)
    parts: list[bytes] = []
    own = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file, ThreadPoolExecutor(2, "h5feed-digest") as threads:
        while block := file.read(BLOCK):
            # Three digests of the same block at once.
            digest = threads.submit(block_digest, block)
            others = threads.submit(whole.update, block)
            own.update(block)
            content.update(digest.result())
            others.result()
            on_bytes(len(block))
            if file.tell() % part == 0 or file.tell() == size:
                parts.append(own.digest())
                own = hashlib.md5(usedforsecurity=False)
        if file.tell() != size or os.fstat(file.fileno()).st_size != size:
            raise FeedError(f"{path.name} was changed by another program while it was read")
    return ContentNote(size, content.hexdigest(), whole.hexdigest(), e_tag_of_parts(parts) if size > part else "")
