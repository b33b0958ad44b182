"""Names of the state of a dataset: by its content, or provisional.

A revision is a digest of content, which takes time to compute. Until it is known, a server names the state of its files
by their size, times and place on its disk. Such a *provisional* name has the same length, begins with `PROVISIONAL`,
and means something to this one server only. When the content is known, both names mean the same.
"""

from __future__ import annotations

PROVISIONAL = "prov-"
"""How provisional names begin. Digests of content are hexadecimal, so no such name is one."""

LENGTH = 16
"""Characters of both kinds of names. Bodies that name one or the other have the same size."""

HEADER = "h5feed-provisional"
"""Header of each response about a provisional name: see `header_of`."""

_CONTENT = "; content="


def is_provisional(revision: str) -> bool:
    """Whether a revision is a provisional name."""
    return revision.startswith(PROVISIONAL)


def header_of(provisional: str, content: str | None) -> str:
    """The value of `HEADER`: the provisional name, and the name by content if it is known."""
    return provisional if content is None else f"{provisional}{_CONTENT}{content}"


def names_in(header: str | None) -> tuple[str, str | None] | None:
    """The names in a value of `HEADER`: provisional, and by content if it is known. None if there is no such header."""
    provisional, _, content = (header or "").partition(_CONTENT)
    if not is_provisional(provisional):
        return None
    return provisional, content or None
