"""Pictures with known answers, drawn from a seed: what the small multimodal model learns to see.

    colour, shape        of one shape: eight of each
    count                shapes on a loose grid, all or those of one colour: one to nine
    caption              two shapes and how they lie: "a red circle above a blue square"
    number, word         one to three digits; two or three capitals of eleven letters, in one line
    chart                bars on an axis to three or five: highest, lowest, how many, how high
    emoji                one of 96, of `data/emoji.txt`

Each is asked about and answered in English or Chinese. What `is_held_out` draws is never drawn for
training: a string whose digest says so, or that is one of WORDS; and of a colour and a shape that
were kept apart (UNSEEN) at least once in a caption.

Things lie near the middle of the picture, or of the cells of a grid of three by three, which are
the model's tokens: a tower as small as this one learns form from a hundred thousand pictures only
if it knows about where to look. Sizes, grounds and places within JITTER are new in every picture. A
picture is drawn three times as large and made smaller, so that edges are smooth and places are
fractions of a pixel.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = 84  # pixels: nine tokens
CELL = 28  # pixels of a token: letters and counted shapes lie near the middles of cells
JITTER = 3  # pixels, of where things lie
GROUND = (215, 245)  # pale grey, with a tint
FINE = 3  # times as large while it is drawn
DATA = Path(__file__).parent / "data"

Name = tuple[str, str]  # in English and Chinese
Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels
Colour = tuple[int, int, int]

COLOURS: dict[Name, Colour] = {
    ("red", "红色"): (220, 40, 40),
    ("orange", "橙色"): (250, 145, 30),
    ("yellow", "黄色"): (240, 215, 40),
    ("green", "绿色"): (40, 160, 60),
    ("blue", "蓝色"): (40, 70, 220),
    ("purple", "紫色"): (150, 50, 170),
    ("brown", "棕色"): (120, 72, 36),
    ("black", "黑色"): (20, 20, 20),
}
SHAPES: tuple[Name, ...] = (
    ("circle", "圆形"), ("square", "方块"), ("triangle", "三角形"), ("star", "星形"),
    ("cross", "十字"), ("ring", "圆环"), ("heart", "心形"), ("diamond", "菱形"),
)  # fmt: skip
COUNTS: tuple[Name, ...] = (
    ("one", "一个"), ("two", "两个"), ("three", "三个"), ("four", "四个"), ("five", "五个"),
    ("six", "六个"), ("seven", "七个"), ("eight", "八个"), ("nine", "九个"),
)  # fmt: skip
# Each colour with one shape that it never has in training.
UNSEEN = {(colour, SHAPES[(3 * i + 2) % 8]) for i, colour in enumerate(COLOURS)}
LETTERS = "AEILMNORSTU"
WORDS = (
    "SUN", "SEA", "TEA", "OIL", "ANT", "RAT", "MAN", "ONE", "TEN", "MAT", "NUT", "EAR", "ART",
    "TIN", "AIR", "ARM", "RUN", "SUM", "NET", "LOT", "TIE", "TOE", "OAR", "ION", "SIT", "ON", "IN",
    "IT", "US", "ME", "NO", "SO",
)  # fmt: skip

# What is asked, in each language; one of them is taken at random.
QUESTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "colour": (("Which colour is it?", "What colour is this?"),
               ("这是什么颜色？", "它是什么颜色？")),
    "shape": (("Which shape is it?", "What shape is this?"),
              ("这是什么形状？", "它是什么形状？")),
    "all": (("How many shapes are there?", "Count the shapes."),
            ("有几个图形？", "数一数图形。")),
    "some": (("How many {} shapes are there?", "Count the {} shapes."),
             ("有几个{}图形？", "数一数{}图形。")),
    "caption": (("Describe the picture.", "What is in the picture?"),
                ("描述这张图。", "图里有什么？")),
    "read": (("What is written?", "Read the text."), ("写的是什么？", "读出文字。")),
    "highest": (("Which bar is the highest?",), ("哪个柱子最高？",)),
    "lowest": (("Which bar is the lowest?",), ("哪个柱子最低？",)),
    "bars": (("How many bars are there?",), ("有几个柱子？",)),
    "value": (("How high is the highest bar?",), ("最高的柱子是多少？",)),
    "emoji": (("What is this?", "Which emoji is it?"), ("这是什么？", "这是什么表情？")),
}  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A picture of SIZE x SIZE pixels, a question about it and the one right answer."""

    kind: str
    image: Image.Image
    question: str
    answer: str


