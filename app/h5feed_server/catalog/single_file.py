"""Finds the other files in a file's folder that form datasets together with it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from h5feed.errors import Unreadable

from ..suffixes import ALL_SUFFIXES
from .declared import followed, read_declared
from .discovery import walk
from .grouping.families import families


def files_of_family(root: Path, name: str) -> list[str]:
    """Return the files that the catalogue inspects together with this one, including the file itself.

    Parameters
    ----------
    root : Path
        The file's folder, without links in its path.
    name : str
        Name of the file in the folder.

    Raises
    ------
    Unreadable
        The file cannot be served.
    """
    declaration = read_declared(root, follow_links=True)
    # Search subfolders only if a declaration of the file names them: the folder may be a home folder.
    means = (dataset for dataset in declaration.datasets.values() if dataset.matching([name]))
    deep = any("/" in pattern for dataset in means for pattern in dataset.files)
    walked = walk(str(root), declaration.endings(), deep=deep)
    known = sorted([*walked.files, *walked.declarable])
    declared, unfollowed = followed(declaration, known)
    for meant, why in unfollowed.values():
        if name in meant:
            raise Unreadable(f"{name} cannot be served: {why}")
    claimed = {file for dataset in declared.values() for file in dataset.matching(known)}
    divided = families(sorted({*walked.files, *claimed}), declared)
    together = next((family.files for family in divided if name in family.files), None)
    if together is None:
        raise Unreadable(f"{name} is not served: names must end in {_list(ALL_SUFFIXES)}, and not begin with a dot")
    return list(together)


def _list(items: Sequence[str]) -> str:
    return f"{', '.join(items[:-1])} or {items[-1]}"
