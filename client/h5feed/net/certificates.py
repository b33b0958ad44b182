"""TLS contexts from what users pass as ``verify=`` and ``cert=``."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from ..errors import BadParameter
from .http import httpx

Verify = ssl.SSLContext | bool | str | os.PathLike[str]
"""A context, whether to verify, or a PEM file (or folder) of certificates to trust."""

Cert = str | os.PathLike[str] | tuple[str | os.PathLike[str], str | os.PathLike[str]]
"""PEM file with a certificate and its key, or one file for each."""


def context_of(verify: Verify, cert: Cert | None) -> ssl.SSLContext | bool:
    """The context to connect with, or `verify` itself if it is no path and there is no certificate.

    Raises
    ------
    BadParameter
        A file cannot be read, or is not what it should be.
    """
    context = _trusting(verify) if isinstance(verify, (str, os.PathLike)) else verify
    if cert is None:
        return context
    if not isinstance(context, ssl.SSLContext):
        context = httpx.create_ssl_context(verify=context)
    files = [os.fspath(file) for file in (cert if isinstance(cert, tuple) else (cert,))]
    try:
        # A password is asked for by no thread.
        context.load_cert_chain(files[0], files[1] if len(files) > 1 else None, password="")
    except (OSError, ValueError, TypeError) as error:
        shown = ", ".join(files)
        raise BadParameter(f"cert={shown!r} is not a PEM file with a certificate and its key: {_why(error)}") from None
    return context


def _trusting(path: str | os.PathLike[str]) -> ssl.SSLContext:
    try:
        if Path(path).is_dir():
            return ssl.create_default_context(capath=os.fspath(path))
        return ssl.create_default_context(cafile=os.fspath(path))
    except OSError as error:
        raise BadParameter(f"verify={str(path)!r} is not a PEM file of certificates: {_why(error)}") from None


def _why(error: Exception) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or str(error)
    return getattr(error, "strerror", None) or str(error)
