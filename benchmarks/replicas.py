"""Two and three replicas against one, each behind a link of its own that carries far less than the processors can.

The servers run in a network namespace of their own. Each has a pair of virtual Ethernet devices, and the kernel's token
bucket (``tc … tbf``) holds its end to the rate. The same loops are simulated, to see how well `scale_sim` predicts.
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
from .scale_sim import Deployment, simulate_loops
from .servers import H5feedServer, h5feed_server

LINK_RATE = 12.5e6
"""Bytes per second of an equal link: 100 Mbit/s."""

LINKS = {"first": LINK_RATE, "second": LINK_RATE, "third": LINK_RATE, "slower": LINK_RATE / 4}

_PAYLOAD = 1448 / 1514
"""Share of a full frame that is not headers: TCP with timestamps, over Ethernet frames of 1,514 bytes."""

_ROUND_TRIP = 0.0002
"""Seconds, over a pair of virtual devices. Nothing depends on it at these rates."""

_BATCH = 16
_ROW = (64, 64, 3)
_SECONDS = 8.0
"""How long a turn takes over one link. It ends within an epoch, as at the end of one the links wait for each other."""

_TURN_ROWS = int(LINK_RATE * _SECONDS / np.prod(_ROW)) // _BATCH * _BATCH

_EPOCH_TURNS = 1.5

_ROUNDS = 5

_VARIANT = "100 Mbit/s each"
_UNEVEN = "100 and 25 Mbit/s"

_ALIKE = {"one": 1, "two": 2, "three": 3}
"""Contestants with equal links, and their replicas."""

FIGURES = (
    Figure("replicas_two_to_one", {_VARIANT: "two"}, {_VARIANT: "one"}, 1.9),
    Figure("replicas_three_to_one", {_VARIANT: "three"}, {_VARIANT: "one"}, 2.7),
    Figure("replicas_uneven_to_one", {_UNEVEN: "uneven"}, {_UNEVEN: "one"}, 1.15),
    *(
        Figure(f"simulated_to_{name}", {_VARIANT: f"simulated {name}"}, {_VARIANT: name}, 0.9, highest=1.1)
        for name in _ALIKE
    ),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second from one replica, from two and three alike, from two of which one has a link of a quarter, and as
    the simulation has them.
    """
    if not links_are_possible():
        print("cannot simulate links here: it needs unshare, nsenter, ip and tc", file=sys.stderr)
        return {}
    # In a process of its own: the network namespace is the process's.
    command = [*NAMESPACE, sys.executable, "-m", "benchmarks.replicas", str(min(rounds, _ROUNDS))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    found = json.loads(done.stdout.splitlines()[-1])
    rates: Rates = found["rates"]
    simulated = {
        f"simulated {name}": _simulated(replicas, found["cpu_seconds"], len(rates[name]))
        for name, replicas in _ALIKE.items()
    }
    return {**rates, **simulated}


def _simulated(replicas: int, cpu_seconds: float, rounds: int) -> list[float]:
    """Rows per second of the same turns, by simulation: one to warm up, then the `rounds`."""
    plan = Deployment(
        replicas=replicas,
        clients=1,
        batch_bytes=_BATCH * (int(np.prod(_ROW)) + np.dtype(np.int64).itemsize),
        cpu_seconds=cpu_seconds,
        step_seconds=0.0,
        cores=1,
        replica_rate=LINK_RATE * _PAYLOAD,
        client_rate=float("inf"),
        round_trip=_ROUND_TRIP,
    )
    return [_TURN_ROWS / seconds for seconds in simulate_loops(plan, _TURN_ROWS // _BATCH, 1 + rounds)[1:]]


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
    """Measure within the network namespace of this process; prints the rates, and the CPU time of a batch, as JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.replicas")
    parser.add_argument("rounds", type=int)
    options = parser.parse_args(argv)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="h5feed-bench-")))
        with h5py.File(folder / "images.h5", "w") as file:
            shape = int(_EPOCH_TURNS * _TURN_ROWS), *_ROW
            file["images"] = np.random.default_rng(7).integers(0, 256, shape, np.uint8)
        through = stack.enter_context(_far_namespace())
        servers = {
            name: stack.enter_context(_server(folder, number, rate, through))
            for number, (name, rate) in enumerate(LINKS.items())
        }
        contestants = {
            "one": ["first"],
            "two": ["first", "second"],
            "three": ["first", "second", "third"],
            "uneven": ["first", "slower"],
        }
        turns: dict[str, Turn] = {}
        feeds: dict[str, h5feed.Feed] = {}
        for name, used in contestants.items():
            feeds[name] = stack.enter_context(h5feed.connect(",".join(servers[one].url for one in used)))
            turns[name] = _turns(feeds[name]["images"])
        before = sum(server.cpu_seconds() for server in servers.values())
        rates = take_turns(turns, options.rounds)
        spent = sum(server.cpu_seconds() for server in servers.values()) - before
        for name, feed in feeds.items():
            print(f"{name}: {'; '.join(map(str, feed.replicas))}", file=sys.stderr)
    batches = len(contestants) * (1 + options.rounds) * _TURN_ROWS // _BATCH
    print(json.dumps({"rates": rates, "cpu_seconds": spent / batches}))
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
def _server(folder: Path, number: int, rate: float, through: Sequence[str]) -> Iterator[H5feedServer]:
    """A server behind a link of its own."""
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
        yield server


def _turns(dataset: h5feed.Dataset) -> Turn:
    """Turns that take `_TURN_ROWS` rows of a shuffled epoch, another one each time."""
    epochs = itertools.count()

    def turn() -> int:
        batches = dataset.batches(batch_size=_BATCH, shuffle=True, epoch=next(epochs))
        # Read-ahead ends with the iterator.
        return sum(len(batch.rows) for batch in itertools.islice(batches, _TURN_ROWS // _BATCH))

    return turn


if __name__ == "__main__":
    sys.exit(main())
