"""``python -m benchmarks.growth``: how the cost of everything grows with what there is.

Each kind of source is made in three sizes: n, 4 n and 16 n of one thing, everything else being equal. Whatever users
do with it is timed, and the exponent of its growth from 4 n to 16 n is printed: 1 if it takes four times as long, 2 if
it takes sixteen times. What somewhere looks through all of them for each of them has an exponent near 2. Times below a
hundredth of a second say nothing, and count as a hundredth.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import h5py
import httpx
import numpy as np
import psutil
from h5feed_server.builder import BuildOptions, preview

from . import report
from .servers import h5feed_server

FACTOR = 4
"""From one size to the next."""

MOST = 1.1
"""Exponent that nothing should be above."""

_LEAST_SECONDS = 0.01
_PATIENCE = 600.0
"""Seconds for one request, or until a folder is inspected."""

Times = dict[str, float]
"""Seconds, by what was done."""


@dataclass(frozen=True)
class Kind:
    """One thing of which there are more and more.

    Attributes
    ----------
    smallest : int
        The first of the three sizes.
    write : callable
        Writes a source of that size into a folder.
    measure : callable
        Does with the folder what users do.
    """

    smallest: int
    write: Callable[[Path, int], None]
    measure: Callable[[Path], Times]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 1 if something grows faster than it should."""
    options = _parser().parse_args(argv)
    exponents: dict[str, float] = {}
    for name in options.only:
        kind = KINDS[name]
        sizes = [kind.smallest * FACTOR**power for power in range(3)]
        found = [_measured(kind, size) for size in sizes]
        print(f"\n{name:<28}" + "".join(f"{size:>12,}" for size in sizes) + f"{'exponent':>12}")
        for what in found[0]:
            _, small, large = seconds = [max(_LEAST_SECONDS, times[what]) for times in found]
            exponent = math.log(large / small, FACTOR)
            exponents[f"{name}_{what}"] = exponent
            print(
                f"  {what.replace('_', ' '):<26}" + "".join(f"{one:>10.3f} s" for one in seconds) + f"{exponent:>12.2f}"
            )
    print()
    report.print_machine()
    for what, exponent in exponents.items():
        print(f"GROWTH {what} {exponent:.2f}")
    return int(max(exponents.values()) > MOST)


def _measured(kind: Kind, size: int) -> Times:
    with tempfile.TemporaryDirectory(prefix="h5feed-growth-") as folder:
        kind.write(Path(folder), size)
        return kind.measure(Path(folder))


# Sources


def _write_images(folder: Path, count: int) -> None:
    """Small pictures of ten classes."""
    picture = cv2.imencode(".png", np.zeros((16, 16, 3), np.uint8))[1].tobytes()
    for number in range(10):
        (folder / f"class{number}").mkdir()
    for number in range(count):
        (folder / f"class{number % 10}" / f"{number:06d}.png").write_bytes(picture)


def _write_files(folder: Path, count: int) -> None:
    """Files of eight rows."""
    for number in range(count):
        with h5py.File(folder / f"set{number:05d}.h5", "w") as file:
            file["x"] = np.zeros((8, 4), np.float32)
            file["label"] = np.arange(8)


def _write_shards(folder: Path, count: int) -> None:
    """One dataset in many files."""
    for number in range(count):
        with h5py.File(folder / f"all-{number:05d}-of-{count:05d}.h5", "w") as file:
            file["x"] = np.full((8, 4), number, np.float32)
            file["label"] = np.arange(8)


def _write_groups(folder: Path, count: int) -> None:
    """One file with a dataset in each of its groups."""
    with h5py.File(folder / "all.h5", "w") as file:
        for number in range(count):
            file[f"set{number:05d}/x"] = np.zeros((8, 4), np.float32)
            file[f"set{number:05d}/label"] = np.arange(8)


def _write_columns(folder: Path, count: int) -> None:
    """One table with many columns."""
    values = np.random.default_rng(0).normal(size=500).astype(np.float32)
    with h5py.File(folder / "all.h5", "w") as file:
        for number in range(count):
            file[f"column{number:05d}"] = values
        file["label"] = np.arange(500) % 3


def _write_classes(folder: Path, count: int) -> None:
    """64,000 rows, however many classes there are."""
    with h5py.File(folder / "all.h5", "w") as file:
        file["x"] = np.zeros((64_000, 4), np.float32)
        label = file.create_dataset("label", data=np.arange(64_000) % count)
        label.attrs.create("class_names", [f"class {number}" for number in range(count)], dtype=h5py.string_dtype())


def _write_rows(folder: Path, count: int) -> None:
    with h5py.File(folder / "all.h5", "w") as file:
        file["x"] = np.zeros((count, 4), np.uint8)
        file["label"] = np.random.default_rng(0).integers(0, 10, count)


# What is done with them


def _dry_run(folder: Path) -> Times:
    return dict([_timed("dry_run", lambda: preview(folder, folder / "out.h5", BuildOptions((16, 16))))])


