"""``h5feed-server build`` and ``inspect``, as people type them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pytest
import scipy.sparse
from h5feed.errors import BadParameter
from h5feed_server.builder import BuildOptions, build
from h5feed_server.builder.options import parse_size, read_options

from tests.support.fork_server import COMMANDS


def _run(*words: object, width: int = 80) -> subprocess.CompletedProcess[str]:
    return COMMANDS.run([*map(str, words)], COLUMNS=str(width))


def test_a_dry_run_writes_nothing(pets: Path, tmp_path: Path) -> None:
    ran = _run("build", pets, "-o", tmp_path / "pets.h5", "--size", "48", "--val", "0.1", "--test", "12", "--dry-run")
    assert ran.returncode == 0, ran.stderr
    for said in ("120 rows of 48×48×3 uint8", "train_test_split", "cat", "zstd", "advice:", "nothing was written"):
        assert said in ran.stdout
    assert not list(tmp_path.iterdir())


def test_options_from_a_file_and_the_command_line(pets: Path, tmp_path: Path) -> None:
    """Those of the command line come first."""
    lines = ['size = "32x40"', "val = 0.1", "split-seed = 7", 'colour = "grey"', "stratify = false"]
    (tmp_path / "build.toml").write_text("\n".join(lines))
    out = tmp_path / "pets.h5"
    ran = _run("build", pets, "-o", out, "--config", tmp_path / "build.toml", "--colour", "bgr")
    assert ran.returncode == 0, ran.stderr
    assert "built" in ran.stdout and "108 train, 12 val" in ran.stdout
    with h5py.File(out) as file:
        assert file["train/images"].shape == (108, 32, 40, 3)
        assert file["train/images"].attrs["channels"] == "bgr"


def test_errors_are_one_line(pets: Path, tmp_path: Path) -> None:
    """And name options as they are typed."""
    there, table = tmp_path / "there.h5", tmp_path / "table.csv"
    there.write_bytes(b""), table.write_text("label,size\n1,2\n0,3\n")
    for words, said in (
        (["build", tmp_path / "nothing", "-o", tmp_path / "x.h5"], "does not exist"),
        (["build", pets, "-o", tmp_path / "x.h5", "--resize", "squash"], "must be one of aspect, stretch, pad, none"),
        (["build", pets, "-o", tmp_path / "x.h5", "--size", "0"], "must be pixels such as 256"),
        (["build", pets, "-o", tmp_path / "x.h5", "--val", "1.5"], "--val=1.5: a fraction must be greater than 0"),
        (["inspect", tmp_path], "is a folder"),
        (["build", pets, "-o", there], "choose another name, or pass --overwrite"),
        (["build", pets, "-o", tmp_path / "x.h5", "--no-stratify"], "--no-stratify needs val or test"),
        (["build", table, "-o", tmp_path / "x.h5", "--label-column", "kind"], "='kind' is not a column of"),
    ):
        ran = _run(*words)
        assert ran.returncode == 1 and said in ran.stderr and ran.stderr.count("\n") == 1, ran.stderr
    assert sorted(tmp_path.iterdir()) == [table, there]
    ran = _run("build", table, "-o", tmp_path / "table.h5")
    assert "because of its name; for another, pass --label-column" in ran.stdout


def test_help_has_examples() -> None:
    ran = _run("build", "--help")
    assert "h5feed-server build pets/ -o pets.h5 --val 0.1 --test 0.1" in ran.stdout
    assert "train.csv" in ran.stdout and "--dry-run" in ran.stdout


def test_inspect_names_the_build_that_mends_a_file(tmp_path: Path) -> None:
    """And after that build it has nothing to say against it."""
    images = np.random.default_rng(0).integers(0, 16, (256, 24, 24, 3), np.uint8)
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.create_dataset("images", data=images, chunks=(64, 24, 24, 3), compression="gzip")
        file["labels"] = np.arange(256) % 3
        file["labels"].attrs["class_names"] = ["cat", "dog", "emu"]
    ran = _run("inspect", tmp_path / "old.h5")
    assert ran.returncode == 0, ran.stderr
    for said in ("256 rows", "chunks of", "64", "cat, dog, emu", "rows/s", "slow to shuffle: images"):
        assert said in ran.stdout
    (command,) = [line.split() for line in ran.stdout.splitlines() if line.startswith("  h5feed-server build")]
    built = _run(*command[1:])
    assert built.returncode == 0, built.stderr
    new = Path(command[command.index("-o") + 1])
    assert "the layout is good" in _run("inspect", new).stdout
    with h5py.File(new) as file:
        np.testing.assert_array_equal(file["images"][:], images)


def test_inspect_names_the_build_that_stores_a_matrix_by_rows(tmp_path: Path) -> None:
    """A copy of a matrix by columns would have to be made first, so the time of a batch is not told."""
    anndata.AnnData(scipy.sparse.random(200, 30, 0.1, "csc", "f4", random_state=0)).write_h5ad(tmp_path / "cells.h5ad")
    ran = _run("inspect", tmp_path / "cells.h5ad", width=200)
    assert (ran.returncode, ran.stderr) == (0, "") and "stored by columns: X." in ran.stdout
    (command,) = [line.split() for line in ran.stdout.splitlines() if line.startswith("  h5feed-server build")]
    built = _run(*command[1:], "--allow-missing")
    assert built.returncode == 0, built.stderr
    assert "rows/s" in _run("inspect", Path(command[command.index("-o") + 1])).stdout


def test_inspect_says_why_a_file_is_not_served(tmp_path: Path) -> None:
    (tmp_path / "broken.h5").write_bytes(b"no HDF5")
    ran = _run("inspect", tmp_path / "broken.h5")
    assert ran.returncode == 1 and "broken.h5 cannot be served" in ran.stderr


@pytest.mark.parametrize("compression", ["gzip", "lz4", "zstd"])
def test_inspect_names_the_filters_of_a_build(tmp_path: Path, compression: Any) -> None:
    """Each by the name that it was asked for by."""
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file["x"] = np.zeros((64, 1000), np.float32)
    build(tmp_path / "old.h5", tmp_path / "new.h5", BuildOptions(compression=compression))
    ran = _run("inspect", tmp_path / "new.h5", width=200)
    assert f"+ {compression} " in ran.stdout, ran.stdout


def test_inspect_looks_at_the_file_alone(tmp_path: Path) -> None:
    """Files beside it that are broken, odd or many are neither waited for nor told of."""
    for name in ("wanted", *(f"other{number}" for number in range(6)), "apples", "pears"):
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["x"] = np.zeros((8 + len(name), 2), np.float32)
            file["scalar"] = 3
            for number in range(500 if name == "pears" else 0):
                file[f"group{number}/x"] = np.zeros(number + 1)
    (tmp_path / "broken.h5").write_bytes(b"no HDF5")
    (tmp_path / "truncated.h5").write_bytes((tmp_path / "pears.h5").read_bytes()[:5000])
    (tmp_path / "h5feed.toml").write_text('[datasets.both]\nfiles = ["apples.h5", "none.h5"]\n')
    ran = _run("inspect", tmp_path / "wanted.h5")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "wanted: 14 rows" in ran.stdout
    for other in ("other", "pears", "apples", "broken", "truncated"):
        assert other not in ran.stdout


def test_inspect_says_that_a_file_is_one_of_several(tmp_path: Path) -> None:
    """Their dataset is shown as it is served, and nothing is said of files that are not of it."""
    for number in range(3):
        with h5py.File(tmp_path / f"cells{number}.h5", "w") as file:
            file["x"] = np.zeros((10, 2), np.float32)
    (tmp_path / "broken.h5").write_bytes(b"no HDF5")
    ran = _run("inspect", tmp_path / "cells1.h5")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "cells1.h5 is one of 3 files of dataset 'cells'" in ran.stdout and "cells: 30 rows" in ran.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": "big"}, "must be pixels"),
        ({"colour": "cmyk"}, "must be one of rgb, bgr, grey, rgba"),
        ({"dtype": "object"}, "must be one of uint8"),
        ({"compression": "gzip", "level": 20}, "1 … 9 with gzip"),
        ({"shards": 0}, "must be 1 or more"),
        ({"shards": 2, "split_files": True}, "cannot be combined"),
        ({"label_pattern": "(("}, "is not a regular expression"),
        ({"label_pattern": "cat"}, "needs a group"),
    ],
)
def test_options_name_what_is_wrong(options: dict[str, object], said: str) -> None:
    with pytest.raises(BadParameter) as caught:
        BuildOptions(**options)  # type: ignore[arg-type]
    assert said in str(caught.value)


def test_sizes() -> None:
    assert parse_size(224) == parse_size("224") == (224, 224)
    assert parse_size("240x320") == parse_size([240, 320]) == parse_size("240×320") == (240, 320)


def test_files_of_options_are_checked(tmp_path: Path) -> None:
    for text, said in (
        ("sise = 3", "there is no option 'sise'"),
        ("val = 'much'", "wrong type"),
        ("= 3", "not valid TOML"),
    ):
        (tmp_path / "build.toml").write_text(text)
        with pytest.raises(BadParameter, match=said):
            read_options(tmp_path / "build.toml")
