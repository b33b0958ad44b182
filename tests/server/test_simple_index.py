"""The client that a server offers: a wheel that fits, found and installed by pip and uv as they are."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
import select
import site
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from email.parser import Parser
from importlib.metadata import distribution, version
from pathlib import Path

import h5feed
import httpx
import pytest
from h5feed_server.api.client_wheel import ClientWheel

from tests.support.documentation import PAGES, ROOT
from tests.support.server_process import ServerProcess

TOKEN = "hidden-from-pip"
BOX = "http://gpu-box:8000"
"""A name that is nobody's: requests for it are sent to the test's server, as a proxy's are."""

UV = Path(sys.executable).with_name("uv")
VERSION = version("h5feed")
WHEEL = f"/simple/h5feed/h5feed-{VERSION}-py3-none-any.whl"
JSON = {"accept": "application/vnd.pypi.simple.v1+json, application/vnd.pypi.simple.v1+html; q=0.1, text/html; q=0.01"}


@pytest.fixture(scope="module")
def guarded(folder: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    """A server of two workers that has a token."""
    return serve_module(
        folder,
        "--workers",
        "2",
        H5FEED_TOKENS=TOKEN,
        H5FEED_TRUSTED_PROXIES="127.0.0.1",
    )


def _line(url: str, **headers: str) -> str:
    """What the OpenAPI description says about how to get the client."""
    description = httpx.get(f"{url}/openapi.json", headers=headers, timeout=60).json()["info"]["description"]
    (line,) = re.findall(r"^pip install .*$", description, re.MULTILINE)
    return str(line)


def _pip(*arguments: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """pip of these tests, which asks nobody but whom it is told to."""
    command = [sys.executable, "-m", "pip", "--isolated", "--disable-pip-version-check", "--no-cache-dir", *arguments]
    environment = {**os.environ, **(environment or {})}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)


@pytest.fixture
def fresh(tmp_path: Path) -> Path:
    """The Python of an environment that has the packages of this one, but not h5feed."""
    home = tmp_path / "fresh"
    venv.create(home, with_pip=False)
    (packages,) = (home / "lib").glob("python*/site-packages")
    # A path is added as it is: the files in it that lead to the packages of this checkout are not read.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return home / "bin" / "python"


def _used(python: Path, server: ServerProcess) -> str:
    """Fetches a batch with what is installed, and returns where that is."""
    code = (
        "import sys, h5feed\n"
        f"batch = h5feed.connect(sys.argv[1], token={TOKEN!r})['mixed'].batch(0, batch_size=3)\n"
        "assert batch['images'].shape == (3, 12, 10, 3)\n"
        f"assert h5feed.__version__ == {VERSION!r}\n"
        "print(h5feed.__file__)\n"
    )
    command = [str(python), "-I", "-c", code, server.url]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=180).stdout


def test_the_wheel_is_the_client() -> None:
    """Every module as it is here, with the metadata and a RECORD that holds for each file."""
    wheel = ClientWheel.of_installed()
    assert wheel is not None and wheel.filename == f"h5feed-{VERSION}-py3-none-any.whl"
    package, info = Path(h5feed.__file__).parent, f"h5feed-{VERSION}.dist-info"
    with zipfile.ZipFile(io.BytesIO(wheel.content)) as archive:
        assert archive.testzip() is None
        files = {name: archive.read(name) for name in archive.namelist()}
    modules = {
        f"h5feed/{path.relative_to(package).as_posix()}": path.read_bytes()
        for path in [*package.rglob("*.py"), package / "py.typed"]
    }
    assert {name: content for name, content in files.items() if name.startswith("h5feed/")} == modules
    assert set(files) - set(modules) == {
        f"{info}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")
    }
    metadata = Parser().parsestr(files[f"{info}/METADATA"].decode())
    assert (metadata["Name"], metadata["Version"]) == ("h5feed", VERSION)
    assert metadata.get_all("Requires-Dist") == distribution("h5feed").requires
    lines = [line.split(",") for line in files[f"{info}/RECORD"].decode().splitlines()]
    assert [name for name, *_ in lines] == list(files)
    for name, digest, size in lines[:-1]:
        expected = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).decode().rstrip("=")
        assert (digest, size) == (f"sha256={expected}", str(len(files[name]))), name


def test_it_is_the_same_everywhere(guarded: ServerProcess, tmp_path: Path) -> None:
    """Every worker has the same bytes, and so has another process at another time."""
    wheel = ClientWheel.of_installed()
    assert wheel is not None and hashlib.sha256(wheel.content).hexdigest() == wheel.sha256
    for _ in range(4):
        # A new connection each: they go to the workers in turn.
        answer = httpx.get(guarded.url + WHEEL, timeout=60)
        assert answer.content == wheel.content
    again = httpx.get(guarded.url + WHEEL, headers={"if-none-match": answer.headers["etag"]}, timeout=60)
    assert again.status_code == 304 and not again.content


