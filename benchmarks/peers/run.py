"""Install the peers, let them take turns with h5feed on the same file, and print the table."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np

from ..data import IMAGE
from ..report import print_machine
from ..servers import h5feed_server
from .environments import FLIGHT, H5GROVE, HSDS, LANCE, LITDATA, TENSORFLOW, TORCH, Environment

ROWS = 2560
"""503 MB, which the peers that convert write once more."""

_TURN_ROWS = 1280
_SLOW_ROWS = 128
"""Rows of a turn, and of one of the peers that are slow."""

_READY_SECONDS = 600.0
"""For the conversion."""

_TURN_SECONDS = 300.0

_PEERS: dict[str, tuple[Environment | None, int]] = {
    "h5feed": (None, _TURN_ROWS),
    "h5py rows": (None, _TURN_ROWS),
    "h5py fancy": (None, _SLOW_ROWS),
    "torch DataLoader": (TORCH, _TURN_ROWS),
    "tf.data generator": (TENSORFLOW, _TURN_ROWS),
    "tf.data service": (TENSORFLOW, _TURN_ROWS),
    "Arrow Flight": (FLIGHT, _TURN_ROWS),
    "LitData": (LITDATA, ROWS),
    "Lance": (LANCE, _TURN_ROWS),
    "nginx": (None, _TURN_ROWS),
    "h5grove": (H5GROVE, _SLOW_ROWS),
    "HSDS": (HSDS, _SLOW_ROWS),
}
"""By name, as in `contestants`: its environment (None: ours), and the rows of a turn."""

_OURS = "h5feed"


class _Contestant:
    """A process that reads rows when it is told to."""

    def __init__(self, name: str, python: Path, file: Path, folder: Path, extra: str) -> None:
        folder.mkdir()
        self.name = name
        command: list[Any] = [python, Path(__file__).with_name("contestants.py"), name, file, folder, extra]
        log = (folder / "log").open("w")
        # A process group of its own: workers of the libraries end with it. Not a session, which the scheduler of Linux
        # would favour or not as a whole.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, process_group=0
        )
        self.rates: list[float] = []

    def answer(self, seconds: float) -> dict[str, Any]:
        """The next line it says; with ``error`` if it fails."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            return {"error": "it ended without a word" if ready else f"no answer within {seconds:.0f} s"}
        found: dict[str, Any] = json.loads(line)
        return found

    def turn(self, number: int, rows: int) -> str:
        """Read, and note the rate, unless this is to warm up (-1); returns what went wrong."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{number + 1} {rows}\n")
            self._process.stdin.flush()
        told = self.answer(_TURN_SECONDS)
        if "error" in told:
            return str(told["error"])
        if told["rows"] != rows:
            return f"{told['rows']} rows came instead of {rows}"
        if number >= 0:
            self.rates.append(told["rows"] / told["seconds"])
        return ""

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, 9)
        self._process.wait()


def run_peers(rounds: int, names: list[str] | None, say: Callable[[str], None]) -> int:
    """Measure all peers, or those with these names; returns the exit code."""
    chosen = [name for name in _PEERS if names is None or name == _OURS or name in names]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-peers-")))
        data = folder / "data"
        data.mkdir()
        say("writing the file")
        file = _write(data / "images.h5")
        left_out: dict[str, str] = {}
        about: dict[str, dict[str, Any]] = {}
        running: dict[str, _Contestant] = {}
        url = stack.enter_context(h5feed_server(data, 2)).url
        for name in chosen:
            environment, _ = _PEERS[name]
            if environment is not None:
                say(f"installing {', '.join(environment.packages)}, unless they are there")
                if missing := environment.missing():
                    left_out[name] = missing
                    continue
            if name == "nginx" and shutil.which("nginx") is None:
                left_out[name] = "nginx is not installed"
                continue
            say(f"starting {name}")
            python = environment.python if environment else Path(sys.executable)
            contestant = _Contestant(name, python, file, folder / name.replace(" ", "-"), url)
            stack.callback(contestant.close)
            about[name] = contestant.answer(_READY_SECONDS)
            if "error" in about[name]:
                left_out[name] = about[name]["error"]
                contestant.close()
                continue
            running[name] = contestant
        loads = []
        with contextlib.suppress(KeyboardInterrupt):
            for number in range(-1, rounds):
                say(f"round {number + 1} of {rounds}" if number >= 0 else "warming up")
                # Every second round backwards, so that nobody always follows the same neighbour.
                for name, contestant in list(running.items())[:: 1 if number % 2 else -1]:
                    if failure := contestant.turn(number, _PEERS[name][1]):
                        left_out[name] = failure
                        running.pop(name).close()
                loads.append(os.getloadavg()[0])
        done = min((len(contestant.rates) for contestant in running.values()), default=0)
        if not done:
            return 130
        for contestant in running.values():
            # Of a round that was interrupted, nothing counts.
            del contestant.rates[done:]
        print()
        _print(running, about, left_out, done, loads)
    return 0 if _OURS in running else 1


def _write(path: Path) -> Path:
    random = np.random.default_rng(0)
    with h5py.File(path, "w", libver="latest") as file:
        images = file.create_dataset("images", (ROWS, *IMAGE), np.uint8)
        for start in range(0, ROWS, 256):
            images[start : start + 256] = random.integers(0, 256, (256, *IMAGE), np.uint8)
        file["labels"] = random.integers(0, 10, ROWS)
    # What is still to be written back would be written while we measure.
    os.sync()
    return path


def _print(
    running: dict[str, _Contestant],
    about: dict[str, dict[str, Any]],
    left_out: dict[str, str],
    rounds: int,
    loads: list[float],
) -> None:
    print_machine()
    print(
        f"{date.today()}; medians of {rounds} rounds; {ROWS} images of {'×'.join(map(str, IMAGE))} uint8, shuffled, "
        f"batches of 64; load of the machine {min(loads):.1f} … {max(loads):.1f}, of which this run is up to 2\n"
    )
    columns = "{:<20}{:>9}{:>8}{:>9}{:>18}{:>22}  {}"
    print(columns.format("", "rows/s", "MB/s", "h5feed/", "range", "conversion", "versions"))
    ours = running[_OURS].rates if _OURS in running else []
    row_bytes = int(np.prod(IMAGE))
    ratios: dict[str, float] = {}
    for name, contestant in sorted(running.items(), key=lambda item: -median(item[1].rates)):
        each = [one / other for one, other in zip(ours, contestant.rates, strict=True)]
        rate, told = median(contestant.rates), about[name]
        ratios[name] = median(each) if each else float("nan")
        converted = (
            f"{told['convert_seconds']:.1f} s, {told['converted_bytes'] / 1e6:,.0f} MB"
            if "convert_seconds" in told
            else "none"
        )
        span = f"{min(each):.2f} … {max(each):.2f}" if each else ""
        print(
            columns.format(
                name,
                f"{rate:,.0f}",
                f"{rate * row_bytes / 1e6:,.0f}",
                f"{ratios[name]:.2f}",
                span,
                converted,
                told["versions"],
            )
        )
    for name, why in left_out.items():
        print(f"{name} is left out: {why}")
    print()
    for name, ratio in ratios.items():
        if name != _OURS:
            print(f"RATIO peers_{name.lower().replace(' ', '_').replace('.', '_')} {ratio:.3f}")
