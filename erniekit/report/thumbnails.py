"""Small copies of the pictures that a model was asked about, as text that a page can hold.

Made of the rows that the model reads, so they show what it saw, not what the file holds: resized,
upright, over white; of a clip the first frame. A copy has at most SIDE pixels a side, a prompt at
most MOST copies; `num_pictures` tells how many there are.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ernie.vision.processor import Picture

SIDE = 144  # pixels: a JPEG of a few kilobytes, of noise at most 10
MOST = 8
_FORM = re.compile(r"data:image/jpeg;base64,[A-Za-z0-9+/]+={0,2}")


def thumbnails(pictures: Sequence[Picture], merge: int) -> dict[str, Any]:
    """What the record of an answer has of its pictures, of `merge` x `merge` patches a token:
    `pictures`, the first of them with kind and data URL, and `num_pictures`; {} without any.
    """
    if not pictures:
        return {}
    copies = [
        {"type": p.kind, "thumbnail": _data_url(first_frame(p, merge))} for p in pictures[:MOST]
    ]
    return {"num_pictures": len(pictures), "pictures": copies}


def first_frame(picture: Picture, merge: int) -> np.ndarray:
    """Its pixels `(H, W, 3)` uint8: the way back from `ernie.vision.processor.put_patches`."""
    _, h, w = picture.grid
    patch = int((picture.rows.shape[1] // 3) ** 0.5)
    rows = picture.rows[: h * w].reshape(h // merge, w // merge, merge, merge, 3, patch, patch)
    return rows.transpose(0, 2, 5, 1, 3, 6, 4).reshape(h * patch, w * patch, 3)


def is_thumbnail(value: Any) -> bool:
    """Whether a value is a URL of this module, which leads nowhere."""
    return isinstance(value, str) and _FORM.fullmatch(value) is not None


def _data_url(pixels: np.ndarray) -> str:
    from PIL import Image

    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "JPEG", quality=70)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
