"""Splits that a build has stored, beside those that a training run asks for."""

from __future__ import annotations

import json
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import BadParameter
from h5feed_server.builder import BuildOptions, build
from sklearn.model_selection import StratifiedKFold, train_test_split

from tests.support.fork_server import COMMANDS
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

SIZE = (16, 16)
AS_BUILT: dict[str, Any] = {"val": 0.1, "test": 0.1}


@pytest.fixture(scope="module")
def served(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[h5feed.Feed, Path]]:
    """A server over what different builds make of 120 photographs, and its folder."""
    folder = tmp_path_factory.mktemp("built")
    build(pets, folder / "pets.h5", BuildOptions(SIZE, **AS_BUILT))
    build(pets, folder / "plain.h5", BuildOptions(SIZE, stratify=False, split_seed=7, **AS_BUILT))
    build(pets, folder / "last.h5", BuildOptions(SIZE, split_shuffle=False, **AS_BUILT))
    build(pets, folder / "tested.h5", BuildOptions(SIZE, test=24))
    build(pets, folder / "sharded.h5", BuildOptions(SIZE, shards=2, **AS_BUILT))
    build(pets, folder / "parted", BuildOptions(SIZE, split_files=True, **AS_BUILT))
    build(folder / "pets.h5", folder / "packed.h5", BuildOptions(compression="gzip"))
    build(pets, folder / "old.h5", BuildOptions(SIZE, **AS_BUILT))
    build(pets, folder / "edited.h5", BuildOptions(SIZE, **AS_BUILT))
    with h5py.File(folder / "old.h5", "r+") as file:
        del file.attrs["h5feed_splits"]
    with h5py.File(folder / "edited.h5", "r+") as file:
        record = json.loads(file.attrs["h5feed_splits"])
        file.attrs["h5feed_splits"] = json.dumps({**record, "rows": {**record["rows"], "test": 13}})
    server = ServerProcess(folder, tmp_path_factory.mktemp("cache"), "--workers", "2")
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed, folder
    assert server.stop() == 0


def stored(path: Path) -> dict[str, list[int]]:
    """Row ids of the groups of a file, by h5py: train's come first, then val's, then test's."""
    found: dict[str, list[int]] = {}
    with h5py.File(path) as file:
        begin = 0
        for name in ("train", "val", "test"):
            if name in file:
                found[name] = list(range(begin, begin + len(file[name]["labels"])))
                begin += len(found[name])
    return found


def labels_of(path: Path) -> Any:
    with h5py.File(path) as file:
        return np.concatenate([file[name]["labels"][:] for name in stored(path)])


def asked(dataset: h5feed.Dataset, *names: str, **options: Any) -> dict[str, list[int]]:
    return {name: dataset.split_rows(name, **options).tolist() for name in names}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Lines of the client about stored splits: on a busy machine there are others."""
    lines = [record.getMessage() for record in caplog.records if record.name == "h5feed"]
    return [line for line in lines if "stored" in line]


ALL = ("train", "val", "test")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("pets", {}),
        ("pets", AS_BUILT),
        ("pets", {**AS_BUILT, "split_seed": 42}),
        ("pets", {**AS_BUILT, "stratify": "labels"}),
        ("pets", {"val": 12, "test": 12}),
        ("pets", {"val": 12, "test": 0.1}),
        ("pets", {"val": 0.1}),
        ("pets", {"val": 12}),
        ("plain", {**AS_BUILT, "split_seed": 7, "stratify": "none"}),
        ("last", {**AS_BUILT, "split_shuffle": False}),
        ("packed", AS_BUILT),
    ],
)
def test_what_is_asked_is_what_is_stored(
    served: tuple[h5feed.Feed, Path], caplog: pytest.LogCaptureFixture, name: str, options: dict[str, Any]
) -> None:
    """The same shares (as fractions or counts), seed and classes as the build's: the stored rows, in every answer."""
    feed, folder = served
    dataset, expected = feed[name], stored(folder / f"{name}.h5")
    assert asked(dataset, *ALL, **options) == expected
    splits = dataset.splits(**options)
    assert splits["replaces"] is None and splits.note is None and splits.method is None
    for split in ALL:
        assert splits["splits"][split]["stored"] is True
        plan = dataset.plan(split, batch_size=5, **options)
        assert (plan.rows, plan.stored, plan.note) == (len(expected[split]), True, None)
        rows = np.concatenate([batch.rows for batch in dataset.batches(split, batch_size=5, **options)])
        assert rows.tolist() == expected[split]
        with h5py.File(folder / f"{name}.h5") as file:
            mean = file[split]["images"][:].mean((0, 1, 2), dtype=np.float64)
        np.testing.assert_allclose(dataset.stats(split, field="images", **options).mean, mean)
    assert told(caplog) == []


