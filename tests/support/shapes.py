"""A dataset that is pleasant to look at: drawn shapes, with a field of most kinds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

ROWS = 480
SIDE = 40
CLASSES = ("circle", "triangle", "square", "star")
COLOURS = ("red", "orange", "yellow", "lime", "green", "cyan", "blue", "violet", "pink", "red")
_HUES = (0.03, 0.11, 0.19, 0.27, 0.44, 0.54, 0.71, 0.82, 0.95)
"""Where one colour ends and the next begins, on the way from red to red."""

FRAMES = 6

_CORNERS = ((0, 1), (3, 1), (4, 1), (5, 3))
"""For each class: its corners, and how many of them an edge skips over plus one."""

_FINER = 3
"""Points per pixel along each axis that are averaged."""

_ANGLES = 160

Floats = npt.NDArray[np.float64]


def _radius(kind: int, angle: Floats) -> Floats:
    """Distance of the outline from the centre, at most 1."""
    corners, skip = _CORNERS[kind]
    if not corners:
        return np.ones_like(angle)
    inside = 2 * np.arcsin(np.cos(corners * angle)) + np.pi * skip
    return np.asarray(np.cos(np.pi * skip / (2 * corners) - 0.0) / np.cos(inside / (2 * corners)), np.float64)


def _drawn(kind: int, size: float, turn: float, centre: Floats) -> Floats:
    """How much of each pixel the shape covers, (SIDE, SIDE) from 0 to 1."""
    axis = (np.arange(SIDE * _FINER) + 0.5) / _FINER
    x, y = axis[None, :] - centre[0], axis[:, None] - centre[1]
    edge = size * _normal(kind, np.arctan2(y, x) - turn)
    covered = np.hypot(x, y) <= edge
    return np.asarray(covered.reshape(SIDE, _FINER, SIDE, _FINER).mean((1, 3)), np.float64)


def _normal(kind: int, angle: Floats) -> Floats:
    """The outline, the farthest point of which is 1 away from the centre."""
    full = np.linspace(0, 2 * np.pi, 721)
    return np.asarray(_radius(kind, angle) / _radius(kind, full).max(), np.float64)


def _colour(hue: float) -> Floats:
    """(3,) red, green and blue of a strong colour, 0 to 255."""
    ramps = np.abs((hue * 6 + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1
    return np.asarray(255 * (0.15 + 0.8 * np.clip(ramps, 0, 1)), np.float64)


def write_shapes(path: Path) -> None:
    """`image`, `mask`, `turning_frames`, `contour` (a signal), `outline_points`, `caption`, `label` and numbers."""
    random = np.random.default_rng(7)
    kinds = random.choice(len(CLASSES), ROWS, p=[0.4, 0.3, 0.2, 0.1])
    sizes, turns, hues = random.normal(12, 2.4, ROWS).clip(6, 18), random.random(ROWS) * 2, random.random(ROWS)
    centres = SIDE / 2 + random.normal(0, 1.5, (ROWS, 2))
    grey = random.integers(205, 245, ROWS)
    angles = np.linspace(0, 2 * np.pi, _ANGLES, endpoint=False)
    images = np.zeros((ROWS, SIDE, SIDE, 3), np.uint8)
    masks = np.zeros((ROWS, SIDE, SIDE), np.int8)
    frames = np.zeros((ROWS, FRAMES, SIDE, SIDE, 3), np.uint8)
    contours = np.zeros((ROWS, _ANGLES), np.float32)
    points = np.zeros((ROWS, _ANGLES, 2), np.float32)
    captions: list[str] = []
    for row, kind in enumerate(kinds.tolist()):
        light = np.linspace(grey[row], grey[row] - 40, SIDE)[:, None, None]
        for frame in range(FRAMES):
            cover = _drawn(kind, sizes[row], turns[row] + frame * np.pi / 12, centres[row])[..., None]
            frames[row, frame] = cover * _colour(hues[row]) + (1 - cover) * light
            if frame == 0:
                masks[row] = (cover[..., 0] > 0.5) * (kind + 1)
        images[row] = frames[row, 0]
        contours[row] = sizes[row] * _normal(kind, angles - turns[row])
        points[row] = centres[row] + contours[row][:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        colour = COLOURS[int(np.searchsorted(_HUES, hues[row], "right"))]
        extent = "small" if sizes[row] < 10 else "large" if sizes[row] > 14 else "medium"
        captions.append(f"a {extent} {colour} {CLASSES[kind]}")
    with h5py.File(path, "w") as file:
        file.attrs["title"], file.attrs["license"] = "Drawn shapes", "CC0-1.0"
        file.attrs["description"] = "Circles, triangles, squares and stars, with masks, outlines and captions."
        images_set = file.create_dataset("image", data=images, chunks=(16, SIDE, SIDE, 3), compression="gzip")
        images_set.attrs["channels"] = "rgb"
        fields: dict[str, Any] = {"mask": masks, "turning_frames": frames}
        for name, values in fields.items():
            file.create_dataset(name, data=values, chunks=(16, *values.shape[1:]), compression="gzip", shuffle=True)
        file["contour"], file["outline_points"], file["caption"] = contours, points, captions
        labels = file.create_dataset("label", data=kinds)
        labels.attrs["class_names"] = CLASSES
        file["size"], file["hue"] = sizes.astype("f4"), hues.astype("f4")
