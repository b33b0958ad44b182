"""Shuffled batches of gzipped big images, against decoding alone and against h5py."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import h5feed
import h5py

from . import local
from .data import BATCH, COMPRESSED_ROWS, Files
from .measure import Figure, Rates, Turn, take_turns
from .served import WORKERS, epochs_of, variants

FIGURES = (
    Figure("gzip_vs_decode", variants("h5feed"), dict.fromkeys(WORKERS, "decode"), 0.75),
    Figure("gzip_vs_h5py_rows", variants("h5feed"), dict.fromkeys(WORKERS, "h5py rows"), 2.8),
    Figure("gzip_vs_h5py_fancy", variants("h5feed"), dict.fromkeys(WORKERS, "h5py fancy"), 50.0),
)


def measure(files: Files, feeds: Mapping[str, h5feed.Feed], rounds: int) -> Rates:
    """Rows per second of every contestant."""
    cores = os.cpu_count() or 1
    with contextlib.ExitStack() as stack:
        images = stack.enter_context(h5py.File(files.compressed))["images"]
        threads = stack.enter_context(ThreadPoolExecutor(cores))
        contestants: dict[str, Turn] = {}
        for variant, name in variants("h5feed").items():
            contestants[name] = epochs_of(feeds[variant][files.compressed.stem], BATCH)
        contestants["decode"] = local.decoding(files.compressed, threads, cores)
        contestants["h5py rows"] = local.by_row(images, BATCH, COMPRESSED_ROWS // BATCH)
        contestants["h5py fancy"] = local.by_selection(images, BATCH, 1)
        order = ("h5feed 1", "decode", "h5feed 2", "h5py rows", "h5py fancy")
        return take_turns({name: contestants[name] for name in order}, rounds)
