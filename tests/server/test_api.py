"""The HTTP contract, with a plain HTTP client."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import safetensors.numpy

from tests.support.server_process import ServerProcess

BATCH = "/v1/datasets/mixed/batches/2"
IMAGES = {"batch_size": "8", "shuffle": "true", "fields": "images,labels"}


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=60)


def problem_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert set(problem) == {"type", "title", "status", "detail", "code", "request_id"}
    assert problem["status"] == response.status_code
    assert "/tmp" not in problem["detail"] and "Traceback" not in problem["detail"]
    return problem


def test_official_safetensors_reads_a_batch(http: httpx.Client) -> None:
    """The default body is safetensors, with the row ids in it."""
    response = http.get(BATCH, params=IMAGES)
    assert response.headers["content-type"] == "application/x-safetensors"
    tensors = safetensors.numpy.load(response.content)
    assert set(tensors) == {"images", "labels", "__rows__"}
    assert tensors["images"].shape == (8, 12, 10, 3)


def test_formats_agree(http: httpx.Client) -> None:
    """npz and npy hold the same arrays, by Accept and by format=."""
    raw = safetensors.numpy.load(http.get(BATCH, params=IMAGES).content)
    by_accept = http.get(BATCH, params=IMAGES, headers={"accept": "application/x-npz"})
    archive = np.load(io.BytesIO(by_accept.content))
    for name, tensor in raw.items():
        np.testing.assert_array_equal(archive[name], tensor)
    single = http.get(BATCH, params={**IMAGES, "fields": "images", "format": "npy"})
    np.testing.assert_array_equal(np.load(io.BytesIO(single.content)), raw["images"])


def test_not_acceptable(http: httpx.Client) -> None:
    """An Accept header that names nothing served here is 406."""
    response = http.get(BATCH, headers={"accept": "image/png"})
    assert response.status_code == 406
    assert problem_of(response)["code"] == "not_acceptable"


def test_stream_is_the_single_batches_back_to_back(http: httpx.Client) -> None:
    """Streamed bytes are those of the single answers, and their length is announced."""
    streamed = http.get("/v1/datasets/mixed/batches", params={**IMAGES, "start": "120", "stop": "125"})
    singles = [http.get(f"/v1/datasets/mixed/batches/{i}", params=IMAGES).content for i in range(120, 125)]
    assert int(streamed.headers["content-length"]) == len(streamed.content)
    assert streamed.content == b"".join(singles)


def test_conditional_and_immutable(http: httpx.Client) -> None:
    """An ETag that the caller holds is 304; a pinned revision may be kept for ever."""
    first = http.get(BATCH, params=IMAGES)
    assert first.headers["cache-control"] == "no-cache"
    again = http.get(BATCH, params=IMAGES, headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    revision = http.get("/v1/datasets/mixed").json()["revision"]
    pinned = http.get(BATCH, params={**IMAGES, "revision": revision})
    assert "immutable" in pinned.headers["cache-control"]
    stale = http.get(BATCH, params={**IMAGES, "revision": "0" * 16})
    assert stale.status_code == 409 and problem_of(stale)["code"] == "revision_changed"


def test_rows_get_equals_post(http: httpx.Client) -> None:
    """A range by GET is the list of its rows by POST."""
    got = http.get("/v1/datasets/mixed/rows", params={"start": "3", "stop": "30", "step": "4"})
    posted = http.post("/v1/datasets/mixed/rows", json={"rows": list(range(3, 30, 4))})
    assert got.content == posted.content


@pytest.mark.parametrize(
    ("path", "status", "code", "says"),
    [
        ("/v1/datasets/nix", 404, "dataset_not_found", "mixed"),
        ("/v1/datasets/broken", 422, "unreadable", "broken"),
        ("/v1/datasets/odd", 422, "unreadable", "reference"),
        ("/v1/datasets/pipe", 422, "unreadable", "regular file"),
        ("/v1/datasets/mixed/batches/0?batch_size=0", 400, "bad_parameter", "batch_size"),
        ("/v1/datasets/mixed/batches/0?batch_size=ten", 400, "bad_parameter", "ten"),
        ("/v1/datasets/mixed/batches/-1", 400, "bad_parameter", "index"),
        ("/v1/datasets/mixed/batches/32", 404, "batch_out_of_range", "31"),
        ("/v1/datasets/mixed/batches/0?split=train", 404, "split_not_found", "test="),
        ("/v1/datasets/mixed/batches/0?split=nix&test=0.1", 404, "split_not_found", "train"),
        ("/v1/datasets/mixed/batches/0?shard=2&shards=2", 400, "bad_parameter", "shard"),
        ("/v1/datasets/mixed/batches/0?shards=2&last=keep", 400, "bad_parameter", "last"),
        ("/v1/datasets/mixed/batches/0?last=cut", 400, "bad_parameter", "keep"),
        ("/v1/datasets/mixed/batches/0?shufle=true", 400, "bad_parameter", "shufle"),
        ("/v1/datasets/mixed/batches/0?balance=true&weights=flags", 400, "bad_parameter", "one of them"),
        ("/v1/datasets/mixed/batches/0?folds=3&fold=3", 400, "bad_parameter", "0 … folds-1 = 2"),
        ("/v1/datasets/mixed/batches?start=5&stop=5", 404, "batch_out_of_range", "start"),
        ("/v1/datasets/mixed/batches", 400, "bad_parameter", "stop"),
        ("/v1/datasets/mixed/splits?test=1.5", 400, "bad_parameter", "1.5"),
        ("/v1/datasets/mixed/splits?test=1000", 422, "split_impossible", "1000"),
        ("/v1/datasets/mixed/splits?test=0.6&val=0.6", 422, "split_impossible", "train"),
        ("/v1/datasets/mixed/splits?test=0.1&stratify=half", 422, "split_impossible", "half"),
        ("/v1/datasets/mixed/splits?test=0.1&split_shuffle=false&stratify=labels", 400, "bad_parameter", "stratify"),
        ("/v1/datasets/mixed/rows?start=0&stop=10&step=-1", 400, "bad_parameter", "step"),
        ("/v1/datasets/mixed/rows?start=0&stop=1001", 404, "row_out_of_range", "1000"),
        ("/v1/datasets/mixed/batches/0?format=npy", 400, "bad_parameter", "fields="),
        ("/v1/nothing", 404, "not_found", "/docs"),
    ],
)
def test_errors(http: httpx.Client, path: str, status: int, code: str, says: str) -> None:
    """What is wrong is answered in one shape, with the bad value or what would be right in the detail."""
    response = http.get(path)
    problem = problem_of(response)
    assert (response.status_code, problem["code"]) == (status, code), problem
    assert says in problem["detail"]


def test_too_large_is_refused_before_reading(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """A body above the limit is 413, from the plan, with what would fit; the rest is served as before."""
    limited = serve(folder, H5FEED_MAX_BODY_BYTES="100000", H5FEED_MAX_ROWS="500")
    with httpx.Client(base_url=limited.url, timeout=60) as http:
        refused = http.get("/v1/datasets/mixed/batches/0", params={"batch_size": "300", "fields": "images"})
        assert problem_of(refused)["code"] == "too_large"
        fitting = refused.json()["detail"].split("at most ")[1].split(" ")[0]
        params = {"batch_size": fitting, "fields": "images"}
        assert http.get("/v1/datasets/mixed/batches/0", params=params).status_code == 200
        many = http.post("/v1/datasets/mixed/rows", json={"rows": [0] * 501, "fields": []})
        assert problem_of(many)["code"] == "too_large"


def test_catalogue(http: httpx.Client) -> None:
    """Every file is listed, unreadable ones with the reason; pages and the filter work."""
    listing = http.get("/v1/datasets").json()
    status = {entry["name"]: entry["status"] for entry in listing["datasets"]}
    assert status == {
        "broken": "unreadable",
        "mixed": "ok",
        "odd": "unreadable",
        "pipe": "unreadable",
        "sub.small": "ok",
        "tall": "ok",
    }
    page = http.get("/v1/datasets", params={"limit": "1", "offset": "1", "q": "L"}).json()
    assert ([entry["name"] for entry in page["datasets"]], page["total"]) == (["tall"], 2)


def test_metadata(http: httpx.Client) -> None:
    """Roles come with reasons; classes, chunks, filters, sizes and the cost of shuffling are told."""
    whole = http.get("/v1/datasets/mixed").json()
    fields = {field["name"]: field for field in whole["fields"]}
    assert (whole["rows"], whole["class_names"]) == (1000, ["cat", "dog", "bird", "fish"])
    assert (fields["images"]["role"], fields["images"]["channels"]) == ("input", "rgb")
    assert fields["labels"]["role"] == "label" and "label" in fields["labels"]["role_reason"]
    assert (fields["shuffled"]["chunks"], fields["shuffled"]["filters"]) == ([3, 4, 2], ["shuffle", "gzip"])
    assert fields["swapped"]["decoded_per_served_byte"] == 16


def test_health_and_docs(http: httpx.Client) -> None:
    """Alive, ready, and a docs page that needs no other host, with the datasets to choose from."""
    assert http.get("/healthz").text == http.get("/readyz").text == "ok"
    page = http.get("/docs").text
    assert "http://" not in page and "https://" not in page
    for asset in ("swagger-ui/swagger-ui-bundle.js", "swagger-ui/swagger-ui.css", "docs.js"):
        assert f'"static/{asset}"' in page
        assert http.get(f"/static/{asset}").status_code == 200
    schema = http.get("/openapi.json").json()
    operations = [operation for path in schema["paths"].values() for operation in path.values()]
    for operation in operations:
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), parameter
            if parameter["name"] == "name":
                # Examples: an enum would be refused by generated clients when files come and go.
                assert list(parameter["examples"]) == ["mixed", "sub.small", "tall"]
                assert "enum" not in parameter["schema"]


def test_tokens(serve: Callable[..., ServerProcess], folder: Path) -> None:
    """With tokens set, all data need one of them, and the health pages none."""
    guarded = serve(folder, H5FEED_TOKENS="first,second")
    with httpx.Client(base_url=guarded.url, timeout=60) as http:
        refused = http.get("/v1/datasets")
        assert problem_of(refused)["code"] == "unauthorized"
        assert http.get("/healthz").status_code == 200
        for token in ("first", "second"):
            assert http.get("/v1/datasets", headers={"authorization": f"Bearer {token}"}).status_code == 200
        assert http.get("/v1/datasets", headers={"authorization": "Bearer third"}).status_code == 401
