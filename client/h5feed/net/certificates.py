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

_OTHER_NAME = (62, 64)
_WRONG_TIME = (9, 10)
"""``X509_V_ERR_…`` of OpenSSL: the host or the address differs; not yet valid, expired."""


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
        context = default_context(context)
    files = [os.fspath(file) for file in (cert if isinstance(cert, tuple) else (cert,))]
    shown = ", ".join(files)
    asked = False

    def password() -> str:
        # OpenSSL would ask on the terminal, whatever thread this is.
        nonlocal asked
        asked = True
        return ""

    try:
        context.load_cert_chain(files[0], files[1] if len(files) > 1 else None, password=password)
    except (OSError, ValueError, TypeError) as error:
        if asked:
            raise BadParameter(
                f"cert={shown!r}: the key is encrypted. Decrypt it with `openssl pkey -in KEY -out PLAIN`, or pass as "
                "verify= an ssl.SSLContext that has loaded it with its password"
            ) from None
        raise BadParameter(f"cert={shown!r} is not a PEM file with a certificate and its key: {_why(error)}") from None
    return context


def default_context(verify: bool) -> ssl.SSLContext:
    """The context that trusts what the environment says, or everything.

    Raises
    ------
    BadParameter
        The environment names a file or a folder that cannot be used.
    """
    variable = next((name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)), None)
    if variable == "SSL_CERT_DIR" and verify and not Path(os.environ[variable]).is_dir():
        # OpenSSL would trust nothing, and not say why.
        raise BadParameter(f"{variable}={os.environ[variable]!r} is not a folder")
    try:
        return httpx.create_ssl_context(verify=verify)
    except OSError as error:
        if variable is None:
            raise
        raise BadParameter(
            f"{variable}={os.environ[variable]!r} is not a PEM file of certificates: {_why(error)}"
        ) from None


def distrust(url: str, error: ssl.SSLCertVerificationError) -> str:
    """Why the certificate of a server is not trusted, and what to do."""
    why = error.verify_message.rstrip(".")
    if error.verify_code in _OTHER_NAME:
        return f"the certificate of {url} is for another name: {why}. Connect by a name that is in the certificate"
    if error.verify_code in _WRONG_TIME:
        return f"the certificate of {url} is not valid now: {why}. The server needs another one, if your clock is right"
    return (
        f"the certificate of {url} is not trusted: {why}. Pass the certificate of its authority as verify='ca.pem', or "
        "set SSL_CERT_FILE=ca.pem; a folder of certificates needs `openssl rehash`"
    )


def refusal(url: str, reason: str) -> str | None:
    """What a server says of the client's certificate, by OpenSSL's name of its alert; None for other alerts."""
    _, is_alert, alert = reason.partition("ALERT_")
    if not is_alert:
        return None
    if alert == "CERTIFICATE_REQUIRED":
        return f"{url} requires a client certificate: pass cert="
    if "CERTIFICATE" in alert or alert in ("UNKNOWN_CA", "ACCESS_DENIED"):
        words = alert.replace("_", " ").lower()
        return f"{url} does not accept the client certificate: {words}. Pass another one as cert="
    if alert == "HANDSHAKE_FAILURE":
        return f"{url} refuses the TLS handshake. If it requires a client certificate, pass cert="
    return None


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
