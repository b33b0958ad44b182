"""The command line of the client, against a real server."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5feed
import h5feed.stats
import numpy as np
import pytest
from h5feed.batch import Batch
from h5feed.cli import main
from h5feed.commands import _write

from tests.support.server_process import ServerProcess
from tests.support.terminal import on_terminal


def test_ls_and_info(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """ls lists everything with its status, info one dataset with its splits; both as JSON too."""
    assert main(["ls", server.url]) == 0
    listing = capsys.readouterr().out
    assert "mixed" in listing and "unreadable: it is not a regular file" in listing
    assert main(["info", server.url, "mixed", "--val", "0.1", "--test", "100"]) == 0
    info = capsys.readouterr().out
    assert "stratified by 'labels'" in info and "fish" in info and "not served" in info
    assert main(["info", server.url, "mixed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1000


def test_stats(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """stats prints numbers and bars, or JSON, or the channel means as people keep them in a file."""
    split = ["--split", "train", "--test", "0.1"]
    assert main(["stats", server.url, "mixed", *split]) == 0
    table = capsys.readouterr().out
    assert "split train, 900 rows" in table and "0 cat" in table and "█" in table and "▁" in table
    assert main(["stats", server.url, "mixed", "--field", "images", "--means", *split]) == 0
    means = json.loads(capsys.readouterr().out)
    assert list(means) == ["R", "G", "B"] and 120 < means["R"] < 135
    assert main(["stats", server.url, "mixed", "--field", "labels", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["classes"]) == 4
    assert main(["stats", server.url, "mixed", "--field", "labels", "--means"]) == 1
    assert "found none" in capsys.readouterr().err


def test_stats_on_a_terminal(server: ServerProcess) -> None:
    """On a terminal of 80 columns there is colour, and no number is cut."""
    pytest.importorskip("rich")
    text = on_terminal([sys.executable, "-m", "h5feed.cli", "stats", server.url, "mixed", "--field", "images"])
    assert "\x1b[31m" in text
    stats = feed_stats(server)
    assert f"{stats['mean']:.5g}" in text and f"{stats['channels'][2]['std']:.5g}" in text


def feed_stats(server: ServerProcess) -> h5feed.stats.FieldStats:
    with h5feed.connect(server.url) as feed:
        return feed["mixed"].stats(field="images")


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
        (["info", "nix"], "choose from"),
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
    """A server that is not there, and a bad address, are one line each, at once."""
    with socket.socket() as held:
        # Nobody listens there, and nobody else will meanwhile.
        held.bind(("127.0.0.1", 0))
        assert main(["ls", f"http://127.0.0.1:{held.getsockname()[1]}", "--deadline", "9999"]) == 1
    said = capsys.readouterr().err
    assert "Connection refused" in said and "Is the server running" in said and len(said.splitlines()) == 1
    assert main(["ls", "gpu-box"]) == 1
    assert "http://host:8000" in capsys.readouterr().err


def test_a_misspelt_option(capsys: pytest.CaptureFixture[str]) -> None:
    """It names the option that was meant, and all there are, even where another one is missing for it."""
    for word, meant in (("--ouput", "--output"), ("--batchsize=3", "--batch-size"), ("--split_seed", "--split-seed")):
        with pytest.raises(SystemExit) as ended:
            main(["get", "http://127.0.0.1:1", "digits", word, "x.npz"])
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert f"did you mean '{meant}'?" in said and "--shuffle" in said


@pytest.mark.parametrize("command", ["ls", "info", "stats", "get", "bench"])
def test_help_has_examples_of_its_own(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are of this command, and their options are there; that of all commands has one of each."""
    with pytest.raises(SystemExit):
        main([command, "--help"])
    helped, examples = capsys.readouterr().out.split("examples:\n")
    lines = examples.strip().splitlines()
    assert len(lines) > 1 and all(line.strip().startswith(f"h5feed {command} ") for line in lines)
    for option in re.findall(r"(?<![\w-])--?[a-z][a-z-]*", examples.replace("jq -r", "")):
        assert option in helped
    with pytest.raises(SystemExit):
        main(["--help"])
    assert f"h5feed {command} http" in capsys.readouterr().out


class StillLooking(BaseHTTPRequestHandler):
    """A catalogue of which the one dataset is described when it is asked for the fourth time."""

    asked = 0

    def do_GET(self) -> None:
        StillLooking.asked += self.path.startswith("/v1/datasets")
        status = "ok" if StillLooking.asked > 3 else "preparing"
        entry: dict[str, Any] = {
            "name": "d",
            "status": status,
            "reason": None,
            "revision": None,
            "rows": None,
            "fields": [],
        }
        content = json.dumps({"datasets": [entry], "total": 1}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *about: object) -> None:
        pass


def test_ls_waits(capsys: pytest.CaptureFixture[str]) -> None:
    """With --wait it asks until every dataset is described; where time is up before that, it says how many are not."""
    with ThreadingHTTPServer(("127.0.0.1", 0), StillLooking) as listener:
        serving = threading.Thread(target=listener.serve_forever)
        serving.start()
        url = f"http://127.0.0.1:{listener.server_port}"
        try:
            assert main(["ls", url]) == 0
            assert "preparing" in capsys.readouterr().out
            assert main(["ls", url, "--wait", "0"]) == 1
            assert "datasets not ready after 0 s" in capsys.readouterr().err
            assert main(["ls", url, "--wait"]) == 0
            assert "ok" in capsys.readouterr().out
        finally:
            listener.shutdown()
            serving.join()


def test_ls_waits_for_the_server(
    serve: Callable[..., ServerProcess], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --wait a server that is not there yet is waited for."""
    server = serve(folder)
    server.stop()
    starting = threading.Timer(0.5, server.start)
    starting.start()
    assert main(["ls", server.url, "--wait"]) == 0
    starting.join()
    assert "mixed" in capsys.readouterr().out


def test_any_field_name_is_written(tmp_path: Path) -> None:
    """A field may be named like a parameter of numpy's own writer."""
    fields = {"file": np.arange(3), "allow_pickle": np.zeros((3, 2)), "group.x": np.ones(3)}
    batch = Batch(fields, np.arange(3), index=0, epoch=0, revision="r")
    _write(batch, tmp_path / "out.npz")
    archive = np.load(tmp_path / "out.npz")
    assert set(archive.files) == {*fields, "__rows__"}
    for name, array in fields.items():
        np.testing.assert_array_equal(archive[name], array)


@pytest.mark.parametrize("module", ["h5feed.cli", "h5feed_server.cli"])
@pytest.mark.parametrize("word", ["--version", "--help"])
def test_nothing_heavy_is_loaded_to_print_a_line(module: str, word: str) -> None:
    """Packages that take a second to import are imported by the commands that use them."""
    heavy = ("fastapi", "h5py", "httpx", "numpy", "pydantic", "rich", "uvicorn")
    code = f"""
import sys
from {module} import main
try:
    main([{word!r}])
except SystemExit as end:
    assert end.code == 0
print([name for name in {heavy!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(("h5feed", "usage")) and done.stdout.splitlines()[-1] == "[]", done.stdout
