"""The endpoints of h5grove respond like h5grove itself, which runs over the same files.

Intended differences:

- An error is problem+json with a ``code``; h5grove's ``message`` is a member of it.
- Where h5grove fails with 500, the status is 404 (a missing attribute or link target), 422 or 413. If a member of a
  group cannot be described, its kind is ``other``, and a cycle of links is a link; h5grove fails for the whole group.
- ``format=bin`` of lists, text of any length and null arrays is 422, because h5grove sends memory addresses. So are
  statistics of complex numbers, because h5grove drops the imaginary part.
- Names of external storage are relative to the file, not to the working directory of the server.
- Links are followed only within the data folder. If a link names an absolute path, only the file name is shown.
- Bytes of text that are not UTF-8 are replaced; h5grove fails.
- Numbers that are big-endian are sent as JSON; h5grove fails.
- Unknown parameters are errors; h5grove ignores them.
- Groups of more than 50,000 members, and responses larger than the limit for a batch, are refused.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5grove.fastapi_utils
import h5py
import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from h5py import h5s, h5t

from tests.support.object_store import SOURCES, served_from
from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until


def _write_types(path: Path) -> None:
    """Arrays of all types and shapes that h5grove supports."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for code in ("i1", "u1", ">i2", "<u2", "<i4", ">u4", "<i8", "<u8", "<f2", ">f2", "<f4", ">f4", "<f8", ">f8"):
            values = (random.random((3, 4)) * 100 - (0 if "u" in code else 50)).astype(code)
            file[f"numbers/{code.replace('<', 'little ').replace('>', 'big ')}"] = values
        file["numbers/not finite"] = np.array([np.nan, np.inf, -np.inf, 1.5, -0.0, 2.5])
        file["numbers/complex"] = np.array([1 + 2j, -3.5j]).astype("<c8")
        file["numbers/bool"] = np.array([[True, False], [True, True]])
        file["numbers/scalar"], file["numbers/float32 scalar"] = 7, np.float32(0.1)
        file["numbers/cube"] = np.arange(24, dtype="<i2").reshape(2, 3, 4)
        file["numbers/nothing"] = np.zeros((0, 3), "<f4")
        file["numbers/null"] = h5py.Empty("<f4")
        file.create_dataset("text/fixed", data=np.array([b"one", b"two", b"three"]))
        file["text/any length"] = np.array(["één", "", "x" * 300], h5py.string_dtype())
        file["text/one"] = "a word"
        kind = np.dtype([("a", "<i4"), ("b", ">f8", (2,)), ("c", "S5")])
        file["records/plain"] = np.array([(1, (2.0, 3.0), b"x"), (4, (5.0, 6.0), b"yz")], kind)
        file["records/with text"] = np.array([(1, "x"), (2, "y")], np.dtype([("n", "<i8"), ("t", h5py.string_dtype())]))
        lists = file.create_dataset("lists", (2,), h5py.vlen_dtype("<i2"))
        lists[0], lists[1] = [1, 2], [3]
        colours = h5py.enum_dtype({"RED": 0, "GREEN": 1, "BLUE": 7}, basetype="i1")
        file.create_dataset("enum", data=np.array([0, 7, 1], "i1"), dtype=colours)
        file["opaque"] = np.array([b"\x01\x02", b"\x03\x04"]).view("V2")
        file.create_dataset("references", data=np.array([file.ref, file["lists"].ref], dtype=h5py.ref_dtype))
        file.create_dataset("stored/gzip", data=np.arange(100), chunks=(10,), compression="gzip", shuffle=True)
        file.create_dataset("stored/sparse", (1000, 10), "<f4", chunks=(100, 10), fillvalue=2.5)
        file["type"] = kind
        attributes = file.create_group("attributes").attrs
        attributes["text"], attributes["number"], attributes["numbers"] = "é", 1.5, np.arange(3, dtype=">i2")
        attributes["words"], attributes["fixed"] = np.array(["a", "b"], h5py.string_dtype()), np.bytes_(b"z")
        attributes["bool"], attributes["null"], attributes["nan"] = True, h5py.Empty("S3"), np.nan
        attributes["record"], attributes["float32"] = np.array((1, 2), "i4,f4"), np.float32(0.1)
        attributes["reference"], attributes["complex"] = file.ref, 1 + 2j


