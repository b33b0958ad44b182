"""Lists of names that PyTables wrote as pickles, read without running what a pickle can run.

PyTables pickles each attribute that is no number and no text, so that pandas' names of columns are pickles. To load one
is to run whatever its author wrote; here only the opcodes that put numbers, text and lists together are followed.
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
"""Characters of texts that are named again: a few bytes could stand for many."""


def plain_list(data: bytes) -> list[Any] | None:
    """The list of numbers, texts, None and lists of them that `data` is the pickle of; tuples become lists.

    None where it is something else, or more than that.
    """
    # (lp0 and the like: protocol 0, which PyTables asks for; ]: protocols above.
    if not data.startswith((b"(l", b"]", b"\x80")):
        return None
    try:
        unpickled = _follow(data)
    except Exception:
        # pickletools raises whatever its readers stumble over.
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
            # The list itself may not be among them, nor be put into two places.
            stack[-1].extend(items)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[_place(argument)] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            value = memo[_place(argument)]
            if isinstance(value, list) or value is _MARK:
                raise ValueError("a list is there twice")
            repeated += len(str(value))
            if repeated > _MAX_REPEATED:
                raise ValueError("it is much longer than its pickle")
            stack.append(value)
        elif name == "STOP":
            (value,) = _checked(stack)
            return value
        elif name not in _IGNORED:
            raise ValueError(f"{name} does more than to put a list together")
    raise ValueError("it does not end")


def _place(argument: Any) -> int:
    return int(argument)


def _popped(stack: list[Any]) -> list[Any]:
    """What lies above the last mark."""
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _checked(items: list[Any]) -> list[Any]:
    if any(item is _MARK for item in items):
        raise ValueError("a mark is no value")
    return items
