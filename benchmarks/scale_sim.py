"""``python -m benchmarks.scale_sim``: how many accelerators replicas of the server feed, by simulation.

Clients read ahead with the rules of `h5feed` itself: blocks of batches, as large and as many at a time as it finds
best, each from the replica with the fewest of their requests, delivered in order, within a byte budget. Replicas have
cores, which take CPU time for each batch, and links, which connections share evenly, as they share those of the
clients. The CPU time per batch is measured on this machine, or given. What is not simulated: losses on the network,
slow disks, other work on the machines. ``python -m benchmarks --only m`` compares it with real replicas behind slow
links.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5feed
import numpy as np
import numpy.typing as npt
import simpy
from h5feed.fetching.readahead import DEFAULT_READAHEAD
from h5feed.net.concurrency import Link, Pace
from h5feed.plan import BLOCK_BYTES

from . import report
from .data import BATCH, IMAGE, make_files
from .measure import count
from .servers import h5feed_server
from .sizing import measure

_WARM_UP = 0.25
"""Share of the simulated time that does not count: queues fill first."""

_EXAMPLES = """examples:
  python -m benchmarks.scale_sim                                    tables for 1 to 64 replicas
  python -m benchmarks.scale_sim --replicas 3 --clients 16 --step-ms 5
  python -m benchmarks.scale_sim --replicas 8 --clients 64 --replica-gbit 100 --client-gbit 25 --cpu-ms 2
