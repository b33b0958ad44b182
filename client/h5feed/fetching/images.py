"""Fetch images as JPEG or PNG files and decode them in the client, if this is certain to give the same pixels.

Rows whose images cannot be decoded here, or might take long, are fetched again as pixels: the server decides which
images are broken.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..blocks import Block
from ..errors import BadAnswer, BadParameter, DatasetCorrupt, TooLarge, UnsupportedField
from ..images import ImageSpec
from ..net.client import Client
from ..net.trace import as_tensors, decoded_images
from ..plan import Plan, names_of, parameter
from ..wire import WORTHWHILE
from .cached import Take
from .decoding import NotPlain, agreed_spec, decoded_batch
from .server import fetcher, taker

_MAX_FAILURES = 8
"""After this many consecutive requests whose images could not be decoded here, the server decodes all further ones."""

_REFUSED = (BadAnswer, BadParameter, DatasetCorrupt, NotPlain, TooLarge, UnsupportedField)
"""Errors after which the same rows are fetched as pixels."""

logger = logging.getLogger("h5feed")


class ImageFetcher:
    """Fetches blocks of a plan, and decodes images here where that is faster.

    Parameters
    ----------
    client : Client
    path : str
        URL path of the dataset.
    plan : Plan
        With `Plan.images`.

    Attributes
    ----------
    reasons : dict of str to str
        Why images of a field are not decoded here; empty for those that are.
    """

    def __init__(self, client: Client, path: str, plan: Plan) -> None:
        self._client, self._path, self._plan = client, path, plan
        self._as_pixels = fetcher(client, path, plan)
        self.reasons: dict[str, str] = {}
        self._failures = 0
        specs = {}
        # On this machine, `PieceFetcher` says why rows are tensors.
        for name in () if client.is_near else plan.images:
            found = _spec_or_reason(plan, name)
            if isinstance(found, str):
                self.reasons[name] = found
            else:
                specs[name] = found
        self._specs: Mapping[str, ImageSpec] = specs
        encoded = [*names_of(plan.params.get("encoded")), *specs]
        self._encoded = replace(
            plan, params={**plan.params, "encoded": parameter(encoded)}, frame=plan.frame.encoded(specs), images={}
        )
        self._as_files = fetcher(client, path, self._encoded)

    def __call__(self, block: Block, cancelled: threading.Event) -> list[Batch]:
        """The batches of a block, see `h5feed.blocks.Fetch`."""
        batches, why = None, ""
        # Read once: another thread may give up meanwhile.
        if specs := self._specs:
            try:
                batches = self._decoded(block, specs, cancelled)
            except _REFUSED as error:
                self._failed(error)
                why = f"images could not be decoded here: {error}"
        if batches is None:
            batches = self._as_pixels(block, cancelled)
        why = "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items()) or why
        if why:
            as_tensors(why)
        return batches

    def taker(self, revision: str) -> Take:
        """The function that fetches rows by id."""
        as_stored = names_of(self._plan.params.get("encoded"))
        of_plan = partial(taker, self._client, self._path, revision, pool=self._client.pool, as_stored=as_stored)
        as_pixels = of_plan(frame=self._plan.frame, decoding={})
        as_files = of_plan(frame=self._encoded.frame, decoding=self._specs, only_plain=True)

        def take(
            rows: npt.NDArray[np.int64], fields: Sequence[str], cancelled: threading.Event
        ) -> dict[str, npt.NDArray[Any]]:
            if self._specs.keys() & fields:
                try:
                    found = as_files(rows, fields, cancelled)
                    self._failures = 0
                    return found
                except _REFUSED as error:
                    self._failed(error)
            return as_pixels(rows, fields, cancelled)

        return take

    def _decoded(self, block: Block, specs: Mapping[str, ImageSpec], cancelled: threading.Event) -> list[Batch]:
        names, pool = self._plan.frame.names, self._client.pool
        came = self._as_files(block, cancelled)
        file_bytes = sum(batch[name].nbytes for batch in came for name in specs)
        batches = []
        for batch in came:
            found = decoded_batch(batch, specs, pool, cancelled, only_plain=True)
            batches.append(batch.with_fields({name: found[name] for name in names}))
        self._failures = 0
        decoded_images(sum(len(batch.rows) for batch in batches))
        if any(self._plan.images[name].file_bytes is None for name in specs):
            pixel_bytes = sum(batch[name].nbytes for batch in batches for name in specs)
            if file_bytes * WORTHWHILE > pixel_bytes:
                self._give_up(_not_worth_it(file_bytes, pixel_bytes))
        return batches

    def _failed(self, error: Exception) -> None:
        logger.debug("%s: fetched again as pixels: %s", self._path, error)
        self._failures += 1
        if self._failures >= _MAX_FAILURES:
            self._give_up(str(error))

    def _give_up(self, why: str) -> None:
        # Replaced, not changed: other threads may go through them.
        self.reasons = {**self.reasons, **dict.fromkeys(self._specs, why)}
        self._specs = {}


def _spec_or_reason(plan: Plan, name: str) -> ImageSpec | str:
    stored = plan.images[name]
    if stored.file_bytes is not None and stored.file_bytes * WORTHWHILE > stored.pixel_bytes:
        return _not_worth_it(stored.file_bytes, stored.pixel_bytes)
    dtype, shape = plan.frame.tensors[name]
    return agreed_spec(stored, shape, dtype.name)


def _not_worth_it(file_bytes: int, pixel_bytes: int) -> str:
    return f"{pixel_bytes:,} bytes of pixels are stored in image files of {file_bytes:,} bytes"
