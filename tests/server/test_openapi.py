"""The OpenAPI description says what the server answers, and how its errors read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed_server.api import response_models
from h5feed_server.api.openapi import GROUPS
from pydantic import BaseModel

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
DATASET = "/v1/datasets/mixed"


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def schema(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/openapi.json").json()
    return found


def _operations(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for path in schema["paths"].values() for operation in path.values()]


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/datasets", response_models.Catalogue),
        (DATASET, response_models.DatasetDescription),
        (f"{DATASET}/splits?test=0.2", response_models.Splits),
        (f"{DATASET}/splits?test=0.25&group=labels", response_models.Splits),
        (f"{DATASET}/plan?shuffle=true", response_models.Plan),
        (f"{DATASET}/stats", response_models.Statistics),
        (f"{DATASET}/stats?split=train&test=0.2", response_models.Statistics),
        (f"{DATASET}/batches/0?format=json", response_models.Preview),
        ("/v1/datasets/nothing", response_models.Problem),
    ],
)
def test_answers_are_as_described(http: httpx.Client, path: str, model: type[BaseModel]) -> None:
    """Each key that is sent is described, and each that is described is sent."""
    answer = http.get(path, headers={"prefer": "wait=30"})
    assert answer.status_code in (200, 404), answer.text
    model.model_validate_json(answer.content, strict=True)


def test_statistics_begin_with_what_people_look_for(http: httpx.Client) -> None:
    fields = http.get(f"{DATASET}/stats", headers={"prefer": "wait=30"}).json()["fields"]
    for report in fields.values():
        names = list(report)
        assert max(map(names.index, ("rows", "channel_means", "channel_stds", "mean", "std", "min", "max"))) < 14
        assert names[-2:] == ["histogram", "channels"]


def test_operations_have_names_for_people(schema: dict[str, Any]) -> None:
    """The names of their functions, each once: generated clients call them so."""
    names = [operation["operationId"] for operation in _operations(schema)]
    assert len(set(names)) == len(names)
    assert {"get_batch", "list_datasets", "get_stats", "delete_job"} <= set(names)


def test_the_problem_is_described_once(schema: dict[str, Any]) -> None:
    for operation in _operations(schema):
        assert operation["responses"]["default"]["$ref"] == "#/components/responses/Problem"
    assert list(schema["components"]["responses"]) == ["Problem"]


def test_answers_have_types(schema: dict[str, Any]) -> None:
    """JSON answers refer to a schema that is there."""
    for operation in _operations(schema):
        content = operation["responses"].get("200", {}).get("content", {})
        if "application/json" in content:
            name = content["application/json"]["schema"]["$ref"].rpartition("/")[2]
            assert schema["components"]["schemas"][name]["properties"]


def test_parameters_are_grouped(schema: dict[str, Any]) -> None:
    """Each stands in a group, together with the others of it, below one heading."""
    group_of = {name: heading for heading, names in GROUPS.items() for name in names}
    for operation in _operations(schema):
        parameters = [each for each in operation.get("parameters", []) if each["in"] != "path"]
        headings = [each["x-heading"] for each in parameters if "x-heading" in each]
        assert len(set(headings)) == len(headings)
        heading = None
        for each in parameters:
            heading = each.get("x-heading", heading)
            assert group_of[each["name"]] == heading, each["name"]


def test_parameters_are_never_null(schema: dict[str, Any]) -> None:
    """One that is left out is left out: no query has a null."""
    for operation in _operations(schema):
        for each in operation.get("parameters", []):
            assert "null" not in str(each["schema"]), each


def test_shares_are_bounded(schema: dict[str, Any]) -> None:
    """``test`` and ``val`` are a fraction or a count."""
    parameters = schema["paths"]["/v1/datasets/{name}/plan"]["get"]["parameters"]
    for name in ("test", "val"):
        (share,) = [each["schema"]["anyOf"] for each in parameters if each["name"] == name]
        assert {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1} in share
        assert {"type": "integer", "minimum": 1} in share


@pytest.mark.parametrize("path", ["batches/3?batch_size=5", "rows?start=15&stop=20", "splits/all/rows"])
def test_browsers_get_what_people_can_read(http: httpx.Client, path: str) -> None:
    """JSON of types, ranges and first values, for the address line of a browser and for the page's first try."""
    with h5feed.connect(str(http.base_url), deadline=60) as feed:
        truth = feed["mixed"].batch(3, batch_size=5)
    for accept in (BROWSER, "application/json"):
        answer = http.get(f"{DATASET}/{path}", headers={"accept": accept})
        assert answer.headers["content-type"] == "application/json"
        tensors = answer.json()["tensors"]
        if path.startswith("splits"):
            assert tensors["__rows__"]["first"] == list(range(32))
            continue
        assert tensors["__rows__"]["first"] == truth.rows.tolist()
        images = tensors["images"]
        assert images["shape"] == list(truth["images"].shape) and images["dtype"] == "uint8"
        assert (images["min"], images["max"]) == (truth["images"].min(), truth["images"].max())
        assert images["mean"] == pytest.approx(truth["images"].mean())
        assert images["first"] == truth["images"][0].reshape(-1)[:32].tolist()