class Drawer:
    """A canvas, the random numbers of one picture, and its language: 0 English, 1 Chinese."""

    def __init__(self, rng: random.Random, is_held_out: bool) -> None:
        self.rng, self.is_held_out = rng, is_held_out
        self.language = rng.randrange(2)
        level = rng.randint(*GROUND)
        self.ground = tuple(level + rng.randint(-10, 10) for _ in range(3))
        self.image = Image.new("RGB", (SIZE * FINE, SIZE * FINE), self.ground)
        self.canvas = ImageDraw.Draw(self.image)

    def ask(self, kind: str, *words: Name) -> str:
        question = self.rng.choice(QUESTIONS[kind][self.language])
        return question.format(*(word[self.language] for word in words))

    def colour(self) -> Name:
        return self.rng.choice(list(COLOURS))

    def ink(self, strength: float = 1.0) -> Colour:
        """Black; weaker, mixed with the ground."""
        red, green, blue = (round(v * (1 - strength)) for v in self.ground)
        return red, green, blue

    def box(self, x: float, y: float, low: float, high: float) -> Box:
        """A square about (x, y), give or take JITTER, with a side between low and high."""
        half = self.rng.uniform(low, high) / 2
        x, y = (v + self.rng.uniform(-JITTER, JITTER) for v in (x, y))
        return x - half, y - half, x + half, y + half

    def rectangle(self, box: Box, colour: Colour) -> None:
        left, top, right, bottom = (round(v * FINE) for v in box)
        self.canvas.rectangle((left, top, right - 1, bottom - 1), fill=colour)

    def text(self, middle: tuple[float, float], text: str, size: float, ink: Colour) -> None:
        x, y = (v * FINE for v in middle)
        self.canvas.text((x, y), text, font=font_of(round(size * FINE)), fill=ink, anchor="mm")

    def shape(self, shape: Name, box: Box, colour: Name) -> None:
        left, top, right, bottom = (v * FINE for v in box)
        wide, high, ink = right - left, bottom - top, COLOURS[colour]
        if shape[0] in ("circle", "ring"):
            self.canvas.ellipse((left, top, right, bottom), fill=ink)
            if shape[0] == "ring":
                x, y = wide / 4, high / 4
                hole = (left + x, top + y, right - x, bottom - y)
                self.canvas.ellipse(hole, fill=self.ground)
        else:
            points = [(left + x * wide, top + y * high) for x, y in outline(shape[0])]
            self.canvas.polygon(points, fill=ink)


