"""What people say of a dataset: its title, description, licence, source and citation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

_MAX_CHARS = 4000
"""Of what a file's attribute says."""

_ATTRIBUTES = {
    "title": ("title",),
    "description": ("description", "summary", "comment"),
    "licence": ("licence", "license", "rights"),
    "source": ("source", "homepage", "url", "doi", "references"),
    "citation": ("citation", "cite_as", "how_to_cite"),
}
"""Attributes of files that say it, in any case; the first that is there counts."""


class Card(BaseModel):
    """As ``h5feed.toml`` declares it. It changes nothing that is served."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str | None = Field(None, max_length=200)
    description: str | None = Field(None, max_length=_MAX_CHARS)
    licence: str | None = Field(None, max_length=_MAX_CHARS)
    source: str | None = Field(None, max_length=_MAX_CHARS)
    citation: str | None = Field(None, max_length=_MAX_CHARS)


def card_of(declared: Card, attributes: Mapping[str, Any]) -> dict[str, str]:
    """What is declared; for the rest, what attributes of the file say."""
    said = {name.lower(): value for name, value in attributes.items() if isinstance(value, str) and value.strip()}
    card: dict[str, str] = {}
    for name, keys in _ATTRIBUTES.items():
        own = getattr(declared, name)
        found = own or next((said[key] for key in keys if key in said), None)
        if found is not None:
            card[name] = found.strip()[:_MAX_CHARS]
    return card
