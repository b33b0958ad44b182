"""What a notebook shows, completes, and says when something is wrong."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.errors import ConnectionFailed, DatasetNotFound, FeedError, RevisionChanged, SplitNotFound

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROWS = 30


def write(path: Path, value: float) -> None:
    with h5py.File(path, "w") as file:
        file["x"] = np.full((ROWS, 4), value, np.float32)
        file["y"] = np.arange(ROWS) % 3
        file["y"].attrs["class_names"] = ["cat", "dog", "fox"]


@pytest.fixture
def served(serve: Callable[..., ServerProcess], tmp_path: Path) -> ServerProcess:
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder / "digits.h5", 0.0)
    write(folder / "<b>bold.h5", 0.0)
    (folder / "torn.h5").write_bytes(b"this is no HDF5 file")
    return serve(folder)


def said(error: type[FeedError], ask: Callable[[], Any]) -> str:
    """The traceback of the error that is raised, which is of this one error alone."""
    with pytest.raises(error) as raised:
        ask()
    text = "".join(traceback.format_exception(raised.value))
    # What httpx or a socket said to us beforehand is nothing to whoever reads this.
    assert text.count("Traceback (most recent call last)") == 1, text
    return text.splitlines()[-1 - len(getattr(raised.value, "__notes__", ()))]


def test_what_is_completed(served: ServerProcess) -> None:
    """Names of datasets and of a batch's fields; nothing, and no error, where the server is not there."""
    with h5feed.connect(served.url, deadline=20) as feed:
        assert sorted(feed._ipython_key_completions_()) == ["<b>bold", "digits", "torn"]
        assert sorted(feed["digits"].batch(0)._ipython_key_completions_()) == ["x", "y"]
        served.stop()
        assert feed._ipython_key_completions_() == []
        assert "no complete response" in feed._repr_html_()


def test_what_is_shown(served: ServerProcess) -> None:
    """Tables of datasets and fields, in which nothing is taken for HTML, and loops that say where they are."""
    with h5feed.connect(served.url, deadline=20) as feed:
        wait_until(lambda: "preparing" not in feed._repr_html_())
        shown = feed._repr_html_()
        assert "3 datasets" in shown and "&lt;b&gt;bold" in shown and "<b>" not in shown
        assert "x: float32[4]" in shown and "unreadable" in shown
        digits = feed["digits"]
        assert "3 classes" in digits._repr_html_() and "label" in digits._repr_html_()
        assert ">float32<" in digits.batch(0)._repr_html_()
        loader = digits.loader("train", val=0.2, batch_size=5, shuffle=True)
        expected = "'train' of 'digits': 24 rows, 5 batches of 5, a new order each pass; at batch 0 of pass 0>"
        assert repr(loader) == f"<Loader of {expected}"
        next(iter(loader))
        assert "at batch 1 of pass 0" in repr(loader)
        loader.close()
        sequence = digits.sequence("train", val=0.2, batch_size=5, shuffle=True, verbose=False)
        assert repr(sequence) == f"<Sequence of {expected}"
        shared = digits.loader(batch_size=5, shard=1, shards=3)
        assert repr(shared).startswith("<Loader of 'all' of 'digits': 30 rows, 2 batches of 5, shard 1 of 3; ")


def test_what_errors_say(served: ServerProcess) -> None:
    """The last line says what is wrong and what to do; nothing is told of errors that led to it."""
    with h5feed.connect(served.url, deadline=20) as feed:
        assert "there is no dataset 'digit': did you mean 'digits'? Choose from" in said(
            DatasetNotFound, lambda: feed["digit"]
        )
        digits = feed["digits"]
        wrong = said(SplitNotFound, lambda: digits.loader("trian", val=0.1))
        assert "did you mean 'train'? Choose from all, train, val" in wrong
        loader = digits.loader(batch_size=1, readahead=1)
        batches = iter(loader)
        next(batches)
        write(served.folder / "digits.h5", 1.0)
        wait_until(lambda: feed["digits"].revision != digits.revision, 30)
        changed = said(RevisionChanged, lambda: list(batches))
        assert "Request the dataset again" in changed
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        gone = said(ConnectionFailed, lambda: h5feed.connect(url, deadline=0.5)["digits"])
    assert url in gone and "Is the server running and reachable?" in gone
