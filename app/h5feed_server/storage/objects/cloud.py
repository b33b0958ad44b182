"""Stores that obstore supports: Amazon S3, Google Cloud Storage, Azure, and others with the same APIs."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from h5feed.errors import BadParameter, FeedError, Unreadable
from h5feed.stored.scratch import Bytes

from ...store_address import StoreAddress
from .backend import (
    ATTEMPT_SECONDS,
    CONNECT_SECONDS,
    Cut,
    StoredObject,
    missing,
    of_status,
    refused,
    replaced,
    unavailable,
)
from .content_note import KEY

if TYPE_CHECKING:
    from obstore.store import ObjectStore as AnyStore
    from obstore.store import RetryConfig

_STATUS = re.compile(r"status code: (\d{3})")

_MOST_SAID = 500
"""Characters of a message of the library."""

_METADATA_SERVICES = ("169.254.169.254", "metadata.google.internal")
"""Where cloud machines get credentials: asked if the environment has none."""


class CloudStore:
    """The objects below a prefix of a bucket. Credentials come from the environment.

    Parameters
    ----------
    address : StoreAddress

    Raises
    ------
    BadParameter
        obstore is not installed, or cannot use what the environment says.
    """

    def __init__(self, address: StoreAddress) -> None:
        self._address = address
        self._store = opened(address)

    async def head(self, key: str) -> StoredObject:
        """See `Backend`."""
        return _stored(await self._store.head_async(key))

    async def pages(self) -> AsyncIterator[list[StoredObject]]:
        """See `Backend`."""
        pages: AsyncIterator[Any] = self._store.list()
        async for page in pages:
            yield [_stored(meta) for meta in page]

    async def fetch(self, one: StoredObject, offset: int, nbytes: int) -> Bytes:
        """See `Backend`."""
        # The version is asked for and checked: some stores ignore the condition.
        wanted: Any = {"range": (offset, offset + nbytes), "if_match": one.e_tag}
        answer = await self._store.get_async(one.key, options=wanted)
        found = StoredObject.of(one.key, int(answer.meta["size"]), answer.meta["e_tag"])
        if (found.size, found.e_tag) != (one.size, one.e_tag):
            raise replaced(one)
        data = await answer.bytes_async()
        # The library returns what came until the end of the object or the connection.
        if len(data) != nbytes:
            raise Cut
        return np.frombuffer(data, np.uint8)

    async def note(self, one: StoredObject) -> str:
        """See `Backend`."""
        answer = await self._store.get_async(one.key, options={"head": True})
        if _stored({**answer.meta, "path": one.key}) != one:
            raise replaced(one)
        return str(answer.attributes.get(KEY, ""))

    def problem(self, error: Exception, one: StoredObject | None) -> FeedError:
        """See `Backend`. The library describes most errors only in their messages."""
        from obstore import exceptions

        if isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError)):
            return refused()
        if isinstance(error, (FileNotFoundError, exceptions.NotFoundError)):
            return missing()
        if one is not None and isinstance(error, exceptions.PreconditionError):
            return replaced(one)
        said = str(error)
        if isinstance(error, exceptions.InvalidPathError):
            # A whole page of the listing is lost with it.
            why = " ".join(said.partition("Debug source")[0].split())[:_MOST_SAID]
            return Unreadable(
                f"the name of an object cannot be used: {why}: rename or delete it, or serve another prefix"
            )
        if any(service in said for service in _METADATA_SERVICES):
            return Unreadable(f"the server has no credentials for the store: {self._address.advice}")
        match = _STATUS.search(said)
        return of_status(int(match[1]), one) if match else unavailable("it cannot be reached")

    async def close(self) -> None:
        """See `Backend`. The library closes its connections itself."""


def opened(address: StoreAddress, seconds: float = ATTEMPT_SECONDS, retries: RetryConfig | None = None) -> AnyStore:
    """The library's store.

    Parameters
    ----------
    seconds : float
        Timeout of one request.
    retries : RetryConfig, optional
        Default: none. Attempts to read are repeated by the caller, because the library does not know the deadline.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import AzureStore, GCSStore, S3Store
    except ImportError:
        raise BadParameter("object stores need obstore: pip install 'h5feed-server[object-store]'") from None
    if address.lacks_account:
        raise BadParameter(f"{address.url}: the account is not known: {address.advice}")
    kind: Any
    kind, name = {
        "s3": (S3Store, "endpoint"),
        "gs": (GCSStore, "base_url"),
        "az": (AzureStore, "endpoint"),
    }[address.scheme]
    options: dict[str, Any] = {
        "timeout": timedelta(seconds=seconds),
        "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
    }
    config = {}
    if (endpoint := address.endpoint) is not None:
        config[name] = endpoint
        # Whoever sets such an address wants it.
        options["allow_http"] = endpoint.startswith("http://")
    try:
        return kind(  # type: ignore[no-any-return]
            address.bucket,
            prefix=address.prefix or None,
            config=config,
            client_options=options,
            retry_config=retries or {"max_retries": 0},
        )
    except (BaseError, ValueError) as error:
        why = str(error).splitlines()[0][:200]
        raise BadParameter(f"{address.url}: {why}: {address.advice}") from None


def _stored(meta: Any) -> StoredObject:
    return StoredObject.of(str(meta["path"]), int(meta["size"]), meta["e_tag"])
