"""The token file: a JSON object on each line, and comments that begin with ``#``.

    {"name": "alice", "id": "1f0c9a3e", "hash": "sha256:…", "created": "2026-03-01T09:00:00Z", "datasets": ["mnist*"]}

Each token has its own line, so that errors have a line number, and tools that merge lines merge tokens.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from h5feed.errors import FeedError
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from ..cache_folder.locks import hold

MAX_BYTES = 1 << 20
"""Maximum size of a token file."""

_LOCK_SECONDS = 30.0
"""How long a writer waits for another writer."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class TokenFileError(FeedError):
    """The token file cannot be used. The message gives the reason and the line, but no hash."""


def _checked_name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError("use up to 64 letters, digits and . _ @ -, and begin with a letter or a digit")
    return name


def _checked_moment(moment: datetime) -> datetime:
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError("this is not between the years 1 and 9999 in UTC") from None


def _checked_pattern(pattern: str) -> str:
    if not pattern.strip():
        raise ValueError("a pattern is empty")
    return pattern


Moment = Annotated[AwareDatetime, AfterValidator(_checked_moment)]
"""In UTC, as it is shown and written."""


class TokenRecord(BaseModel):
    """A token as stored in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(_checked_name)]
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    hash: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    created: Moment | None = None
    expires: Moment | None = None
    datasets: Annotated[tuple[Annotated[str, AfterValidator(_checked_pattern)], ...], Field(min_length=1)] | None = None
    """Patterns of names; None: all datasets."""

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.hash.partition(":")[2])

    def has_expired(self, now: datetime) -> bool:
        return self.expires is not None and now >= self.expires


@dataclass(frozen=True)
class TokenLine:
    """A line of the file; `record` is None for comments and empty lines."""

    text: str
    record: TokenRecord | None


def parse(content: bytes) -> list[TokenLine]:
    """The lines of a token file.

    Raises
    ------
    TokenFileError
    """
    lines = []
    names: dict[str, int] = {}
    for number, raw in enumerate(content.split(b"\n"), 1):
        try:
            text = raw.decode("utf-8").rstrip("\r")
            record = None if not text.strip() or text.lstrip().startswith("#") else _record(text)
        except UnicodeDecodeError:
            raise TokenFileError(f"line {number}: it is not UTF-8") from None
        except ValueError as error:
            raise TokenFileError(f"line {number}: {error}") from None
        if record is not None:
            for key in (f"name {record.name!r}", f"id {record.id!r}"):
                if names.setdefault(key, number) != number:
                    raise TokenFileError(f"line {number}: line {names[key]} has the {key}, too")
        lines.append(TokenLine(text, record))
    # Text after the last newline is not a line if it is empty.
    return lines if lines[-1].text else lines[:-1]


def _record(text: str) -> TokenRecord:
    """One line.

    Raises
    ------
    ValueError
        The message goes to the log, so it contains no value of the line, which may be a secret.
    """
    try:
        found = json.loads(text, object_pairs_hook=_unambiguous)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"not a JSON object ({error.msg} at column {error.colno}): `h5feed-server token create` writes these lines"
        ) from None
    except RecursionError:
        raise ValueError("not a JSON object of a token") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object: expected {…} with the keys name, id and hash")
    try:
        return TokenRecord.model_validate(found)
    except ValidationError as error:
        item = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            raise ValueError(
                f"unknown key {where[:40]!r}: the keys are {', '.join(TokenRecord.model_fields)}"
            ) from None
        raise ValueError(f"{where}: {item['msg'].removeprefix('Value error, ')}") from None


def _unambiguous(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Of two limits, nobody knows which one is meant.

    Raises
    ------
    ValueError
    """
    names = [name for name, _ in items]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"the key {twice[:40]!r} is there twice")
    return dict(items)


def read(path: Path) -> bytes:
    """The content of a token file.

    Raises
    ------
    TokenFileError
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise TokenFileError(f"cannot be read: {error.strerror}") from None
    try:
        return _content(descriptor)
    finally:
        os.close(descriptor)


def _content(descriptor: int) -> bytes:
    """All bytes of an open file.

    Raises
    ------
    TokenFileError
    """
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise TokenFileError("cannot be read: it is not a regular file")
    if status.st_size > MAX_BYTES:
        raise TokenFileError(f"cannot be read: it has {status.st_size} bytes, more than the limit of {MAX_BYTES}")
    try:
        return os.pread(descriptor, MAX_BYTES, 0)
    except OSError as error:
        raise TokenFileError(f"cannot be read: {error.strerror}") from None


class TokenFileEditor:
    """The lines of a token file while no other writer can change them; see `editing`."""

    def __init__(self, lines: list[TokenLine]) -> None:
        self.lines = lines

    @property
    def records(self) -> list[TokenRecord]:
        return [line.record for line in self.lines if line.record is not None]

    def add(self, record: TokenRecord) -> None:
        """Append a line."""
        self.lines.append(TokenLine(as_line(record), record))

    def remove(self, record: TokenRecord) -> None:
        """Remove a line."""
        self.lines = [line for line in self.lines if line.record is not record]


def as_line(record: TokenRecord) -> str:
    """A record as a line of the file."""
    content: dict[str, Any] = record.model_dump(mode="json", exclude_none=True)
    return json.dumps(content, ensure_ascii=False)


@contextlib.contextmanager
def editing(path: Path) -> Iterator[TokenFileEditor]:
    """Change a token file. At the end, the lines of the editor replace it atomically.

    A file that does not exist is created, readable only by its owner.

    Raises
    ------
    TokenFileError
        It cannot be read or written, or another writer does not finish.
    """
    # Replace the target of a symbolic link, not the link.
    path = Path(os.path.realpath(path))
    try:
        descriptor = _locked(path)
    except OSError as error:
        raise TokenFileError(f"cannot be opened for writing: {error.strerror}") from None
    try:
        editor = TokenFileEditor(parse(_content(descriptor)))
        before = list(editor.lines)
        yield editor
        if editor.lines != before:
            _replace(path, "".join(f"{line.text}\n" for line in editor.lines).encode(), os.fstat(descriptor))
    finally:
        os.close(descriptor)


def _locked(path: Path) -> int:
    """Descriptor of the file that is at the path now, locked.

    Raises
    ------
    OSError, TokenFileError
    """
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        descriptor = hold(path)
        if descriptor is not None:
            return descriptor
        if time.monotonic() >= deadline:
            raise TokenFileError(f"another process has been changing it for {_LOCK_SECONDS:g} s: try again")
        time.sleep(0.01)


def _replace(path: Path, content: bytes, before: os.stat_result) -> None:
    """Replace the file atomically, and keep owner and mode, because a server of another user may read it.

    Raises
    ------
    TokenFileError
    """
    if len(content) > MAX_BYTES:
        # No server would read it, and no command.
        raise TokenFileError(f"cannot be written: it would have more than {MAX_BYTES} bytes")
    unfinished = None
    try:
        # `mkstemp` files are readable only by the owner.
        descriptor, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(file.fileno(), before.st_uid, before.st_gid)
            os.fchmod(file.fileno(), stat.S_IMODE(before.st_mode))
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if unfinished is not None:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
        raise TokenFileError(f"cannot be written: {error.strerror}") from None


def now() -> datetime:
    """The time, in whole seconds."""
    return datetime.now(UTC).replace(microsecond=0)