def _catalogue(folder: Path) -> Times:
    """A folder that was never seen before, and one that was; the list, and the first page of the explorer."""
    times: Times = {}
    with tempfile.TemporaryDirectory(prefix="h5feed-cache-") as cache:
        for what in ("inspection", "restart"):
            began = time.perf_counter()
            with h5feed_server(folder, 1, Path(cache), H5FEED_PROVISIONAL_BYTES="") as server:
                _wait_until_known(server.url)
                times[what] = time.perf_counter() - began
                with httpx.Client(base_url=server.url, timeout=_PATIENCE) as http:
                    times |= dict([_timed("listing", _getting(http, "/v1/datasets"))])
                    times |= dict([_timed("first_page", _getting(http, "/"))])
                    last = http.get("/v1/datasets").json()["datasets"][-1]["name"]
                    times |= dict([_timed("opening_the_last", _getting(http, f"/v1/datasets/{last}"))])
    return times


def _shards(folder: Path) -> Times:
    """How soon a dataset of many files is ready, when it was never seen before and when it was, and delivers rows.

    In CPU time of the server.
    """
    times: Times = {}
    with tempfile.TemporaryDirectory(prefix="h5feed-cache-") as cache:
        for what in ("ready_cold", "ready_from_cache"):
            with (
                h5feed_server(folder, 1, Path(cache), H5FEED_PROVISIONAL_BYTES="") as server,
                httpx.Client(base_url=server.url, timeout=_PATIENCE) as http,
            ):
                _wait_until_known(server.url, pause=0.5)
                times[what] = _cpu_seconds(server.pid)
                query = {"batch_size": "64", "shuffle": "true"}
                for then, path, asked in (
                    ("first_batch", "/v1/datasets/all/batches/0", query),
                    ("opening", "/v1/datasets/all", None),
                    ("page", "/datasets/all", None),
                ):
                    before = _cpu_seconds(server.pid)
                    _getting(http, path, asked)()
                    times[then] = _cpu_seconds(server.pid) - before
    return times


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children, including those that have ended."""
    process = psutil.Process(pid)
    found = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system + one.children_user + one.children_system for one in found)


def _one_dataset(folder: Path) -> Times:
    """All that one dataset is asked for."""
    return dict(_of_one_dataset(folder))


def _of_one_dataset(folder: Path) -> Iterator[tuple[str, float]]:
    with (
        h5feed_server(folder, 1, H5FEED_PROVISIONAL_BYTES="") as server,
        httpx.Client(base_url=server.url, timeout=_PATIENCE) as http,
    ):
        _wait_until_known(server.url)
        listed = http.get("/v1/datasets/all").json()["fields"]
        fields = ",".join(field["name"] for field in listed if field["readable"])
        everything = {"batch_size": "64", "shuffle": "true"}
        divided = {"test": "0.2", "val": "0.1"}
        yield _timed("opening", _getting(http, "/v1/datasets/all"))
        if len(fields) < 8000:
            everything["fields"] = fields
        yield _timed("first_batch", _getting(http, "/v1/datasets/all/batches/0", everything), once=True)
        yield _timed("next_batch", _getting(http, "/v1/datasets/all/batches/1", everything))
        yield _timed("splits", _getting(http, "/v1/datasets/all/splits", divided), once=True)
        yield _timed("statistics", _getting(http, "/v1/datasets/all/stats"), once=True)
        yield _timed("page", _getting(http, "/datasets/all"))


def _getting(http: httpx.Client, path: str, query: Mapping[str, str] | None = None) -> Callable[[], object]:
    def get() -> object:
        while True:
            answer = http.get(path, params=query, headers={"prefer": "wait=60"})
            if answer.status_code != 202:
                return answer.raise_for_status()

    return get


def _timed(what: str, work: Callable[[], object], *, once: bool = False) -> tuple[str, float]:
    """The shortest of three times, or the first if it is about what was never done before."""
    seconds = []
    for _ in range(1 if once else 3):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return what, min(seconds)


def _wait_until_known(url: str, pause: float = 0.02) -> None:
    """Until all files are inspected.

    Raises
    ------
    TimeoutError
    """
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        listed = httpx.get(f"{url}/v1/datasets", timeout=_PATIENCE).json()["datasets"]
        if listed and all(one["status"] == "ok" for one in listed):
            return
        time.sleep(pause)
    raise TimeoutError(f"not all datasets were inspected after {_PATIENCE:g} s")


KINDS = {
    "images": Kind(2000, _write_images, _dry_run),
    "files": Kind(50, _write_files, _catalogue),
    "shards": Kind(625, _write_shards, _shards),
    "groups": Kind(100, _write_groups, _catalogue),
    "columns": Kind(100, _write_columns, _one_dataset),
    "classes": Kind(250, _write_classes, _one_dataset),
    "rows": Kind(500_000, _write_rows, _one_dataset),
}


def _kinds(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in KINDS:
            raise argparse.ArgumentTypeError(f"{name!r} is not a kind: choose from {', '.join(KINDS)}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth",
        description="Measures how the time of everything grows with the number of files, columns, rows …",
        epilog="example: python -m benchmarks.growth --only columns,classes",
    )
    parser.add_argument("--only", type=_kinds, default=list(KINDS), metavar="KINDS", help="default: all")
    return parser


if __name__ == "__main__":
    sys.exit(main())
