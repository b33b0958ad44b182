"""Who gets in, by which door, and what is behind it: sockets, tokens, names of the server, links, rights."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.cli import main
from h5feed.errors import FeedError, HostNotAllowed, Unauthorized
from h5feed_server.cli import main as server_main
from h5feed_server.serve.exposure import is_open
from h5feed_server.serve.listening import listen
from h5feed_server.settings import Settings
from h5feed_server.tokens.generated import kept_token
from pydantic import ValidationError

from tests.support.fork_server import COMMANDS
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "h5feed_server.cli", "serve"]
BATCH = "/v1/datasets/mixed/batches/0?batch_size=8"
EVIL = {"host": "evil.example"}


def _file(path: Path, value: float = 0.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["x"], file["y"] = np.full((20, 2), value), np.arange(20) % 2


def _refused(*arguments: str, **environment: str) -> tuple[int, str]:
    """The exit code of a server that does not start, and what it says."""
    done = COMMANDS.run(["serve", *arguments], **environment)
    assert "Traceback" not in done.stderr and done.stdout == ""
    return done.returncode, done.stderr


# Unix sockets


@pytest.mark.parametrize("kind", ["file", "link", "pipe", "folder"])
def test_nobody_elses_file_makes_room_for_a_socket(tmp_path: Path, kind: str) -> None:
    """What lies at the path and is not a socket stays, and is named."""
    (tmp_path / "notes").write_text("mine")
    path = tmp_path / "notes" if kind == "file" else tmp_path / "there"
    if kind == "link":
        path.symlink_to("notes")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    before = path.lstat()
    with pytest.raises(FileExistsError, match="not a socket"):
        listen(Settings(uds=str(path)))
    assert os.path.samestat(path.lstat(), before)
    assert (tmp_path / "notes").read_text() == "mine"


def test_only_a_dead_socket_makes_room(tmp_path: Path) -> None:
    """The socket of a living server stays where it is; that of a dead one is replaced."""
    path = tmp_path / "feed.sock"
    (living,) = listen(Settings(uds=str(path)))
    with living, pytest.raises(OSError, match="in use"):
        listen(Settings(uds=str(path)))
    assert path.is_socket()
    (living,) = listen(Settings(uds=str(path)))
    with living, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_the_command_leaves_files_where_they_are(
    serve: Callable[..., ServerProcess], folder: Path, tmp_path: Path
) -> None:
    """Neither when it starts nor when it ends does it remove a file that is not its own socket."""
    path = tmp_path / "weights.bin"
    path.write_text("mine")
    code, said = _refused(str(folder), "--uds", str(path))
    assert code == 1 and "not a socket" in said and str(path) in said and len(said.splitlines()) == 1
    assert path.read_text() == "mine"
    server = serve(folder, "--uds", str(tmp_path / "feed.sock"))
    path.replace(tmp_path / "feed.sock")
    assert server.stop() == 0
    assert (tmp_path / "feed.sock").read_text() == "mine"


def test_settings_of_a_socket_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    """One line each, which says what would be right; no socket stays."""
    path = tmp_path / "feed.sock"
    for options, code, words in (
        (("--socket-mode", "0666"), 2, "socket_mode is for the Unix socket of --uds (H5FEED_UDS), which is not set"),
        (("--socket-group", "0"), 2, "socket_group is for the Unix socket of --uds"),
        (("--uds", str(path), "--socket-mode", "rw"), 2, "--socket-mode rw: must be an octal number such as 0660"),
        (("--uds", str(path), "--socket-mode", "600", "--uds-mode", "0666"), 2, "set only socket_mode"),
        (("--uds", str(path), "--socket-group", "no-such"), 1, "there is no group 'no-such' for --socket-group"),
    ):
        found, said = _refused(str(folder), *options, H5FEED_TOKENS="s3cret-of-mine")
        assert found == code and words in said and len(said.splitlines()) == 1 and "s3cret" not in said
    assert not path.exists()
    with pytest.raises(ValidationError) as caught:
        Settings(tokens="s3cret-of-mine", socket_mode="0600")
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("names", [("--uds-mode",), ("--socket-mode",), ("--socket-mode", "--uds-mode")])
def test_the_mode_of_a_socket(
    serve: Callable[..., ServerProcess], folder: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    """By its name, by its older name, and by both if they agree."""
    path = tmp_path / "feed.sock"
    serve(folder, "--uds", str(path), *(word for name in names for word in (name, "0622")))
    assert path.stat().st_mode & 0o777 == 0o622


def test_the_group_of_a_socket(serve: Callable[..., ServerProcess], folder: Path, tmp_path: Path) -> None:
    """Its members may connect, if no mode says otherwise."""
    path = tmp_path / "feed.sock"
    serve(folder, "--uds", str(path), "--socket-group", str(os.getgid()))
    assert (path.stat().st_gid, path.stat().st_mode & 0o777) == (os.getgid(), 0o660)


def test_a_file_alone(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """A file instead of a folder is the only one that is served, and what it says of itself is the file."""
    _file(tmp_path / "data/one.h5")
    _file(tmp_path / "data/two.h5")
    server = serve(tmp_path / "data/one.h5", "--workers", "2")
    assert [entry["name"] for entry in h5feed.connect(server.url).datasets()] == ["one"]
    code, said = _refused(str(tmp_path / "data/three.h5"))
    assert code == 2 and said == f"h5feed-server: {tmp_path / 'data/three.h5'} does not exist\n"


# Tokens


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (",", "token 1 of 2 is empty"),
        (" ", "token 1 of 1 is empty"),
        ("hidden,", "token 2 of 2 is empty"),
        (",hidden", "token 1 of 2 is empty"),
        ("hidden,change-me", "token 2 of 2 is the placeholder"),
        ("Change_Me", "placeholder"),
        ("hid den", "visible ASCII"),
        ("hid\nden", "visible ASCII"),
        ("hidden…", "visible ASCII"),
        ("hidden" * 200, "1200 characters"),
    ],
)
def test_tokens_that_guard_nothing(tokens: str, words: str) -> None:
    """Those that are empty, that everybody knows or that no header carries are refused, and never shown."""
    with pytest.raises(ValidationError) as caught:
        Settings(tokens=tokens)
    (error,) = caught.value.errors()
    assert words in error["msg"] and "hid" not in error["msg"]


def test_tokens_that_documents_show() -> None:
    """Whoever copies a document word by word has no token that everybody knows."""
    texts = [ROOT / "README.md", ROOT / ".env.example", ROOT / "docker-compose.yml", *(ROOT / "docs").rglob("*.md")]
    shown = {
        token
        for path in texts
        for found in re.findall(r"""token="([^"]+)"|Bearer ([\w-]+)|H5FEED_TOKENS?=([\w-]+)""", path.read_text())
        for token in found
        if token
    }
    assert "YOUR-TOKEN" in shown
    for token in shown:
        with pytest.raises(ValidationError, match="placeholder"):
            Settings(tokens=token)


