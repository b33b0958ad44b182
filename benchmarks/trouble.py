"""``python -m benchmarks.trouble``: what those who train notice of trouble that others, or the machine, make.

For each kind of trouble a real server of two workers is started over the same files, with the settings it has by
default. Four clients train on it, epoch after epoch: every row of every batch is held against the file's, and every
epoch has to have each row once. The longest that one of them waits for a batch begins before it connects.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import numpy.typing as npt

from . import report, troubles
from .measure import seconds
from .servers import H5feedServer, h5feed_server

WORKERS = 2
BATCH = 32
CLIENTS = 2
"""That train on each of the datasets `TRAINED`, whatever happens."""

TRAINED = {"pictures": None, "packed": "gzip"}
"""Dataset to its filter: 1,024 rows of 48×48×3 bytes and a label."""

LONGEST_WAIT = 10.0
"""Seconds that a client may wait for a batch."""

_DEADLINE = 60.0
"""Seconds after which a client gives up."""

_FORKS = multiprocessing.get_context("fork")

Truth = Mapping[str, npt.NDArray[Any]]
"""The arrays of a file, by field."""


@dataclass
class Seen:
    """What one client has noticed.

    Attributes
    ----------
    wrong, lost : int
        Rows that were not as in the file, or came again in the same epoch; and that did not come.
    longest : float
        Seconds of the longest wait for a batch.
    failure : str or None
        What ended it before its time.
    """

    batches: int = 0
    wrong: int = 0
    lost: int = 0
    longest: float = 0.0
    failure: str | None = None


class _Trainer(threading.Thread):
    """Reads epoch after epoch, as a training does, and looks at every row."""

    def __init__(self, url: str, name: str, truth: Truth, ended: Event) -> None:
        super().__init__(daemon=True)
        self._url, self._dataset, self._truth, self._ended = url, name, truth, ended
        self._rows = len(next(iter(truth.values())))
        self._since = 0.0
        self.seen = Seen()

    def run(self) -> None:
        self._since = time.monotonic()
        try:
            with h5feed.connect(self._url, deadline=_DEADLINE) as feed:
                dataset = feed[self._dataset]
                for epoch in itertools.count():
                    self._read(dataset, epoch)
                    if self._ended.is_set():
                        return
        except Exception as error:
            self._note_wait()
            self.seen.failure = f"{type(error).__name__}: {error}"

    def finish(self) -> Seen:
        """Wait for its end, which cannot be far any more."""
        self.join(2 * _DEADLINE)
        if self.is_alive():
            self._note_wait()
            self.seen.lost += self._rows
            self.seen.failure = "it is still waiting"
        return self.seen

    def _read(self, dataset: h5feed.Dataset, epoch: int) -> None:
        times = np.zeros(self._rows, int)
        try:
            for batch in dataset.batches("all", batch_size=BATCH, shuffle=True, epoch=epoch):
                self._note_wait()
                np.add.at(times, batch.rows, 1)
                differ = np.zeros(len(batch.rows), bool)
                for name, truth in self._truth.items():
                    differ |= (batch[name] != truth[batch.rows]).reshape(len(differ), -1).any(axis=1)
                self.seen.wrong += int(differ.sum())
                self.seen.batches += 1
                self._since = time.monotonic()
        finally:
            self.seen.lost += int((times == 0).sum())
            self.seen.wrong += int(np.maximum(times - 1, 0).sum())

    def _note_wait(self) -> None:
        self.seen.longest = max(self.seen.longest, time.monotonic() - self._since)


class Stage:
    """Where trouble is made: a server, its folder, and those who train, in processes of their own.

    Parameters
    ----------
    seconds : float
        That the trouble lasts.
    """

    def __init__(self, server: H5feedServer, folder: Path, truth: Mapping[str, Truth], seconds: float) -> None:
        self.server, self.folder = server, folder
        self._truth = truth
        self._until = time.monotonic() + seconds
        self._ended = _FORKS.Event()
        self._telling: list[Connection] = []

    def train(self, name: str, clients: int) -> None:
        """Have one more process train on a dataset, with so many clients."""
        ours, theirs = _FORKS.Pipe(duplex=False)
        self._telling.append(ours)

        def work() -> None:
            trainers = [_Trainer(self.server.url, name, self._truth[name], self._ended) for _ in range(clients)]
            for trainer in trainers:
                trainer.start()
            theirs.send([trainer.finish() for trainer in trainers])

        _FORKS.Process(target=work, daemon=True).start()
        theirs.close()

    def lasts(self) -> bool:
        """Whether it is not over."""
        return time.monotonic() < self._until

    def wait(self, seconds: float = float("inf")) -> None:
        """Wait so long, or until it is over."""
        time.sleep(max(0.0, min(seconds, self._until - time.monotonic())))

    def finish(self) -> list[Seen]:
        """Let those who train finish their epochs; returns what each has noticed."""
        self._ended.set()
        return [seen for one in self._telling for seen in one.recv()]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(argv)
    began = time.monotonic()

    def say(what: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {what}", flush=True)

    # As many connections as there are peers.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    found: dict[str, list[Seen]] = {}
    with tempfile.TemporaryDirectory(prefix="h5feed-trouble-") as temporary:
        folder = Path(temporary) / "data"
        folder.mkdir()
        truth = _make_files(folder)
        for name in options.only:
            with h5feed_server(folder, WORKERS) as server:
                say(f"{name}: {options.seconds:g} s")
                stage = Stage(server, folder, truth, options.seconds)
                for dataset in TRAINED:
                    stage.train(dataset, CLIENTS)
                did = troubles.ALL[name](stage)
                found[name] = stage.finish()
            say(f"{name}: {did or 'nothing went wrong'}")
            for failure in sorted({seen.failure for seen in found[name] if seen.failure}):
                say(f"{name}: a client failed: {failure}")
    print()
    report.print_machine()
    return _print_table(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.trouble",
        description="Measures how training clients are affected when things go wrong. Exits with 1 if a row is wrong "
        f"or lost, or if a client waits for longer than {LONGEST_WAIT:g} s.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        type=_names,
        default=list(troubles.ALL),
        metavar="NAMES",
        help="comma-separated troubles, such as crowd,away (default: all)",
    )
    parser.add_argument("--seconds", type=seconds, default=20.0, help="duration of each trouble (default 20)")
    return parser


_EPILOG = """troubles:
{}

