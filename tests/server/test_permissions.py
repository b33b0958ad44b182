"""Permissions: every endpoint and every page, with every kind of token, as header and as cookie.

The table is made from the application's routes, so that it includes new routes automatically. Everything that is open
without a token is listed here, and nowhere else.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import h5py
import httpx
import numpy as np
import pytest
from h5feed_server.api.openapi import describe
from h5feed_server.main import create_app
from h5feed_server.settings import Settings
from h5feed_server.tokens.secrets import digest_of, new_token, proof_of
from h5feed_server.tokens.token_file import TokenRecord, as_line, now

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

OPEN = {
    ("GET", "/healthz"),
    ("GET", "/readyz"),
    ("GET", "/docs"),
    ("GET", "/redoc"),
    ("GET", "/openapi.json"),
    ("GET", "/simple/"),
    ("GET", "/simple/h5feed/"),
    ("GET", "/simple/h5feed/requirements.txt"),
    ("GET", "/simple/h5feed/{filename}"),
    ("GET", "/sign-in"),
    ("POST", "/sign-in"),
    ("POST", "/sign-out"),
    # Over the Unix socket alone, and before a client sends its token there.
    ("GET", "/v1/local/proof"),
}
"""What needs no token. None of it names anything that is served."""

OWN, FOREIGN, MISSING = "mnist_a", "secret_zoo", "secret_qoo"
"""A dataset in the scope of the right token, one that is not, and none."""

QUERIES = {
    "/v1/datasets/{name}/batches/{index}": {"batch_size": "4"},
    "/v1/datasets/{name}/batches": {"batch_size": "4", "start": "0", "stop": "2"},
    "/v1/datasets/{name}/plan": {"batch_size": "4"},
    "/v1/datasets/{name}/rows": {"start": "0", "stop": "4"},
    "/v1/datasets/{name}/stats/mean-image": {"field": "images"},
    "/datasets/{name}/rows/{row}/view": {"field": "images"},
    "/v1/datasets/{name}/descriptor": {"file": "{name}.h5"},
    "/datasets/{name}/mean": {"field": "images"},
    "/h5grove/meta": {"file": "{name}.h5"},
    "/h5grove/attr": {"file": "{name}.h5"},
    "/h5grove/data": {"file": "{name}.h5", "path": "/images"},
    "/h5grove/stats": {"file": "{name}.h5", "path": "/images"},
    "/h5grove/paths": {"file": "{name}.h5"},
}
"""Of routes that need one, or that are about a dataset without naming it in the path."""

ACCEPT = {"api": "*/*", "page": "text/html,*/*"}


@dataclass(frozen=True)
class Route:
    method: str
    path: str

    @property
    def is_about_a_dataset(self) -> bool:
        return "{name}" in self.path or "{name}" in str(QUERIES.get(self.path))

    @property
    def is_open(self) -> bool:
        return (self.method, self.path) in OPEN


def _routes() -> list[Route]:
    """All routes of the application, whether or not the OpenAPI description contains them."""
    app = create_app(Settings(data_dir=Path("/nonexistent"), cache_dir=Path("/nonexistent/cache")))
    # Newer versions of FastAPI keep the routers that were included, older ones their routes.
    nested = [getattr(getattr(route, "original_router", None), "routes", [route]) for route in app.routes]
    found = [
        Route(method, route.path)
        for route in itertools.chain(*nested)
        for method in sorted(getattr(route, "methods", None) or ())
        if method != "HEAD"
    ]
    described = {
        Route(method.upper(), path) for path, operations in describe(app)["paths"].items() for method in operations
    }
    assert described <= set(found) and len(found) > len(described) > 15
    assert {(route.method, route.path) for route in found} >= OPEN
    return found


ROUTES = _routes()


class Team:
    """A server with tokens, and the ways to send each kind of token."""

    def __init__(self, folder: Path, cache: Path) -> None:
        for name in (OWN, FOREIGN, "other_set"):
            with h5py.File(folder / f"{name}.h5", "w") as file:
                file["images"] = np.random.default_rng(0).integers(0, 255, (40, 8, 8), dtype=np.uint8)
                labels = file.create_dataset("labels", data=np.arange(40) % 4)
                labels.attrs["class_names"] = [f"{name}_class_{number}" for number in range(4)]
        self.tokens = {"none": "", "wrong": new_token()[0]}
        lines = []
        for kind, datasets, since in (
            ("expired", ["mnist*"], -10),
            ("other", ["other*"], None),
            ("right", ["mnist*"], 600),
            ("all", None, None),
        ):
            text, name = new_token()
            self.tokens[kind] = text
            digest = digest_of(proof_of(text.encode())).hex()
            expires = None if since is None else now() + timedelta(seconds=since)
            record = TokenRecord(
                name=f"the-{kind}-one",
                id=name,
                hash=f"sha256:{digest}",
                expires=expires,
                datasets=None if datasets is None else tuple(datasets),
            )
            lines.append(as_line(record))
        file = cache.parent / "tokens"
        file.write_text("\n".join(lines))
        self.server = ServerProcess(folder, cache, "--token-file", str(file), "--workers", "2", H5FEED_LOCAL="1")
        self.http = httpx.Client(base_url=self.server.url, timeout=60)
        self.jobs = itertools.count(1)
        files = self.http.get("/simple/h5feed/", headers={"accept": "application/vnd.pypi.simple.v1+json"})
        # A client that is imported from a folder has none.
        self.wheel = files.json()["files"][0]["filename"] if files.status_code == 200 else "h5feed.whl"

    def header(self, kind: str) -> dict[str, str]:
        token = self.tokens[kind]
        return {"authorization": f"Bearer {token}"} if token else {}

    def cookie(self, kind: str) -> dict[str, str]:
        token = self.tokens[kind]
        if kind == "wrong":
            # The id of one that is right.
            return {"cookie": f"h5feed_{self.tokens['right'].split('_')[1]}={proof_of(token.encode())}"}
        return {"cookie": f"h5feed_{token.split('_')[1]}={proof_of(token.encode())}"} if token else {}

    def send(self, route: Route, headers: dict[str, str], accept: str = "api", name: str = OWN) -> httpx.Response:
        place = {"name": name, "row": "0", "index": "0", "split": "all", "filename": self.wheel, "job": "0" * 32}
        if "{job}" in route.path and name != MISSING:
            place["job"] = self.job(name)
        path = re.sub(r"\{(\w+)(?::\w+)?\}", lambda match: place[match[1]], route.path)
        query = {key: value.format(**place) for key, value in QUERIES.get(route.path, {}).items()}
        body: dict[str, Any] = {}
        if route.method == "POST" and route.path.startswith("/v1/"):
            body = {"json": {"rows": [0, 1]}}
            query = {}
        if route.path.endswith("/weights"):
            headers = {**headers, "content-type": "application/octet-stream"}
            body = {"content": np.ones(40).tobytes()}
        everything = {"accept": ACCEPT[accept], "prefer": "wait=20", **headers}
        self.http.cookies.clear()
        return self.http.request(route.method, path, params=query, headers=everything, **body)

    def job(self, name: str) -> str:
        """A new job about a dataset."""
        # A job that somebody else has just asked for cannot be deleted.
        headers = {**self.header("right" if name == OWN else "all"), "prefer": "wait=0"}
        # The data is small: where the job is over at once, the answer is its result.
        for seed in itertools.islice(self.jobs, 100):
            query = {"split": "train", "test": "0.5", "split_seed": str(seed)}
            answer = self.http.get(f"/v1/datasets/{name}/stats", params=query, headers=headers)
            if answer.status_code == 202:
                return answer.headers["location"].rpartition("/")[2]
            assert answer.status_code == 200, answer.text
        raise AssertionError("100 jobs were over at once")


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    found = Team(tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("cached") / "cache")
    headers = found.header("all")
    url = f"{found.server.url}/v1/datasets"
    wait_until(lambda: [one["status"] for one in httpx.get(url, headers=headers).json()["datasets"]] == ["ok"] * 3)
    # Pictures of a mean need statistics.
    for name in (OWN, FOREIGN, "other_set"):
        answer = httpx.get(f"{url}/{name}/stats", headers={**headers, "prefer": "wait=60"}, timeout=90)
        assert answer.status_code == 200
    yield found
    found.http.close()
    assert found.server.stop() == 0


def _plain(answer: httpx.Response, name: str) -> tuple[int, str, str]:
    """The content of a response, without the requested name and the request id."""
    text = answer.text.replace(name, "NAME")
    return answer.status_code, answer.headers["content-type"], re.sub(r'"request_id":"\w+"', "", text)


def _names_nothing(answer: httpx.Response, *names: str) -> bool:
    return not any(name in answer.text for name in names)


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_every_route(team: Team, route: Route) -> None:
    """Without a valid token, only the listed routes respond. With one, responses contain everything in its scope, and
    nothing else."""
    if route.is_open:
        for kind in ("none", "wrong", "expired", "other", "right"):
            for headers in (team.header(kind), team.cookie(kind)):
                answer = team.send(route, headers)
                others = ("/sign-in", "/simple", "/v1/local")
                assert answer.status_code in (200, 303) or route.path.startswith(others), answer.text
                named = {"right": (FOREIGN, "other_set"), "other": (OWN, FOREIGN)}.get(
                    kind, (OWN, FOREIGN, "other_set")
                )
                assert _names_nothing(answer, *named)
        return
    is_page = not route.path.startswith(("/v1/", "/h5grove/"))
    for kind in ("none", "wrong", "expired"):
        for accept in ACCEPT:
            for headers in (team.header(kind), team.cookie(kind)):
                answer = team.send(route, headers, accept)
                assert _names_nothing(answer, FOREIGN, "other_set", "_class_")
                if is_page and accept == "page":
                    assert answer.status_code == 303 and answer.headers["location"].startswith("/sign-in?next=")
                    continue
                problem = answer.json()
                assert (answer.status_code, problem["code"]) == (401, "unauthorized")
                is_read = route.method == "GET" or "authorization" in headers
                assert ("expired on" in problem["detail"]) == (kind == "expired" and is_read), problem
    if route.path == "/v1/datasets/{name}/descriptor":
        # Over TCP the answer is the same for every dataset and token.
        for kind, name in itertools.product(("right", "other"), (OWN, FOREIGN, MISSING)):
            answer = team.send(route, team.header(kind), "api", name)
            assert answer.status_code == 406 and _names_nothing(answer, OWN, FOREIGN, MISSING, "other_set")
        return
    accept = "page" if is_page else "api"
    cookies = [team.cookie] if route.method == "GET" else []
    for way in (team.header, *cookies):
        answer = team.send(route, way("right"), accept)
        assert answer.status_code < 300, answer.text
        assert _names_nothing(answer, FOREIGN, "other_set")
        other = team.send(route, way("other"), accept)
        assert _names_nothing(other, FOREIGN, f"{OWN}_class")
        if route.is_about_a_dataset or "{job}" in route.path:
            assert other.status_code == 404, other.text
            for kind, foreign in (("right", FOREIGN), ("other", OWN)):
                there = team.send(route, way(kind), accept, foreign)
                away = team.send(route, way(kind), accept, MISSING)
                ids = r"[0-9a-f]{32}"
                found, wanted = _plain(there, foreign), _plain(away, MISSING)
                assert re.sub(ids, "ID", str(found)) == re.sub(ids, "ID", str(wanted)) and found[0] == 404
        else:
            assert other.status_code == answer.status_code and _names_nothing(other, OWN)
    if route.method != "GET":
        assert team.send(route, team.cookie("right")).status_code == 401


def test_known_queries_are_limited_to_the_scope(team: Team) -> None:
    """The scope also applies to known queries, which are answered before they reach the endpoint."""
    for _ in range(3):
        for kind, name, status in (
            ("right", OWN, 200),
            ("right", FOREIGN, 404),
            ("other", OWN, 404),
            ("all", FOREIGN, 200),
        ):
            for path in ("batches/0?batch_size=5", "batches?batch_size=5&start=0&stop=2"):
                url = f"{team.server.url}/v1/datasets/{name}/{path}"
                answer = httpx.get(url, headers=team.header(kind), timeout=60)
                assert answer.status_code == status
                if status == 200:
                    assert (
                        "private"
                        in httpx.get(f"{url}&revision={_revision(team, name)}", headers=team.header(kind)).headers[
                            "cache-control"
                        ]
                    )


def _revision(team: Team, name: str) -> str:
    answer = httpx.get(f"{team.server.url}/v1/datasets/{name}", headers=team.header("all"), timeout=60)
    return str(answer.json()["revision"])


def test_lists_are_limited_to_the_scope(team: Team) -> None:
    """Lists, counts, suggestions, the activity page and the OpenAPI description are limited to the scope."""
    with httpx.Client(base_url=team.server.url, timeout=60) as http:

        def get(path: str, kind: str) -> httpx.Response:
            return http.get(path, headers={**team.header(kind), "accept": "*/*"})

        everything, own = get("/v1/datasets", "all").json(), get("/v1/datasets", "right").json()
        assert everything["total"] == 3 and own["total"] == 1 and own["datasets"][0]["name"] == OWN
        page = get("/?format=json", "right").json()
        assert (page["total"], page["all"]) == (1, 1)
        assert get("/?format=json&q=secret", "right").json()["datasets"] == []
        # One letter is wrong, so that the name that is right would be suggested.
        assert "did you mean" in get("/v1/datasets/secret_zo", "all").json()["detail"]
        for path in ("/v1/datasets/secret_zo", "/datasets/secret_zo?format=json", "/h5grove/meta?file=secret_zo.h5"):
            assert "zoo" not in get(path, "right").text
        assert get("/v1/datasets/x", "other").json()["detail"].endswith("choose from other_set")
        schemas = {kind: get("/openapi.json", kind).text for kind in ("none", "right", "all")}
        assert OWN not in schemas["none"] and OWN in schemas["right"] and FOREIGN not in schemas["right"]
        assert FOREIGN in schemas["all"] and "/v1/datasets/{name}" in schemas["none"]

        for kind, name in (("all", FOREIGN), ("right", OWN)):
            for _ in range(4):
                assert get(f"/v1/datasets/{name}/batches/0?batch_size=7", kind).status_code == 200

        def feed(kind: str) -> dict[str, Any]:
            found: dict[str, Any] = get("/feed?format=json", kind).json()
            return found

        wait_until(lambda: {"the-all-one", "the-right-one"} <= {one["name"] for one in feed("all")["callers"]})
        seen = feed("right")
        assert [one["name"] for one in seen["callers"]] == ["the-right-one"]
        assert FOREIGN not in json.dumps(seen) and "the-all-one" not in json.dumps(seen)


def test_slow_requests_are_limited_to_the_scope(tmp_path: Path) -> None:
    """The activity page shows slow requests only for datasets in the scope, and hides tokens in paths."""
    team = _small_team(tmp_path)
    try:
        for path in (f"/v1/datasets/{FOREIGN}", f"/v1/datasets/{OWN}", f"/v1/datasets/{team.tokens['right']}"):
            team.http.get(path, headers=team.header("all"))

        def slowest(kind: str) -> str:
            return json.dumps(team.http.get("/feed?format=json", headers=team.header(kind)).json()["slowest"])

        wait_until(lambda: FOREIGN in slowest("all") and OWN in slowest("all"))
        assert team.tokens["right"] not in slowest("all")
        assert OWN in slowest("right") and FOREIGN not in slowest("right")
    finally:
        team.http.close()
        assert team.server.stop() == 0


def _small_team(tmp_path: Path) -> Team:
    (tmp_path / "data").mkdir()
    return Team(tmp_path / "data", tmp_path / "cache")


def test_nobody_stops_the_job_of_another_scope(team: Team) -> None:
    """A token cannot stop jobs for datasets outside its scope, and does not learn that they exist."""
    job = team.job(FOREIGN)
    url = f"{team.server.url}/v1/jobs/{job}"
    for send in (httpx.get, httpx.delete):
        assert send(url, headers=team.header("right"), timeout=60).status_code == 404
    assert httpx.get(url, headers=team.header("all"), timeout=60).json()["request"]["dataset"] == FOREIGN