def test_settings_that_cannot_be(folder: Path) -> None:
    """A wrong setting is one line that names its variable or flag; an empty token opens no door."""
    code, said = _refused(str(folder), "--host", "0.0.0.0", H5FEED_TOKENS=",s3cret-of-mine")
    assert code == 2 and said.startswith("h5feed-server: H5FEED_TOKENS: token 1 of 2 is empty")
    assert len(said.splitlines()) == 1 and "s3cret" not in said
    code, said = _refused(str(folder), "--port", "99999", "--allowed-host", "http://x", H5FEED_WORKERS="many")
    assert code == 2
    assert sorted(line.split(": ")[1] for line in said.splitlines()) == [
        "--allowed-host http://x",
        "--port 99999",
        "H5FEED_WORKERS=many",
    ]
    code, said = _refused(str(folder), "--uds-mode", "999", H5FEED_PUBLISHED_ON="8000", H5FEED_PORT="-1")
    assert code == 2 and sorted(said.splitlines()) == [
        "h5feed-server: --uds-mode 999: must be an octal number such as 0660",
        "h5feed-server: H5FEED_PORT=-1: must be greater than or equal to 0",
        "h5feed-server: H5FEED_PUBLISHED_ON=8000: must be ADDRESS:PORT, such as 127.0.0.1:8000",
    ]
    for there in (folder / "nothing.pem", folder / "broken.h5"):
        code, said = _refused(str(folder), "--tls-cert", str(there), "--tls-key", str(there))
        assert code == 2 and "--tls-cert" in said and len(said.splitlines()) == 1