def _write_links(path: Path) -> None:
    """Groups, and links of all kinds, some into the other file."""
    with h5py.File(path, "w") as file:
        file["entry/data/x"] = np.arange(5)
        file["entry/again"] = file["entry/data"]
        file["entry/itself"] = file["entry"]
        file["soft"], file["soft group"] = h5py.SoftLink("/entry/data/x"), h5py.SoftLink("entry/data")
        file["lost"] = h5py.SoftLink("/nothing/there")
        file["into"] = h5py.ExternalLink("types.h5", "/numbers/cube")
        file["into group"] = h5py.ExternalLink("types.h5", "/text")
        file["lost file"], file["lost path"] = (
            h5py.ExternalLink("nothing.h5", "/x"),
            h5py.ExternalLink("types.h5", "/nothing"),
        )
        file["through"] = h5py.SoftLink("/into group/fixed")
        ordered = file.create_group("ordered", track_order=True)
        for name in ("b", "a", "c"):
            ordered.create_group(name)
        layout = h5py.VirtualLayout((2, 12), "<i2")
        layout[0], layout[1] = (
            h5py.VirtualSource("types.h5", "numbers/flat", (12,)),
            h5py.VirtualSource(".", "own", (12,), "<i2"),
        )
        file["own"] = np.arange(12, dtype="<i2") + 100
        file.create_virtual_dataset("virtual", layout)
    with h5py.File(path.parent / "types.h5", "r+") as file:
        file["numbers/flat"] = np.arange(12, dtype="<i2")
    with h5py.File(path.parent / "round.h5", "w") as file:
        file["x"], file["round"] = np.arange(3), h5py.SoftLink("/round")


FILES = ("types.h5", "sub/links.h5")


@pytest.fixture(scope="module")
def grove_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grove")
    (folder / "sub").mkdir()
    _write_types(folder / "types.h5")
    _write_links(folder / "links.h5")
    (folder / "sub" / "types.h5").write_bytes((folder / "types.h5").read_bytes())
    (folder / "sub" / "links.h5").write_bytes((folder / "links.h5").read_bytes())
    return folder


@pytest.fixture(scope="module", params=SOURCES)
def source(request: pytest.FixtureRequest) -> str:
    """Where the files are."""
    return str(request.param)


@pytest.fixture(scope="module")
def ours(grove_folder: Path, tmp_path_factory: pytest.TempPathFactory, source: str) -> Iterator[httpx.Client]:
    """A server that has inspected all files."""
    with (
        served_from(source, grove_folder, tmp_path_factory.mktemp("served")) as process,
        httpx.Client(base_url=f"{process.url}/h5grove", timeout=60) as client,
    ):
        for file in (*FILES, "links.h5", "round.h5"):
            wait_until(lambda file=file: client.get("/meta", params={"file": file}).status_code == 200)  # type: ignore[misc]
        yield client


@pytest.fixture(scope="module")
def theirs(grove_folder: Path) -> Iterator[httpx.Client]:
    """h5grove itself, over the same files."""
    app = FastAPI()
    app.include_router(h5grove.fastapi_utils.router)
    h5grove.fastapi_utils.settings.base_dir = str(grove_folder)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def _objects(folder: Path, file: str) -> list[str]:
    """Paths of all objects and broken links of a file."""
    found = ["/"]
    with h5py.File(folder / file) as opened:
        opened.visititems_links(lambda name, link: found.append(f"/{name}"))
    return found


def _agree(ours: httpx.Client, theirs: httpx.Client, endpoint: str, **query: Any) -> httpx.Response:
    """The response of the server, after checking that it is h5grove's."""
    mine, right = ours.get(endpoint, params=query), theirs.get(endpoint, params=query)
    assert mine.status_code == right.status_code, (query, mine.text[:300], right.text[:300])
    kind = right.headers.get("content-type")
    if kind == "application/json":
        assert mine.json() == right.json() if right.status_code == 200 else mine.json()["message"], query
    else:
        assert mine.content == right.content, query
        assert mine.headers["content-type"].partition(";")[0] == kind.partition(";")[0]
    assert mine.headers.get("content-disposition") == right.headers.get("content-disposition")
    return mine


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("links", [None, "False", "all"])
def test_metadata(grove_folder: Path, ours: httpx.Client, theirs: httpx.Client, file: str, links: str | None) -> None:
    """Of every object and every link, for each value of resolve_links."""
    options = {} if links is None else {"resolve_links": links}
    for path in _objects(grove_folder, file):
        _agree(ours, theirs, "/meta", file=file, path=path, **options)
    # The order matters, too: by creation, if the file tracks it.
    said = ours.get("/meta", params={"file": "links.h5", "path": "/ordered"}).json()
    assert [one["name"] for one in said["children"]] == ["b", "a", "c"]


