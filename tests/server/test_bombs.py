"""Small requests that would cost the server a lot: each is refused with a code, with and without a token."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

from tests.support.raw_http import Answer, RawConnection, exchanged, statuses
from tests.support.server_process import ServerProcess
from tests.support.usage import Usage
from tests.support.waiting import wait_until

TOKEN = "a-token-for-the-bombs"
GROWTH = 100 << 20
"""Bytes by which all workers together may grow, once they have answered every kind of request."""

ROWS = "/v1/datasets/mixed/rows"
JSON = [("Content-Type", "application/json")]
REFUSED = {400, 404, 405, 409, 413, 415, 422, 429, 431}


@pytest.fixture(scope="module", params=["open", "guarded"])
def bombed(
    request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServerProcess, bool]]:
    """A server, and whether it requires a token, which no request has."""
    variables = {} if request.param == "open" else {"H5FEED_TOKENS": TOKEN}
    process = ServerProcess(folder, tmp_path_factory.mktemp("cache"), "--workers", "2", **variables)
    right = {"authorization": f"Bearer {TOKEN}"}
    wait_until(lambda: "preparing" not in httpx.get(f"{process.url}/v1/datasets", headers=right, timeout=60).text)
    yield process, request.param == "guarded"
    assert process.stop() == 0


# What is in a request that is HTTP -----------------------------------------------------------------------------------

NUMBERS = (
    "9" * 400,
    "-" + "9" * 400,
    "9" * 30_000,
    "1e400",
    "0x10",
    "1__0",
    "NaN",
    "Infinity",
    "-1",
    "1.5",
    "1e3",
)

TARGETS: dict[str, Callable[[], str]] = {
    "long path": lambda: "/v1/datasets/" + "a" * 20_000,
    "long path of slashes": lambda: "/" * 20_000,
    "encoded path": lambda: "/v1/datasets/" + "%41" * 8_000,
    "long query": lambda: "/v1/datasets/mixed/plan?batch_size=2&fields=" + "a" * 30_000,
    "many parameters": lambda: "/v1/datasets/mixed/plan?" + "&".join(f"a{n}=" for n in range(4000)),
    "the same parameter": lambda: "/v1/datasets/mixed/plan?" + "&".join(["batch_size=2"] * 2000),
    "empty parameters": lambda: "/v1/datasets/mixed/plan?" + "&" * 30_000,
    "many conditions": lambda: "/v1/datasets/mixed/plan?batch_size=2&" + "&".join(["where=labels%3D1"] * 500),
    "deep condition": lambda: "/v1/datasets/mixed/plan?batch_size=2&where=" + "(" * 9000 + "labels=1" + ")" * 9000,
    "long condition": lambda: "/v1/datasets/mixed/plan?batch_size=2&where=labels%20in%20" + "1,2," * 6000 + "3",
    "many nots": lambda: "/v1/datasets/mixed/plan?batch_size=2&where=" + "not%20" * 5000 + "labels%3D1",
    "many fields": lambda: "/v1/datasets/mixed/plan?batch_size=2&fields=" + "labels," * 4000 + "none",
    "many rows": lambda: "/v1/datasets/mixed/preview?rows=" + "1," * 14_000 + "1",
    "huge range": lambda: "/v1/datasets/mixed/preview?rows=0:1000000000000000000",
    "negative range": lambda: "/v1/datasets/mixed/preview?rows=-5:-1000000000000000000",
    "huge slice": lambda: "/v1/datasets/mixed/rows?start=0&stop=1000000000000000000&step=-1",
    "huge batch": lambda: "/v1/datasets/mixed/batches/0?batch_size=1000000000000000000",
    "huge blocks": lambda: "/v1/datasets/mixed/batches?batch_size=1&start=0&stop=1000000000000000000",
    "huge limit": lambda: "/v1/datasets?limit=1000000000000000000&offset=-1",
    "huge depth": lambda: "/v1/datasets/mixed/tree?depth=1000000000&limit=1000000000",
    "huge side": lambda: "/v1/datasets/mixed/preview?side=1000000000&per_class=1000000000",
    "huge shards": lambda: "/v1/datasets/mixed/plan?batch_size=2&shards=1000000000000000000&shard=-1",
    "huge folds": lambda: "/v1/datasets/mixed/splits?folds=1000000000&fold=0",
    "huge selection": lambda: "/h5grove/data?file=mixed.h5&path=/images&selection=" + "0," * 9000,
    "slices": lambda: "/h5grove/data?file=mixed.h5&path=/images&selection=0:1000000000000000000:-1",
    "deep path in a file": lambda: "/h5grove/meta?file=mixed.h5&path=" + "/a" * 10_000,
    **{
        f"number {index}": lambda number=number: f"/v1/datasets/mixed/batches/{quote(number)}?batch_size=2"  # type: ignore[misc]
        for index, number in enumerate(NUMBERS)
    },
}  # fmt: skip
"""All are below the limit on headers."""

BODIES: dict[str, Callable[[], bytes]] = {
    "a million rows too many": lambda: b'{"rows":[' + b"0," * 1_100_000 + b"0]}",
    "a million rows that are none": lambda: b'{"rows":[' + b"1000000," * 999_999 + b"1]}",
    "a million negative rows": lambda: b'{"rows":[' + b"-1," * 999_999 + b"-1]}",
    "digits": lambda: b'{"rows":[' + b"9" * 400 + b"]}",
    "a million digits": lambda: b'{"rows":[' + b"9" * 1_000_000 + b"]}",
    "exponents": lambda: b'{"rows":[1e999999999]}',
    "ranges": lambda: b'{"rows":"0:1000000000000000000"}',
    "deep lists": lambda: b'{"rows":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": lambda: b'{"rows":' * 100_000 + b"0" + b"}" * 100_000,
    "a million keys": lambda: b"{" + b",".join(b'"k%d":0' % n for n in range(1_000_000)) + b"}",
    "the same key": lambda: b"{" + b'"rows":[0],' * 9_000 + b'"rows":[-1]}',
    "not numbers": lambda: b'{"rows":[NaN,Infinity,-Infinity]}',
    "not UTF-8": lambda: b'{"rows":[0],"fields":["\xff\xfe\xc0\x80"]}',
    "UTF-16": lambda: '{"rows":[0]}'.encode("utf-16"),
    "surrogates": lambda: b'{"rows":[0],"fields":["\\ud800"]}',
    "a long name": lambda: b'{"rows":[0],"fields":["' + b"a" * 5_000_000 + b'"]}',
    "escapes": lambda: b'{"rows":[0],"fields":["' + b"\\u0000" * 500_000 + b'"]}',
    "spaces": lambda: b" " * 20_000_000,
    "NUL": lambda: b"\0" * 1_000_000,
    "nothing": lambda: b"",
    "gzip": lambda: gzip.compress(b" " * (200 << 20), 1),
    "too long": lambda: b" " * 26_000_000,
}


@cache
def _body(case: str) -> bytes:
    return BODIES[case]()


ENCODINGS = {"gzip": "gzip", "NUL": "deflate", "not numbers": "br, gzip", "UTF-16": "x-unknown"}
"""Of some bodies, as a header has it. The server takes none that is encoded: 200 MB of spaces are 200 kB here."""


def _refusal(answer: Answer, wants_token: bool, case: str) -> None:
    assert answer.code is not None, (case, answer.status, answer.text[:300])
    assert len(answer.body) < 10_000, (case, len(answer.body))
    # What is too long is refused before the token is looked at; everything else behind it.
    expected = {401, 431} if wants_token else REFUSED
    assert answer.status in expected, (case, answer.status, answer.text[:300])


@pytest.mark.parametrize("kind", ["targets", "bodies"])
def test_bombs_in_targets_and_bodies(bombed: tuple[ServerProcess, bool], kind: str) -> None:
    """Each request gets a 4xx with a code and a short body. Sent all at once, they do not make the workers grow."""
    server, wants_token = bombed

    def send(case: str) -> None:
        with RawConnection(server.port) as connection:
            if kind == "targets":
                answer = connection.ask(TARGETS[case]())
            else:
                encoding = [("Content-Encoding", ENCODINGS[case])] if case in ENCODINGS else []
                answer = connection.ask(ROWS, "POST", [*JSON, *encoding], _body(case))
        _refusal(answer, wants_token, case)

    cases = TARGETS if kind == "targets" else BODIES
    pids = server.worker_pids()
    for case in cases:
        send(case)
    before = Usage.of(server)
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(send, cases))
    after = Usage.of(server)
    assert server.worker_pids() == pids
    assert after.rss - before.rss < GROWTH, f"{before.rss >> 20} MiB, then {after.rss >> 20} MiB"


# What is hardly HTTP -------------------------------------------------------------------------------------------------


def _post(*lines: str) -> bytes:
    return "\r\n".join(
        [f"POST {ROWS} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *lines, "", ""]
    ).encode()


_CHUNKED = _post("Transfer-Encoding: chunked", "Connection: close")
_GET = b"GET /v1/datasets HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"

HEADS: dict[str, Callable[[], bytes]] = {
    "many headers": lambda: _GET + b"".join(b"x%d: y\r\n" % n for n in range(20_000)) + b"\r\n",
    "one header": lambda: _GET + b"x: " + b"a" * 10_000_000 + b"\r\n\r\n",
    "a header's name": lambda: _GET + b"a" * 1_000_000 + b": x\r\n\r\n",
    "the same header": lambda: _GET + b"cookie: h5feed_a=b\r\n" * 5000 + b"\r\n",
    "cookies": lambda: _GET + b"cookie: " + b"h5feed_a=b;" * 100_000 + b"\r\n\r\n",
    "a URL": lambda: b"GET /" + b"a" * 5_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "parameters": lambda: b"GET /v1/datasets?" + b"&".join(b"a%d=" % n for n in range(100_000)) + b" HTTP/1.1\r\n\r\n",
    "folded lines": lambda: _GET + b"x: y\r\n" + b" z\r\n" * 20_000 + b"\r\n",
    "no line ends": lambda: b"A" * 1_000_000,
    "no colons": lambda: _GET + b"abc\r\n" * 1000 + b"\r\n",
    "a method": lambda: b"A" * 100_000 + b" / HTTP/1.1\r\n\r\n",
    "NUL": lambda: _GET + b"x: \0\r\n\r\n",
    "a version": lambda: b"GET / HTTP/" + b"1" * 100_000 + b"\r\n\r\n",
    "two lengths": lambda: _post("Content-Length: 11", "Content-Length: 12") + b'{"rows":[0]}',
    "a negative length": lambda: _post("Content-Length: -1") + b'{"rows":[0]}',
    "a length of digits": lambda: _post("Content-Length: " + "9" * 400) + b'{"rows":[0]}',
    "a length and chunks": lambda: _post("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "a signed length": lambda: _post("Content-Length: +12") + b'{"rows":[0]}',
    "chunks that are none": lambda: _CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
    "a chunk of digits": lambda: _CHUNKED + b"f" * 400 + b"\r\n{}\r\n0\r\n\r\n",
    "a negative chunk": lambda: _CHUNKED + b"-5\r\n{}\r\n0\r\n\r\n",
    "a chunk that is longer": lambda: _CHUNKED + b"2\r\n{}{}{}\r\n0\r\n\r\n",
    "an extension": lambda: _CHUNKED + b"1;" + b"e" * 5_000_000 + b"\r\n{\r\n",
    "chunks of one byte": lambda: _CHUNKED + b"1\r\n \r\n" * 200_000 + b"0\r\n\r\n",
    "trailers": lambda: _CHUNKED + b"2\r\n{}\r\n0\r\n" + b"x: y\r\n" * 200_000 + b"\r\n",
    "chunked twice": lambda: _post("Transfer-Encoding: chunked, chunked") + b"0\r\n\r\n",
    "chunked in between": lambda: _post("Transfer-Encoding: chunked, gzip", "Connection: close") + b"0\r\n\r\n",
    "an unknown coding": lambda: _post("Transfer-Encoding: xchunked") + b"0\r\n\r\n",
    "a request in a body": lambda: _post("Content-Length: 5", "Connection: close") + b"12345" + _GET + b"\r\n",
}  # fmt: skip


def test_bombs_in_heads_and_frames(bombed: tuple[ServerProcess, bool]) -> None:
    """Each request gets one refusal with a code, and its connection is closed. The workers do not grow, and leak no
    descriptor."""
    server, _ = bombed

    def send(case: str) -> None:
        received = exchanged(server.port, HEADS[case]())
        answered = statuses(received)
        # Whoever sends on and on may be cut off before it reads why.
        assert len(answered) == 1 or (not received and len(HEADS[case]()) > 64_000), (case, answered, received[:200])
        if answered:
            assert answered[0] in REFUSED | {401}, (case, received[:300])
            assert re.search(rb'"code":"[a-z_]+"', received), (case, received[:500])

    pids = server.worker_pids()
    for case in HEADS:
        send(case)
    before = Usage.of(server)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(send, [*HEADS] * 4))
    wait_until(lambda: Usage.of(server).descriptors <= before.descriptors)
    after = Usage.of(server)
    assert server.worker_pids() == pids
    assert after.rss - before.rss < GROWTH, f"{before.rss >> 20} MiB, then {after.rss >> 20} MiB"
    with RawConnection(server.port) as connection:
        assert connection.ask("/healthz").status == 200


def test_a_body_that_is_encoded(bombed: tuple[ServerProcess, bool]) -> None:
    """A compressed body is refused even if its content would be valid: the server decompresses nothing."""
    server, wants_token = bombed
    body = gzip.compress(json.dumps({"rows": [0]}).encode())
    with RawConnection(server.port) as connection:
        answer = connection.ask(ROWS, "POST", [*JSON, ("Content-Encoding", "gzip")], body)
    assert answer.status == (401 if wants_token else 400), answer.text
