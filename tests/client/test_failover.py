"""Several servers of the same files: shared out, failed over, left out and tried again; and errors that say which."""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypedDict

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.errors import BadParameter, ConnectionFailed, DatasetNotFound, Overloaded, Preparing, RevisionChanged
from h5feed.net.balancing import FIRST_REST
from h5feed.net.cancellation import Cancellation
from h5feed.net.client import Client
from h5feed.net.retries import _seconds

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until


class Order(TypedDict):
    """Options of the batches that these tests read."""

    batch_size: int
    shuffle: bool
    seed: int
    fields: list[str]


ORDER: Order = {"batch_size": 2, "shuffle": True, "seed": 3, "fields": ["x"]}


def test_one_of_two_killed_in_mid_epoch(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """SIGKILL to one server: the other goes on, each row once, in order, the same bytes; back again, it is used."""
    first, second = serve(folder, "--workers", "1"), serve(folder, "--workers", "1")
    with h5py.File(folder / "tall.h5") as file:
        expected = file["x"][...]
    with h5feed.connect(f"{first.url},{second.url}", deadline=60) as feed:
        tall = feed["tall"]
        order = [batch.rows.tolist() for batch in tall.batches(**ORDER)]
        seen: list[list[int]] = []
        for number, batch in enumerate(tall.batches(**ORDER, readahead=400_000)):
            np.testing.assert_array_equal(batch["x"], expected[batch.rows])
            seen.append(batch.rows.tolist())
            if number == 4:
                first.kill()
        assert seen == order
        assert sorted(row for rows in seen for row in rows) == list(range(40))
        one, two = feed._client._servers
        assert one.failures > 0 and two.failures == 0
        first.start()

        def used_again() -> bool:
            tall.batch(0, **ORDER)
            return one.failures == 0

        wait_until(used_again, 90)


class Scripted(BaseHTTPRequestHandler):
    """Answers what its server's `script` says: (status, headers, body); keeps when it was asked, and for what."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, ScriptedServer)
        server.asked.append((time.monotonic(), self.path))
        status, headers, body = server.script(len(server.asked))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "content-length" not in headers:
            self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = "content-length" in headers

    def log_message(self, *about: object) -> None:
        pass


Answer = tuple[int, dict[str, str], bytes]
"""Status, headers, body."""

Script = Callable[[int], Answer]


class ScriptedServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, script: Script) -> None:
        super().__init__(("127.0.0.1", 0), Scripted)
        self.script = script
        self.asked: list[tuple[float, str]] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def scripted(script: Script) -> Iterator[ScriptedServer]:
    server = ScriptedServer(script)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def overloaded(retry_after: str) -> Answer:
    return 503, {"retry-after": retry_after}, b'{"code": "overloaded", "detail": "no memory"}'


GOOD: Answer = (200, {}, b'{"ok": true}')


@pytest.fixture
def dead_url() -> Iterator[str]:
    """An address at which nobody listens, and nobody else will meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


def test_all_dead_is_one_error_that_names_each(dead_url: str) -> None:
    """When the deadline has passed, every address and what is wrong there."""
    with scripted(lambda n: (502, {}, b"")) as ill:
        client = Client(f"{dead_url},{ill.url}", deadline=1.5)
        with pytest.raises(ConnectionFailed) as raised:
            client.json("/x")
        assert "deadline of 1.5 s" in "".join(raised.value.__notes__)
        assert dead_url in str(raised.value) and ill.url in str(raised.value)
        assert "refused" in str(raised.value) and "502" in str(raised.value)
        client.close()


def test_requests_are_shared_out() -> None:
    """Requests one after the other go round; those at the same time go to the server with the fewest."""
    slow = threading.Event()

    def wait(number: int) -> tuple[int, dict[str, str], bytes]:
        slow.wait(100)
        return GOOD

    with scripted(lambda n: GOOD) as one, scripted(lambda n: GOOD) as two, scripted(wait) as three:
        client = Client(f"{one.url},{two.url}", deadline=60)
        for _ in range(20):
            client.json("/x")
        assert len(one.asked) == len(two.asked) == 10
        client = Client(f"{one.url},{three.url}", deadline=60)
        threads = [threading.Thread(target=client.json, args=("/x",)) for _ in range(6)]
        for thread in threads:
            thread.start()
            # When the next one comes, all others have their answers, or wait for the one that is slow.
            wait_until(lambda: sum(begun.is_alive() for begun in threads) <= len(three.asked))
        assert len(three.asked) == 1 and len(one.asked) == 10 + 5
        slow.set()
        for thread in threads:
            thread.join()
        client.close()


def test_who_waits_for_a_server_is_told(dead_url: str, caplog: pytest.LogCaptureFixture) -> None:
    """After a moment, and once for all threads: nothing hangs."""
    client, stop = Client(dead_url, deadline=60), threading.Event()

    def ask() -> None:
        with contextlib.suppress(ConnectionFailed):
            client.body("/v1/x", max_bytes=1000, cancelled=stop)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: bool(caplog.records))
    stop.set()
    for thread in threads:
        thread.join(60)
    client.close()
    (record,) = caplog.records
    assert record.levelname == "WARNING" and dead_url in record.message
    assert re.search(r"; retrying for up to \d+ s$", record.message)