@pytest.mark.parametrize("file", FILES)
def test_attributes_and_paths(grove_folder: Path, ours: httpx.Client, theirs: httpx.Client, file: str) -> None:
    """All attributes, some attributes, and the paths of every group."""
    for path in _objects(grove_folder, file):
        kind = ours.get("/meta", params={"file": file, "path": path}).json()["kind"]
        if path == "/attributes":
            assert ours.get("/attr", params={"file": file, "path": path}).json()["numbers"] == [0, 1, 2]
        elif not kind.endswith("link"):
            _agree(ours, theirs, "/attr", file=file, path=path)
        if kind == "group":
            _agree(ours, theirs, "/paths", file=file, path=path)
    with h5py.File(grove_folder / "types.h5") as opened:
        names = [name for name in opened["attributes"].attrs if name != "numbers"]
    some = _agree(ours, theirs, "/attr", file="types.h5", path="/attributes", attr_keys=names)
    assert some.json()["text"] == "é" and some.json()["nan"] is None


def _arrays(folder: Path, source: str) -> list[tuple[str, str]]:
    """Files and paths of all arrays, but not of those with parts in another object."""
    found: list[tuple[str, str]] = []
    for file in FILES:
        with h5py.File(folder / file) as opened:
            found += [(file, path) for path in _objects(folder, file) if isinstance(opened.get(path), h5py.Dataset)]
    return [one for one in found if source == "folder" or one[1] != "/virtual"]


EXPORTED = ("/numbers/big f4", "/numbers/bool", "/numbers/cube", "/numbers/scalar", "/stored/gzip", "/text/fixed")
"""Arrays that are exported as TIFF, which takes longer than the other formats."""

REFUSED = {"lists", "any length", "with text", "references", "null"}
"""Arrays for which h5grove sends memory addresses."""


def test_values(grove_folder: Path, source: str, ours: httpx.Client, theirs: httpx.Client) -> None:
    """Every array, in every format and with both conversions, byte by byte."""
    compared = 0
    forms = [{"format": form} for form in ("bin", "npy", "csv", "tiff")] + [{"format": "bin", "dtype": "safe"}]
    for file, path in _arrays(grove_folder, source):
        for form in (*forms, {}, {"dtype": "safe"}, {"flatten": "true"}):
            if form.get("format") == "tiff" and path not in EXPORTED:
                continue
            query = {"file": file, "path": path, **form}
            is_refused = form.get("format") == "bin" and path.rpartition("/")[2] in REFUSED
            if not is_refused and theirs.get("/data", params=query).status_code != 500:
                compared += _agree(ours, theirs, "/data", **query).status_code == 200
            elif path.startswith("/numbers/big") and form.get("format", "json") == "json":
                with h5py.File(grove_folder / file) as opened:
                    expected = opened[path][()]
                values = ours.get("/data", params=query).json()
                assert np.array_equal(np.array(values, expected.dtype).ravel(), expected.ravel()), query
            elif path == "/records/plain" and form.get("format", "json") == "json" and form.get("dtype") != "safe":
                assert ours.get("/data", params=query).json() == [[1, [2.0, 3.0], "x"], [4, [5.0, 6.0], "yz"]]
            else:
                assert ours.get("/data", params=query).status_code == 422, query
    assert compared > 150
    if source == "store":
        refused = ours.get("/data", params={"file": "sub/links.h5", "path": "/virtual"})
        assert refused.status_code == 422 and "is another object" in refused.json()["detail"]


@pytest.mark.parametrize(
    "selection", ["0", "-1", "1,2", "1, 2, 3", "0:1", ":,1:", "::2", "1,:,::3", ":,:,-2", "5:2", "-2:", ":,0:99:2"]
)
def test_selections(ours: httpx.Client, theirs: httpx.Client, selection: str) -> None:
    """Values and statistics of parts of an array."""
    query = {"file": "types.h5", "path": "/numbers/cube", "selection": selection}
    for form in ("json", "bin", "npy"):
        assert _agree(ours, theirs, "/data", **query, format=form).status_code == 200
    assert _agree(ours, theirs, "/stats", **query).status_code == 200
    flat = _agree(ours, theirs, "/data", **query, flatten="true").json()
    with io.BytesIO(ours.get("/data", params={**query, "format": "npy"}).content) as stream:
        assert np.ravel(np.load(stream)).tolist() == (flat if isinstance(flat, list) else [flat])


