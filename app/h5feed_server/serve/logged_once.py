"""Logs a message once, even if several workers report it."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import threading
import time

_DIGEST_BYTES = 16
_MAX_MESSAGES = 10_000
"""Those after them are logged by every worker."""

_PATIENCE_SECONDS = 1.0
"""For a worker that hangs while it looks whether another has logged the same."""


class LoggedOnce(logging.Filter):
    """Logging filter that passes each message once, across all processes forked after its creation.

    Parameters
    ----------
    name : str
        Of the logger that this is about, with all below it; messages of others always pass.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._told = os.memfd_create("h5feed-told")
        # Locks on a file hold between processes only.
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if not super().filter(record):
            return True
        message = record.getMessage().encode("utf-8", "backslashreplace")
        digest = hashlib.blake2b(message, digest_size=_DIGEST_BYTES).digest()
        with self._lock:
            if not self._locked():
                return True
            try:
                told = os.pread(self._told, _DIGEST_BYTES * _MAX_MESSAGES, 0)
                if digest in (told[at : at + _DIGEST_BYTES] for at in range(0, len(told), _DIGEST_BYTES)):
                    return False
                os.pwrite(self._told, digest, len(told))
                return True
            finally:
                fcntl.lockf(self._told, fcntl.LOCK_UN)

    def _locked(self) -> bool:
        """Whether no other process looks now."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            try:
                fcntl.lockf(self._told, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except OSError:
                if time.monotonic() >= deadline:
                    return False
                time.sleep(0.001)
