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
from ..extras import needing
from ..frames import MAX_BODY_BYTES
from ..images import ImageSpec
from ..net.trace import decoded_images
from ..plain_images import is_plain
from ..plan import StoredImages
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


class NotPlain(Exception):
    """An image may take long to decode: see `h5feed.plain_images`."""


def agreed_spec(stored: StoredImages, shape: tuple[int, ...], dtype: str) -> ImageSpec | str:
    """The image format of a field, if it is certain that this machine decodes to the same pixels as the server.

    The libraries must be the same, not only their pixels of some images.

    Parameters
    ----------
    shape, dtype
        Those of a decoded row.

    Returns
    -------
    ImageSpec or str
        A text gives the reason why the server should decode.
    """
    if stored.libraries is None:
        return "this server does not tell its image libraries"
    try:
        decoder = _decoder()
    except ImportError as error:
        return f"{error.name or error} is not installed: `pip install 'h5feed[decode]'`"
    if stored.libraries != decoder.libraries():
        return f"the server decodes with {stored.libraries}, but here is {decoder.libraries()}"
    known = dict(stored.about)
    if known.pop("decoder", None) != decoder.fingerprint():
        return "the same image libraries decode to other pixels on the server"
    try:
        spec = ImageSpec.of(known)
    except BadParameter as error:
        return error.detail
    return spec if (spec.shape, spec.dtype, dtype) == (shape, "uint8", "uint8") else "its pixels have another shape"


def decoded_fetch(fetch: Fetch[Batch], specs: Mapping[str, ImageSpec], pool: BufferPool) -> Fetch[Batch]:
    """Wrap `fetch` to decode the images, in the calling thread."""

    def fetch_and_decode(block: Block, cancelled: threading.Event) -> list[Batch]:
        batches = [decoded_batch(batch, specs, pool, cancelled) for batch in fetch(block, cancelled)]
        decoded_images(sum(len(batch.rows) for batch in batches))
        return batches

    return fetch_and_decode


def decoded_batch(
    batch: Batch,
    specs: Mapping[str, ImageSpec],
    pool: BufferPool,
    cancelled: threading.Event | None = None,
    *,
    only_plain: bool = False,
) -> Batch:
    """The batch with decoded images.

    Parameters
    ----------
    only_plain : bool
        Decode only what the server decodes without a time limit.

    Raises
    ------
    DatasetCorrupt
        An image is broken; the message names its row.
    NotPlain
        With `only_plain`: an image may take long to decode.
    """
    return batch.with_fields(decoded(batch, batch.rows, specs, pool, cancelled, only_plain=only_plain))


def decoded(
    arrays: Arrays,
    rows: npt.NDArray[np.int64],
    specs: Mapping[str, ImageSpec],
    pool: BufferPool,
    cancelled: threading.Event | None = None,
    *,
    only_plain: bool = False,
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
            if only_plain and not is_plain(flat[begin:end].tobytes()):
                raise NotPlain(f"row {rows[place]} of {name!r} is not a JPEG or PNG of a simple structure")
            try:
                decoder.decode_into(memoryview(flat[begin:end]), spec, out[place])
            except decoder.BrokenImage as error:
                raise DatasetCorrupt(f"row {rows[place]} of {name!r} is a broken image: {error}") from None
        decoded_arrays[name] = out
    return decoded_arrays


def _decoder() -> ModuleType:
    how = "`pip install 'h5feed[decode]'`, or use decode='server'"
    with needing("decode='client'", "image libraries", how):
        from .. import decode
    return decode
