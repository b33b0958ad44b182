"""The token that a client sends: given, or found where the environment says."""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Collection

from ..errors import BadParameter
from ..forks import tell_after_fork

_MAX_BYTES = 8192
"""Of a file with a token."""


class ClientToken:
    """The token that a client sends. One from a file is read again when a server refuses it.

    Parameters
    ----------
    given : str, optional
        See `token_from`, which also says what is raised.
    is_wanted : bool
        False for servers that have no tokens.

    Attributes
    ----------
    text : str
        Empty if there is none.
    """

    def __init__(self, given: str | None, *, is_wanted: bool = True) -> None:
        self.text = token_from(given) if is_wanted else ""
        has_text = (given or os.environ.get("H5FEED_TOKEN") or "").strip()
        self._file = None if has_text or not is_wanted else os.environ.get("H5FEED_TOKEN_FILE")
        self._lock = threading.Lock()
        tell_after_fork(self)

    def is_new(self, refused: Collection[str], authorize: Callable[[str], None]) -> bool:
        """Whether there is a token now that is none of those that were refused: the file is read if need be.

        Parameters
        ----------
        authorize : callable
            Have this token sent from now on.
        """
        with self._lock:
            if self.text in refused and self._file:
                # While somebody writes it, it is not a token, and the one before is as good.
                with contextlib.suppress(BadParameter):
                    text = token_in(self._file, "H5FEED_TOKEN_FILE=")
                    # In this order: who takes `text` for what is sent must not ask for a newer one in vain.
                    authorize(text)
                    self.text = text
            return self.text not in refused

    def after_fork(self) -> None:
        """In the child: a lock held by a thread of the parent would never be released."""
        self._lock = threading.Lock()


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
