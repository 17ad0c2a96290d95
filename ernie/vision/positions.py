"""Where the tokens of a sequence with pictures stand, and which experts they go to. No torch.

A picture is a run of placeholder tokens, as many as the resampler makes rows. Its tokens stand on a
grid of their own: (time, height, width) counted from where the text stopped, and the text goes on
behind the largest of these numbers. Text tokens have three equal numbers.

    token      User : <start> # # # # # # <end> What       picture of 2 x 3 windows
    time        0   1    2    3 3 3 3 3 3   6    7
    height      0   1    2    3 3 3 4 4 4   6    7
    width       0   1    2    3 4 5 3 4 5   6    7
    modality    0   0    1    1 1 1 1 1 1   1    0

Source: PaddleFormers `ernie4_5_moe_vl`, which is how the released models were trained. Where others
differ this follows it:

- The markers around a picture go to the vision experts (its `get_token_type_ids`; transformers'
  `moe_mm_token_type_ids` too). Published servers send them to the text experts.
- After a video that has more pairs of frames than rows and columns of windows, the text goes on
  behind the last pair. transformers goes on behind the rows and columns, among the frames.
- Images and videos share one placeholder; the grid tells which is which. transformers has another
  one for videos, which is taken for the same here.

Legend: T tokens of one sequence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ernie.config import ErnieConfig
from ernie.vision.grids import Grids, merged, num_rows


def is_placeholder(token_ids_T: np.ndarray | Sequence[int], config: ErnieConfig) -> np.ndarray:
    """Which tokens stand for a row of a picture, bool `(T,)`."""
    return np.isin(token_ids_T, _given(config.im_patch_id, config.video_token_id))


def modality_of(token_ids_T: np.ndarray | Sequence[int], config: ErnieConfig) -> np.ndarray:
    """0 for tokens of the text experts, 1 for those of the vision experts, int64 `(T,)`."""
    markers = _given(
        config.image_start_token_id,
        config.image_end_token_id,
        config.video_start_token_id,
        config.video_end_token_id,
    )
    vision = np.isin(token_ids_T, markers) | is_placeholder(token_ids_T, config)
    return vision.astype(np.int64)


def positions_of(
    token_ids_T: np.ndarray | Sequence[int], grids: Grids, config: ErnieConfig
) -> np.ndarray:
    """Positions (time, height, width) of the tokens of one sequence, int64 `(3, T)`.

    The next token stands at the largest of them plus one. `grids` are those of the sequence's
    pictures, in order. Raises ValueError where placeholders and grids do not belong together.
    """
    assert config.vision_config is not None
    merge = config.vision_config.spatial_merge_size
    is_place_T = is_placeholder(token_ids_T, config)
    columns, at, position = [], 0, 0
    for number, grid in enumerate(grids, 1):
        size = num_rows(grid, merge)
        begin = at + int(np.argmax(np.append(is_place_T[at:], True)))
        num_found = int(is_place_T[begin : begin + size].sum())
        if num_found < size:
            raise ValueError(
                f"picture {number} with grid {' x '.join(map(str, grid))} needs {size} placeholder "
                f"tokens in a row, but {num_found} stand at token {begin}; give one for each row "
                "of the resampler"
            )
        columns.append(np.tile(np.arange(position, position + begin - at), (3, 1)))
        position += begin - at
        blocks = merged(grid, merge)
        columns.append(position + np.indices(blocks).reshape(3, -1))
        position += max(blocks)
        at = begin + size
    if is_place_T[at:].any():
        raise ValueError(
            f"{int(is_place_T[at:].sum())} placeholder tokens are left behind those of "
            f"{len(grids)} pictures; give the grid of every picture"
        )
    columns.append(np.tile(np.arange(position, position + len(is_place_T) - at), (3, 1)))
    return np.concatenate(columns, axis=1)


def _given(*token_ids: int | None) -> list[int]:
    return [i for i in token_ids if i is not None]