def test_a_dead_server_is_left_out_longer_each_time(dead_url: str) -> None:
    """While one server is dead the other answers at once, and the dead one is hardly asked."""
    with scripted(lambda n: GOOD) as good:
        client = Client(f"{dead_url},{good.url}", deadline=60)
        began = time.monotonic()
        for _ in range(200):
            assert client.json("/x") == {"ok": True}
        elapsed = time.monotonic() - began
        dead = next(iter(client._servers))
        # After the n-th failure it rests for half of first · 2ⁿ at least.
        assert 1 <= dead.failures <= 1 + math.log2(1 + elapsed / FIRST_REST)
        client.close()


def test_a_server_that_hangs_is_looked_at_before_it_is_trusted() -> None:
    """A server that was stopped costs one timeout; later looks at it are short, whoever waits for a batch."""
    release = threading.Event()

    def hang(number: int) -> tuple[int, dict[str, str], bytes]:
        release.wait(100)
        return GOOD

    with scripted(hang) as hung, scripted(lambda n: GOOD) as good:
        client = Client(f"{hung.url},{good.url}", timeout=1.0, deadline=60)

        def is_looked_at_twice() -> bool:
            assert client.json("/x") == {"ok": True}
            return len(hung.asked) >= 3

        wait_until(is_looked_at_twice)
        assert [path for _, path in hung.asked] == ["/x", "/healthz", "/healthz"]
        release.set()
        client.close()


def test_one_of_two_is_overloaded() -> None:
    """The other is asked at once, and the overloaded one not before the time that it named."""
    with scripted(lambda n: overloaded("2") if n == 1 else GOOD) as busy, scripted(lambda n: GOOD) as idle:
        client = Client(f"{busy.url},{idle.url}", deadline=60)

        def is_asked_again() -> bool:
            client.json("/x")
            return len(busy.asked) > 1

        wait_until(is_asked_again)
        assert busy.asked[1][0] - busy.asked[0][0] >= 2.0
        assert idle.asked[0][0] < busy.asked[1][0]
        client.close()


def test_retry_after_is_honoured() -> None:
    """A lone server that is overloaded is asked again when it said; too late for the deadline: an error at once."""
    with scripted(lambda n: overloaded("1") if n == 1 else GOOD) as server:
        client = Client(server.url, deadline=60)
        assert client.json("/x") == {"ok": True}
        assert server.asked[1][0] - server.asked[0][0] >= 1.0
        client.close()
    with scripted(lambda n: overloaded("86400")) as server:
        client = Client(server.url, deadline=60)
        with pytest.raises(Overloaded) as raised:
            client.json("/x")
        assert len(server.asked) == 1 and "86400" in "".join(raised.value.__notes__)
        client.close()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("Wed, 21 Oct 2015 07:28:30 GMT", 30.0),
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("nan", None),
        ("inf", None),
        ("soon", None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Fri, 99 Foo 2015", None),
    ],
)
def test_forms_of_retry_after(header: str, seconds: float | None) -> None:
    """Seconds or a date, by the server's clock; what is neither counts as not said."""
    assert _seconds(header, "Wed, 21 Oct 2015 07:28:00 GMT") == seconds
    # Without one, by ours.
    assert _seconds(header, "") == (0.0 if "2015 07" in header else seconds)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_errors_that_pass_are_tried_again(status: int) -> None:
    """Also those of a proxy that says nothing but the status."""
    with scripted(lambda n: (status, {}, b"<html>") if n < 3 else GOOD) as server:
        client = Client(server.url, deadline=60)
        assert client.json("/x") == {"ok": True}
        assert len(server.asked) == 3
        client.close()


def test_truncated_bodies_are_tried_again() -> None:
    """A body shorter than announced is never taken for whole, with or without several servers."""
    short = (200, {"content-length": "500"}, b'{"ok": true}')
    with scripted(lambda n: short if n < 3 else GOOD) as server:
        client = Client(server.url, deadline=60)
        assert client.json("/x") == {"ok": True}
        assert len(server.asked) == 3
        client.close()


def test_other_errors_are_not_tried_again() -> None:
    """An error that will not pass comes at once, from the server that is named in it."""
    answer: Answer = (404, {}, b'{"code": "dataset_not_found", "detail": "no dataset nix"}')
    with scripted(lambda n: answer) as one, scripted(lambda n: answer) as two:
        client = Client(f"{one.url},{two.url}", deadline=60)
        with pytest.raises(DatasetNotFound, match=f"{one.url}|{two.url}"):
            client.json("/x")
        assert len(one.asked) + len(two.asked) == 1
        client.close()


