"""The plan of an epoch: how many batches of which rows come, known before the first is fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from .frames import Frame
from .images import ImageSpec
from .wire import Tensor


@dataclass(frozen=True)
class Plan:
    """What one epoch of an order looks like, known before the first fetch."""

    rows: int
    batches: int
    batch_bytes: int
    """Bytes of one full batch on the wire."""
    params: Mapping[str, str]
    """The order spec with the revision pinned."""
    batch_size: int
    tensors: tuple[Tensor, ...]
    """What a full batch consists of when it is handed out, the row ids and weights included."""
    max_rows: int
    """Rows of one answer of the server at most."""
    max_bytes: int
    """Bytes of one answer at most."""
    last_rows: int
    """Rows of the last batch."""
    frame: Frame
    """What each batch is on the wire."""
    decoding: Mapping[str, ImageSpec]
    """Fields that come as bytes of image files, and what they are decoded to here."""
    stored: bool | None = None
    """Whether the rows are those of a split that is stored; None for all rows."""
    note: str | None = None
    """What one might not expect of the splits, and which stored ones they take the place of."""

    @cached_property
    def is_drawn(self) -> bool:
        """Whether each epoch has an order of its own."""
        return "true" in (self.params.get("shuffle"), self.params.get("balance")) or "weights" in self.params

    def of_fields(self, names: Sequence[str]) -> Plan:
        """The same order, of some of its fields as they come."""
        params = {**self.params, "fields": parameter(list(names))}
        encoded = [name for name in params.pop("encoded", "").split(",") if unquote(name) in names]
        params |= {"encoded": ",".join(encoded)} if encoded else {}
        return replace(self, params=params, frame=self.frame.only(names))


def tail_of(asked: Mapping[str, Any]) -> str:
    """What becomes of the tail."""
    return asked.get("last") or ("keep" if int(asked.get("shards") or 1) == 1 else "pad")


def names_of(given: str | Sequence[str] | None) -> list[str]:
    """Names of fields that are given as a list, or as the API writes it."""
    if isinstance(given, str):
        return [unquote(name) for name in given.split(",") if name]
    return list(given or ())


def parameter(value: object) -> str:
    """A parameter as the API writes it: fractions with a decimal point, lists with commas."""
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return np.format_float_positional(float(value), trim="0")
    if isinstance(value, (list, tuple)):
        return ",".join(quote(str(item), safe="") for item in value)
    return str(value)
