"""The tree of a file lists everything that h5py finds in it, page by page, and the fields of each array."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import httpx
import numpy as np
import pytest
from h5feed_server.api import response_models

from tests.support.object_store import SOURCES, served_from
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until


def write_everything(path: Path) -> None:
    """A file with all kinds of objects and links."""
    with h5py.File(path, "w") as file:
        file.attrs["title"] = "all there is"
        images = file.create_dataset(
            "images", data=np.zeros((8, 4, 4), "u1"), chunks=(2, 4, 4), maxshape=(None, 4, 4), compression="gzip"
        )
        images.attrs["units"], images.attrs["long"] = "counts", "x" * 10_000
        file["labels"] = np.arange(8) % 2
        file["notes/once"], file["notes/scalar"] = "a word", 3.5
        file["notes/deep/deeper/deepest"] = np.arange(2)
        file["again"], file["notes/up"] = file["notes"], file["/"]
        file["soft"], file["lost"] = h5py.SoftLink("/labels"), h5py.SoftLink("/nothing")
        file["out"] = h5py.ExternalLink("/somewhere/else.h5", "/x")
        file["kind"] = np.dtype([("a", "<i4"), ("b", "S3")])
        file.create_dataset("colours", data=np.zeros(3, "i1"), dtype=h5py.enum_dtype({"RED": 0}, basetype="i1"))
        records = np.zeros(8, np.dtype([("a", "<f4"), ("b.c", "<i2")]))
        file["table"] = records
        many = file.create_group("many")
        for number in range(250):
            many.create_group(f"g{number:03}")
        file["<img src=x onerror=alert(1)>"] = np.arange(3)
        file[b"latin\xe9"] = np.arange(3)


@pytest.fixture(scope="module", params=SOURCES)
def http(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("tree")
    write_everything(folder / "all.h5")
    with h5py.File(folder / "nothing.h5", "w") as file:
        file["scalar"] = 1
    with (
        served_from(request.param, folder, tmp_path_factory.mktemp("served")) as process,
        httpx.Client(base_url=f"{process.url}/v1/datasets", timeout=60) as client,
    ):
        wait_until(lambda: client.get("/all/tree").status_code == 200)
        yield client


def _tree(http: httpx.Client, name: str = "all", **query: Any) -> dict[str, Any]:
    answer = http.get(f"/{name}/tree", params=query)
    assert answer.status_code == 200, answer.text
    response_models.Tree.model_validate_json(answer.content, strict=True)
    node: dict[str, Any] = answer.json()["node"]
    return node


def _children(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {child["name"]: child for child in node["children"]}


def test_all_is_there(http: httpx.Client, tmp_path: Path) -> None:
    """Groups, arrays, types and links have the properties that h5py reports, and their fields."""
    root = _tree(http)
    found = _children(root)
    assert root["members"] == len(root["children"]) == 13
    assert [(one["name"], one["value"]) for one in root["attributes"]] == [("title", "all there is")]
    images = found["images"]
    assert images["kind"] == "array" and images["type"]["dtype"] == "uint8"
    array = images["array"]
    assert array["shape"] == [8, 4, 4] and array["max_shape"] == [None, 4, 4] and array["chunks"] == [2, 4, 4]
    assert array["layout"] == "chunked" and array["logical_bytes"] == 128 and array["stored_bytes"] > 0
    assert [(one["id"], one["name"], one["options"]) for one in array["filters"]] == [(1, "deflate", [4])]
    assert images["fields"] == [{"name": "images", "role": "input", "reason": None}]
    attributes = {one["name"]: one for one in images["attributes"]}
    assert attributes["units"]["value"] == "counts" and attributes["units"]["shape"] == []
    assert attributes["long"]["value"] is None and "by its path" in attributes["long"]["note"]
    assert {one["name"] for one in found["table"]["fields"]} == {"table.a", "table.b.c"}
    assert found["table"]["type"]["members"] == [{"name": "a", "dtype": "float32"}, {"name": "b.c", "dtype": "int16"}]
    assert found["colours"]["type"]["enum"] == {"RED": 0}
    assert found["kind"]["kind"] == "type" and found["kind"]["array"] is None
    assert found["soft"]["link"] == {"kind": "soft", "path": "/labels", "file": None}
    assert found["soft"]["array"]["shape"] == [8]
    assert found["lost"]["kind"] == "unresolved" and "there is no 'nothing'" in found["lost"]["note"]
    # An absolute path may be one of the server: only the name is shown.
    assert found["out"]["link"] == {"kind": "external", "path": "/x", "file": "else.h5"}
    assert found["latin\ufffd"]["path"] is None and found["latin\ufffd"]["note"]
    whole = _tree(http, path="/images", depth=0)
    assert {one["name"]: one["value"] for one in whole["attributes"]}["long"] == "x" * 10_000
    assert whole["children"] is None


def test_levels(http: httpx.Client) -> None:
    """depth= limits the levels. A group with several names is listed once."""
    assert all(child["children"] is None for child in _tree(http)["children"])
    root = _tree(http, depth=4)
    found = _children(root)
    first, second = sorted(("again", "notes"))
    assert found[first]["children"] and found[second]["children"] is None
    assert found[second]["same_as"] == f"/{first}" and found[second]["hard_links"] == 2
    inside = _children(found[first])
    assert inside["up"]["same_as"] == "/" and inside["up"]["children"] is None
    deepest = _children(_children(inside["deep"])["deeper"])["deepest"]
    assert deepest["path"] == f"/{first}/deep/deeper/deepest" and deepest["array"]["shape"] == [2]
    # A link back to a group above the path is not entered.
    assert _children(_tree(http, path="/notes"))["up"]["same_as"] == "/"
    assert inside["once"]["type"]["dtype"] == "string" and inside["scalar"]["array"]["shape"] == []


def test_pages(http: httpx.Client) -> None:
    """All pages together have all members. An offset beyond the last one is an error."""
    names: list[str] = []
    while not names or len(names) % 100 == 0:
        page = _tree(http, path="/many", offset=len(names))
        assert page["members"] == 250
        names += [child["name"] for child in page["children"]]
    assert names == [f"g{number:03}" for number in range(250)]
    assert _tree(http, path="/many", offset=250)["children"] == []
    beyond = http.get("/all/tree", params={"path": "/many", "offset": 251})
    assert beyond.status_code == 400 and "250 members" in beyond.json()["detail"]
    # Groups below the requested one show their first page.
    assert len(_children(_tree(http, depth=2, limit=20))["many"]["children"]) == 20


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [
        ({"path": "/nothing"}, 404, "/nothing is not a valid path"),
        ({"path": "/labels/x"}, 404, "not a group"),
        ({"file": "al.h5"}, 400, "did you mean 'all.h5'?"),
        ({"depth": 17}, 400, "depth=17"),
        ({"pth": "/"}, 400, "did you mean 'path'?"),
        ({"revision": "x"}, 409, "has revision"),
    ],
)
def test_errors(http: httpx.Client, query: dict[str, str | int], status: int, words: str) -> None:
    answer = http.get("/all/tree", params=query)
    assert answer.status_code == status and words in answer.json()["detail"], answer.text
    assert http.get("/al/tree").status_code == 404


def test_an_unreadable_dataset(http: httpx.Client) -> None:
    """A file that cannot be served has a tree, too."""
    wait_until(lambda: http.get("/nothing/tree").status_code == 200)
    assert http.get("/nothing").status_code == 422
    answer = http.get("/nothing/tree").json()
    assert answer["revision"] is None and answer["file"] == "nothing.h5"
    assert answer["node"]["children"][0]["array"]["shape"] == []


def test_a_changed_file_is_seen(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """After a file was replaced, the tree is that of the new one."""
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / "a.h5"
    with h5py.File(path, "w") as file:
        file["before"] = np.arange(3)
    with httpx.Client(base_url=f"{serve(folder).url}/v1/datasets", timeout=60) as http:
        wait_until(lambda: http.get("/a/tree").status_code == 200)
        with h5py.File(tmp_path / "new.h5", "w") as file:
            file["after"] = np.arange(3)
        (tmp_path / "new.h5").replace(path)

        def names() -> list[str]:
            answer = http.get("/a/tree")
            return [one["name"] for one in answer.json()["node"]["children"]] if answer.status_code == 200 else []

        assert names() in ([], ["after"])
        wait_until(lambda: names() == ["after"])
