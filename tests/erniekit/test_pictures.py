"""Records with pictures: every form of the same dialogue is the same sample; bad media is told."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ernie.chat import UNTRAINED
from ernie.tokenizer import Tokenizer
from ernie.vision.positions import positions_of
from erniekit.cli import main
from erniekit.config import run_from
from erniekit.data.dialogue import Sample, read_dialogue
from erniekit.data.judged import Judgement, read_judgement
from erniekit.data.pack import START
from erniekit.data.pictures import read_pictured
from erniekit.data.preference import Pair, read_pair
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream, stream
from tests.erniekit.conftest import write_lines
from tests.helpers_vision import grey_clip, png

NO_IMAGE = "1 places <image> and 0 images; expected a picture for each place"
USER = {"role": "user", "content": "<image>A?"}
ANSWER, OTHER = ({"role": "assistant", "content": text} for text in ("B.", "C."))
SMALL = {"min_pixels": 784, "max_pixels": 3136, "video_min_pixels": 784, "video_max_pixels": 784}


def pair(record: dict, kind: str) -> Pair:
    return read_pair(record, kind, read_pictured)


def judgement(record: dict, kind: str) -> Judgement:
    return read_judgement(record, kind, read_pictured)


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """A folder with pictures, a clip and what is none."""
    folder = tmp_path_factory.mktemp("media")
    for color in ("red", "blue"):
        (folder / f"{color}.png").write_bytes(png(color, (60, 80)))
    (folder / "clip.mp4").write_bytes(grey_clip(range(0, 250, 10)))
    (folder / "broken.png").write_bytes(png("red")[:60])
    return folder


@pytest.fixture
def opened(tiny, media: Path):
    """A function from records and settings to their stream."""

    def make(records: list, **more: object) -> Stream:
        values = {
            "model_name_or_path": str(tiny("tiny-vl")), "stage": "VL-SFT", "max_seq_len": 256,
            "train_dataset_path": str(write_lines(media / "train.jsonl", records)), **SMALL,
        } | more  # fmt: skip
        return stream(run_from(values), "train")

    return make


def published(*texts: str, **more: object) -> dict:
    """A record of the published format: questions and answers in turn."""
    tags = ["mask", "no_mask"] * len(texts)
    return {"text_info": [{"text": t, "tag": tag} for t, tag in zip(texts, tags)], **more}


def image(name: str, index: int = 0) -> dict:
    return {"image_url": name, "matched_text_index": index}


def same(a: Sample, b: Sample) -> bool:
    return a == b and a.mark == b.mark and np.array_equal(a.positions, b.positions)


def forms(media: Path) -> dict[str, tuple[str, dict]]:
    """Kind and record of one question about two pictures."""
    data = base64.b64encode((media / "blue.png").read_bytes()).decode()
    part = {"type": "text", "text": "Alike?"}
    red, blue = (f"{name}.png" for name in ("red", "blue"))
    answer = {"role": "assistant", "content": "No."}
    return {
        "index": ("erniekit", published("Alike?", "No.", image_info=[image(red), image(blue)])),
        "order": (
            "erniekit",
            published(
                "Alike?", "No.", image_info=[image(blue), image(red)],
                order=[["image", 1], ["image", 0], ["text", 0], ["text", 1]],
            ),
        ),
        "order as a table": (
            "erniekit",
            published(
                "Alike?", "No.", image_info=[image(red), image(blue)],
                order={"type": ["image", "image", "text", "text"], "index": [0, 1, 0, 1]},
            ),
        ),
        "base64": ("erniekit", published("Alike?", "No.", image_info=[image(red), image(data)])),
        "path": (
            "erniekit",
            published("Alike?", "No.", image_info=[image(str(media / red)), image(blue)]),
        ),
        "query": ("erniekit", {"query": "Alike?", "response": "No.", "images": [red, blue]}),
        "tags": (
            "erniekit",
            {"query": "<image><image>Alike?", "response": "No.", "images": [red, blue]},
        ),
        "messages": (
            "messages",
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image_url", "image_url": {"url": red}},
                            {"type": "image", "image": blue},
                            part,
                        ],
                    },
                    answer,
                ]
            },
        ),
        "text with images": (
            "erniekit",
            published("<image>Alike?", "No.", image_info=[image(red)], images=[blue]),
        ),
        "src": ("erniekit", {"src": ["Alike?"], "tgt": ["No."], "images": [red, blue]}),
        "src with tags": (
            "erniekit",
            {"src": ["<image><image>Alike?"], "tgt": ["No."], "images": [red, blue]},
        ),
        "alpaca": (
            "alpaca",
            {"instruction": "<image><image>Alike?", "output": "No.", "images": [red, blue]},
        ),
        "sharegpt": (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "<image><image>Alike?"},
                    {"from": "gpt", "value": "No."},
                ],
                "images": [red, blue],
            },
        ),
        "parts with tags": (
            "messages",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "<image>"},
                                                 {"type": "image", "image": blue}, part]},
                    answer,
                ],
                "images": [red],
            },
        ),
        "messages with tags": (
            "messages",
            {
                "messages": [{"role": "user", "content": "<image><image>Alike?"}, answer],
                "images": [red, blue],
            },
        ),
    }  # fmt: skip


def test_every_form_of_a_dialogue_is_the_same_sample(opened, media: Path) -> None:
    samples = {}
    for name, (kind, record) in forms(media).items():
        (samples[name],) = opened([record], train_dataset_type=kind).read(0, 0)
    first = samples["index"]
    assert len(first.media.pictures) == 2 and len({p.digest for p in first.media.pictures}) == 2
    for name, sample in samples.items():
        assert same(sample, first), name


def test_the_records_of_the_documentation_are_one_sample(opened, media: Path) -> None:
    (media / "chart.png").write_bytes(png())
    page = (Path(__file__).parents[2] / "docs/methods/vl.md").read_text("utf-8")
    blocks = re.findall(r"^```json\n(.*?)^```$", page, re.M | re.S)
    samples = []
    for record in map(json.loads, blocks[:3]):
        kind = "messages" if "messages" in record else "erniekit"
        samples += opened([record], train_dataset_type=kind).read(0, 0)
    assert len(samples) == 3 and all(same(sample, samples[0]) for sample in samples)


def test_labels_positions_and_places_of_a_sample(opened, tiny) -> None:
    record = published("What?", "Red.", image_info=[image("red.png")])
    records = opened([record], max_pixels=28 * 28 * 16)
    (sample,) = records.read(0, 0)
    tokenizer: Tokenizer = records.encoder.tokenizer
    trained = [i for i in sample.labels if i != UNTRAINED]
    assert tokenizer.decode(trained[:-1]).endswith("Red.") and trained[-1] == tokenizer.eos_id
    (picture,) = sample.media.pictures
    assert sample.media.is_place_T.sum() == picture.num_tokens == 6
    assert sample.media.modality_T.sum() == picture.num_tokens + 2, "the markers too"
    config = records.encoder.reader.config
    expected = positions_of(sample.token_ids, [picture.grid], config)
    assert np.array_equal(sample.positions, expected)
    assert sample.positions[2, -1] < len(sample) - 1, "a picture takes fewer positions than tokens"


def test_each_trained_answer_is_a_sample_with_the_pictures_before_it(opened) -> None:
    record = published(
        "One?", "Yes.", "And?", "No.", image_info=[image("red.png"), image("blue.png", 2)]
    )
    first, second = opened([record]).read(0, 0)
    assert [len(first.media.pictures), len(second.media.pictures)] == [1, 2]
    assert first.media.pictures[0].digest == second.media.pictures[0].digest


def test_a_long_dialogue_loses_its_oldest_turns_with_their_pictures(opened) -> None:
    texts = ["One? " * 12, "Yes.", "Two?", "No."]
    record = published(*texts, image_info=[image("red.png"), image("blue.png", 2)])
    first, whole = opened([record]).read(0, 0)
    (short,) = opened([published("Two?", "No.", image_info=[image("blue.png")])]).read(0, 0)
    cut = opened([record], max_seq_len=len(first) + 1).read(0, 0)[-1]
    assert len(whole.media.pictures) == 2 and same(cut, short)
    assert cut.num_cut == len(whole) - len(short)


def test_clips_are_read_by_their_settings(opened) -> None:
    record = published("Moves?", "Yes.", video_info=[image("clip.mp4")])
    (sample,) = opened([record], video_target_frames=8).read(0, 0)
    assert sample.media.pictures[0].grid[0] == 8
    marks = {}
    for way in ("leading", "middle", "rand"):
        more = {"video_target_frames": 4, "video_frames_sample": way, "render_timestamp": False}
        (once,) = opened([record], **more).read(0, 0)
        (again,) = opened([record], **more).read(0, 0)
        assert once.mark == again.mark, f"{way}: a record is read alike each time"
        marks[way] = once.mark
    assert len(set(marks.values())) == 3


def test_text_is_mixed_in_by_modality_ratio(opened, media: Path) -> None:
    texts = [{"src": [f"Say {i}."], "tgt": [f"{i}."]} for i in range(5)]
    pictured = [published(f"What {i}?", "Red.", image_info=[image("red.png")]) for i in range(20)]
    path = write_lines(media / "text.jsonl", texts)
    records = opened(
        pictured, text_dataset_path=str(path), modality_ratio="[1,3]", num_samples_each_epoch=10**6
    )
    samples = [drawn.sample for drawn in records.samples(START, 400)]
    share = sum(not sample.media.pictures for sample in samples) / len(samples)
    assert 0.15 < share < 0.35, share
    assert all(sample.positions.shape == (3, len(sample)) for sample in samples)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (published("A?", "B.", image_info=[image("none.png")]), "there is no file 'none.png'"),
        (published("A?", "B.", image_info=[image("broken.png")]), "cannot be decoded"),
        (published("A?", "B.", image_info=[image("clip.mp4")]), "in no format"),
        (published("A?", "B.", image_info=[image("red.png", 2)]), "expected a number from 0 to 1"),
        (published("A?", image_info=[image("red.png")]), "a question without an answer"),
        (published("", "B.", "C."), "a question without an answer"),
        ({"text_info": [{"text": "A", "tag": "masked"}]}, "expected mask or no_mask"),
        (published("A?", "B.", order=[["text", 0]]), "order does not name each of the 2"),
        (
            published("A?", "B.", image_info=[image("red.png")], video_info=[image("clip.mp4")]),
            "expected order",
        ),
        ({"query": "A?", "response": "", "images": ["red.png"]}, "is an empty answer"),
        ({"query": "<image><image>A?", "response": "B.", "images": ["red.png"]}, "2 places"),
        ({"query": "<image>A?", "response": "B.", "image": "red.png"}, NO_IMAGE),
        ({"src": ["<image>A?"], "tgt": ["B."]}, NO_IMAGE),
        (published("<image>A?", "B.", image_info=[image("red.png")]), NO_IMAGE),
        ({"src": ["A?", "<video>A?"], "tgt": ["B.", "C."], "images": ["red.png"]},
         "1 places <video> and 0 videos; expected a picture for each place"),
        ({"text_info": []}, "the last message is not an answer"),
        (published(" ", "B."), "text_info[0] is an empty question; expected text"),
        ({"query": "A?", "response": "B.", "history": [["C?", " "]], "images": ["red.png"]},
         "history[0][1] is an empty answer; expected text"),
    ],
)  # fmt: skip
def test_bad_records_are_refused_in_a_sentence(opened, record: dict, told: str) -> None:
    records = opened([record, published("A?", "B.")])
    with pytest.raises(DataError) as error:
        records.read(0, 0)
    assert told in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "record", "read"),
    [
        ("alpaca", {"instruction": "<image>A?", "output": "B."}, read_pictured),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "A <image>?"},
                               {"from": "gpt", "value": "B."}]},
            read_pictured,
        ),
        ("messages", {"messages": [USER, ANSWER]}, read_pictured),
        ("messages", {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]}, pair),
        ("alpaca", {"question": "<image>A?", "chosen": "B.", "rejected": "C."}, pair),
        ("messages", {"prompt": [USER], "completion": [ANSWER], "label": True}, judgement),
        ("erniekit", {"src": ["<image>A?"], "response": "B.", "label": True}, judgement),
    ],
)  # fmt: skip
def test_a_place_without_a_picture_is_refused_in_every_format(
    kind: str, record: dict, read: Callable[[dict, str], object], media: Path
) -> None:
    with pytest.raises(DataError, match=NO_IMAGE):
        read({**record, "image": "red.png"}, kind)
    read({**record, "images": [str(media / "red.png")]}, kind)


def test_a_question_may_be_a_picture_alone(media: Path) -> None:
    record = {"query": "<image>", "response": "Red.", "images": [str(media / "red.png")]}
    ((part,),) = [m["content"] for m in read_pictured(record, "erniekit").messages[:1]]
    assert part == {"type": "image", "image": str((media / "red.png").resolve())}


def test_a_model_of_text_reads_places_as_text() -> None:
    record = {"src": ["<image>A?"], "tgt": ["B."], "images": ["none.png"]}
    assert read_dialogue(record, "erniekit").messages[0]["content"] == "<image>A?"


def test_relative_paths_start_at_the_data_file(media: Path) -> None:
    record = published("A?", "B.", image_info=[image("red.png")])
    with pytest.raises(DataError):
        read_pictured(record, "erniekit")
    dialogue = read_pictured({**record, "media_folder": str(media)}, "erniekit")
    assert dialogue.messages[0]["content"][0]["image"] == str((media / "red.png").resolve())


def test_data_names_file_and_line_of_bad_media_and_counts_placeholders(
    tiny, media: Path, tmp_path: Path, capsys
) -> None:
    good = published("What?", "Red.", image_info=[image("red.png")])
    other = published("What?", "Red.", image_info=[image("blue.png")])
    bad = published("What?", "Red.", image_info=[image("broken.png")])
    path = write_lines(media / "audit.jsonl", [good, bad, other, good])
    words = [f"{key}={value}" for key, value in SMALL.items()]
    code = main(
        ["data", f"model_name_or_path={tiny('tiny-vl')}", "stage=VL-SFT", "max_seq_len=256",
         f"train_dataset_path={path}", f"output_dir={tmp_path}", "max_bad_data_share=0.5", *words]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0, captured.err
    told = captured.out + captured.err
    assert f"{path}:2" in told and "cannot be decoded" in told
    ledger = json.loads((tmp_path / "data/ledger.json").read_text())["train"]["all"]
    assert ledger["num_unusable"] == 1
    assert ledger["num_duplicates"] == 1, "the same text about another picture is no duplicate"
    tokens = ledger["tokens"]
    assert tokens["masked"] > tokens["trained"] > 0
