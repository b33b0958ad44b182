"""A folder and object stores that its ``h5feed.toml`` mounts, served together: none is in the way of another."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import DatasetNotFound, FeedError, SourceUnavailable
from h5feed_server.catalog.declared import MOST_STORES, read_declared
from h5feed_server.cli import main as server_main
from h5feed_server.storage.objects.request_rate import RequestRate

from tests.support.object_store import Answer, StoreProcess, StoreProxy, serve_folder
from tests.support.served_rows import described, epoch_of, lines_of
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

pytest.importorskip("obstore")
pytest.importorskip("hadro")

Serve = Callable[..., ServerProcess]

ROWS = 64
MANY_ROWS = 800
"""So many that neither side has all of them soon."""

FAST = {"H5FEED_MOUNTS": "s3://one, s3://two/, s3://gone", "H5FEED_LISTING_SECONDS": "1", "H5FEED_CACHE_BYTES": "0"}

MOUNTS = '[stores.one]\nurl = "s3://one"\n[stores.two]\nurl = "s3://two/sub"\n'


def write_rows(path: Path, seed: int, rows: int = ROWS) -> None:
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        images = random.integers(0, 256, (rows, 16, 16, 3), dtype=np.uint8)
        file["plain"] = images
        file.create_dataset("packed", data=images, chunks=(1, 16, 16, 3), compression="gzip")
        file["labels"] = random.integers(0, 10, rows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The data folder, and beside it the buckets ``one`` and ``two``."""
    write_rows(tmp_path / "data" / "local.h5", 0)
    write_rows(tmp_path / "buckets" / "one" / "deep" / "rows.h5", 1)
    write_rows(tmp_path / "buckets" / "two" / "sub" / "rows.h5", 2)
    (tmp_path / "data" / "h5feed.toml").write_text(MOUNTS)
    return tmp_path / "data"


@pytest.fixture
def store(data: Path) -> Iterator[StoreProcess]:
    process = serve_folder(data.parent / "buckets")
    yield process
    process.stop()


@pytest.fixture
def proxy(store: StoreProcess) -> Iterator[StoreProxy]:
    between = StoreProxy(store)
    yield between
    between.stop()


def files_of(data: Path) -> dict[str, Path]:
    buckets = data.parent / "buckets"
    return {
        "local": data / "local.h5",
        "one.deep.rows": buckets / "one" / "deep" / "rows.h5",
        "two.rows": buckets / "two" / "sub" / "rows.h5",
    }


def reason_of(server: ServerProcess, name: str) -> str:
    """Why a line of the listing is not served; empty without one."""
    return str(lines_of(server).get(name, {}).get("reason") or "")


def is_ready(server: ServerProcess) -> str:
    answer = httpx.get(f"{server.url}/readyz", timeout=60)
    return answer.text if answer.status_code == 200 else ""


