"""Logs a message once, even if several workers report it."""

from __future__ import annotations

import hashlib
import logging

from ..sharing.shared_bytes import SharedBytes

_DIGEST_BYTES = 16
_MAX_MESSAGES = 10_000
"""Maximum number of messages that are remembered. Every worker logs further ones."""


class LoggedOnce(logging.Filter):
    """Logging filter that passes each message once, across all processes forked after its creation.

    Parameters
    ----------
    name : str
        Name of the logger to which it applies, including its children. Messages of other loggers always pass.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._told = SharedBytes("h5feed-told")

    def filter(self, record: logging.LogRecord) -> bool:
        if not super().filter(record):
            return True
        message = record.getMessage().encode("utf-8", "backslashreplace")
        digest = hashlib.blake2b(message, digest_size=_DIGEST_BYTES).digest()
        with self._told.locked() as held:
            if not held:
                return True
            told = self._told.read()
            if digest in (told[at : at + _DIGEST_BYTES] for at in range(0, len(told), _DIGEST_BYTES)):
                return False
            if len(told) < _DIGEST_BYTES * _MAX_MESSAGES:
                self._told.append(digest)
            return True
