"""Files in the data folder whose names do not end as those of HDF5 files do: what the catalogue says of them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping

from ..storage.signatures import is_hdf5
from .discovery import Others, dotted, ending_of, shown

MAX_OTHER_ENDINGS = 20
"""Endings that are listed one by one."""

MAX_NAMED = 5
"""Files of such an ending that a listing names."""

_NO_DATA = (
    "names of HDF5 files end in .h5, .hdf5, .hdf or .he5; h5feed-server build packs images, tables and arrays into "
    "one, and h5feed.toml may name HDF5 files of any ending"
)


def other_files(
    others: Mapping[str, Others], known: Iterable[str], root: str, sniffed: dict[str, bool]
) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Files of other endings in a few lines: a name, files and the reason for which they are not served.

    Parameters
    ----------
    known : iterable of str
        Files that are listed elsewhere, or are parts of such.
    sniffed : dict of str to bool
        Whether a file is HDF5 in spite of its name; added to.
    """
    elsewhere: dict[str, set[str]] = {}
    for file in known:
        elsewhere.setdefault(ending_of(file), set()).add(file)
    left: list[tuple[str, int, tuple[str, ...]]] = []
    for ending, alike in others.items():
        own = elsewhere.get(ending, set())
        count = alike.count - len(own)
        if count > 0:
            left.append((ending, count, tuple(file for file in alike.examples if file not in own)[:MAX_NAMED]))
    left.sort(key=lambda line: (-line[1], line[0]))
    rest = left[MAX_OTHER_ENDINGS:]
    for ending, count, files in left[:MAX_OTHER_ENDINGS]:
        first = next((file for file in files if _is_hdf5(os.path.join(root, file), sniffed)), None)
        if first is not None:
            reason = (
                f"{shown(first)} is HDF5, but its name does not end as that of an HDF5 file does: let it end in .h5, "
                "or name it in h5feed.toml"
            )
        else:
            reason = _NO_DATA
        whose = f"{count:,} files, {shown(files[0])} among them: " if count > 1 and files else ""
        yield dotted(files[0]) if count == 1 and files else f"*{shown(ending)}", files, whose + reason
    if rest:
        number = sum(count for _, count, _ in rest)
        files = tuple(file for _, _, own in rest for file in own[:1])[:MAX_NAMED]
        yield "*", files, f"{number:,} files of {len(rest)} further endings: {_NO_DATA}"


def _is_hdf5(path: str, sniffed: dict[str, bool]) -> bool:
    if path not in sniffed:
        sniffed[path] = False
        with contextlib.suppress(OSError):
            # What a link leads to has an ending of its own, or does not lie in the data folder.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                sniffed[path] = stat.S_ISREG(os.fstat(descriptor).st_mode) and is_hdf5(descriptor)
            finally:
                os.close(descriptor)
    return sniffed[path]
