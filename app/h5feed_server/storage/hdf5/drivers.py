"""Files that HDF5 wrote one file into: which they are, told by the first one's name and superblock."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

_FAMILY = re.compile(r"^(.*?)(\d+)(\.[^./]*)$")

SPLIT_ENDINGS = ("-m.h5", "-r.h5")
"""Of the metadata and of the raw data, by HDF5's split driver."""


def members_of(path: str) -> tuple[str | None, tuple[str, ...]]:
    """HDF5's driver for a file that it wrote in parts, and the paths of the other parts."""
    family = _FAMILY.match(path)
    # HDF5 counts from 0, whatever file it is given. Files of other names need not be opened to tell.
    is_first = family is not None and int(family[2]) == 0
    if not is_first and not path.endswith(SPLIT_ENDINGS[0]):
        return None, ()
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        # Where the superblock names the driver, in a file without a user block.
        head = file.read(1024)
    if not head.startswith(b"\x89HDF\r\n\x1a\n"):
        return None, ()
    if b"NCSAmult" in head and path.endswith(SPLIT_ENDINGS[0]):
        return "split", (path.removesuffix(SPLIT_ENDINGS[0]) + SPLIT_ENDINGS[1],)
    if b"NCSAfami" in head and is_first:
        template = family_template(path)
        others: list[str] = []
        while os.path.exists(template % (len(others) + 1)):
            others.append(template % (len(others) + 1))
        return "family", tuple(others)
    return None, ()


def next_member(path: str, others: Sequence[str]) -> str:
    """The path of the part that a family would go on in, were it there, after its first and all others."""
    return family_template(path) % (len(others) + 1)


def family_template(path: str) -> str:
    """The pattern of the names of a family, from that of its first member."""
    match = _FAMILY.match(path)
    assert match is not None
    stem, digits, ending = match.groups()
    width = f"0{len(digits)}" if len(digits) > 1 else ""
    return f"{stem.replace('%', '%%')}%{width}d{ending.replace('%', '%%')}"
