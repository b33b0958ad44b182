"""Every block of README and docs runs as it stands, in order, in a clean folder."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")

import h5py
import numpy as np
import pytest

from tests.support.documentation import PAGES, ROOT, SECONDS, Reader, blocks, check_printed
from tests.support.photographs import encoded, photograph

Demo = Callable[[], tuple[Path, str]]


def _images(path: Path) -> None:
    """20 small JPEGs of each of three classes."""
    for number in range(60):
        folder = path / ("cat", "dog", "fox")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        picture = photograph(number, 48, 40) // (1 + number % 3)
        (folder / f"{number:03}.jpg").write_bytes(encoded(picture, quality=90))


def _chunked(path: Path) -> None:
    """As many people write images: in compressed chunks of a hundred."""
    images = np.random.default_rng(0).integers(0, 256, (2000, 64, 64, 3), np.uint8)
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=images, chunks=(100, 64, 64, 3), compression="gzip", compression_opts=1)
        file["images"].attrs["channels"] = "rgb"
        file["labels"] = np.arange(2000) % 3


def _several(path: Path) -> None:
    """Two datasets."""
    with h5py.File(path, "w") as file:
        file["episodes/x"], file["episodes/y"] = np.zeros((60, 4), "f4"), np.arange(60) % 2
        file["scores/values"] = np.arange(12.0)


def _breeds(path: Path) -> None:
    """A table of ids and breeds, and the images beside it."""
    (path.parent / "train").mkdir()
    lines = ["id,breed"]
    for number in range(30):
        (path.parent / "train" / f"{number:08x}.jpg").write_bytes(encoded(photograph(number, 48, 40)))
        lines.append(f"{number:08x},{('beagle', 'boxer')[number % 2]}")
    path.write_text("\n".join(lines) + "\n")


def _passengers(path: Path) -> None:
    """A table of numbers and texts."""
    lines = [f"{number},{number % 2},{20 + number % 40},{number / 7:.2f},Name {number}" for number in range(100)]
    path.write_text("\n".join(["PassengerId,Survived,Age,Fare,Name", *lines]) + "\n")


BRINGS: dict[str, Callable[[Path], None]] = {
    "pets/": _images,
    "photos/": _images,
    "old.h5": _chunked,
    "runs.h5": _several,
    "breeds.csv": _breeds,
    "passengers.csv": _passengers,
}
"""What a reader has, where the page says that it is his: "`pets/` is a folder of your images"."""


def _generators(reader: Reader) -> None:
    train, val = reader.names["train"], reader.names["val"]
    assert train.class_indices == {"cat": 0, "dog": 1, "fox": 2}
    assert not {*train.row_ids} & {*val.row_ids}
    assert not Path("backup").exists(), "training has come to its end, and cleared up"


def _loops(reader: Reader) -> None:
    if "learner" in reader.names:
        assert float(reader.names["learner"].recorder.values[-1][2]) > 0.7, "it has not learned"


def _notebook(reader: Reader) -> None:
    assert repr(reader.names["train"]) in (ROOT / "docs/how-to/notebooks.md").read_text()


def _processes(reader: Reader) -> None:
    sums = re.findall(r"sum of the weights (-?\d+\.\d+(?:e-?\d+)?)", reader.printed)
    assert len(sums) % 2 == 0
    assert [*map(float, sums[::2])] == pytest.approx([*map(float, sums[1::2])], rel=1e-6), "ranks differ"
    assert 1 + len(reader.names["rest"]) == len(reader.names["train"])


AFTER: dict[str, Callable[[Reader], None]] = {
    "docs/how-to/from-imagedatagenerator.md": _generators,
    "docs/how-to/notebooks.md": _notebook,
    "docs/how-to/other-loops.md": _loops,
    "docs/how-to/processes.md": _processes,
}
"""What a page promises of its code, beyond that it runs."""


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Runs `make demo` when it is first asked for."""
    told: list[tuple[Path, str]] = []

    def run() -> tuple[Path, str]:
        if not told:
            folder = tmp_path_factory.mktemp("demo")
            command = ["make", "--no-print-directory", "-f", str(ROOT / "Makefile"), "-o", "setup", "demo"]
            # On a terminal, where a progress bar is one line in the end.
            output, terminal = pty.openpty()
            process = subprocess.Popen(
                [*command, f"BIN={Path(sys.executable).parent}"],
                cwd=folder,
                env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
                stdout=terminal,
            )
            os.close(terminal)
            printed = b""
            with contextlib.suppress(OSError):  # when nobody is left who could write
                while received := os.read(output, 65536):
                    printed += received
            os.close(output)
            assert process.wait(SECONDS) == 0, printed.decode()
            told.append((folder, printed.decode()))
        return told[0]

    return run


