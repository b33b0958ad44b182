"""Certificates and tokens that are replaced while a model is trained: no row is lost, and no restart is needed."""

from __future__ import annotations

import contextlib
import io
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed_server.cli import main as server_main

from tests.server.test_serving import OPENSSL
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROWS = 96


class Certificate:
    """A certificate for this machine, with its key."""

    def __init__(self, folder: Path, name: str) -> None:
        self.file, self.key = folder / f"{name}.crt", folder / f"{name}.key"
        command = [*OPENSSL, "-keyout", str(self.key), "-out", str(self.file)]
        subprocess.run(command, check=True, capture_output=True)
        self.text = self.file.read_text()


class Training(threading.Thread):
    """Trains epochs with a Sequence until it is stopped; checks that each row comes once per epoch, as in the file."""

    def __init__(self, feed: h5feed.Feed) -> None:
        super().__init__()
        self.epochs = 0
        self.failure: BaseException | None = None
        self.ended = threading.Event()
        options = {"batch_size": 8, "shuffle": True, "verbose": False, "readahead": 1 << 16}
        self._sequence = feed["rows"].sequence(**options)  # type: ignore[arg-type]

    def run(self) -> None:
        try:
            while not self.ended.is_set():
                seen: list[int] = []
                for x, y in self._sequence:
                    np.testing.assert_array_equal(x[:, 0], np.asarray(y))
                    seen += np.asarray(y).astype(int).tolist()
                    time.sleep(0.01)
                assert sorted(seen) == list(range(ROWS))
                self.epochs += 1
        except BaseException as error:
            self.failure = error

    def goes_on(self) -> None:
        """Return after another complete epoch."""
        before = self.epochs
        wait_until(lambda: self.epochs > before + 1 or self.failure is not None)
        assert self.failure is None, self.failure


@contextlib.contextmanager
def _training(feed: h5feed.Feed) -> Iterator[Training]:
    training = Training(feed)
    training.start()
    try:
        training.goes_on()
        yield training
        training.goes_on()
    finally:
        training.ended.set()
        training.join(60)
    assert training.failure is None


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    with h5py.File(folder / "rows.h5", "w") as file:
        file["x"] = np.arange(ROWS, dtype="f4")[:, None] + np.zeros((ROWS, 500), "f4")
        file["y"] = np.arange(ROWS, dtype="f4")
    return folder


@pytest.mark.slow
def test_a_certificate_is_replaced_while_a_model_is_trained(
    data: Path, tmp_path: Path, serve: Callable[..., ServerProcess], capfd: pytest.CaptureFixture[str]
) -> None:
    """The files are replaced together, one after the other, and by garbage. New connections to each worker get the new
    certificate, or the previous one if the new one is invalid. The log has one line for that, and one when it is valid
    again."""
    certificates = [Certificate(tmp_path, f"number-{number}") for number in range(4)]
    trusted = tmp_path / "trusted.pem"
    trusted.write_text("".join(one.text for one in certificates))
    file, key = tmp_path / "served.crt", tmp_path / "served.key"

    def put(source: Path, target: Path) -> None:
        target.with_suffix(".new").write_bytes(source.read_bytes())
        target.with_suffix(".new").replace(target)

    put(certificates[0].file, file)
    put(certificates[0].key, key)
    server = serve(data, "--tls-cert", str(file), "--tls-key", str(key), "--workers", "2")
    said = ""

    def lines() -> list[str]:
        nonlocal said
        said += capfd.readouterr().err
        return [line for line in said.splitlines() if "h5feed_server.serve.worker" in line]

    def all_show(number: int) -> bool:
        """Whether new connections to both workers show this certificate; the training keeps its own connections."""
        for _ in range(6):
            text = ssl.get_server_certificate(("127.0.0.1", server.port), timeout=60)
            if text.split() != certificates[number].text.split():
                return False
        with h5feed.connect(server.url, verify=str(trusted), deadline=60) as feed:
            return bool(feed["rows"].take([5])["y"][0] == 5)

    with h5feed.connect(server.url, verify=str(trusted), deadline=60) as feed, _training(feed) as training:
        assert all_show(0)
        put(certificates[1].file, file)
        put(certificates[1].key, key)
        wait_until(lambda: all_show(1))
        training.goes_on()
        put(certificates[2].key, key)
        wait_until(lambda: len(lines()) > 0)
        training.goes_on()
        assert all_show(1)
        put(certificates[2].file, file)
        wait_until(lambda: all_show(2))
        training.goes_on()
        before = lines()
        file.write_text("garbage")
        wait_until(lambda: len(lines()) > len(before))
        training.goes_on()
        assert all_show(2)
        file.write_bytes(certificates[3].file.read_bytes())
        key.write_bytes(certificates[3].key.read_bytes())
        wait_until(lambda: all_show(3))
    told = [line.partition(f"{file}: ")[2] for line in lines()]
    refused = [line for line in told if line.endswith("; the previous one stays in use")]
    assert len(refused) >= 2 and "MISMATCH" in told[0] and told[-1] == "it is valid again", told
    # Once for both workers.
    assert all(line != after for line, after in pairwise(told)), told


@pytest.mark.slow
def test_tokens_are_replaced_while_a_model_is_trained(
    data: Path, tmp_path: Path, serve: Callable[..., ServerProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tokens are created and revoked, and finally the one in use: the client reads the next one from its file."""
    file, own = tmp_path / "tokens", tmp_path / "own"
    monkeypatch.setenv("H5FEED_TOKEN_FILE", str(file))

    def create(name: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            assert server_main(["token", "create", name, "--token-file", str(file)]) == 0
        return out.getvalue().strip()

    def revoke(name: str) -> None:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            assert server_main(["token", "revoke", name, "--token-file", str(file)]) == 0

    def statuses(token: str) -> set[int]:
        headers = {"authorization": f"Bearer {token}"}
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(httpx.Client(timeout=60)) for _ in range(4)]
            return {client.get(f"{server.url}/v1/datasets/rows", headers=headers).status_code for client in clients}

    first = create("first")
    server = serve(data, "--token-file", str(file), "--workers", "2")
    own.write_text(first)
    monkeypatch.setenv("H5FEED_TOKEN_FILE", str(own))
    monkeypatch.delenv("H5FEED_TOKEN", raising=False)
    with h5feed.connect(server.url, deadline=60) as feed, _training(feed) as training:
        for number in range(3):
            other = create("other")
            wait_until(lambda: statuses(other) == {200})  # noqa: B023
            revoke("other")
            wait_until(lambda: statuses(other) == {401})  # noqa: B023
            content = file.read_text()
            # In place, as an editor does.
            file.write_text(f"{content}# {number}\n")
        training.goes_on()
        second = create("second")
        wait_until(lambda: statuses(second) == {200})
        own.write_text(second)
        revoke("first")
        wait_until(lambda: statuses(first) == {401})
        training.goes_on()
    own.write_text("")
    with h5feed.connect(server.url, token=second, deadline=60) as feed:
        revoke("second")
        wait_until(lambda: statuses(second) == {401})
        with pytest.raises(h5feed.Unauthorized):
            feed.datasets()
