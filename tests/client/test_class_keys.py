"""Rows by the names of classes, and joins by them: their numbers differ from dataset to dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import AmbiguousKey, BadParameter, KeysNotFound

from tests.support.server_process import ServerProcess

OWN = ["cat", "dog", "bird", "eel"]
THEIRS = ["eel", "bird", "cow", "cat", "dog"]
"""The same classes in another order."""
DIGITS = ["0", "10", "2"]
"""Names that are numbers, but not their own, as AnnData sorts those of clusters."""
KINDS = np.array([0, 1, 2, 3, 1, 0])


def frame(file: h5py.File, name: str, codes: Any, categories: list[str]) -> None:
    """A categorical column, as AnnData stores it."""
    group = file.create_group(f"obs/{name}")
    group.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
    group["codes"] = np.asarray(codes, np.int8)
    group["categories"] = np.array(categories, h5py.string_dtype())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    folder = tmp_path_factory.mktemp("data")
    with h5py.File(folder / "pets.h5", "w") as file:
        file["x"] = np.arange(len(KINDS), dtype=np.float32)
        file["label"] = KINDS
        file["label"].attrs["class_names"] = OWN
        file["text"] = [OWN[kind] for kind in KINDS]
    with h5py.File(folder / "kinds.h5", "w") as file:
        file["legs"] = np.array([0, 2, 4, 4, 4])
        file["weight"] = np.array([1.0, 0.1, 600.0, 4.0, 20.0])
        file["label"] = np.arange(len(THEIRS))
        file["label"].attrs["class_names"] = THEIRS
        file["name"] = THEIRS
        file["number"] = np.arange(len(THEIRS))
    with h5py.File(folder / "twice.h5", "w") as file:
        file["x"] = np.zeros((4, 2))
        file["label"] = np.array([0, 1, 1, 2])
        file["label"].attrs["class_names"] = ["cow", "cat", "dog"]
    with h5py.File(folder / "few.h5", "w") as file:
        file["label"] = np.arange(3)
        file["label"].attrs["class_names"] = ["cow", "cat", "dog"]
        file["x"] = np.arange(3.0)
    with h5py.File(folder / "cells.h5ad", "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        file["X"] = np.arange(8, dtype=np.float32).reshape(4, 2)
        file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        obs = file.create_group("obs")
        obs.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index"})
        obs.attrs["column-order"] = ["donor", "leiden", "batch"]
        obs["_index"] = np.array([f"cell{number}" for number in range(4)], h5py.string_dtype())
        frame(file, "donor", [1, -1, 0, 1], ["ann", "bob"])
        frame(file, "leiden", [1, 0, 2, 2], DIGITS)
        frame(file, "batch", [0, 1, 2, -1], ["b0", "b0", "b1"])
    gaps = {"cat": 1, "dog": 2}
    for name, numbers in {"gaps": gaps, "same_gaps": gaps, "other_gaps": {"dog": 1, "cat": 2}}.items():
        with h5py.File(folder / f"{name}.h5", "w") as file:
            file["x"] = np.arange(2.0)
            file.create_dataset("label", data=[2, 1], dtype=h5py.enum_dtype(numbers, "i1"))
    with h5py.File(folder / "from_one.h5", "w") as file:
        file["x"], file["label"] = np.zeros((5, 2)), np.arange(5) + 1
        file["label"].attrs["class_names"] = THEIRS
    with h5py.File(folder / "two_kinds.h5", "w") as file:
        file["x"] = np.zeros((5, 2))
        file["label"], file["species"], file["listed"] = np.array([0, 1, 0, 1, 0]), np.arange(5), np.arange(5)
        file["species"].attrs["class_names"] = file["listed"].attrs["names"] = THEIRS
    with h5py.File(folder / "donors.h5", "w") as file:
        file["age"] = np.array([31.0, 52.0])
        file["name"] = ["bob", "ann"]
    return serve_module(folder)


def get(server: ServerProcess, dataset: str, **query: Any) -> httpx.Response:
    return httpx.get(f"{server.url}/v1/datasets/{dataset}/rows", params={"format": "npy", **query}, timeout=60)


@pytest.mark.parametrize("name", OWN)
def test_a_name_finds_what_where_finds(feed: h5feed.Feed, name: str) -> None:
    pets = feed["pets"]
    rows = pets.take(keys=[name], key="label", duplicates="all").rows
    assert rows.tolist() == pets.split_rows("all", where=f"label = {name}").tolist()
    assert rows.tolist() == np.flatnonzero(OWN.index(name) == KINDS).tolist()
    assert rows.tolist() == pets.take(keys=[OWN.index(name)], key="label", duplicates="all").rows.tolist()


def test_names_in_urls_and_columns_of_frames(feed: h5feed.Feed, server: ServerProcess) -> None:
    field = next(name for name in feed["cells"].fields if name.endswith("donor"))
    assert feed["cells"].take(keys=["ann"], key=field).rows.tolist() == [2]
    answer = get(server, "pets", key="label", value=["bird", "3"], fields="x")
    assert answer.status_code == 200
    for query, code, said in (
        ({"key": "label", "value": "brid"}, "keys_not_found", "did you mean 'bird'? The classes are cat, dog, bird"),
        ({"key": "label", "value": "cat"}, "ambiguous_key", "2 rows have 'label' 'cat': 0, 5"),
        ({"key": "label", "value": "7"}, "keys_not_found", "1 of 1 keys are in no row"),
    ):
        problem = get(server, "pets", **query, fields="x").json()
        assert problem["code"] == code and said in problem["detail"], problem


def test_names_that_are_numbers(feed: h5feed.Feed, server: ServerProcess) -> None:
    """A text is a name, and an integer a number, as in ``where``; a word of a URL that may be both is refused."""
    cells = feed["cells"]
    field = next(name for name in cells.fields if name.endswith("leiden"))
    for key, condition in (("10", '"10"'), ("2", '"2"'), (2, "2"), (1, "1")):
        rows = cells.take(keys=[key], key=field, duplicates="all").rows
        assert rows.tolist() == cells.split_rows("all", where=f"{field} = {condition}").tolist()
    with pytest.raises(KeysNotFound, match=r"keys are in no row of .* 0, 10, 2"):
        cells.take(keys=["1"], key=field)
    with pytest.raises(KeysNotFound, match=r"in no row of .*: 9: its classes are numbered 0 … 2"):
        cells.take(keys=[9], key=field)
    assert get(server, "cells", key=field, value="1", fields="X").status_code == 200
    assert get(server, "cells", key=field, value="2", duplicates="all", fields="X").status_code == 200
    problem = get(server, "cells", key=field, value="10", fields="X").json()
    assert problem["code"] == "bad_parameter" and "a class named '10', which is number 1" in problem["detail"]


@pytest.mark.parametrize("join", ["kinds:label", "kinds:label=name", "kinds:text=label", "kinds:text=name"])
def test_joins_compare_names(feed: h5feed.Feed, join: str) -> None:
    """Of two fields with class names, or of one and text."""
    batch = feed["pets"].batch(0, join=join, fields=["x", "kinds/weight"])
    weights = dict(zip(THEIRS, [1.0, 0.1, 600.0, 4.0, 20.0], strict=True))
    assert batch["kinds/weight"].tolist() == [weights[OWN[kind]] for kind in KINDS]


def test_numbers_without_names_are_those_of_classes(feed: h5feed.Feed) -> None:
    batch = feed["pets"].batch(0, join="kinds:label=number", fields=["kinds/legs"])
    assert batch["kinds/legs"].tolist() == np.array([0, 2, 4, 4, 4])[KINDS].tolist()


def test_what_has_no_partner(feed: h5feed.Feed) -> None:
    """A class that is not there, and a missing value, whose code is -1."""
    with pytest.raises(KeysNotFound, match=r"2 of 5 rows have a 'label'.*row 0, 1"):
        feed["kinds"].batch(0, join="few:label", fields=["legs"])
    with pytest.raises(AmbiguousKey, match="several rows of 'twice' have 'label' 'cat', such as 1, 2, which row 0 of"):
        feed["pets"].batch(0, join="twice:label", fields=["x"])
    cells = feed["cells"]
    field = next(name for name in cells.fields if name.endswith("donor"))
    with pytest.raises(KeysNotFound, match="row 1"):
        cells.batch(0, join=f"donors:{field}=name", fields=["donors/age"])
    batch = cells.batch(0, join=f"donors:{field}=name", fields=["donors/age"], how="inner")
    assert batch.rows.tolist() == [0, 2, 3] and batch["donors/age"].tolist() == [31.0, 52.0, 31.0]
    with pytest.raises(BadParameter, match="both must be text, or both integers"):
        feed["kinds"].batch(0, join="donors:number=name", fields=["donors/age"])


@pytest.mark.parametrize(
    ("dataset", "join", "unnamed"),
    [
        # An enum that skips numbers.
        ("gaps", "other_gaps:label", "'label' of 'gaps' and 'label' of 'other_gaps'"),
        ("pets", "gaps:label", "'label' of 'gaps'"),
        # Names of a field that is no label.
        ("two_kinds", "pets:listed=label", "'listed' of 'two_kinds'"),
        # Names that do not fit the numbers, which begin at 1.
        ("from_one", "kinds:label", "'label' of 'from_one'"),
        # Categories of which two have the same name.
        ("pets", "cells:label=obs.batch", "'obs.batch' of 'cells'"),
    ],
)
def test_classes_without_names_are_not_compared_by_number(
    feed: h5feed.Feed, dataset: str, join: str, unnamed: str
) -> None:
    """Unless the same numbers stand for the same classes, or nothing is said of those of the other dataset."""
    with pytest.raises(BadParameter, match=f"stand for different classes.*without the class names of {unnamed}: decl"):
        feed[dataset].batch(0, join=join, fields=["x"], how="inner")
    # Whose names are certain, label or not.
    batch = feed["two_kinds"].batch(0, join="few:species=label", fields=["species", "few/x"], how="inner")
    assert batch["species"].tolist() == [2, 3, 4] and batch["few/x"].tolist() == [0, 1, 2]
    batch = feed["gaps"].batch(0, join="kinds:label=number", fields=["kinds/legs"])
    assert batch["kinds/legs"].tolist() == [4, 2]
    batch = feed["gaps"].batch(0, join="same_gaps:label", fields=["same_gaps/x"])
    assert batch["same_gaps/x"].tolist() == [0, 1]


def test_names_that_occur_twice_are_none(feed: h5feed.Feed) -> None:
    """Of categories, too: keys and `where` would find one of them each."""
    batch = next(field for field in feed["cells"].info["fields"] if field["name"] == "obs.batch")
    assert batch["class_names"] is None and "'b0' occurs twice" in batch["note"]
    assert feed["cells"].take(keys=[1], key="obs.batch").rows.tolist() == [1]
