"""No parameter, link, archive or declaration leads out of the data folder, and no response has a path of the server.

Canary files lie next to the data folder and the cache folder. No response may contain their text. The parameters come
from the OpenAPI description and the application's routes, so that new ones are included automatically. Absolute paths
are sent with a symbolic link in them, so that they can be told apart from the server's own paths.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import h5py
import httpx
import numpy as np
import pytest
from h5feed_server.catalog.declared import read_declared

from tests.server.test_permissions import OPEN, QUERIES, ROUTES
from tests.support.operations import Operation, described, undescribed
from tests.support.raw_http import Answer, RawConnection
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

CANARY_TEXT = "canary-5f0c2b"
CANARY_NUMBER = 7_274_861
CANARY_BYTES = np.full(2, CANARY_NUMBER, "<i8").tobytes()

VALUES = {"name": "good", "row": "0", "index": "0", "split": "all", "job": "0" * 32, "filename": "h5feed.whl"}
REQUIRED = {"batch_size": "2", "start": "0", "stop": "2", "field": "x", "file": "good.h5", "ticket": "0", "nonce": "0"}
NEEDED = {path: {name: value.format(name="good") for name, value in query.items()} for path, query in QUERIES.items()}

NAMING_HEADERS = (
    *("accept", "accept-language", "content-type", "cookie", "if-match", "if-none-match", "if-range", "range"),
    *("authorization", "forwarded", "referer", "user-agent", "x-forwarded-host", "x-forwarded-prefix", "x-request-id"),
    *("x-original-url", "x-rewrite-url", "x-sendfile", "x-accel-redirect", "destination", "content-location"),
)
"""Headers that name something, or may be taken to, whether an operation describes them or not."""


def _canary(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.with_suffix(".txt").write_text(f"{CANARY_TEXT}\n" * 20)
    np.full(50, CANARY_NUMBER, "<i8").tofile(path.with_suffix(".bin"))
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file["x"], file["y"] = np.full(50, CANARY_NUMBER), np.arange(50) % 2
        file.attrs["about"] = CANARY_TEXT


def _good(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        file["x"] = np.arange(200, dtype=np.uint8).reshape(20, 10)
        file["y"] = np.arange(20) % 2


class Place:
    """A data folder with canary files around it, and the texts that no response may contain.

    Attributes
    ----------
    alias : Path
        Symbolic link to the folder that contains everything.
    """

    def __init__(self, base: Path) -> None:
        self.root = base / "real"
        self.data, self.cache = self.root / "served", self.root / "caches" / "cache"
        self.data.mkdir(parents=True)
        self.alias = base / "alias"
        self.alias.symlink_to(self.root)
        for folder in (self.root, self.cache.parent, self.root / "served-too"):
            _canary(folder / "canary")
        _good(self.data / "good.h5")
        _canary(self.data / ".hidden")
        packages = Path(httpx.__file__).parents[1]
        application = Path(sys.modules["h5feed"].__file__ or "").parents[2]
        self._paths = [str(self.root), str(packages), str(application), sys.prefix, "/site-packages"]

    def faults(self, answer: Answer) -> list[str]:
        """The texts in a response that must not be there."""
        text = answer.text
        found = [secret for secret in (CANARY_TEXT, str(CANARY_NUMBER), "root:x:") if secret in text]
        found += [secret for secret in (*self._paths, "Traceback (most", 'File "') if secret in text]
        if CANARY_BYTES in answer.body:
            found.append("bytes of a canary")
        if answer.status >= 500 and (answer.status, answer.headers.get("retry-after")) != (503, "1"):
            found.append("a fault of the server's")
        if answer.status >= 400 and answer.code is None and "text/html" not in answer.headers.get("content-type", ""):
            found.append("an error without a code")
        return found

    def ways_out(self) -> list[str]:
        """Values to send in place of a name, as they are written in a URL."""
        there = f"{self.alias}/canary.h5"
        names = [
            *("../canary.h5", "../canary.txt", "../../canary.h5", "../caches/canary.txt", "../served-too/canary.h5"),
            *("./../canary.h5", "good/../../canary.h5", "good.h5/../../canary.txt", "....//....//canary.txt"),
            *("..", ".", "/", "~/canary.h5", "~root", "$HOME/canary.h5", "${H5FEED_DATA_DIR}/../canary.h5"),
            *("..\\canary.h5", "..\\..\\canary.txt", "C:\\canary.h5", "\\\\localhost\\canary.h5"),
            *(there, f"/{there}", f"file://{there}", f"file:{there}", f"FILE://localhost{there}", "file:///etc/passwd"),
            *(
                "/etc/passwd",
                "/proc/self/environ",
                "/proc/self/fd/3",
                "/dev/stdin",
                "h5feed.toml",
                ".hidden",
                ".hidden.h5",
            ),
            *("out", "out.h5", "outside", "outside.canary", "outside/canary.h5", "out.txt"),
            *("canary.h5\0", "../canary.h5\0.h5", "good\0", "good.h5\0/../../canary.h5", "\0"),
            # Look-alikes: full-width dots and slashes, two dots in one, a fraction slash, and dots with marks.
            *("\uff0e\uff0e\uff0fcanary.h5", "\u2025/canary.h5", "..\u2044canary.h5", "..\u2215canary.h5"),
            *("\u3002\u3002/canary.h5", ".\u0307./canary.h5", "good\u200b", "g\u043e\u043ed", "\ufeffgood"),
            *("a" * 300, "../" * 2000 + "canary.h5", "a/" * 3000, "%s%n%x", "{0.__class__}", "good;/../canary.h5"),
        ]
        encoded = [quote(name, safe="") for name in names]
        as_they_are = [quote(name, safe="/.:;~$\\") for name in names if "/" in name or "\\" in name]
        # Encoded twice, too long, in part, and not as UTF-8.
        odd = ["..%2fcanary.h5", "%2e%2e/canary.h5", "%2e%2e%2fcanary.h5", "%252e%252e%252fcanary.h5", "..%5ccanary.h5"]
        odd += ["%c0%ae%c0%ae%c0%afcanary.h5", "%ff%fe", "%2e%2e;/canary.h5", "..%00/canary.h5", "%", "%2", "%zz"]
        return list(dict.fromkeys([*encoded, *as_they_are, *odd]))


def _links_out(place: Place) -> None:
    """Create symbolic links out of the data folder, which the server does not follow by default."""
    (place.data / "out.h5").symlink_to(place.root / "canary.h5")
    (place.data / "out.txt").symlink_to("../canary.txt")
    (place.data / "outside").symlink_to("..")
    (place.data / "passwd.h5").symlink_to("/etc/passwd")


def _begin(place: Place, *options: str, **environment: str) -> ServerProcess:
    server = ServerProcess(place.data, place.cache, *options, **environment)
    _until_known(server)
    return server


def _until_known(server: ServerProcess) -> None:
    wait_until(lambda: '"preparing"' not in httpx.get(f"{server.url}/v1/datasets", timeout=60).text)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    found = Place(tmp_path_factory.mktemp("ways"))
    _links_out(found)
    return found


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[ServerProcess]:
    process = _begin(place)
    yield process
    assert process.stop() == 0


@pytest.fixture(scope="module")
def operations(server: ServerProcess) -> list[Operation]:
    """All operations, whether or not the OpenAPI description contains them."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        found = described(http.get("/openapi.json").json(), REQUIRED)
        known = {(one.method, one.path) for one in found}
        others = [(route.method, route.path) for route in ROUTES if (route.method, route.path) not in known]
        found += undescribed(http, others, VALUES, NEEDED)
    assert len(found) == len(ROUTES) >= len(OPEN) + 20
    return found