@pytest.fixture
def reader(tmp_path: Path, demo: Demo) -> Iterator[Reader]:
    with pytest.MonkeyPatch.context() as patch:
        reader = Reader(tmp_path, patch, demo)
        yield reader
        reader.close()


def _cases() -> Iterator[object]:
    """Each page as it is, and once more with the blocks of each framework that it is about."""
    for page in PAGES:
        name = page.relative_to(ROOT).with_suffix("").as_posix()
        for needs in dict.fromkeys([frozenset[str](), *(block.needs for block in blocks(page))]):
            yield pytest.param(page, needs, id=" ".join([name, *sorted(needs)]))


@pytest.mark.parametrize(("page", "needs"), list(_cases()))
def test_page(page: Path, needs: frozenset[str], reader: Reader) -> None:
    """A reader who has what the page says is his comes to its end."""
    for need in needs:
        pytest.importorskip(need)
    for name in re.findall(r"`([^`\n]+)` (?:is|are)\s+(?:\w+ [^.`;]*of )?yours?\b", page.read_text()):
        BRINGS[name](reader.folder / name)
    for block in blocks(page):
        if block.skipped is None and block.needs <= needs:
            reader.run(block)
    if (check := AFTER.get(page.relative_to(ROOT).as_posix())) is not None:
        check(reader)
    assert reader.not_served() == []


def test_blocks_that_are_not_run() -> None:
    """Each says why, and they are few, but for what needs what is not on this machine: systemd, a GPU, a cluster …"""
    skipped = [block for page in PAGES for block in blocks(page) if block.skipped is not None]
    assert all(block.skipped for block in skipped)
    elsewhere = [
        block
        for block in skipped
        if block.page.name != "deploy.md"
        and not re.search("needs an? (GPU|bucket|cluster|collector|container engine|account)", str(block.skipped))
    ]
    assert len(elsewhere) <= 5, [str(block) for block in elsewhere]


def test_nothing_goes_unseen(reader: Reader) -> None:
    """Every fence is found; a block in a language that nobody has thought of, and output that differs, are errors."""
    for page in PAGES:
        fences = len(re.findall(r"^ *(```|~~~)", page.read_text(), re.MULTILINE))
        assert fences == 2 * len(list(blocks(page)))
    assert {"README.md", "splits.md", "build.md"} <= {page.name for page in PAGES}
    page = ROOT / "docs" / "none.md"
    text = "```ini\na = 1\n```\n\n- in a list:\n  ```sh\n  false\n  ```\n"
    ini, sh = blocks(page, text)
    with pytest.raises(AssertionError, match="how to run 'ini'"):
        reader.run(ini)
    with pytest.raises(AssertionError, match="false"):
        reader.run(sh)
    check_printed("of 20\n…\nend\n", "of 1,234.5\nmore\nmore\n\nend\n")
    for shown in ("of 20\nend\n", "of 20 s\n…\nend\n", "…\nend of it\n"):
        with pytest.raises(AssertionError, match="and printed is"):
            check_printed(shown, "of 1,234.5\nmore\nend\n")
