"""Tokens as text, and what is derived from them.

What is stored of a token is the digest of its *proof*, and the proof is a digest of the token. Cookies hold the proof.
So neither the token file nor a cookie tells the token, and the token file does not tell what a cookie holds.

The digests are fast ones, SHA-256 and HMAC of it. Slow password hashes protect what people think up, which can be
guessed. A token that `new_token` makes has 192 random bits: nobody tries so many, however fast, and a slow hash would
only cost every request. Its id, which is part of it, is the salt: no two digests are of the same text.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets

_SECRET_BYTES = 24
_ID_BYTES = 4
_TOKEN = re.compile(rb"h5feed_([0-9a-f]{8})_[\w-]{32}", re.ASCII)
_CONTEXT = b"h5feed: a cookie of the explorer"


def new_token() -> tuple[str, str]:
    """A random token and its id, which is no secret. Scanners of repositories know it by how it begins."""
    name = secrets.token_hex(_ID_BYTES)
    return f"h5feed_{name}_{secrets.token_urlsafe(_SECRET_BYTES)}", name


def id_of(token: bytes) -> str | None:
    """The id of a token that `new_token` may have made; None for others."""
    match = _TOKEN.fullmatch(token)
    return None if match is None else match[1].decode()


def proof_of(token: bytes) -> str:
    """What a cookie holds in place of the token."""
    return hmac.digest(_CONTEXT, token, "sha256").hex()


def digest_of(proof: str) -> bytes:
    """What is stored of a token."""
    return hashlib.sha256(proof.encode()).digest()