_CONNECTIONS = 12

Slot = tuple[Operation, str, str]
"""An operation, where a parameter of it is sent (path, query, header or body), and its name."""


def _slots(operations: Sequence[Operation]) -> list[Slot]:
    found = []
    for one in operations:
        places = {"path": one.path_parameters, "query": one.query, "header": one.headers, "body": one.body}
        found += [(one, place, name) for place, names in places.items() for name in names]
    return found


def _sent(connection: RawConnection, slot: Slot, value: str) -> Answer:
    """The response if one parameter is `value`, as it is written in a URL, and all others are valid."""
    operation, place, name = slot
    path = operation.filled(VALUES | ({name: value} if place == "path" else {}))
    query = "&".join(f"{key}={quote(given)}" for key, given in operation.required.items() if key != name)
    if place == "query":
        query += f"&{name}={value}"
    headers: list[tuple[str, str]] = []
    body = None
    if place == "header":
        # As it is, but for what would end the line.
        headers.append((name, value.replace("%00", "\0").replace("%2F", "/")))
    if operation.body:
        given = {"rows": [0], **({name: [value] if name == "rows" else value} if place == "body" else {})}
        headers.append(("content-type", "application/json"))
        body = json.dumps(given).encode()
    return connection.ask(f"{path}?{query}", operation.method, headers, body)


