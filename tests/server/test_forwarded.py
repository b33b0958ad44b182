"""Behind a reverse proxy: path prefixes, forwarded headers, several listeners, other ASGI servers, systemd."""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import Unauthorized
from h5feed_server.main import create_app
from h5feed_server.settings import OWN_PATHS, Settings, checked_prefix
from starlette.routing import BaseRoute

from tests.support.authority import Authority
from tests.support.data_folder import write_data_folder
from tests.support.proxies import ReverseProxy
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

PREFIX = "/team/h5feed"
TOKEN = "a-token-of-a-test"


@pytest.fixture(scope="module")
def below(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a prefix, a token, and this machine as trusted proxy."""
    process = ServerProcess(
        folder,
        tmp_path_factory.mktemp("cache"),
        H5FEED_TOKENS=TOKEN,
        H5FEED_ROOT_PATH=PREFIX,
        H5FEED_TRUSTED_PROXIES="127.0.0.1",
    )
    yield process
    assert process.stop() == 0


def _links(page: str) -> set[str]:
    return {link for link in re.findall(r'(?:href|src|action|srcset)="([^"#?][^"]*)"', page) if ":" not in link}


@pytest.mark.parametrize("asked", [PREFIX, ""])
def test_pages_below_a_prefix(below: ServerProcess, asked: str) -> None:
    """All links, the cookie, redirects and code examples have the prefix, whether or not the proxy strips it."""
    with httpx.Client(base_url=below.url, timeout=60, headers={"accept": "text/html"}) as browser:
        form = browser.get(f"{asked}/datasets/mixed")
        assert form.status_code == 303 and form.headers["location"].startswith(f"{PREFIX}/sign-in?")
        signed = browser.post(f"{asked}/sign-in", data={"token": TOKEN, "next": f"{PREFIX}/"})
        assert signed.headers["location"] == f"{PREFIX}/" and f"Path={PREFIX}/" in signed.headers["set-cookie"]
        cookie = {"cookie": signed.headers["set-cookie"].partition(";")[0]}
        for path in ("/", "/feed", "/datasets/mixed", "/datasets/mixed/rows", "/datasets/mixed/rows/0"):
            page = browser.get(asked + path, headers=cookie)
            assert page.status_code in (200, 202), path
            assert _links(page.text) and all(link.startswith(f"{PREFIX}/") for link in _links(page.text)), path
            codes = re.findall(r"http://127\.0\.0\.1:[0-9]+(/\S{0,12})", page.text)
            assert all(code.startswith(PREFIX) for code in codes), path
        assert f"{below.url}{PREFIX}" in page.text
        assert browser.get(f"{asked}/explorer/explorer.css").status_code == 200
        assert browser.get(f"{asked}/simple").headers["location"] == f"{PREFIX}/simple/"
        assert f"{below.url}{PREFIX}/simple/h5feed/" in browser.get(f"{asked}/simple/h5feed/requirements.txt").text
        for path in ("/docs", "/redoc"):
            assert not [link for link in _links(browser.get(asked + path).text) if link.startswith("/")]
        assert browser.get(f"{asked}/openapi.json").json()["servers"] == [{"url": PREFIX}]


def _assert_same_batches(one: h5feed.Feed, other: h5feed.Feed) -> None:
    order: dict[str, Any] = {"batch_size": 7, "shuffle": True}
    for left, right in zip(one["tall"].batches(**order), other["tall"].batches(**order), strict=True):
        for name in right:
            np.testing.assert_array_equal(left[name], right[name])


def test_the_client_below_a_prefix(below: ServerProcess, feed: h5feed.Feed) -> None:
    """Batches, statistics and jobs are the same as without a prefix."""
    with h5feed.connect(below.url + PREFIX, token=TOKEN, deadline=60) as other:
        _assert_same_batches(other, feed)
        assert other["mixed"].stats().rows == feed["mixed"].stats().rows


def test_headers_of_trusted_proxies(below: ServerProcess) -> None:
    """Code examples use the prefix, scheme and host from a trusted proxy. An invalid prefix is ignored."""
    said = {"x-forwarded-proto": "https", "x-forwarded-host": "feed.example, inner", "x-forwarded-prefix": "/a, /b/"}

    def lines(**changes: str) -> str:
        return httpx.get(f"{below.url}/simple/h5feed/requirements.txt", headers={**said, **changes}, timeout=60).text

    assert " https://feed.example/a/b/simple/h5feed/" in lines()
    for odd in ("//evil.example", "/a/../b", '/"><script>', "/v1", "a"):
        assert f" https://feed.example{PREFIX}/simple/" in lines(**{"x-forwarded-prefix": odd})
    assert " https://SERVER/a/b/simple/" in lines(**{"x-forwarded-host": "<b>"})


def test_headers_of_untrusted_proxies(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """Headers from other addresses have no effect. The host from a trusted proxy is checked like any other."""
    said = {"x-forwarded-proto": "https", "x-forwarded-host": "evil.example", "x-forwarded-prefix": "/evil"}
    server = serve(folder)
    text = httpx.get(f"{server.url}/simple/h5feed/requirements.txt", headers=said, timeout=60).text
    assert f" {server.url}/simple/" in text
    trusting = serve(folder, H5FEED_TRUSTED_PROXIES="127.0.0.1")
    assert httpx.get(f"{trusting.url}/v1/datasets", headers=said, timeout=60).status_code == 421


def test_a_proxy_on_a_socket_of_both_families(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """Where the server listens to IPv6 as well, addresses of IPv4 are what they are elsewhere: for trust, for what is
    logged, and for who counts as one caller."""
    server = serve(folder, "--host", "::", "--access-log", H5FEED_TRUSTED_PROXIES="127.0.0.1", H5FEED_PUBLIC="1")
    for address in ("9.9.9.9", "::ffff:8.8.8.8", "2001:db8:1:2:3::4"):
        url = f"http://127.0.0.1:{server.port}/v1/datasets"
        assert httpx.get(url, headers={"x-forwarded-for": address}, timeout=60).status_code == 200
    assert server.process.stdout is not None
    server.process.send_signal(signal.SIGTERM)
    logged = server.process.stdout.read()
    assert '9.9.9.9 "GET' in logged and '8.8.8.8 "GET' in logged and "ffff" not in logged
    assert logged.count(" by ") == 1 and " by 2001:db8:1:2::/64 " in logged


def test_prefixes() -> None:
    """Prefixes that could be confused with a path of the server are refused."""
    assert checked_prefix("/user/ann/proxy/8000/") == "/user/ann/proxy/8000" and checked_prefix("/") == ""
    for wrong in ("x", "/a b", "/a/..", "/v1", "/docs/x", "//a"):
        with pytest.raises(ValueError, match="prefix"):
            checked_prefix(wrong)


def test_every_path_of_the_server_is_known(tmp_path: Path) -> None:
    """All first path segments of the server are in the list of names with which no prefix may begin."""
    found: set[str] = set()

    def walk(routes: list[BaseRoute]) -> None:
        for route in routes:
            path = getattr(route, "path", None)
            if path is not None:
                found.add(path.split("/")[1] if "/" in path else "")
            else:
                walk(getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", []))

    walk(create_app(Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache")).routes)
    assert {"v1", "feed", "static"} <= found and found - {""} <= OWN_PATHS


def test_a_port_and_a_socket(serve: Callable[..., ServerProcess], folder: Path, tmp_path: Path) -> None:
    """The port and the socket serve the same data, and both require a token."""
    path = tmp_path / "feed.sock"
    server = serve(folder, "--uds-mode", "0660", "--port", "0", H5FEED_UDS=str(path), H5FEED_TOKENS=TOKEN)
    assert server.url.startswith("http://127.0.0.1:") and oct(path.stat().st_mode)[-3:] == "660"
    for url in (server.url, f"unix://{path}"):
        with h5feed.connect(url, token=TOKEN, deadline=60) as feed:
            assert len(feed["mixed"].batch(0, batch_size=4).rows) == 4
        with h5feed.connect(url, deadline=60) as feed, pytest.raises(Unauthorized):
            feed["mixed"].batch(0, batch_size=4)
    assert server.stop() == 0
    assert not path.exists()


def test_a_reload_reads_the_env_file(
    serve: Callable[..., ServerProcess],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """SIGHUP applies new tokens, another number of workers and another folder. An invalid file changes nothing, and the
    server says which settings need a restart."""
    monkeypatch.setattr(ServerProcess, "new_session", True)
    file, current = tmp_path / "settings.env", tmp_path / "current"
    current.symlink_to(folder)
    file.write_text("H5FEED_TOKENS=first\nH5FEED_WORKERS=2\n")
    server = serve(current, "--env-file", str(file))

    def status(token: str) -> int:
        headers = {"authorization": f"Bearer {token}"}
        return httpx.get(f"{server.url}/v1/datasets/mixed", headers=headers, timeout=60).status_code

    assert status("first") == 200
    file.write_text("H5FEED_TOKENS=second\nH5FEED_WORKRS=1\n")
    before = server.worker_pids()
    server.process.send_signal(signal.SIGHUP)
    time.sleep(1)
    assert status("first") == 200 and server.worker_pids() == before
    file.write_text("H5FEED_TOKENS=second\nH5FEED_WORKERS=1\nH5FEED_LOG_FORMAT=json\n")
    empty = tmp_path / "empty"
    empty.mkdir()
    current.unlink()
    current.symlink_to(empty)
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: len(server.worker_pids()) == 1 and server.worker_pids()[0] not in before)
    assert status("first") == 401 and status("second") == 404
    said = capfd.readouterr().err
    assert "log_format stays 'pretty' until the server is restarted" in said and "\nh5feed: SIGHUP" in said


def test_reloads_that_let_nobody_else_in(
    serve: Callable[..., ServerProcess],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """An env file that is empty for a moment, or a pipe, does not open a server with tokens. Reloads with new tokens
    leave no descriptors open."""
    monkeypatch.setattr(ServerProcess, "new_session", True)
    file = tmp_path / "settings.env"
    file.write_text("H5FEED_TOKENS=token-0\n")
    server = serve(folder, "--env-file", str(file))
    said = ""

    def reload(words: str) -> str:
        nonlocal said
        said = ""
        server.process.send_signal(signal.SIGHUP)

        def is_said() -> bool:
            nonlocal said
            said += capfd.readouterr().err
            return words in said

        wait_until(is_said)
        return said

    def status(token: str) -> int:
        headers = {"authorization": f"Bearer {token}"}
        return httpx.get(f"{server.url}/v1/datasets/mixed", headers=headers, timeout=60).status_code

    open_files: list[int] = []
    for number in range(1, 4):
        file.write_text(f"H5FEED_TOKENS=token-{number}\n")
        before = server.worker_pids()
        reload("replacing all workers")
        wait_until(lambda: len(server.worker_pids()) == 1 and server.worker_pids() != before)  # noqa: B023
        wait_until(lambda: status(f"token-{number}") == 200)  # noqa: B023
        open_files.append(len(os.listdir(f"/proc/{server.process.pid}/fd")))
    # The tokens before are kept, in case the new workers do not start.
    assert open_files[1] == open_files[2]
    file.write_text("")
    assert "there are no tokens any more" in reload("nothing changes")
    file.unlink()
    os.mkfifo(file)
    assert "it is not a regular file" in reload("nothing changes")
    assert status("token-3") == 200 and status("none") == 401


def test_systemd_is_notified(folder: Path, tmp_path: Path) -> None:
    """systemd gets the notifications that it expects: ready, watchdog, reloading and ready again, stopping."""
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(60)
        environment = {**os.environ, "NOTIFY_SOCKET": address, "WATCHDOG_USEC": "400000"}
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "h5feed_server.cli",
                "serve",
                folder,
                "--port",
                "0",
                "--cache-dir",
                tmp_path / "cache",
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

        def heard(what: str) -> str:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                message = manager.recv(4096).decode()
                if what in message:
                    return message
            raise AssertionError(what)

        try:
            assert "STATUS=serving" in heard("READY=1")
            heard("WATCHDOG=1")
            process.send_signal(signal.SIGHUP)
            assert re.search(r"^MONOTONIC_USEC=[0-9]+$", heard("RELOADING=1"), re.MULTILINE)
            heard("READY=1")
            process.terminate()
            heard("STOPPING=1")
            assert process.wait(60) == 0
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("program", ["uvicorn", "hypercorn"])
def test_other_asgi_servers(program: str, folder: Path, tmp_path: Path, feed: h5feed.Feed) -> None:
    """Another ASGI server delivers the same epoch. On other addresses, it requires a token."""
    pytest.importorskip(program)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bind = ["--host", "0.0.0.0", "--port", str(port)] if program == "uvicorn" else ["--bind", f"0.0.0.0:{port}"]
    environment = {**os.environ, "H5FEED_DATA_DIR": str(folder), "H5FEED_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", program, "h5feed_server.asgi:app", *bind]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:

        def is_ready() -> bool:
            try:
                return httpx.get(f"{url}/readyz", timeout=60).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(is_ready)
        with h5feed.connect(url, deadline=60) as other:
            options: dict[str, Any] = {"batch_size": 7, "shuffle": True, "seed": 3}
            for one, two in zip(other["tall"].batches(**options), feed["tall"].batches(**options), strict=True):
                for name in two:
                    np.testing.assert_array_equal(one[name], two[name])
        outside = _own_address()
        if outside is not None:
            assert httpx.get(f"http://{outside}:{port}/v1/datasets", timeout=60).status_code == 401
    finally:
        process.terminate()
        process.wait(60)


def _own_address() -> str | None:
    """An address of this machine other than the loopback address; None if there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return None
        address: str = probe.getsockname()[0]
        return None if address.startswith("127.") else address


TUNNEL = "feed.example"


@pytest.fixture(scope="module")
def tunnel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a tunnel like cloudflared, which terminates TLS before a server on HTTP, and whom to trust."""
    authority = Authority(tmp_path_factory.mktemp("authority"))
    data: Path = tmp_path_factory.mktemp("data")
    write_data_folder(data)
    with h5py.File(data / "endless.h5", "w") as file:
        # Zeros that take long to read, and no room on the disk.
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        h5py.h5d.create(file.id, b"x", h5py.h5t.STD_U8LE, h5py.h5s.create_simple((1 << 36,)), properties)
    process = ServerProcess(
        data,
        tmp_path_factory.mktemp("cache"),
        H5FEED_TOKENS=TOKEN,
        H5FEED_TRUSTED_PROXIES="127.0.0.1",
    )
    said = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
    opened = ReverseProxy(process.port, authority.issue("localhost").context(), said)
    yield f"https://localhost:{opened.port}", authority.cert
    opened.close()
    assert process.stop() == 0


def _browser(tunnel: tuple[str, Path], host: str, **options: Any) -> httpx.Client:
    """Sends requests through the tunnel with a host name that DNS cannot resolve."""
    headers = {"accept": "text/html", "host": host}
    context = ssl.create_default_context(cafile=tunnel[1])
    return httpx.Client(base_url=tunnel[0], verify=context, timeout=60, headers=headers, **options)


def test_the_client_through_a_tunnel(tunnel: tuple[str, Path], feed: h5feed.Feed) -> None:
    """Batches, posted rows, jobs and pictures are the same as without a tunnel."""
    with h5feed.connect(tunnel[0], token=TOKEN, verify=tunnel[1], deadline=60) as other:
        _assert_same_batches(other, feed)
        np.testing.assert_array_equal(other["tall"].take([5, 3]).rows, [5, 3])
        assert other["mixed"].stats().rows == feed["mixed"].stats().rows


def test_pages_through_a_tunnel(tunnel: tuple[str, Path]) -> None:
    """Redirects, jobs, code examples and the `pip install` command use the tunnel's address. The cookie is secure."""
    own = f"https://{TUNNEL}"
    with _browser(tunnel, TUNNEL) as browser:
        form = browser.get("/datasets/mixed")
        assert form.headers["location"].startswith("/sign-in?")
        signed = browser.post("/sign-in", data={"token": TOKEN, "next": "/"}, headers={"origin": own})
        assert signed.status_code == 303 and "; Secure" in signed.headers["set-cookie"]
        foreign = browser.post("/sign-in", data={"token": TOKEN}, headers={"origin": "https://evil.example"})
        assert foreign.status_code == 401 and "set-cookie" not in foreign.headers
        cookie = {"cookie": signed.headers["set-cookie"].partition(";")[0]}
        for path in ("/", "/feed", "/datasets/mixed", "/datasets/mixed/rows", "/datasets/mixed/rows/0"):
            page = browser.get(path, headers=cookie)
            assert page.status_code in (200, 202), path
            assert "http://feed" not in page.text and "127.0.0.1" not in page.text, path
        assert own in page.text
        # What the framework redirects itself knows neither scheme nor name of the tunnel, and need not.
        for path in ("/simple", "/v1/datasets/"):
            moved = browser.get(path, headers=cookie)
            assert moved.status_code == 307 and moved.headers["location"] in ("/simple/", "/v1/datasets"), path
        assert f" {own}/simple/h5feed/" in browser.get("/simple/h5feed/requirements.txt").text
        schema = browser.get("/openapi.json", headers={"authorization": f"Bearer {TOKEN}"}).json()
        assert f"pip install {own}/simple/h5feed/" in schema["info"]["description"]
        assert schema.get("servers", [{"url": ""}])[0]["url"] in ("", "/")
        signed_out = browser.post("/sign-out", headers={**cookie, "origin": own})
        assert signed_out.headers["location"] == "/sign-in" and "; Secure" in signed_out.headers["set-cookie"]


def test_jobs_and_viewers_through_a_tunnel(tunnel: tuple[str, Path]) -> None:
    """The location of a job is a path, so it works through the tunnel. Viewers get their files."""
    bearer = {"authorization": f"Bearer {TOKEN}", "accept": "application/json"}
    with _browser(tunnel, TUNNEL) as browser:
        answer = browser.get("/v1/datasets/endless/stats?split=all", headers=bearer)
        assert answer.status_code == 202
        job = answer.headers["location"]
        assert job == answer.json()["url"] and job.startswith("/v1/jobs/")
        assert browser.get(job, headers=bearer).json()["result"].startswith("/v1/datasets/endless/stats")
        assert browser.delete(job, headers=bearer).status_code == 204
        meta = browser.get("/h5grove/meta/?file=mixed.h5&path=/", headers=bearer, follow_redirects=True)
        assert meta.status_code == 200 and meta.json()["kind"] == "group"


def test_redirects_through_jupyter(below: ServerProcess) -> None:
    """Jupyter adds its prefix to absolute paths in redirects, so redirects are relative and lead to the same page."""
    with httpx.Client(base_url=below.url, timeout=60, headers={"accept": "text/html"}) as browser:
        for path in ("/", "/datasets/mixed", "/datasets/a%2Fb/rows/", "/simple"):
            said = {"x-forwarded-prefix": "/user/ann/proxy/8000", "x-proxycontextpath": "/user/ann/proxy/8000"}
            location = browser.get(path, headers=said).headers["location"]
            assert location.startswith("../")
            for asked in (f"/user/ann/proxy/8000{path}", "/user/ann/proxy/8000"):
                found = urlsplit(urljoin(f"https://hub.example{asked}", location))
                wanted = "/user/ann/proxy/8000/simple/" if path == "/simple" else "/user/ann/proxy/8000/sign-in"
                assert (found.netloc, found.path) == ("hub.example", wanted)
