"""The small multimodal model: its pictures are what is said of them, its weights have seen them."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples/models/vl-small"


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import vl_pictures

    return vl_pictures


def places(pictures, image) -> dict[str, np.ndarray]:
    """(y, x) of the pixels that have a colour of the palette, by its English name."""
    pixels = np.asarray(image).astype(int)
    found = {}
    for (name, _), ink in pictures.COLOURS.items():
        near = np.argwhere(np.abs(pixels - ink).max(2) <= 2)
        if len(near) >= 8:
            found[name] = near
    return found


def drawn(pictures, kind: str, count: int, is_held_out: bool = False):
    for i in range(count):
        yield pictures.example(kind, random.Random(f"{kind} {i}"), is_held_out=is_held_out)


def in_english(pictures, word: str) -> str:
    return {zh: en for en, zh in pictures.COLOURS}.get(word, word)


def test_the_only_colour_of_a_shape_is_the_answer(pictures) -> None:
    for one in drawn(pictures, "colour", 40):
        assert set(places(pictures, one.image)) == {in_english(pictures, one.answer)}


def test_the_first_shape_of_a_caption_lies_above_or_to_the_left(pictures) -> None:
    checked = 0
    for one in drawn(pictures, "caption", 120):
        found = places(pictures, one.image)
        words = one.answer.split()
        if len(found) != 2 or not one.answer.isascii():
            continue
        checked += 1
        first, second = (found[name].mean(0) for name in words if name in found)
        axis = 0 if "above" in words else 1
        assert first[axis] < second[axis] - 10, one.answer
    assert checked > 30


def test_the_named_bar_is_the_highest_or_the_lowest(pictures) -> None:
    checked = 0
    for one in drawn(pictures, "chart", 150):
        tops = {name: found[:, 0].min() for name, found in places(pictures, one.image).items()}
        tops = {name: top for name, top in tops.items() if name != "black"}  # as the labels are
        answer = in_english(pictures, one.answer)
        for asked, wanted in (("highest", min), ("lowest", max)):
            if one.question in sum(pictures.QUESTIONS[asked], ()) and answer in tops:
                checked += 1
                assert tops[answer] == wanted(tops.values()), (one.question, answer, tops)
    assert checked > 40


def test_training_never_draws_what_is_held_out(pictures) -> None:
    rng = random.Random(1)
    unseen = {c[i] + s[i] if i else f"{c[0]} {s[0]}" for c, s in pictures.UNSEEN for i in (0, 1)}
    kinds = defaultdict(int)
    for _ in range(3000):
        one = pictures.some_example(rng)
        kinds[one.kind] += 1
        if one.kind in ("number", "word"):
            assert not pictures.is_held_out_text(one.answer)
        assert not any(pair in one.answer for pair in unseen), one.answer
    assert set(kinds) == set(pictures.KINDS)
    for kind in ("number", "word"):
        for one in drawn(pictures, kind, 50, is_held_out=True):
            assert pictures.is_held_out_text(one.answer), one.answer
    for one in drawn(pictures, "caption", 50, is_held_out=True):
        assert any(pair in one.answer for pair in unseen), one.answer


def test_records_of_the_twin_are_the_same_without_pictures(pictures, tmp_path) -> None:
    import vl_small

    from erniekit.data.pictures import FOLDER, read_pictured

    vl_small.make(tmp_path, count=40, held_out=24)
    for name in ("train.jsonl", "eval.jsonl", "held-out/word.jsonl"):
        path = tmp_path / name
        lines, twins = (
            [json.loads(line) for line in file.read_text("utf-8").splitlines()]
            for file in (path, vl_small.without(path))
        )
        for record, twin in zip(lines, twins, strict=True):
            dialogue = read_pictured({FOLDER: str(path.parent), **record}, "erniekit")
            assert Path(dialogue.messages[0]["content"][0]["image"]).is_file()
            assert {k: v for k, v in record.items() if k != "image_info"} == twin


def test_capitals_and_digits_are_spelled_one_by_one(pictures) -> None:
    from ernie.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(MODEL)
    for text in (*pictures.WORDS, "4073", pictures.LETTERS):
        assert len(tokenizer.encode(text)) == len(text), text


# Of twelve pictures; who knows how often each answer is right gets one or two, and of counts and
# charts three.
FLOORS = {
    "colour": 11, "shape": 10, "count": 6, "caption": 4, "caption, seen pairs": 8, "number": 11,
    "word": 11, "chart": 8, "emoji": 8,
}  # fmt: skip


def test_the_committed_model_sees(pictures) -> None:
    import demo_vl

    kinds = [kind for kind in pictures.SETS for _ in range(12)]
    examples = [
        pictures.example(kind, random.Random(f"test {i}"), is_held_out=True)
        for i, kind in enumerate(kinds)
    ]
    given = demo_vl.answers([(one.image, one.question) for one in examples])
    right = defaultdict(int)
    for one, answer in zip(examples, given):
        right[one.kind] += answer == one.answer
    assert set(FLOORS) == set(pictures.SETS)
    for kind, floor in FLOORS.items():
        assert right[kind] >= floor, dict(right)


def test_a_picture_of_the_users_is_fitted_on_the_colour_of_its_corner(pictures, tmp_path) -> None:
    import demo_vl
    from PIL import Image

    Image.new("RGB", (400, 100), (200, 10, 10)).save(tmp_path / "wide.png")
    image = demo_vl.fitted(tmp_path / "wide.png")
    assert image.size == (pictures.SIZE, pictures.SIZE)
    assert image.getpixel((5, 5)) == (200, 10, 10)
    with pytest.raises(SystemExit, match="there is no file"):
        demo_vl.fitted(tmp_path / "none.png")
