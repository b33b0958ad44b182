"""Addresses of object stores, such as ``s3://bucket/prefix``."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from h5feed.errors import BadParameter

from .suffixes import ALL_SUFFIXES

_EXPECTED = (
    "expected s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or https://HOST/FOLDER/, or one of these "
    "with the name of an HDF5 file at its end"
)

STORES = "stores"
"""Subfolder of the cache folder with a folder for each store."""

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{0,221}")
_HOST = re.compile(r"([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", re.IGNORECASE)


@dataclass(frozen=True)
class Scheme:
    """A kind of store.

    Attributes
    ----------
    endpoint : tuple of str
        Variables with the address of the store, if it is not the usual one; the first that is set counts.
    account : tuple of str
        Variables with the account that the bucket belongs to, if bucket names are unique only within an account.
    credentials : str
        How to set credentials, as a hint in error messages.
    """

    endpoint: tuple[str, ...]
    account: tuple[str, ...]
    credentials: str


_WEB = Scheme((), (), "write them for this host into ~/.netrc, or the file that NETRC names")

SCHEMES = {
    "s3": Scheme(
        ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        (),
        "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    ),
    "gs": Scheme(
        ("GOOGLE_BASE_URL",),
        (),
        "set GOOGLE_APPLICATION_CREDENTIALS to the path of a key file, or GOOGLE_SKIP_SIGNATURE=true for a public "
        "bucket",
    ),
    "az": Scheme(
        ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
        ("AZURE_STORAGE_ACCOUNT_NAME",),
        "set AZURE_STORAGE_ACCOUNT_NAME, and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or "
        "AZURE_SKIP_SIGNATURE=true for a public container",
    ),
    "http": _WEB,
    "https": _WEB,
}


@dataclass(frozen=True)
class StoreAddress:
    """Where objects are.

    Attributes
    ----------
    scheme : str
        A key of `SCHEMES`.
    bucket, prefix : str
        The prefix has no slash at its ends; empty for the whole bucket. Of a web server, the bucket is its host and
        port.
    only : str
        Name of the only object to serve; empty for all objects below the prefix.
    """

    scheme: str
    bucket: str
    prefix: str
    only: str = ""

    @classmethod
    def parse(cls, url: str) -> StoreAddress:
        """The address that a URL gives.

        Raises
        ------
        BadParameter
            It names no bucket or host, or has parts other than these and a prefix.
        """
        parts = urlsplit(url)
        scheme = parts.scheme.lower()
        if scheme not in SCHEMES:
            raise BadParameter(f"{parts.scheme}:// is not the URL of an object store that can be served: {_EXPECTED}")
        if "@" in parts.netloc or (":" in parts.netloc and not cls._is_web(scheme)):
            # Not shown: it may be a secret.
            raise BadParameter(
                f"the URL of an object store must contain no credentials: {SCHEMES[scheme].credentials}. {_EXPECTED}"
            )
        if parts.query or parts.fragment:
            # Not shown either: a signature, perhaps.
            raise BadParameter(f"the URL of an object store must not contain ? or #: {_EXPECTED}")
        named = _HOST if cls._is_web(scheme) else _BUCKET
        if not named.fullmatch(parts.netloc):
            raise BadParameter(f"{url!r} does not name a bucket or host: {_EXPECTED}")
        prefix = parts.path.strip("/")
        bucket = parts.netloc
        if cls._is_web(scheme):
            bucket, prefix = bucket.lower(), unquote(prefix)
        if prefix and any(part in ("", ".", "..") for part in prefix.split("/")):
            raise BadParameter(f"{url!r} has an empty or relative part: {_EXPECTED}")
        if prefix.lower().endswith(ALL_SUFFIXES):
            above, _, name = prefix.rpartition("/")
            return cls(scheme, bucket, above, name)
        return cls(scheme, bucket, prefix)

    @staticmethod
    def _is_web(scheme: str) -> bool:
        return scheme in ("http", "https")

    @property
    def is_web(self) -> bool:
        """Whether it is that of a web server."""
        return self._is_web(self.scheme)

    @property
    def url(self) -> str:
        """That of the prefix."""
        prefix = quote(self.prefix) if self.is_web else self.prefix
        return f"{self.scheme}://{self.bucket}/{prefix}".rstrip("/")

    @property
    def endpoint(self) -> str | None:
        """The address of the store from the environment; None for the usual one."""
        return _first(SCHEMES[self.scheme].endpoint)

    @property
    def lacks_account(self) -> bool:
        """Whether the environment must name an account, and does not."""
        names = SCHEMES[self.scheme].account
        return bool(names) and _first(names) is None

    @property
    def place(self) -> str:
        """A name of the prefix that is unique among all stores: with the endpoint or account of the environment."""
        return " ".join((self.endpoint or _first(SCHEMES[self.scheme].account) or "", self.url))

    @property
    def advice(self) -> str:
        """How to set credentials."""
        return SCHEMES[self.scheme].credentials

    def folder(self, cache: Path) -> Path:
        """The folder for the listing, below the cache folder."""
        named = f"{self.place} {self.only}".encode()
        return cache / STORES / hashlib.blake2b(named, digest_size=12).hexdigest()


def _first(names: tuple[str, ...]) -> str | None:
    return next((value for name in names if (value := os.environ.get(name))), None)
