"""The grid of a picture: how many frames, and rows and columns of patches in each. No torch.

    patches of a frame of 4 x 6, in their order     0  1 |  4  5 |  8  9
                                                    2  3 |  6  7 | 10 11
                                                    -----+-------+------
                                                   12 13 | 16 17 | 20 21
                                                   14 15 | 18 19 | 22 23

Patches stand picture by picture, frame by frame, in windows of 2 x 2 that lie row by row, so that
the four patches of a window follow one another. The resampler merges windows, and frames in pairs;
an image is one frame, which is merged with itself.

Source: PaddleFormers `ernie4_5_moe_vl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Grid = tuple[int, int, int]  # frames, rows and columns of patches
Grids = Sequence[Grid]


def grids_of(grid_thw: Any, merge: int = 2) -> Grids:
    """Grids `(N, 3)`, a tensor, an array or nested lists, as numbers of the host, checked.

    Raises ValueError for a grid that has no whole windows of `merge` x `merge` patches or no whole
    pairs of frames.
    """
    rows = grid_thw.tolist() if hasattr(grid_thw, "tolist") else list(grid_thw)
    for number, row in enumerate(rows, 1):
        grid = " x ".join(map(str, row))
        if len(row) != 3 or min(row) < 1:
            raise ValueError(
                f"grid {grid} of picture {number} must be three positive numbers: frames, rows and "
                "columns of patches"
            )
        if row[1] % merge or row[2] % merge:
            raise ValueError(
                f"grid {grid} of picture {number} has rows or columns that are no multiple of "
                f"{merge}; resize to whole windows of {merge} x {merge} patches"
            )
        if row[0] > 1 and row[0] % 2:
            raise ValueError(
                f"grid {grid} of picture {number} has an odd number of frames; frames are merged "
                "in pairs: repeat the last one"
            )
    return [(int(t), int(h), int(w)) for t, h, w in rows]


def frame_lengths(grids: Grids) -> list[int]:
    """Patches of every frame."""
    return [rows * columns for frames, rows, columns in grids for _ in range(frames)]


def pieces(grids: Grids, most_patches: int) -> list[list[Grid]]:
    """The same frames in parts of at most `most_patches` where possible, with no pair of frames
    torn: tower and resampler make the same rows of the parts as of the whole.
    """
    parts: list[list[Grid]] = [[]]
    room = most_patches
    for frames, rows, columns in grids:
        unit = min(frames, 2)
        while frames:
            fitting = max(room, 0) // (unit * rows * columns) * unit
            if not fitting and parts[-1]:
                parts.append([])
                room = most_patches
                continue
            taken = min(frames, max(fitting, unit))
            parts[-1].append((taken, rows, columns))
            room -= taken * rows * columns
            frames -= taken
    return parts


def merged(grid: Grid, merge: int = 2) -> Grid:
    """What the resampler makes of a grid: pairs of frames, rows and columns of windows."""
    frames, rows, columns = grid
    return max(frames // 2, 1), rows // merge, columns // merge


def num_rows(grid: Grid, merge: int = 2) -> int:
    """Rows of the language model that a picture becomes: as many placeholder tokens it has."""
    frames, rows, columns = merged(grid, merge)
    return frames * rows * columns