def test_spread_over_files(served: tuple[h5feed.Feed, Path]) -> None:
    """Shards and a file for each split hold the same record: stored splits are the answer for them, too."""
    feed, folder = served
    assert asked(feed["parted"], *ALL, **AS_BUILT) == stored(folder / "pets.h5")
    sharded = feed["sharded"]
    assert asked(sharded, *ALL, **AS_BUILT) == asked(sharded, *ALL)
    assert {name: len(rows) for name, rows in asked(sharded, *ALL).items()} == {"train": 96, "val": 12, "test": 12}


def test_stored_means_are_of_the_train_that_is_asked_for(served: tuple[h5feed.Feed, Path]) -> None:
    """What the file says of train's channels is what the server counts of train, asked for as it was built."""
    feed, folder = served
    with h5py.File(folder / "pets.h5") as file:
        mean, std = file["train/images"].attrs["mean"], file["train/images"].attrs["std"]
    found = feed["pets"].stats("train", field="images", **AS_BUILT)
    np.testing.assert_allclose([channel["mean"] for channel in found["channels"]], mean)
    np.testing.assert_allclose([channel["std"] for channel in found["channels"]], std)


def drawn(path: Path, test: int, val: int | None, seed: int = 42, stratify: bool = True) -> dict[str, list[int]]:
    """train_test_split once or twice, over all rows of a file."""
    labels = labels_of(path)
    by = labels if stratify else None
    train, held = train_test_split(np.arange(len(labels)), test_size=test, stratify=by, random_state=seed)
    found = {"test": held}
    if val is not None:
        by = labels[train] if stratify else None
        train, found["val"] = train_test_split(train, test_size=val, stratify=by, random_state=seed)
    return {name: sorted(rows.tolist()) for name, rows in {"train": train, **found}.items()}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("pets", {**AS_BUILT, "split_seed": 7}, {"test": 12, "val": 12, "seed": 7}),
        ("pets", {**AS_BUILT, "stratify": "none"}, {"test": 12, "val": 12, "stratify": False}),
        ("pets", {"test": 0.2}, {"test": 24, "val": None}),
        ("pets", {"test": 0.2, "val": 0.1}, {"test": 24, "val": 12}),
        ("plain", AS_BUILT, {"test": 12, "val": 12}),
        ("plain", {**AS_BUILT, "split_seed": 7}, {"test": 12, "val": 12, "seed": 7}),
        ("old", AS_BUILT, {"test": 12, "val": 12}),
        ("edited", AS_BUILT, {"test": 12, "val": 12}),
    ],
)
def test_another_test_split_is_drawn_anew_and_said(
    served: tuple[h5feed.Feed, Path], name: str, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    """Other shares, seed or classes, or a file without its record: scikit-learn's rows, and what has become of the
    stored ones, counted by hand, in splits, plan and statistics."""
    feed, folder = served
    path = folder / f"{name}.h5"
    dataset, rows, before = feed[name], drawn(path, **expected), stored(path)
    assert asked(dataset, *rows, **options) == rows
    splits = dataset.splits(**options)
    assert splits["replaces"] == {
        old: {new: len({*own} & {*rows[new]}) for new in splits.names if new != "all"} for old, own in before.items()
    }
    lost = len({*before["test"]} & {*rows["train"]})
    assert f"{lost} of the 12 rows of the stored test split are in train" in (splits.note or "")
    assert ("how they were drawn is not recorded" in (splits.note or "")) == (name in ("old", "edited"))
    assert not any(splits["splits"][split]["stored"] for split in rows)
    dataset.stats("train", field="labels", **options)
    query = {**options, "split": "train", "revision": dataset.revision}
    for what, more in (("plan", {}), ("stats", {"field": "labels"})):
        answer = httpx.get(f"{feed_url(feed)}/v1/datasets/{name}/{what}", params=query | more).json()
        assert (answer["stored"], answer["note"], answer["replaces"]) == (False, splits.note, splits["replaces"])


def feed_url(feed: h5feed.Feed) -> str:
    return str(feed["pets"]._client.url)


def test_a_stored_test_split_stays_where_only_val_differs(served: tuple[h5feed.Feed, Path]) -> None:
    """Test as it was built is the stored one, whatever val is: none of its rows is trained on. Fractions of val are of
    all rows beside test=, and of those that are stored for train and val without it."""
    feed, folder = served
    pets, before, labels = feed["pets"], stored(folder / "pets.h5"), labels_of(folder / "pets.h5")
    others = np.array(before["train"] + before["val"])
    for options, count in (
        ({"test": 0.1, "val": 0.2}, math.ceil(0.2 * 120)),
        ({"test": 12, "val": 30}, 30),
        ({"val": 0.2}, math.ceil(0.2 * 108)),
    ):
        train, val = train_test_split(others, test_size=count, stratify=labels[others], random_state=42)
        expected = {"train": sorted(train.tolist()), "val": sorted(val.tolist()), "test": before["test"]}
        assert asked(pets, *ALL, **options) == expected
        splits = pets.splits(**options)
        assert [splits["splits"][name]["stored"] for name in ALL] == [False, False, True]
        assert list(splits["replaces"]) == ["val"]
        assert (splits.note or "").startswith("test is as stored, val is drawn from the 108 rows stored for train and")
    assert asked(pets, "train", "test", test=0.1) == {"train": others.tolist(), "test": before["test"]}
    assert "12 of the 12 rows of the stored val split are in train" in (pets.splits(test=0.1).note or "")
    made = StratifiedKFold(4, shuffle=True, random_state=42).split(others, labels[others])
    for fold, (_, held) in enumerate(made):
        for test in ({}, {"test": 0.1}):
            rows = asked(pets, "val", "test", folds=4, fold=fold, **test)
            assert rows == {"val": others[held].tolist(), "test": before["test"]}
    tested = feed["tested"]
    assert tested.splits(test=0.2)["replaces"] is None
    assert tested.split_rows("test", test=0.2, val=0.1).tolist() == stored(folder / "tested.h5")["test"]
    assert len(tested.split_rows("val", test=0.2, val=0.1)) == 12
    note = tested.splits(val=0.125).note
    assert note == "test is as stored, val is drawn from the 96 rows stored for train"
    assert tested.splits(val=0.125)["replaces"] is None


def test_a_record_that_does_not_hold(served: tuple[h5feed.Feed, Path]) -> None:
    """One of other rows than are stored is not heeded, and the dataset says so."""
    feed, _ = served
    assert feed["edited"].info["splits_drawn"] is None
    assert "'test': 13" in feed["edited"].info["notes"][0]
    assert feed["old"].info["notes"] == []
    assert feed["pets"].info["splits_drawn"] == {
        "version": 1,
        "rows": {"train": 96, "val": 12, "test": 12},
        "test": 0.1,
        "val": 0.1,
        "split_seed": 42,
        "split_shuffle": True,
        "stratify": True,
        "stratified_by": "labels",
    }


def test_it_is_said_once(served: tuple[h5feed.Feed, Path], caplog: pytest.LogCaptureFixture) -> None:
    """One line for a dataset and options: not for each split, fold, epoch, thread or copy, nor by other ranks."""
    feed, _ = served

    options: dict[str, Any] = {**AS_BUILT, "split_seed": 1234}
    feed["pets"].plan("train", shard=1, shards=2, **options)
    assert told(caplog) == []
    threads = [
        threading.Thread(target=lambda: list(feed["pets"].batches("train", shuffle=True, **options))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for split in ALL:
        with feed["pets"].loader(split, **options) as loader:
            for _ in range(2):
                list(loader)
    pickle.loads(pickle.dumps(feed["pets"])).plan("val", **options)
    (line,) = told(caplog)
    assert line.startswith("pets with split_seed=1234, test=0.1, val=0.1: all rows are divided again")
    for fold in range(3):
        feed["pets"].split_rows("train", folds=3, fold=fold)
        feed["pets"].stats("train", field="labels", folds=3, fold=fold)
    assert len(told(caplog)) == 2
    # In another process, as workers of a DataLoader are started.
    code = "import pickle, sys; pickle.load(sys.stdin.buffer).plan('train', val=0.1, test=0.1, split_seed=1234)"
    made = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(feed["pets"]), capture_output=True)
    assert (made.returncode, made.stderr) == (0, b"")


def test_the_line_of_a_sequence(served: tuple[h5feed.Feed, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """It says whether the rows are as stored; class weights are of the rows of the split, whatever is stratified by."""
    pets = served[0]["pets"]
    pets.sequence("train", **AS_BUILT)
    train = pets.sequence("train", split_seed=5, **AS_BUILT)
    assert capsys.readouterr().out.splitlines() == [
        "Found 96 images belonging to 3 classes (as numbers), as stored.",
        "Found 96 images belonging to 3 classes (as numbers), not as stored.",
    ]
    counts = np.bincount(labels_of(served[1] / "pets.h5")[train.row_ids])
    assert train.class_weight == pytest.approx({index: 96 / (3 * count) for index, count in enumerate(counts)})
    by_height = pets.sequence("train", y="heights", verbose=False, stratify="none", **{**AS_BUILT, "split_seed": 6})
    values, counts = np.unique(by_height.classes, return_counts=True)
    expected = {int(value): 96 / (len(values) * count) for value, count in zip(values, counts, strict=True)}
    assert by_height.class_weight == pytest.approx(expected)
    balanced = pets.sequence("train", balance=True, stratify="labels", shuffle=True, mean="server", verbose=False)
    assert balanced.samples == 96


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split_seed": 7}, "split_seed needs test, val or folds"),
        ({"split_shuffle": False}, "split_shuffle needs test, val or folds"),
        ({"stratify": "none"}, "stratify needs test, val or folds"),
        ({"stratify": "labels"}, "stratify needs test, val or folds"),
    ],
)
def test_options_without_effect_are_refused(
    served: tuple[h5feed.Feed, Path], options: dict[str, Any], says: str
) -> None:
    """Stored splits are not drawn, so that nothing says how; and all rows are not divided."""
    pets = served[0]["pets"]
    for ask in (pets.splits, lambda **o: pets.plan("train", **o), lambda **o: pets.split_rows("train", **o)):
        with pytest.raises(BadParameter, match=says):
            ask(**options)
    for look in (lambda: pets.plan(val=0.1), lambda: pets.batch(0, test=0.1)):
        with pytest.raises(BadParameter, match="split=all is every row"):
            look()
    with pytest.raises(BadParameter, match="needs val or test"):
        BuildOptions(**({"stratify": False} if "stratify" in options else options))


def test_the_commands_say_it(served: tuple[h5feed.Feed, Path]) -> None:
    """`h5feed info` tells how stored splits were drawn, and `get` and `stats` which ones they do not take."""
    feed, folder = served

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "h5feed.cli", words[0], feed_url(feed), *words[1:]]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    shown = run("info", "pets").stdout
    assert "train 96, val 12, test 12 (drawn with test=0.1, val=0.1, split_seed=42, stratify=labels)" in shown
    assert "as stored" in run("info", "pets", "--val", "0.1", "--test", "0.1").stdout
    assert "in place of the stored splits" in run("info", "pets", "--test", "0.3").stdout
    refused = run("info", "pets", "--split-seed", "7")
    assert refused.returncode == 1 and "split_seed needs test, val or folds" in refused.stderr
    options = ["pets", "--split", "train", "--test", "0.3"]
    for words in (["stats", *options, "--field", "labels"], ["get", *options, "-o", str(folder.parent / "batch.npz")]):
        made = run(*words)
        assert made.returncode == 0 and made.stderr.count("in place of the stored splits") == 1
    inspected = COMMANDS.run(["inspect", str(folder / "pets.h5")])
    assert "drawn with test=0.1, val=0.1" in inspected.stdout


def test_a_build_of_a_file_with_splits(served: tuple[h5feed.Feed, Path], tmp_path: Path) -> None:
    """It keeps stored splits that are asked for as they are stored, and says which rows it divides anew."""
    folder = served[1]
    before = stored(folder / "pets.h5")
    kept = build(folder / "pets.h5", tmp_path / "kept.h5", BuildOptions(**AS_BUILT))
    assert stored(tmp_path / "kept.h5") == before and kept.notes == ()
    with h5py.File(folder / "pets.h5") as old, h5py.File(tmp_path / "kept.h5") as new:
        np.testing.assert_array_equal(old["test/digests"][:], new["test/digests"][:])
        assert old.attrs["h5feed_splits"] == new.attrs["h5feed_splits"]
    anew = build(folder / "pets.h5", tmp_path / "anew.h5", BuildOptions(test=0.1, val=0.1, split_seed=7))
    rows = drawn(folder / "pets.h5", 12, 12, seed=7)
    lost = len({*before["test"]} & {*rows["train"]})
    assert f"{lost} of the 12 rows of the stored test split are in train" in anew.notes[0]
    carved = build(folder / "tested.h5", tmp_path / "carved.h5", BuildOptions(val=0.125))
    assert carved.notes == ("test is as stored, val is drawn from the 96 rows stored for train",)
    with h5py.File(folder / "tested.h5") as old, h5py.File(tmp_path / "carved.h5") as new:
        np.testing.assert_array_equal(old["test/digests"][:], new["test/digests"][:])
        record = json.loads(new.attrs["h5feed_splits"])
    assert (record["test"], record["val"], record["rows"]) == (None, 0.125, {"train": 84, "val": 12, "test": 24})
    fewer = build(folder / "pets.h5", tmp_path / "fewer.h5", BuildOptions(limit=60))
    assert sum(fewer.rows.values()) == 60
    with h5py.File(tmp_path / "fewer.h5") as file:
        assert "h5feed_splits" not in file.attrs


def test_declared_splits_in_place_of_stored_ones(
    served: tuple[h5feed.Feed, Path], serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """h5feed.toml comes before what is in the files, which the dataset says; its record is not of them then. After an
    edit the rows are others."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "pets.h5").write_bytes((served[1] / "pets.h5").read_bytes())
    declaration = '[datasets.pets]\nfiles = ["pets.h5"]\n[datasets.pets.splits]\ntrain = [{}, 100]\ntest = [100, 120]\n'
    (folder / "h5feed.toml").write_text(declaration.format(0))
    with h5feed.connect(serve(folder).url, deadline=60) as feed:
        pets = feed["pets"]
        assert pets.info["splits_drawn"] is None
        assert pets.info["notes"] == [
            "the splits that h5feed.toml declares replace those in the files (train 96, val 12, test 12)"
        ]
        assert asked(pets, "train", "test") == {"train": [*range(100)], "test": [*range(100, 120)]}
        assert "not recorded" in (pets.splits(**AS_BUILT).note or "")
        (folder / "h5feed.toml").write_text(declaration.format(50))
        wait_until(lambda: feed["pets"].revision != pets.revision)
        assert asked(feed["pets"], "train") == {"train": [*range(50, 100)]}


def test_readme_from_build_to_train(
    pets: Path, serve: Callable[..., ServerProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commands and the code of README, as they stand: what is trained on is what was stored for it."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pets").symlink_to(pets)
    command = next(line for line in readme.splitlines() if line.startswith("h5feed-server build pets/ -o"))
    words = command.partition("#")[0].split()[1:]
    COMMANDS.run(words).check_returncode()
    url = serve(tmp_path / "data").url
    code = readme.partition("```python\n")[2].partition("```")[0]
    lines = [line for line in code.splitlines() if "pets" in line and "sequence(" in line]
    assert len(lines) == 2
    with h5feed.connect(url, deadline=60) as feed:
        names: dict[str, Any] = {"pets": feed["pets"]}
        exec("\n".join(lines), names)
        before = stored(tmp_path / "data" / "pets.h5")
        assert names["train"].row_ids.tolist() == before["train"]
        assert names["val"].row_ids.tolist() == before["val"]