def test_it_is_open_and_nothing_else_is(guarded: ServerProcess, server: ServerProcess) -> None:
    """Neither a token nor a name that the server knows is needed for it."""
    for path in ("/simple/", "/simple/h5feed/", "/simple/h5feed/requirements.txt", WHEEL):
        assert httpx.get(guarded.url + path, timeout=60).status_code == 200
        assert httpx.get(server.url + path, headers={"host": "gpu-box:8000"}, timeout=60).status_code == 200
    for path in ("/simplest", "/v1/datasets", "//simple/../v1/datasets"):
        assert httpx.get(guarded.url + path, timeout=60).status_code == 401
    assert httpx.get(f"{server.url}/v1/datasets", headers={"host": "gpu-box:8000"}, timeout=60).status_code == 421
    assert httpx.get(f"{guarded.url}/simple/../v1/datasets", timeout=60).status_code == 401


def test_the_line_names_the_address_that_was_used(guarded: ServerProcess) -> None:
    """The host as the caller knows the server, and https where a proxy ends TLS; never what is no host."""
    wheel = httpx.get(guarded.url + WHEEL, timeout=60).content
    rest = f"{WHEEL}#sha256={hashlib.sha256(wheel).hexdigest()}"
    assert _line(guarded.url) == f"pip install {guarded.url}{rest}"
    assert _line(guarded.url, host="gpu-box:8000") == f"pip install {BOX}{rest}"
    assert _line(guarded.url, host="[fd00::1]:8000") == f"pip install http://[fd00::1]:8000{rest}"
    assert _line(guarded.url, **{"host": "feed.example", "x-forwarded-proto": "https"}) == (
        f"pip install https://feed.example{rest}"
    )
    for odd in ("a b", "evil`x", "<b>", "a/../b", "", "x;rm", "$(id)"):
        assert (
            _line(guarded.url, **{"host": odd, "x-forwarded-proto": "java script"})
            == f"pip install http://SERVER{rest}"
        )


def test_the_index(guarded: ServerProcess) -> None:
    """HTML by PEP 503 and JSON by PEP 691 name the wheel, with its hash and the versions of Python it runs on."""
    wheel = ClientWheel.of_installed()
    assert wheel is not None
    with httpx.Client(base_url=guarded.url, timeout=60) as http:
        assert 'href="h5feed/"' in http.get("/simple/").text
        page = http.get("/simple/h5feed/")
        assert page.headers["content-type"].startswith("text/html")
        assert f'<a href="{wheel.filename}#sha256={wheel.sha256}" data-requires-python="&gt;=3.11">' in page.text
        assert http.get("/simple/", headers=JSON).json()["projects"] == [{"name": "h5feed"}]
        answer = http.get("/simple/h5feed/", headers=JSON)
        assert answer.headers["content-type"] == "application/vnd.pypi.simple.v1+json"
        assert answer.headers["vary"] == "accept"
        (file,) = answer.json()["files"]
        assert file["hashes"] == {"sha256": wheel.sha256} and file["size"] == len(wheel.content)
        assert http.get(f"/simple/h5feed/{file['url']}").content == wheel.content
        assert http.get("/simple/h5feed").headers["location"].endswith("/simple/h5feed/")
        older = http.get("/simple/h5feed/h5feed-0.0.1-py3-none-any.whl")
        assert older.status_code == 404 and wheel.filename in older.json()["detail"]
        assert http.get("/simple/numpy/").status_code == 404


def test_pip_installs_it(guarded: ServerProcess, fresh: Path, tmp_path: Path) -> None:
    """By the line as it stands, over plain http and by host name; with another hash, pip refuses it."""
    proxied = {"http_proxy": guarded.url, "no_proxy": ""}
    words = _line(guarded.url, host="gpu-box:8000").split()
    url = words.pop()
    assert words == ["pip", "install"] and url.startswith(BOX)
    done = _pip("--python", fresh, "install", "--no-index", url, environment=proxied)
    assert done.returncode == 0, done.stderr
    assert str(fresh.parents[1]) in _used(fresh, guarded)
    wrong = url.partition("#")[0] + "#sha256=" + "0" * 64
    done = _pip("install", "--no-index", "--no-deps", "--target", tmp_path / "wrong", wrong, environment=proxied)
    assert done.returncode != 0 and "sha256" in done.stdout + done.stderr
    # An index by host name over plain http is what pip refuses, and why the line names the wheel.
    index = ("--index-url", f"{BOX}/simple/", "--dest", tmp_path / "refused")
    done = _pip("download", "--no-deps", *index, "h5feed", environment=proxied)
    assert done.returncode != 0 and "not a trusted or secure host" in done.stdout + done.stderr


