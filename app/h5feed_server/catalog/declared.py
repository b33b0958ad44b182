"""``h5feed.toml`` in the data folder: declares datasets that are not recognised correctly. ::

[datasets.pets]
files = ["raw/pets_*.h5"]                  # paths or patterns below the data folder
fields = { image = "photos", kind = "y" }  # name = path in the files; default: all arrays
roles = { image = "input", kind = "label" }
class_names = ["cat", "dog"]
rows_along = 0                             # axis of the rows, such as 2 for the slices of volumes (x, y, slices)
stack = false                              # true: each file is one row; false: rows are along its first axis
classes = false                            # true: arrays (or groups, or files) are classes, their names the labels
episodes = true                            # false: groups with the same members are not joined
apply = "scale"                            # unpack numbers according to netCDF's attributes
growing = false                            # true: rows are added while the file is served

[datasets.pets.decode]                     # fields whose rows are the bytes of JPEG or PNG files
image = { shape = [224, 224, 3], resize = "aspect" }

[datasets.pets.splits]                     # native splits: first row, and the row after the last
train = [0, 8000]
test = [[8000, 9000], [9500, 10000]]

[datasets.pets.card]                       # for people; no part of the revision
title = "Cats and dogs"
licence = "CC BY 4.0"

[stores.imagenet]                          # its datasets are named imagenet.…
url = "s3://bucket/prefix"
listing_seconds = 300                      # default: that of the settings
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from h5feed.errors import BadParameter, Unreadable
from h5feed.suggestions import did_you_mean
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..store_address import SCHEMES, StoreAddress
from ..suffixes import ALL_SUFFIXES
from .card import Card
from .discovery import LEADS_OUT, ending_of, leads_out
from .encoded import DeclaredImages
from .grouping.names import natural
from .split_names import SPLIT_WORDS

NAME = "h5feed.toml"

_SPLIT_NAME = re.compile(r"[A-Za-z0-9_.\-]+")

MAX_NAME = 200
"""Maximum number of characters of a declared name."""

MAX_BYTES = 16 << 20
"""Of the whole file: declarations of ten thousand datasets have a few MB."""

MAX_DOTS = 200
"""In one line, outside quotes. The parser needs time that grows with the square of the parts of a key."""

_QUOTED = re.compile(r"\"(?:[^\"\\]|\\.)*\"|'[^']*'")

MOST_STORES = 16
"""Stores that one file may mount: each has threads and connections of its own."""

_STORE_NAME = re.compile(r"[A-Za-z0-9_\-]+")

_SECRET = re.compile(r"key|secret|token|passw|credential|account|user|signature|sas|auth|profile", re.IGNORECASE)
_SETTING = re.compile(r"endpoint|region|base_url", re.IGNORECASE)

_UNNAMEABLE = re.compile(r"[/\x00-\x1f\x7f-\x9f]")


class DeclaredDataset(BaseModel):
    """The declaration of one dataset."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: list[str]
    fields: dict[str, str] | None = None
    roles: dict[str, Literal["input", "label", "weight", "other"]] = {}
    class_names: list[str] | None = None
    rows_along: int | None = Field(None, ge=0, le=31)
    stack: bool | None = None
    classes: bool | None = None
    episodes: bool | None = None
    decode: dict[str, DeclaredImages] = {}
    apply: Literal["scale"] | None = None
    splits: dict[str, tuple[int, int] | list[tuple[int, int]]] = {}
    growing: bool = False
    card: Card = Card()

    @model_validator(mode="after")
    def _has_rows_in_one_way(self) -> Self:
        if self.rows_along and self.growing:
            raise ValueError("growing = true is about rows along the first axis: leave out rows_along")
        if self.rows_along is not None and self.stack:
            raise ValueError("stack = true makes each file one row, but rows_along makes rows of each file: use one")
        return self

    def native(self, rows: int) -> dict[str, list[tuple[int, int]]]:
        """Return the ranges of rows of each declared split, for a dataset of `rows` rows.

        Raises
        ------
        Unreadable
            A split has an invalid name or rows outside the dataset, or splits overlap.
        """
        native: dict[str, list[tuple[int, int]]] = {}
        taken: list[tuple[int, int, str]] = []
        for name, declared in self.splits.items():
            runs = declared if isinstance(declared, list) else [declared]
            if not _SPLIT_NAME.fullmatch(name) or name == "all":
                raise Unreadable(f"{NAME}: {name!r} is not a valid split name: use letters, digits, _ and -, not 'all'")
            for begin, end in runs:
                if not 0 <= begin < end <= rows:
                    raise Unreadable(
                        f"{NAME}: split {name!r}: rows {begin} to {end} are not 0 ≤ begin < end ≤ {rows} (its rows)"
                    )
                taken.append((begin, end, name))
            native.setdefault(SPLIT_WORDS.get(name, name), []).extend(runs)
        taken.sort()
        for (_, end, first), (begin, _, second) in pairwise(taken):
            if begin < end:
                raise Unreadable(f"{NAME}: row {begin} is both in split {first!r} and in split {second!r}")
        return {name: sorted(runs) for name, runs in native.items()}

    def matching(self, files: Sequence[str]) -> list[str]:
        """Those of `files` that the declaration names, in the order of its patterns."""
        ordered = sorted(files, key=lambda file: (natural(file), file))
        matches = [file for pattern in self.files for file in ordered if _is_meant(pattern, file)]
        return list(dict.fromkeys(matches))

    def unmatched(self, files: Sequence[str]) -> list[str]:
        """Patterns that match none of `files`."""
        return [pattern for pattern in self.files if not any(_is_meant(pattern, file) for file in files)]


