"""The token that a client sends: given, or found where the environment says."""

from __future__ import annotations

import os
import stat

from ..errors import BadParameter

_MAX_BYTES = 8192
"""Of a file with a token."""


def token_from(given: str | None) -> str:
    """`given`, else ``$H5FEED_TOKEN``, else the content of the file ``$H5FEED_TOKEN_FILE``; empty if there is none.

    Raises
    ------
    BadParameter
        It cannot be sent, or the file cannot be used. The message does not contain the token.
    """
    token = (given or os.environ.get("H5FEED_TOKEN") or "").strip()
    if not token and (path := os.environ.get("H5FEED_TOKEN_FILE")):
        return token_in(path, "H5FEED_TOKEN_FILE=")
    if (odd := next((char for char in token if not " " <= char <= "~"), None)) is not None:
        raise BadParameter(f"token must contain only printable ASCII characters, but contains {odd!r}")
    return token


def token_in(path: str, setting: str) -> str:
    """The token in a file that contains nothing else.

    Parameters
    ----------
    setting : str
        What the path was given as, for messages.

    Raises
    ------
    BadParameter
    """
    try:
        # Opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            content = os.read(descriptor, _MAX_BYTES + 1) if stat.S_ISREG(os.fstat(descriptor).st_mode) else None
        finally:
            os.close(descriptor)
    except OSError as error:
        raise BadParameter(f"{setting}{path}: {error.strerror}") from None
    if content is None:
        raise BadParameter(f"{setting}{path}: it is not a regular file")
    token = content.strip()
    if token.startswith((b"{", b"#")):
        raise BadParameter(
            f"{setting}{path}: this is the token file of a server, which has no tokens in it. A client needs a file "
            "that contains its token, as `h5feed-server token create` prints it"
        )
    if not token or len(content) > _MAX_BYTES or not all(0x21 <= byte <= 0x7E for byte in token):
        raise BadParameter(f"{setting}{path}: expected a file that contains one token and nothing else")
    return token.decode("ascii")