def silence(proxy: StoreProxy, bucket: str) -> None:
    """The store answers for this bucket that it is not available."""

    def behave(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        return (503, {"content-length": "0"}, b"") if path.startswith(f"/{bucket}") else ask()

    proxy.behave = behave


def test_rows_of_all_sources_are_those_of_h5py(serve: Serve, store: StoreProcess, data: Path) -> None:
    """With the same names and files in the listing, the tree and the statistics, and the same revision as alone."""
    server = serve(data, "--workers", "2", **store.environment, **FAST)
    files = files_of(data)
    for name, path in files.items():
        described(server, name)
        epoch_of(server, name, path)
    served = {name: line for name, line in lines_of(server).items() if line["status"] == "ok"}
    assert set(served) == set(files)
    about = described(server, "one.deep.rows")
    assert about["files"] == ["one/deep/rows.h5"] and about["revision_covers"] == "store version"
    assert described(server, "local")["revision_covers"] == "all bytes"
    alone = serve("s3://one", **store.environment)
    assert described(alone, "deep.rows")["revision"] == about["revision"]
    with h5feed.connect(server.url, deadline=60) as feed:
        for name, path in files.items():
            splits = [feed[name].split_rows(split, val=0.25, split_seed=3) for split in ("train", "val")]
            assert sorted(np.concatenate(splits).tolist()) == list(range(ROWS))
            with h5py.File(path) as file:
                assert feed[name].stats(field="plain")["mean"] == pytest.approx(file["plain"][:].mean())
                tree = httpx.get(f"{server.url}/v1/datasets/{name}/tree", timeout=60)
                assert all(f'"{field}"' in tree.text for field in file) and tree.status_code == 200
            assert httpx.get(f"{server.url}/datasets/{name}", timeout=60).status_code == 200
    assert is_ready(server) == "ok"


def test_a_store_that_is_away_at_the_start_comes_back(serve: Serve, proxy: StoreProxy, data: Path) -> None:
    silence(proxy, "two")
    server = serve(data, **proxy.environment, **FAST)
    wait_until(lambda: "cannot be listed" in reason_of(server, "two"))
    assert lines_of(server)["two"]["status"] == "unreadable"
    for name in ("local", "one.deep.rows"):
        described(server, name)
        epoch_of(server, name, files_of(data)[name])
    wait_until(lambda: is_ready(server).startswith("ok, but the object store 'two' cannot be listed: "))
    with h5feed.connect(server.url, deadline=10) as feed, pytest.raises(SourceUnavailable, match="object store 'two'"):
        feed["two.rows"].take([0])
    with h5feed.connect(server.url, deadline=60) as feed, pytest.raises(DatasetNotFound):
        feed["unknown"].take([0])
    proxy.behave = lambda path, ranged, ask: ask()
    described(server, "two.rows")
    epoch_of(server, "two.rows", files_of(data)["two.rows"])
    wait_until(lambda: is_ready(server) == "ok" and "two" not in lines_of(server))


def test_a_store_that_goes_away_in_an_epoch_stops_no_other(serve: Serve, proxy: StoreProxy, data: Path) -> None:
    """And its own epoch goes on when it is back."""
    files = files_of(data)
    for seed, path in enumerate(files.values()):
        write_rows(path, seed, MANY_ROWS)
    bounds = {"H5FEED_STORE_CACHE_BYTES": "0", "H5FEED_STORE_AHEAD_BYTES": "100000"}
    server = serve(data, **proxy.environment, **FAST, **bounds)
    for name in files:
        described(server, name)
    with h5feed.connect(server.url, deadline=600) as feed:
        epochs = {name: iter(feed[name].batches(batch_size=8, shuffle=True, seed=1)) for name in files}
        batches = {name: [next(epoch)] for name, epoch in epochs.items()}
        silence(proxy, "two")
        with h5feed.connect(server.url, deadline=2) as other, pytest.raises(FeedError):
            other["two.rows"].take([0], fields=["packed"])
        for name in ("local", "one.deep.rows"):
            batches[name] += epochs[name]
        assert is_ready(server).startswith("ok")
        proxy.behave = lambda path, ranged, ask: ask()
        batches["two.rows"] += epochs["two.rows"]
    for name, path in files.items():
        rows = np.concatenate([batch.rows for batch in batches[name]])
        assert sorted(rows.tolist()) == list(range(MANY_ROWS))
        with h5py.File(path) as file:
            for field in ("plain", "packed", "labels"):
                got = np.concatenate([batch[field] for batch in batches[name]])
                np.testing.assert_array_equal(got, file[field][:][rows])


def test_a_store_that_hangs_holds_up_no_other_source(serve: Serve, proxy: StoreProxy, data: Path) -> None:
    """Neither the first listing of the rest, nor its inspection, nor its rows."""
    over = threading.Event()

    def hang(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        if path.startswith("/two"):
            over.wait(120)
        return ask()

    proxy.behave = hang
    try:
        server = serve(data, **proxy.environment, **FAST)
        for name in ("local", "one.deep.rows"):
            described(server, name)
            epoch_of(server, name, files_of(data)[name])
        lines = httpx.get(f"{server.url}/v1/datasets", timeout=60).json()["datasets"]
        assert {line["name"]: line["status"] for line in lines}["two"] == "preparing"
        wait_until(lambda: is_ready(server) == "ok")
    finally:
        over.set()
    described(server, "two.rows")


def test_a_mount_follows_the_declaration(serve: Serve, store: StoreProcess, data: Path) -> None:
    toml = data / "h5feed.toml"
    toml.write_text("")
    server = serve(data, "--workers", "2", **store.environment, **FAST)
    described(server, "local")
    assert set(lines_of(server)) == {"local"}
    toml.write_text(MOUNTS)
    for name, path in files_of(data).items():
        described(server, name)
        epoch_of(server, name, path)
    toml.write_text(MOUNTS.replace("stores.two", "stores.three"))
    described(server, "three.rows")
    epoch_of(server, "three.rows", files_of(data)["two.rows"])
    wait_until(lambda: not any(name.startswith("two") for name in lines_of(server)))
    with h5feed.connect(server.url, deadline=60) as feed, pytest.raises(DatasetNotFound):
        feed["two.rows"].take([0])


@pytest.mark.parametrize("kind", ["folder", "file", "dataset"])
def test_a_name_that_is_taken_is_an_error(serve: Serve, store: StoreProcess, data: Path, kind: str) -> None:
    """Of the store alone, and only as long as it is."""
    if kind == "folder":
        write_rows(data / "one" / "own.h5", 3)
        own = "one.own"
    elif kind == "file":
        write_rows(data / "one.deep.rows.h5", 3)
        own = "one.deep.rows"
    else:
        own = "one.rows"
        (data / "h5feed.toml").write_text(f'{MOUNTS}[datasets."one.rows"]\nfiles = ["local.h5"]\n')
    server = serve(data, **store.environment, **FAST)
    described(server, own)
    described(server, "two.rows")
    wait_until(lambda: "has the same name" in reason_of(server, "stores.one"))
    path = {"folder": data / "one" / "own.h5", "file": data / "one.deep.rows.h5"}.get(kind, data / "local.h5")
    epoch_of(server, own, path)
    if kind == "folder":
        (data / "one").rename(data / "uno")
        described(server, "one.deep.rows")
        wait_until(lambda: "stores.one" not in lines_of(server))


def test_only_the_top_of_the_data_folder_mounts(serve: Serve, store: StoreProcess, data: Path) -> None:
    """The declarations of a store are about its own objects, and those in a subfolder are not read."""
    declared = '[datasets.mine]\nfiles = ["deep/rows.h5"]\nfields = { x = "plain" }\n'
    other = '[stores.evil]\nurl = "s3://two"\n'
    (data.parent / "buckets" / "one" / "h5feed.toml").write_text(declared + other)
    (data / "sub").mkdir()
    (data / "sub" / "h5feed.toml").write_text(other)
    server = serve(data, **store.environment, **FAST)
    assert [field["name"] for field in described(server, "one.mine")["fields"]] == ["x"]
    lines = lines_of(server)
    assert "own data folder can mount stores" in lines["one.stores"]["reason"]
    assert "only read at the top" in lines["sub.h5feed.toml"]["reason"]
    assert not any("evil" in name for name in lines)
    alone = serve("s3://one", **store.environment)
    wait_until(lambda: "own data folder can mount stores" in reason_of(alone, "stores"))


def test_only_what_the_operator_permits_is_mounted(serve: Serve, store: StoreProcess, data: Path) -> None:
    """Whoever writes into the data folder does not decide what the server reads with its credentials."""
    server = serve(data, **store.environment, **{**FAST, "H5FEED_MOUNTS": "s3://one,s3://tw,s3://two/su"})
    described(server, "one.deep.rows")
    assert "H5FEED_MOUNTS=s3://two/sub" in reason_of(server, "stores.two")
    none = serve(data, **store.environment, **{**FAST, "H5FEED_MOUNTS": ""})
    assert "does not permit s3://one" in reason_of(none, "stores.one")


def test_a_token_covers_datasets_by_their_whole_names(
    serve: Serve, store: StoreProcess, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also files, and stores that cannot be listed, which have names themselves."""
    (data / "h5feed.toml").write_text(f'{MOUNTS}[stores.gone]\nurl = "s3://gone"\n')
    file = data.parent / "tokens.txt"
    assert server_main(["token", "create", "team", "--datasets", "one.*", "--token-file", str(file)]) == 0
    token = capsys.readouterr().out.strip()
    server = serve(data, "--token-file", str(file), **store.environment, **FAST)
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {token}"}, timeout=60) as client:
        wait_until(lambda: client.get("/v1/datasets/one.deep.rows").status_code == 200)
        assert [line["name"] for line in client.get("/v1/datasets").json()["datasets"]] == ["one.deep.rows"]
        for name in ("local", "two.rows", "gone"):
            assert client.get(f"/v1/datasets/{name}").status_code == 404


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        ('ulr = "s3://b"', r"stores\.x\.ulr: there is no such key: did you mean 'url'\?"),
        ("", r"stores\.x\.url: Field required"),
        ('url = "s3://b"\nsecret_access_key = "hunter2"', r"credentials must not be in h5feed.toml.*AWS_ACCESS_KEY_ID"),
        ('url = "az://b"\nsas_token = "hunter2"', r"credentials must not be in h5feed.toml.*AZURE_STORAGE_SAS_TOKEN"),
        ('url = "s3://b"\nAWS_SESSION_TOKEN = "hunter2"', r"credentials must not be in h5feed.toml"),
        ('url = "s3://b"\nendpoint = "http://hunter2"', r"come from the server's environment \(AWS_ENDPOINT_URL_S3"),
        ('url = "https://user:hunter2@host/x"', "must contain no credentials"),
        ('url = "s3://AKIA:hunter2/x"', "must contain no credentials"),
        ('url = "https://host/x?X-Amz-Signature=hunter2"', r"must not contain \? or #"),
        ('url = "ftp://host/x"', "is not the URL of an object store"),
        ('url = "s3://b"\nlisting_seconds = 0', "greater than or equal to 1"),
        ("url = 1", "valid string"),
    ],
)
def test_what_a_store_must_not_say(tmp_path: Path, table: str, reason: str) -> None:
    """Nothing secret is shown."""
    (tmp_path / "h5feed.toml").write_text(f'[stores.x]\n{table}\n[stores.good]\nurl = "s3://good"\n')
    found = read_declared(tmp_path, follow_links=False)
    assert set(found.stores) == {"good"}
    refusal = found.refused["stores.x"]
    assert re.search(reason, refusal.reason) and "hunter2" not in refusal.reason, refusal


def test_what_the_table_of_stores_must_not_say(tmp_path: Path) -> None:
    def refused(text: str) -> dict[str, str]:
        (tmp_path / "h5feed.toml").write_text(text)
        return {name: one.reason for name, one in read_declared(tmp_path, follow_links=False).refused.items()}

    assert "did you mean 'stores'" in refused('[store.x]\nurl = "s3://b"')["h5feed.toml"]
    assert "must be a table" in refused("stores = 1")["stores"]
    assert "letters, digits" in refused('[stores."a.b"]\nurl = "s3://b"')["stores.a.b"]
    assert "stores.x has the same url" in refused('[stores.x]\nurl="s3://b"\n[stores.y]\nurl="s3://b/"')["stores.y"]
    many = "".join(f'[stores.s{number}]\nurl = "s3://b{number:03}"\n' for number in range(MOST_STORES + 1))
    assert list(refused(many)) == [f"stores.s{MOST_STORES}"]


def test_a_single_object_can_be_mounted(serve: Serve, store: StoreProcess, data: Path) -> None:
    (data / "h5feed.toml").write_text('[stores.single]\nurl = "s3://one/deep/rows.h5"\n')
    server = serve(data, **store.environment, **FAST)
    described(server, "single.rows")
    epoch_of(server, "single.rows", files_of(data)["one.deep.rows"])


def test_a_local_file_does_not_lead_into_a_store(serve: Serve, store: StoreProcess, data: Path) -> None:
    """Not even if the cache folder, with a file for each object, is in the data folder."""
    server = serve(data, **store.environment, **FAST, H5FEED_FOLLOW_LINKS="1")
    described(server, "one.deep.rows")
    (stub,) = (path for path in server.cache_dir.glob("stores/*/deep/rows.h5"))
    with h5py.File(data / "linked.h5", "w") as file:
        file["own"] = np.arange(4)
        file["other"] = h5py.ExternalLink(str(stub), "plain")
    (reason,) = (field["reason"] for field in described(server, "linked")["fields"] if field["name"] == "other")
    assert "outside the data folder" in reason


def test_the_request_rate_is_one_for_all_stores() -> None:
    """Turns of several stores are those of one queue."""
    rate = RequestRate(10)
    now = time.monotonic()
    waits: list[Any] = [rate.wait(now, now + 60) for _ in range(30)]
    assert waits[:10] == [0.0] * 10 and waits[-1] == pytest.approx(1.9)
    assert rate.wait(now, now + 1.9) is None
    assert RequestRate(0).wait(now, now) == 0.0
