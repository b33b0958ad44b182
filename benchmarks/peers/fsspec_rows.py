"""Reads shuffled rows with h5py over s3fs, one after the other: run by the interpreter that has them."""

from __future__ import annotations

import itertools
import sys

import h5py
import numpy as np
import s3fs  # type: ignore[import-not-found]


def main() -> None:
    """For each line of the standard input, a kind of cache and a number of rows, read them; prints the number."""
    port, key = sys.argv[1:]
    there = s3fs.S3FileSystem(
        anon=True, client_kwargs={"endpoint_url": f"http://127.0.0.1:{port}", "region_name": "eu-west-2"}
    )
    opened: dict[str, h5py.Dataset] = {}
    epochs = itertools.count()
    for line in sys.stdin:
        cache, count = line.split()
        if cache not in opened:
            # Its own default is a read-ahead of 50 MB.
            options = {} if cache == "default" else {"cache_type": cache}
            opened[cache] = h5py.File(there.open(key, "rb", **options))["images"]
        images = opened[cache]
        for row in np.random.default_rng(next(epochs)).permutation(len(images))[: int(count)].tolist():
            images[row]
        print(count, flush=True)


if __name__ == "__main__":
    main()
