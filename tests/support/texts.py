"""A dataset whose rows differ in length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np

ROWS = 203
_random = np.random.default_rng(3)
LENGTHS = np.minimum(60, np.exp(_random.normal(np.log(9), 1, ROWS)).astype(int))
LENGTHS[[4, 90]] = 0
TOKENS = [_random.integers(1, 500, length).astype(np.int32) for length in LENGTHS]
TEXTS = [_random.integers(97, 123, int(length) % 13).astype(np.uint8).tobytes() for length in LENGTHS]
FIELDS: dict[str, list[Any]] = {
    "tokens": TOKENS,
    "marks": [(tokens % 3).astype(np.int8) for tokens in TOKENS],
    "scores": [np.sqrt(tokens[:7]).astype(np.float32) for tokens in TOKENS],
    "text": [np.frombuffer(text, np.uint8) for text in TEXTS],
    "code": [np.frombuffer(text[:5], np.uint8) for text in TEXTS],
}


def write_texts(folder: Path) -> None:
    """Lists as flat items with offsets in chunks, and of variable length; text of variable and of fixed length."""
    with h5py.File(folder / "texts.h5", "w") as file:
        offsets = np.concatenate([[0], np.cumsum(LENGTHS)])
        items = np.concatenate(TOKENS)
        file.create_dataset("tokens", data=items, chunks=(64,), compression="gzip")
        file["tokens.offsets"] = offsets
        file["marks"], file["marks.offsets"] = np.concatenate(FIELDS["marks"]), offsets
        file.create_dataset("scores", (ROWS,), h5py.vlen_dtype("<f4"))
        for row, values in enumerate(FIELDS["scores"]):
            file["scores"][row] = values
        file["text"] = np.array(TEXTS, h5py.string_dtype())
        file["code"] = np.array([text[:5] for text in TEXTS], "S5")
        file["labels"] = (LENGTHS % 3).astype(np.uint8)
        file["number"] = np.arange(ROWS)
