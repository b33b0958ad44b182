"""The text of the parameter ``join``: ``OTHER[@REVISION][:KEY[=OTHERKEY]]``."""

from __future__ import annotations

from typing import NamedTuple


class JoinParts(NamedTuple):
    """The parts of the text of a join, still percent-encoded.

    Attributes
    ----------
    dataset : str
    revision : str or None
        None: the current one.
    keys : str or None
        ``KEY`` or ``KEY=OTHERKEY``. None: rows are joined by their numbers.
    """

    dataset: str
    revision: str | None
    keys: str | None


def join_parts(text: str) -> JoinParts:
    """Divide the text of a join. Nothing is checked."""
    whose, colon, keys = text.partition(":")
    dataset, at, revision = whose.partition("@")
    return JoinParts(dataset, revision if at else None, keys if colon else None)
