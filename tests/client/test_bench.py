"""``h5feed bench`` against real servers, over real lines: what it measures, and what it makes of it."""

from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5feed
import h5py
import numpy as np
import pytest
from h5feed.batch import Batch
from h5feed.bench.advice import advice_for, is_fed
from h5feed.bench.arguments import size
from h5feed.bench.asked import Asked
from h5feed.bench.findings import Findings, Rate, Single, Training
from h5feed.bench.observe import Observer
from h5feed.bench.probe import Probe
from h5feed.bench.report import as_text, verdict
from h5feed.bench.streams import drained
from h5feed.blocks import Block, blocks_of
from h5feed.cli import main
from h5feed.errors import BadAnswer
from h5feed.fetching.readahead import ReadAhead
from h5feed.net.concurrency import Link, Pace

from tests.support.photographs import encoded, photograph
from tests.support.server_process import ServerProcess
from tests.support.slow_link import Line
from tests.support.terminal import on_terminal

ROWS = 600
SIDE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pictures` (uint8), `photos` (JPEG), `floats` (of pixels), `dear` (chunks of many rows), `tiny` (8 rows)."""
    path = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (ROWS, SIDE, SIDE, 3), np.uint8)
    with h5py.File(path / "pictures.h5", "w") as file:
        file["images"], file["labels"] = pixels, np.arange(ROWS) % 4
    with h5py.File(path / "floats.h5", "w") as file:
        file["images"], file["labels"] = pixels.astype(np.float32) / 255, np.arange(ROWS) % 4
    with h5py.File(path / "dear.h5", "w") as file:
        # Every shuffled batch costs the unpacking of all rows: a tenth of a second, beside which all else is short even
        # on a machine that is busy with something else.
        many = np.concatenate([pixels & 15] * 16)
        file.create_dataset("images", data=many, chunks=(300, SIDE, SIDE, 3), compression="gzip", compression_opts=1)
        file["labels"] = np.arange(len(many)) % 4
    with h5py.File(path / "tiny.h5", "w") as file:
        file["x"], file["y"] = random.random((8, 3)), np.arange(8)
    files = [encoded(photograph(row, 96, 96), quality=60) for row in range(48)]
    with h5py.File(path / "photos.h5", "w") as file:
        file["images"] = np.frombuffer(b"".join(files), np.uint8)
        file["images"].attrs.update({"encoding": "jpeg", "shape": (96, 96, 3), "resize": "aspect"})
        file["images.offsets"] = np.cumsum([0, *map(len, files)])
        file["labels"] = np.arange(48) % 4
    return path


@pytest.fixture(scope="module")
def server(folder: Path, serve_module: Callable[..., ServerProcess]) -> ServerProcess:
    return serve_module(folder)


@pytest.fixture
def line(server: ServerProcess) -> Iterator[Callable[..., Line]]:
    """Makes lines to the server: ``line(rate=1e6)``."""
    made: list[Line] = []

    def make(**properties: float) -> Line:
        made.append(Line(server.port, **properties))
        return made[-1]

    yield make
    for each in made:
        each.close()


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What a bench prints as JSON."""
    assert main(["bench", *arguments, "--json"]) == 0
    printed: dict[str, Any] = json.loads(capsys.readouterr().out)
    return printed


def bounded(capsys: pytest.CaptureFixture[str], *arguments: str, seconds: int) -> dict[str, Any]:
    """What a bench prints once it had the time to find a bound, on a machine that is busy with something else."""
    for longer in (1, 3, 9):
        printed = found(capsys, *arguments, "--seconds", str(longer * seconds))
        if printed["bound"] is not None:
            break
    return printed


def options(printed: dict[str, Any]) -> dict[str, str]:
    """Option to reason."""
    return {each["option"]: each["because"] for each in printed["advice"]}


def test_everything_is_measured(server: ServerProcess, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Round trip, single requests, streams of all kinds and a training loop; numbers agree with each other."""
    arguments = ["--seconds", "10", "--batch-size", "8", "--split", "train", "--test", "0.25", "--step-ms", "20"]
    said = found(capsys, server.url, "pictures", *arguments, "--cache", str(tmp_path / "rows"))
    assert (said["dataset"], said["split"], said["rows"], said["batch_size"]) == ("pictures", "train", 450, 8)
    assert SIDE * SIDE * 3 < said["row_bytes"] < SIDE * SIDE * 3 + 200
    assert said["round_trip_seconds"] > 0 and said["single_request"]["server_seconds"] > 0
    assert said["single_request"]["server_seconds"] <= said["single_request"]["seconds"]
    rates = said["rates"]
    assert {"read-ahead", "1 connection", "batches of 2", "batches of 32", "row cache"} <= set(rates)
    for rate in rates.values():
        assert rate["rows"] > 0 and rate["rows_per_second"] == pytest.approx(rate["rows"] / rate["seconds"])
        assert rate["batches_per_second"] * rate["batch_size"] == pytest.approx(rate["rows_per_second"])
    assert 0 <= rates["1 connection"]["server_share"] <= 1
    assert said["fed_from_step_seconds"] == pytest.approx(8 / rates["read-ahead"]["rows_per_second"])
    assert said["training"]["step_seconds"] == 0.02 and said["training"]["steps"] >= 1
    assert 0 < said["training"]["utilisation"] <= 1
    assert said["bound"] in ("server", "batches", "round trips", "sockets", "machine", "link")
    assert said["verdict"][0].startswith("Training does not wait for data as long as a step of 8 rows takes more than")
    assert "MLPerf Storage" in said["verdict"][1]
    assert any((tmp_path / "rows").rglob("*.rows"))


def test_what_is_printed(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """A heading, requests, a table with bars and the verdict; phases as plain lines on standard error."""
    assert main(["bench", server.url, "pictures", "--seconds", "2"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"pictures at {server.url}: 600 rows of 3.1 kB (split all), shuffled batches of 64")
    assert "round trip: " in out and " reading on the server" in out and "█" in out
    assert "Training does not wait for data as long as a step of 64 rows takes more than" in out
    assert max(map(len, out.splitlines())) <= 100
    phases = [each.split("%", 1)[1].strip() for each in err.splitlines()]
    assert phases[:4] == ["round trip", "single requests", "read-ahead", "connections"]


def test_eight_rows(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """A dataset smaller than a batch is read again and again."""
    said = found(capsys, server.url, "tiny", "--seconds", "2")
    assert said["rows"] == 8 and said["rates"]["read-ahead"]["rows"] >= 8
    assert "a step of 8 rows" in said["verdict"][0]
    assert "same rows again" not in said["rates"]


def test_a_slow_line_is_the_bound(line: Callable[..., Line], capsys: pytest.CaptureFixture[str]) -> None:
    """2 MB/s with a round trip of 20 ms: the link bounds it, and what is advised has fewer bytes travel."""
    slow = line(delay=0.01, rate=2e6)
    said = bounded(capsys, slow.url, "floats", "--batch-size", "16", seconds=8)
    print(json.dumps(said, indent=1))
    assert said["bound"] == "link"
    assert said["round_trip_seconds"] >= 0.02
    assert said["rates"]["read-ahead"]["bytes_per_second"] < 2.2e6
    assert "by a factor of 4" in options(said)["store 'images' as uint8"]
    assert "multiples of 1/255" in options(said)["store 'images' as uint8"]
    assert not any("workers" in each or "inspect" in each for each in options(said))


def test_images_had_better_travel_encoded(line: Callable[..., Line], capsys: pytest.CaptureFixture[str]) -> None:
    """Behind a slow line, decode="client" is measured, and advised with the bytes that it spares."""
    slow = line(rate=1e6)
    said = bounded(capsys, slow.url, "photos", "--batch-size", "8", seconds=6)
    assert said["bound"] == "link"
    here = said["rates"]['decode="client"']
    assert here["rows_per_second"] > 2 * said["rates"]["read-ahead"]["rows_per_second"]
    assert "are sent per row instead of 27.7 kB" in options(said)['decode="client"']


def test_reading_is_the_bound(
    serve: Callable[..., ServerProcess], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server that unpacks chunks of 300 rows for each row, and keeps none: the file wants another layout."""
    slow = serve(folder, H5FEED_CHUNK_CACHE_BYTES="0", H5FEED_CACHE_BYTES="0")
    said = bounded(capsys, slow.url, "dear", seconds=8)
    assert said["bound"] == "server" and said["server_share"] > 0.5
    assert "decodes up to 300 bytes per byte served" in options(said)["h5feed-server inspect FILE"]
    assert 'cache="FOLDER"' not in options(said) or "epoch" in options(said)['cache="FOLDER"']


def test_a_batch_that_takes_longer_than_the_bench(
    line: Callable[..., Line], capsys: pytest.CaptureFixture[str]
) -> None:
    """Over 150 kB/s a batch of 600 rows would take 12 s: smaller ones are read in its stead."""
    slow = line(delay=0.05, rate=1.5e5)
    said = found(capsys, slow.url, "pictures", "--seconds", "8", "--batch-size", "600")
    assert said["measured_batch_size"] < 40
    assert said["fed_from_step_seconds"] > 10
    assert any("batches of" in note and "were read" in note for note in said["notes"])
    # Of a batch in one piece nothing would have come.
    assert said["rates"]["read-ahead"]["rows"] < 600


def test_no_more_bytes_than_allowed(line: Callable[..., Line], capsys: pytest.CaptureFixture[str]) -> None:
    """--max-bytes bounds what comes over the line, batches that are under way at the end of a phase included."""
    counted = line()
    said = found(capsys, counted.url, "pictures", "--seconds", "20", "--batch-size", "4", "--max-bytes", "6MB")
    assert said["rates"]["read-ahead"]["rows"] > 0 and said["seconds"] < 20
    # Heads, JSON and one batch for each stream in any case come on top.
    assert counted.received < 8e6
    assert said["bytes"] <= counted.received


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nix"], "there is no dataset 'nix'"),
        (["pictures", "--split", "train"], "Set --test, --val or --folds to divide the rows."),
        (["pictures", "--split", "test", "--test", "0"], ""),
        (["pictures", "--fields", "nix"], "nix"),
        (["pictures", "--batch-size", "0"], "--batch-size 0 must be positive"),
        (["pictures", "--step-ms", "0"], "--step-ms 0 must be positive"),
        (["pictures", "--seconds", "-1"], "--seconds -1.0 must be positive"),
        (["pictures", "--seconds", "inf"], "--seconds inf must be positive and finite"),
        (["pictures", "--step-ms", "nan"], "--step-ms nan must be positive and finite"),
    ],
)
def test_errors_are_one_line(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["bench", server.url, *arguments]) == 1
    error = capsys.readouterr().err
    assert says in error and len(error.splitlines()) == 1


def test_other_errors(
    server: ServerProcess,
    serve: Callable[..., ServerProcess],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """No server, no token, no number."""
    assert main(["bench", "http://127.0.0.1:9", "pictures", "--deadline", "0.5"]) == 1
    assert "Is the server running" in capsys.readouterr().err
    locked = serve(folder, H5FEED_TOKENS="secret")
    assert main(["bench", locked.url, "pictures"]) == 1
    assert "token" in capsys.readouterr().err
    assert main(["bench", locked.url, "tiny", "--token", "secret", "--seconds", "0.5"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["bench", server.url, "pictures", "--max-bytes", "much"])
    assert left.value.code == 2 and "500MB" in capsys.readouterr().err


def test_other_commands_name_options(server: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    """What Python calls test=, the command line calls --test."""
    assert main(["stats", server.url, "pictures", "--split", "train"]) == 1
    assert "Set --test, --val or --folds to divide the rows." in capsys.readouterr().err


def _disturbed(
    command: list[str], disturb: Callable[[subprocess.Popen[str]], None], seconds: float
) -> tuple[int, str, str]:
    """Exit code, output and errors of a bench that something happens to when it has its first streams."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    watchdog = threading.Timer(seconds, process.kill)
    watchdog.start()
    try:
        assert process.stderr is not None
        for each in process.stderr:
            if each.endswith("connections\n"):
                break
        disturb(process)
        out, err = process.communicate(timeout=seconds)
        return process.returncode, out, err
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()


def test_ctrl_c(line: Callable[..., Line]) -> None:
    """An interrupt prints what was found until then; a shell sees that it was one."""
    slow = line(rate=5e6)
    # Whoever runs this may have it ignored, which children inherit.
    run = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    run += "from h5feed.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", run, "bench", slow.url, "pictures", "--seconds", "16"]
    code, out, err = _disturbed(command, lambda process: process.send_signal(signal.SIGINT), 60)
    assert code == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert "read-ahead, chose" in out and "Training does not wait for data as long as" in out


def test_a_server_that_dies(serve: Callable[..., ServerProcess], server: ServerProcess) -> None:
    """What was found until then is printed, and the error is that of all commands."""
    mortal = serve(server.folder)
    with h5feed.connect(mortal.url, deadline=60) as feed:
        # The deadline below is too short for the inspection.
        feed["pictures"].batch(0)
    command = [sys.executable, "-m", "h5feed.cli", "bench", mortal.url, "pictures", "--seconds", "8", "--deadline", "1"]
    code, out, err = _disturbed(command, lambda _: mortal.kill(), 120)
    assert code == 1, err
    assert "no complete response" in err and "Traceback" not in err
    assert "read-ahead, chose" in out and "Training does not wait for data as long as" in out


def test_on_a_terminal(server: ServerProcess) -> None:
    """On a terminal of 80 columns a bar moves, and the report has colours and bars and is not cut."""
    pytest.importorskip("rich")
    text = on_terminal([sys.executable, "-m", "h5feed.cli", "bench", server.url, "pictures", "--seconds", "2"])
    assert "\x1b[32m" in text and "━" in text and "rows/s" in text
    report = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text[text.rindex("pictures at") :]).replace("\r", "")
    assert "█" in report and "Training does not wait for data as long as" in report
    assert "…" not in report and max(map(len, report.splitlines())) <= 80


def test_sizes() -> None:
    """As people write them."""
    written = {"1000": 1000, "2kB": 2000, "500MB": 500_000_000, "1.5 GB": 1_500_000_000, "64MiB": 64 << 20}
    assert {text: size(text) for text in written} == written


NEAR = Findings(
    "http://a:8000",
    "photos",
    "train",
    rows=10_000,
    batch_size=64,
    row_bytes=100_000.0,
    measured_batch=64,
    readahead=64 << 20,
    round_trip=0.001,
    single=Single(rows=40, nbytes=4_000_000, seconds=0.045, reading=0.005, again=0.005),
    default=Rate("read-ahead", 1000, 100_000_000, 1.0, 64),
    width=2,
)
"""Of a link of 100 MB/s: 1,000 rows a second."""


def rate(rows_per_second: int, what: str = "", batch_size: int = 64, **known: Any) -> Rate:
    return Rate(what, rows_per_second, 100_000 * rows_per_second, 1.0, batch_size, **known)


@pytest.mark.parametrize(
    ("known", "bound", "advised"),
    [
        ({}, "link", {'cache="FOLDER"': "10 s"}),
        # Over the Unix socket there is no link, and no round trip, that could be the limit.
        ({"is_local": True}, "machine", {}),
        ({"is_local": True, "default": rate(10_000)}, "machine", {}),
        ({"is_local": True, "fixed": [rate(500, connections=1), rate(1900, connections=16)]}, "machine", {}),
        # What was faster by chance is not advised, what was so again is.
        ({"fixed": [rate(900, connections=1), rate(1500, connections=2)]}, "link", {}),
        (
            {"fixed": [rate(900, connections=1), rate(1500, connections=2, confirmed=True)]},
            "link",
            {"connections=2": "1.5 times"},
        ),
        ({"batch_sizes": [rate(1300, batch_size=256, confirmed=True)]}, "link", {"batch_size=256": "1.3 times"}),
        ({"batch_sizes": [rate(1300, batch_size=256)]}, "link", {}),
        (
            {"more_readahead": rate(2000, "readahead=128 << 20", confirmed=True)},
            "link",
            {"readahead=128 << 20": "2.0 times"},
        ),
        ({"cached": rate(50_000), "cache_folder": "/rows"}, "link", {"cache='/rows'": "50 times"}),
        ({"cached": rate(1100), "cache_folder": "/rows"}, "link", {}),
        ({"decoded_here": rate(4000), "encoded_bytes": 10_000.0}, "link", {'decode="client"': "10.0 kB are sent"}),
        ({"decoded_here": rate(1100), "encoded_bytes": 10_000.0}, "link", {}),
        # More connections than the read-ahead has found, and still more rows.
        (
            {"fixed": [rate(500, connections=1), rate(1000, connections=4), rate(1900, connections=16)]},
            "round trips",
            {},
        ),
        # From memory it would be faster.
        (
            {
                "single": replace(NEAR.single or Single(1, 1, 1, 1), seconds=0.1, reading=0.06, again=0.01),
                "again": rate(3000),
            },
            "server",
            {"more memory, or a faster disk (server)": "3.0 times"},
        ),
        # Unpacking takes all of the time, and all of the cores.
        (
            {
                "filters": ["gzip"],
                "fixed": [
                    rate(900, connections=1, server_share=0.9),
                    rate(1000, connections=2, server_share=0.95),
                    rate(1000, connections=4, server_share=0.95),
                ],
            },
            "server",
            {"h5feed-server build FILE.h5 -o NEW.h5": "gzip", "h5feed-server serve --workers N": "3.8 times"},
        ),
        # 1 GB/s of rows that are only copied.
        (
            {
                "default": rate(10_000),
                "single": Single(rows=40, nbytes=4_000_000, seconds=0.006, reading=0.002, again=0.002),
            },
            "sockets",
            {"h5feed-server serve --workers N": "1,000 MB/s"},
        ),
        # One big request comes three times as fast as many small batches, but not by chance as one batch.
        (
            {
                "default": replace(rate(1000), batch_size=1),
                "single": Single(rows=40, nbytes=4_000_000, seconds=0.014, reading=0.001),
            },
            "batches",
            {},
        ),
        ({"single": Single(rows=40, nbytes=4_000_000, seconds=0.014, reading=0.001)}, "link", {}),
    ],
)
def test_advice_follows_from_numbers(known: dict[str, Any], bound: str, advised: dict[str, str]) -> None:
    """What bounds it, and what is advised with which number; nothing else but a cache is."""
    findings = replace(NEAR, **known)
    assert findings.bound == bound
    given = {each.option: each.because for each in advice_for(findings)}
    assert set(advised) <= set(given) <= {*advised, 'cache="FOLDER"'}
    for option, number in advised.items():
        assert number in given[option]
    for each in given:
        assert each in as_text(findings)
    assert not findings.is_local or "the link" not in as_text(findings)


@pytest.mark.parametrize(
    ("step", "measured", "fed", "says"),
    [
        (0.05, None, False, "would be busy 78.1% of the time"),
        (0.1, None, True, "would be busy 100.0% of the time"),
        (0.1, 0.6, False, "is busy 60.0% of the time"),
        (0.05, 0.99, True, "there is nothing to change"),
    ],
)
def test_a_training_step(step: float, measured: float | None, fed: bool, says: str) -> None:
    """Batches come every 64 ms. What was measured counts more than what is computed; who is fed gets no advice."""
    training = None if measured is None else Training(step, 20, measured)
    findings = replace(NEAR, step=step, training=training)
    assert is_fed(findings) == fed
    assert bool(advice_for(findings)) == (not fed)
    assert says in " ".join(verdict(findings))
    assert "more than 64 ms (1,000 rows/s)" in verdict(findings)[0]


def test_a_stream_is_bounded_in_time(line: Callable[..., Line]) -> None:
    """A batch that takes longer than the time is not waited for."""
    slow = line(rate=2e5)
    with h5feed.connect(slow.url) as feed:
        dataset = feed["pictures"]
        plan = dataset.plan(batch_size=ROWS)
        reading = dataset.read_passes(plan, 0, 0)
        assert drained(reading, "", ROWS, seconds=0.5, max_bytes=1e9, tick=lambda done, now: None) is None


def test_what_comes_together_did_not_come_in_no_time() -> None:
    """Blocks of eight batches every 20 ms: the rate is theirs, also where the last of them ends the measurement."""

    def fetch(block: Block, cancelled: threading.Event) -> list[Batch]:
        time.sleep(0.02)
        rows = np.arange(100)
        return [Batch({}, rows, None, index=i, epoch=0, revision="") for i in range(block.start, block.stop)]

    pace = Pace(64_000, 1, Link(width=1, least=1, hold=1000))
    reading = ReadAhead(fetch, blocks_of(0, 8 * 30, 1000, 8000), max_bytes=64_000, deadline=60, pace=pace)
    most = 24 * 8 * np.arange(100).nbytes
    found = drained(reading, "", 100, seconds=60, max_bytes=most, tick=lambda done, now: None)
    assert found is not None and 0 < found.rows_per_second < 2 * 8 * 100 / 0.02


def test_answers_that_do_not_tell_their_time(server: ServerProcess) -> None:
    """As behind a proxy that takes Server-Timing away, here by looking at other connections: one error says so."""
    with h5feed.connect(server.url) as feed:
        probe = Probe(feed["tiny"], Observer(), Asked(), 8, 8)
        with pytest.raises(BadAnswer, match="lack Server-Timing"):
            probe.one(1, 0, 0)


def test_without_rich(
    server: ServerProcess, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is the same characters, without colours."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["bench", server.url, "tiny", "--seconds", "1"]) == 0
    assert "Training does not wait for data as long as" in out.getvalue() and "\x1b" not in out.getvalue()
    assert "read-ahead\n" in err.getvalue()
