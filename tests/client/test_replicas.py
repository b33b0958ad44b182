"""Several replicas of one server: all are used, faults of one cost a moment, and each row comes exactly once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import psutil
import pytest
from h5feed.errors import RevisionChanged
from h5feed.net.addresses import MAX_ADDRESSES, Addresses, may_have_several
from h5feed.net.cancellation import Attempt, Cancellation
from h5feed.net.client import Client
from h5feed.net.hedging import LEAST_SECONDS, LONGEST_SECONDS, MAX_HEDGES, Hedging, Race
from h5feed.net.transport import FeedTransport
from h5feed.wire import MEDIA_TYPE

from tests.support.authority import Authority
from tests.support.server_process import ServerProcess
from tests.support.waiting import suspend, wait_until

from .test_failover import GOOD, scripted

ROWS, BATCH = 512, 8
LONGEST_WAIT = 20.0
"""Seconds. A third of the timeout that a hanging server would cost, and far more than is usual on a busy machine."""

HOSTS = ("127.0.0.1", "127.0.0.2", "127.0.0.3")
NAME = "replicas.test"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images whose labels are the numbers of their rows."""
    path = tmp_path_factory.mktemp("replicated")
    with h5py.File(path / "images.h5", "w") as file:
        file["images"] = np.random.default_rng(0).integers(0, 256, (ROWS, 64, 64, 3), np.uint8)
        file["labels"] = np.arange(ROWS)
    return path


@pytest.fixture
def replicas(serve: Callable[..., ServerProcess], data: Path) -> list[ServerProcess]:
    """A server on each of the addresses, all on one port."""
    return _on_one_port(serve, data)


def _on_one_port(
    serve: Callable[..., ServerProcess], data: Path, *options: str, **environment: str
) -> list[ServerProcess]:
    # A port that is free at all of the addresses.
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(socket.create_server((HOSTS[0], 0)))
        port = first.getsockname()[1]
        for host in HOSTS[1:]:
            stack.enter_context(socket.create_server((host, port)))
    return [
        serve(data, "--workers", "1", "--host", host, "--port", str(port), *options, **environment) for host in HOSTS
    ]


class Run:
    """A training run that checks each epoch, and keeps how long its steps waited."""

    def __init__(self, urls: str) -> None:
        self.feed = h5feed.connect(urls, deadline=60, local=False)
        self.train = self.feed["images"].loader(batch_size=BATCH, shuffle=True, readahead=1 << 20)
        self.waits: list[float] = []
        self.epochs = 0

    def epoch(self, at_step: Callable[[int], None] = lambda step: None) -> None:
        """One epoch; ``at_step(n)`` is called after step n."""
        rows: list[int] = []
        began = time.monotonic()
        for step, (_, labels) in enumerate(self.train):
            self.waits.append(time.monotonic() - began)
            rows += np.asarray(labels).tolist()
            time.sleep(0.002)
            at_step(step)
            began = time.monotonic()
        assert sorted(rows) == list(range(ROWS))
        self.epochs += 1

    def until(self, condition: Callable[[], bool]) -> None:
        """Epochs, until the condition holds."""

        def holds() -> bool:
            self.epoch()
            return condition()

        wait_until(holds, 90)

    def requests(self) -> list[int]:
        """Number of requests that each server has answered."""
        return [replica.requests for replica in self.feed.replicas]

    def left_out(self) -> list[str]:
        """For each server, why it is left out."""
        return [replica.left_out for replica in self.feed.replicas]

    def is_used_again(self, number: int) -> None:
        """Epochs, until a server is asked again."""
        before = self.requests()[number]
        self.until(lambda: self.requests()[number] > before)

    def close(self) -> None:
        self.train.close()
        self.feed.close()


