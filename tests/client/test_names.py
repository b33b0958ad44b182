"""What users type that is not quite right, and what they try first: the answer is what they meant."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import numpy as np
import pytest
from h5feed.errors import BadAnswer, BadParameter, FieldNotFound, RowOutOfRange

from tests.support.server_process import ServerProcess

CALLS: dict[str, Callable[..., Any]] = {
    "batch": lambda ds, **options: ds.batch(0, **options),
    "batches": lambda ds, **options: ds.batches(**options),
    "plan": lambda ds, **options: ds.plan(**options),
    "loader": lambda ds, **options: ds.loader(**options),
    "sequence": lambda ds, **options: ds.sequence(**options),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("typed", "meant"), [("batchsize", "batch_size"), ("shufle", "shuffle"), ("splitSeed", "split_seed")]
)
def test_a_misspelt_option(feed: h5feed.Feed, call: str, typed: str, meant: str) -> None:
    """It names the one that was meant, and all that this call takes, its own parameters among them."""
    with pytest.raises(BadParameter) as raised:
        CALLS[call](feed["mixed"], **{typed: 1})
    said = str(raised.value)
    assert f"unknown option {typed!r}: did you mean {meant!r}?" in said
    options = said.partition("The options are ")[2].split(", ")
    expected = {
        "batches": {"connections", "readahead", "cache", "fields"},
        "loader": {"connections", "x", "class_mode", "epoch"},
        "sequence": {"connections", "y", "verbose", "shards"},
    }
    assert {"batch_size", "val", "stratify", "window"} | expected.get(call, set()) <= set(options)
    assert options == sorted(options) and "self" not in options and "dataset" not in options


def test_options_of_splits_and_statistics(feed: h5feed.Feed) -> None:
    """They take other options, and say so."""
    dataset = feed["mixed"]
    asks: list[Callable[..., Any]] = [dataset.splits, dataset.stats]
    for ask in asks:
        with pytest.raises(BadParameter, match="did you mean 'timeout'") as raised:
            ask(time_out=3)
        assert "shuffle" not in str(raised.value).partition("The options are ")[2].split(", ")


def test_a_misspelt_field(feed: h5feed.Feed) -> None:
    """A batch says which field was meant; it is a KeyError, so that a batch is a mapping as any other."""
    dataset = feed["mixed"]
    batch = dataset.batch(0)
    with pytest.raises(FieldNotFound, match="no field 'imges': did you mean 'images'\\? Choose from ") as raised:
        batch["imges"]
    assert isinstance(raised.value, KeyError)
    assert "".join(traceback.format_exception(raised.value)).count("Traceback") == 1
    assert "imges" not in batch and batch.get("imges") is None and "images" in batch
    with pytest.raises(FieldNotFound, match="did you mean 'labels'"):
        dataset.loader(y="label")
    with pytest.raises(FieldNotFound):
        batch.text("nix")
    with pytest.raises(FieldNotFound, match="statistics of 'lables': did you mean 'labels'"):
        dataset.stats()["lables"]


def test_rows_as_of_an_array(feed: h5feed.Feed) -> None:
    """``len``, ``shape`` and indexing are what they are of arrays of so many rows."""
    dataset = feed["mixed"]
    assert len(dataset) == dataset.rows == 1000 and dataset
    assert dataset.shape["images"] == (1000, 12, 10, 3) and "text" not in dataset.shape
    everything = dataset.take(range(1000), fields=["images", "labels"])
    mask = np.zeros(1000, bool)
    mask[[4, 9]] = True
    for rows in (slice(0, 3), slice(-3, None), slice(None, None, 250), slice(5, 2), [5, 1, 5], np.array([-1, 0]), mask):
        batch = dataset[rows]
        expected = np.arange(1000)[rows]
        assert batch.rows.tolist() == expected.tolist()
        np.testing.assert_array_equal(batch["images"], everything["images"][expected])
    one = dataset[-2]
    np.testing.assert_array_equal(one["images"], everything["images"][998])
    assert one["labels"] == everything["labels"][998]
    with pytest.raises(RowOutOfRange):
        dataset[1000]
    with pytest.raises(BadParameter, match=r"fields=\['images'\]"):
        dataset["images"]  # type: ignore[index]
    with pytest.raises(BadParameter, match="mask"):
        dataset[mask[:9]]
    with pytest.raises(TypeError, match="batches"):
        iter(dataset)


def test_http_and_https(
    serve: Callable[..., ServerProcess], server: ServerProcess, folder: Path, tmp_path: Path
) -> None:
    """Whoever takes one for the other is told so, at once."""
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*make, "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    over_tls = serve(folder, "--tls-cert", str(certificate), "--tls-key", str(key), "--workers", "1")
    for url, other in ((server.url, "https"), (over_tls.url, "http")):
        wrong = f"{other}://{url.partition('://')[2]}"
        with h5feed.connect(wrong, deadline=60) as mixed_up, pytest.raises(BadAnswer) as raised:
            mixed_up.datasets()
        assert url in str(raised.value)


@pytest.mark.slow
def test_type_checkers_refuse_misspelt_options(tmp_path: Path) -> None:
    """Options are typed: an editor completes them, and mypy names the one that was meant."""
    (tmp_path / "training.py").write_text(
        "import h5feed\n"
        'ds = h5feed.connect("http://gpu-box:8000")["pets"]\n'
        'ds.sequence("train", batch_size=3, shard="auto", val=0.1, mean="server", x=["a"], verbose=False)\n'
        'ds.sequence("train", batchsize=3)\n'
        'ds.loader("train", seed="seven")\n'
        'ds.torch_map("train", shuffle=True)\n'
    )
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "training.py"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    errors = [line for line in checked.stdout.splitlines() if ": error: " in line]
    assert [line.split(":")[1] for line in errors] == ["4", "5", "6"], checked.stdout
    assert 'did you mean "batch_size"' in errors[0]
