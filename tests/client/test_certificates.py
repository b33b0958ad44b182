"""TLS as users set it up: authorities of their own, client certificates, and what is wrong with either."""

from __future__ import annotations

import pickle
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import numpy as np
import pytest
from h5feed.errors import BadParameter, ConnectionFailed

from tests.support.authority import Authority, Issued
from tests.support.proxies import ReverseProxy
from tests.support.server_process import ServerProcess

NAME = "localhost"

PATIENT = 300.0
"""Seconds; whoever waits for it has not been told at once."""


@pytest.fixture(autouse=True)
def _no_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """One that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"), "Another authority")


@pytest.fixture(scope="module")
def secure(authority: Authority, folder: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    """A server on https, with a certificate for its name."""
    files = authority.issue(NAME)
    tls = ("--tls-cert", str(files.cert), "--tls-key", str(files.key))
    return serve_module(folder, *tls)


@pytest.fixture(params=["TLS 1.2", "TLS 1.3"])
def mutual(request: pytest.FixtureRequest, server: ServerProcess, authority: Authority) -> Iterator[ReverseProxy]:
    """What stands before the server lets only those in who have a certificate of the authority."""
    context = authority.issue(NAME).context()
    context.load_verify_locations(authority.cert)
    context.verify_mode = ssl.CERT_REQUIRED
    version = ssl.TLSVersion.TLSv1_2 if request.param == "TLS 1.2" else ssl.TLSVersion.TLSv1_3
    context.minimum_version = context.maximum_version = version
    opened = ReverseProxy(server.port, context)
    yield opened
    opened.close()


def _joined(files: Issued, path: Path) -> Path:
    """Certificate and key in one file."""
    path.write_text(files.cert.read_text() + files.key.read_text())
    return path


@pytest.mark.parametrize("form", ["one file", "text", "two files"])
def test_a_client_certificate(
    mutual: ReverseProxy, authority: Authority, feed: h5feed.Feed, tmp_path: Path, form: str
) -> None:
    """An epoch is the same with it, over connections that are used again, and in a copy for another process."""
    files = authority.issue("trainer")
    joined = _joined(files, tmp_path / "both.pem")
    cert: Any = {"one file": joined, "text": str(joined), "two files": (files.cert, files.key)}[form]
    order: Any = {"batch_size": 7, "shuffle": True}
    with h5feed.connect(f"https://{NAME}:{mutual.port}", verify=authority.cert, cert=cert, deadline=60) as far:
        for one, two in zip(feed["tall"].batches(**order), far["tall"].batches(**order), strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], two[name])
        opened = mutual.handshakes
        for _ in range(10):
            far["tall"].batch(1, batch_size=7)
        assert mutual.handshakes == opened
        copy = pickle.loads(pickle.dumps(far["tall"]))
        assert copy.batch(1, batch_size=7).rows.tolist() == far["tall"].batch(1, batch_size=7).rows.tolist()


def test_a_client_certificate_that_is_not_accepted(
    mutual: ReverseProxy, authority: Authority, stranger: Authority, request: pytest.FixtureRequest
) -> None:
    """None, one that has expired, and one of another authority: said at once, with what to pass."""
    old, foreign = authority.issue("trainer", days=-1), stranger.issue("trainer")
    is_old_tls = "1.2" in request.node.callspec.id
    cases: list[tuple[Any, str]] = [
        (None, "HANDSHAKE_FAILURE|pass cert=" if is_old_tls else "requires a client certificate: pass cert="),
        (tuple(old), "does not accept the client certificate: .*expired"),
        (tuple(foreign), "does not accept the client certificate: unknown ca"),
    ]
    for cert, match in cases:
        url = f"https://{NAME}:{mutual.port}"
        with h5feed.connect(url, verify=authority.cert, cert=cert, deadline=PATIENT) as far:
            with pytest.raises(ConnectionFailed, match=match) as raised:
                far.datasets()
            assert "cert=" in str(raised.value)


def test_files_that_are_no_certificates(
    secure: ServerProcess, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are named at once, with the option or the variable that names them."""
    other = tmp_path / "ca.pem"
    other.write_text("no certificate")
    for options in ({"verify": str(other)}, {"cert": str(other)}, {"verify": "nowhere.pem"}, {"cert": "nowhere.pem"}):
        with pytest.raises(BadParameter, match=r"^(verify|cert)='[^']*\.pem'"):
            h5feed.connect(f"https://{NAME}", **options)  # type: ignore[arg-type]
    one, two = authority.issue("one"), authority.issue("two")
    with pytest.raises(BadParameter, match="KEY_VALUES_MISMATCH"):
        h5feed.connect(f"https://{NAME}", cert=(one.cert, two.key))
    with pytest.raises(BadParameter, match="cert="):
        h5feed.connect(f"https://{NAME}", cert=one.cert)
    for name, value in (
        ("SSL_CERT_FILE", str(other)), ("SSL_CERT_FILE", "nowhere.pem"), ("SSL_CERT_DIR", "nowhere")
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(BadParameter, match=f"{name}='{value}'"):
                h5feed.connect(f"https://{NAME}", cert=one)
            with (
                h5feed.connect(f"https://{NAME}:{secure.port}", deadline=PATIENT) as far,
                pytest.raises(BadParameter, match=f"{name}='{value}'"),
            ):
                far.datasets()


def test_an_encrypted_key(authority: Authority) -> None:
    """Nobody is asked for its password on a terminal; the message says how to do without, and a context can have it."""
    files = authority.issue("trainer", password="of-the-key")
    with pytest.raises(BadParameter, match=r"key is encrypted.*openssl pkey.*verify="):
        h5feed.connect(f"https://{NAME}", cert=files)


def test_a_context_with_an_encrypted_key(mutual: ReverseProxy, authority: Authority) -> None:
    """What the message says works."""
    files = authority.issue("trainer", password="of-the-key")
    context = ssl.create_default_context(cafile=authority.cert)
    context.load_cert_chain(files.cert, files.key, password="of-the-key")
    with h5feed.connect(f"https://{NAME}:{mutual.port}", verify=context, deadline=60) as far:
        assert len(far["tall"].batch(0, batch_size=7).rows) == 7


def _folder(authority: Authority, path: Path) -> Path:
    """As `openssl rehash` makes one."""
    path.mkdir()
    (path / "ca.pem").write_bytes(authority.cert.read_bytes())
    subprocess.run(["openssl", "rehash", path], check=True, capture_output=True)
    return path


@pytest.mark.parametrize("way", ["verify", "verify folder", "SSL_CERT_FILE", "SSL_CERT_DIR"])
def test_an_authority_of_ones_own(
    secure: ServerProcess, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Its certificate, or a folder with it, in each way that the documentation names."""
    options: dict[str, Any] = {}
    if way == "verify":
        options["verify"] = authority.cert
    elif way == "verify folder":
        options["verify"] = str(_folder(authority, tmp_path / "folder"))
    elif way == "SSL_CERT_FILE":
        monkeypatch.setenv(way, str(authority.cert))
    else:
        monkeypatch.setenv(way, str(_folder(authority, tmp_path / "folder")))
    with h5feed.connect(f"https://{NAME}:{secure.port}", deadline=PATIENT, **options) as far:
        assert len(far["tall"].batch(0, batch_size=7).rows) == 7


def test_certificates_that_are_not_trusted(
    secure: ServerProcess, server: ServerProcess, authority: Authority, stranger: Authority, tmp_path: Path
) -> None:
    """An unknown authority, another name and one that has expired: said at once, each with what to do."""
    (tmp_path / "ca.pem").write_bytes(authority.cert.read_bytes())
    cases: list[tuple[str, Any, str]] = [
        (f"https://{NAME}:{secure.port}", True, r"not trusted: .*verify='ca.pem', or set SSL_CERT_FILE"),
        (f"https://{NAME}:{secure.port}", stranger.cert, r"not trusted: .*verify='ca.pem'"),
        # A folder without the links by which OpenSSL finds certificates.
        (f"https://{NAME}:{secure.port}", tmp_path, r"not trusted: .*openssl rehash"),
        (f"https://127.0.0.1:{secure.port}", authority.cert, r"for another name: .*127\.0\.0\.1.*Connect by a name"),
    ]
    for url, verify, match in cases:
        with h5feed.connect(url, verify=verify, deadline=PATIENT) as far, pytest.raises(ConnectionFailed, match=match):
            far.datasets()
    old = ReverseProxy(server.port, authority.issue(NAME, days=-1).context())
    with (
        h5feed.connect(f"https://{NAME}:{old.port}", verify=authority.cert, deadline=PATIENT) as far,
        pytest.raises(ConnectionFailed, match="not valid now: certificate has expired"),
    ):
        far.datasets()
    old.close()
    with h5feed.connect(f"https://127.0.0.1:{secure.port}", verify=False, deadline=60) as far:
        assert far.datasets()
