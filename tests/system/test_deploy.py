"""The blocks of docs/how-to/deploy.md that no other test runs: each by the program that it is for."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import h5feed
import h5py
import numpy as np
import pytest

from tests.system.programs import ROOT, blocks_of, caddy_with, free_port, running

BIN = Path(sys.executable).parent


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a reader runs the commands, with a dataset in `data`."""
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "numbers.h5", "w") as file:
        file["x"], file["y"] = np.arange(20.0), np.arange(20) % 2
    return tmp_path


@pytest.mark.parametrize("is_old", [False, True], ids=["as it stands", "for an older systemd"])
def test_the_unit(tmp_path: Path, is_old: bool) -> None:
    """systemd has no complaint, but for the type that older ones do not know, which the page says how to replace."""
    (unit,) = blocks_of("ini")
    unit = unit.replace("/opt/h5feed/bin/h5feed-server", str(BIN / "h5feed-server"))
    assert str(BIN) in unit
    if is_old:
        unit = unit.replace("Type=notify-reload", "Type=notify\nExecReload=kill -HUP $MAINPID")
    file = tmp_path / "h5feed.service"
    file.write_text(unit)
    assert shutil.which("systemd-analyze"), "systemd is not installed: run `make setup-system`"
    done = subprocess.run(
        ["systemd-analyze", "verify", str(file)], capture_output=True, text=True, timeout=60, check=False
    )
    said = [line for line in done.stderr.splitlines() if file.name in line]
    assert done.returncode == 0 and all(not is_old and "notify-reload" in line for line in said), done.stderr


@pytest.mark.parametrize("begin", ["H5FEED_DATA_DIR=data uvicorn", "export H5FEED_TRUSTED_PROXIES"])
def test_commands_that_serve(folder: Path, begin: str) -> None:
    """They serve the reader's data, until they are stopped."""
    (block,) = (block for block in blocks_of("sh") if block.startswith(begin))
    port = free_port()
    block = block.replace("--port 8001", f"--port {port}").replace("serve data", f"serve data --port {port}")
    assert str(port) in block
    # The shell's place is taken by the last command, which is then the one that is stopped.
    *before, last = block.strip().splitlines()
    assignments, _, command = last.partition(" ") if last.startswith("H5FEED_") else ("", "", last)
    script = "\n".join(["set -e", f"cd {folder}", *before, f"export {assignments}", f"exec {command}"])
    path = os.pathsep.join([str(BIN), os.environ["PATH"]])
    with (
        running(["bash", "-c", script], folder, port, PATH=path, XDG_CACHE_HOME=str(folder / "cache")),
        h5feed.connect(f"http://127.0.0.1:{port}", deadline=60) as feed,
    ):
        assert feed["numbers"].batch(0, batch_size=4).rows.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["scale", "tls"])
def test_the_files_of_caddy(tmp_path: Path, name: str) -> None:
    """Caddy takes those of the compose file's profiles."""
    program, _, *options = caddy_with(ROOT / f"deploy/caddy/{name}.Caddyfile")
    environment = {**os.environ, "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    done = subprocess.run(
        [program, "validate", *options], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
