"""The log: every request once, with the same fields as text and as JSON, and without secrets."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.fork_server import SERVERS
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

BATCH = "/v1/datasets/mixed/batches/1?batch_size=8"
TOKEN = "tellnobody/%+"
OTHER_TOKEN = "nor-this-one"
AUTHORISED = {"authorization": f"Bearer {TOKEN}"}


def lines_of(server: ServerProcess) -> list[str]:
    """The lines that a server has printed to standard output, after it has ended."""
    server.process.send_signal(signal.SIGTERM)
    lines: list[str] = server.process.stdout.read().splitlines()
    return lines


def ask(server: ServerProcess) -> list[httpx.Response]:
    """Send requests of all kinds; the request ids of the responses must appear in the log."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        wait_until(lambda: client.get(BATCH, headers=AUTHORISED).status_code == 200)
        asked = [
            client.get(BATCH, headers=AUTHORISED),
            client.get(f"/v1/datasets/mixed?token={OTHER_TOKEN}&Api-Key=not-for-logs&name=a%0Ab", headers=AUTHORISED),
            client.get("/nowhere?next=tellnobody%2F%25%2B", headers={**AUTHORISED, "x-forwarded-for": "203.0.113.9"}),
            client.get(BATCH),
        ]
    return asked


def test_json_lines(serve: Callable[..., ServerProcess], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every line of both streams is one JSON object. Requests have status, bytes, time, phases and caller."""
    variables = {"H5FEED_TRUSTED_PROXIES": "127.0.0.0/8", "H5FEED_TOKENS": f"{OTHER_TOKEN},{TOKEN}"}
    server = serve(folder, "--access-log", "--log-format", "json", **variables)
    answers = ask(server)
    found = [json.loads(line) for line in lines_of(server)]
    by_id: dict[str, list[dict[str, Any]]] = {}
    for line in found:
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        if line["logger"] == "h5feed.access":
            by_id.setdefault(line["request_id"], []).append(line)
    ((batch,), (named,), (missing,), (refused,)) = (by_id[answer.headers["x-request-id"]] for answer in answers)
    assert (
        batch.items()
        >= {
            "client": "127.0.0.1",
            "caller": "token 2",
            "method": "GET",
            "path": "/v1/datasets/mixed/batches/1",
            "query": "batch_size=8",
            "status": 200,
            "gone": False,
            "bytes": len(answers[0].content),
        }.items()
    )
    assert batch["phases_ms"].keys() == {"queue", "plan", "read", "send"}
    assert batch["duration_ms"] >= sum(batch["phases_ms"].values()) * 0.99
    assert named["query"] == "token=[hidden]&Api-Key=[hidden]&name=a%0Ab" and "phases_ms" not in named
    assert (missing["client"], missing["status"], missing["query"]) == ("203.0.113.9", 404, "next=[hidden]")
    assert (refused["caller"], refused["status"], refused["bytes"]) == (None, 401, len(answers[3].content))

    errors = [json.loads(line) for line in capfd.readouterr().err.splitlines()]
    assert any(line["level"] == "WARNING" and "broken.h5" in line["message"] for line in errors)
    said = json.dumps([found, errors])
    assert TOKEN not in said and OTHER_TOKEN not in said and "not-for-logs" not in said


def test_text_lines(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """The text format contains the same fields."""
    server = serve(folder, "--access-log", H5FEED_TOKENS=TOKEN)
    answers = ask(server)
    text = "\n".join(lines_of(server))
    ids = [answer.headers["x-request-id"] for answer in answers]
    phases = r"\(queue [\d.]+, plan [\d.]+, read [\d.]+, send [\d.]+\)"
    start = r"(?m)^[-\d]+ [\d:,]+ 127\.0\.0\.1 "
    size = len(answers[0].content)
    assert re.search(rf'{start}"GET {re.escape(BATCH)}" 200 {size} B [\d.]+ ms {phases} by token 1 {ids[0]}$', text)
    assert re.search(rf'{start}"GET {re.escape(BATCH)}" 401 \d+ B [\d.]+ ms {ids[3]}$', text)
    assert TOKEN not in text and "tellnobody" not in text and OTHER_TOKEN not in text


def test_clients_that_disconnect_after_the_response(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """They are not logged as `gone`, even if they disconnect before the server has noticed that all was sent."""
    server = serve(folder, "--access-log", "--log-format", "json")
    with httpx.Client(base_url=server.url, timeout=60) as client:
        wait_until(lambda: client.get(BATCH).status_code == 200)
        length = len(client.get(BATCH).content)
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(40):
        with socket.create_connection((host, int(port)), timeout=60) as peer:
            peer.sendall(f"GET {BATCH} HTTP/1.1\r\nhost: {host}\r\n\r\n".encode())
            received = b""
            while len(received.partition(b"\r\n\r\n")[2]) < length:
                received += peer.recv(1 << 20)
    found = [json.loads(line) for line in lines_of(server)]
    batches = [one for one in found if one["logger"] == "h5feed.access" and one["status"] == 200]
    assert len(batches) >= 41 and not [one for one in batches if one["gone"]]


def test_a_failure_is_logged_with_its_request(
    serve: Callable[..., ServerProcess], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In both formats, the request id that a client got leads to the log line with the reason."""
    (data := tmp_path / "data").mkdir()
    (data / "h5feed.toml").write_text("nonsense")
    for form in ("json", "pretty"):
        server = serve(data, "--log-format", form)
        data.rename(tmp_path / "gone")
        wait_until(lambda server=server: httpx.get(f"{server.url}/readyz", timeout=60).status_code in (200, 503))  # type: ignore[misc]
        answer = httpx.get(f"{server.url}/readyz", timeout=60)
        (tmp_path / "gone").rename(data)
        server.stop()
        lines = capfd.readouterr().err.splitlines()
        if form == "json":
            assert all(json.loads(line)["message"] for line in lines)
        if answer.status_code == 503:
            assert any(answer.headers["x-request-id"] in line or "unavailable" in line for line in lines)


def test_a_generated_token_is_not_logged(folder: Path, serve: Callable[..., ServerProcess]) -> None:
    """With JSON, the log contains the command that prints the token."""
    server = serve(folder, "--host", "0.0.0.0", "--log-format", "json")
    token = (server.cache_dir / "token").read_text().strip()
    said = lines_of(server)
    assert any("h5feed-server token show" in line for line in said)
    assert token not in "".join(said)


def test_an_unknown_format_is_refused(folder: Path, tmp_path: Path) -> None:
    """The error names the flag or variable, and the valid formats."""
    arguments = ["serve", str(folder), "--cache-dir", str(tmp_path), "--port", "0"]
    answer = SERVERS.run([*arguments, "--log-format", "xml"])
    assert answer.returncode == 2 and "pretty" in answer.stderr and "json" in answer.stderr
    answer = SERVERS.run(arguments, H5FEED_LOG_FORMAT="xml")
    assert answer.returncode == 2 and "H5FEED_LOG_FORMAT=xml" in answer.stderr and "pretty" in answer.stderr


def test_a_log_that_nobody_reads(folder: Path, tmp_path: Path) -> None:
    """If the pipe of standard output is full, requests are still answered, and later a line says how many are lost."""
    command = [sys.executable, "-m", "h5feed_server.cli", "serve", str(folder), "--port", "0", "--access-log"]
    command += ["--cache-dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split()[-1]
            with httpx.Client(base_url=url, timeout=60) as client:
                # More lines than fit into the pipe and the queue.
                for _ in range(3500):
                    assert client.get("/healthz?filler=" + "x" * 20).status_code == 200
                reading = ThreadPoolExecutor(1).submit(process.stdout.read)
                wait_until(lambda: client.get("/healthz").status_code == 200)
            process.terminate()
            text = reading.result(60)
        finally:
            process.kill()
    assert re.search(r" \d+ lines were dropped, because standard output was not read$", text, re.MULTILINE), text[-500:]
