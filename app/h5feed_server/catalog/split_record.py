"""A record of how the splits of a file were drawn. `build` writes it, and the server compares requests with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

ATTRIBUTE = "h5feed_splits"
"""Attribute of the root group with the `SplitRecord` as JSON."""


class SplitRecord(BaseModel):
    """How stored splits were drawn.

    Attributes
    ----------
    version : int
        Version of the record's format.
    rows : dict of str to int
        Number of rows of each split, in all files together.
    test, val : float, int or None
        As requested; None if there is no such split, or if it came from the source.
    split_seed, split_shuffle
        As in `SplitSpec`.
    stratify : bool
        Whether stratification by the label was requested.
    stratified_by : str or None
        The field by which rows were stratified.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    rows: dict[str, int]
    test: int | float | None = None
    val: int | float | None = None
    split_seed: int
    split_shuffle: bool
    stratify: bool
    stratified_by: str | None = None

    def words(self) -> str:
        """The record as options: ``test=0.1, val=0.1, split_seed=42, stratify=labels``."""
        shares = [f"{name}={share}" for name in ("test", "val") if (share := getattr(self, name)) is not None]
        if not self.split_shuffle:
            return ", ".join([*shares, "split_shuffle=false"])
        return ", ".join([*shares, f"split_seed={self.split_seed}", f"stratify={self.stratified_by or 'none'}"])


def read_record(files: Sequence[Mapping[str, Any]], rows: Mapping[str, int]) -> tuple[SplitRecord | None, str | None]:
    """Read the record of stored splits.

    Parameters
    ----------
    files : sequence of mapping
        Attributes of the root group of each file.
    rows : mapping of str to int
        Number of rows of each stored split.

    Returns
    -------
    record : SplitRecord or None
        None if there is no record, or if it is not valid.
    problem : str or None
        Why it is not valid.
    """
    first, *others = [attributes.get(ATTRIBUTE) for attributes in files]
    if first is None and not any(others):
        return None, None
    if not isinstance(first, str) or any(other != first for other in others):
        return None, f"the files have different attributes {ATTRIBUTE}: they are ignored"
    try:
        record = SplitRecord.model_validate_json(first)
    except ValidationError:
        return None, f"the attribute {ATTRIBUTE} is not a record of splits that this server supports: it is ignored"
    if rows != record.rows:
        return None, f"{ATTRIBUTE} is about splits of {record.rows} rows, but they have {dict(rows)}: it is ignored"
    return record, None