def test_cancelling_ends_the_waiting() -> None:
    """A request whose owner has gone ends: in the wait for a retry, and while a server is silent."""
    with scripted(lambda n: overloaded("60")) as server:
        _assert_cancelled(server.url, lambda: wait_until(lambda: bool(server.asked)))
    with socket.create_server(("127.0.0.1", 0)) as silent, contextlib.ExitStack() as connections:
        silent.settimeout(60)

        def hear() -> None:
            connected = connections.enter_context(silent.accept()[0])
            connected.settimeout(60)
            assert connected.recv(1 << 16).endswith(b"\r\n\r\n")

        _assert_cancelled(f"http://127.0.0.1:{silent.getsockname()[1]}", hear)


def _assert_cancelled(url: str, wait_for_request: Callable[[], None]) -> None:
    client = Client(url, timeout=200, deadline=200)
    cancelled = Cancellation()
    errors: list[Exception] = []

    def ask() -> None:
        try:
            client.body("/x", max_bytes=1000, cancelled=cancelled)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    wait_for_request()
    # Some time to begin to wait; where it has not, it is told before that.
    time.sleep(0.1)
    cancelled.set()
    thread.join(50)
    assert not thread.is_alive() and len(errors) == 1
    client.close()


def test_servers_with_different_files(serve: Callable[..., ServerProcess], folder: Path, tmp_path: Path) -> None:
    """One error that names both servers and both revisions, before any row of the wrong one is delivered."""
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(folder / "tall.h5", other)
    with h5py.File(other / "tall.h5", "r+") as file:
        file["x"][3, 4, 5] += 1
    one, two = serve(folder), serve(other)
    revisions = [h5feed.connect(server.url)["tall"].revision for server in (one, two)]
    assert revisions[0] != revisions[1]
    with h5feed.connect(f"{one.url},{two.url}", deadline=60) as feed:
        tall = feed["tall"]
        with pytest.raises(RevisionChanged) as raised:
            for _ in range(4):
                tall.batch(0, **ORDER)
    said = str(raised.value)
    assert all(word in said for word in (one.url, two.url, *revisions, "same files"))


def test_a_changed_file_is_one_error_on_all_servers(
    serve: Callable[..., ServerProcess], folder: Path, tmp_path: Path
) -> None:
    """A file replaced for all servers under a running epoch: one error that says what to do."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(folder / "tall.h5", data)
    one, two = serve(data), serve(data)
    with h5feed.connect(f"{one.url},{two.url}", deadline=60) as feed:
        tall = feed["tall"]
        shutil.copy(folder / "tall.h5", tmp_path / "new.h5")
        with h5py.File(tmp_path / "new.h5", "r+") as file:
            file["x"][...] = 0
        os.replace(tmp_path / "new.h5", data / "tall.h5")
        with pytest.raises(RevisionChanged, match="again"):
            for _ in range(100):
                for batch in tall.batches(**ORDER):
                    assert batch.revision == tall.revision
                time.sleep(0.1)
        assert feed["tall"].batch(0, **ORDER)["x"].max() == 0


def test_addresses() -> None:
    """Commas between addresses, spaces allowed, one named twice is one; a comma in a path stays; rubbish is named."""
    client = Client("http://a:1, http://b:2,http://a:1,unix:///run/x,y.sock")
    assert [server.url for server in client._servers] == ["http://a:1", "http://b:2", "unix:///run/x,y.sock"]
    assert client.url == "http://a:1,http://b:2,unix:///run/x,y.sock"
    with pytest.raises(BadParameter, match="ftp://b"):
        Client("http://a:1,ftp://b")
    secret = Client("http://me:word@a:1")
    assert "word" not in secret.url


def test_hung_server_process(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """SIGSTOP to one server in mid-epoch: its requests time out and go to the other."""
    first, second = serve(folder, "--workers", "1"), serve(folder, "--workers", "1")
    pids = [first.process.pid, *first.worker_pids()]
    with h5feed.connect(f"{first.url},{second.url}", timeout=1.0, deadline=60) as feed:
        rows: list[int] = []
        try:
            for number, batch in enumerate(feed["tall"].batches(**ORDER, readahead=400_000)):
                rows += batch.rows.tolist()
                if number == 4:
                    for pid in pids:
                        os.kill(pid, signal.SIGSTOP)
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
    assert sorted(rows) == list(range(40))


def test_who_gives_up_tells_what_the_server_told() -> None:
    """Its last reason, though the last answer never came; and where it went away meanwhile, both."""
    reason = (503, {"retry-after": "0"}, b'{"code": "preparing", "detail": "3 files are left"}')
    held = threading.Event()

    def hangs(number: int) -> tuple[int, dict[str, str], bytes]:
        if number > 1:
            held.wait(60)
        return reason

    with scripted(hangs) as server:
        with pytest.raises(Preparing, match="3 files are left"):
            Client(server.url, deadline=1.5).json("/v1/x")
        held.set()
    gone = (200, {"content-length": "9"}, b"{}")
    both = "before that it returned: 3 files are left"
    with scripted(lambda n: reason if n == 1 else gone) as server, pytest.raises(ConnectionFailed, match=both):
        Client(server.url, deadline=1.5).json("/v1/x")
