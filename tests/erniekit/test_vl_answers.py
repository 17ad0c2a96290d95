"""Answers about pictures: those of the plain generator on the same words and pixels, while a run
trains and from `erniekit eval`; their thumbnails show what the model saw.
"""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ernie
from ernie.chat import ChatTemplate, stop_ids
from ernie.generate import generate
from ernie.vision.processor import image_picture, picture_of
from ernie.vision.prompt import Processor
from ernie.vision.settings import VisionSettings
from ernie.vision.sources import Sources
from erniekit.cli import main
from erniekit.config import run_from
from erniekit.data.stream import stream
from erniekit.report.answers import prompts
from erniekit.report.scores import scores
from erniekit.report.thumbnails import MOST, SIDE, first_frame, is_thumbnail, thumbnails
from tests.erniekit.conftest import write_lines
from tests.erniekit.test_report import page_of, step, write_run
from tests.helpers_vision import png

LIMITS = {"min_pixels": 784, "max_pixels": 4704}


@pytest.fixture(scope="module")
def asked(tmp_path_factory) -> Path:
    """Four questions: about a picture, about two, about a clip of three frames, and of text."""
    folder = tmp_path_factory.mktemp("asked")
    for color in ("red", "blue", "green"):
        (folder / f"{color}.png").write_bytes(png(color, (60, 90)))
    frames = [{"type": "video", "video": ["red.png", "blue.png", "green.png"]}]
    clip = [*frames, {"type": "text", "text": "What comes?"}]
    records = [
        [{"role": "user", "content": "<image>What is it?"}],
        [{"role": "user", "content": "Is <image> like <image>?"}],
        [{"role": "user", "content": clip}],
        [{"role": "user", "content": "Say one."}],
    ]
    pictures = [["red.png"], ["blue.png", "green.png"], [], []]
    answer = {"role": "assistant", "content": "A colour."}
    return write_lines(
        folder / "eval.jsonl",
        [{"messages": [*m, answer], "images": p} for m, p in zip(records, pictures)],
    )


def parts(folder: Path, content: str, pictures: list[str]) -> list[dict]:
    """The parts of a message that a record of an answer shows as a text."""
    names, found = iter(pictures), []
    for piece in re.split("(<image>|<video>)", content):
        if piece == "<video>":
            found.append({"type": "video", "video": [str(folder / n) for n in pictures]})
        elif piece == "<image>":
            found.append({"type": "image", "image": str(folder / next(names))})
        elif piece:
            found.append({"type": "text", "text": piece})
    return found


def plain_answer(model: Path, folder: Path, record: dict, pictures: list[str]) -> str:
    """What the generator says of the words of a record and these files."""
    loaded = ernie.load(model)
    tokenizer = loaded.tokenizer
    template = ChatTemplate.for_folder(model, tokenizer)
    limits = {
        f"{kind}_{end}_pixels": LIMITS[f"{end}_pixels"]
        for kind in ("image", "video")
        for end in ("min", "max")
    }
    processor = Processor(
        settings=VisionSettings.from_folder(model).changed(limits), sources=Sources(folder=folder)
    )
    (message,) = record["messages"]
    message = {**message, "content": parts(folder, message["content"], pictures)}
    inputs = processor.inputs(template, tokenizer, [message])
    given = {"pixel_values": inputs.pixel_values, "grid_thw": inputs.grid_thw} if pictures else {}
    ids = generate(
        loaded, inputs.token_ids, max_tokens=9, stop_ids=list(stop_ids(tokenizer)), **given
    )
    return tokenizer.decode([i for i in ids if i not in stop_ids(tokenizer)]).strip()


def words(model: Path, asked: Path, output: Path, **more: object) -> list[str]:
    values = {
        "model_name_or_path": model, "stage": "VL-SFT", "output_dir": output, "device": "cpu",
        "eval_dataset_path": asked, "eval_dataset_type": "messages", "max_seq_len": 256,
        "video_min_pixels": 784, "video_max_pixels": 4704, **LIMITS, "num_answers": -1,
        "max_answer_tokens": 9,
    } | more  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


PICTURES = [["red.png"], ["blue.png", "green.png"], ["red.png", "blue.png", "green.png"], []]
SHOWN = ["<image>What is it?", "Is <image> like <image>?", "<video>What comes?", "Say one."]


def test_eval_asks_about_pictures_as_the_generator_does(tiny, asked: Path, tmp_path: Path) -> None:
    assert main(["eval", *words(tiny("tiny-vl"), asked, tmp_path)]) == 0
    given = lines(tmp_path / "eval_samples.jsonl")
    assert [r["messages"][0]["content"] for r in given] == SHOWN
    for record, pictures in zip(given, PICTURES, strict=True):
        expected = plain_answer(tiny("tiny-vl"), asked.parent, record, pictures)
        assert record["answer"] == expected, record["messages"]
    assert given[0]["answer"] != given[3]["answer"], "nothing was said that could differ"
    assert [r.get("num_pictures", 0) for r in given] == [1, 2, 1, 0]
    results = json.loads((tmp_path / "eval_results.json").read_text())
    for name in ("exact", "contains", "f1"):
        mean = np.mean([scores(r["answer"], r["reference"])[name] for r in given])
        assert results["answers"][name] == pytest.approx(mean)


