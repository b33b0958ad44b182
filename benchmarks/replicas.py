"""Two replicas against one, each behind a link of its own that carries far less than the processors can.

The servers run in a network namespace of their own. Each has a pair of virtual Ethernet devices, and the kernel's token
bucket (``tc … tbf``) holds its end to the rate.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import h5feed
import h5py
import numpy as np

from .data import Files
from .far import NAMESPACE
from .measure import Figure, Rates, Turn, take_turns
from .servers import h5feed_server

LINK_RATE = 12.5e6
"""Bytes per second of an equal link: 100 Mbit/s."""

LINKS = {"first": LINK_RATE, "equal": LINK_RATE, "slower": LINK_RATE / 4}

_BATCH = 16
_ROW = (64, 64, 3)
_SECONDS = 8.0
"""How long a turn takes over one link. It ends within an epoch, as at the end of one the links wait for each other."""

_EPOCH_TURNS = 1.5

_ROUNDS = 5

_VARIANT = "100 Mbit/s each"
_UNEVEN = "100 and 25 Mbit/s"

FIGURES = (
    Figure("replicas_two_to_one", {_VARIANT: "two"}, {_VARIANT: "one"}, 1.9),
    Figure("replicas_uneven_to_one", {_UNEVEN: "uneven"}, {_UNEVEN: "one"}, 1.15),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second from one replica, from two alike, and from two of which one has a link of a quarter."""
    if not links_are_possible():
        print("cannot simulate links here: it needs unshare, nsenter, ip and tc", file=sys.stderr)
        return {}
    # In a process of its own: the network namespace is the process's.
    command = [*NAMESPACE, sys.executable, "-m", "benchmarks.replicas", str(min(rounds, _ROUNDS))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    rates: Rates = json.loads(done.stdout.splitlines()[-1])
    return rates


def links_are_possible() -> bool:
    """Whether network devices with a rate can be made in a namespace of our own."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip", "tc"))):
        return False
    attempt = (
        "ip link add near type veth peer name far && tc qdisc add dev far root tbf rate 1mbit burst 64k latency 1s"
    )
    done = subprocess.run([*NAMESPACE, "sh", "-c", attempt], capture_output=True, check=False)
    return done.returncode == 0


def main(argv: Sequence[str] | None = None) -> int:
    """Measure within the network namespace of this process; prints the rates as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas")
    parser.add_argument("rounds", type=int)
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-bench-")))
        rows = int(LINK_RATE * _SECONDS / np.prod(_ROW)) // _BATCH * _BATCH
        with h5py.File(folder / "images.h5", "w") as file:
            shape = int(_EPOCH_TURNS * rows), *_ROW
            file["images"] = np.random.default_rng(7).integers(0, 256, shape, np.uint8)
        through = stack.enter_context(_far_namespace())
        urls = {
            name: stack.enter_context(_server(folder, number, rate, through))
            for number, (name, rate) in enumerate(LINKS.items())
        }
        contestants = {
            "one": [urls["first"]],
            "two": [urls["first"], urls["equal"]],
            "uneven": [urls["first"], urls["slower"]],
        }
        turns: dict[str, Turn] = {}
        feeds: dict[str, h5feed.Feed] = {}
        for name, used in contestants.items():
            feeds[name] = stack.enter_context(h5feed.connect(",".join(used)))
            turns[name] = _turns(feeds[name]["images"], rows)
        rates = take_turns(turns, options.rounds)
        for name, feed in feeds.items():
            print(f"{name}: {'; '.join(map(str, feed.replicas))}", file=sys.stderr)
    print(json.dumps(rates))
    return 0


@contextlib.contextmanager
def _far_namespace() -> Iterator[list[str]]:
    """The command that runs another one in a network namespace of the servers."""
    ready = "ip link set lo up && echo ready && exec sleep infinity"
    holder = subprocess.Popen(["unshare", "--net", "--", "sh", "-c", ready], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
        yield ["nsenter", f"--net=/proc/{holder.pid}/ns/net", "--"]
    finally:
        holder.kill()
        holder.wait()


@contextlib.contextmanager
def _server(folder: Path, number: int, rate: float, through: Sequence[str]) -> Iterator[str]:
    """The URL of a server behind a link of its own."""
    near, far = f"10.98.{number}.1", f"10.98.{number}.2"
    namespace = through[1].split("/")[2]
    for command in (
        f"ip link add near{number} type veth peer name far{number} netns {namespace}",
        f"ip address add {near}/30 dev near{number}",
        f"ip link set near{number} up",
        f"{' '.join(through)} ip address add {far}/30 dev far{number}",
        f"{' '.join(through)} ip link set far{number} up",
        f"{' '.join(through)} tc qdisc add dev far{number} root tbf rate {8 * rate:.0f}bit burst 64kb latency 100ms",
    ):
        subprocess.run(command.split(), check=True)
    with h5feed_server(folder, 1, None, through, (), H5FEED_HOST=far, H5FEED_PUBLIC="true") as server:
        yield server.url


def _turns(dataset: h5feed.Dataset, rows: int) -> Turn:
    """Turns that take so many rows of a shuffled epoch, another one each time."""
    epochs = itertools.count()

    def turn() -> int:
        batches = dataset.batches(batch_size=_BATCH, shuffle=True, epoch=next(epochs))
        # Read-ahead ends with the iterator.
        return sum(len(batch.rows) for batch in itertools.islice(batches, rows // _BATCH))

    return turn


if __name__ == "__main__":
    sys.exit(main())
