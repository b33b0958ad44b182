"""Lists files in the data folder that do not have an extension of HDF5 files, and says why they are not served."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping

from ..storage.signatures import is_hdf5
from .declared import NAME as DECLARATION
from .discovery import Others, dotted, ending_of, shown

MAX_OTHER_ENDINGS = 20
"""Maximum number of extensions that are listed separately."""

MAX_NAMED = 5
"""Maximum number of files that are named for each extension."""

_NO_DATA = (
    "names of HDF5 files end in .h5, .hdf5, .hdf or .he5; h5feed-server build packs images, tables and arrays into "
    "one, and h5feed.toml can declare HDF5 files with any extension"
)


def other_files(
    others: Mapping[str, Others], known: Iterable[str], root: str, sniffed: dict[str, bool]
) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Summarise files with other extensions in a few lines.

    Parameters
    ----------
    others : mapping of str to Others
        Files by extension, from a scan.
    known : iterable of str
        Files that are listed elsewhere, or that such files refer to.
    root : str
        The data folder.
    sniffed : dict of str to bool
        Caches whether a file is HDF5 in spite of its name. Updated in place.

    Yields
    ------
    name : str
    files : tuple of str
        Some of the files.
    reason : str
        Why they are not served.
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
                f"{shown(first)} is an HDF5 file, but does not have the extension of one: rename it to end in .h5, or "
                "declare it in h5feed.toml"
            )
        elif count == 1 and files and os.path.basename(files[0]) == DECLARATION:
            reason = f"{DECLARATION} is only read at the top of the data folder"
        else:
            reason = _NO_DATA
        whose = f"{count:,} files, {shown(files[0])} among them: " if count > 1 and files else ""
        yield dotted(files[0]) if count == 1 and files else f"*{shown(ending)}", files, whose + reason
    if rest:
        number = sum(count for _, count, _ in rest)
        files = tuple(file for _, _, own in rest for file in own[:1])[:MAX_NAMED]
        yield "*", files, f"{number:,} files with {len(rest)} other extensions: {_NO_DATA}"


def _is_hdf5(path: str, sniffed: dict[str, bool]) -> bool:
    if path not in sniffed:
        sniffed[path] = False
        with contextlib.suppress(OSError):
            # Do not follow links: the target is listed under its own name, or is outside the data folder.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                sniffed[path] = stat.S_ISREG(os.fstat(descriptor).st_mode) and is_hdf5(descriptor)
            finally:
                os.close(descriptor)
    return sniffed[path]
