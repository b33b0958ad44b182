"""What the demo leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from h5feed.errors import FeedError
from h5feed_server.demo import TARGET_ACCURACY, TARGET_EPOCHS, is_too_low, keep_file, pack_digits


def test_a_file_that_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The demo's own is there once; another one of that name is not touched, and the demo says so."""
    packed, folder = tmp_path / "digits.h5", tmp_path / "data"
    for _ in range(2):
        pack_digits(packed)
        assert keep_file(packed, folder) == folder / "digits.h5"
        assert (folder / "digits.h5").read_bytes() == packed.read_bytes()
    assert capsys.readouterr().err == ""
    (folder / "digits.h5").write_bytes(b"of somebody")
    keep_file(packed, folder)
    assert (folder / "digits.h5").read_bytes() == b"of somebody"
    assert "is not from this demo: it is not replaced" in capsys.readouterr().err
    assert [path.name for path in folder.iterdir()] == ["digits.h5"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    """It is named, with the reason."""
    packed = tmp_path / "digits.h5"
    packed.write_bytes(b"digits")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FeedError, match=r"cannot write .*file/digits.h5: File exists"):
        keep_file(packed, tmp_path / "file")


@pytest.mark.parametrize(("epochs", "below"), [(1, False), (TARGET_EPOCHS - 1, False), (TARGET_EPOCHS, True)])
def test_the_accuracy_is_checked_after_a_whole_training(epochs: int, below: bool) -> None:
    """A short training may end below the target."""
    assert is_too_low(TARGET_ACCURACY - 0.01, epochs) == below
    assert not is_too_low(TARGET_ACCURACY, epochs)
