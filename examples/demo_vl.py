"""Ask the small multimodal model about pictures that are drawn now, or about one of your own.

    make demo-vl         (or: python examples/demo_vl.py)
    python examples/demo_vl.py PICTURE "What is this?"

The model lies in examples/models/vl-small, trained from nothing as examples/vl_small.py says. It
knows what examples/vl_pictures.py draws, and nothing else.
"""

from __future__ import annotations

import random
import sys
import time
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError
from vl_pictures import SETS, SIZE, Example, example

MODEL = Path(__file__).parent / "models/vl-small"
FOLDER = Path(".demo/pictures")
EACH = 3  # pictures of a set

Asked = tuple[Image.Image, str]


def main() -> None:
    words = sys.argv[1:]
    if len(words) > 2 or words[:1] in (["-h"], ["--help"]):
        sys.exit('usage: python examples/demo_vl.py [PICTURE ["QUESTION"]]')
    if words:
        print(answers([(fitted(Path(words[0])), words[1] if words[1:] else "What is this?")])[0])
    else:
        show()


def show() -> None:
    """Draw pictures that nobody has seen, ask about them, and print answers beside the truth."""
    start = time.monotonic()
    seed = int(time.time())
    examples = [
        example(kind, random.Random(f"{seed} {kind} {i}"), is_held_out=True)
        for kind in SETS
        for i in range(EACH)
    ]
    names = saved(examples)
    given = answers([(one.image, one.question) for one in examples])
    rows = [
        (name, one.question, answer, "yes" if answer == one.answer else f"no: {one.answer}")
        for name, one, answer in zip(names, examples, given)
    ]
    print(table([("picture", "question", "what it answers", "right?"), *rows]))
    right = sum(answer == one.answer for one, answer in zip(examples, given))
    print(f"\n{right} of {len(rows)} are right; {time.monotonic() - start:.0f} s.")
    print(f"The pictures are in {FOLDER}. Ask about one of your own:")
    print(f'  python {shown(__file__)} {FOLDER / names[0]} "{examples[0].question}"')
    print("or attach it in the chat page, at http://127.0.0.1:8000 after")
    print(f"  fastdeploy serve --model {shown(MODEL)}")


def answers(asked: Sequence[Asked], model: Path = MODEL) -> list[str]:
    """What the model says, greedily, to each question about its picture."""
    from fastdeploy import LLM, SamplingParams

    llm = LLM(str(model), max_model_len=256)
    messages = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": image},
                    {"type": "text", "text": question},
                ],
            }
        ]
        for image, question in asked
    ]
    params = SamplingParams(max_tokens=24, temperature=0)
    return [o.outputs.text.strip() for o in llm.chat(messages, params, use_tqdm=False)]


def fitted(path: Path) -> Image.Image:
    """A picture of the user's in the size of the training, on the colour of its corner."""
    if not path.is_file():
        sys.exit(f"there is no file {str(path)!r}; give the path of a picture")
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    except UnidentifiedImageError:
        sys.exit(f"{str(path)!r} is no picture that can be read; give a PNG or a JPEG")
    ground = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(ground, image).convert("RGB")
    return ImageOps.pad(image, (SIZE, SIZE), color=image.getpixel((0, 0)))  # type: ignore


def saved(examples: Sequence[Example]) -> list[str]:
    FOLDER.mkdir(parents=True, exist_ok=True)
    names = [f"{i:02}-{one.kind.split(',')[0]}.png" for i, one in enumerate(examples)]
    for name, one in zip(names, examples):
        one.image.save(FOLDER / name)
    return names


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns under one another, also where letters are as wide as two."""
    widths = [max(map(width, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell + " " * (w - width(cell)) for cell, w in zip(row, widths)).rstrip()
        for row in rows
    )


def width(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


def shown(path: Path | str) -> str:
    path = Path(path).resolve()
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


if __name__ == "__main__":
    main()
