"""Recent activity of a server's workers: small counters, written to files once a second while they change.

Counting takes a microsecond per request. A stream of many batches is one request.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 60
"""Number of seconds for which activity is kept."""

_WRITE_SECONDS = 1.0
_MOST_CALLERS = 64
_MOST_SLOW = 10
_SLOW_SECONDS = 600.0
"""How long slow requests are remembered."""

_MOST_CHARS = 200
"""Maximum length of the remembered request."""

_KEPT_SECONDS = 24 * 3600.0


@dataclass
class _Second:
    """Counts of one second."""

    second: int = 0
    requests: int = 0
    batches: int = 0
    nbytes: int = 0
    errors: int = 0


@dataclass
class Activity:
    """The recent activity of all workers of a server.

    Attributes
    ----------
    seconds : list of dict
        Requests, batches, bytes and errors of each of the last `SECONDS` whole seconds, the oldest first.
    slowest : list of dict
        The slowest requests of the last ten minutes: ``seconds``, ``ago``, ``what``.
    callers : list of dict
        Callers that requested batches within the last minute: ``name``, ``batches``, ``bytes``, and ``waited``, the
        share of about the last minute that their training loops waited for batches, None if they did not report it.
    totals : dict
        Totals since the start of the workers. ``decoded`` is the size of chunks that had to be decoded.
    """

    workers: int = 0
    seconds: list[dict[str, int]] = field(default_factory=list)
    slowest: list[dict[str, Any]] = field(default_factory=list)
    callers: list[dict[str, Any]] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)


class Traffic:
    """Counts the responses of this worker, and reads the counts of the others.

    Parameters
    ----------
    folder : Path
        Folder that the workers of this server share.
    decoded : callable
        Returns how many bytes of chunks have been decoded so far.
    """

    def __init__(self, folder: Path, decoded: Callable[[], int]) -> None:
        self._folder = folder
        self._decoded = decoded
        self._ring = [_Second() for _ in range(SECONDS + 1)]
        self._totals = {"requests": 0, "batches": 0, "bytes": 0, "errors": 0}
        self._callers: dict[str, list[float]] = {}
        self._slow: list[tuple[float, float, str]] = []
        self._slow_from = 0.0
        """Duration above which a request is among the slowest, in seconds."""
        self._written = -1
        self._closed = threading.Event()
        self._server = os.getppid()

    def begin(self) -> None:
        """Start to write changed counts once a second."""
        with contextlib.suppress(OSError):
            self._forget_old()
        threading.Thread(target=self._run, name="h5feed-traffic", daemon=True).start()

    def close(self) -> None:
        """Stop writing."""
        self._closed.set()
        with contextlib.suppress(OSError):
            self._file.unlink()

    def note_batches(
        self,
        caller: str,
        batches: int,
        nbytes: int,
        seconds: float,
        what: str,
        waits: tuple[float, float] | None = None,
    ) -> None:
        """Count a response with batches. Call it only from the event loop.

        `waits` contains the seconds that a loop of the caller waited, and the duration that this covers.
        """
        now = time.time()
        second = self._second(int(now))
        second.requests += 1
        second.batches += batches
        second.nbytes += nbytes
        totals = self._totals
        totals["requests"] += 1
        totals["batches"] += batches
        totals["bytes"] += nbytes
        known = self._callers.get(caller)
        if known is None:
            if len(self._callers) >= _MOST_CALLERS:
                del self._callers[min(self._callers, key=lambda name: self._callers[name][0])]
            known = self._callers[caller] = [0.0, 0, 0, 0.0, 0.0]
        elif abs(now - known[0]) > SECONDS:
            known[1:] = [0, 0, 0.0, 0.0]
        known[0] = now
        known[1] += batches
        known[2] += nbytes
        if waits is not None:
            # Older reports fade: those from a minute ago count for about a third.
            fading = math.exp(-waits[1] / SECONDS)
            known[3:] = [known[3] * fading + waits[0], known[4] * fading + waits[1]]
        if seconds > self._slow_from:
            self._note_slow(seconds, now, what)

    def note_request(self, status: int, seconds: float, what: str) -> None:
        """Count any other response. Call it only from the event loop."""
        now = time.time()
        second = self._second(int(now))
        second.requests += 1
        self._totals["requests"] += 1
        if status >= 500:
            second.errors += 1
            self._totals["errors"] += 1
        if seconds > self._slow_from:
            self._note_slow(seconds, now, what)

    def activity(self) -> Activity:
        """The activity of all workers of this server, as far as they have written it."""
        self._write()
        now = int(time.time())
        found = Activity(totals={**dict.fromkeys(self._totals, 0), "decoded": 0})
        by_second = {second: dict.fromkeys(("requests", "batches", "bytes", "errors"), 0)
                     for second in range(now - SECONDS, now)}  # fmt: skip
        callers: dict[str, dict[str, Any]] = {}
        for said in self._said():
            found.workers += 1
            for name in found.totals:
                found.totals[name] += said["totals"].get(name, 0)
            for second, *counts in said["seconds"]:
                if second in by_second:
                    for name, count in zip(by_second[second], counts, strict=True):
                        by_second[second][name] += count
            found.slowest += [
                {"seconds": seconds, "ago": max(0.0, now - at), "what": what}
                for seconds, at, what in said["slow"]
                # Skip requests from the future: the clock may have been set back.
                if abs(now - at) < _SLOW_SECONDS
            ]
            for name, (seen, batches, nbytes, waited, told) in said["callers"].items():
                if abs(now - seen) <= SECONDS:
                    line = callers.setdefault(
                        name, {"name": name, "batches": 0, "bytes": 0, "waited": 0.0, "told": 0.0}
                    )
                    for key, value in (("batches", batches), ("bytes", nbytes), ("waited", waited), ("told", told)):
                        line[key] += value
        for line in callers.values():
            told = line.pop("told")
            line["waited"] = line["waited"] / told if told else None
        found.seconds = [{"second": second, **counts} for second, counts in by_second.items()]
        found.slowest = sorted(found.slowest, key=lambda one: -one["seconds"])[:_MOST_SLOW]
        found.callers = sorted(callers.values(), key=lambda one: -one["bytes"])
        return found

    def _second(self, second: int) -> _Second:
        place = self._ring[second % len(self._ring)]
        if place.second != second:
            place.second, place.requests, place.batches, place.nbytes, place.errors = second, 0, 0, 0, 0
        return place

    def _note_slow(self, seconds: float, now: float, what: str) -> None:
        self._keep_slow(now, [(seconds, now, what[:_MOST_CHARS])])

    def _keep_slow(self, now: float, more: list[tuple[float, float, str]]) -> None:
        """Keep the slowest of the recent requests."""
        kept = [one for one in self._slow if abs(now - one[1]) < _SLOW_SECONDS]
        self._slow = sorted([*kept, *more], reverse=True)[:_MOST_SLOW]
        self._slow_from = self._slow[-1][0] if len(self._slow) == _MOST_SLOW else 0.0

    @property
    def _file(self) -> Path:
        return self._folder / f"{self._server}-{os.getpid()}.json"

    def _run(self) -> None:
        while not self._closed.wait(_WRITE_SECONDS):
            self._write()

    def _write(self) -> None:
        requests = self._totals["requests"]
        if requests == self._written:
            return
        self._written = requests
        # Forget requests from more than ten minutes ago.
        self._keep_slow(time.time(), [])
        said = {
            "totals": {**self._totals, "decoded": self._decoded()},
            "seconds": [
                (one.second, one.requests, one.batches, one.nbytes, one.errors)
                for one in list(self._ring)
                if one.second
            ],
            "slow": self._slow,
            "callers": self._callers.copy(),
        }
        file = self._file
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(".part")
            part.write_text(json.dumps(said))
            part.replace(file)

    def _said(self) -> list[dict[str, Any]]:
        """The content of the file of each worker."""
        found = []
        with contextlib.suppress(OSError):
            for file in self._folder.glob(f"{self._server}-*.json"):
                with contextlib.suppress(OSError, ValueError):
                    if _is_alive(int(file.stem.partition("-")[2])):
                        found.append(json.loads(file.read_text()))
        return found

    def _forget_old(self) -> None:
        for file in self._folder.iterdir():
            with contextlib.suppress(OSError):
                if time.time() - file.stat().st_mtime > _KEPT_SECONDS:
                    file.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