def _is_meant(pattern: str, file: str) -> bool:
    if file == pattern:
        return True
    if not fnmatch.fnmatchcase(file, pattern):
        return False
    # A pattern without an extension matches only HDF5 files, not notes and tables next to them.
    return file.lower().endswith(ALL_SUFFIXES) or ending_of(file) == ending_of(pattern)


class DeclaredStore(BaseModel):
    """A store that is served below a name. Address of the service and credentials are those of the environment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    listing_seconds: float | None = Field(None, ge=1, allow_inf_nan=False)

    @field_validator("url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        try:
            StoreAddress.parse(url)
        except BadParameter as error:
            raise ValueError(error.detail) from None
        return url

    @property
    def address(self) -> StoreAddress:
        return StoreAddress.parse(self.url)


@dataclass(frozen=True)
class Declaration:
    """The contents of ``h5feed.toml``.

    Attributes
    ----------
    datasets : dict of str to DeclaredDataset
        Valid declarations, by name.
    stores : dict of str to DeclaredStore
        Stores to mount, by name.
    refused : dict of str to Refusal
        Invalid ones, by the name under which they are listed.
    """

    datasets: Mapping[str, DeclaredDataset] = field(default_factory=dict)
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    stores: Mapping[str, DeclaredStore] = field(default_factory=dict)

    def endings(self) -> frozenset[str]:
        """Extensions of all file names and patterns in the declarations."""
        patterns = [pattern for dataset in self.datasets.values() for pattern in dataset.files]
        patterns += [pattern for refusal in self.refused.values() for pattern in refusal.files]
        return frozenset(map(ending_of, patterns))


@dataclass(frozen=True)
class Refusal:
    """Why a declaration is invalid, and the files and patterns in it."""

    reason: str
    files: tuple[str, ...] = ()

    def matching(self, files: Sequence[str]) -> list[str]:
        return [file for file in files if any(_is_meant(pattern, file) for pattern in self.files)]


def read_declared(root: Path, *, follow_links: bool, is_of_store: bool = False) -> Declaration:
    """Read ``h5feed.toml`` in a folder. The result is empty if there is no such file.

    An error in one dataset makes that declaration invalid; an error of the whole file, all of them.

    Parameters
    ----------
    root : Path
        The folder, without links in its path.
    follow_links : bool
        Whether to read the file if it is a link out of the folder.
    is_of_store : bool
        Whether the folder is that of a store, which can mount no others.
    """
    if not follow_links and leads_out(str(root), str(root / NAME)):
        return Declaration({}, {NAME: Refusal(f"{NAME} {LEADS_OUT}")})
    try:
        # O_NONBLOCK: opening a FIFO would block forever.
        with open(root / NAME, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return Declaration({}, {NAME: Refusal(f"{NAME} is not a regular file: it is ignored")})
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            return Declaration({}, {NAME: Refusal(f"{NAME} has more than {MAX_BYTES} bytes: it is ignored")})
        said = tomllib.loads(_of_short_keys(content.decode()))
    except FileNotFoundError:
        return Declaration()
    except OSError as error:
        if not os.access(root, os.X_OK):
            # The folder is not accessible, so the file may not exist. The scan reports the folder.
            return Declaration()
        return Declaration({}, {NAME: Refusal(f"{NAME} cannot be read: {error.strerror}")})
    except RecursionError:
        return Declaration({}, {NAME: Refusal(f"{NAME}: lists or tables are nested too deeply: the file is ignored")})
    except (ValueError, UnicodeDecodeError) as error:
        return Declaration({}, {NAME: Refusal(f"{NAME}: {error}: the file is ignored")})
    datasets: dict[str, DeclaredDataset] = {}
    refused: dict[str, Refusal] = {}
    tables, mounts = said.pop("datasets", {}), said.pop("stores", {})
    if said:
        key = next(iter(said))
        known = did_you_mean(key, ["datasets", "stores"], "there are datasets and stores")
        refused[NAME] = Refusal(f"{NAME}: {key}: there is no such key: {known}")
    if not isinstance(tables, dict):
        return Declaration({}, {NAME: Refusal(f"{NAME}: datasets must be a table: write [datasets.NAME]")})
    for name, table in tables.items():
        if not name or name in (".", "..") or len(name) > MAX_NAME or _UNNAMEABLE.search(name):
            quoted = json.dumps(name[: MAX_NAME + 1], ensure_ascii=False)
            reason = (
                f"{NAME}: a URL cannot contain the name {quoted}: use 1 to {MAX_NAME} characters without slashes and "
                "control characters, and neither '.' nor '..'"
            )
            refused[f"{NAME}: {quoted}"] = Refusal(reason, _patterns(table))
            continue
        try:
            datasets[name] = DeclaredDataset.model_validate(table)
        except ValidationError as error:
            # Prefer an error about an unknown key: a missing key may be a consequence of it.
            first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
            where = ".".join(str(part) for part in ("datasets", name, *first["loc"]))
            what = _no_key(first["loc"]) if first["type"] == "extra_forbidden" else first["msg"]
            refused[name] = Refusal(f"{NAME}: {where}: {what}", _patterns(table))
    stores, bad = _stores_of(mounts, is_of_store=is_of_store)
    return Declaration(datasets, refused | bad, stores)


def _stores_of(tables: Any, *, is_of_store: bool) -> tuple[dict[str, DeclaredStore], dict[str, Refusal]]:
    """The stores to mount, and why the others are not, by the names under which they are listed."""
    stores: dict[str, DeclaredStore] = {}
    if tables and is_of_store:
        return {}, {"stores": Refusal(f"{NAME}: stores: only {NAME} in the server's own data folder can mount stores")}
    if not isinstance(tables, dict):
        return {}, {"stores": Refusal(f"{NAME}: stores must be a table: write [stores.NAME]")}
    refused: dict[str, Refusal] = {}
    for name, table in tables.items():
        where, why = name, ""
        if not _STORE_NAME.fullmatch(name) or len(name) > MAX_NAME:
            where = json.dumps(name[: MAX_NAME + 1], ensure_ascii=False)
            why = f"use 1 to {MAX_NAME} letters, digits, _ and - as the name of a store"
        elif len(stores) == MOST_STORES:
            why = f"at most {MOST_STORES} stores can be mounted"
        else:
            try:
                store = DeclaredStore.model_validate(table)
            except ValidationError as error:
                first = min(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
                where = ".".join(str(part) for part in (name, *first["loc"]))
                unknown = first["type"] == "extra_forbidden"
                why = _no_key_of_store(first["loc"], table) if unknown else first["msg"].removeprefix("Value error, ")
            else:
                if (same := next((key for key, one in stores.items() if one.address == store.address), None)) is None:
                    stores[name] = store
                else:
                    why = f"stores.{same} has the same url"
        if why:
            refused[f"stores.{name[:MAX_NAME]}"] = Refusal(f"{NAME}: stores.{where}: {why}")
    return stores, refused


def _no_key_of_store(place: Sequence[int | str], table: Mapping[str, Any]) -> str:
    """The message for an unknown key in the table of a store; it shows no values, which may be secret."""
    key, url = str(place[-1]), table.get("url")
    scheme = SCHEMES.get(url.partition("://")[0].lower()) if isinstance(url, str) else None
    if _SECRET.search(key):
        how = scheme.credentials if scheme else "set the variables of its kind of store"
        return f"credentials must not be in {NAME}. In the server's environment, {how}"
    if _SETTING.search(key):
        names = ", ".join(scheme.endpoint) if scheme and scheme.endpoint else "AWS_ENDPOINT_URL or AWS_REGION"
        return f"there is no such key: address and region of the service come from the server's environment ({names})"
    return f"there is no such key: {did_you_mean(key, DeclaredStore.model_fields)}"


def _of_short_keys(text: str) -> str:
    """The text.

    Raises
    ------
    ValueError
        A key has so many parts that parsing it would take forever.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.count(".") > MAX_DOTS and _QUOTED.sub("", line).count(".") > MAX_DOTS:
            raise ValueError(f"more than {MAX_DOTS} dots outside quotes (at line {number})")
    return text