def test_a_training_run_on_three_servers(replicas: list[ServerProcess], capsys: pytest.CaptureFixture[str]) -> None:
    """One is killed and restarted, one stopped and continued, one drained: each row once, and no step waits long."""
    run = Run(",".join(server.url for server in replicas))
    killed, stopped, drained = replicas
    run.until(lambda: min(run.requests()) >= 3)
    calm, run.waits = max(run.waits), []

    run.epoch(lambda step: killed.kill() if step == 20 else None)
    run.until(lambda: run.left_out()[0] != "")
    killed.start()
    run.is_used_again(0)
    after_kill, run.waits = max(run.waits), []

    processes = [psutil.Process(pid) for pid in (stopped.process.pid, *stopped.worker_pids())]
    try:
        run.epoch(lambda step: suspend(*processes) if step == 20 else None)
        run.until(lambda: run.left_out()[1] != "")
        for _ in range(10):
            run.epoch()
    finally:
        for process in processes:
            process.resume()
    run.is_used_again(1)
    after_stop, run.waits = max(run.waits), []

    def drain(step: int) -> None:
        if step == 20:
            drained.process.send_signal(signal.SIGTERM)

    run.epoch(drain)
    run.until(lambda: run.left_out()[2] != "")
    assert drained.process.wait(60) == 0
    after_drain = max(run.waits)

    assert max(after_kill, after_stop, after_drain) < LONGEST_WAIT
    statistics = run.train.stats()
    assert len(statistics.replicas) == 3 and "left out" in repr(statistics)
    with capsys.disabled():
        print(
            f"\nlongest wait of a step, in s: calm {calm:.3f}, killed {after_kill:.3f}, stopped {after_stop:.3f}, "
            f"drained {after_drain:.3f}; {run.epochs} epochs; {run.requests()} requests"
        )
    pool = run.feed._client.pool
    run.close()
    # Also the buffers of what was cancelled.
    wait_until(lambda: pool.bytes_in_use == 0)


SCRIPT = """
import json, sys
import h5feed

feed = h5feed.connect(sys.argv[1], verify=sys.argv[2], token="secret", deadline=60)
train = feed["images"].loader(batch_size=8, shuffle=True, readahead=1 << 20)
for line in sys.stdin:
    rows = sorted(int(label) for _, labels in train for label in labels)
    used = {replica.address: replica.requests for replica in feed.replicas}
    print(json.dumps({"rows": rows, "used": used}), flush=True)
"""

NAMESPACE = ["unshare", "--map-root-user", "--mount", "--", "sh", "-c"]
WITH_HOSTS = 'mount --bind "$0" /etc/hosts && exec "$@"'


def _can_have_hosts(hosts: Path) -> bool:
    if shutil.which("unshare") is None:
        return False
    attempt = [*NAMESPACE, WITH_HOSTS, str(hosts), "true"]
    return subprocess.run(attempt, capture_output=True, check=False).returncode == 0


