"""Make the demo data of stage VL-SFT: small pictures, questions about them and captions.

    python examples/data/make_pictures.py

writes, beside this file, sft_vl-train_demo1.jsonl (20 samples, type erniekit) of pictures of all
kinds that examples/vl_pictures.py draws, captions.jsonl (12) of those that show two shapes, and the
pictures, of 84 x 84 pixels, into the folder pictures.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from vl_pictures import KINDS, Example, example  # noqa: E402

NUM_SAMPLES, NUM_CAPTIONS = 20, 12


def record(one: Example, name: str) -> dict[str, Any]:
    """Save a picture; the sample of it."""
    one.image.save(HERE / f"pictures/{name}.png", optimize=True)
    return {
        "image_info": [{"image_url": f"pictures/{name}.png", "matched_text_index": 0}],
        "text_info": [
            {"text": one.question, "tag": "mask"},
            {"text": one.answer, "tag": "no_mask"},
        ],
    }


def main() -> None:
    draw, kinds = random.Random(1), list(KINDS)
    (HERE / "pictures").mkdir(exist_ok=True)
    for file, prefix, named in (
        ("sft_vl-train_demo1", "question", [kinds[i % len(kinds)] for i in range(NUM_SAMPLES)]),
        ("captions", "caption", ["caption"] * NUM_CAPTIONS),
    ):
        made = [example(kind, draw, is_held_out=False) for kind in named]
        records = [record(one, f"{prefix}-{i + 1:02}") for i, one in enumerate(made)]
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in records]
        (HERE / f"{file}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{file}.jsonl: {len(lines)} samples")


if __name__ == "__main__":
    main()
