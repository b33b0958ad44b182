"""The interface of a store, and the errors that all kinds of stores have in common."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol

from h5feed.errors import FeedError, RevisionChanged, SourceUnavailable, Unreadable
from h5feed.stored.scratch import Bytes

MOST_AT_ONCE = 128
"""Ranges that a process fetches at the same time."""

ATTEMPT_SECONDS = 10.0
"""Timeout of one attempt. A store that is slow for one range usually answers the next attempt at once."""

CONNECT_SECONDS = 5.0

_WEAK = "W/"


@dataclass(frozen=True)
class StoredObject:
    """One version of an object.

    Attributes
    ----------
    key : str
        Relative to the prefix of the store.
    size : int
        Bytes.
    e_tag : str
        Strong ETag, with quotes.
    unreadable : str
        Why ranges of it cannot be read; empty if they can.
    content : str or None
        Digest of the content, hexadecimal; empty if the metadata have none that the ETag confirms, None if the metadata
        could not be read.
    """

    key: str
    size: int
    e_tag: str
    unreadable: str = ""
    content: str | None = ""

    @classmethod
    def of(cls, key: str, size: int, e_tag: str | None) -> StoredObject:
        """The object that a store has described."""
        if not e_tag or e_tag.startswith(_WEAK):
            return cls(key, size, "", "the store gives it no strong ETag")
        # Some stores leave the quotes out of their listings.
        return cls(key, size, e_tag if e_tag.startswith('"') else f'"{e_tag}"')

    def digest(self, store: str) -> bytes:
        """The digest of the content. If it is not known, a digest of the store's version of the object is used instead.

        Parameters
        ----------
        store : str
            `ObjectStore.place`: other stores may give the same ETag to another content.
        """
        if self.content:
            return bytes.fromhex(self.content)
        named = ("store version", store, self.key, self.size, self.e_tag)
        return hashlib.blake2b(repr(named).encode()).digest()


class Cut(Exception):
    """The store sent less than was requested."""


class Backend(Protocol):
    """A store without retries: the caller has the deadline, and repeats requests that fail."""

    async def head(self, key: str) -> StoredObject:
        """The current version of an object."""
        ...

    def pages(self) -> AsyncIterator[list[StoredObject]]:
        """All objects, some at a time."""
        ...

    async def fetch(self, one: StoredObject, offset: int, nbytes: int) -> Bytes:
        """A range of this version, (nbytes,) uint8.

        Raises
        ------
        RevisionChanged
            The answer is of another version.
        Cut
        """
        ...

    async def note(self, one: StoredObject) -> str:
        """What the metadata of this version say of its content, see `content_note`; empty if nothing.

        Raises
        ------
        RevisionChanged
            The answer is of another version.
        """
        ...

    def problem(self, error: Exception, one: StoredObject | None) -> FeedError:
        """The error to raise for one of the library, about an object if it is given."""
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


def of_status(status: int, one: StoredObject | None) -> FeedError:
    """The error for a status that is not a success."""
    if status in (401, 403):
        return refused()
    if one is not None and status in (412, 416):
        # The range lies within the version that was listed.
        return replaced(one)
    if status == 404:
        return missing() if one is not None else Unreadable("the store has no such bucket or object")
    if status < 500 and status not in (408, 425, 429):
        return Unreadable(f"the store refused the request with status {status}")
    return unavailable(f"it answered with status {status}")


def missing() -> Unreadable:
    return Unreadable("the store has no such object")


def refused() -> Unreadable:
    error = Unreadable("the store refused the server's credentials")
    # Rights may be granted at any time: with this cause, it is tried again when somebody asks.
    error.__cause__ = PermissionError(errno.EACCES, "refused by the store")
    return error


def unavailable(why: str) -> SourceUnavailable:
    return SourceUnavailable(f"the object store is not available at the moment: {why}", retry_after=2)


def replaced(one: StoredObject) -> RevisionChanged:
    return RevisionChanged(
        f"the object {one.key!r} was replaced in its store: request the dataset again to get its new revision"
    )
