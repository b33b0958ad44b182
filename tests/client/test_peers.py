"""The benchmark against what users would pick instead: what runs without further packages, and what cannot run."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers import environments
from benchmarks.peers.environments import Environment

ROOT = Path(__file__).parents[2]


def test_what_cannot_be_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason is returned, and it is tried again the next time; what is installed is kept."""
    monkeypatch.setattr(environments, "FOLDER", tmp_path)
    environment = Environment("odd", ("./no-such-package.whl",))
    for _ in range(2):
        assert "cannot be installed: ERROR" in environment.missing()
    (tmp_path / "odd" / "installed.json").write_text('["./no-such-package.whl"]')
    assert environment.missing() == ""


@pytest.mark.slow
def test_the_peers_take_turns() -> None:
    """Each figure is printed with what it was measured on. Needs half a gigabyte of disk."""
    command = [sys.executable, "-m", "benchmarks", "--rounds", "1", "--peers", "h5py rows,h5py fancy"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=350, check=False)
    assert done.returncode == 0, done.stderr
    ratios = dict(re.findall(r"^RATIO (\S+) ([\d.]+)$", done.stdout, re.MULTILINE))
    assert set(ratios) == {"peers_h5py_rows", "peers_h5py_fancy"} and all(float(ratio) > 0 for ratio in ratios.values())
    assert "load of the machine" in done.stdout and "left out" not in done.stdout
