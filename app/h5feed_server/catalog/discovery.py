"""Finds files in the data folder and names them.

Every file is reported, except hidden ones (``.name``) and the reports that `build` writes next to its output.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..suffixes import ALL_SUFFIXES

LEFT_OUT = ".left-out.tsv"
"""Ending of the reports in which `build` lists the parts of its source that it left out."""

_EXAMPLES = 16
"""Maximum number of files of an unknown extension whose names are stored."""

_UNSERVED_LINKS = "it is a link to a folder, and these are not followed: mount the folder here, or link its files"

LEADS_OUT = (
    "is a link that leads out of the data folder: start the server with --follow-links (H5FEED_FOLLOW_LINKS=1) to "
    "follow such links"
)


@dataclass
class Others:
    """Files with the same extension, which is not one of HDF5 files: their number, and the names of the first ones."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, file: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(file)


@dataclass
class Walk:
    """The result of one scan of the data folder; all paths are relative to it.

    Attributes
    ----------
    files : list of str
        Files with extensions of HDF5 files, sorted.
    declarable : list of str
        Files with the other extensions that were requested, sorted.
    others : dict of str to Others
        All files with other extensions, by extension.
    refused : dict of str to str
        Folders that were not searched, with the reason.
    outside : set of str
        Files that are links out of the data folder.
    unlisted : dict of str to str
        Folders that could not be listed, with the reason; the data folder itself is ``""``.
    places : dict of str to (int, int)
        Device and inode of each folder that was listed.
    """

    files: list[str] = field(default_factory=list)
    declarable: list[str] = field(default_factory=list)
    others: dict[str, Others] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    outside: set[str] = field(default_factory=set)
    unlisted: dict[str, str] = field(default_factory=dict)
    places: dict[str, tuple[int, int]] = field(default_factory=dict)


def walk(root: str, endings: Collection[str] = (), besides: str | None = None, *, deep: bool = True) -> Walk:
    """Find the files below a folder, or only those directly in it if `deep` is False.

    Parameters
    ----------
    root : str
        The folder.
    endings : collection of str
        Other extensions, in lower case, that declarations name.
    besides : str, optional
        Path of a folder to skip: the cache folder of the server.
    """
    walked = Walk()
    unseen = [""]
    while unseen:
        folder = unseen.pop()
        try:
            _check_rights(os.path.join(root, folder))
            with os.scandir(os.path.join(root, folder)) as entries:
                status = os.stat(os.path.join(root, folder))
                walked.places[folder] = (status.st_dev, status.st_ino)
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.name.startswith("."):
                        continue
                    path = os.path.join(folder, entry.name)
                    if entry.is_dir(follow_symlinks=False):
                        if deep and entry.path != besides:
                            unseen.append(path)
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        walked.refused[path] = _UNSERVED_LINKS
                    else:
                        if entry.is_symlink() and leads_out(root, entry.path):
                            walked.outside.add(path)
                        _sort_in(walked, path, endings)
        except OSError as error:
            # Ignore folders that were deleted during the walk. But if the data folder itself is missing, its disk may
            # be unavailable.
            if error.errno not in (errno.ENOENT, errno.ENOTDIR) or not folder:
                walked.unlisted[folder] = str(error.strerror)
                walked.refused[folder] = f"the folder cannot be listed: {error.strerror}"
    walked.files.sort()
    walked.declarable.sort()
    return walked


def _check_rights(folder: str) -> None:
    """Raise if a folder cannot be listed or not be entered: otherwise each file in it would be listed with a reason."""
    if not os.access(folder, os.R_OK | os.X_OK):
        os.stat(folder)
        user = os.geteuid()
        raise PermissionError(
            errno.EACCES, f"the server runs as user {user}, who may not read it (chmod a+rX allows everyone to)"
        )


def leads_out(root: str, path: str) -> bool:
    """Whether a path leads out of the folder it begins with."""
    return os.path.commonpath((root, os.path.realpath(path))) != root


def _sort_in(walked: Walk, path: str, endings: Collection[str]) -> None:
    if path.lower().endswith(ALL_SUFFIXES):
        walked.files.append(path)
        return
    if path.endswith(LEFT_OUT):
        return
    ending = ending_of(path)
    walked.others.setdefault(ending, Others()).add(path)
    if ending in endings:
        walked.declarable.append(path)


def ending_of(file: str) -> str:
    """The extension in lower case with its dot; empty if there is none."""
    return os.path.splitext(file)[1].lower()


def dotted(path: str) -> str:
    """A path as a dataset name."""
    return shown(Path(path).as_posix().replace("/", "."))


def shown(path: str) -> str:
    """A path as valid Unicode. Names that are not valid UTF-8 can be neither in a URL nor in JSON."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def name_files(files: Iterable[str], taken: Collection[str] = ()) -> dict[str, str]:
    """The dataset name of each file: its path without extension, with dots for slashes.

    If two files would have the same name, they keep their extensions. If that is not enough, as for ``sub.a.h5`` and
    ``sub/a.h5`` or for names that are not valid UTF-8, a digest of the path is added.

    Parameters
    ----------
    files : iterable of str
    taken : collection of str
        Names that are in use already.
    """
    named: dict[str, str] = {}
    unnamed = sorted(files)
    for name_of in (lambda file: dotted(os.path.splitext(file)[0]), dotted, distinct):
        alike: dict[str, list[str]] = {}
        for file in unnamed:
            alike.setdefault(name_of(file), []).append(file)
        free = {name: of[0] for name, of in alike.items() if len(of) == 1 and name not in taken and name not in named}
        named |= free
        done = set(free.values())
        unnamed = [file for file in unnamed if file not in done]
    return named


def distinct(path: str) -> str:
    """A dataset name that is unique to a path."""
    return f"{dotted(path)}~{hashlib.blake2b(os.fsencode(path), digest_size=4).hexdigest()}"


def why_not_there(path: str, error: OSError) -> str | None:
    """Why a file found by a scan cannot be read; None if it has been deleted since."""
    if error.errno == errno.ELOOP:
        return "it is a link that leads back to itself"
    if error.errno == errno.ENOENT:
        return "it is a link to a missing file" if os.path.islink(path) else None
    return f"it cannot be accessed: {error.strerror}"