def _faults(place: Place, server: ServerProcess, tried: Sequence[tuple[Slot, str]]) -> list[str]:
    """Faults in all responses. Requests run in parallel, because the server rescans the folder for unknown names."""
    with ThreadPoolExecutor(_CONNECTIONS) as threads:
        parts = threads.map(lambda begin: _faults_of(place, server, tried[begin::_CONNECTIONS]), range(_CONNECTIONS))
        return list(itertools.chain(*parts))


def _faults_of(place: Place, server: ServerProcess, tried: Sequence[tuple[Slot, str]]) -> list[str]:
    found = []
    with RawConnection(server.port) as connection:
        for slot, value in tried:
            answer = _sent(connection, slot, value)
            for fault in place.faults(answer):
                operation, where, name = slot
                found.append(
                    f"{operation.method} {operation.path} {where} {name}={value[:80]}: {fault}: {answer.status} "
                    f"{answer.text[:500]}"
                )
    return found


def test_each_value_in_each_parameter_of_a_name(
    place: Place, server: ServerProcess, operations: Sequence[Operation]
) -> None:
    """Every value in every name parameter, once per parameter name, whichever operation it belongs to."""
    once = {(where, name): slot for slot in _slots(operations) for _, where, name in [slot]}
    assert len(once) > 60
    tried = [(slot, value) for slot in once.values() for value in place.ways_out()]
    assert _faults(place, server, tried) == []


def test_each_parameter_of_each_operation(place: Place, server: ServerProcess, operations: Sequence[Operation]) -> None:
    """Some values in each parameter, different ones for each operation."""
    values = itertools.cycle(place.ways_out())
    tried = [(slot, next(values)) for slot in _slots(operations) for _ in range(3)]
    assert len(tried) > 800
    assert _faults(place, server, tried) == []


@pytest.mark.slow
def test_each_value_in_each_parameter_of_each_operation(
    place: Place, server: ServerProcess, operations: Sequence[Operation]
) -> None:
    tried = [(slot, value) for slot in _slots(operations) for value in place.ways_out()]
    assert _faults(place, server, tried) == []


def test_paths_without_an_operation(place: Place, server: ServerProcess) -> None:
    """Paths that belong to no operation, below the server's folders and elsewhere. The only files are the assets of the
    pages."""
    found = []
    with RawConnection(server.port) as connection:
        for folder, value in itertools.product(
            ("/", "/static/", "/explorer/", "/simple/", "/simple/h5feed/", "/v1/", "/v1/datasets/good/", "/h5grove/"),
            place.ways_out(),
        ):
            answer = connection.ask(folder + value)
            found += [f"{folder}{value[:80]}: {fault}: {answer.text[:300]}" for fault in place.faults(answer)]
            if answer.status == 200:
                # What is beyond the folder is another page, or nothing.
                assert "canary" not in answer.text.replace(value, ""), value
    assert found == []


def test_headers_with_file_names(place: Place, server: ServerProcess, operations: Sequence[Operation]) -> None:
    """No header leads to a file, or to a response that contains a path."""
    found = []
    paths = itertools.cycle([one for one in operations if one.method == "GET"])
    values = itertools.cycle(place.ways_out())
    with RawConnection(server.port) as connection:
        for name, value in [(name, next(values)) for name in NAMING_HEADERS for _ in range(20)]:
            operation = next(paths)
            query = "&".join(f"{key}={given}" for key, given in operation.required.items())
            answer = connection.ask(f"{operation.filled(VALUES)}?{query}", headers=[(name, value)])
            if answer.status != 431:
                found += [f"{name}: {value[:80]}: {fault}: {answer.text[:300]}" for fault in place.faults(answer)]
    assert found == []


# What files say ------------------------------------------------------------------------------------------------------