examples:
  python -m benchmarks.trouble                           all, in less than four minutes
  python -m benchmarks.trouble --only crowd,slow         only these
  python -m benchmarks.trouble --only away --seconds 60  only this one, for longer
""".format("\n".join(f"  {name:<10} {trouble.__doc__}" for name, trouble in troubles.ALL.items()))


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in troubles.ALL:
            raise argparse.ArgumentTypeError(f"{name!r} is not a trouble: choose from {', '.join(troubles.ALL)}")
    return names


def _make_files(folder: Path) -> dict[str, Truth]:
    """Write what is trained on, and what is endless; returns what the former hold."""
    random = np.random.default_rng(0)
    truth = {name: _random_rows(random, 1024, 48) for name in TRAINED} | {troubles.SMALL: _random_rows(random, 512, 16)}
    for name, arrays in truth.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            for key, array in arrays.items():
                packed = TRAINED.get(name) and array.ndim > 1
                file.create_dataset(
                    key, data=array, **({"chunks": (8, *array.shape[1:]), "compression": "gzip"} if packed else {})
                )
    troubles.make_endless(folder)
    return truth


def _random_rows(random: np.random.Generator, rows: int, side: int) -> Truth:
    return {
        "images": random.integers(0, 256, (rows, side, side, 3), np.uint8),
        "labels": random.integers(0, 10, rows),
    }


def _print_table(found: Mapping[str, Sequence[Seen]]) -> int:
    """Returns the exit code."""
    columns = "{:<12}{:>9}{:>14}{:>12}{:>11}{:>18}"
    print(columns.format("trouble", "clients", "good batches", "rows wrong", "rows lost", "longest wait (s)"))
    bad = False
    for name, clients in found.items():
        wrong, lost = sum(seen.wrong for seen in clients), sum(seen.lost for seen in clients)
        batches, longest = sum(seen.batches for seen in clients), max(seen.longest for seen in clients)
        print(columns.format(name, len(clients), f"{batches:,}", wrong, lost, f"{longest:.2f}"))
        bad |= bool(wrong or lost) or longest > LONGEST_WAIT or any(seen.failure for seen in clients)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
