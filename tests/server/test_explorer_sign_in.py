"""Pages of a server with tokens: a form takes one, and a cookie stands for it."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import httpx
import numpy as np
import pytest

from tests.support.server_process import ServerProcess

TOKEN = 'first;"one",2'.replace(",", "_")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder: Path = tmp_path_factory.mktemp("data")
    with h5py.File(folder / "secret_data.h5", "w") as file:
        file["x"] = np.zeros((20, 8, 8), np.uint8)
    return serve_module(
        folder,
        H5FEED_TOKENS=f"{TOKEN},second-one",
        H5FEED_TRUSTED_PROXIES="127.0.0.1",
    )


@pytest.fixture
def browser(guarded: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=60, headers={"accept": "text/html,*/*"}) as client:
        yield client


def sign_in(browser: httpx.Client, token: str = TOKEN, following: str = "/") -> httpx.Response:
    return browser.post("/sign-in", data={"token": token, "next": following})


def test_strangers_are_led_to_the_form(browser: httpx.Client) -> None:
    """Pages lead to it, and the API does not; it names nothing that is served."""
    for path in ("/", "/datasets/secret_data/rows?offset=3", "/feed", "/nothing"):
        answer = browser.get(path)
        assert answer.status_code == 303 and answer.headers["location"].startswith("/sign-in?next=%2F")
        assert "secret" not in answer.text
    refused = browser.get("/v1/datasets")
    assert refused.status_code == 401 and "requires a token, and none was sent: pass token=" in refused.json()["detail"]
    refused = browser.get("/v1/datasets", headers={"authorization": "Bearer wrong"})
    assert "requires a token, and the one that was sent is wrong: " in refused.json()["detail"]
    viewer = browser.get("/h5grove/meta?file=secret_data.h5", headers={"accept": "application/json"})
    assert viewer.status_code == 401
    form = browser.get("/sign-in?next=/feed")
    assert form.status_code == 200 and 'value="/feed"' in form.text and "secret" not in form.text
    for asset in ("/explorer/explorer.css", "/explorer/explorer.js", "/explorer/theme.js", "/explorer/icon.svg"):
        assert browser.get(asset).status_code == 200
    assert browser.get("/explorer/../v1/datasets").status_code in (401, 404)


def test_a_token_opens_pages_and_pictures(browser: httpx.Client) -> None:
    """The cookie is no token, cannot be read by scripts, and opens what is asked for by GET alone."""
    answer = sign_in(browser, following="/datasets/secret_data")
    assert (answer.status_code, answer.headers["location"]) == (303, "/datasets/secret_data")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and "Secure" not in cookie and TOKEN not in cookie
    assert "secret_data" in browser.get("/datasets/secret_data").text
    assert browser.get("/v1/datasets/secret_data/rows/0/image").status_code == 200
    assert browser.get("/h5grove/meta?file=secret_data.h5", headers={"accept": "application/json"}).status_code == 200
    assert browser.post("/v1/datasets/secret_data/rows", json={"rows": [0]}).status_code == 401
    assert browser.delete("/v1/jobs/0").status_code == 401
    value = cookie.partition(";")[0].partition("=")[2]
    assert (
        httpx.get(
            f"{str(browser.base_url).rstrip('/')}/v1/datasets", headers={"authorization": f"Bearer {value}"}
        ).status_code
        == 401
    )
    assert "Sign out" in browser.get("/").text
    assert browser.post("/sign-out").headers["location"] == "/sign-in"
    assert browser.get("/").status_code == 303


def test_cookies_of_other_servers_do_no_harm(browser: httpx.Client) -> None:
    """A browser sends those of every server on this host."""
    browser.cookies.set("h5feed_0badf00d", "0badf00d00")
    browser.cookies.set("other", "x=y")
    assert browser.get("/").status_code == 303
    assert sign_in(browser).status_code == 303
    assert browser.get("/").status_code == 200


@pytest.mark.parametrize("token", ["", "wrong", "first", TOKEN + "x", "é"])
def test_wrong_tokens(browser: httpx.Client, token: str) -> None:
    """They are refused, and the form says so."""
    answer = sign_in(browser, token)
    assert answer.status_code == 401 and "set-cookie" not in answer.headers and 'role="alert"' in answer.text
    assert (">Wrong token.<" if token else ">Enter a token.<") in answer.text
    assert browser.get("/").status_code == 303


@pytest.mark.parametrize(
    "following", ["//evil.example/", "https://evil.example", "/\\evil.example", "\\\\e", "x", "/\n/e"]
)
def test_the_form_leads_to_this_server_alone(browser: httpx.Client, following: str) -> None:
    """Whatever the link to the form says."""
    assert sign_in(browser, following=following).headers["location"] == "/"


def test_forms_of_other_pages_are_refused(browser: httpx.Client) -> None:
    """Nobody is signed in, or out, by a page of somebody else."""
    for headers in ({"origin": "http://evil.example"}, {"sec-fetch-site": "cross-site"}):
        answer = browser.post("/sign-in", data={"token": TOKEN}, headers=headers)
        assert answer.status_code == 401 and "set-cookie" not in answer.headers
        assert browser.post("/sign-out", headers=headers).status_code == 401
    own = {"origin": str(browser.base_url).rstrip("/")}
    assert browser.post("/sign-in", data={"token": TOKEN}, headers=own).status_code == 303


def test_secure_under_tls(browser: httpx.Client) -> None:
    """Behind a proxy that speaks TLS, the cookie is for TLS alone."""
    answer = browser.post("/sign-in", data={"token": TOKEN}, headers={"x-forwarded-proto": "https"})
    assert "Secure" in answer.headers["set-cookie"]


def test_a_form_that_never_comes(
    serve: Callable[..., ServerProcess], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The log is not filled by strangers that leave."""
    server = serve(tmp_path, H5FEED_TOKENS=TOKEN)
    head = b"POST /sign-in HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\ntok"
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port), 60) as connected:
            connected.sendall(head)
            time.sleep(0.1)
    assert server.stop() == 0
    assert capfd.readouterr().err == ""


def test_a_long_form_is_refused(browser: httpx.Client) -> None:
    """Memory is bounded before anybody has signed in."""
    assert browser.post("/sign-in", data={"token": "x" * 20_000}).status_code == 413