def _spellings(place: Place, ending: str) -> list[str]:
    """Ways to name a canary file from a file in the data folder."""
    name = f"canary.{ending}"
    return [
        *(str(place.root / name), str(place.alias / name), f"../{name}", f"./../{name}", f"../served/../{name}"),
        *(f"outside/{name}", f".hidden.{ending}", f"out.{ending}", f"file://{place.root / name}", f"~/{name}", name),
        *(f"${{ORIGIN}}/../{name}", f"{place.root}//{name}", f"/proc/self/cwd/../{name}", f"../served-too/{name}"),
    ]


def _write_ways_out(place: Place) -> None:
    """Write a file for each spelling and each way in which HDF5 refers to another file."""
    for number, there in enumerate(_spellings(place, "h5")):
        with h5py.File(place.data / f"link{number}.h5", "w") as file:
            file["x"], file["whole"] = h5py.ExternalLink(there, "/x"), h5py.ExternalLink(there, "/")
            file["beyond"] = h5py.SoftLink("/whole/x")
        with h5py.File(place.data / f"virtual{number}.h5", "w") as file:
            layout = h5py.VirtualLayout((50,), "i8", maxshape=(50,))
            layout[:] = h5py.VirtualSource(there, "x", (50,))
            file.create_virtual_dataset("x", layout)
    for number, there in enumerate(_spellings(place, "bin")):
        with h5py.File(place.data / f"stored{number}.h5", "w") as file:
            file.create_dataset("x", (50,), "<i8", external=[(there, 0, 400)])
            # In pieces, of which the first is within the folder.
            file.create_dataset("y", (50,), "<i8", external=[("inside.bin", 0, 200), (there, 0, 200)])
            prefixed = h5py.h5p.create(h5py.h5p.DATASET_ACCESS)
            prefixed.set_efile_prefix(str(place.root).encode())
    np.arange(50, dtype="<i8").tofile(place.data / "inside.bin")


_LOOKS = (
    *("/v1/datasets/{name}", "/v1/datasets/{name}/rows?stop=2", "/v1/datasets/{name}/rows?stop=2&format=npz"),
    *("/v1/datasets/{name}/batches/0?batch_size=2", "/v1/datasets/{name}/batches?batch_size=2&start=0&stop=1"),
    *(
        "/v1/datasets/{name}/plan?batch_size=2",
        "/v1/datasets/{name}/stats?field=x",
        "/v1/datasets/{name}/tree?depth=16",
    ),
    *("/v1/datasets/{name}/rows/0/image?field=x", "/v1/datasets/{name}/stats/mean-image?field=x"),
    *("/h5grove/meta?file={name}.h5&path=/x", "/h5grove/data?file={name}.h5&path=/x", "/h5grove/paths?file={name}.h5"),
    *("/h5grove/data?file={name}.h5&path=/beyond", "/h5grove/stats?file={name}.h5&path=/x", "/datasets/{name}"),
    *("/h5grove/meta?file={name}.h5&path=/x&resolve_links=all", "/h5grove/attr?file={name}.h5&path=/whole"),
    *("/h5grove/paths?file={name}.h5&resolve_links=all", "/datasets/{name}/rows", "/datasets/{name}/rows/0"),
    *("/datasets/{name}/tree", "/datasets/{name}/rows/0/view?field=x", "/datasets/{name}/strip"),
)


def test_what_files_refer_to(tmp_path: Path) -> None:
    """Links, virtual arrays and external storage out of the folder are not served, by any name. Valid files are.

    The server's environment names folders in which libhdf5 would look for such files; it does not look there.
    """
    place = Place(tmp_path)
    _links_out(place)
    _write_ways_out(place)
    prefixes = {f"HDF5_{kind}_PREFIX": str(place.root) for kind in ("EXT", "VDS", "EXTFILE")}
    server = _begin(place, **prefixes)
    try:
        with RawConnection(server.port) as connection:
            found = []
            listing = connection.ask("/v1/datasets?limit=1000")
            # What a link says is shown as it is.
            names = [*_spellings(place, "h5"), *_spellings(place, "bin")]
            assert place.faults(_but_for(listing, names)) == []
            listed = json.loads(listing.body)["datasets"]
            assert len(listed) > 40
            for entry in listed:
                assert entry["status"] == "ok" or entry["reason"]
                if not entry["name"].isalnum():
                    # Listed as what it is, but no dataset.
                    continue
                for look in _LOOKS:
                    target = look.format(name=quote(entry["name"], safe=""))
                    answer = _but_for(connection.ask(target), names)
                    found += [f"{target}: {fault}: {answer.text[:300]}" for fault in place.faults(answer)]
                    if entry["name"] != "good" and "/rows?" in look:
                        assert answer.status in (404, 422), (target, answer.text)
            assert found == []
            good = connection.ask("/v1/datasets/good/rows?start=3&stop=4&fields=x")
            assert good.status == 200 and bytes(range(30, 40)) in good.body
    finally:
        assert server.stop() == 0


