"""Tokens as text, and what is derived from them.

The *proof* of a token is a digest of the token. Cookies contain the proof, and the token file contains a digest of the
proof. So neither the token file nor a cookie reveals the token, and the token file does not reveal a cookie.

The digests are fast: SHA-256, and HMAC with it. Slow password hashes protect passwords, which can be guessed. A token
from `new_token` has 192 random bits, which nobody can try out, and a slow hash would only delay every request. The id,
which is part of the token, serves as salt.
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
    """A random token and its id, which is not secret. The prefix lets secret scanners recognise tokens."""
    name = secrets.token_hex(_ID_BYTES)
    return f"h5feed_{name}_{secrets.token_urlsafe(_SECRET_BYTES)}", name


def id_of(token: bytes) -> str | None:
    """The id of a token in the format of `new_token`; None for other tokens."""
    match = _TOKEN.fullmatch(token)
    return None if match is None else match[1].decode()


def proof_of(token: bytes) -> str:
    """The value of a cookie for this token."""
    return hmac.digest(_CONTEXT, token, "sha256").hex()


def digest_of(proof: str) -> bytes:
    """The digest that is stored in the token file."""
    return hashlib.sha256(proof.encode()).digest()
