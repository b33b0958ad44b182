"""The files of requirements/ have what pyproject.toml asks for: `make requirements` was run after the last change."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

SERVER: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
CLIENT: dict[str, Any] = tomllib.loads((ROOT / "client" / "pyproject.toml").read_text())

FILES = {
    "server.txt": ("object-store",),
    "dev.txt": ("demo", "ray", "dev", "stores", "lineage"),
    "floors.txt": ("demo", "otel", "parquet", "object-store", "ray", "dev"),
}
"""Each file, and the extras and dependency groups of the server that it has."""


def _asked_for(parts: tuple[str, ...]) -> list[Requirement]:
    groups = {**SERVER["project"]["optional-dependencies"], **SERVER["dependency-groups"]}
    lines = [*SERVER["project"]["dependencies"], *CLIENT["project"]["dependencies"]]
    lines += [line for part in parts for line in groups[part]]
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.name not in ("h5feed", "h5feed-server")]


@pytest.mark.parametrize("name", FILES)
def test_what_is_asked_for_is_pinned(name: str) -> None:
    """Each direct dependency has a version that its bound allows."""
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    wanted = _asked_for(FILES[name])
    assert len(wanted) > 15
    for one in wanted:
        versions = [
            next(iter(pin.specifier)).version
            for pin in pins
            if canonicalize_name(pin.name) == canonicalize_name(one.name)
        ]
        assert versions, f"{one} has no line in {name}: run `make requirements`"
        for version in versions:
            assert one.specifier.contains(version, prereleases=True), f"{name} has {one.name} {version}, not {one}"
