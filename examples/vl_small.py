"""Make the pictures, the tokenizer and the untrained network of a small multimodal model.

    python examples/vl_small.py FOLDER [COUNT]

    FOLDER/train.jsonl                COUNT records in the published format of stage VL-SFT
    FOLDER/first.jsonl                those of them about one thing or a short text
    FOLDER/train-text.jsonl           the same questions and answers, without the pictures
    FOLDER/eval.jsonl, eval-text.jsonl
    FOLDER/held-out/*.jsonl           one file for each set of `vl_pictures.SETS`
    FOLDER/pictures/*/*.png           84 x 84 pixels, nine tokens each
    FOLDER/model                      five million parameters with random weights, and a tokenizer

Train it with examples/configs/tiny/vl/run_vl_sft.yaml, on first.jsonl before all: single things
teach the tower to see within a few hundred steps, while the whole mixture, most of which asks for
more than one look, leaves it blind for long. What has come of it lies in
examples/models/vl-small; `make demo-vl` asks that.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiny_model import save_new, train_tokenizer
from vl_pictures import (
    COLOURS,
    COUNTS,
    LETTERS,
    QUESTIONS,
    SETS,
    SHAPES,
    SIZE,
    Example,
    emoji_sheet,
    example,
    some_example,
)  # fmt: skip

from ernie.config import ErnieConfig
from ernie.vision.config import VisionConfig

COUNT, HELD_OUT = 160_000, 250  # pictures of training, and of each held-out set
VOCAB_SIZE = 1200
FIRST = ("colour", "shape", "read", "emoji")
PIXELS = SIZE * SIZE

# Text and pictures have experts of their own, wide and narrow, and one of both widths is shared.
CONFIG = ErnieConfig(
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=384,
    max_position_embeddings=1024,
    moe_num_experts=(8, 8),
    moe_k=2,
    moe_intermediate_size=(128, 96),
    moe_num_shared_experts=1,
    moe_layer_start_index=(1, 1),
    moe_layer_end_index=(3, 3),
    rope_3d=True,
    freq_allocation=4,
    vision_config=VisionConfig(depth=4, embed_dim=128, mlp_ratio=4, num_heads=4),
)


def make(folder: Path, count: int = COUNT, held_out: int = HELD_OUT, seed: int = 0) -> None:
    """Write everything that is listed above."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{seed} train")
    write(folder, "train", (some_example(rng) for _ in range(count)))
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "first.jsonl").write_text("".join(filter(is_first, lines)), encoding="utf-8")
    for number, kind in enumerate(SETS):
        rng = random.Random(f"{seed} held-out {kind}")
        examples = (example(kind, rng, is_held_out=True) for _ in range(held_out))
        write(folder, f"held-out/{name_of(kind)}", examples)
        for name in ("eval", "eval-text"):  # a few of each set
            source = f"held-out/{name_of(kind)}{name.removeprefix('eval')}.jsonl"
            lines = (folder / source).read_text(encoding="utf-8").splitlines(keepends=True)
            with (folder / f"{name}.jsonl").open("a" if number else "w", encoding="utf-8") as file:
                file.writelines(line.replace('"../', '"') for line in lines[:24])
    make_model(folder / "model", seed)


def is_first(line: str) -> bool:
    """Whether a record is one of single things."""
    question = json.loads(line)["text_info"][0]["text"]
    return any(question in asked for kind in FIRST for asked in QUESTIONS[kind])


def name_of(kind: str) -> str:
    """A set's name as that of a file."""
    return kind.replace(",", "").replace(" ", "-")


def write(folder: Path, name: str, examples: Iterator[Example]) -> None:
    """Pictures and records of a split, and the records without their pictures."""
    path = folder / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    up = "../" * name.count("/")
    with (
        path.open("w", encoding="utf-8") as file,
        without(path).open("w", encoding="utf-8") as twin,
    ):
        for i, one in enumerate(examples):
            place = Path("pictures") / Path(name).name / f"{i // 1000:02}" / f"{i}.png"
            (folder / place.parent).mkdir(parents=True, exist_ok=True)
            one.image.save(folder / place, compress_level=1)
            record = record_of(one)
            twin.write(json.dumps(record, ensure_ascii=False) + "\n")
            record["image_info"] = [{"image_url": f"{up}{place}", "matched_text_index": 0}]
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def without(path: Path) -> Path:
    """The file of the same records without pictures."""
    return path.with_name(f"{path.stem}-text.jsonl")


def record_of(one: Example) -> dict[str, Any]:
    return {
        "text_info": [
            {"text": one.question, "tag": "mask"},
            {"text": one.answer, "tag": "no_mask"},
        ]
    }


def make_model(folder: Path, seed: int) -> None:
    """Write tokenizer, limits of pictures and random weights."""
    folder.mkdir(exist_ok=True)
    train_tokenizer(folder, texts(), vocab_size=VOCAB_SIZE, has_vision=True)
    limits = {"image_min_pixels": PIXELS // 2, "image_max_pixels": PIXELS}
    (folder / "preprocessor_config.json").write_text(json.dumps(limits, indent=2) + "\n")
    save_new(folder, CONFIG, seed=seed)


def texts() -> Iterator[str]:
    """What the tokenizer is learnt from: the words of all that can be asked or answered, the more
    often the more they are to be one token. Digits and capitals stand alone, and stay alone.
    """
    emoji, _ = emoji_sheet()
    frame = ("Picture", "User:", "Assistant:", "\nAssistant:", "think", ">\n\n</", ">\n\n")
    relations = (("above", "在"), ("left of", "上方"), ("a", "左边"), ("an", "在"))
    for _ in range(40):
        yield from frame * 4
        for name in (*(*COLOURS, *SHAPES, *COUNTS, *relations) * 4, *emoji):
            yield from (*name, f" {name[0]}", f" {name[0]}")
        for in_english, in_chinese in QUESTIONS.values():
            for question in (*in_english, *in_chinese):
                yield from question.split("{}")
        yield from (*"0123456789", *LETTERS)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not "".join(sys.argv[2:] or "1").isdigit():
        sys.exit("usage: python examples/vl_small.py FOLDER [COUNT]")
    make(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else COUNT)
