"""What the state of a dataset is called: by the identity of its files at once, by their content when that is known.

`h5feed.revisions` describes both kinds of names.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

from h5feed.order import ORDER_VERSION
from h5feed.revisions import LENGTH, PROVISIONAL, header_of, is_provisional

from ..served_version import SERVED_VERSION
from .digests import Content, progress_of


class Names:
    """The names of the state of the datasets in some files.

    Parameters
    ----------
    contents : sequence of Content
        Of all files, in order.
    root : str
        The data folder.
    declaration : bytes
        The declaration of the dataset, serialised.
    called : bytes
        Names of files that are served, serialised; empty if none are.

    Attributes
    ----------
    here : str
        The provisional name: a digest of size, times, inode and path of each file. The device is not part of it,
        because its number may be another one after the machine was started again.
    key : str
        Identifies the state of the data in memory. The name by content if that is known from the start: a file that has
        just been written can change without another identity. Else the provisional name, whether the content becomes
        known or not.
    """

    def __init__(self, contents: Sequence[Content], root: str, declaration: bytes, called: bytes) -> None:
        self.contents = tuple(contents)
        self._head = f"{SERVED_VERSION} {ORDER_VERSION} {len(declaration)} ".encode() + declaration
        self._called = called
        self._content: str | None = None
        self._known = 0
        """Number of the first contents whose digests are known."""
        here = hashlib.blake2b(self._head, digest_size=8)
        below = f"{root}{os.sep}"
        for one in self.contents:
            _, inode, size, mtime, ctime = one.identity
            path = os.fsencode(one.path.removeprefix(below))
            here.update(f"{inode:x} {size:x} {mtime:x} {ctime:x} {len(path)} ".encode() + path)
        here.update(called)
        self.here = PROVISIONAL + base64.b32encode(here.digest()).decode().lower()[: LENGTH - len(PROVISIONAL)]
        self.key = self.current

    @property
    def content(self) -> str | None:
        """The name by content, which is the same on all machines; None until all files have been hashed."""
        if self._content is None:
            while self._known < len(self.contents) and self.contents[self._known].digest is not None:
                self._known += 1
            if self._known == len(self.contents):
                self._content = self.of_digest(b"".join(one.digest or b"" for one in self.contents))
        return self._content

    @property
    def current(self) -> str:
        """The name by content, or the provisional one until that is known."""
        return self.content or self.here

    @property
    def hashing(self) -> tuple[int, int] | None:
        """Bytes that have been hashed, and all that are to be; None if everything has been."""
        return None if self.content is not None else progress_of(self.contents)

    def of_digest(self, digest: bytes) -> str:
        """The name by content if the digests of all files, one after the other, were these bytes."""
        revision = hashlib.blake2b(digest_size=LENGTH // 2)
        revision.update(self._head)
        revision.update(digest)
        revision.update(self._called)
        return revision.hexdigest()


class Key(NamedTuple):
    """Names of a result about a dataset.

    Attributes
    ----------
    here : str
        In memory, from `Names.key`: the result is found before and after the content is known.
    kept : callable
        Returns the name in the cache folder, which contains the name by content; None until that is known. Nothing on
        disk has a provisional name: the same identity does not prove that the content is the same.
    """

    here: str
    kept: Callable[[], str | None]


def key_of(folder: str, dataset: str, names: Names, request: object) -> Key:
    """The names of a result.

    Parameters
    ----------
    folder : str
        How the name begins: the subfolder of the cache folder, and a version.
    dataset : str
        Name of the dataset.
    request : object
        What was computed; its text is part of the name.
    """

    def name(revision: str) -> str:
        text = f"{dataset} {revision} {request}".encode("utf-8", "surrogatepass")
        return f"{folder}-{hashlib.blake2b(text, digest_size=16).hexdigest()}"

    def kept() -> str | None:
        return None if names.content is None else name(names.content)

    return Key(name(names.key), kept)


@dataclass
class Told:
    """What the response to a request has to tell about names; set by the threads that work for it.

    Attributes
    ----------
    names : Names or None
        Of the dataset, if it is called by a provisional name.
    provisional : str
        That name.
    is_list : bool
        Whether the response lists provisional names.
    """

    names: Names | None = None
    provisional: str = ""
    is_list: bool = False

    @property
    def header(self) -> str | None:
        """The value of the header with the names; None if there is nothing to tell."""
        return None if self.names is None else header_of(self.provisional, self.names.content)


TOLD: ContextVar[Told | None] = ContextVar("told", default=None)


def tell(revision: str, names: Names) -> None:
    """Note that the current work is about a dataset of this name."""
    if is_provisional(revision) and (told := TOLD.get()) is not None:
        told.names, told.provisional = names, revision


def tell_list(revisions: Iterable[str]) -> None:
    """Note that the response lists these revisions."""
    if (told := TOLD.get()) is not None:
        told.is_list = any(map(is_provisional, revisions))
