"""Where a build reads and writes: local paths, or a scratch folder in place of the URLs of object stores."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from h5feed.errors import BadParameter, FeedError, Overloaded, SourceUnavailable, TooLarge

from ..settings import default_cache_dir
from ..store_address import StoreAddress
from .opening import open_source
from .options import BuildOptions
from .plan import check_output
from .progress import OnProgress
from .source import Source
from .store_files import StoreFiles
from .store_output import StoreOutput

_FOLDER = "builds"
"""Below the cache folder."""

_LOCK = ".lock"

_COLLAPSED_URL = re.compile(r"[a-z][a-z0-9+.-]+:/[^/]")
"""What `Path` makes of a URL."""


class Workplace:
    """The paths of one build, for the length of a ``with`` block. What it needs of the disk is then deleted, unless the
    same build can go on with it.

    Parameters
    ----------
    source, output : str or Path
        Paths or URLs.
    is_preview : bool
        Whether nothing will be written.

    Attributes
    ----------
    source, output : Path
        Where it is to be read, and built.
    files : StoreFiles or None
        What the files of the source stand for.
    store : StoreOutput or None
        Where the files are to be uploaded.

    Raises
    ------
    BadParameter, Unreadable, SourceUnavailable, TooLarge
    FeedError
        Another process is building the same.
    """

    def __init__(
        self,
        source: str | Path,
        output: str | Path,
        options: BuildOptions,
        on_progress: OnProgress,
        *,
        is_preview: bool = False,
    ) -> None:
        self._urls = [_is_url(source), _is_url(output)]
        self._names: dict[str, str] = {}
        """Paths in the scratch folder to what is said instead of them."""
        self._lock: int | None = None
        self.files: StoreFiles | None = None
        self.store: StoreOutput | None = None
        if not any(self._urls):
            if options.scratch is not None:
                raise BadParameter("scratch is for sources and outputs in object stores: neither of them is in one")
            self.source, self.output = Path(source), check_output(Path(output), options)
            return
        root = options.scratch or default_cache_dir() / _FOLDER
        place = f"{source if self._urls[0] else Path(source).absolute()} {output} {is_preview}"
        name = hashlib.blake2b(place.encode("utf-8", "surrogateescape"), digest_size=12).hexdigest()
        self._folder = root.absolute() / name
        self._take(str(output))
        try:
            self._set_output(output, options, on_progress)
            self._set_source(source, on_progress)
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def _set_output(self, output: str | Path, options: BuildOptions, on_progress: OnProgress) -> None:
        if not self._urls[1]:
            self.output = check_output(Path(output), options)
            return
        address, name = _split(str(output))
        if not name:
            raise BadParameter(f"{output} names a bucket: pass s3://BUCKET/PREFIX/NAME.h5")
        folder = self._folder / "output"
        folder.mkdir(exist_ok=True)
        self.output = check_output(folder / name, options)
        self.store = StoreOutput(address, folder, options.overwrite, on_progress)
        self._names[f"{folder}{os.sep}"] = f"{address.url}/"

    def _set_source(self, source: str | Path, on_progress: OnProgress) -> None:
        if not self._urls[0]:
            self.source = Path(source)
            return
        address, name = _split(str(source))
        folder = self._folder / "source"
        folder.mkdir(exist_ok=True)
        self.files = StoreFiles(address, name, folder, on_progress)
        self.source = self.files.path
        self._names[str(self.source)] = str(source).rstrip("/")

    def __enter__(self) -> Workplace:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.files is not None:
            self.files.close()
        if isinstance(error, FeedError):
            error.detail = self.in_words(error.detail)
        if self._lock is None:
            return
        # What an interrupted build has copied or built is of use for the next call.
        is_hopeless = isinstance(error, FeedError) and not isinstance(error, (TooLarge, Overloaded, SourceUnavailable))
        has_journal = any(self._folder.glob("output/.*.journal"))
        if error is None or (is_hopeless and not has_journal):
            shutil.rmtree(self._folder, ignore_errors=True)
        os.close(self._lock)
        self._lock = None

    def open_source(self, options: BuildOptions) -> Source:
        """The source, see `opening.open_source`."""
        opened = open_source(self.source, options, self.files)
        if self.files is not None:
            opened.left_out.update(self.files.left_out)
        return opened

    def in_words(self, text: str) -> str:
        """A message in which URLs stand for the paths of the scratch folder."""
        for path, url in self._names.items():
            text = text.replace(path, url)
        return text

    def _take(self, output: str) -> None:
        """Hold the scratch folder for this build."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self._folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise FeedError(f"another process is building {output} now") from None


def _is_url(place: str | Path) -> bool:
    if isinstance(place, Path) and _COLLAPSED_URL.match(str(place)):
        raise BadParameter(f"{str(place)!r} looks like a URL that was converted to a Path: pass it as a string")
    return "://" in str(place)


def _split(url: str) -> tuple[StoreAddress, str]:
    """The address above the last part of a URL, and that part; empty for a whole bucket."""
    address = StoreAddress.parse(url)
    whole = "/".join(part for part in (address.prefix, address.only) if part)
    above, _, name = whole.rpartition("/")
    return replace(address, prefix=above, only=""), name
