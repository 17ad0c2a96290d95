"""Draw pictures with known answers, and make a small untrained model that can learn to read them.

    python examples/vl_shapes.py FOLDER [COUNT]

Each picture is one of four tasks, drawn from a seed: the colour of a shape, its kind, how many dots
there are, or a short word. The records are in the published format of stage VL-SFT:

    FOLDER/train.jsonl, eval.jsonl    {"text_info": [...], "image_info": [{"image_url", ...}]}
    FOLDER/pictures/*.png             84 x 84 pixels, nine tokens
    FOLDER/model                      two million parameters, with a tokenizer of these words

The answers cannot be guessed: each is one of six or eight, all as frequent. Train it with
examples/configs/tiny/vl/run_vl_sft.yaml.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tiny_model import save_new, train_tokenizer

from ernie.config import ErnieConfig
from ernie.vision.config import VisionConfig

SIZE = 84  # pixels; three windows of two patches
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 50, 170),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring", "bar")
COUNTS = ("one", "two", "three", "four", "five", "six")
WORDS = ("cat", "dog", "sun", "tea", "box", "map", "ink", "owl")

CONFIG = ErnieConfig(
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=320,
    max_position_embeddings=1024,
    moe_num_experts=(8, 8),
    moe_k=2,
    moe_intermediate_size=(128, 64),
    moe_num_shared_experts=1,
    moe_layer_start_index=(1, 1),
    moe_layer_end_index=(3, 3),
    rope_3d=True,
    freq_allocation=4,
    vision_config=VisionConfig(depth=3, embed_dim=64, mlp_ratio=4, num_heads=4),
)

Canvas = ImageDraw.ImageDraw


def draw_shape(canvas: Canvas, shape: str, box: tuple[int, ...], colour: tuple[int, ...]) -> None:
    left, top, right, bottom = box
    middle, third = (left + right) // 2, (right - left) // 3
    if shape == "circle":
        canvas.ellipse(box, fill=colour)
    elif shape == "square":
        canvas.rectangle(box, fill=colour)
    elif shape == "triangle":
        canvas.polygon([(middle, top), (right, bottom), (left, bottom)], fill=colour)
    elif shape == "cross":
        canvas.rectangle((left + third, top, right - third, bottom), fill=colour)
        canvas.rectangle((left, top + third, right, bottom - third), fill=colour)
    elif shape == "ring":
        canvas.ellipse(box, outline=colour, width=max((right - left) // 6, 3))
    else:
        canvas.rectangle((left, top + third, right, bottom - third), fill=colour)


def some_box(rng: random.Random, low: int, high: int) -> tuple[int, ...]:
    size = rng.randint(low, high)
    left, top = (rng.randint(2, SIZE - size - 2) for _ in range(2))
    return left, top, left + size, top + size


def colour_of(canvas: Canvas, rng: random.Random) -> tuple[str, str]:
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    draw_shape(canvas, shape, some_box(rng, 30, 60), COLOURS[colour])
    return "Which colour is it?", colour


def kind_of(canvas: Canvas, rng: random.Random) -> tuple[str, str]:
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    draw_shape(canvas, shape, some_box(rng, 36, 60), COLOURS[colour])
    return "Which shape is it?", shape


def number_of(canvas: Canvas, rng: random.Random) -> tuple[str, str]:
    count = rng.randint(1, len(COUNTS))
    colour = COLOURS[rng.choice(list(COLOURS))]
    for place in rng.sample(range(9), count):  # never on one another
        x, y = (place % 3 * 28 + rng.randint(3, 7), place // 3 * 28 + rng.randint(3, 7))
        draw_shape(canvas, "circle", (x, y, x + 16, y + 16), colour)
    return "How many dots are there?", COUNTS[count - 1]


def word_of(canvas: Canvas, rng: random.Random) -> tuple[str, str]:
    word = rng.choice(WORDS)
    place = (rng.randint(4, 18), rng.randint(10, 36))
    canvas.text(place, word, fill=(0, 0, 0), font=ImageFont.load_default(rng.randint(26, 32)))
    return "Which word is written?", word


TASKS: tuple[Callable[[Canvas, random.Random], tuple[str, str]], ...] = (
    colour_of, kind_of, number_of, word_of,
)  # fmt: skip


def record(folder: Path, name: str, rng: random.Random) -> dict[str, object]:
    """Draw one picture into `folder`, and say what is in it."""
    background = tuple(rng.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (SIZE, SIZE), background)
    question, answer = rng.choice(TASKS)(ImageDraw.Draw(image), rng)
    image.save(folder / "pictures" / name)
    return {
        "text_info": [
            {"text": question, "tag": "mask"},
            {"text": answer, "tag": "no_mask"},
        ],
        "image_info": [{"image_url": f"pictures/{name}", "matched_text_index": 0}],
    }


def make(folder: Path, count: int, seed: int = 0) -> None:
    """Write `count` records for training and a tenth as many for evaluation, and the model."""
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    texts = []
    for split, number in (("train", count), ("eval", max(count // 10, 1))):
        rng = random.Random(f"{seed} {split}")
        records = [record(folder, f"{split}-{i}.png", rng) for i in range(number)]
        lines = [json.dumps(r) + "\n" for r in records]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
        texts += [entry["text"] for r in records for entry in r["text_info"]]  # type: ignore
    (folder / "model").mkdir(exist_ok=True)
    texts += ["Picture 1:", "User: ", "\nAssistant: <think>\n\n</think>\n\n"] * 20
    train_tokenizer(folder / "model", texts, vocab_size=400, has_vision=True)
    save_new(folder / "model", CONFIG, seed=seed)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or not "".join(sys.argv[2:] or "1").isdigit():
        sys.exit("usage: python examples/vl_shapes.py FOLDER [COUNT]")
    make(Path(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 4000)
