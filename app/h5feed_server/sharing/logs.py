"""The format of the log: text, or one JSON object per line. Every line about a request has its id."""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Literal, TextIO

from .request_id import REQUEST_ID

LogFormat = Literal["pretty", "json"]

FIELDS = "h5feed_fields"
"""Attribute of log records: further fields for JSON, a dict."""


_MAX_LINES = 2000
"""Maximum number of lines that wait to be written."""

_LAST_SECONDS = 1.0
"""How long a process that exits waits until its last lines are written."""


class Pretty(logging.Formatter):
    """``WARNING module [request id]: message``."""

    def __init__(self) -> None:
        super().__init__("%(levelname)s %(name)s%(h5feed_request)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        request_id = REQUEST_ID.get()
        record.h5feed_request = f" [{request_id}]" if request_id else ""
        return super().formatMessage(record)


class JsonLines(logging.Formatter):
    """One JSON object per record: ``time`` (RFC 3339), ``level``, ``logger``, ``message``, and ``request_id`` and
    ``exception`` if there is one.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = dict(getattr(record, FIELDS, {}))
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return _line(record.created, record.levelname, record.name, record.getMessage(), fields)


def _line(moment: float, level: str, name: str, message: str, fields: Mapping[str, Any]) -> str:
    at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(moment))
    said = {"time": f"{at}.{int(moment % 1 * 1000):03d}Z", "level": level, "logger": name, "message": message}
    if request_id := REQUEST_ID.get():
        said["request_id"] = request_id
    # Escape everything outside ASCII: a file name may contain anything, such as half of a surrogate pair.
    return json.dumps({**said, **fields}, ensure_ascii=True, default=str)


class BackgroundHandler(logging.Handler):
    """Writes lines from a thread, so that requests never wait for the reader of the log.

    If the log is not read, lines are dropped. As soon as it is read again, a line says how many.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(_MAX_LINES)
        self._dropped = 0
        self._thread = threading.Thread(target=self._run, name="h5feed-log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # Format the line here, because the thread does not know the id of the request.
            self._lines.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def close(self) -> None:
        """Write the remaining lines, unless this takes too long."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
            self._thread.join(_LAST_SECONDS)
        super().close()

    def _run(self) -> None:
        while (line := self._lines.get()) is not None:
            lines = [line]
            if self._dropped:
                dropped, self._dropped = self._dropped, 0
                record = logging.LogRecord(
                    "h5feed.access",
                    logging.WARNING,
                    "",
                    0,
                    "%d lines were dropped, because standard output was not read",
                    (dropped,),
                    None,
                )
                lines.insert(0, self.format(record))
            try:
                self._stream.write("".join(f"{one}\n" for one in lines))
                self._stream.flush()
            except (OSError, ValueError):
                # The pipe or standard output was closed.
                continue


def begin_logs(form: LogFormat) -> None:
    """Format all lines of this process, and of processes that it forks, like this."""
    formatter = Pretty() if form == "pretty" else JsonLines()
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
    # By default, Python prints warnings itself, in two lines.
    logging.captureWarnings(form == "json")


def say(form: LogFormat, text: str, stream: TextIO | None = None, *, prefix: str = "", level: str = "INFO") -> None:
    """Print a line that is not a log record, such as the address of the server, to `stream` (default: standard output).

    Errors are ignored, because the stream may be a closed terminal.

    Parameters
    ----------
    prefix : str
        Text before the line, except in JSON.
    """
    line = prefix + text if form == "pretty" else _line(time.time(), level, "h5feed_server", text, {})
    with contextlib.suppress(OSError):
        print(line, file=stream or sys.stdout, flush=True)
