"""Servers and builds on all nodes of a Ray cluster."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import psutil
import pytest
from h5feed.errors import BadParameter, Unauthorized
from h5feed_server.cluster.connecting import connected
from h5feed_server.cluster.node_actors import Node
from h5feed_server.cluster.node_server import NodeServer, ServerState
from h5feed_server.cluster.serving import environment_of, url_of
from h5feed_server.serve.arguments import add_serve
from h5feed_server.serve.command import settings_of
from h5feed_server.settings import Settings

from tests.support.authority import Authority
from tests.support.fork_server import SERVERS
from tests.support.photographs import encoded, photograph
from tests.support.waiting import wait_until

ROWS, BATCH = 512, 4
COMMAND = [sys.executable, "-m", "h5feed_server.cli"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows whose labels are their numbers."""
    path = tmp_path_factory.mktemp("served")
    with h5py.File(path / "images.h5", "w") as file:
        file["images"] = np.random.default_rng(0).integers(0, 256, (ROWS, 32, 32, 3), np.uint8)
        file["labels"] = np.arange(ROWS)
    return path


def _run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [*COMMAND, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


# What needs no cluster


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """The extra is named."""
    # What Python takes for a package that is not installed.
    monkeypatch.setitem(sys.modules, "ray", None)
    message = r"^--ray needs Ray: pip install 'h5feed-server\[ray\]'$"
    with pytest.raises(BadParameter, match=message), connected("auto"):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("serve . --ray auto --uds x.sock", "--uds cannot be combined with --ray"),
        ("serve . --registry-port 1", "--registry-port needs --ray"),
        ("serve . --ray ray://head:10001 --registry-port 0", "Ray Client is not supported"),
        ("serve . --ray somewhere --registry-port 0", "neither 'auto' nor HOST:PORT"),
        ("serve . --ray 127.0.0.1:1 --registry-port 0", "no cluster listens there (Connection refused)"),
        ("serve . --ray auto --tls-cert a.pem", "--tls-cert and --tls-key must be given together"),
        ("serve . --ray auto --workers 0", "--workers 0: must be greater than or equal to 1"),
        ("build s3://bucket/a -o b.h5 --ray auto", "pass paths that all nodes share"),
        ("build a -o b.h5 --ray somewhere", "neither 'auto' nor HOST:PORT"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path: Path, arguments: str, message: str) -> None:
    """Each is refused before anything begins, with the reason."""
    done = SERVERS.run(arguments.split(), H5FEED_CACHE_DIR=str(tmp_path), H5FEED_HOST="127.0.0.1")
    assert done.returncode in (1, 2)
    assert message in done.stderr and "Traceback" not in done.stderr


def test_all_settings_reach_the_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether they come from flags, the environment or a file, each server computes the same settings."""
    file = tmp_path / "settings"
    file.write_text("H5FEED_MAX_ROWS=10\nH5FEED_OPEN_FILES=7\nH5FEED_DATA_DIR=elsewhere\n")
    parser = argparse.ArgumentParser()
    add_serve(parser.add_subparsers())
    flags = "--workers 3 --token-file tokens --follow-links --access-log --log-format json --root-path /behind --port 0"
    options = parser.parse_args(["serve", "data", *flags.split(), "--env-file", str(file), "--cache-dir", "cache"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("H5FEED_TOKENS", "secret")
    monkeypatch.setenv("H5FEED_READERS", "5")
    monkeypatch.setenv("H5FEED_OPEN_FILES", "8")
    monkeypatch.setenv("H5FEED_PUBLISHED_ON", "127.0.0.1:9")
    settings, *_ = settings_of(options)
    environment = environment_of(options, settings)
    for name in [name for name in os.environ if name.startswith("H5FEED_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir("/")
    expected = settings.model_dump() | {
        "token_file": tmp_path / "tokens",
        "cache_dir": tmp_path / "cache",
        # That of the machine that asks for the servers; an argument.
        "published_on": "",
        "data_dir": Path("data"),
    }
    assert Settings().model_dump() == expected
    assert (settings.workers, settings.open_files, settings.max_rows, settings.readers) == (3, 8, 10, 5)


@pytest.mark.parametrize(
    ("host", "announced", "listed"),
    [
        ("0.0.0.0", "http://127.0.0.1:8000", "http://10.0.0.4:8000"),
        ("::", "http://[::1]:8000", "http://10.0.0.4:8000"),
        ("127.0.0.1", "http://127.0.0.1:4321", "http://127.0.0.1:4321"),
        ("gpu-4", "http://gpu-4:8000", "http://10.0.0.4:8000"),
        # Certificates are for names.
        ("0.0.0.0", "https://127.0.0.1:8000", "https://gpu-4:8000"),
    ],
)
def test_where_clients_reach_a_node(host: str, announced: str, listed: str) -> None:
    """What a server announces to its own machine is listed as others reach it."""
    node = Node("f00", "10.0.0.4", "gpu-4", 8)
    assert url_of(host, node, ServerState(announced, True, "")) == listed


def _until_ready(server: NodeServer) -> ServerState:
    states: list[ServerState] = []

    def is_ready() -> bool:
        states.append(server.report())
        return states[-1].is_ready

    wait_until(is_ready)
    return states[-1]


def _server_processes() -> list[psutil.Process]:
    """The server processes below this one."""
    return [one for one in psutil.Process().children(recursive=True) if "h5feed_server.cli" in " ".join(one.cmdline())]


def test_a_server_that_is_killed_is_started_again(data: Path, tmp_path: Path) -> None:
    """The actor notices, and `stop` leaves no process."""
    from h5feed_server import __version__

    environment = {"H5FEED_PORT": "0", "H5FEED_CACHE_DIR": str(tmp_path)}
    server = NodeServer(__version__, ["serve", str(data)], environment)
    try:
        first = _until_ready(server).url
        processes = _server_processes()
        assert httpx.get(f"{first}/v1/datasets").json()["total"] == 1
        processes[0].kill()
        wait_until(lambda: not server.report().is_ready)
        assert _until_ready(server).url
        processes += _server_processes()
    finally:
        server.stop()
    wait_until(lambda: not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE])


def test_a_server_behind_tls_becomes_ready(data: Path, tmp_path: Path) -> None:
    """The actor asks its own server, whose certificate is for another name."""
    from h5feed_server import __version__

    issued = Authority(tmp_path / "authority").issue("gpu-4")
    command = ["serve", str(data), "--tls-cert", str(issued.cert), "--tls-key", str(issued.key)]
    server = NodeServer(__version__, command, {"H5FEED_PORT": "0", "H5FEED_CACHE_DIR": str(tmp_path / "cache")})
    try:
        assert _until_ready(server).url.startswith("https://127.0.0.1:")
    finally:
        server.stop()


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    """The last lines of its log are the reason, and failures are counted."""
    from h5feed_server import __version__

    environment = {"H5FEED_PORT": "0", "H5FEED_CACHE_DIR": str(tmp_path)}
    server = NodeServer(__version__, ["serve", str(tmp_path / "nothing")], environment)
    try:
        wait_until(lambda: server.report().failures > 0)
        assert "nothing does not exist" in server.report().why
    finally:
        server.stop()
    with pytest.raises(RuntimeError, match=r"not 0\.0\.0: install the same"):
        NodeServer("0.0.0", [], {})


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux ends it")
def test_a_server_ends_with_the_process_of_its_actor(data: Path, tmp_path: Path) -> None:
    """SIGKILL gives the actor no chance to end what it has started."""
    script = (
        "import sys, time; from h5feed_server import __version__; "
        "from h5feed_server.cluster.node_server import NodeServer\n"
        "server = NodeServer(__version__, ['serve', sys.argv[1]], {'H5FEED_PORT': '0', 'H5FEED_WORKERS': '2'})\n"
        "while not server.report().is_ready: time.sleep(0.1)\n"
        "print('ready', flush=True); time.sleep(300)"
    )
    environment = {**os.environ, "H5FEED_CACHE_DIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(data)], env=environment, stdout=subprocess.PIPE, text=True
    ) as actor:
        assert actor.stdout is not None and actor.stdout.readline() == "ready\n"
        processes = psutil.Process(actor.pid).children(recursive=True)
        assert len(processes) >= 3
        actor.kill()
        wait_until(lambda: not [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE])


# On a cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster whose head has no CPUs, and one further node."""
    pytest.importorskip("ray")
    from tests.support.ray_cluster import RayCluster

    cluster = RayCluster()
    try:
        cluster.first = cluster.add()  # type: ignore[attr-defined]
        yield cluster
    finally:
        cluster.close()


@pytest.fixture
def second(cluster: Any) -> Iterator[Any]:
    """A further node, which a test may remove."""
    node = cluster.add()
    yield node
    with contextlib.suppress(Exception):
        cluster.remove(node)


class Served:
    """``serve --ray``, and what it prints."""

    def __init__(self, data: Path, cluster: Any, *options: str, **environment: str) -> None:
        command = [*COMMAND, "serve", str(data), "--ray", cluster.address, "--port", "0", "--registry-port", "0"]
        self.process = subprocess.Popen(
            [*command, *options], env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(f"h5feed serves {data} at servers+http://"), line
        self.url = line.split()[-1]

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _servers_on(node: Any) -> list[psutil.Process]:
    from tests.support.ray_cluster import processes_of

    found = []
    for process in processes_of(node):
        with contextlib.suppress(psutil.Error):
            if "h5feed_server.cli" in process.cmdline():
                found.append(process)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_server_on_each_node(cluster: Any, second: Any, data: Path, tmp_path: Path) -> None:
    """All nodes serve; one that is lost in mid-epoch costs no row, and one that joins serves, too. All need the token.
    When the command is killed, no server is left.
    """
    from tests.support.ray_cluster import alive

    options = ("--host", "127.0.0.1", "--workers", "2", "--cache-dir", str(tmp_path))
    with Served(data, cluster, *options, H5FEED_TOKENS="secret") as served:
        with pytest.raises(Unauthorized), h5feed.connect(served.url, deadline=60) as feed:
            feed.datasets()
        with h5feed.connect(served.url, token="secret", deadline=60) as feed:

            def count() -> int:
                feed.datasets()
                return len(feed.replicas)

            # The head serves as well, although it lends no CPUs.
            wait_until(lambda: count() == 3, 120)
            train = feed["images"].loader(batch_size=BATCH, shuffle=True, readahead=1 << 14)
            processes = _servers_on(second)
            # A supervisor and two workers.
            assert len(processes) == 3

            def epoch(at_step: Callable[[int], None] = lambda step: None) -> None:
                rows: list[int] = []
                for step, (_, labels) in enumerate(train):
                    rows += np.asarray(labels).tolist()
                    at_step(step)
                assert sorted(rows) == list(range(ROWS))

            epoch(lambda step: cluster.remove(second) if step == 20 else None)
            wait_until(lambda: not alive(processes))
            wait_until(lambda: count() == 2, 120)
            epoch()
            third = cluster.add()
            wait_until(lambda: count() == 3, 120)
            epoch()
        processes = [*_servers_on(cluster.first), *_servers_on(third)]
        assert len(processes) == 6
        assert served.end(signal.SIGKILL) == -signal.SIGKILL
        wait_until(lambda: not alive(processes), 120)
        cluster.remove(third)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_data_that_no_node_has(cluster: Any, tmp_path: Path) -> None:
    """The command ends, with the reason that the nodes give."""
    command = ("serve", str(tmp_path / "nothing"), "--ray", cluster.address, "--port", "0", "--registry-port", "0")
    done = _run(*command, "--host", "127.0.0.1", "--cache-dir", str(tmp_path))
    assert done.returncode == 1
    assert "nothing does not exist" in done.stderr and "no node can serve" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_servers_end_with_the_command(cluster: Any, data: Path, tmp_path: Path, number: int) -> None:
    """It ends well, and all servers have ended when it has."""
    from tests.support.ray_cluster import alive

    with Served(data, cluster, "--host", "127.0.0.1", "--cache-dir", str(tmp_path)) as served:
        wait_until(lambda: len(_servers_on(cluster.first)) == 2)
        processes = _servers_on(cluster.first)
        assert served.end(number) == 0
        wait_until(lambda: not alive(processes))


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,200 JPEGs of two classes, and one that is none."""
    root = tmp_path_factory.mktemp("source") / "pets"
    kinds = [encoded(photograph(number, 200, 300), quality=90) for number in range(8)]
    for number in range(1200):
        folder = root / ("cat" if number % 3 else "dog")
        folder.mkdir(parents=True, exist_ok=True)
        # What follows the end of an image is ignored, but makes the files different.
        (folder / f"{number:04d}.jpg").write_bytes(kinds[number % 8] + number.to_bytes(4, "big"))
    (root / "cat" / "broken.jpg").write_bytes(b"no image")
    return root


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


class Building:
    """Builds of the same source, here and on the cluster."""

    def __init__(self, pets: Path, folder: Path, cluster: Any, *options: str) -> None:
        self.here, self.there = folder / "here", folder / "there"
        for one in (self.here, self.there):
            one.mkdir()
        shared = ["--shards", "6", "--val", "0.1", "--size", "160", "--allow-missing", *options]
        self._local = ["build", str(pets), "-o", str(self.here / "pets.h5"), *shared]
        command = ["build", str(pets), "-o", str(self.there / "pets.h5"), *shared, "--ray", cluster.address]
        self.command = [*COMMAND, *command]

    @contextlib.contextmanager
    def begun(self) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()

    def check(self) -> None:
        """The files are the same, to the last byte, and nothing is left beside them."""
        done = _run(*self._local)
        assert done.returncode == 0, done.stderr
        assert len(_digests(self.here)) == 7
        assert _digests(self.there) == _digests(self.here)


def _builders_on(node: Any, folder: Path) -> list[psutil.Process]:
    """The processes of a node that have an unfinished file open."""
    from tests.support.ray_cluster import has_open, processes_of

    return [process for process in processes_of(node) if has_open(process, folder)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_node_is_lost_while_it_builds(
    cluster: Any, second: Any, pets: Path, tmp_path: Path, compression: str
) -> None:
    """Both nodes take part; another makes the rest of the lost one's file. The bytes are those of a local build."""
    from tests.support.ray_cluster import alive

    building = Building(pets, tmp_path, cluster, "--compression", compression)
    with building.begun() as process:
        wait_until(lambda: bool(_builders_on(second, building.there)), 120)
        wait_until(lambda: bool(_builders_on(cluster.first, building.there)), 120)
        builders = [*_builders_on(second, building.there), *_builders_on(cluster.first, building.there)]
        assert process.poll() is None
        cluster.remove(second)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert re.search(r"is made by another process", output), output
    building.check()
    wait_until(lambda: not alive(builders))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_build_that_is_interrupted_is_resumed(cluster: Any, pets: Path, tmp_path: Path) -> None:
    """Ctrl-C ends the builders of all nodes, and the same command makes the rest."""
    from tests.support.ray_cluster import alive

    building = Building(pets, tmp_path, cluster)
    journal = building.there / ".pets.h5.journal"
    with building.begun() as process:
        wait_until(lambda: bool(_builders_on(cluster.first, building.there)), 120)
        builders = _builders_on(cluster.first, building.there)
        begun = time.monotonic()
        # Until something is noted, which is every two seconds: the journal is reserved with zeros.
        wait_until(lambda: len(journal.read_bytes().rstrip(b"\0")) > 2000, 120)
        assert process.poll() is None, f"it has ended after {time.monotonic() - begun:.1f} s"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "to resume, run the same command again" in output, output
    wait_until(lambda: not alive(builders))
    with building.begun() as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0 and "of them by an earlier run" in output, output
    building.check()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_errors_are_those_of_a_build_here(cluster: Any, pets: Path, tmp_path: Path) -> None:
    """A broken row with --strict ends the build, with the same message."""
    building = Building(pets, tmp_path, cluster, "--strict")
    with building.begun() as process:
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "cat/broken.jpg: it is not an image in a known format" in output
    assert not list(building.there.iterdir())
