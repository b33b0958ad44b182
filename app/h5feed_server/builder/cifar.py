"""CIFAR-10 and CIFAR-100 as distributed: batches of pixels as Python pickles or binary files.

A pickle is a program. The unpickler here knows the parts of NumPy arrays and nothing else: it never looks up a name,
so a pickle can call only what is defined below. See https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import Unreadable

from .array_source import ArraySource, NamedArray
from .members import BrokenMember, Members
from .memory_arrays import MemoryArrays
from .options import BuildOptions

_TEN = re.compile(r"(?:^|/)(data_batch_\d+|test_batch)(\.bin)?$")
_HUNDRED = re.compile(r"(?:^|/)(train|test)(\.bin)?$")
_NAMES = re.compile(r"(?:^|/)(batches\.meta|meta|batches\.meta\.txt|fine_label_names\.txt|coarse_label_names\.txt)$")
_SIDE = 32
_PIXELS = 3 * _SIDE * _SIDE
_PLAIN = re.compile(r"[<>|=]?[biuf][1248]")


def is_cifar(members: Members) -> bool:
    """Whether the files have CIFAR's names."""
    names = {member.name.rpartition("/")[2] for member in members.listing.members}
    return any(
        wanted <= names
        for wanted in (
            {"data_batch_1", "test_batch"},
            {"data_batch_1.bin", "test_batch.bin"},
            {"train", "test", "meta"},
            {"train.bin", "test.bin", "fine_label_names.txt"},
        )
    )


def cifar(members: Members, options: BuildOptions) -> ArraySource:
    """Images (32, 32, 3) and labels with class names.

    Raises
    ------
    Unreadable, BadParameter
    """
    known = members.listing.members
    hundred = not any(_TEN.search(member.name) for member in known)
    pattern = _HUNDRED if hundred else _TEN
    wanted = [
        number for number, member in enumerate(known) if pattern.search(member.name) or _NAMES.search(member.name)
    ]
    parts: dict[tuple[str, str], dict[str, npt.NDArray[Any]]] = {}
    names: dict[str, list[str]] = {}
    for number, content in members.stream(wanted):
        name = known[number].name
        if isinstance(content, BrokenMember):
            raise Unreadable(f"{name}: {content}")
        if _NAMES.search(name):
            names |= dict(_class_names(name, content))
            continue
        match = pattern.search(name)
        assert match is not None
        split = "test" if match[1].startswith("test") else "train"
        parts[split, name] = _binary(name, content, hundred) if match[2] else _pickled(name, content)
    arrays: dict[str, npt.NDArray[Any]] = {}
    for split in ("train", "test"):
        own = [parts[key] for key in sorted(parts) if key[0] == split]
        for field in own[0] if own else ():
            arrays[f"{split}/{field}"] = np.concatenate([part[field] for part in own])
    array_fields = [
        NamedArray(
            path.partition("/")[2], array.shape, array.dtype, path.partition("/")[0], path, _attributes(path, names)
        )
        for path, array in arrays.items()
    ]
    stamp = " ".join(f"{known[number].name} {known[number].stamp}" for number in wanted)
    members.close()
    return ArraySource(array_fields, MemoryArrays(arrays), options, stamp)


def _attributes(path: str, names: Mapping[str, list[str]]) -> Mapping[str, Any]:
    field = path.partition("/")[2]
    if field == "images":
        return {"channels": "rgb"}
    return {"class_names": names[field]} if field in names else {}


def _class_names(name: str, content: bytes) -> Iterator[tuple[str, list[str]]]:
    file = name.rpartition("/")[2]
    if file.endswith(".txt"):
        lines = [line.strip() for line in content.decode("utf-8", "replace").splitlines() if line.strip()]
        yield ("coarse_labels" if file.startswith("coarse") else "labels"), lines
        return
    about = _unpickled(name, content)
    for key, field in (
        ("label_names", "labels"),
        ("fine_label_names", "labels"),
        ("coarse_label_names", "coarse_labels"),
    ):
        if isinstance(about.get(key), list):
            yield (
                field,
                [item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in about[key]],
            )