def _but_for(answer: Answer, names: Sequence[str]) -> Answer:
    """All values without these names."""
    body = answer.body
    for name in sorted(names, key=len, reverse=True):
        body = body.replace(name.encode(), b"")
    return Answer(answer.status, answer.headers, body)


# What h5feed.toml says -----------------------------------------------------------------------------------------------


def _declarations(place: Place) -> list[tuple[str, str]]:
    """Tables for a dataset `bad`, and a word from the reason why it is not served."""
    outside = [
        *(
            "../canary.h5",
            "../*.h5",
            "./../canary.h5",
            str(place.root / "canary.h5"),
            f"{place.alias}/*",
            "~/canary.h5",
        ),
        *("$HOME/canary.h5", "${H5FEED_DATA_DIR}/../canary.h5", f"file://{place.root}/canary.h5", "..\\\\canary.h5"),
        *(
            ".hidden.h5",
            "/etc/passwd",
            "good.h5\\u0000",
            "a" * 5000,
            "**/" * 500 + "x.h5",
            "[" * 200,
            "x" * 50 + "*" * 50,
        ),
    ]
    tables = [(f'files = ["{name}"]', "no file matches") for name in outside]
    tables += [
        ('files = ["out.h5"]', "leads out of the data folder"),
        ('files = ["outside/canary.h5"]', "no file matches"),
        ("files = []", "files is empty"),
        ('files = "good.h5"', "valid list"),
        ("files = [3]", "valid string"),
        ('files = { a = "good.h5" }', "valid list"),
        ('files = [["good.h5"]]', "valid string"),
        ('file = ["good.h5"]', "no such key"),
        ('files = ["good.h5"]\nclasses = 3', "boolean"),
        ('files = ["good.h5"]\nroles = { x = "../canary.h5" }', "input"),
        ('files = ["good.h5"]\nfields = { x = "../canary.h5" }', "."),
        ('files = ["good.h5"]\nfields = { "../x" = "x", x = "/../../canary.h5" }', "."),
        ('files = ["good.h5"]\nfields = { x = 3 }', "valid string"),
        ('files = ["good.h5"]\nsplits.train = [0, 99999999999999999999]', "."),
        ('files = ["good.h5"]\nsplits.train = [-1, 5]', "0 ≤ begin"),
        ('files = ["good.h5"]\nsplits.train = [0, 1e300]', "."),
        ('files = ["good.h5"]\nsplits.train = [nan, inf]', "."),
        ('files = ["good.h5"]\nsplits."../canary" = [0, 5]', "not a valid split name"),
        ('files = ["good.h5"]\nsplits.train = "canary.h5"', "."),
        ('files = ["good.h5"]\ndecode.x = { shape = [1000000000000, 1000000000000, 3] }', "."),
        ('files = ["good.h5"]\ndecode.x = { shape = [-1, 0, 3] }', "."),
        ('files = ["good.h5"]\ndecode.x = "../canary.txt"', "."),
        ('files = ["good.h5"]\napply = "../canary.py"', "scale"),
        ('files = ["good.h5"]\ncard = { licence = ["../canary.txt"] }', "valid string"),
        ('files = ["good.h5"]\ncard.file = "../canary.txt"', "no such key|permitted"),
        ('files = ["good.h5"]\nfields' + ".a" * 200 + ' = "x"', "valid string"),
    ]
    return tables


