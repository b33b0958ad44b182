"""``h5feed.toml`` in the data folder: what guessing gets wrong, declared. ::

[datasets.pets]
files = ["raw/pets_*.h5"]                  # paths or patterns below the data folder
fields = { image = "photos", kind = "y" }  # name = path in the files; default: all arrays
roles = { image = "input", kind = "label" }
class_names = ["cat", "dog"]
apply = "scale"                            # unpack numbers as netCDF's attributes say

[datasets.pets.decode]                     # fields whose rows are the bytes of JPEG or PNG files
image = { shape = [224, 224, 3], resize = "aspect" }

[datasets.pets.splits]                     # native splits, as rows from … to (not included)
train = [0, 8000]
test = [[8000, 9000], [9500, 10000]]
"""

from __future__ import annotations

import fnmatch
import re
import tomllib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal

from h5feed.errors import Unreadable
from pydantic import BaseModel, ConfigDict, ValidationError

from ..split_names import SPLIT_WORDS
from .encoded import DeclaredImages

NAME = "h5feed.toml"

_SPLIT_NAME = re.compile(r"[A-Za-z0-9_.\-]+")


class DeclaredDataset(BaseModel):
    """One dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: list[str]
    fields: dict[str, str] | None = None
    roles: dict[str, Literal["input", "label", "weight", "other"]] = {}
    class_names: list[str] | None = None
    decode: dict[str, DeclaredImages] = {}
    apply: Literal["scale"] | None = None
    splits: dict[str, tuple[int, int] | list[tuple[int, int]]] = {}

    def native(self, rows: int) -> dict[str, list[tuple[int, int]]]:
        """Runs of rows of each split that is declared for a dataset of `rows` rows.

        Raises
        ------
        Unreadable
            They do not lie in the dataset, or share rows.
        """
        native: dict[str, list[tuple[int, int]]] = {}
        taken: list[tuple[int, int, str]] = []
        for name, declared in self.splits.items():
            runs = declared if isinstance(declared, list) else [declared]
            if not _SPLIT_NAME.fullmatch(name) or name == "all":
                raise Unreadable(f"{NAME}: {name!r} is no name for a split: use letters, digits, _ and -, not 'all'")
            for begin, end in runs:
                if not 0 <= begin < end <= rows:
                    raise Unreadable(
                        f"{NAME}: split {name!r}: rows {begin} to {end} are not 0 ≤ begin < end ≤ {rows}, its rows"
                    )
                taken.append((begin, end, name))
            native.setdefault(SPLIT_WORDS.get(name, name), []).extend(runs)
        taken.sort()
        for (_, end, first), (begin, _, second) in pairwise(taken):
            if begin < end:
                raise Unreadable(f"{NAME}: row {begin} lies in split {first!r} and in split {second!r}")
        return {name: sorted(runs) for name, runs in native.items()}

    def matching(self, files: Sequence[str]) -> list[str]:
        """Those of `files` that are meant, in the order of the patterns."""
        found = [file for pattern in self.files for file in sorted(files) if fnmatch.fnmatchcase(file, pattern)]
        return list(dict.fromkeys(found))


class _Declaration(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    datasets: dict[str, DeclaredDataset] = {}


def read_declared(root: Path) -> tuple[bytes, dict[str, DeclaredDataset]]:
    """The file's bytes, and the datasets that it declares; nothing where there is no such file.

    Raises
    ------
    Unreadable
        It says something that it cannot.
    """
    try:
        data = (root / NAME).read_bytes()
    except FileNotFoundError:
        return b"", {}
    except OSError as error:
        raise Unreadable(f"{NAME} cannot be read: {error.strerror}") from None
    try:
        return data, _Declaration.model_validate(tomllib.loads(data.decode())).datasets
    except ValidationError as error:
        # A key that does not exist tells more than the one that is missing instead.
        first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(DeclaredDataset.model_fields)
        what = f"there is no such key: known are {known}" if first["type"] == "extra_forbidden" else first["msg"]
        raise Unreadable(f"{NAME}: {where}: {what}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Unreadable(f"{NAME}: {error}") from None
