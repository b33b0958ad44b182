"""Addresses of object stores, such as ``s3://bucket/prefix``."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from h5feed.errors import BadParameter

from .suffixes import ALL_SUFFIXES

SCHEME = "s3"

_EXPECTED = f"expected {SCHEME}://BUCKET/PREFIX or {SCHEME}://BUCKET/NAME.h5"

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class StoreAddress:
    """Where objects are.

    Attributes
    ----------
    bucket, prefix : str
        The prefix has no slash at its ends; empty for the whole bucket.
    only : str
        Name of the only object below the prefix; empty for all of them.
    """

    bucket: str
    prefix: str
    only: str = ""

    @classmethod
    def parse(cls, url: str) -> StoreAddress:
        """The address that a URL gives.

        Raises
        ------
        BadParameter
            It does not name a bucket, or more than that and a prefix.
        """
        parts = urlsplit(url)
        if parts.scheme != SCHEME:
            raise BadParameter(f"{parts.scheme}:// is not the URL of an object store that can be served: {_EXPECTED}")
        if "@" in parts.netloc:
            # Not shown: it may be a secret.
            raise BadParameter(
                f"the URL of an object store has no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and "
                f"pass {SCHEME}://BUCKET/PREFIX"
            )
        prefix = parts.path.strip("/")
        if parts.query or parts.fragment or not _NAME.fullmatch(parts.netloc):
            raise BadParameter(f"{url!r} does not name a bucket: {_EXPECTED}")
        if prefix and any(part in ("", ".", "..") for part in prefix.split("/")):
            raise BadParameter(f"{url!r} has an empty or relative part: {_EXPECTED}")
        if prefix.lower().endswith(ALL_SUFFIXES):
            above, _, name = prefix.rpartition("/")
            return cls(parts.netloc, above, name)
        return cls(parts.netloc, prefix)

    @property
    def url(self) -> str:
        """That of the prefix."""
        return f"{SCHEME}://{self.bucket}/{self.prefix}".rstrip("/")

    def folder(self, cache: Path) -> Path:
        """The folder for the listing, below the cache folder."""
        named = f"{self.url} {self.only}".encode()
        return cache / "stores" / hashlib.blake2b(named, digest_size=12).hexdigest()
