"""What was trained on is recorded, and gives the same batches again: by itself, in MLflow, in W&B, and as Croissant."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.lineage import Source

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ORDER: Any = {"batch_size": 16, "shuffle": True, "seed": 3, "val": 0.2, "where": "y in 0, 2"}
CARD = """
[datasets.pets]
files = ["raw.h5"]
[datasets.pets.card]
title = "Cats and dogs"
description = "Photographs of pets."
licence = "https://creativecommons.org/licenses/by/4.0/"
citation = "A. Keeper: Cats and dogs, 2024"
"""


def write(path: Path, *, rows: int = 200, seed: int = 0, names: str = "xy") -> None:
    random = np.random.default_rng(seed)
    with h5py.File(path, "w") as file:
        file[names[0]] = random.integers(0, 256, (rows, 4, 4, 3), np.uint8)
        file[names[1]] = np.arange(rows, dtype=np.int64) % 3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.mkdir()
    write(path / "small.h5")
    return path


def arrays(batches: Iterator[h5feed.Batch]) -> list[tuple[list[int], dict[str, Any]]]:
    return [(batch.rows.tolist(), {name: array.tobytes() for name, array in batch.items()}) for batch in batches]


def test_batches_are_the_same_after_a_restart(
    folder: Path, serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """A record that was written to a file gives the same batches from another server over a copy of the data."""
    first = serve(folder)
    with h5feed.connect(first.url) as feed:
        source = feed["small"].source("train", **ORDER)
        before = arrays(feed["small"].batches("train", epoch=2, **ORDER))
        assert source.rows == len(feed["small"].split_rows("train", val=0.2, where="y in 0, 2"))
    first.stop()
    (tmp_path / "record.json").write_text(source.json())
    second = serve(folder)
    again = h5feed.reopen((tmp_path / "record.json").read_text(), second.url)
    assert again.source == Source.of_record({**source.record(), "url": second.url})
    assert arrays(again.batches(epoch=2)) == before
    assert arrays(again.batches(epoch=3)) != before


def test_loops_record_what_they_train_on(folder: Path, serve: Callable[..., ServerProcess]) -> None:
    """Every loop has a record, and a loop that is made from it delivers the same."""
    server = serve(folder)
    ds = h5feed.connect(server.url)["small"]
    loader = ds.loader("train", y="y", classes=[2, 0], val=0.2, shuffle=True, batch_size=8)
    sequence = ds.sequence("train", y="y", val=0.2, shuffle=True, batch_size=8, verbose=False)
    record = loader.source().record()
    assert json.loads(json.dumps(record)) == record
    assert sequence.source().options == {"batch_size": 8, "fields": ["x", "y"], "seed": 0, "shuffle": True, "val": 0.2}
    again = h5feed.reopen(record).loader(y="y", classes=[2, 0])
    for (x, y), (x_again, y_again) in zip(loader, again, strict=True):
        np.testing.assert_array_equal(x, x_again)
        np.testing.assert_array_equal(y, y_again)
    assert h5feed.reopen(sequence.source()).sequence(y="y", verbose=False).source() == sequence.source()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "its fields are the same, but values"),
        ({"rows": 150}, "its fields are the same, but values, rows"),
        ({"names": "zy"}, "field 'x' is not there any more; field 'z' is new"),
    ],
)
def test_changes_are_told(folder: Path, serve: Callable[..., ServerProcess], change: dict[str, Any], said: str) -> None:
    """If the data are not the same, the message says what changed."""
    server = serve(folder)
    record = h5feed.connect(server.url)["small"].source("train", val=0.2).record()
    server.stop()
    write(folder / "small.h5", **change)
    other = serve(folder)
    with pytest.raises(h5feed.RevisionChanged, match=said):
        h5feed.reopen(record, other.url)


def test_a_renamed_dataset_is_found(
    folder: Path, serve: Callable[..., ServerProcess], caplog: pytest.LogCaptureFixture
) -> None:
    """The same data under another name give the same batches; a warning says so. Without them, the name is unknown."""
    server = serve(folder)
    record = h5feed.connect(server.url)["small"].source("train", **ORDER)
    server.stop()
    (folder / "small.h5").rename(folder / "tiny.h5")
    other = serve(folder)
    with caplog.at_level(logging.WARNING, "h5feed"):
        again = h5feed.reopen(record, other.url)
    assert again.dataset.name == "tiny" and "are now 'tiny'" in caplog.text
    assert again.source.digest == record.digest
    (folder / "tiny.h5").unlink()
    write(folder / "else.h5", seed=9)
    last = serve(folder)
    with pytest.raises(h5feed.DatasetNotFound):
        h5feed.reopen(record, last.url)


def test_other_rows_of_the_same_data_are_refused(folder: Path, serve: Callable[..., ServerProcess]) -> None:
    """A digest that does not match is no detail: the model was trained on other rows."""
    record = h5feed.connect(serve(folder).url)["small"].source("train", val=0.2).record()
    with pytest.raises(h5feed.RevisionChanged, match="divided in another way"):
        h5feed.reopen({**record, "digest": "0" * 16})


@pytest.mark.parametrize("record", ["", "[]", "{}", '{"h5feed": 2}', '{"h5feed": 1, "url": 3}', '{"h5feed": 1}'])
def test_what_is_no_record(record: str) -> None:
    """Anything else is refused before a connection is made."""
    with pytest.raises(h5feed.BadParameter):
        h5feed.reopen(record)


def test_errors_of_the_split(folder: Path, serve: Callable[..., ServerProcess]) -> None:
    """A record of a split that does not exist cannot be made."""
    ds = h5feed.connect(serve(folder).url)["small"]
    with pytest.raises(h5feed.SplitNotFound):
        ds.source("training")
    with pytest.raises(h5feed.BadParameter, match="did you mean 'where'"):
        ds.source("all", wher="y > 1")  # type: ignore[call-arg]


def test_a_path_can_be_reopened(folder: Path) -> None:
    """A folder that was opened without a server of its own is opened again."""
    with h5feed.connect(folder) as feed:
        source = feed["small"].source("all", batch_size=50)
        before = arrays(feed["small"].batches(batch_size=50))
    again = h5feed.reopen(source.json())
    assert arrays(again.batches()) == before


def test_mlflow(
    folder: Path, serve: Callable[..., ServerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run has the dataset as an input, and its source, read back from the store, gives the same batches."""
    mlflow = pytest.importorskip("mlflow")
    from h5feed.mlflow import dataset
    from mlflow.data.dataset_source_registry import get_dataset_source_from_json

    train = h5feed.connect(serve(folder).url)["small"].loader("train", y="y", **ORDER)
    # A database would need the whole of MLflow.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with mlflow.start_run() as run:
        mlflow.log_input(dataset(train.source()), context="training")
    logged = mlflow.get_run(run.info.run_id).inputs.dataset_inputs[0]
    assert {tag.key: tag.value for tag in logged.tags} == {"mlflow.data.context": "training"}
    assert (logged.dataset.name, logged.dataset.digest) == ("small.train", train.source().short)
    assert json.loads(logged.dataset.profile)["rows"] == train.samples
    assert "uint8" in logged.dataset.schema
    source = get_dataset_source_from_json(logged.dataset.source, logged.dataset.source_type)
    assert mlflow.data.get_source(logged).to_json() == source.to_json()
    again = source.load().loader(y="y")
    assert again.source() == train.source()
    for (x, y), (x_again, y_again) in zip(train, again, strict=True):
        np.testing.assert_array_equal(x, x_again)
        np.testing.assert_array_equal(y, y_again)


