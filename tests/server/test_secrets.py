"""A token is never revealed: neither from its proper place, nor from any place where somebody may put it by mistake."""

from __future__ import annotations

import base64
import io
import json
import logging
import pickle
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import h5feed
import h5py
import httpx
import numpy as np
import pytest
from h5feed.errors import FeedError
from h5feed_server.tokens.secrets import digest_of, new_token, proof_of
from h5feed_server.tokens.token_file import TokenRecord, as_line

from tests.support.raw_http import Answer, RawConnection, exchanged
from tests.support.server_process import ServerProcess
from tests.support.usage import all_processes
from tests.support.waiting import wait_until

FIXED = "of-the-variable-1x8"
"""A token of `H5FEED_TOKENS` as people make them up."""

ODD = "s3cr3t/with%+=&;<\"odd'~9k"
"""One with all that is encoded in one place or another."""


_CONNECTIONS = 24


def _spellings(token: str) -> list[str]:
    """Forms in which a token may appear: as it is, in a URL, in JSON, in HTML, in Basic authentication."""
    encoded = {
        token,
        quote(token, safe=""),
        quote(token),
        quote(token, safe="/+=&;'~"),
        quote(quote(token, safe=""), safe=""),
    }
    encoded |= {json.dumps(token)[1:-1], token.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&#34;")}
    # Of the tokens of files, the second part is the secret.
    encoded |= {token[16:]} if token.startswith("h5feed_") else set()
    encoded |= {base64.b64encode(text.encode()).decode() for text in (f"user:{token}", f"{token}:", token)}
    return sorted(encoded)


def _shows(text: str, tokens: Sequence[str]) -> list[str]:
    return [spelling for token in tokens for spelling in _spellings(token) if spelling in text]


class Guarded:
    """A server with both kinds of tokens that logs as much as possible.

    Attributes
    ----------
    good : str
        The token from the file. An invalid token differs from it at the end.
    """

    def __init__(self, base: Path, form: str) -> None:
        (base / "data").mkdir()
        with h5py.File(base / "data" / "good.h5", "w") as file:
            file["x"], file["y"] = np.zeros((2000, 3)), np.arange(2000) % 3
        self.good, name = new_token()
        self.wrong = self.good[:-6] + "wrong-"
        self.tokens = [self.good, self.wrong, FIXED, ODD]
        record = TokenRecord(name="alice", id=name, hash=f"sha256:{digest_of(proof_of(self.good.encode())).hex()}")
        (base / "tokens").write_text(as_line(record))
        options = ("--token-file", str(base / "tokens"), "--access-log", "--log-format", form, "--workers", "2")
        self.server = ServerProcess(
            base / "data", base / "cache", *options, H5FEED_TOKENS=f"{FIXED},{ODD}", H5FEED_TRUSTED_PROXIES="127.0.0.1"
        )
        self._log: list[str] = []
        # A pipe that nobody reads would fill up, and hold up whoever writes to it.
        self._reader = threading.Thread(target=lambda: self._log.extend(self.server.process.stdout))
        self._reader.start()
        headers = {"authorization": f"Bearer {self.good}"}
        wait_until(
            lambda: httpx.get(f"{self.server.url}/v1/datasets/good", headers=headers, timeout=60).status_code == 200
        )

    def log(self) -> str:
        """Everything that the server has printed, after it has ended."""
        assert self.server.stop() == 0
        self._reader.join(60)
        return "".join(self._log)


def _misplaced(token: str) -> Iterator[tuple[str, str, list[tuple[str, str]], bytes | None]]:
    """Requests with a token in every wrong place: target, method, headers, body."""
    raw, query = quote(token, safe=""), "/v1/datasets/good/batches/0?batch_size=2&"
    for target in (
        *(f"/v1/datasets?token={raw}", f"/?token={raw}&q=x", f"/?q={raw}", f"/v1/datasets?q={raw}", f"{query}{raw}"),
        *(
            f"{query}access_token={raw}",
            f"{query}Authorization=Bearer%20{raw}",
            f"{query}{raw}=1",
            f"{query}fields={raw}",
        ),
        *(
            f"{query}where={raw}",
            f"{query}split={raw}",
            f"{query}seed={raw}",
            f"{query}revision={raw}",
            f"{query}x={raw}",
        ),
        *(f"/v1/datasets/{raw}", f"/v1/datasets/{quote(token)}", f"/v1/datasets/good/splits/{raw}/rows", f"/{raw}"),
        *(f"/v1/datasets/good/rows/{raw}/image", f"/v1/datasets/good/batches/{raw}", f"/v1/jobs/{raw}", f"//{raw}"),
        *(f"/{raw}/v1/datasets", f"/static/{raw}", f"/explorer/{raw}", f"/simple/{raw}", f"/simple/h5feed/{raw}"),
        *(f"/h5grove/meta?file={raw}", f"/h5grove/data?file=good.h5&path={raw}", f"/datasets/{raw}", f"/docs/{raw}"),
        *(f"/datasets/good/rows?q={raw}", f"/datasets/good/rows?where={raw}", f"/datasets/good/tree?path={raw}"),
        *(f"/sign-in?next=%2F%3Ftoken%3D{quote(raw, safe='')}", f"/sign-in?next=/{raw}", f"/sign-in?token={raw}"),
        *(
            f"/v1/datasets/good/stats?field={raw}",
            f"/metrics?{raw}",
            f"/healthz?{raw}",
            f"/%68{raw}",
            f"/openapi.json?k={raw}",
        ),
    ):
        yield target, "GET", [], None
    basic = base64.b64encode(f"user:{token}".encode()).decode()
    for name, value in (
        *(("authorization", token), ("authorization", f"Basic {basic}"), ("authorization", f"Token {token}")),
        *(
            ("proxy-authorization", f"Bearer {token}"),
            ("cookie", f"token={token}"),
            ("cookie", f"h5feed_{token}={token}"),
        ),
        *(("x-api-key", token), ("x-auth-token", token), ("x-h5feed-token", token), ("x-request-id", token)),
        *(("referer", f"http://localhost/?token={token}"), ("user-agent", token), ("origin", f"http://{token}")),
        *(("accept", token), ("prefer", token), ("if-none-match", token), ("range", token), ("content-type", token)),
        *(
            ("host", token),
            ("x-forwarded-for", token),
            ("x-forwarded-host", token),
            ("x-forwarded-prefix", f"/{token}"),
        ),
        *(("forwarded", f"for={token}"), ("traceparent", token), ("expect", token), (token, "1")),
    ):
        yield "/v1/datasets/good/plan?batch_size=2", "GET", [(name, value)], None
    as_json, as_form = [("content-type", "application/json")], [("content-type", "application/x-www-form-urlencoded")]
    for given in ({"rows": [0], "token": token}, {"rows": [0], "fields": [token]}, {"rows": token}, {token: 1}, token):
        yield "/v1/datasets/good/rows", "POST", as_json, json.dumps(given).encode()
    yield "/v1/datasets/good/rows", "POST", as_json, f"{{{token}".encode()
    yield "/v1/datasets/good/rows", "POST", [("content-type", token)], token.encode()
    yield f"/v1/jobs/{raw}", "DELETE", [], None
    yield f"/{raw}", "PUT", [], None
    for field in ("token=x&next", "next", "tokens"):
        yield "/sign-in", "POST", as_form, f"{field}=/{raw}".encode()


def _sent(guarded: Guarded) -> list[tuple[str, Answer]]:
    """All responses with their requests: without authentication and with the good token, for the API and for pages."""
    found = []
    proof = proof_of(guarded.good.encode())
    ways: tuple[list[tuple[str, str]], ...] = (
        [],
        [("authorization", f"Bearer {guarded.good}")],
        [("cookie", f"h5feed_{guarded.good[7:15]}={proof}"), ("accept", "text/html")],
        [("accept", "text/html")],
    )
    asked = [(way, given) for way in ways for token in guarded.tokens for given in _misplaced(token)]

    def ask(begin: int) -> None:
        with RawConnection(guarded.server.port) as connection:
            for way, (target, method, headers, body) in asked[begin::_CONNECTIONS]:
                if not {name for name, _ in way} & {name for name, _ in headers}:
                    answer = connection.ask(target, method, [*way, *headers], body)
                    found.append((f"{method} {target} {headers} {body!r}", answer))

    # Side by side: for a name that is none, the server looks at its folder anew.
    with ThreadPoolExecutor(_CONNECTIONS) as threads:
        list(threads.map(ask, range(_CONNECTIONS)))
    with RawConnection(guarded.server.port) as connection:
        for token in guarded.tokens:
            signed_in = connection.ask("/sign-in", "POST", (), f"token={quote(token, safe='')}&next=/".encode())
            found.append(("the token, where it belongs", signed_in))
            # What is no HTTP never reaches the application.
            for text in (f"GET /?{token} HTTP/9.9\r\n\r\n", f"{token}\r\n\r\n", f"GET / HTTP/1.1\r\n{token}\r\n\r\n"):
                found.append((text, Answer(0, {}, exchanged(guarded.server.port, text.encode()))))
    return found


def _jobs(guarded: Guarded) -> None:
    """Start jobs, which are stored in the cache folder, with the token in every part of the request."""
    headers = {"authorization": f"Bearer {guarded.good}", "user-agent": guarded.good, "referer": guarded.good}
    with httpx.Client(base_url=guarded.server.url, headers=headers, timeout=60) as http:
        for seed in range(3):
            query = {"split": "train", "test": "0.5", "split_seed": str(seed)}
            assert http.get("/v1/datasets/good/stats", params=query, headers={"prefer": "wait=20"}).status_code in (
                200,
                202,
            )
            assert (
                http.get("/v1/datasets/good/splits", params={"test": "0.2", "split_seed": str(seed)}).status_code == 200
            )
    assert list(guarded.server.cache_dir.glob("served-*/jobs/*"))


@pytest.mark.parametrize("form", ["pretty", "json"])
def test_a_token_in_every_wrong_place(tmp_path: Path, form: str, capfd: pytest.CaptureFixture[str]) -> None:
    """It appears in no response, log line, list of processes, or file of the cache folder."""
    guarded = Guarded(tmp_path, form)
    server = guarded.server
    answers = _sent(guarded)
    _jobs(guarded)
    commands = "".join(" ".join(process.cmdline()) for process in all_processes(server))
    logs = guarded.log() + capfd.readouterr().err
    assert len(answers) > 1000 and logs.count("GET") > 1000
    assert not _shows(commands, guarded.tokens)
    lines = [line for line in logs.splitlines() if _shows(line, guarded.tokens)]
    assert not lines, f"{len(lines)} lines: {lines[:10]}"
    told = [
        (asked, answer.status, answer.text[:600]) for asked, answer in answers if _shows(answer.text, guarded.tokens)
    ]
    assert not told, "\n".join([f"{len(told)} answers", *map(str, told[:20])])
    files = [path for path in server.cache_dir.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        assert not _shows(str(path), guarded.tokens)
        assert not _shows(path.read_bytes().decode("latin-1"), guarded.tokens), path
    assert not [answer.status for _, answer in answers if answer.status >= 500]


# Clients -------------------------------------------------------------------------------------------------------------


def _all_of(error: BaseException) -> str:
    """Everything that a traceback shows of an error and of its causes."""
    return "".join(traceback.format_exception(error)) + repr(error) + str(vars(error))


def test_a_client_does_not_show_its_token(tmp_path: Path) -> None:
    """Neither the client's objects nor its errors show the token, nor do logs of the client and its libraries at any
    level."""
    guarded = Guarded(tmp_path, "pretty")
    server, good = guarded.server, guarded.good
    told = io.StringIO()
    handler = logging.StreamHandler(told)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(1)
    shown: list[str] = []

    def failing(call: Callable[[], object]) -> None:
        with pytest.raises(FeedError) as raised:
            call()
        shown.append(_all_of(raised.value))

    try:
        with h5feed.connect(server.url, token=good, deadline=60) as feed:
            dataset = feed["good"]
            loop = dataset.batches(batch_size=100)
            objects = [feed, dataset, loop, dataset.stats(field="y"), dataset.splits(test=0.5), next(iter(loop))]
            shown += [f"{one!r} {one}" for one in objects]
            shown.append(feed._repr_html_() if hasattr(feed, "_repr_html_") else "")
            failing(lambda: feed["none"])
            failing(lambda: dataset.take([10**9]))
            failing(lambda: dataset.batch(0, batch_size=2, fields=["none"]))
        for token in (guarded.wrong, "other-wrong-token"):
            with h5feed.connect(server.url, token=token, deadline=60) as feed:
                failing(feed.datasets)
        # A token that cannot be sent, one in the address, and a server that is not there.
        failing(lambda: h5feed.connect(server.url, token=good + "é"))
        failing(lambda: h5feed.connect(server.url, token=good + "\n1"))
        inside = server.url.replace("http://", f"http://user:{good}@")
        failing(lambda: _asks(inside))
        failing(lambda: _asks(f"{server.url}/?token={good}"))
        failing(lambda: _asks("http://127.0.0.1:9", token=good, deadline=0.2))
        failing(lambda: _asks(f"http://user:{good}@127.0.0.1:9", deadline=0.2))
    finally:
        root.removeHandler(handler)
        root.setLevel(before)
        guarded.log()
    assert told.getvalue()
    for text in (*shown, told.getvalue()):
        assert not _shows(text, guarded.tokens), text[:3000]
    # A copy for another process has to have it.
    assert good.encode() in pickle.dumps(h5feed.connect(server.url, token=good))


def _asks(url: str, **options: object) -> object:
    with h5feed.connect(url, **{"deadline": 60, **options}) as feed:  # type: ignore[arg-type]
        return feed.datasets()
