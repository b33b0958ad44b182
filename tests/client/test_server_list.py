"""A list of servers that come and go: the client follows it, and each row comes exactly once."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import BadAnswer, BadParameter, ConnectionFailed, Unauthorized
from h5feed.net import refreshing
from h5feed.net.client import Client
from h5feed_server.cluster.server_list import ServerListPublisher
from h5feed_server.serve.worker import Tls
from h5feed_server.settings import Settings
from h5feed_server.tokens.keyring import Keyring

from tests.support.authority import Authority
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

from .test_failover import GOOD, scripted

ROWS = 256


class Published:
    """A list that tests serve."""

    def __init__(self, *tokens: str, port: int = 0, tls: Tls | None = None) -> None:
        listener = socket.create_server(("127.0.0.1", port))
        self.port = listener.getsockname()[1]
        settings = Settings(tokens=",".join(tokens))
        self._publisher = ServerListPublisher(settings, Keyring(tokens), listener, tls)
        self.page = f"{'https' if tls else 'http'}://{'localhost' if tls else '127.0.0.1'}:{self.port}/v1/servers"
        self.url = f"servers+{self.page.removesuffix('/v1/servers')}"
        self._is_open = True

    def set(self, *urls: str) -> None:
        self._publisher.urls = urls

    def close(self) -> None:
        if self._is_open:
            self._publisher.close()
        self._is_open = False


@pytest.fixture
def publish() -> Iterator[Callable[..., Published]]:
    """Serves lists that end with the test."""
    begun: list[Published] = []

    def start(*tokens: str, port: int = 0, tls: Tls | None = None) -> Published:
        begun.append(Published(*tokens, port=port, tls=tls))
        return begun[-1]

    yield start
    for one in begun:
        one.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists are read again with every request that comes 50 ms after the last look-up."""
    monkeypatch.setattr(refreshing, "LOOK_UP_SECONDS", 0.05)
    monkeypatch.setattr(refreshing, "SOON_SECONDS", 0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows whose labels are their numbers."""
    path = tmp_path_factory.mktemp("listed")
    with h5py.File(path / "images.h5", "w") as file:
        file["images"] = np.random.default_rng(0).integers(0, 256, (ROWS, 32, 32, 3), np.uint8)
        file["labels"] = np.arange(ROWS)
    return path


@pytest.mark.usefixtures("quick")
def test_servers_come_and_go_in_mid_epoch(
    serve: Callable[..., ServerProcess], publish: Callable[..., Published], data: Path
) -> None:
    """A server that joins the list gets requests, one that is killed and leaves it is forgotten; no row is lost."""
    first, second = serve(data), serve(data)
    published = publish()
    published.set(first.url)
    with h5feed.connect(published.url, deadline=60) as feed:
        train = feed["images"].loader(batch_size=4, shuffle=True, readahead=1 << 14)

        def epoch(at_step: Callable[[int], None] = lambda step: None) -> None:
            rows: list[int] = []
            for step, (_, labels) in enumerate(train):
                rows += np.asarray(labels).tolist()
                at_step(step)
            assert sorted(rows) == list(range(ROWS))

        epoch(lambda step: published.set(first.url, second.url) if step == 10 else None)

        def both_are_used() -> bool:
            epoch()
            return [replica.requests > 0 for replica in feed.replicas] == [True, True]

        wait_until(both_are_used)

        def lose(step: int) -> None:
            if step == 10:
                first.kill()
                published.set(second.url)

        epoch(lose)

        def one_is_left() -> bool:
            epoch()
            return [replica.url for replica in feed.replicas] == [second.url]

        wait_until(one_is_left)


@pytest.mark.usefixtures("quick")
def test_a_list_that_is_lost_or_empty_changes_nothing(publish: Callable[..., Published]) -> None:
    """The servers of the last list that named any are used, whatever happens to it."""
    with scripted(lambda n: GOOD) as server:
        published = publish()
        published.set(server.url)
        client = Client(published.url, deadline=30)
        client.json("/x")
        published.set()
        for _ in range(3):
            time.sleep(0.1)
            client.json("/x")
        published.close()
        for _ in range(3):
            time.sleep(0.1)
            client.json("/x")
        assert [replica.url for replica in client.replicas] == [server.url]
        client.close()


def test_a_client_waits_for_the_list_and_for_its_first_server(publish: Callable[..., Published]) -> None:
    """A job that starts before the cluster serves waits, within its deadline."""
    held = socket.create_server(("127.0.0.1", 0))
    port = held.getsockname()[1]
    held.close()
    with scripted(lambda n: GOOD) as server:
        client = Client(f"servers+http://127.0.0.1:{port}", deadline=60)
        answers: list[object] = []
        asking = threading.Thread(target=lambda: answers.append(client.json("/x")))
        asking.start()
        published = publish(port=port)
        time.sleep(0.2)
        assert asking.is_alive()
        published.set(server.url)
        asking.join(60)
        assert answers == [{"ok": True}]
        client.close()


def test_without_servers_the_error_says_why(publish: Callable[..., Published]) -> None:
    """An empty list and one that nobody serves are told apart when the deadline has passed."""
    published = publish()
    for expected in ("is empty", "cannot read the list of servers"):
        client = Client(published.url, deadline=1.5)
        with pytest.raises(ConnectionFailed, match=expected):
            client.json("/x")
        client.close()
        published.close()


def test_a_list_wants_the_token_of_the_servers(publish: Callable[..., Published]) -> None:
    """Without a token, or with a wrong one, the client learns no server, and says so at once."""
    with scripted(lambda n: GOOD) as server:
        published = publish("secret")
        published.set(server.url)
        refused = httpx.get(published.page)
        assert refused.status_code == 401 and refused.json()["code"] == "unauthorized"
        for token in (None, "wrong"):
            client = Client(published.url, token=token, deadline=60)
            with pytest.raises(Unauthorized, match="requires a token"):
                client.json("/x")
            client.close()
        client = Client(published.url, token="secret", deadline=60)
        assert client.json("/x") == {"ok": True}
        client.close()


def test_a_token_that_is_replaced_before_the_first_list(
    publish: Callable[..., Published], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the token's file has another one by now, it is tried."""
    (tmp_path / "token").write_text("old")
    monkeypatch.setenv("H5FEED_TOKEN_FILE", str(tmp_path / "token"))
    with scripted(lambda n: GOOD) as server:
        published = publish("new")
        published.set(server.url)
        client = Client(published.url, deadline=60)
        (tmp_path / "token").write_text("new")
        assert client.json("/x") == {"ok": True}
        client.close()


def test_a_token_does_not_go_from_tls_to_servers_without(publish: Callable[..., Published], tmp_path: Path) -> None:
    """What is listed behind https must be https, too."""
    authority = Authority(tmp_path / "authority")
    issued = authority.issue("localhost")
    with scripted(lambda n: GOOD) as server:
        published = publish("secret", tls=Tls(str(issued.cert), str(issued.key)))
        published.set(server.url)
        client = Client(published.url, token="secret", verify=str(authority.cert), deadline=60)
        with pytest.raises(BadAnswer, match="does not begin with https://"):
            client.json("/x")
        assert not server.asked
        client.close()


@pytest.mark.parametrize("body", [b"[]", b'{"servers": [1]}', b"<html>", b'{"servers": ["unix:///run/x.sock"]}'])
def test_what_is_no_list_is_an_error(body: bytes) -> None:
    """Another service at the address is not taken for an empty list."""
    with scripted(lambda n: (200, {}, body)) as other:
        client = Client(f"servers+{other.url}", deadline=60)
        with pytest.raises(BadAnswer):
            client.json("/x")
        client.close()


def test_more_servers_than_a_client_uses_are_shared_among_clients(publish: Callable[..., Published]) -> None:
    """Of a long list, each client takes some, and keeps them."""
    published = publish()
    urls = [f"http://127.0.0.1:{port}" for port in range(10_000, 10_100)]
    published.set(*urls)
    chosen = []
    for _ in range(2):
        client = Client(published.url, deadline=60)
        client._look_up(time.monotonic() + 60)
        chosen.append({replica.url for replica in client.replicas})
        client.close()
    assert [len(some) for some in chosen] == [refreshing.MAX_KNOWN] * 2
    assert chosen[0] != chosen[1] and chosen[0] | chosen[1] <= set(urls)


def test_the_list_has_the_limits_of_a_server(publish: Callable[..., Published]) -> None:
    """Unknown paths and host names get a problem; the list itself is plain JSON."""
    published = publish()
    published.set("http://127.0.0.1:1")
    assert httpx.get(published.page).json() == {"servers": ["http://127.0.0.1:1"]}
    assert httpx.get(published.page + "x").json()["code"] == "not_found"
    assert httpx.get(published.page, headers={"host": "evil.example"}).json()["code"] == "host_not_allowed"
    assert httpx.get(published.page, headers={"x": "y" * 40_000}).status_code == 431


def test_a_wrong_scheme_is_refused() -> None:
    """A list is read over HTTP alone."""
    with pytest.raises(BadParameter, match=r"servers\+http"):
        Client("servers+ray://127.0.0.1:1")