"""

Event = Generator[simpy.Event, Any, Any]


@dataclass(frozen=True)
class Deployment:
    """Replicas of the server, and the training loops that they feed.

    Attributes
    ----------
    replicas, cores : int
        Replicas, and cores of each.
    clients : int
        Processes that train. Each takes one batch a step.
    batch_bytes : int
        Bytes of a batch on the wire.
    cpu_seconds : float
        CPU time of a batch on a replica.
    step_seconds : float
        Duration of a step.
    replica_rate, client_rate : float
        Bytes per second of the link of each replica and client.
    round_trip : float
        Seconds.
    readahead : int
        Bytes that a client fetches ahead.
    connections : int or None
        Requests that a client has under way at most; None: it finds out how many.
    jitter : float
        Standard deviation of the logarithm of the CPU time of a batch.
    """

    replicas: int
    clients: int
    batch_bytes: int
    cpu_seconds: float
    step_seconds: float
    cores: int = 8
    replica_rate: float = 100e9 / 8
    client_rate: float = 25e9 / 8
    round_trip: float = 0.0002
    readahead: int = DEFAULT_READAHEAD
    connections: int | None = None
    jitter: float = 0.2

    @property
    def link(self) -> Link:
        """What a client knows at first."""
        return Link.of(self.round_trip, self.replicas)

    @property
    def bounds(self) -> dict[str, float]:
        """Batches per second at most, by what limits them."""
        return {
            "steps": self.clients / self.step_seconds if self.step_seconds else float("inf"),
            "server cores": self.replicas * self.cores / self.cpu_seconds,
            "server links": self.replicas * self.replica_rate / self.batch_bytes,
            "client links": self.clients * self.client_rate / self.batch_bytes,
        }


@dataclass
class Outcome:
    """What a simulation has found.

    Attributes
    ----------
    rate : float
        Bytes per second of all clients together.
    utilisation : float
        Share of the time that the clients compute.
    waits : (n,) float64
        Seconds that each step waited for its batch.
    limit : str
        What bounds the rate.
    """

    rate: float
    utilisation: float
    waits: npt.NDArray[np.float64]
    limit: str


@dataclass
class _Links:
    """Links of replicas and clients. Transfers get an equal share of both of theirs, whichever is smaller."""

    env: simpy.Environment
    replica_rate: float
    client_rate: float
    replicas: int
    clients: int
    _from: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    _to: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    _left: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    _rates: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    _done: list[simpy.Event] = field(default_factory=list)
    _since: float = 0.0
    _turn: int = 0

    def transfer(self, replica: int, client: int, nbytes: int) -> simpy.Event:
        """Happens when `nbytes` have arrived."""
        self._advance()
        done = self.env.event()
        self._from, self._to = np.append(self._from, replica), np.append(self._to, client)
        self._left = np.append(self._left, float(nbytes))
        self._done.append(done)
        self._share()
        return done

    def cut(self, client: int) -> None:
        """End all transfers to a client, which has closed its connections."""
        self._advance()
        self._keep(self._to != client)

    def _advance(self) -> None:
        """Count what has arrived since the shares changed."""
        self._left -= self._rates * (self.env.now - self._since)
        self._since = self.env.now

    def _share(self) -> None:
        """Share the links anew, and wake up when the next transfer is done."""
        self._turn += 1
        if not self._done:
            self._rates = np.empty(0)
            return
        there = np.bincount(self._from, minlength=self.replicas)
        here = np.bincount(self._to, minlength=self.clients)
        self._rates = np.minimum(self.replica_rate / there[self._from], self.client_rate / here[self._to])
        self.env.process(self._wake(self._turn, max(0.0, float((self._left / self._rates).min()))))

    def _wake(self, turn: int, seconds: float) -> Event:
        yield self.env.timeout(seconds)
        if turn != self._turn:
            # Another transfer has begun meanwhile.
            return
        self._advance()
        # Of what is done at the same time, rounding may leave a little.
        over = self._left <= np.maximum(1.0, self._rates * 1e-9)
        for index in np.flatnonzero(over).tolist():
            self._done[index].succeed()
        self._keep(~over)

    def _keep(self, kept: npt.NDArray[np.bool_]) -> None:
        self._done = list(itertools.compress(self._done, kept.tolist()))
        self._from, self._to, self._left = self._from[kept], self._to[kept], self._left[kept]
        self._share()


class _Client:
    """A training loop that reads ahead. How many requests it has under way, and how large they are, is decided by what
    decides it in the client itself.

    Parameters
    ----------
    env : simpy.Environment
    number : int
    plan : Deployment
    cores : list of simpy.Resource
        Of each replica.
    links : _Links
    link : Link
        What earlier loops have learnt.
    batches : int, optional
        The loop ends after so many; default: never.
    """

    def __init__(
        self,
        env: simpy.Environment,
        number: int,
        plan: Deployment,
        cores: list[simpy.Resource],
        links: _Links,
        link: Link,
        batches: int | None = None,
    ) -> None:
        self._env, self._number, self._plan, self._cores, self._links = env, number, plan, cores, links
        self._random = np.random.default_rng(number)
        self._pace = Pace(plan.readahead, plan.connections, link)
        self._asked_at = [0.0] * plan.replicas
        self._under_way = [0] * plan.replicas
        self._outstanding = 0
        self._arrived: dict[int, int] = {}
        self._change = env.event()
        self._waited = 0.0
        self._waits_since: float | None = None
        self._is_over = False
        self.waits: list[float] = []
        self.steps: list[float] = []
        self.arrivals: list[tuple[float, int]] = []
        env.process(self._ask())
        self.over = env.process(self._train(batches))

    def _changed(self) -> None:
        self._change.succeed()
        self._change = self._env.event()

    def _ask(self) -> Event:
        """Send requests, as many as fit."""
        plan, first = self._plan, 0
        whole = max(1, BLOCK_BYTES // plan.batch_bytes)
        while not self._is_over:
            if sum(self._under_way) >= self._pace.width:
                yield self._change
                continue
            fitting = max(1, self._pace.block_bytes(self._env.now) // plan.batch_bytes)
            batches = min(fitting, whole - first % whole)
            while self._outstanding and self._outstanding + batches * plan.batch_bytes > plan.readahead:
                self._pace.full()
                yield self._change
            fewest = min(self._under_way)
            among = [replica for replica, count in enumerate(self._under_way) if count == fewest]
            replica = min(among, key=lambda one: (self._asked_at[one], (one + self._number) % plan.replicas))
            self._asked_at[replica] = self._env.now
            self._under_way[replica] += 1
            self._outstanding += batches * plan.batch_bytes
            self._env.process(self._fetch(first, batches, replica))
            first += batches

    def _fetch(self, first: int, batches: int, replica: int) -> Event:
        plan, env = self._plan, self._env
        yield env.timeout(plan.round_trip)
        sent: simpy.Event | None = None
        # The next batch is read while this one is sent.
        for _ in range(batches):
            with self._cores[replica].request() as core:
                yield core
                yield env.timeout(plan.cpu_seconds * float(self._random.lognormal(0, plan.jitter)))
            if sent is not None:
                yield sent
            if self._is_over:
                return
            sent = self._links.transfer(replica, self._number, plan.batch_bytes)
        assert sent is not None
        yield sent
        self._under_way[replica] -= 1
        self._arrived[first] = batches
        self.arrivals.append((env.now, batches))
        waiting = 0.0 if self._waits_since is None else env.now - self._waits_since
        self._pace.arrived(batches * plan.batch_bytes, env.now, self._waited + waiting)
        self._changed()

    def _train(self, batches: int | None) -> Event:
        env, plan = self._env, self._plan
        # Not all in step with each other.
        yield env.timeout(float(self._random.uniform(0, plan.step_seconds)))
        taken = 0
        while batches is None or taken < batches:
            self._waits_since = began = env.now
            while taken not in self._arrived:
                yield self._change
            self._waited, self._waits_since = self._waited + env.now - began, None
            block = self._arrived.pop(taken)
            for index in range(block if batches is None else min(block, batches - taken)):
                self.waits.append(env.now - began if index == 0 else 0.0)
                self.steps.append(env.now)
                yield env.timeout(plan.step_seconds)
            taken += block
            self._outstanding -= block * plan.batch_bytes
            self._changed()
        self._is_over = True
        self._links.cut(self._number)
        self._changed()


def _started(plan: Deployment) -> tuple[simpy.Environment, list[simpy.Resource], _Links]:
    env = simpy.Environment()
    cores = [simpy.Resource(env, plan.cores) for _ in range(plan.replicas)]
    return env, cores, _Links(env, plan.replica_rate, plan.client_rate, plan.replicas, plan.clients)


def simulate(plan: Deployment, seconds: float = 10.0) -> Outcome:
    """Run `plan` for some simulated seconds, of which the first quarter does not count."""
    env, cores, links = _started(plan)
    clients = [_Client(env, number, plan, cores, links, plan.link) for number in range(plan.clients)]
    env.run(seconds)
    begin = _WARM_UP * seconds
    waits = np.concatenate([np.array(one.waits)[np.array(one.steps) >= begin] for one in clients])
    arrived = sum(batches for one in clients for at, batches in one.arrivals if at >= begin)
    utilisation = min(1.0, len(waits) * plan.step_seconds / (plan.clients * (seconds - begin)))
    limit = min(plan.bounds, key=lambda name: plan.bounds[name])
    return Outcome(arrived * plan.batch_bytes / (seconds - begin), utilisation, waits, limit)


def simulate_loops(plan: Deployment, batches: int, loops: int) -> list[float]:
    """Seconds that each of some loops takes for so many batches, one after the other, with one client.

    Read-ahead begins anew with each loop, and what is under way at its end is lost.
    """
    env, cores, links = _started(replace(plan, clients=1))
    link = plan.link
    seconds = []
    for _ in range(loops):
        began = env.now
        client = _Client(env, 0, plan, cores, links, link, batches)
        env.run(client.over)
        seconds.append(env.now - began)
    return seconds


def _measured() -> float:
    """CPU seconds of a batch of large, contiguous images on this machine."""
    with tempfile.TemporaryDirectory(prefix="h5feed-scale-") as folder:
        files = make_files(Path(folder), lambda text: print(f"{text} …", flush=True))
        with h5feed_server(files.folder, 1) as server, h5feed.connect(server.url, local=False) as feed:
            return measure(server, feed[files.contiguous.stem], "", BATCH, 3)[2]


def _deployments(options: argparse.Namespace, cpu_seconds: float) -> Iterator[Deployment]:
    for replicas, clients in itertools.product(options.replicas, options.clients):
        yield Deployment(
            replicas=replicas,
            clients=clients,
            batch_bytes=options.batch_bytes,
            cpu_seconds=cpu_seconds,
            step_seconds=options.step_ms / 1e3,
            cores=options.cores,
            replica_rate=options.replica_gbit * 1e9 / 8,
            client_rate=options.client_gbit * 1e9 / 8,
            round_trip=options.round_trip_ms / 1e3,
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scale_sim",
        description="Simulates replicas of the server and the training loops that they feed.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--replicas", type=count, nargs="+", default=[1, 4, 16, 64], help="default 1 4 16 64")
    parser.add_argument("--clients", type=count, nargs="+", default=[8, 64, 512], help="default 8 64 512")
    parser.add_argument("--cores", type=count, default=8, help="cores of a replica (default 8)")
    parser.add_argument("--step-ms", type=float, default=20.0, help="duration of a training step (default 20)")
    parser.add_argument(
        "--batch-bytes", type=count, default=BATCH * int(np.prod(IMAGE)), help="bytes of a batch (default 12.6 MB)"
    )
    parser.add_argument("--cpu-ms", type=float, help="CPU time of a batch on the server (default: measured here)")
    parser.add_argument("--replica-gbit", type=float, default=100.0, help="link of a replica in Gbit/s (default 100)")
    parser.add_argument("--client-gbit", type=float, default=25.0, help="link of a client in Gbit/s (default 25)")
    parser.add_argument("--round-trip-ms", type=float, default=0.2, help="round trip (default 0.2)")
    parser.add_argument("--seconds", type=float, default=5.0, help="simulated seconds (default 5)")
    options = parser.parse_args(argv)
    cpu_seconds = options.cpu_ms / 1e3 if options.cpu_ms is not None else _measured()
    report.print_machine()
    print(f"{cpu_seconds * 1e3:.2f} ms of CPU for a batch of {options.batch_bytes:,} bytes\n")
    heads = ("replicas", "clients", "GB/s", "utilisation", "wait p50", "wait p99", "longest")
    print("".join(f"{head:>12}" for head in heads) + "  limit")
    for plan in _deployments(options, cpu_seconds):
        found = simulate(plan, options.seconds)
        median, late = np.quantile(found.waits, (0.5, 0.99)) * 1e3
        print(
            f"{plan.replicas:>12}{plan.clients:>12}{found.rate / 1e9:>12.2f}{found.utilisation:>12.3f}"
            f"{median:>9.1f} ms{late:>9.1f} ms{found.waits.max() * 1e3:>9.1f} ms  {found.limit}",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
