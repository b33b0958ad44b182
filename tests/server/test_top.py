"""The command ``top`` with a real server."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

TOP = [sys.executable, "-m", "h5feed_server.cli", "top"]


def _once(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "COLUMNS": "200", **environment}
    return subprocess.run(
        [*TOP, "--once", *arguments], capture_output=True, text=True, timeout=120, check=False, env=variables
    )


def test_one_frame(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """It shows workers, clients, their waiting times and slow requests, and requires a token if the server does."""
    server = serve(folder, "--workers", "2", H5FEED_TOKENS="secret")
    headers = {"authorization": "Bearer secret", "h5feed-wait": "waited=0.250, of=1.000"}
    path = "/v1/datasets/mixed/batches/0?batch_size=8"
    wait_until(lambda: httpx.get(server.url + path, headers=headers, timeout=60).status_code == 200)
    frame = _once(server.url, "--token", "secret")
    assert frame.returncode == 0, frame.stderr
    for pid in server.worker_pids():
        assert str(pid) in frame.stdout
    for said in ("batches/s", "Workers", "token 1", "25%", "/v1/datasets/mixed/batches/0", "found in memory"):
        assert said in frame.stdout
    assert _once(H5FEED_URL=server.url, H5FEED_TOKEN="secret").returncode == 0
    refused = _once(server.url)
    assert refused.returncode == 1 and "--token" in refused.stderr and refused.stdout == ""


def test_without_a_server(tmp_path: Path) -> None:
    """If there is no server, one line gives the reason, and the exit code is 1."""
    for url, says in (
        ("http://127.0.0.1:9", "refused"),
        ("ftp://x", "invalid"),
        (f"unix://{tmp_path}/s", "No such"),
        ("http://x:99999", "Port"),
    ):
        done = _once(url)
        assert done.returncode == 1 and says in done.stderr and done.stderr.count("\n") == 1


def test_a_token_that_cannot_be_sent() -> None:
    """The message does not contain the token, of which only the end may be wrong."""
    done = _once("http://127.0.0.1:9", "--token", "secret-of-mine\nx")
    assert done.returncode == 1 and "printable ASCII" in done.stderr and "secret" not in done.stderr


def test_it_updates_until_q(server: ServerProcess) -> None:
    """In a terminal, it updates until q is pressed, and leaves the terminal as it was."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*TOP, server.url], stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 60
    while seen.count(b"Workers") < 3:
        assert time.monotonic() < deadline
        if select.select([ours], [], [], 1)[0]:
            seen += os.read(ours, 65536)
    os.write(ours, b"q")
    while process.poll() is None and time.monotonic() < deadline:
        if select.select([ours], [], [], 0.2)[0]:
            try:
                os.read(ours, 65536)
            except OSError:
                break
    assert process.wait(30) == 0
    os.close(ours)
