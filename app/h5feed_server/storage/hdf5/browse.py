"""Lists the objects in a file and reads their values, as a tree and in h5grove's formats.

Runs only as a child process; `browser` is the other end. Each request is handled in its own fork, see `answer_in_fork`,
so that the damage that a file does to libhdf5 ends with the request.

Protocol: a request is a line of JSON. Before it responds, the child may ask for blocks of files that are in a store,
see `piped_file`. A response is a frame of `KIND_BYTES` for its kind (``D`` data, ``E`` an error as JSON, `DIED` the
same if the fork died) and the content.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

import h5py
from h5feed.errors import (
    FeedError,
    ReadTimeout,
    SourceUnavailable,
    TooLarge,
    Unreadable,
    UnsupportedField,
)
from h5feed.stored.codecs import load_codecs
from h5feed.stored.local_file import is_away

from . import h5grove_objects, h5grove_values
from .child import DIED, KIND_BYTES, allow_many_files, answer_in_fork, confine
from .contents import Contents
from .h5grove_values import json_bytes
from .h5py_reader import files_of
from .libhdf5 import Plugins, refuse_external_links
from .piped_file import Pipe
from .text import says_away
from .tree import Tree


def _tree(contents: Contents, asked: Mapping[str, Any]) -> bytes:
    tree = Tree(contents, asked["depth"], asked["offset"], asked["limit"])
    return json_bytes(tree.at(asked["path"]), asked["max_bytes"], "use a smaller depth= or limit=")


def _meta(contents: Contents, asked: Mapping[str, Any]) -> bytes:
    said = h5grove_objects.metadata(contents, asked["path"], asked["resolve_links"])
    return json_bytes(said, asked["max_bytes"], "GET /v1/datasets/NAME/tree lists the group page by page")


def _attr(contents: Contents, asked: Mapping[str, Any]) -> bytes:
    values = h5grove_objects.attributes(contents, asked["path"], asked["attr_keys"], asked["max_bytes"])
    return json_bytes(values, asked["max_bytes"], "select some with attr_keys=")


def _paths(contents: Contents, asked: Mapping[str, Any]) -> bytes:
    found = h5grove_objects.paths(contents, asked["path"], asked["resolve_links"])
    return json_bytes(found, asked["max_bytes"], "request a group in it with path=")


def _data(contents: Contents, asked: Mapping[str, Any]) -> bytes:
    dataset = _readable(contents, asked["path"])
    options = (asked[name] for name in ("selection", "flatten", "dtype", "format", "max_bytes"))
    return h5grove_values.data(dataset, *options)


def _stats(contents: Contents, asked: Mapping[str, Any]) -> bytes:
    dataset = _readable(contents, asked["path"])
    said = h5grove_values.stats(dataset, asked["selection"], asked["max_bytes"])
    return json_bytes(said, asked["max_bytes"], "")


_ANSWERS: Mapping[str, Callable[[Contents, Mapping[str, Any]], bytes]] = {
    "tree": _tree,
    "meta": _meta,
    "attr": _attr,
    "paths": _paths,
    "data": _data,
    "stats": _stats,
}


def _readable(contents: Contents, path: str) -> h5py.Dataset:
    """Return the array at a path, after checking that it can be read safely."""
    place = h5grove_objects.found(contents, path, "only_valid")[1]
    if place is None or not isinstance(place.item, h5py.Dataset):
        raise UnsupportedField(f"{path} is not an array, so it has no values")
    return contents.readable(place)


# The child process ---------------------------------------------------------------------------------------------------


def _answer(request: Mapping[str, Any], plugins: Plugins, answers: int) -> tuple[bytes, bytes]:
    contents = Contents(*files_of(request["files"], Pipe(answers, sys.stdin.fileno())), plugins)
    try:
        content = _ANSWERS[request["ask"]](contents, request)
        contents.check_unchanged()
        return b"D".ljust(KIND_BYTES), content
    except Exception as error:
        return _problem(_reason(error, contents))


def _reason(error: Exception, contents: Contents) -> FeedError:
    if isinstance(error, FeedError):
        return error
    if isinstance(error, MemoryError):
        return TooLarge("this needs more memory than a request may use: request a part with selection=")
    text = str(error) or type(error).__name__
    if isinstance(error, FileNotFoundError) or (isinstance(error, OSError) and is_away(error)) or says_away(text):
        return SourceUnavailable("a file cannot be read at the moment; try again soon", retry_after=1)
    return Unreadable(f"HDF5 cannot read it: {contents.reason(error)}")


def _cause_of_death(number: int, timeout: float) -> FeedError:
    if number == signal.SIGALRM:
        return ReadTimeout(f"reading took more than {timeout:g} s (H5FEED_READ_TIMEOUT)")
    if number == signal.SIGKILL:
        return Unreadable("the system killed the reader, most likely because this takes too much memory")
    return Unreadable("reading it crashed HDF5" + (f" ({signal.Signals(number).name})" if number else ""))


def _problem(error: FeedError, kind: bytes = b"E") -> tuple[bytes, bytes]:
    return kind.ljust(KIND_BYTES), json.dumps([error.code, error.detail]).encode()


def main(memory_bytes: int, timeout: float) -> None:
    """Handle requests until standard input ends.

    Parameters
    ----------
    memory_bytes : int
        Bound on the address space of this process and its forks.
    timeout : float
        Seconds for each request.
    """
    refuse_external_links()
    allow_many_files()
    answers = confine(memory_bytes)
    load_codecs()
    plugins = Plugins()
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        if not answer_in_fork(
            lambda request=request: _answer(request, plugins, answers),  # type: ignore[misc]
            lambda number: b"".join(_problem(_cause_of_death(number, timeout), DIED)),
            timeout,
            answers,
        ):
            return


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
