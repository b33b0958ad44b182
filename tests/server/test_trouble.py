"""The benchmark of trouble runs, and says what it found; how long anybody waits is for it to judge, not for a test."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.trouble", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=150, check=False)


@pytest.mark.slow
def test_nothing_is_wrong_or_lost_beside_malformed_requests() -> None:
    """Clients train on, every row as in the file and once in each epoch; whoever sends rubbish is told so."""
    done = _run("--only", "none,malformed", "--seconds", "1")
    assert done.returncode in (0, 1) and not done.stderr, done.stderr
    table = dict(re.findall(r"^(none|malformed) +4 +(.*)$", done.stdout, re.MULTILINE))
    for figures in table.values():
        batches, wrong, lost, longest = figures.split()
        assert (wrong, lost) == ("0", "0") and batches != "0" and float(longest) > 0, done.stdout
    assert set(table) == {"none", "malformed"}, done.stdout
    assert " 400 " in done.stdout and " 431 " in done.stdout and " 500 " not in done.stdout
    assert "a client failed" not in done.stdout


def test_what_is_no_trouble() -> None:
    """A name that is none is refused with those that are."""
    done = _run("--only", "nun")
    assert done.returncode == 2 and "choose from none, crowd, slow" in done.stderr
