"""The token that the server creates if other machines can reach it and no tokens are set."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
import tempfile
from pathlib import Path

_TOKEN_BYTES = 24
_TOKEN = re.compile(r"[\w-]{32}", re.ASCII)
"""Format of the generated token."""


def stored_token(cache_dir: Path) -> str | None:
    """The generated token, if there is one in the cache folder."""
    file = _file(cache_dir)
    # Anything else was left by a crash, or belongs to somebody else. Reading something other than a file may block.
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if file.is_file() and _TOKEN.fullmatch(kept := file.read_text("ascii").strip()):
            return kept
    return None


def kept_token(cache_dir: Path) -> tuple[str, bool]:
    """The generated token, and whether it is stored; it stays the same across restarts."""
    kept = stored_token(cache_dir)
    if kept is not None:
        return kept, True
    file = _file(cache_dir)
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        # Write atomically: an empty token would let everybody in. `mkstemp` files are readable only by the owner.
        descriptor, unfinished = tempfile.mkstemp(dir=cache_dir, prefix=".token-")
        with open(descriptor, "w") as stream:
            stream.write(token)
            stream.flush()
            os.fsync(stream.fileno())
        if os.path.lexists(file):
            os.replace(file, aside := cache_dir / "token.old")
            print(
                f"h5feed-server: {file} did not contain a valid token; it was renamed to {aside.name}", file=sys.stderr
            )
        os.replace(unfinished, file)
    except OSError as error:
        print(f"h5feed-server: the token cannot be saved: {error.strerror}", file=sys.stderr)
        return token, False
    return token, True


def _file(cache_dir: Path) -> Path:
    return cache_dir / "token"
