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
from h5feed_server.api.binary import file_name
from h5feed_server.api.openapi import GROUPS, TAGS
from h5feed_server.api.problem_responses import MEANINGS
from h5feed_server.api.problems import STATUS
from openapi_spec_validator import OpenAPIV31SpecValidator
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
    # Examples are of what has been inspected.
    wait_until(lambda: all(line["status"] != "preparing" for line in http.get("/v1/datasets").json()["datasets"]))
    found: dict[str, Any] = http.get("/openapi.json").json()
    return found


def _operations(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [operation for path in schema["paths"].values() for operation in path.values()]


def test_it_is_valid(schema: dict[str, Any]) -> None:
    """OpenAPI 3.1, by the standard's own schema."""
    assert schema["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(schema).validate()


def test_groups_are_in_order(schema: dict[str, Any]) -> None:
    """Each endpoint is in one, and each has a word to it: first what is there, last what watches it."""
    assert [(tag["name"], tag["description"]) for tag in schema["tags"]] == list(TAGS.items())
    found = [tag for operation in _operations(schema) for tag in operation["tags"]]
    assert len(found) == len(_operations(schema)) and list(dict.fromkeys(found)) == list(TAGS)
    for operation in _operations(schema):
        assert operation["summary"] and operation["description"]


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


def test_errors_are_described(schema: dict[str, Any]) -> None:
    """Each endpoint names the codes of each status, with an example of each that says the same."""
    examples = {code: each["value"] for code, each in schema["components"]["examples"].items()}
    named = set()
    for operation in _operations(schema):
        responses = {status: each for status, each in operation["responses"].items() if status >= "400"}
        assert {"400", "500"} <= set(responses) and "default" not in operation["responses"]
        for status, response in responses.items():
            (content,) = response["content"].items()
            assert content[0] == "application/problem+json"
            assert content[1]["schema"] == {"$ref": "#/components/schemas/Problem"}
            for code, example in content[1]["examples"].items():
                # The same code has another status where the request itself is too large.
                assert "value" in example if status == "431" else example == {"$ref": f"#/components/examples/{code}"}
                shown = example.get("value", examples[code])
                assert shown["status"] == int(status) and shown["code"] == code
                assert f"`{code}`" in response["description"]
                named.add(code)
    assert named == set(examples) == {cls.code for cls in MEANINGS}
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    for example in examples.values():
        response_models.Problem.model_validate(example, strict=True)
        assert STATUS[h5feed.errors.CLASS_BY_CODE[example["code"]]] == example["status"]


_NEEDS: dict[str, dict[str, Any]] = {
    "fold": {"folds": 5, "split": "val"},
    "epoch_rows": {"balance": True},
    "window": {"shuffle": True},
    "sequence_stride": {"sequence_length": 2},
    "sampling_rate": {"sequence_length": 2},
    "ends": {"sequence_length": 2},
    "episode": {"sequence_length": 2},
    "crop_fields": {"crop": "1"},
    "shard": {"shards": 2},
    "split_seed": {"test": 0.1, "split": "train"},
    "split_shuffle": {"test": 0.1, "split": "train"},
    "group": {"test": 0.5, "split": "train"},
    "stratify": {"test": 0.1, "split": "train"},
    "test": {"split": "train"},
    "val": {"split": "train"},
    "folds": {"split": "train"},
    "compress": {"body": "pieces"},
    "max_length": {"pad": "text"},
    "truncate": {"pad": "text", "max_length": "2"},
    "bucket_group": {"bucket": 64},
    "pack": {"fields": "text"},
    "overlong": {"fields": "text", "pack": 64},
}
"""What parameters need beside them to have an effect."""


def test_examples_run(http: httpx.Client, schema: dict[str, Any]) -> None:
    """What pages fill in is answered as it is, and so is each other parameter's example beside it."""
    for path, operations in schema["paths"].items():
        operation = operations.get("get")
        # Tickets of the second expire, and descriptors are passed on the Unix socket alone.
        skipped = ("/v1/jobs/{job}", "/v1/datasets/{name}/descriptor")
        if operation is None or path in skipped or path.startswith("/v1/local"):
            continue
        parameters = operation.get("parameters", [])
        filled: dict[str, Any] = {}
        for each in parameters:
            known = [value["value"] for value in each.get("examples", {}).values()] or [each.get("example")]
            filled |= {each["name"]: known[0]} if known[0] is not None else {}
        place = {each["name"]: filled.pop(each["name"]) for each in parameters if each["in"] == "path"}
        url = path.format(**place)
        assert http.get(url, params=filled, headers={"prefer": "wait=30"}).status_code == 200, path
        names = {each["name"] for each in parameters}
        for each in parameters:
            # Which keys there are, and whether they are unique, is known when they are read.
            of_keys = ("key", "value", "how")
            if "examples" not in each["schema"] or each["in"] == "header" or each["name"] in of_keys:
                others = ("prefer", "cache-control", "encoded", "crop", "pad", "bucket_by", "pack_by", *of_keys)
                assert each["name"] in filled | place or each["name"] in others, each
                continue
            needs = {name: value for name, value in _NEEDS.get(each["name"], {}).items() if name in names - set(place)}
            # Folds make val themselves, rows that are named are not drawn, and pieces and packed rows are of whole
            # batches.
            without = (
                {"test", "val"} if each["name"] == "rows" else {"val"} if "folds" in {each["name"], *needs} else set()
            )
            without |= {"from_row", "to_row"} if each["name"] in ("compress", "pack", "overlong") else set()
            drawn = {name: value for name, value in filled.items() if name not in without}
            query = drawn | needs | {each["name"]: each["schema"]["examples"][0]}
            answer = http.get(url, params=query, headers={"prefer": "wait=30"})
            assert answer.status_code == 200, (path, query, answer.text)


def test_a_post_runs(http: httpx.Client, schema: dict[str, Any]) -> None:
    body = schema["components"]["schemas"]["RowsRequest"]
    example = {name: each["examples"][0] for name, each in body["properties"].items()}
    assert http.post(f"{DATASET}/rows", json=example).status_code == 200


def test_examples_are_of_the_data(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Of the dataset that most can be tried with; where there is none, none are given."""
    (tmp_path / "data").mkdir()
    server = serve(tmp_path / "data")
    assert "examples" not in str(_parameters_of(server, "/v1/datasets/{name}/stats/mean-image", "name"))
    with h5py.File(tmp_path / "data" / "a.h5", "w") as file:
        file["v"] = np.arange(3.0)
    with h5py.File(tmp_path / "data" / "b.h5", "w") as file:
        file["train/some, of"], file["train/y"] = np.zeros((30, 8, 8, 3), np.uint8), np.arange(30) % 2
        file["test/some, of"], file["test/y"] = np.zeros((10, 8, 8, 3), np.uint8), np.arange(10) % 2
    with h5feed.connect(server.url, deadline=60) as feed:
        assert (feed["a"].rows, feed["b"].rows) == (3, 40)
    for path, name, value in [
        ("stats/mean-image", "field", "some, of"),
        ("plan", "fields", "some%2C%20of,y"),
        ("plan", "split", "train"),
        ("rows", "stop", 8),
        ("splits", "classes", "y"),
    ]:
        found = _parameters_of(server, f"/v1/datasets/{{name}}/{path}", name)
        assert found.get("example", found["schema"].get("examples")) in (value, [value]), name
        assert list(_parameters_of(server, f"/v1/datasets/{{name}}/{path}", "name")["examples"]) == ["b", "a"]


def _parameters_of(server: ServerProcess, path: str, name: str) -> dict[str, Any]:
    schema = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    found: dict[str, Any]
    (found,) = [each for each in schema["paths"][path]["get"]["parameters"] if each["name"] == name]
    return found


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


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("batches/3?format=safetensors", "tensors.safetensors"),
        ("batches/3?format=npz", "mixed-batches-3.npz"),
        ("rows?stop=3&format=npz", "mixed-rows.npz"),
        ("rows?stop=3&fields=labels&format=npy", "mixed-rows.npy"),
        ("splits/train/rows?test=0.5", "mixed-splits-train-rows.safetensors"),
        ("stats/mean-image?field=images&format=npy", "mixed-stats-mean-image.npy"),
        ("rows/5/image?format=svg", "mixed-rows-5-image.svg"),
        ("stats/plot?kind=histogram", "mixed-stats-plot.png"),
    ],
)
def test_files_have_names(http: httpx.Client, path: str, name: str) -> None:
    """What browsers cannot show they keep, and pictures under a name too; asked for once, and again."""
    kind = "inline" if name.endswith((".png", ".svg")) else "attachment"
    for _ in range(2):
        answer = http.get(f"{DATASET}/{path}", headers={"prefer": "wait=30"})
        assert answer.headers["content-disposition"] == f'{kind}; filename="{name}"'


def test_names_of_files_are_harmless(http: httpx.Client) -> None:
    """Whatever a path holds."""
    assert file_name('/v1/datasets/a b/../"c\r\n\u00e9/batches/0', "npz") == "a_b-..-_c_-batches-0.npz"


def test_any_bytes(http: httpx.Client) -> None:
    """Programs that know no type of ours ask for bytes; they get the safetensors that others get, under that name."""
    headers = {"accept": "application/octet-stream"}
    for path in (f"{DATASET}/batches/0?batch_size=2", f"{DATASET}/rows?stop=2"):
        answer, usual = http.get(path, headers=headers), http.get(path)
        assert answer.headers["content-type"] == "application/octet-stream"
        assert usual.headers["content-type"] == "application/x-safetensors"
        assert answer.content == usual.content
    assert http.get(f"{DATASET}/rows/0/image", headers=headers).headers["content-type"] == "image/png"


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