def test_requirements_keep_their_address(guarded: ServerProcess, fresh: Path) -> None:
    """pip takes the file from the server; the address in it has no version and no hash."""
    proxied = {"http_proxy": guarded.url, "no_proxy": ""}
    done = _pip(
        "--python", fresh, "install", "--no-index", "-r", f"{BOX}/simple/h5feed/requirements.txt", environment=proxied
    )
    assert done.returncode == 0, done.stderr
    assert str(fresh.parents[1]) in _used(fresh, guarded)


@pytest.mark.skipif(not UV.exists(), reason="uv is not installed")
def test_uv_installs_it(guarded: ServerProcess, fresh: Path) -> None:
    """By the same line, with the hash checked."""
    url = _line(guarded.url).split()[-1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("UV_", "PIP_"))}
    command = [
        str(UV),
        "pip",
        "install",
        "--python",
        str(fresh),
        "--no-cache",
        "--no-index",
        "--no-deps",
        "--no-config",
    ]
    wrong = url.partition("#")[0] + "#sha256=" + "0" * 64
    refused = subprocess.run([*command, wrong], env=environment, capture_output=True, text=True, timeout=180)
    assert refused.returncode != 0 and "ash" in refused.stderr
    subprocess.run([*command, url], env=environment, check=True, timeout=180)
    assert str(fresh.parents[1]) in _used(fresh, guarded)


def test_pip_reads_the_index(guarded: ServerProcess, tmp_path: Path) -> None:
    """The index is one that pip understands, where it trusts the host."""
    index = ("--index-url", f"{guarded.url}/simple/", "--dest", tmp_path)
    done = _pip("download", "--no-deps", *index, f"h5feed=={VERSION}")
    assert done.returncode == 0, done.stderr
    wheel = ClientWheel.of_installed()
    assert wheel is not None and (tmp_path / wheel.filename).read_bytes() == wheel.content


@pytest.mark.slow
def test_it_is_the_wheel_that_is_built(fresh: Path, tmp_path: Path) -> None:
    """As the build makes it from the sources; and a server that is installed from wheels offers the same bytes."""
    for source in (ROOT / "client", ROOT):
        subprocess.run([UV, "build", "--quiet", "--wheel", "--out-dir", tmp_path, source], check=True, timeout=180)
    (built,) = tmp_path.glob("h5feed-*.whl")
    offered = ClientWheel.of_installed()
    assert offered is not None and offered.filename == built.name
    with zipfile.ZipFile(built) as archive, zipfile.ZipFile(io.BytesIO(offered.content)) as made:
        assert sorted(made.namelist()) == sorted(archive.namelist())
        for name in archive.namelist():
            if not name.endswith(("/WHEEL", "/RECORD")):
                assert made.read(name) == archive.read(name), name
    install = [
        str(UV),
        "pip",
        "install",
        "--quiet",
        "--python",
        str(fresh),
        "--no-index",
        "--no-deps",
        "--compile-bytecode",
    ]
    subprocess.run([*install, *tmp_path.glob("*.whl")], check=True, timeout=180)
    code = (
        "import h5feed_server\n"
        "from h5feed_server.api.client_wheel import ClientWheel\n"
        "print(h5feed_server.__file__, ClientWheel.of_installed().sha256)\n"
    )
    said = subprocess.run([fresh, "-I", "-c", code], check=True, stdout=subprocess.PIPE, text=True, timeout=180).stdout
    where, sha256 = said.split()
    assert where.startswith(str(fresh.parents[1])) and sha256 == offered.sha256


def test_no_text_adds_an_index() -> None:
    """A second index would let a package of the same name elsewhere win."""
    sources = [path for folder in ("app", "client", "examples") for path in (ROOT / folder).rglob("*")]
    texts = [path for path in [*PAGES, *sources] if path.suffix in (".md", ".py", ".ipynb", ".html", ".js", ".txt")]
    assert len(texts) > 200
    assert not [path for path in texts if "extra-index-url" in path.read_text("utf-8", "replace")]


def test_without_metadata_there_is_no_wheel(folder: Path, tmp_path: Path) -> None:
    """A client that is on the path and not installed cannot be handed on; the server says so, and serves."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as metadata\n"
        "found = metadata.distribution\n"
        "def distribution(name):\n"
        "    if name == 'h5feed':\n"
        "        raise metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "metadata.distribution = distribution\n"
    )
    command = [sys.executable, "-m", "h5feed_server.cli", "serve", str(folder), "--port", "0"]
    command += ["--cache-dir", str(tmp_path / "cache")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    # Not forked from one that has imported what is replaced here.
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as server:
        try:
            assert server.stdout is not None and select.select([server.stdout], [], [], 60)[0]
            url = server.stdout.readline().rsplit(" at ", 1)[1].strip()
            answer = httpx.get(f"{url}/simple/h5feed/", timeout=60)
            assert answer.status_code == 404 and "not installed here" in answer.json()["detail"]
            assert "pip install" not in httpx.get(f"{url}/openapi.json", timeout=60).json()["info"]["description"]
        finally:
            server.terminate()