def test_statistics(grove_folder: Path, source: str, ours: httpx.Client, theirs: httpx.Client) -> None:
    """Of the finite values of every array of real numbers."""
    for file, path in _arrays(grove_folder, source):
        is_complex = path == "/numbers/complex"
        if theirs.get("/stats", params={"file": file, "path": path}).status_code == 200 and not is_complex:
            _agree(ours, theirs, "/stats", file=file, path=path)
        else:
            assert ours.get("/stats", params={"file": file, "path": path}).status_code == 422
    said = ours.get("/stats", params={"file": "types.h5", "path": "/numbers/not finite"}).json()
    assert said["min"] == 0 and said["max"] == 2.5


@pytest.mark.parametrize(
    ("endpoint", "query"),
    [
        ("/meta", {"path": "/nothing"}),
        ("/meta", {"path": "/entry/data/x/deeper"}),
        ("/meta", {"path": "/lost", "resolve_links": "all"}),
        ("/meta", {"path": "/", "resolve_links": "some"}),
        ("/meta", {"file": "nothing.h5"}),
        ("/meta", {"file": None}),
        ("/data", {"path": "/own", "dtype": "nothing"}),
        ("/data", {"path": "/own", "format": "nothing"}),
        ("/data", {"path": "/into group/fixed", "dtype": "safe"}),
        ("/data", {"path": "/into group/fixed", "format": "npy"}),
    ],
)
def test_errors(ours: httpx.Client, theirs: httpx.Client, endpoint: str, query: dict[str, str | None]) -> None:
    """The status is h5grove's, and the message contains the words that h5web looks for."""
    query = {key: value for key, value in {"file": "links.h5", **query}.items() if value is not None}
    answer = _agree(ours, theirs, endpoint, **query)
    said = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert said["message"] == said["detail"] and said["status"] == answer.status_code and said["code"]
    told = theirs.get(endpoint, params=query).json()
    for words in ("File not found", "is not a valid path", "Cannot resolve"):
        assert (words in said["message"]) == (words in told.get("message", "")), said


@pytest.mark.parametrize(
    ("endpoint", "query", "status", "words"),
    [
        ("/data", {"path": "/entry"}, 422, "not an array"),
        ("/data", {"path": "/lost"}, 422, "not an array"),
        ("/paths", {"path": "/own"}, 422, "not a group"),
        ("/attr", {"path": "/own", "attr_keys": "units"}, 404, "no attribute 'units'"),
        ("/data", {"path": "/own", "selection": "x"}, 422, "selection=x: 'x' is not an index"),
        ("/data", {"path": "/own", "selection": ""}, 422, "not an index"),
        ("/data", {"path": "/own", "selection": "0,0"}, 422, "2 parts"),
        ("/data", {"path": "/own", "selection": "12"}, 422, "out of range"),
        ("/data", {"path": "/own", "selection": "::-1"}, 422, "step -1"),
        ("/data", {"path": "/own", "selection": "9" * 400}, 422, "not an index"),
        ("/data", {"path": "/own", "flatten": "maybe"}, 422, "flatten=maybe"),
        ("/data", {"path": "/own", "formt": "bin"}, 422, "did you mean 'format'?"),
        ("/meta", {"file": "link.h5"}, 404, "did you mean 'links.h5'?"),
        ("/meta", {"path": "/own\0"}, 404, "not a valid path"),
        ("/paths", {"path": "/", "resolve_links": "all"}, 404, "Cannot resolve the link at lost"),
        ("/meta", {"file": "round.h5"}, 200, '"kind":"soft_link","target_path":"/round"'),
        ("/meta", {"file": "round.h5", "path": "/round", "resolve_links": "all"}, 404, "more than 64 links"),
        ("/stats", {"path": "/numbers/complex", "file": "types.h5"}, 422, "need real numbers"),
    ],
)
def test_what_h5grove_fails_at(
    ours: httpx.Client, endpoint: str, query: dict[str, str], status: int, words: str
) -> None:
    answer = ours.get(endpoint, params={"file": "links.h5", **query})
    assert answer.status_code == status, answer.text
    assert words in (answer.text if status == 200 else answer.json()["message"]), answer.text


SECRET = 7_777_777


