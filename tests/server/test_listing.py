"""What lies in the data folder, or is declared, and is not served, is listed with its reason."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.cli import main
from h5feed.errors import Unreadable
from h5feed_server.services import Services
from h5feed_server.settings import Settings

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

TOML = """
[datasets.good]
files = ["named/a.dat", "named/b.h5"]

[datasets.nothing]
files = ["nowhere/*.h5"]

[datasets.partly]
files = ["partly.h5", "missing.h5"]

[datasets.notes]
files = ["notes/*"]

[datasets.text]
files = ["readme.txt"]

[datasets.misspelt]
flies = ["misspelt.h5"]
files = ["misspelt.h5"]

[datasets."a/b"]
files = ["slash.h5"]

[datasets.""]
files = ["empty.h5"]

[datasets.".."]
files = ["dots.h5"]

[datasets."bell\\u0007"]
files = ["bell.h5"]

[datasets.pets]
files = ["raw.h5"]
"""


def _file(path: Path | bytes, value: int = 0, **groups: int) -> None:
    """A file of five rows that hold `value`, or of such a group for each name."""
    name = os.fsdecode(path)
    os.makedirs(os.path.dirname(name), exist_ok=True)
    with h5py.File(os.fsencode(name), "w") as file:
        for group, number in groups.items() or [("", value)]:
            file[f"{group}/x"] = np.full((5, 2), number)
            file[f"{group}/y"] = np.arange(5)


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("odd")
    (root / "h5feed.toml").write_text(TOML)
    for number, name in enumerate(("named/a.dat", "named/b.h5", "notes/one.h5", "raw.h5", "pets.h5")):
        _file(root / name, number)
    (root / "notes" / "about.txt").write_text("what a pattern for any ending does not mean")
    for name in ("partly", "misspelt", "slash", "empty", "dots", "bell"):
        _file(root / f"{name}.h5")
    (root / "readme.txt").write_text("no data")
    # What a build says of the file beside it.
    (root / "pets.h5.left-out.tsv").write_text("cut.jpg\tit is empty\n")
    # Names that meet.
    _file(root / "sub.a.h5", 10)
    _file(root / "sub" / "a.h5", 11)
    _file(root / "three.hdf5", 12)
    _file(root / "three.h5", 13)
    _file(root / "deep.er.x.h5", 14)
    _file(root / "deep.er" / "x.h5", 15)
    _file(root / "deep" / "er.x.h5", 16)
    _file(os.fsencode(root) + b"/no\xff.h5", 17)
    _file(os.fsencode(root) + b"/no\xfe.h5", 18)
    with h5py.File(root / "tables.h5", "w") as file:
        for name, rows in (("b", 7), ("c", 9)):
            file[f"{name}/x"], file[f"{name}/y"] = np.full((rows, 2), 19.0), np.arange(rows) % 3
        file["c/z"] = np.zeros(9)
    _file(root / "tables.b.h5", 20)
    # Endings.
    for ending in ("mat", "nc", "nxs", "nwb", "h5ad", "loom", "jld2"):
        _file(root / "kinds" / f"is_{ending}.{ending}", 21)
    (root / "kinds" / "old.mat").write_bytes(b"MATLAB 5.0 MAT-file, Platform: GLNXA64".ljust(500))
    (root / "kinds" / "old.nc").write_bytes(b"CDF\x01" + bytes(100))
    (root / "kinds" / "pointer.h5").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    (root / "kinds" / "page.h5").write_bytes(b"<!DOCTYPE html><html>")
    (root / "kinds" / "nothing.h5").write_bytes(b"")
    _file(root / "kinds" / "hidden_data.dat", 22)
    for number in range(30):
        (root / "kinds" / f"{number}.jpg").write_bytes(b"\xff\xd8")
    # What is no file.
    os.mkfifo(root / "pipe.h5")
    with socket.socket(socket.AF_UNIX) as unix:
        os.chdir(root)
        unix.bind("socket.h5")
    (root / "dangling.h5").symlink_to("gone.h5")
    (root / "round.h5").symlink_to("round.h5")
    (root / "folder.h5").mkdir()
    (root / "above").symlink_to(root)
    _file(root / ".hidden.h5")
    _file(root / ".cache" / "inside.h5")
    return root


@pytest.fixture(scope="module")
def served(odd: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    process = serve_module(odd)
    with h5feed.connect(process.url, deadline=120) as feed:
        wait_until(lambda: all(entry["status"] != "preparing" for entry in feed.datasets()), 150)
    return process


@pytest.fixture(scope="module")
def listing(served: ServerProcess) -> dict[str, dict[str, Any]]:
    with h5feed.connect(served.url, deadline=120) as feed:
        entries = feed.datasets()
    assert len({entry["name"] for entry in entries}) == len(entries)
    return {entry["name"]: entry for entry in entries}


def test_every_file_is_listed(odd: Path, listing: dict[str, dict[str, Any]]) -> None:
    """Each file that is not hidden is served or has a reason; hidden ones are not told of."""
    told = {file for entry in listing.values() for file in entry["files"]}
    for folder, folders, files in os.walk(odd):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = os.path.relpath(os.path.join(folder, name), odd).encode("utf-8", "surrogateescape")
            if not name.startswith(".") and not name.endswith((".jpg", ".toml", ".left-out.tsv")):
                assert path.decode("utf-8", "replace") in told, path
    assert not any("hidden.h5" in file or ".cache" in file for file in told)
    for entry in listing.values():
        assert entry["status"] == "ok" or entry["reason"], entry


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "nowhere"),
        ("partly", "missing.h5"),
        ("text", "not an HDF5 file"),
        ("misspelt", "flies"),
        ('h5feed.toml: "a/b"', "a URL cannot contain"),
        ('h5feed.toml: ""', "a URL cannot contain"),
        ('h5feed.toml: ".."', "a URL cannot contain"),
        ('h5feed.toml: "bell\\u0007"', "a URL cannot contain"),
        ("kinds.old", "not an HDF5 file"),
        ("kinds.pointer", "git lfs pull"),
        ("kinds.page", "web page"),
        ("kinds.nothing", "empty"),
        ("kinds.hidden_data.dat", "rename it to end in .h5"),
        ("*.jpg", "30 files"),
        ("pipe", "not a regular file"),
        ("socket", "not a regular file"),
        ("dangling", "link to a missing file"),
        ("round", "leads back to itself"),
        ("above", "link to a folder"),
        ("tables.b", ""),
    ],
)
def test_the_reason(listing: dict[str, dict[str, Any]], name: str, words: str) -> None:
    """Whoever misses something reads why, and what would be right."""
    if name == "kinds.old":
        # Both would have that name: they keep their endings.
        assert "MATLAB v5" in listing["kinds.old.mat"]["reason"] and "-v7.3" in listing["kinds.old.mat"]["reason"]
        assert "netCDF-3" in listing["kinds.old.nc"]["reason"] and "nccopy" in listing["kinds.old.nc"]["reason"]
        return
    if name == "tables.b":
        assert listing[name]["status"] == "ok" and listing[name]["files"] == ["tables.b.h5"]
        return
    assert listing[name]["status"] == "unreadable"
    assert words in listing[name]["reason"]


def test_files_whose_names_meet_are_all_served(served: ServerProcess, listing: dict[str, dict[str, Any]]) -> None:
    """Whatever two files would both be called, each is served under a name of its own."""
    wanted = {
        **{"sub.a.h5": 10, "sub/a.h5": 11, "three.hdf5": 12, "three.h5": 13},
        **{"deep.er.x.h5": 14, "deep.er/x.h5": 15, "deep/er.x.h5": 16, "tables.b.h5": 20, "raw.h5": 3, "pets.h5": 4},
    }
    by_file = {entry["files"][0]: name for name, entry in listing.items() if entry["status"] == "ok"}
    with h5feed.connect(served.url, deadline=60) as feed:
        for file, value in wanted.items():
            assert feed[by_file[file]].take([0])["x"][0, 0] == value, file
        broken = sorted(name for name, entry in listing.items() if entry["files"] == ["no\ufffd.h5"])
        assert len(broken) == 2
        assert {int(feed[name].take([0])["x"][0, 0]) for name in broken} == {17, 18}
        assert by_file["raw.h5"] == "pets" and by_file["pets.h5"] == "pets.h5"
        assert feed["good"].rows == 10
        assert feed["good"].take([0, 9])["x"][:, 0].tolist() == [0, 1]
        assert listing["notes"]["files"] == ["notes/one.h5"]
        for ending in ("mat", "nc", "nxs", "nwb", "h5ad", "loom", "jld2"):
            assert feed[f"kinds.is_{ending}"].rows == 5, ending


def test_a_table_whose_name_is_a_files(served: ServerProcess, listing: dict[str, dict[str, Any]]) -> None:
    """A name is that of the file; the group that would have it, too, is told of beside the other groups."""
    refused = [entry for entry in listing.values() if entry["files"] == ["tables.h5"] and entry["status"] != "ok"]
    assert [entry["reason"] for entry in refused] and all("tables.b" in entry["reason"] for entry in refused)
    with h5feed.connect(served.url, deadline=60) as feed:
        assert feed["tables.b"].take([0])["x"][0, 0] == 20
        assert feed["tables.c"].rows == 9


def test_lists_of_builds_are_no_data(listing: dict[str, dict[str, Any]]) -> None:
    assert not [name for name, entry in listing.items() if "tsv" in name or "tsv" in str(entry["files"])]


def test_what_is_asked_for_has_the_reason(served: ServerProcess) -> None:
    """The name of what is not served answers why, and not that there is no such thing."""
    with h5feed.connect(served.url, deadline=60) as feed:
        for name, words in (("nothing", "nowhere"), ("dangling", "missing file"), ("kinds.old.mat", "MATLAB v5")):
            with pytest.raises(Unreadable, match=words):
                _ = feed[name]
    answer = httpx.get(f"{served.url}/v1/datasets/misspelt", timeout=60)
    assert answer.status_code == 422 and "did you mean 'files'?" in answer.json()["detail"]


def test_the_command_shows_it(served: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """``h5feed ls`` has a line for each, with the reason."""
    assert main(["ls", served.url]) == 0
    out = capsys.readouterr().out
    for words in ("MATLAB v5", "leads back to itself", "30 files", "a URL cannot contain", "missing.h5"):
        assert words in out


@pytest.mark.parametrize("content", [b"[datasets.a\n", b"\xff\xfe", b"datasets = 3\n", b"[dataset.a]\nfiles = []\n"])
def test_a_broken_declaration_takes_nothing_else_down(tmp_path: Path, content: bytes) -> None:
    """What is wrong with h5feed.toml is a line of its own; files that it does not name keep their revision."""
    folder = tmp_path / "data"
    _file(folder / "other.h5", 1)
    _file(folder / "a.h5", 2)
    (folder / "h5feed.toml").write_text('[datasets.mine]\nfiles = ["a.h5"]\n')
    server = ServerProcess(folder, tmp_path / "cache")
    try:
        with h5feed.connect(server.url, deadline=120) as feed:
            other, mine = feed["other"], feed["mine"]
            (folder / "h5feed.toml").write_bytes(content)
            wait_until(lambda: any(entry["name"] == "h5feed.toml" for entry in feed.datasets()))
            (line,) = [entry for entry in feed.datasets() if entry["name"] == "h5feed.toml"]
            assert line["status"] == "unreadable" and "h5feed.toml" in line["reason"]
            assert feed["other"].revision == other.revision
            assert other.take([0])["x"][0, 0] == 1
            (folder / "h5feed.toml").write_text('[datasets.mine]\nfiles = ["a.h5"]\n')
            wait_until(lambda: any(entry["name"] == "mine" for entry in feed.datasets()))
            assert feed["mine"].revision == mine.revision
    finally:
        server.stop()


def test_a_name_that_is_no_text_does_not_end_the_watch(tmp_path: Path) -> None:
    """Files that appear after one whose name is no UTF-8 are inspected before anybody asks, as others are."""
    folder, cache = tmp_path / "data", tmp_path / "cache"
    _file(folder / "first.h5")
    # One that is there from the start, and stays.
    os.mkdir(os.fsencode(folder) + b"/old\xff")
    server = ServerProcess(folder, cache)
    try:
        with h5feed.connect(server.url, deadline=120) as feed:
            _ = feed["first"]
        for raw in (b"/b\xff.h5", b"/c.h5"):
            _file(os.fsencode(folder) + raw, 1)
            written = folder / os.fsdecode(raw[1:])
            assert written.stat().st_size != 0
        wait_until(lambda: len(list(cache.glob("served-*/digests/[!.]*"))) >= 3, 150)
    finally:
        server.stop()


def test_the_log_names_the_declaration_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is wrong with h5feed.toml begins with its name, and other files' reasons with theirs."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/h5feed.toml").write_text("wrong = 1")
    (tmp_path / "data/a.h5").write_bytes(b"no HDF5")
    settings = Settings.model_validate({"data_dir": tmp_path / "data", "cache_dir": tmp_path / "cache"})
    services = Services.start(settings)
    try:
        for entry in services.catalog.entries():
            entry.outcome.exception(60)
    finally:
        services.close(wait=True)
    lines = sorted(record.getMessage() for record in caplog.records)
    assert [line.split(": ")[:2] for line in lines] == [["a.h5", lines[0].split(": ")[1]], ["h5feed.toml", "wrong"]]
