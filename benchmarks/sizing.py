"""``python -m benchmarks.sizing``: what one core of the server feeds, by what is in the file.

A client takes shuffled epochs over two connections, and the CPU time of the server's processes is held against the
bytes of the arrays that it got. Other load on the machine changes the result little, because nothing is measured in
seconds on the clock. Divide what your GPUs consume by the result: that many cores, and as many workers, are needed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import h5feed
from h5feed_server.builder import BuildOptions, build

from . import report
from .data import BATCH, KEPT, SMALL_BATCH, Files, make_files
from .encoded import BATCH as JPEG_BATCH
from .encoded import SIDE, make_images
from .measure import count
from .served import epochs_of
from .servers import H5feedServer, h5feed_server


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    options = _parser().parse_args(argv)
    with contextlib.ExitStack() as stack:
        folder = (
            KEPT if options.keep else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-sizing-")))
        )
        files = make_files(folder, lambda text: print(f"{text} …", flush=True))
        lines = [*_of(files, options.epochs), _of_jpegs(options.epochs)]
    print()
    report.print_machine()
    print(f"CPU time of the server, one worker, for {options.epochs} shuffled epochs of each\n")
    print(f"{'data':<52}{'one core feeds':>16}{'CPU per batch':>16}")
    for what, rate, per_batch in lines:
        print(f"{what:<52}{rate / 1e9:>11.2f} GB/s{per_batch * 1e3:>13.2f} ms")
    return 0


Line = tuple[str, float, float]
"""What was read, bytes of arrays per second of CPU time, seconds of CPU time per batch."""


def _server(folder: Path) -> AbstractContextManager[H5feedServer]:
    """Decodes each chunk and image again for every batch that has it, as for data that is larger than the cache."""
    return h5feed_server(folder, 1, H5FEED_CHUNK_CACHE_BYTES="0")


def _of(files: Files, epochs: int) -> list[Line]:
    with _server(files.folder) as server, h5feed.connect(server.url, local=False) as feed:
        return [
            measure(server, feed[name], what, batch, epochs)
            for name, what, batch in (
                (files.contiguous.stem, "256×256×3 images, contiguous, 64 to a batch", BATCH),
                (files.thumbnails.stem, "64×64×3 images, contiguous, 64 to a batch", BATCH),
                (files.small.stem, "28×28 images, contiguous, 32 to a batch", SMALL_BATCH),
                (files.compressed.stem, "256×256×3 images, gzip, 64 to a batch", BATCH),
            )
        ]


def _of_jpegs(epochs: int) -> Line:
    what = f"JPEGs of 500×375, decoded to {SIDE}×{SIDE}×3, 64 to a batch"
    with tempfile.TemporaryDirectory(prefix="h5feed-sizing-") as folder:
        jpegs, served = Path(folder) / "jpegs", Path(folder) / "served"
        make_images(jpegs)
        build(jpegs, served / "jpegs.h5", BuildOptions((SIDE, SIDE), store="encoded"))
        with _server(served) as server, h5feed.connect(server.url, local=False) as feed:
            return measure(server, feed["jpegs"], what, JPEG_BATCH, epochs)


def measure(server: H5feedServer, dataset: h5feed.Dataset, what: str, batch: int, epochs: int) -> Line:
    """The line of one dataset, from some shuffled epochs after a first one."""
    epoch = epochs_of(dataset, batch)
    epoch()
    before, rows = server.cpu_seconds(), 0
    for _ in range(epochs):
        rows += epoch()
    spent = server.cpu_seconds() - before
    first = dataset.batch(0, batch_size=1)
    nbytes = rows * sum(first[name].nbytes for name in first)
    return what, nbytes / spent, spent * batch / rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sizing",
        description="Measures how many bytes per second one core of the server feeds, for several kinds of data.",
        epilog="example: python -m benchmarks.sizing --epochs 5",
    )
    parser.add_argument("--epochs", type=count, default=3, help="epochs to measure (default 3)")
    parser.add_argument(
        "--keep", action="store_true", help="keep the files (1.7 GB) in benchmarks/data, and reuse them"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
