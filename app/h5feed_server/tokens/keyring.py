"""The tokens that give access to a server: those in the settings, and those in the token file."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..sharing.file_watch import FileWatch
from ..sharing.shared_bytes import SharedBytes
from .scope import EVERYTHING, DatasetScope
from .secrets import digest_of, id_of, proof_of
from .token_file import TokenFileError, TokenRecord, parse, read

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Token:
    """What the server knows about a token.

    Attributes
    ----------
    name : str
        Name for logs and pages; not secret.
    id : str
        Identifies the token; not secret.
    """

    name: str
    id: str
    digest: bytes
    expires: datetime | None = None
    scope: DatasetScope = EVERYTHING

    def has_expired(self) -> bool:
        return self.expires is not None and datetime.now(UTC) >= self.expires

    @classmethod
    def of_plain(cls, number: int, token: str) -> Token:
        """A token from the settings, named after its position."""
        digest = digest_of(proof_of(token.encode()))
        return cls(f"token {number}", digest.hex()[:8], digest)

    @classmethod
    def of_record(cls, record: TokenRecord) -> Token:
        """A token from the token file."""
        scope = EVERYTHING if record.datasets is None else DatasetScope(record.datasets)
        return cls(record.name, record.id, record.digest, record.expires, scope)


class Keyring:
    """Finds the token that a request has sent.

    Create it before the workers are forked: it keeps the last valid content of the token file, for workers that start
    while the file is invalid.

    Parameters
    ----------
    plain : sequence of str
        Tokens of the settings.
    file : Path, optional
        The token file; see `token_file`.

    Raises
    ------
    TokenFileError
        The file cannot be used.
    """

    def __init__(self, plain: Sequence[str], file: Path | None = None) -> None:
        self._plain = tuple(Token.of_plain(number, token) for number, token in enumerate(plain, 1))
        self._file = file
        self._of_file: tuple[Token, ...] = ()
        self._by_id: dict[str, Token] = {}
        self._good, self._trouble = SharedBytes("h5feed-tokens"), SharedBytes("h5feed-tokens-trouble")
        content = b"" if file is None else read(file)
        self._use(content)
        self._good.replace(content)

    @property
    def is_guarding(self) -> bool:
        """Whether requests need a token. With an empty token file, nobody can connect."""
        return bool(self._plain) or self._file is not None

    @property
    def tokens(self) -> tuple[Token, ...]:
        return self._plain + self._of_file

    def watch(self) -> FileWatch | None:
        """Start to watch the token file for changes; the caller closes the result."""
        if self._file is None:
            return None
        watch = FileWatch([self._file], self.refresh)
        self.refresh()
        watch.begin("h5feed-tokens")
        return watch

    def refresh(self) -> None:
        """Read the token file. If it is invalid, keep the previous tokens, and log the reason once."""
        file = self._file
        if file is None:
            return
        # Hold the lock, so that no worker overwrites the content that another has read later.
        with self._good.locked():
            told = self._trouble.read()
            try:
                content = read(file)
                self._use(content)
                self._good.replace(content)
                trouble = ""
            except TokenFileError as error:
                trouble = error.detail
                self._use(self._good.read())
            self._trouble.replace(trouble.encode())
        if trouble and trouble.encode() != told:
            logger.error("token file %s: %s; the previous tokens stay valid", file, trouble)
        elif told and not trouble:
            logger.warning("token file %s: it is valid again", file)

    def by_token(self, token: bytes) -> Token | None:
        """The token with this text, whether it has expired or not."""
        own = self._by_id.get(id_of(token) or "")
        return _match(proof_of(token), self._plain if own is None else (own, *self._plain))

    def by_cookie(self, name: str, proof: str) -> Token | None:
        """The token for which a cookie was set, by its id and its proof."""
        own = self._by_id.get(name)
        return None if own is None else _match(proof, (own,))

    def _use(self, content: bytes) -> None:
        records = [line.record for line in parse(content) if line.record is not None]
        self._of_file = tuple(map(Token.of_record, records))
        self._by_id = {token.id: token for token in (*self._plain, *self._of_file)}


def _match(proof: str, tokens: Sequence[Token]) -> Token | None:
    """The token with this proof. All tokens are compared in constant time, so that the duration reveals nothing."""
    digest = digest_of(proof)
    matches = [token for token in tokens if hmac.compare_digest(digest, token.digest)]
    return matches[0] if matches else None
