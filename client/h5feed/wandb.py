"""What was trained on, for Weights & Biases: ``run.use_artifact(h5feed.wandb.artifact(train.source()))``."""

from __future__ import annotations

import re

import wandb

from .lineage import Source

_ODD = re.compile(r"[^A-Za-z0-9_.\-]+")
"""What the name of an artifact may not contain."""


def artifact(source: Source, name: str | None = None) -> wandb.Artifact:
    """An artifact that refers to the data, without copying them. Its metadata is the record for `h5feed.reopen`.

    Equal data have equal artifacts: W&B makes a new version only if something but the URL of the server has changed.

    Parameters
    ----------
    source : Source
        Of a loop (``train.source()``) or a dataset (``ds.source("train")``).
    name : str, optional
        Default: the name of the dataset and of the split.
    """
    made = wandb.Artifact(
        name or _ODD.sub("-", f"{source.dataset}.{source.split}"),
        "dataset",
        description=str(source),
        metadata=source.record(),
    )
    # The digest of an artifact is that of the names of its references, if they have no checksums.
    made.add_reference(_reference(source), name=f"{source.short}.h5feed", checksum=False)
    return made


def _reference(source: Source) -> str:
    """One URL for the data."""
    first = source.url.split(",")[0]
    return first if "://" in first else f"file://{first}"