def test_what_a_declaration_says(tmp_path: Path) -> None:
    """An invalid declaration is listed with the reason, no file outside is served, and other datasets are."""
    place = Place(tmp_path)
    _links_out(place)
    _good(place.data / "other.h5")
    tables = _declarations(place)
    text = "".join(f"[datasets.bad{number}]\n{table}\n\n" for number, (table, _) in enumerate(tables))
    (place.data / "h5feed.toml").write_text(text)
    server = _begin(place)
    try:
        with RawConnection(server.port) as connection:
            listed = json.loads(connection.ask("/v1/datasets?limit=1000").body)["datasets"]
            entries = {entry["name"]: entry for entry in listed}
            found = []
            for number, (table, word) in enumerate(tables):
                entry = entries[f"bad{number}"]
                if entry["status"] == "ok":
                    found.append(f"{table[:200]}: it is served")
                elif not _has(word, str(entry["reason"])):
                    found.append(f"{table[:200]}: expected {word!r}: {entry['reason'][:300]}")
                answer = connection.ask(f"/v1/datasets/bad{number}/rows?stop=2")
                told = [fault for fault in place.faults(answer) if str(place.root) not in table]
                found += [f"{table[:200]}: {fault}: {answer.text[:300]}" for fault in told]
                if answer.status != 422:
                    found.append(f"{table[:200]}: {answer.text[:300]}")
                if len(str(entry["reason"])) > 2000:
                    found.append(f"{table[:100]}: a reason of {len(entry['reason'])} characters")
            assert found == []
            assert connection.ask("/v1/datasets/other/rows?stop=2").status == 200
    finally:
        assert server.stop() == 0


def _has(words: str, text: str) -> bool:
    return any(word in text for word in words.split("|"))


WHOLE_FILES: dict[str, Callable[[], bytes]] = {
    "not UTF-8": lambda: b'[datasets.a]\nfiles = ["\xff\xfe.h5"]\n',
    "UTF-16": lambda: '[datasets.a]\nfiles = ["good.h5"]\n'.encode("utf-16"),
    "NUL": lambda: b'[datasets.a]\nfiles = ["good.h5"]\n\0',
    "deep lists": lambda: b"[datasets.a]\nfiles = " + b"[" * 100_000 + b"]" * 100_000,
    "deep tables": lambda: b"[datasets.a]\nfiles = " + b"{a=" * 100_000 + b"1" + b"}" * 100_000,
    "deep keys": lambda: b"[datasets." + b"a." * 100_000 + b"a]\n",
    "digits": lambda: b"[datasets.a]\nfiles = " + b"9" * 100_000,
    "twice": lambda: b'[datasets.a]\nfiles = ["good.h5"]\n[datasets.a]\nfiles = ["other.h5"]\n',
    "cut off": lambda: b'[datasets.a]\nfiles = ["good.h5',
    "include": lambda: b'include = "../canary.txt"\n',
    "list": lambda: b"datasets = []\n",
    "empty table": lambda: b"datasets = { '' = {} }\n",
    "large": lambda: b"# " + b"x" * (17 << 20),
    "binary": lambda: bytes(range(256)) * 100,
}


@pytest.mark.parametrize("case", WHOLE_FILES)
def test_invalid_declaration_files(tmp_path: Path, case: str) -> None:
    """Whatever the file contains, it is read completely, or there is a short reason why not."""
    (tmp_path / "h5feed.toml").write_bytes(WHOLE_FILES[case]())
    declaration = read_declared(tmp_path, follow_links=False)
    (refusal,) = declaration.refused.values()
    assert refusal.reason.startswith("h5feed.toml") and len(refusal.reason) < 1000
    assert str(tmp_path) not in refusal.reason and declaration.datasets == {}


def test_a_server_with_invalid_declaration_files(tmp_path: Path) -> None:
    """The reason is listed in a line, and every file is served as without the declaration."""
    place = Place(tmp_path)
    server = _begin(place)
    pids = server.worker_pids()
    try:
        with RawConnection(server.port) as connection:

            def reasons() -> list[str]:
                listed = json.loads(connection.ask("/v1/datasets?limit=1000").body)["datasets"]
                assert any((entry["name"], entry["status"]) == ("good", "ok") for entry in listed), listed
                return [entry["reason"] for entry in listed if entry["name"] != "good"]

            before: list[str] = []
            for case in ("deep lists", "digits", "not UTF-8", "large", "binary"):
                (place.root / "next").write_bytes(WHOLE_FILES[case]())
                os.replace(place.root / "next", place.data / "h5feed.toml")
                wait_until(lambda before=before: reasons() not in ([], before))  # type: ignore[misc]
                (reason,) = before = reasons()
                assert place.faults(Answer(200, {}, reason.encode())) == [], (case, reason)
                assert connection.ask("/v1/datasets/good/rows?stop=2").status == 200, case
                assert server.worker_pids() == pids, case
    finally:
        assert server.stop() == 0