@cache
def font_of(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # type: ignore[return-value]


@cache
def outline(shape: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape in the unit square."""
    if shape == "square":
        return ((0, 0), (1, 0), (1, 1), (0, 1))
    if shape == "triangle":
        return ((0.5, 0), (1, 1), (0, 1))
    if shape == "diamond":
        return ((0.5, 0), (0.9, 0.5), (0.5, 1), (0.1, 0.5))
    if shape == "cross":
        a, b = 0.32, 0.68
        return ((a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b),
                (0, a), (a, a))  # fmt: skip
    if shape == "star":
        turns = [(math.pi * (i / 5 - 0.5), 0.53 if i % 2 == 0 else 0.21) for i in range(10)]
        return tuple((0.5 + r * math.cos(a), 0.53 + r * math.sin(a)) for a, r in turns)
    assert shape == "heart"
    turns = [(2 * math.pi * i / 60, 0.0) for i in range(60)]
    return tuple(
        (0.5 + math.sin(a) ** 3 / 2,
         0.42 - (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a)
                 - math.cos(4 * a)) / 30)
        for a, _ in turns
    )  # fmt: skip


def one_shape(drawer: Drawer, kind: str) -> tuple[str, Name]:
    colour, shape = pair(drawer)
    drawer.shape(shape, drawer.box(SIZE / 2, SIZE / 2, 44, 70), colour)
    return drawer.ask(kind), colour if kind == "colour" else shape


def pair(drawer: Drawer, is_unseen: bool = False) -> tuple[Name, Name]:
    """A colour and a shape: of all pairs in held-out pictures, else of those that may be seen."""
    if is_unseen:
        return drawer.rng.choice(sorted(UNSEEN))
    while True:
        found = drawer.colour(), drawer.rng.choice(SHAPES)
        if drawer.is_held_out or found not in UNSEEN:
            return found


def count(drawer: Drawer, kind: str) -> tuple[str, Name]:
    """Shapes of one kind in some of nine places; of two colours where one of them is asked for."""
    rng, is_all = drawer.rng, drawer.rng.random() < 0.5
    total = rng.randint(1, 9) if is_all else rng.randint(2, 9)
    asked = total if is_all else rng.randint(1, total - 1)
    while True:
        shape = rng.choice(SHAPES)
        colours = rng.sample(list(COLOURS), 2)
        if not any((colour, shape) in UNSEEN for colour in colours):
            break
    for i, place in enumerate(rng.sample(range(9), total)):
        x, y = (CELL * (v + 0.5) for v in (place % 3, place // 3))
        drawer.shape(shape, drawer.box(x, y, 16, 21), colours[i >= asked])
    question = drawer.ask("all") if is_all else drawer.ask("some", colours[0])
    return question, COUNTS[asked - 1]


def caption(drawer: Drawer, kind: str) -> tuple[str, Name]:
    """Two shapes, one above or to the left of the other."""
    rng = drawer.rng
    while True:
        pairs = [pair(drawer, drawer.is_held_out and i == 0) for i in range(2)]
        if pairs[0] != pairs[1]:
            break
    rng.shuffle(pairs)
    return drawer.ask("caption"), two_shapes(drawer, pairs)


def caption_seen(drawer: Drawer, kind: str) -> tuple[str, Name]:
    """The same of pairs that training has seen, at places that it has not."""
    drawer.is_held_out = False
    return caption(drawer, kind)


def two_shapes(drawer: Drawer, pairs: Sequence[tuple[Name, Name]]) -> Name:
    rng, is_above = drawer.rng, drawer.rng.random() < 0.5
    across = CELL * (rng.randrange(3) + 0.5)
    for (colour, shape), along in zip(pairs, (0.7, 2.3)):
        x, y = (across, CELL * along) if is_above else (CELL * along, across)
        drawer.shape(shape, drawer.box(x, y, 20, 26), colour)
    (c1, s1), (c2, s2) = pairs
    first, second = (f"{_article(c[0])} {c[0]} {s[0]}" for c, s in pairs)
    return (
        f"{first} {'above' if is_above else 'left of'} {second}",
        f"{c1[1]}{s1[1]}在{c2[1]}{s2[1]}{'上方' if is_above else '左边'}",
    )


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def read(drawer: Drawer, kind: str) -> tuple[str, Name]:
    rng = drawer.rng
    text = some_text(rng, kind, drawer.is_held_out)
    size, row, first = rng.uniform(24, 30), rng.randrange(3), rng.randint(0, 3 - len(text))
    ink = drawer.ink(rng.uniform(0.7, 1))
    y = CELL * (row + 0.5) + rng.uniform(-JITTER, JITTER)
    for i, letter in enumerate(text):
        drawer.text((CELL * (first + i + 0.5) + rng.uniform(-2, 2), y), letter, size, ink)
    return drawer.ask("read"), (text, text)


def some_text(rng: random.Random, kind: str, is_held_out: bool) -> str:
    """Digits or letters that belong to the split: one in eight is held out, and all of WORDS."""
    if kind == "word" and is_held_out and rng.random() < 0.5:
        return rng.choice(WORDS)
    while True:
        if kind == "number":
            text = "".join(rng.choices("0123456789", k=rng.randint(1, 3)))
        else:
            text = "".join(rng.choices(LETTERS, k=rng.randint(2, 3)))
        if is_held_out_text(text) == is_held_out:
            return text


def is_held_out_text(text: str) -> bool:
    return text in WORDS or zlib.crc32(text.encode()) % 8 == 0


def chart(drawer: Drawer, kind: str) -> tuple[str, Name]:
    """Bars of different colours; the highest and the lowest stand alone."""
    rng = drawer.rng
    most, number = rng.choice((3, 5)), rng.randint(2, 5)
    while True:
        heights = [rng.randint(1, most) for _ in range(number)]
        if heights.count(max(heights)) == heights.count(min(heights)) == 1:
            break
    colours = rng.sample(list(COLOURS), number)
    left, bottom, top = 14, SIZE - 7 + rng.uniform(-1, 1), 7 + rng.uniform(-1, 1)
    step = (bottom - top) / most
    for value in range(most + 1):
        y = bottom - value * step
        drawer.rectangle((left - 2, y - 0.4, SIZE - 2, y + 0.4), drawer.ink(0.3))
        drawer.text((left - 7, y), str(value), 11, drawer.ink())
    space = (SIZE - 3 - left) / number
    for i, (height, colour) in enumerate(zip(heights, colours)):
        x = left + space * (i + 0.15)
        drawer.rectangle((x, bottom - height * step, x + 0.7 * space, bottom), COLOURS[colour])
    kind = rng.choice(("highest", "lowest", "bars", "value"))
    answers: dict[str, Name] = {
        "highest": colours[heights.index(max(heights))],
        "lowest": colours[heights.index(min(heights))],
        "bars": COUNTS[number - 1],
        "value": (str(max(heights)),) * 2,
    }
    return drawer.ask(kind), answers[kind]


def emoji(drawer: Drawer, kind: str) -> tuple[str, Name]:
    """One of the sheet, at some size and place, a little turned."""
    rng = drawer.rng
    names, sheet = emoji_sheet()
    i = rng.randrange(len(names))
    x, y = i % 12 * 64, i // 12 * 64
    left, top, right, _ = (round(v * FINE) for v in drawer.box(SIZE / 2, SIZE / 2, 58, 78))
    one = sheet.crop((x, y, x + 64, y + 64)).rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
    one = one.resize((right - left, right - left), Image.Resampling.BILINEAR)
    drawer.image.paste(one, (left, top), one)
    return drawer.ask("emoji"), names[i]


@cache
def emoji_sheet() -> tuple[list[Name], Image.Image]:
    """Names, and the pictures of 64 x 64 pixels in rows of twelve."""
    lines = (DATA / "emoji.txt").read_text(encoding="utf-8").splitlines()
    names = [(line.split()[1], line.split()[2]) for line in lines]
    return names, Image.open(DATA / "emoji.png").convert("RGBA")


# kind: how it is drawn, and its share of the pictures of training
KINDS: dict[str, tuple[Callable[[Drawer, str], tuple[str, Name]], float]] = {
    "colour": (one_shape, 0.05),
    "shape": (one_shape, 0.07),
    "count": (count, 0.16),
    "caption": (caption, 0.18),
    "number": (read, 0.14),
    "word": (read, 0.14),
    "chart": (chart, 0.16),
    "emoji": (emoji, 0.10),
}
# What only held-out pictures have beside: captions whose pairs training has seen.
SETS = {**{kind: draw for kind, (draw, _) in KINDS.items()}, "caption, seen pairs": caption_seen}


def some_example(rng: random.Random) -> Example:
    """A picture for training, of a kind at random."""
    kind = rng.choices(list(KINDS), [share for _, share in KINDS.values()])[0]
    return example(kind, rng, is_held_out=False)


def example(kind: str, rng: random.Random, *, is_held_out: bool) -> Example:
    drawer = Drawer(rng, is_held_out)
    question, answer = SETS[kind](drawer, kind)
    return Example(kind, drawer.image.reduce(FINE), question, answer[drawer.language])
