"""Decode images on the client: they are sent as JPEG or PNG, and decoded to the same pixels as on the server."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..blocks import Block, Fetch
from ..buffers import BufferPool
from ..errors import BadParameter, ConnectionFailed, DatasetCorrupt, TooLarge
from ..frames import MAX_BODY_BYTES
from ..images import ImageSpec
from ..wire import OFFSETS

Arrays = Mapping[str, npt.NDArray[Any]]


def specs_for(about: Mapping[str, Mapping[str, Any]]) -> dict[str, ImageSpec]:
    """The image format of each field, if this machine decodes to the same pixels as the server.

    Parameters
    ----------
    about : mapping of str to mapping
        The server's ``decode`` entry of each field.

    Raises
    ------
    ModuleNotFoundError
        The image libraries are not installed.
    BadParameter
        The image libraries here decode to different pixels than those of the server.
    """
    fingerprint = _decoder().fingerprint() if about else ""
    specs = {}
    for name, said in about.items():
        known = dict(said)
        theirs = known.pop("decoder", None)
        if theirs != fingerprint:
            raise BadParameter(
                f"decode='client' would give different pixels for {name!r} than the server, whose image libraries "
                f"differ from those here ({theirs}, not {fingerprint}): install the server's versions of Pillow, "
                "simplejpeg and opencv-python-headless, or use decode='server'"
            )
        specs[name] = ImageSpec.of(known)
    return specs


def decoded_fetch(fetch: Fetch[Batch], specs: Mapping[str, ImageSpec], pool: BufferPool) -> Fetch[Batch]:
    """Wrap `fetch` to decode the images, in the calling thread."""

    def fetch_and_decode(block: Block, cancelled: threading.Event) -> list[Batch]:
        return [decoded_batch(batch, specs, pool, cancelled) for batch in fetch(block, cancelled)]

    return fetch_and_decode


def decoded_batch(
    batch: Batch, specs: Mapping[str, ImageSpec], pool: BufferPool, cancelled: threading.Event | None = None
) -> Batch:
    """The batch with decoded images.

    Raises
    ------
    DatasetCorrupt
        An image is broken; the message names its row.
    """
    return Batch(
        decoded(batch, batch.rows, specs, pool, cancelled),
        batch.rows,
        batch.weight,
        index=batch.index,
        epoch=batch.epoch,
        revision=batch.revision,
    )


def decoded(
    arrays: Arrays,
    rows: npt.NDArray[np.int64],
    specs: Mapping[str, ImageSpec],
    pool: BufferPool,
    cancelled: threading.Event | None = None,
) -> dict[str, npt.NDArray[Any]]:
    """Same as `decoded_batch`, for arrays by field name."""
    decoder = _decoder()
    decoded_arrays = {name: array for name, array in arrays.items() if name.removesuffix(OFFSETS) not in specs}
    for name, spec in specs.items():
        flat, offsets = arrays[name], arrays[name + OFFSETS].tolist()
        nbytes = math.prod(spec.shape)
        if nbytes > MAX_BODY_BYTES:
            raise TooLarge(f"a decoded image of {name!r} takes {nbytes} bytes, more than {MAX_BODY_BYTES}")
        nbytes *= len(rows)
        out = pool.lease_or_new(nbytes).reshape(len(rows), *spec.shape)
        for place, (begin, end) in enumerate(pairwise(offsets)):
            if cancelled is not None and cancelled.is_set():
                raise ConnectionFailed("the request was cancelled")
            try:
                decoder.decode_into(memoryview(flat[begin:end]), spec, out[place])
            except decoder.BrokenImage as error:
                raise DatasetCorrupt(f"row {rows[place]} of {name!r} is a broken image: {error}") from None
        decoded_arrays[name] = out
    return decoded_arrays


def _decoder() -> ModuleType:
    try:
        from .. import decode
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"decode='client' needs image libraries, but {error.name!r} is not installed: "
            "`pip install 'h5feed[decode]'`, or use decode='server'",
            name=error.name,
        ) from None
    return decode
