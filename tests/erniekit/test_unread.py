"""Keys of records that nothing reads are told, and those that are read are not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from erniekit.cli import main
from erniekit.config import run_from
from erniekit.data.dialogue import Sample
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream, stream
from erniekit.data.unread import of_first_records, unread
from tests.erniekit.conftest import dialogues, write_lines
from tests.helpers_vision import png

USER = {"role": "user", "content": "Is it sunny?"}
GOOD = {"role": "assistant", "content": "Yes."}
BAD = {"role": "assistant", "content": "No."}
WRITTEN = {"src": ["Is it sunny?"], "tgt": ["Yes."]}
ASKED = {"instruction": "Is it", "input": "sunny?", "output": "Yes.", "history": [], "system": "s"}
# Every key that is read, by stage and type; where two are one, or exclude each other, a row each.
FULL = [
    ("SFT", "erniekit", {**WRITTEN, "system": "s", "label": [1]}),
    ("SFT", "erniekit", {"src": ["s", "Is it?"], "tgt": ["Yes."], "is_system": 1}),
    ("SFT", "alpaca", ASKED),
    ("SFT", "messages", {"messages": [USER, GOOD], "system": "s", "tools": []}),
    ("SFT", "chatml", {"messages": [USER, GOOD], "tools": []}),
    (
        "SFT",
        "sharegpt",
        {
            "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
            "system": "s",
            "tools": [],
        },
    ),
    (
        "DPO",
        "erniekit",
        {"src": ["a", "b"], "tgt": ["c"], "system": "s", "response": ["d", "e"], "sort": [1, 0],
         "tools": []},
    ),
    (
        "RM",
        "alpaca",
        {"question": "a", "input": "b", "chosen": "c", "rejected": "d", "history": [["e", "f"]],
         "system": "s", "tools": []},
    ),
    (
        "DPO",
        "messages",
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "system": "s", "tools": []},
    ),
    (
        "KTO",
        "erniekit",
        {"src": ["a", "b"], "tgt": ["c"], "system": "s", "response": "d", "label": True,
         "tools": []},
    ),
    ("KTO", "alpaca", {**ASKED, "kto_tag": True, "tools": []}),
    ("KTO", "messages", {"messages": [USER, GOOD], "label": True, "system": "s", "tools": []}),
    ("KTO", "messages", {"prompt": "a", "completion": "b", "kto_tag": False, "tools": []}),
    ("PT", "pretrain", {"text": "It is sunny."}),
]  # fmt: skip
TEXT = [{"text": "Is it?", "tag": "mask"}, {"text": "Yes.", "tag": "no_mask"}]
PICTURED = [
    (
        "VL-SFT",
        "erniekit",
        {"text_info": TEXT, "image_info": [{"image_url": "a.png", "matched_text_index": 0}],
         "order": [["image", 0], ["text", 0], ["text", 1]], "images": ["a.png"], "system": "s",
         "tools": []},
    ),
    (
        "VL-SFT",
        "erniekit",
        {"query": "a", "response": "b", "images": ["a.png"], "history": [], "system": "s",
         "tools": []},
    ),
    ("VL-SFT", "messages", {"messages": [USER, GOOD], "images": ["a.png"], "tools": []}),
    ("VL-SFT", "erniekit", {**WRITTEN, "images": ["a.png"]}),
    ("VL-SFT", "alpaca", {**ASKED, "images": ["a.png"]}),
    (
        "VL-SFT",
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
         "images": ["a.png"]},
    ),
    (
        "DPO",
        "alpaca",
        {"question": "a", "chosen": "b", "rejected": "c", "images": ["a.png"]},
    ),
    ("KTO", "messages", {"messages": [USER, GOOD], "label": True, "images": ["a.png"]}),
]  # fmt: skip


@pytest.fixture
def opened(tiny, tmp_path: Path):
    """A function from a stage, a type and records to their stream."""

    def make(stage: str, kind: str, records: list[dict], model: str) -> Stream:
        path = write_lines(tmp_path / "train.jsonl", records)
        (tmp_path / "a.png").write_bytes(png("red", (60, 80)))
        values = {
            "model_name_or_path": str(tiny(model)), "stage": stage, "max_seq_len": 512,
            "train_dataset_path": str(path), "train_dataset_type": kind, "fine_tuning": "Full",
        }  # fmt: skip
        return stream(run_from(values), "train")

    return make


def result(found: Stream, index: int = 0) -> list[Sample] | str:
    """The samples of a record, or what is wrong with it."""
    try:
        return found.encoder.read(found.sources[0][index], found.kinds[0])
    except DataError as error:
        return str(error)


@pytest.mark.parametrize(
    ("stage", "kind", "record", "model"),
    [(*row, "tiny-dense") for row in FULL] + [(*row, "tiny-vl") for row in PICTURED],
)
def test_keys_that_change_a_sample_are_read_and_all_others_told(
    stage: str, kind: str, record: dict, model: str, opened
) -> None:
    wrong = [{**record, key: 0 if key == "is_system" else 7.5} for key in record]
    found = opened(stage, kind, [{**record, "remark": 1, "sytem": "s"}, *wrong], model)
    right = result(found)
    assert not isinstance(right, str), right
    for index, key in enumerate(record, start=1):
        assert result(found, index) != right, key
    assert unread(found.encoder, found.sources[0][0], kind) == {"remark", "sytem"}
    assert of_first_records(found) == [
        f"{key} ({found.sources[0].path})" for key in ("remark", "sytem")
    ]


@pytest.mark.parametrize(
    ("stage", "kind", "record"),
    [
        ("SFT", "messages", {"messages": [USER, GOOD]}),
        ("DPO", "alpaca", {"question": "a", "chosen": "b", "rejected": "c"}),
    ],
)
def test_pictures_that_are_not_looked_at_are_told(stage, kind, record, opened) -> None:
    found = opened(stage, kind, [{**record, "images": ["a.png"]}], "tiny-dense")
    assert not isinstance(result(found), str)
    assert unread(found.encoder, found.sources[0][0], kind) == {"images"}


def test_the_data_command_counts_them_and_a_run_names_them(tiny, tmp_path: Path, capsys) -> None:
    records = dialogues(6)
    for record in records[:2]:
        record["tools"] = [{"name": "look"}]
    path = write_lines(tmp_path / "train.jsonl", records)
    words = [
        f"model_name_or_path={tiny('tiny-dense')}", f"train_dataset_path={path}",
        f"output_dir={tmp_path / 'out'}", "max_seq_len=64", "max_steps=1",
    ]  # fmt: skip
    assert main(["data", *words]) == 0
    told = "".join(capsys.readouterr())
    assert f"train: 2 records of {path} have the key 'tools', which the type erniekit does" in told
    ledger = json.loads((tmp_path / "out/data/ledger.json").read_text())
    assert ledger["train"]["files"][0]["unread_keys"] == {"tools": 2}
    assert main(["train", *words]) == 0
    assert f"keys of records that are not read: tools ({path})" in "".join(capsys.readouterr())
