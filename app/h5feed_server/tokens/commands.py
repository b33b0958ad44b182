"""The commands ``h5feed-server token create``, ``list``, ``revoke`` and ``show``."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from h5feed.errors import BadParameter
from h5feed.suggestions import did_you_mean
from pydantic import ValidationError

from ..settings import Settings, explain
from .generated import stored_token
from .secrets import digest_of, new_token, proof_of
from .token_file import TokenFileError, TokenRecord, editing, now, parse, read

_SPAN = re.compile(r"([0-9]{1,6})([smhdw])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def run_token(options: argparse.Namespace) -> int:
    """Run the command; returns its exit code.

    Raises
    ------
    FeedError
    """
    flags = {name: getattr(options, name, None) for name in ("token_file", "cache_dir")}
    try:
        settings = Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        explain(error, flags)
        return 2
    return _run(options, settings.token_file, settings.cache_dir)


def _run(options: argparse.Namespace, token_file: Path | None, cache_dir: Path) -> int:
    if options.action == "show":
        return _show(cache_dir)
    if token_file is None:
        print("h5feed-server: no token file is set: pass --token-file FILE or set H5FEED_TOKEN_FILE", file=sys.stderr)
        return 2
    try:
        if options.action == "create":
            return _create(token_file, options.name, options.datasets, options.expires)
        return _list(token_file) if options.action == "list" else _revoke(token_file, options.name)
    except TokenFileError as error:
        raise TokenFileError(f"token file {token_file}: {error.detail}") from None


def _create(file: Path, name: str, datasets: Sequence[str] | None, expires: str | None) -> int:
    token, name_of_it = new_token()
    created = now()
    until = None if expires is None else moment_of(expires, created)
    try:
        record = TokenRecord(
            name=name,
            id=name_of_it,
            hash=f"sha256:{digest_of(proof_of(token.encode())).hex()}",
            created=created,
            expires=until,
            datasets=None if datasets is None else tuple(datasets),
        )
    except ValidationError as error:
        item = error.errors(include_url=False)[0]
        where = "NAME" if item["loc"][0] == "name" else f"--{item['loc'][0]}"
        raise BadParameter(f"{where} {item['input']!r}: {item['msg'].removeprefix('Value error, ')}") from None
    with editing(file) as editor:
        if any(other.name == name for other in editor.records):
            raise BadParameter(f"a token named {name!r} already exists: choose another name, or revoke it first")
        editor.add(record)
    for pattern in datasets or ():
        if "/" in pattern:
            _note(f"--datasets {pattern}: names of datasets contain dots instead of slashes, so this may match nothing")
    print(token)
    _note(f"created token {name!r} ({_what(record)}) in {file}")
    _note("it is not shown again; pass it to clients in H5FEED_TOKEN, or in a file that H5FEED_TOKEN_FILE names")
    return 0


def _list(file: Path) -> int:
    records = [line.record for line in parse(read(file)) if line.record is not None]
    if not records:
        _note(f"{file} has no tokens: create one with `h5feed-server token create NAME`")
        return 0
    lines = [("NAME", "ID", "CREATED", "EXPIRES", "DATASETS")]
    for one in records:
        created = "" if one.created is None else _day(one.created)
        expires = "never" if one.expires is None else _day(one.expires)
        if one.has_expired(datetime.now(UTC)):
            expires = f"expired {expires}"
        lines.append((one.name, one.id, created, expires, "all" if one.datasets is None else " ".join(one.datasets)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    return 0


def _revoke(file: Path, name: str) -> int:
    if not file.exists():
        raise TokenFileError("does not exist")
    with editing(file) as editor:
        record = next((one for one in editor.records if one.name == name), None)
        if record is None:
            raise BadParameter(
                f"there is no token {name!r}: {did_you_mean(name, [one.name for one in editor.records])}"
            )
        editor.remove(record)
    _note(f"revoked token {name!r}; servers that use {file} reject it within two seconds")
    return 0


def _show(cache_dir: Path) -> int:
    token = stored_token(cache_dir)
    if token is None:
        _note(
            f"there is no token in {cache_dir}: the server creates one if it serves other machines and no tokens are "
            "set. If it uses another cache folder, pass --cache-dir"
        )
        return 1
    print(token)
    return 0


def moment_of(text: str, since: datetime) -> datetime:
    """When a token expires: a time span after `since`, or the end of a day, in UTC.

    Raises
    ------
    BadParameter
    """
    span = _SPAN.fullmatch(text.strip())
    try:
        if span is not None:
            found = since + timedelta(**{_UNITS[span[2]]: int(span[1])})
        else:
            found = datetime.strptime(text.strip(), "%Y-%m-%d").replace(tzinfo=UTC) + timedelta(days=1)
    except (ValueError, OverflowError):
        raise BadParameter(
            f"--expires {text}: expected a time span such as 12h, 30d or 8w, or a date such as 2027-01-31"
        ) from None
    if found <= since:
        raise BadParameter(f"--expires {text}: this is in the past")
    return found


def _what(record: TokenRecord) -> str:
    opens = "all datasets" if record.datasets is None else f"datasets {' '.join(record.datasets)}"
    return opens if record.expires is None else f"{opens}, until {_day(record.expires)}"


def _day(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def _note(text: str) -> None:
    """Print to standard error: standard output contains nothing but the token."""
    print(f"h5feed-server: {text}", file=sys.stderr)