def _write_ways_out(folder: Path) -> None:
    """Links, virtual arrays and external storage that lead out of the data folder."""
    outside = folder.parent / "outside"
    outside.mkdir()
    with h5py.File(outside / "secret.h5", "w") as file:
        file["x"] = np.full(50, SECRET)
    np.full(50, SECRET, "<i8").tofile(outside / "raw.bin")
    np.full(50, 5, "<i8").tofile(folder / "raw.bin")
    with h5py.File(folder / ".hidden.h5", "w") as file:
        file["x"] = np.full(50, SECRET)
    (folder / "out.h5").symlink_to(outside / "secret.h5")
    (folder / "notes.txt").write_text(str(SECRET))
    with h5py.File(folder / "ways.h5", "w") as file:
        file["fine"] = np.arange(3)
        for number, name in enumerate(
            (str(outside / "secret.h5"), "../outside/secret.h5", ".hidden.h5", "out.h5", "/etc/passwd")
        ):
            file[f"link{number}"] = h5py.ExternalLink(name, "/x")
            file[f"soft{number}"] = h5py.SoftLink(f"/link{number}")
            layout = h5py.VirtualLayout((50,), "i8")
            layout[:] = h5py.VirtualSource(name, "x", (50,))
            file.create_virtual_dataset(f"virtual{number}", layout)
        for number, raw in enumerate((str(outside / "raw.bin"), "../outside/raw.bin", "/etc/passwd", "raw.bin")):
            file.create_dataset(f"stored{number}", (50,), "<i8", external=[(raw, 0, 400)])


