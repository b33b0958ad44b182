"""What workers claim of the ranges of a store: whatever becomes of one, no other waits for long, or ends with it."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from h5feed_server.storage.objects.claims import Claims

VERSION, PIECE = b"version1", (0, 10)

_CLAIM = """
import sys
from pathlib import Path
from h5feed_server.storage.objects.claims import Claims
claims = Claims(Path(sys.argv[1]), float(sys.argv[2]))
for number in range(int(sys.argv[3])):
    claims.take(b"version1", [(number * 1000, 10)])
print("claimed", flush=True)
sys.stdin.readline()
"""


def claiming(path: Path, seconds: float, count: int = 1) -> subprocess.Popen[str]:
    """A process that claims ranges, the first of which is `PIECE`, and goes on to live."""
    return subprocess.Popen(
        [sys.executable, "-c", _CLAIM, str(path), str(seconds), str(count)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_worker_that_replaces_a_dead_one_does_not_keep_its_claims(tmp_path: Path) -> None:
    """It gets the same number, and so the dead one seems to live."""
    path = tmp_path / "claims"
    first = claiming(path, 600.0)
    assert first.stdout is not None and first.stdout.readline() == "claimed\n"
    own = Claims(path, 600.0)
    assert own.theirs(VERSION, [PIECE]) == {PIECE}
    first.kill()
    first.communicate()
    second = claiming(path, 600.0, 0)
    try:
        assert second.stdout is not None and second.stdout.readline() == "claimed\n"
        own.wait(VERSION, PIECE)
        assert own.take(VERSION, [PIECE]) == set()
    finally:
        second.kill()
        second.communicate()


def test_claims_from_before_the_machine_was_started_count_for_nothing(tmp_path: Path) -> None:
    """Their clock may have shown much more."""
    path = tmp_path / "claims"
    other = claiming(path, 600.0)
    try:
        assert other.stdout is not None and other.stdout.readline() == "claimed\n"
        own = Claims(path, 600.0)
        assert own.theirs(VERSION, [PIECE]) == {PIECE}
        content = path.read_bytes()
        place = next(place for place in range(0, len(content), 16) if any(content[place : place + 8]))
        with open(path, "r+b") as file:
            file.seek(place + 8)
            file.write(struct.pack("<I", int(time.monotonic()) + 10_000_000))
        own.wait(VERSION, PIECE)
        assert own.theirs(VERSION, [PIECE]) == set()
    finally:
        other.kill()
        other.communicate()


@pytest.mark.parametrize("old_bytes", [None, 16 << 15], ids=["new", "sparse"])
def test_a_full_disk_is_an_error(tmp_path: Path, old_bytes: int | None) -> None:
    """And not the end of the process, which has the file mapped."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting needs root")
    try:
        if old_bytes is not None:
            with open(tmp_path / "claims", "wb") as file:
                file.truncate(old_bytes)
        other = claiming(tmp_path / "claims", 600.0, 20_000)
        _, errors = other.communicate(timeout=60)
        assert other.returncode == 1 and "No space left on device" in errors
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
