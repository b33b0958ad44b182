"""Finds the parts of HDF5 files that were written as several files (split and family driver).

They are recognised by the name and superblock of the first part.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence

_FAMILY = re.compile(r"^(.*?)(\d+)(\.[^./]*)$")

SPLIT_ENDINGS = ("-m.h5", "-r.h5")
"""File names of HDF5's split driver end so: the metadata, and the raw data."""


def members_of(path: str) -> tuple[str | None, tuple[str, ...]]:
    """Return HDF5's driver for a file in several parts, and the paths of the other parts.

    Returns
    -------
    driver : str or None
        ``"split"``, ``"family"``, or None for an ordinary file.
    others : tuple of str
        Those that exist for a family; the raw data file of a split file, whether it exists or not.

    Raises
    ------
    OSError
        The file cannot be read.
    """
    driver = driver_of(path, _head_of)
    if driver == "split":
        return driver, (path.removesuffix(SPLIT_ENDINGS[0]) + SPLIT_ENDINGS[1],)
    others: list[str] = []
    if driver == "family":
        template = family_template(path)
        while os.path.exists(template % (len(others) + 1)):
            others.append(template % (len(others) + 1))
    return driver, tuple(others)


def driver_of(path: str, head_of: Callable[[str, int], bytes]) -> str | None:
    """HDF5's driver for a file in several parts, from its first one; None for an ordinary file.

    Parameters
    ----------
    path : str
    head_of : callable
        ``head_of(path, nbytes)`` returns its first bytes. Not called if its name tells already.
    """
    family = _FAMILY.match(path)
    # The members of a family are numbered from 0. Files with other names need not be opened.
    is_first = family is not None and int(family[2]) == 0
    if not is_first and not path.endswith(SPLIT_ENDINGS[0]):
        return None
    # Enough to hold the driver information in the superblock, in a file without a user block.
    head = head_of(path, 1024)
    if not head.startswith(b"\x89HDF\r\n\x1a\n"):
        return None
    if b"NCSAmult" in head and path.endswith(SPLIT_ENDINGS[0]):
        return "split"
    return "family" if b"NCSAfami" in head and is_first else None


def _head_of(path: str, nbytes: int) -> bytes:
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        return file.read(nbytes)


def next_member(path: str, others: Sequence[str]) -> str:
    """The path that the next member of a family would have, given its first member and the `others`."""
    return family_template(path) % (len(others) + 1)


def family_template(path: str) -> str:
    """The printf-style pattern of the paths of a family, from the path of its first member."""
    match = _FAMILY.match(path)
    assert match is not None
    stem, digits, ending = match.groups()
    width = f"0{len(digits)}" if len(digits) > 1 else ""
    return f"{stem.replace('%', '%%')}%{width}d{ending.replace('%', '%%')}"