def test_nothing_leads_out(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """No name, link, virtual array or external storage gives access to a file that is not served."""
    folder = tmp_path / "data"
    folder.mkdir()
    _write_ways_out(folder)
    with httpx.Client(base_url=serve(folder).url, timeout=60) as http:
        wait_until(lambda: http.get("/h5grove/meta", params={"file": "ways.h5"}).status_code == 200)
        for file in (
            *(".hidden.h5", "out.h5", "notes.txt", "raw.bin", "../outside/secret.h5", "./ways.h5", "x/../ways.h5"),
            *(str(folder / "ways.h5"), str(tmp_path / "outside/secret.h5"), "/etc/passwd", "..", ".", "", "ways.h5\0"),
        ):
            for endpoint in ("meta", "data", "attr", "paths", "stats"):
                answer = http.get(f"/h5grove/{endpoint}", params={"file": file, "path": "/x"})
                assert answer.status_code in (404, 422) and str(SECRET) not in answer.text, (file, answer.text)
                assert str(tmp_path) not in answer.text.replace(file, "")
        names = [one["name"] for one in http.get("/h5grove/meta", params={"file": "ways.h5"}).json()["children"]]
        assert len(names) == 20
        for name in names:
            for endpoint in ("meta", "data", "stats"):
                answer = http.get(f"/h5grove/{endpoint}", params={"file": "ways.h5", "path": f"/{name}"})
                assert str(SECRET) not in answer.text and str(tmp_path) not in answer.text and "root" not in answer.text
                if endpoint != "meta" and name not in ("fine", "stored3"):
                    assert answer.status_code == 422, (name, answer.text)
        # External storage inside of the data folder is read.
        answer = http.get("/h5grove/data", params={"file": "/ways.h5", "path": "/stored3"})
        assert answer.json() == [5] * 50
        listed = http.get("/v1/datasets").json()["datasets"]
        name = next(one["name"] for one in listed if one["files"] == ["ways.h5"])
        tree = http.get(f"/v1/datasets/{name}/tree")
        assert len(tree.json()["node"]["children"]) == 20
        assert tree.status_code == 200 and str(tmp_path) not in tree.text and str(SECRET) not in tree.text


def test_a_link_into_what_is_no_hdf5_file(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """The link is described, and the note does not show a folder of the server."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "text.h5").write_text("this is no HDF5 file")
    with h5py.File(folder / "a.h5", "w") as file:
        file["x"], file["link"] = np.arange(3), h5py.ExternalLink("text.h5", "/x")
    with httpx.Client(base_url=serve(folder).url, timeout=60) as http:
        wait_until(lambda: http.get("/h5grove/meta", params={"file": "a.h5"}).status_code == 200)
        said = http.get("/h5grove/meta", params={"file": "a.h5", "path": "/link"})
        assert said.json() == {"kind": "external_link", "name": "link", "target_file": "text.h5", "target_path": "/x"}
        tree = http.get("/v1/datasets/a/tree").json()["node"]["children"]
        (note,) = [one["note"] for one in tree if one["name"] == "link"]
        assert "cannot be opened" in note and str(tmp_path) not in note
        for file in ("a.h5", "text.h5"):
            answer = http.get("/h5grove/meta", params={"file": file, "path": "/link", "resolve_links": "all"})
            assert answer.status_code in (404, 422) and str(tmp_path) not in answer.text


def test_doors(tmp_path: Path, folder: Path, serve: Callable[..., ServerProcess]) -> None:
    """Tokens and host names are checked."""
    guarded = serve(folder, H5FEED_TOKENS="s3cret-of-mine")
    query = {"file": "mixed.h5"}
    for path in ("/h5grove/meta", "/v1/datasets/mixed/tree"):
        assert httpx.get(f"{guarded.url}{path}", params=query).status_code == 401
    headers = {"authorization": "Bearer s3cret-of-mine"}
    wait_until(
        lambda: httpx.get(f"{guarded.url}/h5grove/meta", params=query, headers=headers, timeout=60).status_code == 200
    )
    answer = httpx.get(f"{serve(folder).url}/h5grove/meta", params=query, headers={"host": "evil.example"})
    assert answer.status_code == 421


def test_answers_are_bounded(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """A selection that is too large is refused before it is read, with advice. A part of it is read."""
    folder = tmp_path / "data"
    folder.mkdir()
    with h5py.File(folder / "large.h5", "w") as file:
        file.create_dataset("x", (1 << 40, 4), "<f4", chunks=(1024, 4), fillvalue=1.5)
        file["text"] = np.array(["x" * 1000] * 1000, h5py.string_dtype())
        file["y"] = np.zeros(100_000, "<f8")
        for number in range(300):
            file.attrs[f"a{number}"] = np.zeros(1000, "u1")
    with httpx.Client(base_url=serve(folder, H5FEED_MAX_BODY_BYTES=str(200_000)).url, timeout=60) as http:

        def ask(endpoint: str, **query: str) -> httpx.Response:
            return http.get(f"/h5grove/{endpoint}", params={"file": "large.h5", **query})

        wait_until(lambda: ask("meta", path="/x").status_code == 200)
        for endpoint, query in (
            ("data", {"path": "/x"}),
            ("data", {"path": "/x", "selection": "0:1000000", "format": "bin"}),
            ("data", {"path": "/text"}),
            ("data", {"path": "/y", "selection": ":20000", "format": "csv"}),
            ("stats", {"path": "/x"}),
            ("attr", {"path": "/"}),
        ):
            answer = ask(endpoint, **query)
            assert answer.status_code == 413, (query, answer.text)
            assert "selection=" in answer.json()["message"] or "attr_keys=" in answer.json()["message"]
        assert ask("data", path="/x", selection="5000000000:5000000002").json() == [[1.5] * 4] * 2
        assert ask("data", path="/text", selection="3").json() == "x" * 1000
        assert list(ask("attr", path="/", attr_keys="a7").json()) == ["a7"]


def test_one_odd_object_hurts_no_other(tmp_path: Path, serve: Callable[..., ServerProcess]) -> None:
    """A type that numpy does not have, or a name that is not UTF-8, does not affect the rest of the group."""
    folder = tmp_path / "data"
    folder.mkdir()
    with h5py.File(folder / "odd.h5", "w") as file:
        file["fine"] = np.arange(3)
        h5py.h5d.create(file.id, b"time", h5t.UNIX_D32LE, h5s.create_simple((3,)))
        file[b"latin\xe9"] = np.arange(3)
        file["<img src=x onerror=alert(1)>"] = np.arange(3)
        file.attrs.create("text", b"s\xff", dtype=h5py.string_dtype())
    with httpx.Client(base_url=f"{serve(folder).url}/h5grove", timeout=60) as http:
        wait_until(lambda: http.get("/meta", params={"file": "odd.h5"}).status_code == 200)
        found = http.get("/meta", params={"file": "odd.h5"}).json()["children"]
        kinds = {one["name"]: one["kind"] for one in found}
        assert kinds["fine"] == kinds["<img src=x onerror=alert(1)>"] == "dataset"
        assert kinds["latin\ufffd"] == "other" and kinds["time"] in ("other", "dataset")
        assert http.get("/attr", params={"file": "odd.h5"}).json()["text"] == "s\ufffd"
        assert len(http.get("/paths", params={"file": "odd.h5"}).json()) == 5
