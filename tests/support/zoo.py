"""Datasets that the explorer is tried on: one with a field of each kind, and one whose names are markup."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import httpx
import numpy as np

from .waiting import wait_until

ROWS = 240
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "{{ 7*7 }}{% raw %}",
    "javascript:alert(1)",
    "a&b;c=d?e#f%2e",
    "\u202egnp.exe",
    "x" * 300,
]


def write_zoo(path: Path) -> None:
    """A dataset with a field of each kind, and some rows that training would suffer from."""
    random = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        images = random.integers(0, 256, (ROWS, 12, 10, 3), dtype=np.uint8)
        images[7] = 99
        images[20:23] = images[10]
        file["image"] = images
        file["mask"] = random.integers(0, 3, (ROWS, 12, 10)).astype("i1")
        file["clip_frames"] = random.integers(0, 256, (ROWS, 5, 8, 8, 3), dtype=np.uint8)
        file["volume"] = random.normal(size=(ROWS, 9, 8, 7)).astype("f4")
        file["spectrogram"] = random.random((ROWS, 20, 30)).astype("f4")
        file["ecg"] = np.sin(np.arange(500) / 9 + np.arange(ROWS)[:, None]).astype("f4")
        file["cloud_points"] = random.normal(size=(ROWS, 64, 3)).astype("f4")
        file["caption"] = [f"a {'Red' if row % 3 else 'blue'} thing number {row}" for row in range(ROWS)]
        labels = file.create_dataset("labels", data=np.arange(ROWS) % 3)
        labels.attrs["class_names"] = ["cat", "dog", "bird"]
        price = random.normal(size=ROWS)
        price[5] = np.nan
        file["price"] = price
        file["embedding"] = random.normal(size=(ROWS, 12))
        tokens = file.create_dataset("tokens", ROWS, h5py.vlen_dtype("i4"))
        for row in range(ROWS):
            tokens[row] = np.arange(row % 9)
        file.attrs["title"], file.attrs["license"] = "A zoo", "CC0"


def write_hostile(path: Path) -> None:
    """Names and contents that are markup wherever they are not escaped."""
    with h5py.File(path, "w") as file:
        for number, name in enumerate(HOSTILE):
            field = name.replace("/", "\u2215")
            file[field] = np.arange(30.0) + number
            file[field].attrs[name] = name
        file["text"] = [HOSTILE[row % len(HOSTILE)] for row in range(30)]
        labels = file.create_dataset("labels", data=np.arange(30) % len(HOSTILE))
        labels.attrs["class_names"] = HOSTILE
        for key in ("title", "description", "license", *HOSTILE):
            file.attrs[key] = HOSTILE[0]


def complete(http: httpx.Client, path: str) -> dict[str, Any]:
    """The JSON of a page, when all that it waits for is computed."""
    found: dict[str, Any] = {}

    def is_there() -> bool:
        answer = http.get(f"{path}{'&' if '?' in path else '?'}format=json")
        assert answer.status_code in (200, 202), answer.text
        found.clear()
        found.update(answer.json())
        return answer.status_code == 200 and not found.get("running") and not found.get("preparing")

    wait_until(is_there)
    return found
