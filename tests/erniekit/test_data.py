"""Records to rows: formats, faults by line, cutting, mixing, packing."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie.chat import UNTRAINED, ChatTemplate
from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer
from erniekit.config import Data
from erniekit.data.batch import batch_of
from erniekit.data.dialogue import Encoder, Sample, read_dialogue
from erniekit.data.mix import Mix
from erniekit.data.pack import START, Cursor, Drawn, pack
from erniekit.data.sources import DataError, open_source
from erniekit.data.stream import Stream
from erniekit.data.survey import survey
from erniekit.data.wholes import num_left_out
from tests.erniekit.conftest import dialogues, write_lines


@pytest.fixture(scope="module")
def encoder(tiny):
    """A function from a row length to an encoder of the tiny model."""
    folder = tiny("tiny-dense")
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.for_folder(folder, tokenizer)
    return lambda max_tokens=512, **more: Encoder(tokenizer, template, max_tokens, **more)


# --- files ---


def test_lines_survive_a_byte_order_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n   \n{"a": 2}\n\n{"a": "\xe4\xbd\xa0"}')
    source = open_source(path)
    found = [(source[i], source.where(i)) for i in range(len(source)) if i != 1]
    assert found == [({"a": 1}, f"{path}:1"), ({"a": 2}, f"{path}:4"), ({"a": "你"}, f"{path}:6")]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_every_container_gives_the_same_records(name: str, tmp_path: Path) -> None:
    records, path = dialogues(5), tmp_path / name
    text = "\n".join(map(json.dumps, records))
    if name.endswith(".json"):
        path.write_text(json.dumps(records, indent=1))
    else:
        path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    source = open_source(path)
    assert [source[i] for i in range(len(source))] == records


def test_files_that_are_no_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    packed = gzip.compress(b'{"a": 1}\n' * 1000)
    (tmp_path / "cut.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "cut.json").write_text('[{"a": 1},')
    for name, words in (
        ("none.jsonl", "there is no data file"),
        ("empty.jsonl", "holds no records"),
        ("cut.gz", "not a whole gzip file"),
        ("cut.json", "begins like a JSON array"),
    ):
        with pytest.raises(ConfigError, match=words):
            open_source(tmp_path / name)


# --- formats ---


def test_the_formats_say_the_same_dialogue() -> None:
    turns = [("a?", "b."), ("c?", "d.")]
    erniekit = {"src": ["a?", "c?"], "tgt": ["b.", "d."], "system": "s", "label": [0, 1]}
    alpaca = {"instruction": "c?", "output": "d.", "history": [["a?", "b."]], "system": "s"}
    messages: list[dict] = [{"role": "system", "content": "s"}]
    for question, answer in turns:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})

    def plain(record: dict, kind: str) -> list[dict]:
        return [
            {k: v for k, v in m.items() if k != "label"}
            for m in read_dialogue(record, kind).messages
        ]

    assert plain(erniekit, "erniekit") == plain(alpaca, "alpaca") == messages
    conversations = [
        {"from": {"user": "human", "assistant": "gpt"}.get(m["role"], "system"),
         "value": m["content"]}
        for m in messages
    ]  # fmt: skip
    for key, kind, said in (
        ("messages", "messages", messages),
        ("conversations", "sharegpt", conversations),
    ):
        assert plain({key: said}, kind) == messages
        assert plain({key: said[1:], "system": "s"}, kind) == messages
    assert [m.get("label") for m in read_dialogue(erniekit, "erniekit").messages] == [
        None, None, 0, None, 1,
    ]  # fmt: skip


def said(question: object, answer: object, **before: object) -> dict:
    """A record of one turn, after messages of roles."""
    turn = {**before, "user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": text} for role, text in turn.items()]}


def test_a_blank_system_text_is_none_in_every_format(encoder) -> None:
    turn = [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b."}]
    (wanted,) = encoder().read({"src": ["a?"], "tgt": ["b."]}, "erniekit")
    for blank in ("", " \n"):
        records: list[tuple[str, dict]] = [
            ("erniekit", {"src": ["a?"], "tgt": ["b."], "system": blank}),
            ("alpaca", {"instruction": "a?", "output": "b.", "input": blank, "system": blank}),
            ("messages", {**said("a?", "b."), "system": blank}),
            ("messages", said("a?", "b.", system=blank)),
            ("messages", said("a?", "b.", system=[{"type": "text", "text": blank}])),
            ("sharegpt", {"conversations": turn, "system": blank}),
            ("sharegpt", {"conversations": [{"from": "system", "value": blank}, *turn]}),
        ]
        for kind, record in records:
            assert encoder().read(record, kind) == [wanted], (kind, record)
    dialogue = read_dialogue({**said("a?", "b.", system=" "), "system": "s"}, "messages")
    assert dialogue == read_dialogue(said("a?", "b.", system="s"), "messages")


def test_an_answer_without_text_may_be_a_thought() -> None:
    record = said("a?", "")
    record["messages"][1]["reasoning_content"] = "Hm."
    assert read_dialogue(record, "messages").messages == record["messages"]
    record["messages"][1]["reasoning_content"] = " "
    with pytest.raises(DataError, match=r"messages\[1\] is an empty answer; expected text"):
        read_dialogue(record, "messages")


@pytest.mark.parametrize(
    ("kind", "record", "words"),
    [
        ("erniekit", [1], "a list; expected an object"),
        ("erniekit", {"src": ["a"]}, "tgt is missing"),
        ("erniekit", {"src": ["a"], "tgt": [" "]}, r"tgt\[0\] is empty"),
        ("erniekit", {"src": ["a"], "tgt": [3]}, r"tgt\[0\] is a number"),
        ("erniekit", {"src": ["a", "b"], "tgt": ["c"]}, "2 src and 1 tgt"),
        ("erniekit", {"src": ["a"], "tgt": ["c"], "system": 1}, "system is a number"),
        ("erniekit", {"src": ["a"], "tgt": ["c"], "label": [1, 0]}, "expected a list of one"),
        ("alpaca", {"instruction": "a"}, "output is missing"),
        ("alpaca", {"instruction": "a", "output": "b", "history": ["ab"]}, "not a pair"),
        *(
            ("alpaca", {"instruction": "a", "output": "b", "history": [pair]}, words)
            for pair, words in (
                (["c", ""], r"history\[0\]\[1\] is an empty answer; expected text"),
                ([" ", "d"], r"history\[0\]\[0\] is an empty question; expected text"),
            )
        ),
        ("erniekit", {"messages": []}, "it has no src but messages, as of the type messages"),
        (
            "messages",
            {"conversations": []},
            "no messages but conversations, as of the type sharegpt",
        ),
        ("messages", {"messages": []}, "no messages"),
        ("messages", {"messages": [{"role": "system", "content": "s"}]}, "is not an answer"),
        ("messages", {"messages": [{"role": "user", "content": "s"}] * 2}, "in a row"),
        ("messages", {"messages": [{"role": "assistant", "content": "s"}]}, "without a question"),
        ("messages", {"messages": [{"role": "system", "content": ""}]}, "is not an answer"),
        ("messages", said(" ", "b"), r"messages\[0\] is an empty question"),
        ("messages", said([], "b"), r"messages\[0\] is an empty question"),
        ("messages", said("a", "\n\t"), r"messages\[1\] is an empty answer"),
        (
            "messages",
            said("a", [{"type": "text", "text": " "}]),
            r"messages\[1\] is an empty answer",
        ),
        ("messages", {**said("a", "b"), "system": ["s"]}, "system is a list; expected a string"),
        (
            "messages",
            {**said("a", "b", system="s"), "system": "s"},
            r"system is given, and messages\[0\] is of the system too; expected one of them",
        ),
        (
            "sharegpt",
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "  "}]},
            r"conversations\[1\] is an empty answer",
        ),
    ],
)
def test_unusable_records_say_why(kind: str, record: object, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_dialogue(record, kind)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_other_encodings_are_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('{"src": ["a"], "tgt": ["b"]}', encoding="utf-16")
    with pytest.raises(ConfigError, match=r"is text in UTF-16; save it as UTF-8"):
        open_source(tmp_path / name)


# --- samples ---


def test_labels_are_shifted_once_and_only_answers_are_trained(encoder) -> None:
    record = {"src": ["Hello!", "a day"], "tgt": ["my friend", "It is sunny"], "label": [0, 1]}
    (sample,) = encoder().samples(read_dialogue(record, "erniekit"))
    tokenizer = encoder().tokenizer
    trained = [label for label in sample.labels if label != UNTRAINED]
    assert tokenizer.decode(trained[:-1]) == "It is sunny"
    assert trained[-1] == tokenizer.eos_id
    for i in range(len(sample) - 1):
        assert sample.labels[i] in (UNTRAINED, sample.token_ids[i + 1])


def test_the_weight_of_an_answer_is_its_label(encoder) -> None:
    def messages(**of_first: object) -> dict:
        roles = ("user", "assistant") * 2
        found = [{"role": role, "content": f"It is {i}."} for i, role in enumerate(roles)]
        found[1] |= of_first
        return {"messages": found}

    labels = [
        encoder().samples(read_dialogue(messages(**more), "messages"))[0].labels
        for more in ({"label": 0}, {"weight": 0}, {"weight": 0, "label": 0}, {}, {"weight": 1})
    ]
    assert labels[0] == labels[1] == labels[2] != labels[3] == labels[4]

    def turns(**of_first: object) -> dict:
        found = [{"from": f, "value": f"It is {i}."} for i, f in enumerate(("human", "gpt") * 2)]
        found[1] |= of_first
        return {"conversations": found}

    for more, wanted in (({"weight": 0}, 0), ({"label": 0}, 0), ({}, 3), ({"weight": 1}, 3)):
        dialogue = read_dialogue(turns(**more), "sharegpt")
        assert encoder().samples(dialogue)[0].labels == labels[wanted], more
    for more, told in (
        ({"weight": 0, "label": 1}, "has the label 1 and the weight 0; give one"),
        ({"weight": 0.5}, r"messages\[1\].label is 0.5; expected 0 or 1"),
    ):
        with pytest.raises(DataError, match=told):
            read_dialogue(messages(**more), "messages")


def test_too_long_dialogues_lose_their_oldest_whole_turns(encoder) -> None:
    turns = [f"question {i}?" for i in range(9)]
    record = {"src": turns, "tgt": ["It is sunny."] * 9, "system": "Be nice."}
    (whole,) = encoder().samples(read_dialogue(record, "erniekit"))
    for room in range(40, len(whole) + 2, 11):
        cut = encoder(room)
        (sample,) = cut.samples(read_dialogue(record, "erniekit"))
        text = cut.tokenizer.decode(sample.token_ids)
        dropped = cut.counts["turns dropped"]
        kept = [turn for turn in turns if turn in text]
        assert len(sample) < room
        assert "Be nice." in text
        assert kept == turns[dropped:]
        assert sample.token_ids[0] == whole.token_ids[0], "the begin token must stay"
    with pytest.raises(DataError, match="its last turn is longer"):
        encoder(16).samples(read_dialogue(record, "erniekit"))


def test_a_sample_without_trained_tokens_is_counted_not_trained(encoder, tmp_path: Path) -> None:
    records = [*dialogues(60), {"src": ["a"], "tgt": ["b"], "label": [0]}]
    path = write_lines(tmp_path / "a.jsonl", records)
    stream = Stream(Data(train_dataset_path=(str(path),)), "train", encoder(), seed=0)
    found = survey(stream, 1000)
    assert (found.num_samples, found.num_bad) == (60, 1)
    assert stream.faults.by_reason == {"no answer with label 1": 1}


def test_one_answer_per_sample_splits_turns(encoder) -> None:
    record = {"src": ["a", "b", "c"], "tgt": ["d", "e", "f"], "label": [1, 0, 1]}
    samples = encoder(one_answer_per_sample=True).samples(read_dialogue(record, "erniekit"))
    assert len(samples) == 2


def test_each_answer_of_chatml_is_a_sample_of_its_own(encoder) -> None:
    """As in ERNIEKit, where `messages` is one sample; what stands behind the last is left out."""
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    messages = [{"role": role, "content": text} for role, text in turns]
    record, plain = {"messages": messages}, encoder()
    splitting = encoder(one_answer_per_sample=True)
    assert len(plain.read(record, "messages")) == 1
    assert plain.read(record, "chatml") == splitting.read(record, "messages")
    assert num_left_out(plain, record, "chatml") == num_left_out(plain, record, "messages") == 0
    messages[-1]["label"] = 0
    left_out = num_left_out(plain, record, "chatml")
    assert left_out == num_left_out(splitting, record, "messages") > 0
    assert len(plain.read(record, "chatml")) == 1


def test_the_rows_of_a_sorted_file_are_not_those_of_its_beginning(encoder, tmp_path) -> None:
    short = [{"src": ["a"], "tgt": ["b"]}] * 300
    long = [{"src": ["a " * 60], "tgt": ["b " * 60]}] * 300
    path = write_lines(tmp_path / "a.jsonl", [*short, *long])
    data = Data(train_dataset_path=(str(path),), max_seq_len=256, random_shuffle=False)
    read = [survey(Stream(data, "train", encoder(256), seed=0), most) for most in (100, 600)]
    assert (read[0].num_records, read[1].num_records) == (100, 600)
    assert read[0].num_rows == pytest.approx(read[1].num_rows, rel=0.25)


def test_broken_lines_are_named_and_too_many_end_the_run(encoder, tmp_path, caplog) -> None:
    lines = [json.dumps(r) for r in dialogues(100)]
    lines[40] = '{"src": ["a'
    lines[70] = '{"src": [], "tgt": []}'
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))

    def survey_with(share: float):
        data = Data(train_dataset_path=(str(path),), max_bad_data_share=share)
        return survey(Stream(data, "train", encoder(), seed=0), 1000)

    assert survey_with(0.02).num_bad == 2
    assert f"{path}:41" in caplog.text
    assert f"{path}:71: src is empty" in caplog.text
    with pytest.raises(DataError, match="2 of 100 records cannot be used"):
        survey_with(0.01)


# --- mixing ---


@pytest.mark.parametrize("strategy", ["random", "concat", "interleave_under", "interleave_over"])
@pytest.mark.parametrize("start", [1, 37, 5000])
def test_a_stream_entered_later_is_the_same_stream(strategy: str, start: int) -> None:
    mix = Mix([7, 90], [0.3, 0.7], strategy=strategy, seed=5)
    assert list(islice(mix.draws(start), 50)) == list(islice(mix.draws(), start, start + 50))


def test_concat_takes_everything_once_and_shuffles_anew() -> None:
    mix = Mix([5, 0, 8], [1, 0, 0.1], strategy="concat", seed=1)
    epochs = list(islice(mix.draws(), 26))
    everything = {(0, i) for i in range(5)} | {(2, i) for i in range(8)}
    assert set(epochs[:13]) == set(epochs[13:]) == everything
    assert epochs[:13] != epochs[13:]
    ordered = Mix([3], [1.0], strategy="concat", shuffle=False)
    assert [i for _, i in islice(ordered.draws(), 6)] == [0, 1, 2, 0, 1, 2]


def test_short_epochs_of_files_in_their_order_go_on_and_do_not_begin_again() -> None:
    mix = Mix([100], [1.0], shuffle=False, limit=30)
    assert [i for _, i in islice(mix.draws(), 120)] == [i % 100 for i in range(120)]
    two = Mix([50, 50], [0.9, 0.1], shuffle=False, seed=3)
    draws = list(islice(two.draws(), 500))
    for source in (0, 1):
        own = [i for s, i in draws if s == source]
        assert own == [i % 50 for i in range(len(own))]
    assert len([1 for s, _ in draws if s == 1]) > 30
    assert list(islice(two.draws(333), 100)) == draws[333:433]


def test_interleaving_ends_with_the_first_or_the_last_file() -> None:
    for strategy in ("interleave_under", "interleave_over"):
        mix = Mix([10, 300, 6000], [0.5, 0.25, 0.25], strategy=strategy, seed=3)
        epoch = list(islice(mix.draws(), mix.epoch_size))
        counts = Counter(source for source, _ in epoch)
        used_up = [counts[s] >= size for s, size in enumerate(mix.sizes)]
        assert used_up == ([True, False, False] if strategy.endswith("under") else [True] * 3)
        last = epoch[-1][0]
        assert counts[last] == mix.sizes[last], "the epoch goes on after the deciding draw"
        for source, size in enumerate(mix.sizes):
            first = [i for s, i in epoch if s == source][:size]
            assert len(set(first)) == len(first), "a record came twice within a pass"


def test_random_mixing_follows_the_weights() -> None:
    mix = Mix([1000, 1000, 50], [3, 1, 0], strategy="random", seed=2)
    assert mix.epoch_size == 2000
    counts = Counter(source for source, _ in islice(mix.draws(), 20_000))
    assert counts[2] == 0
    assert abs(counts[0] / 20_000 - 0.75) < 0.01


# --- packing ---


WAYS = ["sequential", "greedy", "separate", "full"]


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    way=st.sampled_from(WAYS),
    buffer_size=st.integers(1, 9),
    cut=st.integers(0, 60),
    seed=st.sampled_from([None, 3]),
)
def test_packing_loses_and_mixes_nothing(lengths, way, buffer_size, cut, seed) -> None:
    """Of samples up to a row long, and of longer ones, which are cut."""
    samples = [
        Sample([100 * i + j for j in range(n)], [100 * i + j + 1 for j in range(n)])
        for i, n in enumerate(lengths)
    ]
    drawn = [Drawn(i // 2, i % 2, sample) for i, sample in enumerate(samples)]
    options = {"way": way, "buffer_size": buffer_size, "seed": seed}
    rows = list(pack(drawn, 20, **options))
    packed = [d for row, _ in rows for d in row]
    ids = [i for d in packed for i in d.sample.token_ids]
    in_order = [i for sample in samples for i in sample.token_ids]
    assert sorted(ids) == in_order
    assert all(label == i + 1 for d in packed for i, label in zip(d.sample.token_ids,
                                                                  d.sample.labels))  # fmt: skip
    sizes = [sum(map(len, row)) for row, _ in rows]
    assert max(sizes) <= 20
    if way == "full":
        assert sorted(sizes)[1:] == [20] * (len(rows) - 1), "only the last row has room"
    else:
        whole = [d for d in packed if len(samples[2 * d.position + d.part]) <= 20]
        assert all(d.offset == 0 and d.is_last for d in whole), "what fits a row is not cut"
    if way != "greedy" and not (way == "full" and seed):
        assert ids == in_order

    # Going on from any cursor gives the remaining rows.
    number = cut % len(rows)
    cursor = rows[number][1]
    rest = [d for d in drawn if (d.position, d.part) >= (cursor.position, cursor.part)]
    if rest:
        rest[0] = rest[0].piece(cursor.offset, len(rest[0]))
    again = list(pack(rest, 20, **options))[cursor.rows :]
    assert [row for row, _ in again] == [row for row, _ in rows[number + 1 :]]


def test_batches_are_flat_and_padding_is_a_segment_of_its_own() -> None:
    rows = [[Sample([1, 2, 3], [2, 3, 4]), Sample([5], [6])], [Sample([7, 8], [-100, 9])]]
    batch = batch_of(rows, Cursor(), fixed_size=10)
    assert batch.token_ids_T.tolist() == [1, 2, 3, 5, 7, 8, 0, 0, 0, 0]
    assert batch.labels_T.tolist() == [2, 3, 4, 6, -100, 9, -100, -100, -100, -100]
    assert batch.positions_T.tolist() == [0, 1, 2, 0, 0, 1, 0, 1, 2, 3]
    assert batch.cu_seqlens_S1.tolist() == [0, 3, 4, 6, 10]
    assert (batch.num_tokens, batch.num_trained) == (6, 5)
    assert batch.cu_seqlens_S1.dtype == np.int32


# --- faults of whole runs ---


@pytest.fixture
def faulty(tmp_path: Path):
    """A function to a stream over `size` records of which those at `bad` cannot be used."""

    def make(encoder: Encoder, size: int, bad: range, **more: object) -> Stream:
        lines = [json.dumps(record) for record in dialogues(size)]
        for index in bad:
            lines[index] = "{"
        path = tmp_path / "faulty.jsonl"
        path.write_text("\n".join(lines))
        data = Data(train_dataset_path=(str(path),), max_seq_len=128, **more)
        return Stream(data, "train", encoder, seed=0)

    return make


def test_bad_records_at_the_front_are_judged_against_the_whole_file(encoder, faulty) -> None:
    stream = faulty(encoder(), 1000, range(5), random_shuffle=False)
    assert len(list(stream.samples(START, 1000))) == 995
    stream = faulty(encoder(), 1000, range(21), random_shuffle=False)
    with pytest.raises(DataError, match="21 of 1000 records cannot be used so far"):
        list(stream.samples(START, 1000))


def test_a_record_is_counted_once_however_often_it_is_read(encoder, faulty) -> None:
    stream = faulty(encoder(), 100, range(1))
    list(stream.samples(START, 1000))
    assert stream.faults.total == 1


def test_records_that_can_never_be_used_end_an_endless_stream(encoder, faulty) -> None:
    stream = faulty(encoder(), 10, range(10), max_bad_data_share=1)
    with pytest.raises(DataError, match=r"none of 10 records can be used \(not a JSON object"):
        next(stream.samples(START))
