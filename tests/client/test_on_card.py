"""The benchmark on a card runs where there is none, as far as that goes: by the tiny model on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BACKEND = os.environ.get("KERAS_BACKEND", "jax")


def on_cpu(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.on_card", *options]
    environment = {**os.environ, "KERAS_BACKEND": BACKEND, "CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150, check=False)


def test_without_a_card() -> None:
    """One line says that there is none, and what can be measured all the same."""
    done = on_cpu()
    if BACKEND == "tensorflow":
        assert done.returncode == 1 and "set KERAS_BACKEND to torch or jax" in done.stdout
        return
    assert done.returncode == 1 and len(done.stdout.splitlines()) == 1, done.stderr
    assert "finds no CUDA GPU" in done.stdout and "--model tiny" in done.stdout


@pytest.mark.slow
def test_the_tiny_model() -> None:
    """All sources train, through real servers too, and each figure is printed with what it was measured on."""
    if BACKEND == "tensorflow":
        return
    done = on_cpu("--model", "tiny", "--batch-size", "8", "--rows", "70", "--steps", "10", "--rounds", "1")
    assert done.returncode == 0, done.stderr
    assert f"on {BACKEND}" in done.stdout and "batch size 8, 16 steps per round" in done.stdout
    ratios = dict(re.findall(r"^RATIO (\S+) ([\d.]+)$", done.stdout, re.MULTILINE))
    of_torch = {"on_card_pinned_vs_pageable"} if BACKEND == "torch" else set()
    assert set(ratios) == {"on_card_utilisation", "on_card_vs_memory", "on_card_memory_utilisation"} | of_torch
    assert all(float(ratio) > 0 for ratio in ratios.values())