def test_a_name_with_three_addresses(serve: Callable[..., ServerProcess], data: Path, tmp_path: Path) -> None:
    """All addresses of a name, over TLS with its certificate; those that it loses and gets later are noticed."""
    hosts = tmp_path / "hosts"
    _write_hosts(hosts, HOSTS)
    if not _can_have_hosts(hosts):
        pytest.skip("needs a mount namespace, for names of its own")
    authority = Authority(tmp_path / "authority")
    issued = authority.issue(NAME)
    tls = ("--tls-cert", str(issued.cert), "--tls-key", str(issued.key))
    replicas = _on_one_port(serve, data, *tls, H5FEED_TOKENS="secret")
    url = f"https://{NAME}:{replicas[0].port}"
    command = [*NAMESPACE, WITH_HOSTS, str(hosts), sys.executable, "-c", SCRIPT, url, str(authority.cert)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None

        def epoch() -> dict[str, int]:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write("epoch\n")
            process.stdin.flush()
            told: dict[str, Any] = json.loads(process.stdout.readline())
            assert told["rows"] == list(range(ROWS))
            used: dict[str, int] = told["used"]
            return used

        assert set(epoch()) == set(HOSTS)
        wait_until(lambda: min(epoch().values()) > 0)
        # As after `docker compose up --scale`, or when a pod is no longer ready.
        _write_hosts(hosts, HOSTS[1:])
        wait_until(lambda: set(epoch()) == set(HOSTS[1:]))
        replicas[0].stop()
        epoch()
        replicas[0].start()
        _write_hosts(hosts, HOSTS)
        wait_until(lambda: epoch().get(HOSTS[0], 0) > 0)
        process.stdin.close()
        assert process.wait(60) == 0


def _write_hosts(hosts: Path, addresses: Sequence[str]) -> None:
    # In place: what is mounted is this file.
    hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {NAME}\n" for address in addresses))


def test_a_silent_server_costs_a_moment() -> None:
    """Its request goes to another server too, whose answer counts; then it is left out; its connection is closed."""
    release = threading.Event()

    def hang(number: int) -> Any:
        release.wait(100)
        return GOOD

    with scripted(hang) as silent, scripted(lambda n: GOOD) as good:
        client = Client(f"{silent.url},{good.url}", deadline=60)
        began = time.monotonic()
        for _ in range(10):
            assert client.json("/x") == {"ok": True}
        assert time.monotonic() - began < LONGEST_WAIT
        first, second = client.replicas
        assert first.requests == 0 and "nothing arrived" in first.left_out and second.left_out == ""
        assert [path for _, path in silent.asked].count("/x") == 1
        release.set()
        client.close()


def test_a_server_that_stops_in_mid_body() -> None:
    """Half of a body, then silence: the whole answer of the other, and no buffer is lost."""
    body = bytes(1 << 20)
    release = threading.Event()
    whole = (200, {"content-type": MEDIA_TYPE}, body)

    with socket.create_server(("127.0.0.1", 0)) as listener, scripted(lambda n: whole) as good:

        def stop_in_between() -> None:
            connected, _ = listener.accept()
            with connected:
                connected.recv(1 << 16)
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nContent-Type: {MEDIA_TYPE}\r\n\r\n"
                connected.sendall(head.encode() + body[: len(body) // 2])
                release.wait(60)

        thread = threading.Thread(target=stop_in_between, daemon=True)
        thread.start()
        client = Client(f"http://127.0.0.1:{listener.getsockname()[1]},{good.url}", deadline=60, local=False)
        began = time.monotonic()
        got = client.body("/x", {"revision": "a"}, max_bytes=len(body))
        assert len(got) == len(body) and time.monotonic() - began < LONGEST_WAIT
        assert client.replicas[1].requests == 1
        del got
        wait_until(lambda: client.pool.bytes_in_use == 0)
        release.set()
        thread.join(60)
        client.close()


def test_an_address_that_swallows_packets() -> None:
    """A connection that is never established can be given up."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, contextlib.ExitStack() as stack:
        # A full queue: further attempts to connect get no response.
        for _ in range(8):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        attempt = Attempt(Cancellation())
        transport = FeedTransport()
        threading.Timer(0.3, attempt.set).start()
        began = time.monotonic()
        with pytest.raises(OSError, match=r".+"):
            transport._connect(("http", *full.getsockname()), 60, attempt)
        assert time.monotonic() - began < 30


def test_only_the_same_revision_counts(serve: Callable[..., ServerProcess], data: Path, tmp_path: Path) -> None:
    """The answer of a replica with other files is not taken, though the one with the right files is silent."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(data / "images.h5", other)
    with h5py.File(other / "images.h5", "r+") as file:
        file["images"][0] = 0
    right, wrong = serve(data, "--workers", "1"), serve(other, "--workers", "1")
    with h5feed.connect(right.url, local=False) as feed:
        rows = feed["images"].batch(0, batch_size=BATCH)
        path, revision = feed["images"]._path, feed["images"].revision
    client = Client(f"{right.url},{wrong.url}", deadline=60, local=False)
    processes = [psutil.Process(pid) for pid in (right.process.pid, *right.worker_pids())]
    suspend(*processes)

    def resume() -> None:
        for process in processes:
            process.resume()

    threading.Timer(2 * LONGEST_SECONDS, resume).start()
    with contextlib.suppress(RevisionChanged):
        # Whichever is asked first.
        body = client.body(
            f"{path}/batches/0", {"revision": revision, "batch_size": str(BATCH), "fields": "labels"}, max_bytes=1 << 20
        )
        assert np.array_equal(np.frombuffer(body[-8 * BATCH :].tobytes(), np.int64), rows["labels"])
    wait_until(lambda: all(process.status() != psutil.STATUS_STOPPED for process in processes))
    client.close()


def test_hedges_are_bounded() -> None:
    """Requests to servers that are all silent are doubled a few times, not without end."""
    hedging, release = Hedging(), threading.Event()
    asked = threading.Semaphore(0)

    def ask_another(attempt: Attempt) -> None:
        asked.release()
        release.wait(60)

    with contextlib.ExitStack() as stack:
        for _ in range(3 * MAX_HEDGES):
            stack.enter_context(hedging.watch(Race(None, ask_another)))
        for _ in range(MAX_HEDGES):
            assert asked.acquire(timeout=60)
        assert not asked.acquire(timeout=3 * LONGEST_SECONDS)
        release.set()
        wait_until(lambda: hedging.count == MAX_HEDGES)


def test_the_usual_wait_decides() -> None:
    """The delay is that of almost all recent requests, within bounds."""
    hedging = Hedging()
    assert hedging.delay == LONGEST_SECONDS

    def answered(seconds: float, count: int) -> None:
        for _ in range(count):
            attempt = Attempt(None)
            attempt.heard_at = attempt.began_at + seconds
            hedging.answered(attempt)

    answered(0.7, 64)
    assert hedging.delay == pytest.approx(0.7)
    answered(0.001, 256)
    assert hedging.delay == LEAST_SECONDS
    answered(5.0, 256)
    assert hedging.delay == LONGEST_SECONDS


class Names:
    """A look-up whose results are set."""

    def __init__(self, *found: tuple[int, str]) -> None:
        self.found: list[tuple[int, str]] | OSError = list(found)
        self.count = 0

    def __call__(self, host: str, port: int) -> list[tuple[int, str]]:
        self.count += 1
        if isinstance(self.found, OSError):
            raise self.found
        return self.found


def _refresh(addresses: Addresses, *, is_urgent: bool = False) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    addresses._looked_up_at = -1e9
    addresses.refresh(is_urgent=is_urgent, wait=60, found=found.append)
    return found


@pytest.fixture
def listening() -> Iterator[int]:
    """A port at which something listens over IPv4."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def test_addresses_of_one_family(listening: int) -> None:
    """IPv4 and IPv6 are two ways to the same servers: the first that works is used."""
    both = Names((socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "127.0.0.2"))
    addresses = Addresses("x.test", listening, both)
    assert _refresh(addresses) == [("127.0.0.1", "127.0.0.2")]
    # Nothing new.
    assert _refresh(addresses) == []


def test_a_failed_look_up_changes_nothing() -> None:
    """The addresses that are known stay; many of them are limited, and those in use are kept."""
    names = Names(*((socket.AF_INET, f"127.0.1.{number}") for number in range(1, 6)))
    addresses = Addresses("x.test", 1, names)
    assert len(_refresh(addresses)[0]) == 5
    names.found = socket.gaierror(socket.EAI_AGAIN, "no name server")
    assert _refresh(addresses, is_urgent=True) == [] and len(addresses.known) == 5
    names.found = [(socket.AF_INET, f"127.0.1.{number}") for number in range(3, 200)]
    (many,) = _refresh(addresses)
    assert len(many) == MAX_ADDRESSES and {"127.0.1.3", "127.0.1.4", "127.0.1.5"} <= set(many)


def test_names_are_looked_up_now_and_then() -> None:
    """Not for each request."""
    names = Names((socket.AF_INET, "127.0.0.1"))
    addresses = Addresses("x.test", 1, names)
    for _ in range(1000):
        addresses.refresh(is_urgent=False, wait=60, found=lambda found: None)
    assert names.count == 1


def test_hosts_that_may_have_several_addresses() -> None:
    """Names, but neither addresses nor this machine."""
    assert may_have_several("h5feed.default.svc") and may_have_several("server")
    assert not any(map(may_have_several, ("127.0.0.2", "::1", "localhost", "x.localhost")))


def test_a_fork_while_requests_are_hedged(replicas: list[ServerProcess]) -> None:
    """The child has its own threads and connections."""
    run = Run(",".join(server.url for server in replicas))
    run.epoch()
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            run.epoch()
            code = 0
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    run.epoch()
    run.close()