def _no_key(place: Sequence[int | str]) -> str:
    """The message for an unknown key in the table of a dataset, with a suggestion."""
    in_images = len(place) > 1 and place[0] == "decode"
    table = DeclaredImages if in_images else DeclaredDataset
    return f"there is no such key: {did_you_mean(str(place[-1]), table.model_fields)}"


def followed(
    declaration: Declaration, files: Sequence[str], partly: bool = False
) -> tuple[dict[str, DeclaredDataset], dict[str, tuple[list[str], str]]]:
    """Divide declarations into those that can be followed, given the existing files, and the rest.

    Parameters
    ----------
    declaration : Declaration
    files : sequence of str
        The existing files.
    partly : bool
        `files` are only some of the files: ignore declarations of others.

    Returns
    -------
    declared : dict of str to DeclaredDataset
    refused : dict of str to (list of str, str)
        The rest: the files that are named, and why the declaration cannot be followed.
    """
    declared: dict[str, DeclaredDataset] = {}
    refused = {name: (refusal.matching(files), refusal.reason) for name, refusal in declaration.refused.items()}
    if partly:
        refused = {name: (meant, reason) for name, (meant, reason) in refused.items() if meant or name == NAME}
    for name, dataset in declaration.datasets.items():
        missing = [] if partly else dataset.unmatched(files)
        if partly and not dataset.matching(files):
            continue
        if not missing and dataset.files:
            declared[name] = dataset
            continue
        # Refuse a dataset with missing files: users could not tell it from the complete one.
        what = f"no file matches {missing[0][:MAX_NAME]!r}" if missing else "files is empty"
        reason = (
            f"{NAME}: datasets.{name}: {what}; paths are relative to the data folder, hidden files are not served, and "
            "a pattern without an extension only matches files with extensions of HDF5"
        )
        refused[name] = (dataset.matching(files), reason)
    return declared, refused


def _patterns(table: Any) -> tuple[str, ...]:
    """The files and patterns that a possibly invalid table names."""
    files = table.get("files") if isinstance(table, dict) else None
    return tuple(item for item in files if isinstance(item, str)) if isinstance(files, list) else ()