def test_empty_variables_are_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """As compose files and scripts pass on what nobody has set."""
    for name in ("TOKENS", "PUBLIC", "PORT", "ALLOWED_HOSTS", "UDS"):
        monkeypatch.setenv(f"H5FEED_{name}", "")
    settings = Settings()
    assert (settings.token_list, settings.public, settings.port, settings.uds) == ((), False, 8000, None)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_token_of_somebody_else_is_kept(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In a cache folder that is one of other things too, a file `token` that the server has not made is moved aside."""
    if kind == "file":
        (tmp_path / "token").write_text("hf_mine")
    else:
        (tmp_path / "token").mkdir()
    token, is_stored = kept_token(tmp_path)
    assert is_stored
    assert len(token) == 32 and "token.old" in capsys.readouterr().err
    assert (tmp_path / "token.old").is_dir() if kind == "folder" else (tmp_path / "token.old").read_text() == "hf_mine"
    assert kept_token(tmp_path) == (token, True) and token == (tmp_path / "token").read_text()
    assert (tmp_path / "token").stat().st_mode & 0o077 == 0 and capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def guarded(folder: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    return serve_module(folder, H5FEED_TOKENS="first-one,second-one")


def test_the_page_is_open_and_names_nothing(guarded: ServerProcess) -> None:
    """With tokens set, the page comes without one, and its schema says how to give it; names come with a token."""
    with httpx.Client(base_url=guarded.url, timeout=60) as http:
        for path in ("/docs", "/redoc"):
            page = http.get(path)
            assert page.status_code == 200 and "https://" not in page.text and "http://" not in page.text
            for asset in re.findall(r'(?:src|href|spec-url)="([^"]+)"', page.text):
                assert http.get(asset).status_code == 200
        for headers in ({}, {"authorization": "Bearer third-one"}, {"authorization": "Basic Zmlyc3Qtb25l"}):
            answer = http.get("/openapi.json", headers=headers)
            assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
            schema = answer.json()
            (scheme,) = schema["components"]["securitySchemes"].items()
            assert schema["security"] == [{scheme[0]: []}]
            assert (scheme[1]["type"], scheme[1]["scheme"]) == ("http", "bearer")
            assert schema["paths"]["/healthz"]["get"]["security"] == []
            # Quoted: "install" contains "tall".
            assert not any(f'"{name}"' in answer.text for name in ("mixed", "sub.small", "tall"))
            assert "first-one" not in answer.text
        http.headers["authorization"] = "Bearer second-one"
        assert '"sub.small"' in http.get("/openapi.json").text
        assert http.get(BATCH).status_code == 200


def test_nothing_else_is_open(guarded: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """Paths that begin or end as open ones do are not; whoever has no token hears how to give one."""
    for path in ("/v1/datasets", BATCH, "/docs/x", "/openapi.jsonx", "/healthz/x", "//docs", "/v1/docs", "/metrics"):
        answer = httpx.get(guarded.url + path, timeout=60)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized"), path
    for target in ("/static/../v1/datasets", "/static/%2e%2e/v1/datasets", "/static/..%2f..%2fapi/auth.py"):
        with socket.create_connection(("127.0.0.1", guarded.port), 60) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            assert connection.makefile("rb").readline().split()[1] == b"404", target
    with (
        h5feed.connect(guarded.url, deadline=60) as feed,
        pytest.raises(Unauthorized, match="pass token= or set H5FEED_TOKEN"),
    ):
        feed.datasets()
    assert main(["ls", guarded.url]) == 1
    assert "--token or set H5FEED_TOKEN" in capsys.readouterr().err
    assert main(["ls", guarded.url, "--token", "wrong"]) == 1
    assert "the one that was sent is wrong" in capsys.readouterr().err


# Names of the server


@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3:80", True),
        ("[::1]:8000", True),
        ("[fe80::1%25eth0]", True),
        ("localhost:99", True),
        ("LOCALHOST.", True),
        ("feed.localhost", True),
        (socket.gethostname(), True),
        ("evil.example", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        (f"{socket.gethostname()}.evil.example", False),
        ("[evil.example]", False),
        ("::1", False),
        ("", False),
        ("*", False),
        ("user@localhost", False),
        ("localhost/x", False),
    ],
)
def test_names_of_a_server_without_tokens(server: ServerProcess, host: str, good: bool) -> None:
    """Addresses, names of the loopback and its own name pass; no name does that a web page could have."""
    for path in ("/v1/datasets", BATCH, "/openapi.json"):
        # The second time, a batch takes the short way.
        for _ in range(2):
            answer = httpx.get(server.url + path, headers={"host": host}, timeout=60)
            assert answer.status_code == (200 if good else 421), path
            if not good:
                problem = answer.json()
                assert problem["code"] == "host_not_allowed" and "H5FEED_ALLOWED_HOSTS" in problem["detail"]
                assert repr(host) in problem["detail"]


def test_odd_heads(server: ServerProcess) -> None:
    """Every one of several names must be good; none comes from no browser; a long one is told in part."""

    def status(*lines: str) -> bytes:
        with socket.create_connection(("127.0.0.1", server.port), 60) as connection:
            head = "".join(f"{line}\r\n" for line in ("GET /v1/datasets HTTP/1.1", *lines, "connection: close", ""))
            connection.sendall(head.encode())
            return connection.makefile("rb").readline().split()[1]

    assert status("host: localhost") == status() == b"200"
    assert status("host: localhost", "host: evil.example") == status("host: evil.example", "host: localhost") == b"421"
    answer = httpx.get(f"{server.url}/v1/datasets", headers={"host": "evil" * 1000}, timeout=60)
    assert answer.status_code == 421 and len(answer.content) < 1000
    assert httpx.get(f"{server.url}/healthz", headers=EVIL, timeout=60).text == "ok"
    assert httpx.get(f"{server.url}/readyz", headers=EVIL, timeout=60).text == "ok"


def test_a_token_stands_for_any_name(guarded: ServerProcess) -> None:
    """Who has a token may come through any proxy."""
    headers = EVIL | {"authorization": "Bearer first-one"}
    assert httpx.get(f"{guarded.url}/v1/datasets", headers=headers, timeout=60).status_code == 200


def test_answers_are_for_their_own_pages(server: ServerProcess, guarded: ServerProcess) -> None:
    """Whatever is answered, and by whichever part, no other site's page may embed it or take it for something else."""
    urls = [server.url + path for path in ("/docs", "/redoc", "/static/docs.js", "/v1/datasets", "/nothing", BATCH)]
    answers = [httpx.get(url, timeout=60) for url in (*urls, guarded.url + BATCH)]
    answers.append(httpx.get(urls[0], headers=EVIL, timeout=60))
    answers.append(httpx.get(urls[-1], headers={"accept": "application/x-npz"}, timeout=60))
    assert [answer.status_code for answer in answers] == [200, 200, 200, 200, 404, 200, 401, 421, 200]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"


# Links


@pytest.fixture(scope="module")
def linked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which links lead: `out` and `words` out of it, `within` nowhere else; shards and parts of which one
    lies outside."""
    root = tmp_path_factory.mktemp("linked")
    data, outside = root / "data", root / "data-of-others"
    _file(data / "own.h5", 1)
    _file(outside / "secret.h5", 4711)
    _file(data / "shards" / "part-0.h5", 2)
    _file(outside / "part-1.h5", 4711)
    (data / "out.h5").symlink_to(outside / "secret.h5")
    (data / "words.dat").symlink_to(outside / "secret.h5")
    (data / "round.h5").symlink_to("../data-of-others/../data-of-others/secret.h5")
    (data / "within.h5").symlink_to("own.h5")
    (data / "away.h5").symlink_to(outside / "missing.h5")
    (data / "shards" / "part-1.h5").symlink_to(outside / "part-1.h5")
    (data / "folder").symlink_to(outside)
    with h5py.File(data / "cut", "w", driver="split") as file:
        file["x"] = np.arange(1500)
    (data / "cut-r.h5").rename(outside / "cut-r.h5")
    (data / "cut-r.h5").symlink_to(outside / "cut-r.h5")
    with h5py.File(data / "inner.h5", "w") as file:
        file["x"], file["link"] = np.arange(20), h5py.ExternalLink("out.h5", "/x")
        file["escape"] = h5py.ExternalLink("folder/secret.h5", "/x")
    return data


def _listing(server: ServerProcess) -> dict[str, dict[str, object]]:
    def entries() -> list[dict[str, object]]:
        return list(httpx.get(f"{server.url}/v1/datasets", timeout=60).json()["datasets"])

    wait_until(lambda: all(entry["status"] != "preparing" for entry in entries()))
    return {str(entry["name"]): entry for entry in entries()}


def test_links_that_lead_out_are_refused(serve: Callable[..., ServerProcess], linked: Path) -> None:
    """They are listed with the reason, and asked for in vain; those that stay within the folder are served."""
    server = serve(linked)
    listing = _listing(server)
    served = {name for name, entry in listing.items() if entry["status"] == "ok"}
    assert served == {"own", "within", "inner"}
    for name in ("out", "round", "away", "shards"):
        assert "leads out of the data folder" in str(listing[name]["reason"]), name
        assert "--follow-links (H5FEED_FOLLOW_LINKS=1)" in str(listing[name]["reason"])
        answer = httpx.get(f"{server.url}/v1/datasets/{name}/rows?stop=1", timeout=60)
        assert answer.status_code == 422 and "leads out" in answer.json()["detail"]
    assert "its part 'cut-r.h5' is a link that leads out" in str(listing["cut-m"]["reason"])
    assert "link to a folder" in str(listing["folder"]["reason"])
    assert "is an HDF5 file" not in json.dumps(listing["words.dat"])
    fields = httpx.get(f"{server.url}/v1/datasets/inner", timeout=60).json()["fields"]
    assert [field["name"] for field in fields if field["readable"]] == ["x"]
    assert str(linked.parent) not in json.dumps(listing)


def test_a_file_that_becomes_a_link_is_refused(
    serve: Callable[..., ServerProcess], linked: Path, tmp_path: Path
) -> None:
    """What was looked at as a file is not served as a link, nor is a declaration that has become one followed."""
    data = tmp_path / "data"
    _file(data / "a.h5", 1)
    (data / "h5feed.toml").write_text('[datasets.mine]\nfiles = ["a.h5"]\n')
    server = serve(data)
    url = f"{server.url}/v1/datasets/mine/rows?stop=1"
    assert httpx.get(url, timeout=60).status_code == 200
    (tmp_path / "link").symlink_to(linked / "own.h5")
    os.replace(tmp_path / "link", data / "a.h5")
    answer = httpx.get(url, timeout=60)
    assert answer.status_code == 422 and "leads out" in answer.json()["detail"]
    shutil.move(data / "h5feed.toml", tmp_path / "h5feed.toml")
    (data / "h5feed.toml").symlink_to(tmp_path / "h5feed.toml")
    wait_until(lambda: "h5feed.toml" in _listing(server))
    listing = _listing(server)
    assert "h5feed.toml is a link that leads out" in str(listing["h5feed.toml"]["reason"])
    assert "mine" not in listing


def test_links_are_followed_where_they_may_be(serve: Callable[..., ServerProcess], linked: Path) -> None:
    """With --follow-links they are files like others; and a name of --allowed-host is one of the server's."""
    allowed = ("--allowed-host", "gpu-box.example.org", "--allowed-host", "other")
    server = serve(linked, "--follow-links", *allowed)
    listing = _listing(server)
    served = {name for name, entry in listing.items() if entry["status"] == "ok"}
    assert {"own", "within", "inner", "out", "round", "shards", "cut-m"} == served
    assert "missing file" in str(listing["away"]["reason"])
    with h5feed.connect(server.url, deadline=60) as feed:
        assert feed["out"].take([3])["x"][0, 0] == 4711
        inner = feed["inner"].take([3], fields=["x", "link"])
        assert inner["x"][0] == 3 and inner["link"][0, 0] == 4711
        assert feed["cut-m"].take([1499])["x"][0] == 1499
        with pytest.raises(FeedError, match="escape"):
            feed["inner"].take([3], fields=["escape"])
    for name in ("gpu-box.example.org:8000", "GPU-BOX.example.org.", "other"):
        assert httpx.get(f"{server.url}/v1/datasets", headers={"host": name}, timeout=60).status_code == 200
    refused = httpx.get(f"{server.url}/v1/datasets", headers={"host": "x.other"}, timeout=60)
    assert refused.status_code == 421
    with pytest.raises(HostNotAllowed, match="does not accept the host name"):
        raise h5feed.errors.from_problem(refused.status_code, refused.json())


def test_inspect_looks_behind_a_link(linked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Who names a link has the right to read it, and hears that a server needs to be told to."""
    assert server_main(["inspect", str(linked / "out.h5")]) == 0
    assert "--follow-links" in capsys.readouterr().out
    assert server_main(["inspect", str(linked / "own.h5")]) == 0
    assert "--follow-links" not in capsys.readouterr().out


# Containers


def _composed(**dotenv: str) -> dict[str, str]:
    """The environment that Dockerfile and docker-compose.yml give the server, with such an .env."""
    image = dict(re.findall(r"(H5FEED_\w+)=(\S+)", (ROOT / "Dockerfile").read_text()))
    service = (ROOT / "docker-compose.yml").read_text().partition("\n  h5feed:\n")[2].partition("\n\n")[0]
    declared = re.findall(r'^ {6}(H5FEED_\w+): "(.*)"$', service, re.M)
    assert len(declared) >= 5
    substituted = {
        name: re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: dotenv.get(found[1]) or found[2], value)
        for name, value in declared
    }
    return {**image, **substituted}


@pytest.mark.parametrize(
    ("dotenv", "needs_token"),
    [
        ({}, False),
        ({"H5FEED_BIND": "0.0.0.0"}, True),
        ({"H5FEED_BIND": "192.168.1.5", "H5FEED_PORT": "80"}, True),
        ({"H5FEED_BIND": "[::]"}, True),
        ({"H5FEED_BIND": "[::1]"}, False),
        ({"H5FEED_BIND": "0.0.0.0", "H5FEED_PUBLIC": ""}, True),
        ({"H5FEED_BIND": "0.0.0.0", "H5FEED_PUBLIC": "0", "H5FEED_TOKENS": ""}, True),
        ({"H5FEED_BIND": "0.0.0.0", "H5FEED_PUBLIC": "1"}, False),
        ({"H5FEED_BIND": "0.0.0.0", "H5FEED_TOKENS": "my-own-one"}, False),
        ({"H5FEED_BIND": "nonsense"}, True),
    ],
)
def test_what_compose_opens(monkeypatch: pytest.MonkeyPatch, dotenv: dict[str, str], needs_token: bool) -> None:
    """Published on other addresses than the loopback's, without tokens or the word for it, it is open to nobody."""
    for name, value in _composed(**dotenv).items():
        monkeypatch.setenv(name, value)
    assert is_open(Settings()) is needs_token
    assert "h5feed" in Settings().allowed_host_list


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.5", "gpu-box", "127.0.0.1", "localhost", "::1"])
def test_what_the_command_opens(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """An image that is run without compose, and a server without a container, count by what they listen on."""
    assert is_open(Settings(host=host)) is (host not in ("127.0.0.1", "localhost", "::1"))
    assert not is_open(Settings(host=host, public=True)) and not is_open(Settings(host=host, tokens="my-own-one"))


def test_a_container_makes_a_token(folder: Path, tmp_path: Path) -> None:
    """With nothing but H5FEED_BIND=0.0.0.0 in .env: a token is made and wanted, the log has the command that prints it,
    and pages have addresses that a browser can open."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = _composed(H5FEED_BIND="0.0.0.0", H5FEED_PORT=port) | {"H5FEED_WORKERS": "1"}
    del environment["H5FEED_CACHE_DIR"]
    environment["H5FEED_UDS"] = str(tmp_path / "feed.sock")
    server = ServerProcess(folder, tmp_path / "cache", "--port", port, **environment)
    try:
        assert server.url == f"http://127.0.0.1:{port}"
        assert httpx.get(f"{server.url}/v1/datasets", timeout=60).status_code == 401
        assert server.process.stdout is not None
        assert server.process.stdout.readline() == f"and on the Unix socket unix://{tmp_path}/feed.sock\n"
        said = [server.process.stdout.readline() for _ in range(3)]
        assert said[0] == f"browse it at {server.url}/\n" and f"port {port}" in said[1]
        command = re.findall(r"`h5feed-server (token show [^`]*)`", said[2])[0]
        shown = COMMANDS.run(shlex.split(command))
        token = shown.stdout.strip()
        assert shown.returncode == 0 and len(token) == 32 and token not in "".join(said)
        headers = {"authorization": f"Bearer {token}"}
        assert httpx.get(f"{server.url}/v1/datasets", headers=headers, timeout=60).status_code == 200
    finally:
        server.stop()


def test_the_command_in_a_container() -> None:
    """`docker compose exec h5feed h5feed-server …`, as the documentation has it, finds the command."""
    server = (ROOT / "Dockerfile").read_text().partition(" AS server\n")[2]
    (folder,) = re.findall(r"\bPATH=([^:\s]+):", server)
    assert f'ENTRYPOINT ["{folder}/h5feed-server"]' in server


def test_what_grafana_finds() -> None:
    """The compose file puts the data source, the provider and its dashboards where Grafana looks for them."""
    service = (ROOT / "docker-compose.yml").read_text().partition("\n  grafana:\n")[2].partition("\n\n")[0]
    mounts = {inside: ROOT / outside for outside, inside in re.findall(r"- (\./\S+):(/\S+):ro", service)}
    provisioning = mounts["/etc/grafana/provisioning"]
    assert list(provisioning.glob("datasources/*.yml"))
    (provider,) = provisioning.glob("dashboards/*.yml")
    (folder,) = re.findall(r"path: (\S+)", provider.read_text())
    assert list(mounts[folder].glob("*.json"))


# Rights


def _without_privileges() -> None:
    """In a child that is about to become another program: the superuser's right to read everything is lost there."""
    if os.geteuid() == 0:
        for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
            assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0  # PR_CAPBSET_DROP


@pytest.mark.parametrize("mode", [0o700, 0o744])
def test_a_folder_that_cannot_be_read(tmp_path: Path, mode: int) -> None:
    """One line of all workers says so, it is listed, and the server is not ready until it can be read."""
    data = tmp_path / "data"
    _file(data / "a.h5")
    (data / "broken.h5").write_bytes(b"no HDF5")
    if os.geteuid() == 0:
        os.chown(data, 10001, 10001)
    else:
        mode &= 0o077
    data.chmod(mode)
    log = tmp_path / "log"
    with open(log, "w") as stream:
        process = subprocess.Popen(
            [*COMMAND, str(data), "--port", "0", "--workers", "2", "--cache-dir", str(tmp_path / "cache")],
            stdout=subprocess.PIPE,
            stderr=stream,
            text=True,
            preexec_fn=_without_privileges,
        )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().rsplit(" at ", 1)[1].strip()
        with httpx.Client(base_url=url, timeout=60) as one, httpx.Client(base_url=url, timeout=60) as other:
            # Both connections stay open, and lead to two workers.
            for http in (one, other):
                (entry,) = http.get("/v1/datasets").json()["datasets"]
                assert entry["name"] == "." and f"user {os.geteuid()}" in entry["reason"]
                assert http.get("/readyz").status_code in (502, 503)
            said = [line for line in log.read_text().splitlines() if "h5feed_server.catalog" in line]
            assert len(said) == 1 and "the data folder: " in said[0] and "may not read it" in said[0]
            data.chmod(0o755)
            for http in (one, other):
                wait_until(lambda http=http: http.get("/readyz").status_code == 200)  # type: ignore[misc]
                wait_until(lambda http=http: "preparing" not in http.get("/v1/datasets").text)  # type: ignore[misc]
            said = [line for line in log.read_text().splitlines() if "h5feed_server.catalog" in line]
            assert len(said) == 2 and "broken.h5" in said[1]
    finally:
        data.chmod(0o755)
        process.terminate()
        assert process.wait(60) == 0
