"""A server behind a real Jupyter server with jupyter-server-proxy, as docs/how-to/deploy.md describes it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from playwright.sync_api import Page, expect

from tests.support.recording_model import witnessed
from tests.support.server_process import ServerProcess
from tests.system.programs import JUPYTER, blocks_of, free_port, running
from tests.system.visits import crawled

Visitor = Callable[..., Page]

ROWS = 300
TOKEN = "token-of-jupyter"
BASE = "/user/ann/"
"""As a JupyterHub sets it."""


@dataclass(frozen=True)
class Jupyter:
    """A Jupyter server of Ann's, and two servers behind it.

    Attributes
    ----------
    url : str
        Where programs reach the server that needs no token.
    direct : str
        Where programs on the same machine do.
    guarded : str
        The one that has the same token as Jupyter.
    """

    url: str
    direct: str
    guarded: str


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jupyter]:
    assert JUPYTER.exists(), "Jupyter is not installed: run `make setup-system`"
    data: Path = tmp_path_factory.mktemp("data")
    with h5py.File(data / "numbered.h5", "w") as file:
        file["x"] = np.stack([np.arange(ROWS), np.zeros(ROWS)], 1).astype("f4")
        labels = file.create_dataset("y", data=np.arange(ROWS) % 3)
        labels.attrs["class_names"] = ["ant", "bee", "crab"]
        file["images"] = np.random.default_rng(0).integers(0, 255, (ROWS, 16, 16, 3), np.uint8)
    servers = [
        ServerProcess(data, tmp_path_factory.mktemp("cache"), H5FEED_TRUSTED_PROXIES="127.0.0.1", **more)
        for more in ({"H5FEED_ALLOWED_HOSTS": "hub.example"}, {"H5FEED_TOKENS": TOKEN})
    ]
    folder: Path = tmp_path_factory.mktemp("jupyter")
    port = free_port()
    options = {
        "port": port,
        "ip": "127.0.0.1",
        "base_url": BASE,
        "root_dir": folder,
        "open_browser": False,
        "allow_remote_access": True,
    }
    command = [str(JUPYTER), "server", "--allow-root", f"--IdentityProvider.token={TOKEN}"]
    command += [f"--ServerApp.{name}={value}" for name, value in options.items()]
    with running(command, folder, port, JUPYTER_PREFER_ENV_PATH="1", JUPYTER_RUNTIME_DIR=str(folder / "runtime")):
        plain, guarded = (f"http://127.0.0.1:{port}{BASE}proxy/{server.port}" for server in servers)
        yield Jupyter(plain, servers[0].url, guarded)
    for server in servers:
        assert server.stop() == 0


def test_training_through_jupyter(jupyter: Jupyter) -> None:
    """With Jupyter's token, a model is trained on each row once, in the order of a client on the same machine."""
    with h5feed.connect(jupyter.url, token=TOKEN, deadline=60) as far, h5feed.connect(jupyter.direct) as near:
        options: dict[str, Any] = {"batch_size": 32, "shuffle": True, "seed": 5}
        for one, two in zip(near["numbered"].batches(**options), far["numbered"].batches(**options), strict=True):
            for name in one:
                np.testing.assert_array_equal(one[name], two[name])
        train = far["numbered"].sequence("train", x="x", y="y", test=0.2, **options)
        model, rows = witnessed()
        model.fit(train, epochs=1, verbose=0)
        assert rows == [row for batch in near["numbered"].batches("train", test=0.2, **options) for row in batch.rows]
        # What is posted, and a job.
        np.testing.assert_array_equal(far["numbered"].take([5, 3]).rows, [5, 3])
        assert far["numbered"].stats("train", test=0.2).rows == len(rows)


def test_what_the_documentation_says(jupyter: Jupyter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code for programs elsewhere runs as it stands, with the address and the token of this test."""
    code = next(block for block in blocks_of("python") if "/proxy/8000" in block)
    url = re.search(r'"(https://\S+/proxy/8000)"', code)
    assert url is not None
    names: dict[str, Any] = {}
    exec(code.replace(url[1], jupyter.guarded).replace("YOUR-TOKEN", TOKEN), names)
    assert [entry["name"] for entry in names["feed"].datasets()] == ["numbered"]
    names["feed"].close()


def test_without_the_token_of_jupyter(jupyter: Jupyter) -> None:
    """Nothing is told, and the client's error says that something between refuses it."""
    for token in (None, "another"):
        with h5feed.connect(jupyter.url, token=token, deadline=300) as far, pytest.raises(h5feed.FeedError) as raised:
            far.datasets()
        said = str(raised.value)
        assert "requires you to sign in. Pass its token as token=" in said and "numbered" not in said


@pytest.mark.parametrize("guarded", [False, True], ids=["open", "guarded"])
def test_pages_through_jupyter(visit: Visitor, jupyter: Jupyter, guarded: bool) -> None:
    """Every page that links lead to is below the prefix, with its pictures; so is the form that asks for a token."""
    url = jupyter.guarded if guarded else jupyter.url
    prefix = urlsplit(url).path
    # Whoever has signed in to Jupyter has its cookie.
    page = visit(f"{url.removesuffix(prefix)}{BASE}api/status?token={TOKEN}", may_fail=("favicon",))
    asked: list[str] = []
    page.context.on("request", lambda request: asked.append(request.url))
    if guarded:
        page.goto(f"{url}/datasets/numbered")
        page.get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="numbered")).to_be_visible()
    found = crawled(page, url, 15)
    assert {f"{prefix}/{name}" for name in ("", "feed", "docs", "datasets/numbered", "datasets/numbered/rows")} <= found
    page.goto(f"{url}/docs#/datasets/list_datasets")
    block = page.locator("[id^=operations-][id$=-list_datasets]")
    block.get_by_role("button", name="Execute").click()
    expect(block.locator(".live-responses-table tbody .response-col_status").first).to_have_text("200")
    if guarded:
        page.goto(f"{url}/")
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_label("Token")).to_be_visible()
    outside = [one for one in asked if urlsplit(one).scheme not in ("data", "blob")]
    assert all(urlsplit(one).path.startswith(f"{prefix}/") for one in outside), outside


def test_redirects_through_jupyter(jupyter: Jupyter) -> None:
    """Jupyter adds the prefix to no address that has it already."""
    headers = {"authorization": f"token {TOKEN}", "accept": "text/html"}
    with httpx.Client(headers=headers, timeout=60, follow_redirects=True) as browser:
        moved = browser.get(f"{jupyter.url}/simple")
        assert str(moved.url) == f"{jupyter.url}/simple/" and moved.status_code == 200
        host = {"host": "hub.example", "x-forwarded-proto": "https"}
        line = browser.get(f"{jupyter.url}/simple/h5feed/requirements.txt", headers=host).text
        assert f" https://hub.example{urlsplit(jupyter.url).path}/simple/h5feed/" in line
    with httpx.Client(headers={"accept": "text/html"}, timeout=60, follow_redirects=True) as browser:
        # Not by its header, which would be the token of both.
        browser.get(f"{jupyter.guarded}/?token={TOKEN}")
        for path in ("", "/", "/datasets/numbered/rows"):
            form = browser.get(f"{jupyter.guarded}{path}")
            assert urlsplit(str(form.url)).path == f"{urlsplit(jupyter.guarded).path}/sign-in", path