def test_wandb(folder: Path, serve: Callable[..., ServerProcess]) -> None:
    """An artifact refers to the data; its metadata is the record. Other data have another digest."""
    pytest.importorskip("wandb")
    from h5feed.wandb import artifact

    ds = h5feed.connect(serve(folder).url)["small"]
    made = artifact(ds.source("train", **ORDER))
    assert (made.name, made.type) == ("small.train", "dataset")
    assert [entry.ref for entry in made.manifest.entries.values()] == [ds.url]
    assert h5feed.reopen(json.dumps(made.metadata)).source == ds.source("train", **ORDER)
    other = artifact(ds.source("train", **{**ORDER, "seed": 4}))
    assert other.digest != made.digest == artifact(ds.source("train", **ORDER)).digest


@pytest.fixture
def two(tmp_path: Path, serve: Callable[..., ServerProcess]) -> tuple[h5feed.Dataset, h5feed.Dataset]:
    """Datasets of two servers, whose labels have different names."""
    found = []
    for name, rows, seed in (("one", 120, 1), ("two", 90, 2)):
        (tmp_path / name).mkdir()
        write(tmp_path / name / f"{name}.h5", rows=rows, seed=seed, names="xy" if name == "one" else "xz")
        found.append(h5feed.connect(serve(tmp_path / name).url)[name])
    return found[0], found[1]