def _binary(name: str, content: bytes, hundred: bool) -> dict[str, npt.NDArray[Any]]:
    """Each row is a label, or a coarse and a fine one, and the pixels."""
    ahead = 2 if hundred else 1
    if not content or len(content) % (ahead + _PIXELS):
        raise Unreadable(f"{name} has {len(content)} bytes, not a multiple of the {ahead + _PIXELS} of a row")
    rows = np.frombuffer(content, np.uint8).reshape(-1, ahead + _PIXELS)
    arrays: dict[str, npt.NDArray[Any]] = {"images": _images(rows[:, ahead:]), "labels": rows[:, ahead - 1].astype(int)}
    if hundred:
        arrays["coarse_labels"] = rows[:, 0].astype(int)
    return arrays


def _pickled(name: str, content: bytes) -> dict[str, npt.NDArray[Any]]:
    about = _unpickled(name, content)
    data = about.get("data")
    if (
        not isinstance(data, _Array)
        or data.values.ndim != 2
        or data.values.shape[1] != _PIXELS
        or data.values.dtype != "u1"
    ):
        raise Unreadable(f"{name} does not hold rows of {_PIXELS} pixels, as CIFAR's batches do")
    arrays: dict[str, npt.NDArray[Any]] = {"images": _images(data.values)}
    for key, field in (("labels", "labels"), ("fine_labels", "labels"), ("coarse_labels", "coarse_labels")):
        if isinstance(about.get(key), list):
            arrays[field] = np.array(about[key], np.int64)
    if isinstance(about.get("filenames"), list):
        arrays["filenames"] = np.array(
            [item if isinstance(item, bytes) else str(item).encode() for item in about["filenames"]]
        )
    if "labels" not in arrays or any(len(array) != len(data.values) for array in arrays.values()):
        raise Unreadable(f"{name} does not have one label for each image")
    return arrays


def _images(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """(n, 3072), plane by plane → (n, 32, 32, 3)."""
    return np.ascontiguousarray(pixels.reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1))


class _Type:
    """Stands for ``numpy.dtype``."""

    def __init__(self, code: Any, *_: Any) -> None:
        text = code.decode("latin-1") if isinstance(code, bytes) else str(code)
        if not _PLAIN.fullmatch(text):
            raise pickle.UnpicklingError(f"it contains arrays of {text!r}")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        order = state[1].decode("latin-1") if isinstance(state[1], bytes) else str(state[1])
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder("<" if order == "<" else ">")


class _Array:
    """Stands for ``numpy.ndarray``."""

    values: npt.NDArray[Any] = np.zeros(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, raw = state
        self.values = _shaped(raw, kind, shape, "F" if fortran else "C")


def _shaped(raw: Any, kind: Any, shape: Any, order: Any) -> npt.NDArray[Any]:
    if not isinstance(kind, _Type):
        raise pickle.UnpicklingError("it contains an array without a type")
    return np.frombuffer(raw, kind.dtype).reshape(shape, order="F" if order in ("F", b"F") else "C")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(raw: Any, kind: Any, shape: Any, order: Any) -> _Array:
    made = _Array()
    made.values = _shaped(raw, kind, shape, order)
    return made


def _encode(text: str, *_: Any) -> bytes:
    return text.encode("latin-1")


_KNOWN: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _from_buffer,
    ("_codecs", "encode"): _encode,
}
"""All that a pickle can name, and what that stands for here: nothing of it does more than hold values."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which CIFAR's files do not")
        return _KNOWN[module, name]


def _unpickled(name: str, content: bytes) -> dict[str, Any]:
    try:
        unpickled = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:
        # A damaged pickle may fail in any way.
        raise Unreadable(f"{name} is not a pickle file of CIFAR: {error}") from None
    if not isinstance(unpickled, dict):
        raise Unreadable(f"{name} is not a pickle file of CIFAR: it holds no dictionary")
    return {key.decode("latin-1") if isinstance(key, bytes) else str(key): value for key, value in unpickled.items()}
