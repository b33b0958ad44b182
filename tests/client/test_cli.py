"""The command line of the client, against a real server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ServerProcess
from h5feed.batch import Batch
from h5feed.cli import _write, main


def test_ls_and_info(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """ls lists everything with its status, info one dataset with its splits; both as JSON too."""
    assert main(["ls", server.url]) == 0
    listing = capsys.readouterr().out
    assert "mixed" in listing and "unreadable: it is not a regular file" in listing
    assert main(["info", server.url, "mixed", "--val", "0.1", "--test", "100"]) == 0
    info = capsys.readouterr().out
    assert "stratified by labels" in info and "fish" in info and "not served" in info
    assert main(["info", server.url, "mixed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1000


def test_get(server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """get writes rows or a batch as npz, and one field as npy."""
    rows, one = tmp_path / "rows.npz", tmp_path / "one.npy"
    assert main(["get", server.url, "tall", "--rows", "3,1", "--fields", "x,y", "-o", str(rows)]) == 0
    archive = np.load(rows)
    assert archive["__rows__"].tolist() == [3, 1] and archive["x"].shape == (2, 300, 300)
    assert main(["get", server.url, "tall", "--fields", "y", "--batch-size", "8", "-o", str(one)]) == 0
    assert np.load(one).tolist() == [0, 1] * 4


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["info", "nix"], "valid are"),
        (["get", "tall", "-o", "out.txt"], ".npz"),
        (["get", "tall", "-o", "a.npy"], "--fields"),
    ],
)
def test_errors_are_one_line(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    """What is wrong is one line on standard error and exit code 1."""
    assert main([arguments[0], server.url, *arguments[1:]]) == 1
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    """A server that is not there is said after the deadline; a bad address at once."""
    assert main(["ls", "http://127.0.0.1:9", "--deadline", "0.5"]) == 1
    assert "Is the server running" in capsys.readouterr().err
    assert main(["ls", "gpu-box"]) == 1
    assert "http://host:8000" in capsys.readouterr().err


def test_any_field_name_is_written(tmp_path: Path) -> None:
    """A field may be named like a parameter of numpy's own writer."""
    fields = {"file": np.arange(3), "allow_pickle": np.zeros((3, 2)), "group.x": np.ones(3)}
    batch = Batch(fields, np.arange(3), index=0, epoch=0, revision="r")
    _write(batch, tmp_path / "out.npz")
    archive = np.load(tmp_path / "out.npz")
    assert set(archive.files) == {*fields, "__rows__"}
    for name, array in fields.items():
        np.testing.assert_array_equal(archive[name], array)
