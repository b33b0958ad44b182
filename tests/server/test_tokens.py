"""Tokens with names, scopes and expiry: the token file, its commands, and servers that use it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.cli import main
from h5feed.errors import BadParameter, Unauthorized
from h5feed_server.api.redaction import without_secrets
from h5feed_server.cli import main as server_main
from h5feed_server.tokens.commands import moment_of
from h5feed_server.tokens.scope import EVERYTHING, NOTHING, DatasetScope
from h5feed_server.tokens.secrets import digest_of, proof_of
from h5feed_server.tokens.token_file import MAX_BYTES, TokenFileError, editing, parse

from tests.support.fork_server import COMMANDS
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

GOOD = '{"name": "a", "id": "01234567", "hash": "sha256:' + "0" * 64 + '"}'


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Path of a token file that does not exist yet, which the commands of the test use."""
    path = tmp_path / "tokens"
    monkeypatch.setenv("H5FEED_TOKEN_FILE", str(path))
    return path


@pytest.fixture
def create(file: Path) -> Callable[..., str]:
    """Creates tokens: ``create("alice", "--expires", "30d")``."""

    def run(*arguments: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
            assert server_main(["token", "create", *arguments]) == 0
        return out.getvalue().strip()

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("mnist", "zoo"):
        with h5py.File(folder / f"{name}.h5", "w") as to:
            to["x"] = np.zeros((10, 3))
    return folder


def _guarded(data: Path, cache: Path, file: Path, *options: str, **environment: str) -> ServerProcess:
    return ServerProcess(data, cache, "--token-file", str(file), "--workers", "2", *options, **environment)


def _statuses(server: ServerProcess, token: str) -> set[int]:
    """The status that each worker returns for a token; connections go to the workers in turn."""
    headers = {"authorization": f"Bearer {token}"}
    with httpx.Client(timeout=60) as one, httpx.Client(timeout=60) as other:
        return {http.get(f"{server.url}/v1/datasets", headers=headers).status_code for http in (one, other)}


# Commands


def test_a_token_is_shown_once(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file contains digests and is readable only by its owner. `create` prints the token, `list` does not."""
    before = os.umask(0)
    try:
        assert server_main(["token", "create", "alice", "--datasets", "mnist*", "--expires", "30d"]) == 0
    finally:
        os.umask(before)
    token, notes = capsys.readouterr()
    assert re.fullmatch(r"h5feed_[0-9a-f]{8}_[\w-]{32}\n", token) and token.strip() not in notes
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    content = json.loads(file.read_text())
    assert content["name"] == "alice" and content["datasets"] == ["mnist*"]
    assert content["hash"] == f"sha256:{digest_of(proof_of(token.strip().encode())).hex()}"
    assert token.strip()[16:] not in file.read_text() and proof_of(token.strip().encode()) not in file.read_text()
    assert datetime.fromisoformat(content["expires"]) - datetime.fromisoformat(content["created"]) == timedelta(days=30)
    assert server_main(["token", "list"]) == 0
    listed = capsys.readouterr().out
    assert "alice" in listed and "mnist*" in listed and token.strip()[16:] not in listed
    assert server_main(["token", "create", "alice"]) == 1 and "already" in capsys.readouterr().err
    assert server_main(["token", "revoke", "alic"]) == 1 and "did you mean 'alice'" in capsys.readouterr().err
    assert server_main(["token", "revoke", "alice"]) == 0 and file.read_text() == ""
    assert server_main(["token", "revoke", "alice"]) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["create", "two words"], "NAME 'two words'"),
        (["create", "a", "--datasets", ""], "--datasets '': a pattern is empty"),
        (["create", "a", "--expires", "soon"], "--expires soon: expected a time span"),
        (["create", "a", "--expires", "2020-01-01"], "is in the past"),
        (["create", "a", "--expires", "999999w"], "expected a time span"),
        (["revoke", "a"], "does not exist"),
        (["list"], "No such file"),
    ],
)
def test_invalid_arguments_of_token_commands(
    file: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Invalid arguments: one line says what is wrong, and no file is created."""
    assert server_main(["token", *arguments]) == 1
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1 and not file.exists()


def test_without_a_token_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """There is no default location. A misspelt option is answered with the correct one."""
    monkeypatch.delenv("H5FEED_TOKEN_FILE", raising=False)
    assert server_main(["token", "create", "alice"]) == 2
    assert "--token-file FILE or set H5FEED_TOKEN_FILE" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        server_main(["token", "create", "alice", "--dataset-names", "x"])
    assert "did you mean '--datasets'" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    """The help of each command has examples."""
    for action in ([], ["create"], ["list"], ["revoke"], ["show"]):
        with pytest.raises(SystemExit):
            server_main(["token", *action, "--help"])
        assert f"h5feed-server token {' '.join(action)}" in capsys.readouterr().out


def test_when_a_token_expires() -> None:
    """After a time span, or at the end of a day."""
    since = datetime(2026, 3, 1, 12, tzinfo=UTC)
    assert moment_of("90s", since) - since == timedelta(seconds=90)
    assert moment_of("8w", since) - since == timedelta(weeks=8)
    assert moment_of("2026-03-01", since) == datetime(2026, 3, 2, tzinfo=UTC)


def test_many_writers(file: Path) -> None:
    """Threads and processes that change the file at the same time do not lose each other's changes."""
    created = [
        subprocess.Popen(
            [sys.executable, "-m", "h5feed_server.cli", "token", "create", f"process-{number}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in range(3)
    ]

    def change(number: int) -> int:
        code = server_main(["token", "create", f"thread-{number}"])
        return code or (server_main(["token", "revoke", f"thread-{number}"]) if number % 2 else 0)

    with ThreadPoolExecutor(4) as threads:
        assert set(threads.map(change, range(12))) == {0}
    assert [process.wait(60) for process in created] == [0, 0, 0]
    names = {line.record.name for line in parse(file.read_bytes()) if line.record is not None}
    assert names == {f"thread-{number}" for number in range(0, 12, 2)} | {f"process-{number}" for number in range(3)}
    assert [path.name for path in file.parent.iterdir()] == ["tokens"]


def test_a_change_keeps_comments_links_and_mode(file: Path, create: Callable[..., str]) -> None:
    """A change keeps comments, symbolic links, and the mode that lets a server of another user read the file."""
    real = file.with_name("elsewhere")
    real.write_text(f"# ours\n\n{GOOD}\n")
    real.chmod(0o640)
    file.symlink_to(real)
    create("bob")
    assert server_main(["token", "revoke", "a"]) == 0
    lines = real.read_text().splitlines()
    assert lines[:2] == ["# ours", ""] and len(lines) == 3 and '"bob"' in lines[2]
    assert file.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o640


def test_a_file_that_is_full(file: Path, create: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    """It stays one that can be read, and no token is shown that is not in it."""
    create("alice")
    file.write_text(file.read_text() + "#" * (MAX_BYTES - file.stat().st_size - 1) + "\n")
    before = file.read_bytes()
    assert server_main(["token", "create", "bob"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and f"more than {MAX_BYTES} bytes" in shown.err and file.read_bytes() == before
    assert server_main(["token", "revoke", "alice"]) == 0


def test_a_change_that_fails_leaves_the_file(file: Path, create: Callable[..., str]) -> None:
    """The file is replaced completely or not at all."""
    create("bob")
    before = file.read_bytes()

    def fail() -> None:
        with editing(file) as editor:
            editor.remove(editor.records[0])
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert file.read_bytes() == before
    file.write_bytes(before + b"broken")
    assert server_main(["token", "create", "carol"]) == 1
    assert file.read_bytes() == before + b"broken"


# The file


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("secret-token-of-mine", "not a JSON object"),
        ('["secret-token-of-mine"]', "not a JSON object"),
        (GOOD[:-1], "not a JSON object"),
        (GOOD.replace('"id"', '"ident"'), "id: Field required"),
        (GOOD[:-1] + ', "scopes": []}', "unknown key 'scopes'"),
        (GOOD.replace("sha256:0", "sha256:g"), "hash: String should match"),
        (GOOD[:-1] + ', "datasets": []}', "datasets: "),
        (GOOD[:-1] + ', "datasets": "mnist"}', "datasets: "),
        (GOOD[:-1] + ', "expires": "2026-13-01"}', "expires: "),
        (GOOD[:-1] + ', "expires": "2026-12-01T00:00:00"}', "expires: "),
        (GOOD[:-1] + ', "expires": "9999-12-31T23:00:00-05:00"}', "expires: this is not between"),
        (GOOD.replace('"a"', '"x y"'), "name: use up to 64"),
        (GOOD, "line 2 has the name 'a', too"),
        (GOOD.replace('"a"', '"b"'), "line 2 has the id '01234567', too"),
        ("[" * 5000, "not a JSON object"),
        (GOOD[:-1] + ', "datasets": ["x"], "datasets": null}', "the key 'datasets' is there twice"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_invalid_lines(line: str | bytes, reason: str) -> None:
    """The reason contains the line number, but no value, which may be a secret."""
    raw = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(TokenFileError, match=r"^line 4: ") as caught:
        parse(b"# ours\n" + GOOD.encode() + b"\n\n" + raw + b"\n")
    assert reason in caught.value.detail and "of-mine" not in caught.value.detail and "00000" not in caught.value.detail


def test_a_server_does_not_start_with_an_invalid_token_file(data: Path, tmp_path: Path) -> None:
    """A server does not start with an invalid or missing file, or with a pipe, instead of ignoring it silently."""
    file = tmp_path / "tokens"
    for content, words in ((None, "No such file"), ("x", "line 1: "), ("pipe", "not a regular file")):
        if content == "pipe":
            file.unlink()
            os.mkfifo(file)
        elif content is not None:
            file.write_text(content)
        done = COMMANDS.run(["serve", str(data), "--port", "0", "--token-file", str(file)])
        assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.fixture
def followed(data: Path, file: Path, create: Callable[..., str], tmp_path: Path) -> Iterator[tuple[ServerProcess, str]]:
    """A server of two workers that uses `file`, and a token from it."""
    token = create("alice")
    server = _guarded(data, tmp_path / "cache", file)
    yield server, token
    assert server.stop() == 0


def test_servers_follow_the_file(followed: tuple[ServerProcess, str], create: Callable[..., str]) -> None:
    """All workers accept a new token, and reject a revoked one and its cookie."""
    server, alice = followed
    bob = create("bob", "--datasets", "mnist")
    wait_until(lambda: _statuses(server, bob) == {200})
    assert _statuses(server, alice) == {200}
    with httpx.Client(base_url=server.url, timeout=60, headers={"accept": "text/html"}) as browser:
        assert browser.post("/sign-in", data={"token": bob}).status_code == 303
        page = browser.get("/")
        assert page.status_code == 200 and "zoo" not in page.text
        # Who signs in with another token sees what that one is for.
        assert browser.post("/sign-in", data={"token": alice}).status_code == 303
        assert "zoo" in browser.get("/").text and len(browser.cookies) == 1
        assert server_main(["token", "revoke", "alice"]) == 0
        wait_until(lambda: browser.get("/").status_code == 303)
    wait_until(lambda: _statuses(server, alice) == {401})
    assert _statuses(server, bob) == {200}


def test_an_invalid_token_file_changes_nothing(
    data: Path, file: Path, create: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The previous tokens stay valid, also for a worker that starts now, and revoked tokens stay revoked. The log has
    one line with the line number and the reason, and one line when the file is valid again."""
    alice, bob = create("alice"), create("bob")
    server = _guarded(data, tmp_path / "cache", file)
    said = ""

    def logged(words: str) -> bool:
        nonlocal said
        said += capfd.readouterr().err
        return words in said

    try:
        with contextlib.redirect_stderr(io.StringIO()):
            assert server_main(["token", "revoke", "alice"]) == 0
        wait_until(lambda: _statuses(server, alice) == {401})
        good = file.read_text()
        file.write_text(good + "{broken\n")
        wait_until(lambda: logged("line 2"))
        before = server.worker_pids()
        os.kill(before[0], signal.SIGKILL)
        wait_until(lambda: len(server.worker_pids()) == 2 and before[0] not in server.worker_pids())
        wait_until(lambda: _is_ready(server))
        assert _statuses(server, bob) == {200} and _statuses(server, alice) == {401}
        file.unlink()
        wait_until(lambda: logged("No such file"))
        assert _statuses(server, bob) == {200}
        file.write_text(good)
        wait_until(lambda: logged("is valid again"))
        assert _statuses(server, bob) == {200} and _statuses(server, alice) == {401}
    finally:
        assert server.stop() == 0
    said += capfd.readouterr().err
    lines = [line for line in said.splitlines() if "tokens.keyring" in line]
    assert len(lines) == 3 and "not a JSON object" in lines[0] and str(file) in lines[0], lines


def _is_ready(server: ServerProcess) -> bool:
    """Whether the worker that was started last responds: connections go to the worker with the fewest."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(timeout=60)) for _ in range(4)]
        return all(http.get(f"{server.url}/healthz").status_code == 200 for http in clients)


def test_an_empty_token_file_lets_nobody_in(
    data: Path, file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With an empty file nobody can connect, and the server says so. Tokens from the variable are valid in addition."""
    file.write_text("# none yet\n")
    server = _guarded(data, tmp_path / "cache", file)
    try:
        assert _statuses(server, "x") == {401}
        assert "has no tokens, so nobody can connect" in capfd.readouterr().err
    finally:
        assert server.stop() == 0
    server = _guarded(data, tmp_path / "cache", file, H5FEED_TOKENS="of-the-variable")
    try:
        assert _statuses(server, "of-the-variable") == {200} and _statuses(server, "x") == {401}
    finally:
        assert server.stop() == 0


def test_an_expired_token_is_reported(
    followed: tuple[ServerProcess, str], create: Callable[..., str], file: Path
) -> None:
    """The API, the sign-in form and the pages of a signed-in user say that the token has expired."""
    server, _ = followed
    brief = create("brief", "--expires", "1h")
    wait_until(lambda: _statuses(server, brief) == {200})
    with httpx.Client(base_url=server.url, timeout=60, headers={"accept": "text/html"}) as browser:
        assert browser.post("/sign-in", data={"token": brief}).status_code == 303
        assert browser.get("/").status_code == 200
        line = json.loads(file.read_text().splitlines()[1])
        line["expires"] = "2026-01-01T05:00:00+05:00"
        file.write_text(json.dumps(line) + "\n")
        wait_until(lambda: browser.get("/").status_code == 303)
        said = browser.get(browser.get("/").headers["location"])
        assert "expired on 2026-01-01 at 00:00 UTC" in said.text
        again = browser.post("/sign-in", data={"token": brief})
        assert again.status_code == 401 and "expired on" in again.text
    with h5feed.connect(server.url, token=brief, deadline=60) as feed:
        wait_until(lambda: _statuses(server, brief) == {401})
        with pytest.raises(h5feed.Unauthorized, match="token 'brief' expired on 2026-01-01"):
            feed.datasets()


def test_a_file_that_is_being_written(followed: tuple[ServerProcess, str], file: Path) -> None:
    """An editor may empty the file before it writes it. Content that is there only for a moment is ignored."""
    server, alice = followed
    content = file.read_text()
    with httpx.Client(base_url=server.url, timeout=60, headers={"authorization": f"Bearer {alice}"}) as http:
        for _ in range(20):
            file.write_text("")
            file.write_text(content)
            assert http.get("/v1/datasets").status_code == 200


def test_a_token_expires_while_the_server_runs(followed: tuple[ServerProcess, str], create: Callable[..., str]) -> None:
    """A token expires while the server runs, without any change of the file."""
    server, _ = followed
    brief = create("brief", "--expires", "2s")
    wait_until(lambda: _statuses(server, brief) == {401})
    answer = httpx.get(f"{server.url}/v1/datasets", headers={"authorization": f"Bearer {brief}"}, timeout=60)
    wait_until(
        lambda: (
            "expired"
            in httpx.get(f"{server.url}/v1/datasets", headers={"authorization": f"Bearer {brief}"}, timeout=60).text
        )
    )
    assert answer.headers["www-authenticate"] == "Bearer"


# Scopes


@pytest.mark.parametrize(
    ("patterns", "covered", "not_covered"),
    [
        (("mnist*",), ("mnist", "mnist.train", "mnist_a/b"), ("Mnist", "amnist", "")),
        (("a.?", "b[12]"), ("a.x", "b1"), ("a.xy", "b3", "a.x\n")),
        (("*",), ("anything", "a\nb"), ()),
        (("(a|b)+",), ("(a|b)+",), ("a", "ab")),
    ],
)
def test_patterns(patterns: tuple[str, ...], covered: tuple[str, ...], not_covered: tuple[str, ...]) -> None:
    """Patterns work as in a shell: they match the whole name, and case matters."""
    scope = DatasetScope(patterns)
    assert all(map(scope.covers, covered)) and not any(map(scope.covers, not_covered))
    assert EVERYTHING.covers("x") and not NOTHING.covers("x") and not NOTHING.covers("")


def test_numbers_about_the_scope(data: Path, file: Path, create: Callable[..., str], tmp_path: Path) -> None:
    """The numbers of datasets and of other clients are those of the scope."""
    some, every = create("some", "--datasets", "mnist"), create("every")
    server = _guarded(data, tmp_path / "cache", file)
    try:
        with httpx.Client(base_url=server.url, timeout=60) as http:

            def get(path: str, token: str) -> httpx.Response:
                return http.get(path, headers={"authorization": f"Bearer {token}"})

            wait_until(lambda: get("/v1/datasets/zoo/batches/0?batch_size=2", every).status_code == 200)
            assert get("/v1/datasets/mnist/batches/0?batch_size=2", every).status_code == 200
            wait_until(lambda: 'h5feed_datasets{status="ok"} 2.0' in get("/metrics", every).text)
            assert 'h5feed_datasets{status="ok"} 1.0' in get("/metrics", some).text
            wait_until(lambda: get("/?format=json", every).json()["now"]["callers"] == 1)
            assert get("/?format=json", some).json()["now"]["callers"] == 0
    finally:
        assert server.stop() == 0


def test_files_with_datasets_outside_the_scope(file: Path, create: Callable[..., str], tmp_path: Path) -> None:
    """The tree and the viewers show whole files. They hide files that contain, or refer to, a dataset outside the
    scope."""
    folder = tmp_path / "data"
    folder.mkdir()
    with h5py.File(folder / "both.h5", "w") as to:
        # With nothing in common, so that they are two datasets.
        to["open/x"], to["open/y"] = np.zeros((10, 3)), np.arange(10)
        to["hidden/images"], to["hidden/t"] = np.zeros((25, 8, 8, 3), np.uint8), np.arange(25.0)
    with h5py.File(folder / "secret.h5", "w") as to:
        to["x"], to["y"] = np.zeros((7, 3)), np.arange(7)
    with h5py.File(folder / "linking.h5", "w") as to:
        to["x"] = h5py.ExternalLink("secret.h5", "/x")
        to["own"] = np.zeros((7, 2))
    with h5py.File(folder / "alone.h5", "w") as to:
        to["x"] = np.zeros((5, 3))
    (folder / "secret notes.txt").write_text("x")
    token = create("some", "--datasets", "both.open", "--datasets", "linking", "--datasets", "alone")
    every = create("every")
    server = _guarded(folder, tmp_path / "cache", file)
    try:
        with httpx.Client(base_url=server.url, timeout=60) as http:

            def get(path: str, token: str = token) -> httpx.Response:
                return http.get(path, headers={"authorization": f"Bearer {token}"})

            def names(token: str) -> list[str]:
                return [one["name"] for one in get("/v1/datasets", token).json()["datasets"]]

            wait_until(lambda: "preparing" not in get("/v1/datasets", every).text)
            assert {"both.open", "both.hidden", "secret", "secret notes.txt"} <= set(names(every))
            assert names(token) == ["alone", "both.open", "linking"]
            for name, status in (("alone", 200), ("both.open", 404), ("linking", 404), ("both.hidden", 404)):
                answers = [get(f"/v1/datasets/{name}/tree"), get(f"/datasets/{name}/tree?format=json")]
                stem = name.partition(".")[0]
                answers.append(get(f"/h5grove/paths?file={stem}.h5"))
                for answer in answers:
                    assert answer.status_code == status, (name, answer.text)
                    assert name == "both.hidden" or ("hidden" not in answer.text and "secret" not in answer.text)
                assert get(f"/v1/datasets/{name}/tree", every).status_code == 200
            assert "does not cover all" in get("/v1/datasets/both.open/tree").json()["detail"]
            for missing in ("secret.h5", "secrets.h5"):
                answer = get(f"/h5grove/meta?file={missing}")
                assert answer.status_code == 404 and "secret.h5" not in answer.json()["detail"].replace(missing, "")
            assert get("/v1/datasets/both.open/rows?start=0&stop=3").status_code == 200
            assert get("/v1/datasets/both.hidden/rows?start=0&stop=3").status_code == 404
    finally:
        assert server.stop() == 0


# What nobody gets to read


def test_no_token_in_logs(
    data: Path, file: Path, create: Callable[..., str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """No valid or invalid token, however it is sent, appears in logs, errors or the list of processes."""
    good = create("alice")
    wrong = good[:-6] + "wrong-"
    fixed = "fixed-token-of-the-variable"
    server = _guarded(data, tmp_path / "cache", file, "--access-log", H5FEED_TOKENS=fixed)
    answers = []
    with httpx.Client(base_url=server.url, timeout=60) as http:
        for token in (good, wrong, fixed):
            proof = proof_of(token.encode())
            for headers in ({}, {"authorization": f"Bearer {token}"}, {"cookie": f"h5feed_{good[7:15]}={proof}"}):
                for path in (
                    "/v1/datasets",
                    f"/v1/datasets?token={token}",
                    f"/?token={token}&q=x",
                    f"/?access_token={token}",
                    f"/v1/datasets/mnist/batches/0?batch_size=2&Authorization=Bearer%20{token}",
                    f"/sign-in?next=%2F%3Ftoken%3D{token}",
                ):
                    for accept in ("*/*", "text/html"):
                        answers.append(http.get(path, headers={**headers, "accept": accept}))
            answers.append(http.post("/sign-in", data={"token": token, "next": "/"}))
            answers.append(http.get(f"/v1/datasets/{token}", headers={"authorization": f"Bearer {good}"}))
    processes = [server.process.pid, *server.worker_pids()]
    commands = [Path(f"/proc/{pid}/cmdline").read_text() for pid in processes]
    assert server.process.stdout is not None
    server.process.send_signal(signal.SIGTERM)
    logs = server.process.stdout.read() + capfd.readouterr().err
    assert server.stop() == 0
    assert logs.count(" ms") == len(answers) and "[hidden]" in logs
    for token in (good, wrong, fixed):
        for text in (token, token[16:], proof_of(token.encode())):
            assert text not in logs and text not in "".join(commands)
            assert not any(text in answer.headers.get("location", "") for answer in answers)
    for answer in answers:
        if answer.status_code in (400, 401):
            assert good not in answer.text and fixed not in answer.text


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("/v1/datasets?q=token&limit=3", "/v1/datasets?q=token&limit=3"),
        ("/x?token=abc", "/x?token=[hidden]"),
        ("/x?a=1&API_KEY=abc&b=2", "/x?a=1&API_KEY=[hidden]&b=2"),
        ("/sign-in?next=%2Fx%3Ftoken%3Dabc%26b%3D2", "/sign-in?next=%2Fx%3Ftoken%3D[hidden]%26b%3D2"),
        ("/h5grove/attr?file=a&attr_keys=b", "/h5grove/attr?file=a&attr_keys=b"),
        ("/v1/h5feed_01234567_abcdefgh", "/v1/[hidden]"),
        ("/v1/known-secret/x", "/v1/[hidden]/x"),
    ],
)
def test_urls_in_logs(url: str, shown: str) -> None:
    """Values of parameters with names like `token` are hidden; parameters of the API are not."""
    assert without_secrets(url, ["known-secret", "x"]) == shown


# The token that the server creates


def test_a_created_token_is_printed_only_to_a_terminal(data: Path, tmp_path: Path) -> None:
    """On a terminal, the created token is printed. A log contains the command that prints it."""
    command = [sys.executable, "-m", "h5feed_server.cli", "serve", str(data), "--host", "0.0.0.0", "--port", "0"]
    command += ["--cache-dir", str(tmp_path / "cache")]
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL, start_new_session=True)
    os.close(theirs)
    said = ""
    try:
        while "token show" not in said:
            ready, _, _ = select.select([ours], [], [], 60)
            assert ready, said
            said += os.read(ours, 4096).decode()
    finally:
        process.terminate()
        assert process.wait(60) == 0
        os.close(ours)
    token = (tmp_path / "cache" / "token").read_text()
    assert f"token: {token} " in said and stat.S_IMODE((tmp_path / "cache" / "token").stat().st_mode) == 0o600
    shown = COMMANDS.run(["token", "show"], H5FEED_CACHE_DIR=str(tmp_path / "cache"))
    assert (shown.returncode, shown.stdout) == (0, f"{token}\n")
    missing = COMMANDS.run(["token", "show", "--cache-dir", str(data)])
    assert missing.returncode == 1 and missing.stdout == "" and "there is no token" in missing.stderr


def test_a_token_that_can_be_neither_printed_nor_stored(data: Path, tmp_path: Path) -> None:
    """If the created token can be neither printed nor stored, the server does not start."""
    (tmp_path / "cache").write_text("no folder")
    done = COMMANDS.run(
        ["serve", str(data), "--host", "0.0.0.0", "--port", "0", "--cache-dir", str(tmp_path / "cache")]
    )
    assert done.returncode == 1 and "H5FEED_TOKENS" in done.stderr and done.stdout == ""


# Clients


def test_tokens_that_are_all_refused(
    followed: tuple[ServerProcess, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that has another wrong token each time it is looked at is not followed for ever."""
    server, _ = followed
    own, sent = tmp_path / "my-token", list[str]()
    own.write_text("wrong-0")
    monkeypatch.delenv("H5FEED_TOKEN", raising=False)
    monkeypatch.setenv("H5FEED_TOKEN_FILE", str(own))

    def change(response: httpx.Response) -> None:
        sent.append(response.request.headers["authorization"])
        assert len(sent) < 20
        own.write_text(f"wrong-{len(sent) % 2}")

    with pytest.raises(Unauthorized):  # noqa: SIM117
        with h5feed.connect(server.url, deadline=60, event_hooks={"response": [change]}) as feed:
            feed.datasets()
    assert sent == ["Bearer wrong-0", "Bearer wrong-1"]


def test_clients_read_a_file(
    followed: tuple[ServerProcess, str], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Clients read a token from a file, so that it is neither in a list of processes nor in the environment."""
    server, token = followed
    own = tmp_path / "my-token"
    own.write_text(f"{token}\n")
    monkeypatch.delenv("H5FEED_TOKEN", raising=False)
    monkeypatch.setenv("H5FEED_TOKEN_FILE", str(own))
    with h5feed.connect(server.url, deadline=60) as feed:
        assert {one["name"] for one in feed.datasets()} == {"mnist", "zoo"}
    monkeypatch.delenv("H5FEED_TOKEN_FILE")
    assert main(["ls", server.url, "--token-file", str(own)]) == 0 and "mnist" in capsys.readouterr().out
    for content, words in (
        (file.read_text(), "token file of a server"),
        ("", "one token and nothing else"),
        ("two tokens", "one token and nothing else"),
        ("x" * 9000, "one token and nothing else"),
    ):
        own.write_text(content)
        assert main(["ls", server.url, "--token-file", str(own)]) == 1
        said = capsys.readouterr().err
        assert words in said and str(own) in said and "xxx" not in said
    monkeypatch.setenv("H5FEED_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(BadParameter, match=r"H5FEED_TOKEN_FILE.*No such file"):
        h5feed.connect(server.url)
    monkeypatch.setenv("H5FEED_TOKEN", token)
    with h5feed.connect(server.url, deadline=60) as feed:
        assert len(feed.datasets()) == 2
