"""Reads lists of names that PyTables wrote as pickles, without unpickling them.

PyTables pickles attributes that are neither numbers nor text, so the column names that pandas writes are pickles.
Loading a pickle can run arbitrary code. This module interprets only the opcodes that build numbers, text and lists.
"""

from __future__ import annotations

import pickletools
from typing import Any

_MARK = object()

_VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
    *("STRING", "SHORT_BINSTRING", "BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"),
)
"""Opcodes whose argument is the value."""

_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}

_IGNORED = ("PROTO", "FRAME")

_MAX_REPEATED = 1 << 20
"""Bound on the characters of values that are repeated from the memo: a short pickle could expand to a long list."""


def plain_list(data: bytes) -> list[Any] | None:
    """Return the list in a pickle: of numbers, bools, text, None and nested lists. Tuples become lists.

    Returns None if `data` is not a pickle, or is a pickle of anything else.
    """
    # "(l": a list in protocol 0, which PyTables uses; "]": an empty list, "\x80": any pickle, in later protocols.
    if not data.startswith((b"(l", b"]", b"\x80")):
        return None
    try:
        unpickled = _follow(data)
    except Exception:
        # pickletools raises various exceptions for malformed data.
        return None
    return unpickled if isinstance(unpickled, list) else None


def _follow(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    repeated = 0
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append([])
        elif name in ("LIST", "TUPLE"):
            stack.append(_popped(stack))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [_checked(stack[-count:])]
        elif name in ("APPEND", "APPENDS"):
            items = _popped(stack) if name == "APPENDS" else _checked([stack.pop()])
            # GET does not return lists, so no list can contain itself or be in two places.
            stack[-1].extend(items)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[_place(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            value = memo[_place(argument)]
            if isinstance(value, list) or value is _MARK:
                raise ValueError("a list is used twice")
            repeated += len(str(value))
            if repeated > _MAX_REPEATED:
                raise ValueError("it is much longer than its pickle")
            stack.append(value)
        elif name == "STOP":
            (value,) = _checked(stack)
            return value
        elif name not in _IGNORED:
            raise ValueError(f"{name} does more than build a list")
    raise ValueError("it has no end")


def _place(argument: Any) -> int:
    return int(argument)


def _popped(stack: list[Any]) -> list[Any]:
    """Pop the items above the last mark, and the mark."""
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _checked(items: list[Any]) -> list[Any]:
    if any(item is _MARK for item in items):
        raise ValueError("a mark is not a value")
    return items