def test_answers_while_a_run_trains_stand_in_its_report(tiny, asked: Path, tmp_path: Path) -> None:
    more = {
        "train_dataset_path": asked, "train_dataset_type": "messages", "max_steps": 2,
        "evaluation_strategy": "steps", "eval_steps": 2, "fine_tuning": "Full",
        "learning_rate": 1e-2, "disable_tqdm": True, "save_strategy": "no",
    }  # fmt: skip
    folder = tiny("tiny-vl")
    assert main(["train", *words(folder, asked, tmp_path / "told", **more)]) == 0
    quiet = more | {"num_answers": 0}
    assert main(["train", *words(folder, asked, tmp_path / "quiet", **quiet)]) == 0
    keys = ("step", "loss", "grad_norm", "eval_loss")
    numbers = [
        [tuple(r.get(key) for key in keys) for r in lines(tmp_path / name / "metrics.jsonl")]
        for name in ("told", "quiet")
    ]
    assert numbers[0] == numbers[1], "to be asked changes a run"
    given = lines(tmp_path / "told/answers.jsonl")
    assert [r["step"] for r in given] == [0] * 4 + [2] * 4
    for record, pictures in zip(given[:4], PICTURES, strict=True):
        assert record["answer"] == plain_answer(folder, asked.parent, record, pictures)
    text = (tmp_path / "told/report.html").read_text()
    assert text.count("<img ") == 4, "each picture once, however often it was asked about"
    for record in given:
        assert all(p["thumbnail"] in text for p in record.get("pictures", ()))


def test_pairs_about_pictures_are_asked_for_the_chosen_answer(tiny, asked, tmp_path) -> None:
    record = {
        "src": ["<image>What is it?"], "response": [["A colour."], ["No."]], "sort": [1, 0],
        "images": ["red.png"],
    }  # fmt: skip
    path = write_lines(asked.parent / "pairs.jsonl", [record])
    values = [*words(tiny("tiny-vl"), path, tmp_path, stage="DPO", eval_dataset_type="erniekit")]
    run = run_from(dict(word.split("=", 1) for word in values))
    (prompt,) = prompts(stream(run, "eval"), 1)
    assert (prompt.reference, len(prompt.pictures)) == ("A colour.", 1)


@pytest.mark.parametrize("size", [(28, 28), (56, 140), (336, 84)])
def test_the_first_frame_of_what_the_model_reads_is_the_picture(size: tuple[int, int]) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)
    settings = VisionSettings()
    for count in (1, 3):
        picture = picture_of("video", list(frames[:count]), settings)
        assert np.array_equal(first_frame(picture, settings.merge_size), frames[0])


def test_thumbnails_are_small_and_few() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (560, 1120, 3), np.uint8)
    pixels[:, :560] = 250  # half of it is white
    picture = image_picture(Image.fromarray(pixels), VisionSettings())
    found = thumbnails([picture] * (MOST + 3), merge=2)
    assert (len(found["pictures"]), found["num_pictures"]) == (MOST, MOST + 3)
    url = found["pictures"][0]["thumbnail"]
    assert is_thumbnail(url) and len(url) < 14_000
    small = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))
    assert small.shape == (SIDE // 2, SIDE, 3)
    assert small[:, : SIDE // 2 - 8].mean() == pytest.approx(250, abs=3)


def test_a_page_shows_nothing_as_a_picture_but_thumbnails(tmp_path: Path) -> None:
    picture = picture_of("image", [np.zeros((28, 28, 3), np.uint8)], VisionSettings())
    good = thumbnails([picture], merge=2)["pictures"][0]
    bad = [
        {"type": "image", "thumbnail": url}
        for url in (
            "http://host/x.png", "x.png", 'data:image/jpeg;base64,AA"onerror=alert(1)', None,
            "data:image/svg+xml;base64,AAAA", good["thumbnail"] + "\n",
        )
    ]  # fmt: skip
    hostile = {**good, "type": '"><script>alert(1)</script>'}
    answer = {
        "step": 0, "where": "x:1", "messages": [], "reference": "", "answer": "",
        "num_pictures": 20, "pictures": [*bad, "nothing", hostile],
    }  # fmt: skip
    text = page_of(write_run(tmp_path, [step(1)], [answer, answer | {"where": "y", "pictures": 1}]))
    assert text.count("<img ") == 1 and "and 19 more" in text
    assert "<script" not in text and "http://host" not in text and "onerror" not in text
