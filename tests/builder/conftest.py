"""Sources that people have, of real photographs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.photographs import encoded, photograph


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 JPEGs of many sizes in the folders of three classes, of 60, 40 and 20."""
    root = tmp_path_factory.mktemp("source") / "pets"
    random = np.random.default_rng(0)
    number = 0
    for name, count in (("cat", 60), ("dog", 40), ("emu", 20)):
        (root / name).mkdir(parents=True)
        for index in range(count):
            height, width = random.integers(60, 200, 2).tolist()
            (root / name / f"{index:03d}.jpg").write_bytes(encoded(photograph(number, height, width), quality=90))
            number += 1
    return root