@pytest.mark.parametrize("form", ["safetensors", "npz"])
def test_what_browsers_cannot_show_they_keep(http: httpx.Client, form: str) -> None:
    """Whichever way a body takes: asked for once, and again."""
    for _ in range(2):
        answer = http.get(f"{DATASET}/batches/0?batch_size=2&format={form}")
        assert answer.headers["content-disposition"] == f'attachment; filename="tensors.{form}"'


def test_text_numbers_and_lists_are_readable(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Strings are strings, and what JSON has no number for is text."""
    with h5py.File(tmp_path / "odd.h5", "w") as file:
        file["words"] = np.array(["één", "deux", "x" * 300], h5py.string_dtype())
        file["numbers"] = np.array([1.5, np.nan, np.inf])
        lists = file.create_dataset("lists", (3,), h5py.vlen_dtype(np.int16))
        lists[0], lists[1], lists[2] = [1, 2], [], [3]
        file["flags"] = np.array([True, False, True])
    with httpx.Client(base_url=serve(tmp_path).url, timeout=60) as http:
        wait_until(lambda: http.get("/v1/datasets/odd").status_code == 200)
        path = "/v1/datasets/odd/rows?format=json&fields=words,numbers,lists,flags"
        tensors = http.get(path).json()["tensors"]
    assert tensors["words"]["first"] == ["één", "deux", "x" * 200 + "…"]
    assert tensors["numbers"]["first"] == [1.5, "nan", "inf"]
    assert tensors["lists"]["first"] == [1, 2, 3] and tensors["lists.offsets"]["first"] == [0, 2, 2, 3]
    assert tensors["flags"]["first"] == [True, False, True]


def test_a_misspelt_parameter_is_told(http: httpx.Client) -> None:
    """Which one was meant, and all there are; in a body too."""
    answer = http.get(f"{DATASET}/batches/0", params={"batchsize": 3})
    detail = answer.json()["detail"]
    assert answer.status_code == 400 and answer.json()["code"] == "bad_parameter"
    assert "no parameter 'batchsize': did you mean 'batch_size'?" in detail
    for name in ("batch_size", "split_seed", "revision", "format"):
        assert name in detail
    answer = http.post(f"{DATASET}/rows", json={"rows": [1], "feilds": ["images"]})
    assert "no parameter 'feilds': did you mean 'fields'?" in answer.json()["detail"]
    assert "did you mean" not in http.get(f"{DATASET}/plan", params={"xyzzy": 1}).json()["detail"]


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("/v1/datasets/mixd", "mixed"),
        (f"{DATASET}/stats?field=image", "images"),
        (f"{DATASET}/plan?fields=lables", "labels"),
        (f"{DATASET}/plan?split=trian&test=0.1", "train"),
    ],
)
def test_a_misspelt_name_is_told(http: httpx.Client, path: str, meant: str) -> None:
    assert f"did you mean '{meant}'? " in http.get(path).json()["detail"]
    # Comparing takes time by the square of the length.
    long = http.get(f"{DATASET}/plan", params={"split": "x" * 2000, "test": 0.1})
    assert long.status_code == 404 and "did you mean" not in long.text


def test_a_misspelt_key_of_the_declaration_is_told(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = np.arange(3)
    (tmp_path / "h5feed.toml").write_text(
        '[dataset.a]\nfiles = ["a.h5"]\n[datasets.b]\nfiles = ["a.h5"]\nclassnames = ["x"]\n'
        '[datasets.c]\nfiles = ["a.h5"]\n[datasets.c.decode]\nx = { shape = [2, 2], interpolaton = "area" }\n'
    )
    with h5feed.connect(serve(tmp_path).url, deadline=60) as feed:
        reasons = " ".join(str(entry["reason"]) for entry in feed.datasets())
    for meant in ("datasets", "class_names", "interpolation"):
        assert f"did you mean {meant!r}?" in reasons
