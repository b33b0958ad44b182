"""The plan of an epoch: its rows and batches, known before the first batch is fetched."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from .errors import BadParameter
from .frames import Frame
from .images import ImageSpec
from .joins import join_parts
from .offsets import has_masks
from .order import Last
from .ragged import Layout
from .stored.packing import Packing
from .wire import CROP, ROWS, WEIGHT, Tensor, rows_of_other

BLOCK_BYTES = 16 << 20
_WINDOWED_BLOCK_BYTES = 8 << 20
"""Less in a windowed order: the longer the blocks of all connections are together, the more often chunks of two windows
are needed at the same time, which caches may not hold."""


HARMLESS = ("epoch", "fields", "batch_size", "shard", "shards", "decode", "compress")
"""Options that may change when a pass is resumed: the state has the epoch, and the rows of a step (batch_size × shards)
by itself, loops choose their fields with ``x`` and ``y``, and arrays are the same wherever they are decoded."""

_LAID_OUT = ("pad", "max_length", "truncate", "bucket_group", "encoded")
"""Parameters that do not say what the option of the same name says."""


@dataclass(frozen=True)
class StoredImages:
    """A field that is stored as image files, which the server or the client may decode.

    Attributes
    ----------
    about : mapping of str to Any
        The server's ``decode`` entry of the field.
    libraries : str or None
        Its image libraries, see `h5feed.decode.libraries`; None: an older server, which does not say.
    file_bytes : int or None
        Bytes of all image files; None: not known before they are read.
    pixel_bytes : int
        Bytes of all rows when they are decoded.
    """

    about: Mapping[str, Any]
    libraries: str | None
    file_bytes: int | None
    pixel_bytes: int


@dataclass(frozen=True, repr=False)
class Plan:
    """The rows and batches of one epoch, known before the first batch is fetched."""

    rows: int
    batches: int
    batch_bytes: int
    """Bytes of one full batch on the wire."""
    params: Mapping[str, Any]
    """The parameters of the order, including the revision: strings, but of ``where`` a tuple of them."""
    batch_size: int
    tensors: tuple[Tensor, ...]
    """The tensors of a full batch when it is handed out, including row ids and weights; lists before they are padded or
    packed."""
    max_rows: int
    """Maximum number of rows per response."""
    max_bytes: int
    """Maximum number of bytes per response."""
    last_rows: int
    """Rows of the last batch."""
    frame: Frame
    """The tensors of each batch on the wire."""
    decoding: Mapping[str, ImageSpec]
    """Fields that arrive as image files, and the format to decode them to."""
    pieces: bool | None = None
    """Whether stored pieces are fetched instead of rows, and decoded here; None: where it is faster."""
    compress: str | None = None
    """The codec with which the server compresses pieces of what is stored without compression."""
    images: Mapping[str, StoredImages] = field(default_factory=dict)
    """Fields that are stored as image files: they arrive as pixels, but may be fetched as files and decoded here."""
    stored: bool | None = None
    """Whether the split is stored in the file; None for all rows."""
    rows_per_sample: int = 1
    """Rows of a field in one sample, at most."""
    not_by_id: str = ""
    """Why the fields of samples are not rows that can be fetched by their ids; empty if they are."""
    not_here: str = ""
    """Why rows cannot be read and decoded here; empty if they can."""
    part_rows: int = 0
    """Rows of a batch to request at once; 0: all."""
    chunk_rows: int = 1
    """Rows that are stored and decoded together."""
    dense: bool = False
    """Whether sparse rows are handed out as dense arrays."""
    unpacking: Mapping[str, Packing] = field(default_factory=dict)
    """How the numbers of fields are unpacked before they are handed out."""
    note: str | None = None
    """Anything unexpected about the splits, and which stored splits they replace."""
    asked: Mapping[str, Any] = field(default_factory=dict)
    """The options it was made with, see `OrderOptions`."""
    layout: Layout | None = None
    """How lists and text are padded or packed when a batch has arrived."""
    fill: float | None = None
    """With ``pack``: share of the places of all packed rows that hold items."""
    bucket_rows: int | None = None
    """With ``bucket``: how many rows are sorted together, which is a whole number of batches."""

    def __repr__(self) -> str:
        fields = ", ".join(self.frame.fields)
        return f"<Plan of {self.rows:,} rows in {self.batches:,} batches of {self.batch_size}, fields {fields}>"

    @cached_property
    def is_drawn(self) -> bool:
        """Whether the samples of epochs differ, or their order."""
        is_cropped = "crop" in self.params and self.params.get("crop_at", "random") == "random"
        is_shuffled = "true" in (self.params.get("shuffle"), self.params.get("balance"))
        return is_shuffled or is_cropped or "weights" in self.params

    @property
    def order(self) -> dict[str, Any]:
        """Everything that decides which samples come, when, and as which values, by name of the parameter or option:
        values that JSON has. A pass may only be resumed with an equal order. Without the revision."""
        found = {name: value for name, value in self.params.items() if name not in (*HARMLESS, *_LAID_OUT, "revision")}
        # In any order, the same rows; and JSON has no tuples.
        found |= {name: sorted(found[name]) for name in ("where", "join") if name in found}
        for name, value in self.asked.items():
            is_default = value is None or value is False or (name, value) == ("sparse", "dense")
            if name not in found and name not in HARMLESS and not is_default:
                found[name] = json.dumps(plain(name, value), sort_keys=True)
        if self.asked.get("bucket") is not None:
            # However many shards divide them.
            group = self.asked.get("bucket_group") or self.asked.get("shards") or 1
            found["bucket_group"] = f"{self.batch_size * int(group)} rows"
        return found

    @property
    def block_bytes(self) -> int:
        """Small batches are fetched in blocks of up to this size; one request per batch would be many times slower."""
        return _WINDOWED_BLOCK_BYTES if "window" in self.params else BLOCK_BYTES

    def of_fields(self, names: Sequence[str]) -> Plan:
        """The same order with only some of its fields, not decoded."""
        params = {**self.params, "fields": parameter(list(names))}
        encoded = [name for name in params.pop("encoded", "").split(",") if unquote(name) in names]
        params |= {"encoded": ",".join(encoded)} if encoded else {}
        frame, part_rows = self.frame.only(names), self.part_rows
        if part_rows and not frame.flat:
            # Fewer fields: more rows fit.
            fitting = max(1, (self.max_bytes - frame.max_bytes(0)) // frame.row_bytes)
            part_rows = fitting if fitting < self.batch_size else 0
        return replace(self, params=params, frame=frame, part_rows=part_rows)

    def of_row_ids(self) -> Plan:
        """The same order with only the ids of the rows that samples are made of."""
        joins: tuple[str, ...] = self.params.get("join", ())
        # Rows that are joined by number have the same one.
        others = [rows_of_other(unquote(join.dataset)) for join in map(join_parts, joins) if join.keys is not None]
        frame = self.frame.row_ids(others, episodes=has_masks(self.params))
        if frame.tensors.keys() <= {ROWS, WEIGHT}:
            # Any server has these.
            return self.of_fields([])
        params = {**self.params, "body": "rows"}
        if CROP not in frame.tensors:
            # Where crops begin depends on the shapes of the fields, but nothing else does.
            params["fields"] = ""
            params.pop("encoded", None)
        return replace(self, params=params, frame=frame, part_rows=0, not_here="only row ids are requested")

    @property
    def is_packed(self) -> bool:
        """Whether its rows are packed rows, each of several rows of the dataset."""
        return self.frame.packed

    def rows_of(self, index: int) -> int:
        """Rows of batch `index`."""
        return self.batch_size if index < self.batches - 1 else self.last_rows

    @property
    def parts(self) -> int:
        """Number of requests for a batch."""
        return -(-self.batch_size // self.part_rows) if self.part_rows else 1


def tail_of(asked: Mapping[str, Any]) -> Last:
    """The value of ``last``, or its default."""
    last: Last | None = asked.get("last")
    return last or ("keep" if int(asked.get("shards") or 1) == 1 else "pad")


def names_of(given: str | Sequence[str] | None) -> list[str]:
    """Field names, given as a list or as a parameter of the HTTP API."""
    if isinstance(given, str):
        return [unquote(name) for name in given.split(",") if name]
    return list(given or ())


def conditions(where: str | Sequence[str] | None) -> tuple[str, ...]:
    """The conditions of ``where``, given as one or as several.

    Raises
    ------
    BadParameter
    """
    if where is None:
        return ()
    found: tuple[Any, ...] = (where,)
    if isinstance(where, Iterable) and not isinstance(where, (str, Mapping)):
        found = tuple(where)
    for condition in found:
        if not isinstance(condition, str):
            raise BadParameter(f"where={where!r} must be a condition such as 'label in cat, dog', or a list of them")
    return found


def conditions_text(where: Sequence[str]) -> str:
    """Conditions as part of a description, such as " where width >= 200"; empty without conditions."""
    return f" where {' and '.join(where)}" if where else ""


def plain(name: str, value: Any) -> Any:
    """The value of an option, of types that JSON has.

    Raises
    ------
    BadParameter
        It has none.
    """
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): plain(name, one) for key, one in value.items()}
    if isinstance(value, list | tuple | range | np.ndarray):
        return [plain(name, one) for one in (value.tolist() if isinstance(value, np.ndarray) else value)]
    raise BadParameter(f"{name}={value!r} cannot be recorded: it is no number, text, list or mapping")


def parameter(value: object) -> str:
    """Format a parameter for the HTTP API: fractions with a decimal point, lists with commas."""
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return np.format_float_positional(float(value), trim="0")
    if isinstance(value, (list, tuple)):
        return ",".join(quoted(str(item)) for item in value)
    return str(value)


def quoted(name: str) -> str:
    """A name as a part of a URL.

    Raises
    ------
    BadParameter
    """
    try:
        return quote(name, safe="")
    except UnicodeEncodeError:
        raise BadParameter(f"{name!r} is not text: it contains half of a surrogate pair") from None