MIXED: Any = {"batch_size": 16, "shuffle": True, "seed": 3, "val": 0.2}
HOW: dict[str, dict[str, Any]] = {
    "weights": {"weights": {"one": 0.7, "two": 0.3}},
    "temperature": {"temperature": 2.5, "stop": "all"},
    "turns": {"round_robin": True, "mixed": False},
    "table": {"weights": {0: [1, 0], 2: [0.5, 0.5]}, "epoch_rows": 100},
    "options": {"options": {"two": {"where": "z in 0, 2", "val": 10}}},
}


def mixed(two: tuple[h5feed.Dataset, h5feed.Dataset], **how: Any) -> Any:
    return h5feed.mix({"one": two[0], "two": two[1]}, fields={"two": {"z": "y"}}, **how)


@pytest.mark.parametrize("how", HOW)
def test_mixtures(two: tuple[h5feed.Dataset, h5feed.Dataset], how: str) -> None:
    """The record of a mixture, as JSON, gives the same batches in every epoch, and the same record."""
    mixture = mixed(two, **HOW[how])
    source = mixture.loader("train", **MIXED).source()
    again = h5feed.reopen(json.dumps(source.record()))
    assert again.source == source and again.source.short == source.short
    for epoch in (0, 3):
        other: Any
        before: list[Any] = [*mixture.batches("train", epoch=epoch, **MIXED, fields=["x", "y"])]
        for batch, other in zip(before, again.batches(epoch=epoch), strict=True):
            assert (batch.rows.tolist(), batch.source.tolist()) == (other.rows.tolist(), other.source.tolist())
            np.testing.assert_array_equal(batch["x"], other["x"])
            np.testing.assert_array_equal(batch["y"], other["y"])
    others = [mixed(two, **HOW[other]).source("train", **MIXED) for other in HOW if other != how]
    others.append(mixture.source("train", **{**MIXED, "seed": 4}))
    assert len({source.short, *(other.short for other in others)}) == len(HOW) + 1


def test_how_a_source_is_read_is_not_recorded(two: tuple[h5feed.Dataset, h5feed.Dataset]) -> None:
    """A record is the same, and can be opened, if a source has only options that do not change its batches."""
    source = mixed(two, options={"two": {"decode": "server"}}).source("train", **MIXED)
    assert h5feed.reopen(source).source == source == mixed(two).source("train", **MIXED)


