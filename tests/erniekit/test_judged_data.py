"""Records of judged answers: spellings of one of them, its tokens, and what cannot be used."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from ernie.chat import UNTRAINED, ChatTemplate
from ernie.tokenizer import Tokenizer
from erniekit.config import Data
from erniekit.data.batch import batch_of
from erniekit.data.dialogue import Dialogue, Encoder
from erniekit.data.judged import JudgedEncoder, JudgedSample, Judgement, read_judgement
from erniekit.data.pack import Cursor
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream
from erniekit.data.survey import survey
from tests.erniekit.conftest import judgements, write_lines

USER = {"role": "user", "content": "q"}
GOOD = {"role": "assistant", "content": "good"}
ERNIEKIT = {"src": ["q"], "tgt": [], "response": "good", "label": True}
SESSION = {
    "src": ["What is one?", "And two?"], "tgt": ["The first."], "label": False,
    "response": ["It comes after one.", "Sure?", "Yes."], "system": "Be short.",
}  # fmt: skip


@pytest.fixture(scope="module")
def encoder(tiny):
    """A function from limits to an encoder of the tiny model."""
    folder = tiny("tiny-dense")
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.for_folder(folder, tokenizer)

    def make(max_tokens: int = 512, *, masks_end: bool = False) -> JudgedEncoder:
        return JudgedEncoder(tokenizer, template, max_tokens, masks_end=masks_end)

    return make


@pytest.mark.parametrize(
    ("kind", "record"),
    [
        ("erniekit", ERNIEKIT),
        ("alpaca", {"instruction": "q", "output": "good", "kto_tag": True}),
        ("messages", {"messages": [USER, GOOD], "label": True}),
        ("chatml", {"messages": [USER, GOOD], "kto_tag": True}),
        ("messages", {"prompt": [USER], "completion": [GOOD], "label": True}),
        ("messages", {"prompt": "q", "completion": "good", "label": True}),
    ],
)
def test_formats_give_the_same_judgement(kind: str, record: dict) -> None:
    wanted = Judgement(Dialogue([USER, {**GOOD, "label": 1}]), True)
    assert read_judgement(record, kind) == wanted
    key = "label" if "label" in record else "kto_tag"
    assert not read_judgement({**record, key: False}, kind).is_desirable


def test_system_text_stands_before_what_is_judged_in_every_format() -> None:
    system = {"role": "system", "content": "s"}
    wanted = Judgement(Dialogue([system, USER, {**GOOD, "label": 1}]), True)
    for kind, record in (
        ("erniekit", ERNIEKIT),
        ("alpaca", {"instruction": "q", "output": "good", "label": True}),
        ("messages", {"messages": [USER, GOOD], "label": True}),
        ("messages", {"prompt": "q", "completion": "good", "label": True}),
    ):
        assert read_judgement({**record, "system": "s"}, kind) == wanted, record
    blank = {"messages": [{**system, "content": ""}, USER, GOOD], "label": True}
    assert read_judgement(blank, "messages").dialogue.messages == wanted.dialogue.messages[1:]


@pytest.mark.parametrize(
    ("kind", "record", "told"),
    [
        ("erniekit", {**ERNIEKIT, "label": 1}, "label is 1; expected true or false"),
        ("erniekit", {**ERNIEKIT, "kto_tag": True}, "both label and kto_tag"),
        ("alpaca", {"instruction": "q", "output": "good"}, "no label; expected label: true"),
        ("erniekit", {**ERNIEKIT, "response": ["a", "b"]}, "an odd number"),
        ("erniekit", {**ERNIEKIT, "response": ""}, "expected text"),
        ("erniekit", {**ERNIEKIT, "src": ["q", "r"]}, "2 src and 0 tgt"),
        ("messages", {"prompt": 7, "completion": "a", "label": True}, "prompt is neither text nor"),
        ("messages", {"prompt": "q", "label": True}, "completion is neither text nor"),
        ("messages", {"messages": [USER], "label": True}, "the last message is not an answer"),
        (
            "messages",
            {"messages": [USER, {**GOOD, "content": " "}], "label": True},
            r"messages\[1\] is an empty answer; expected text",
        ),
        ("messages", [], "a list; expected an object"),
    ],
)
def test_a_record_that_cannot_be_used_is_one_sentence(kind: str, record, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        read_judgement(record, kind)
    assert "\n" not in str(caught.value)


def test_only_what_was_judged_is_trained(encoder) -> None:
    """Ids as in supervised training; labels of the response alone, its ends masked if wanted."""
    (sample,) = encoder().read(SESSION, "erniekit")
    assert isinstance(sample, JudgedSample) and not sample.is_desirable
    tokenizer = encoder().tokenizer
    plain = Encoder(tokenizer, encoder().template, 512)
    (whole,) = plain.samples(Dialogue(read_judgement(SESSION, "erniekit").dialogue.messages))
    assert (sample.token_ids, sample.labels) == (whole.token_ids, whole.labels)
    said = tokenizer.decode([i for i in sample.labels if i != UNTRAINED])
    assert "It comes after one." in said and "Yes." in said and "The first." not in said
    assert sample.labels[sample.num_prompt - 2] == UNTRAINED != sample.labels[sample.num_prompt - 1]
    (masked,) = encoder(masks_end=True).read(SESSION, "erniekit")
    assert sample.labels.count(tokenizer.eos_id) == 2 > masked.labels.count(tokenizer.eos_id) == 0
    assert masked.num_trained == sample.num_trained - 2


def test_the_other_answer_is_that_of_the_next_other_prompt(encoder, tmp_path: Path) -> None:
    records = judgements(3)
    # The second record has the prompt of the first one, the third cannot be used.
    twin = {**records[0], "response": "No.", "label": False}
    lines = [records[0], twin, {**records[1], "label": "no"}, records[1], records[2]]
    path = write_lines(tmp_path / "judged.jsonl", lines)
    data = Data(train_dataset_path=(str(path),), max_seq_len=64, random_shuffle=False)
    stream = Stream(data, "train", encoder(64), seed=0)
    alone = [stream.encoder.read(lines[i], "erniekit")[0] for i in (0, 1, 3, 4)]
    found = [stream.read(0, i)[0] for i in (0, 1, 3, 4)]
    for sample, next_one in zip(found, (alone[2], alone[2], alone[3], alone[0])):
        assert isinstance(sample, JudgedSample) and sample.other is not None
        start, other = next_one.num_prompt, sample.other
        prompt = list(sample.token_ids[: sample.num_prompt])
        assert list(other.token_ids) == prompt + list(next_one.token_ids[start:])
        assert list(other.labels[len(prompt) - 1 :]) == list(next_one.labels[start - 1 :])
        assert set(other.labels[: len(prompt) - 1]) == {UNTRAINED}
    assert len({sample.key for sample in found}) == 4


def test_what_is_cut_is_counted_where_it_is_read_for_itself(encoder, tmp_path: Path) -> None:
    """Not also by the record before, whose answer it stands beside."""
    old = {"src": ["What? " * 30, "And so?"], "tgt": ["That."], "response": "Yes.", "label": True}
    lines = [old | {"src": [*old["src"][:1], f"And {i}?"]} for i in range(6)]
    path = write_lines(tmp_path / "judged.jsonl", lines)
    stream = Stream(Data(train_dataset_path=(str(path),)), "train", encoder(64), seed=0)
    for index in range(6):
        stream.read(0, index)
    assert stream.encoder.counts["dialogues cut"] == stream.encoder.counts["turns dropped"] == 6


def test_the_other_answer_is_cut_to_fit_and_takes_no_place_in_a_row(
    encoder, tmp_path: Path
) -> None:
    long = {"src": ["Short?"], "response": "It is " + "one and " * 20 + "two.", "label": True}
    short = {"src": ["What is one, and what is two, and three?"], "response": "No.", "label": False}
    path = write_lines(tmp_path / "judged.jsonl", [long, short])
    limit = len(encoder().read(long, "erniekit")[0]) + 1
    data = Data(train_dataset_path=(str(path),), max_seq_len=limit)
    stream = Stream(data, "train", encoder(limit), seed=0)
    (first,), (second,) = stream.read(0, 0), stream.read(0, 1)
    assert isinstance(second, JudgedSample) and second.other is not None
    assert len(second.other) == limit == len(second.other.labels)
    assert second.other.num_trained < first.num_trained
    batch = batch_of([[first, second]], Cursor())
    assert batch.num_tokens == len(first) + len(second) and batch.unit == "answers"
    assert batch.others is not None and batch.others.num_tokens > batch.others.num_trained
    assert batch.is_desirable_S is not None and batch.is_desirable_S.tolist() == [True, False]


def test_bad_records_are_told_by_line_and_counted(encoder, tmp_path: Path, caplog) -> None:
    bad: list = [{**ERNIEKIT, "label": "yes"}, 7]
    path = write_lines(tmp_path / "judged.jsonl", [*judgements(5), *bad])
    data = Data(train_dataset_path=(str(path),), max_seq_len=128, max_bad_data_share=0.5)
    logging.getLogger("erniekit").propagate = True
    with caplog.at_level(logging.WARNING):
        found = survey(Stream(data, "train", encoder(128), seed=0), 100)
    assert (found.num_bad, found.num_samples) == (2, 5)
    assert f"{path}:6: label is 'yes'; expected true or false" in caplog.text
    assert f"{path}:7: a number; expected an object" in caplog.text
    alone = write_lines(tmp_path / "alone.jsonl", judgements(1))
    data = Data(train_dataset_path=(str(alone),), max_bad_data_share=0.5)
    with pytest.raises(DataError, match="no other prompt in the 100 records after it"):
        survey(Stream(data, "train", encoder(128), seed=0), 100)