def test_mixtures_that_changed(
    two: tuple[h5feed.Dataset, h5feed.Dataset], tmp_path: Path, serve: Callable[..., ServerProcess]
) -> None:
    """It is said which source is not what it was; weights of a function have no record."""
    source = mixed(two).source("train", **MIXED)
    with pytest.raises(h5feed.BadParameter, match=r"weights=\{epoch: function"):
        mixed(two, weights=lambda epoch: [1, 1], epoch_rows=50).source()
    folder = tmp_path / "both"
    folder.mkdir()
    write(folder / "one.h5", rows=120, seed=1)
    write(folder / "two.h5", rows=90, seed=5, names="xz")
    with pytest.raises(h5feed.RevisionChanged, match=r"the source 'two': .*values, rows or h5feed.toml are not"):
        h5feed.reopen(source, serve(folder).url)
    write(folder / "two.h5", rows=90, seed=2, names="xz")
    again = h5feed.reopen(source, serve(folder).url)
    assert again.source.short == source.short
    with pytest.raises(h5feed.RevisionChanged, match="mixed in another way"):
        h5feed.reopen({**source.record(), "digest": "0" * 32})


def test_mixtures_in_mlflow_and_wandb(two: tuple[h5feed.Dataset, h5feed.Dataset]) -> None:
    """They are logged like datasets."""
    pytest.importorskip("mlflow")
    pytest.importorskip("wandb")
    from h5feed.mlflow import dataset
    from h5feed.wandb import artifact

    source = mixed(two).source("train", **MIXED)
    logged = dataset(source).to_dict()
    assert (logged["name"], logged["digest"]) == ("one+two.train", source.short)
    assert h5feed.reopen(logged["source"]).source == source
    made = artifact(source)
    assert h5feed.reopen(json.dumps(made.metadata)).source == source
    assert artifact(mixed(two, stop="all").source("train", **MIXED)).digest != made.digest


def test_croissant(folder: Path, serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """MLCommons' own library accepts the document, for declared cards, text, ragged rows and stored splits."""
    mlc = pytest.importorskip("mlcroissant")
    write(folder / "raw.h5")
    (folder / "h5feed.toml").write_text(CARD)
    with h5py.File(folder / "odd, one.h5", "w") as file:
        file.create_dataset("text", data=["a", "b", "c"] * 4, dtype=h5py.string_dtype())
        lists = file.create_dataset("lists", (12,), h5py.vlen_dtype(np.int16))
        for row in range(12):
            lists[row] = np.arange(row)
        file["half"] = np.zeros((12, 2), np.float16)
        file["yes"] = np.ones(12, np.bool_)
        file["waves"] = np.zeros((12, 3), np.complex64)
    for split in ("train", "test"):
        (folder / "parts").mkdir(exist_ok=True)
        write(folder / "parts" / f"{split}.h5")
    server = serve(folder)
    feed = h5feed.connect(server.url)

    def served() -> list[str]:
        return [entry["name"] for entry in feed.datasets() if entry["status"] == "ok"]

    # Until all have been inspected.
    wait_until(lambda: {"pets", "small", "odd, one", "parts"} <= set(served()))
    names = served()
    for name in names:
        document = feed[name].croissant()
        (tmp_path / "croissant.json").write_text(json.dumps(document))
        read = mlc.Dataset(tmp_path / "croissant.json")
        assert not read.metadata.ctx.issues.errors, read.metadata.ctx.issues.report()
        fields = next(one for one in read.metadata.record_sets if one.id == "fields").fields
        assert {field.name for field in fields} == {
            field.name for field in feed[name].fields.values() if field.readable
        }
        url = document["distribution"][0]["contentUrl"]
        came = np.load(io.BytesIO(httpx.get(url).content))
        assert len(came["__rows__"]) == feed[name].rows and {field.name for field in fields} <= set(came)
    pets = feed["pets"].croissant()
    assert (pets["name"], pets["citeAs"]) == ("Cats and dogs", "A. Keeper: Cats and dogs, 2024")
    assert [one["splits/name"] for one in feed["parts"].croissant()["recordSet"][1]["data"]] == ["train", "test"]
    response = httpx.get(f"{server.url}/v1/datasets/pets/croissant")
    assert response.headers["content-type"] == "application/ld+json"
