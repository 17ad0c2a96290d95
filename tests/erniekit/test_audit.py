"""`erniekit data`: faults by place, quarantine, and a ledger that closes on any input."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ernie.chat import UNTRAINED
from ernie.settings import ConfigError
from erniekit.cli import main
from erniekit.config import run_from
from erniekit.data import audit
from erniekit.data.chunks import SIZE
from erniekit.data.columns import column_of
from erniekit.data.dialogue import read_dialogue
from erniekit.data.sources import DataError, open_source
from erniekit.data.stream import stream
from erniekit.data.survey import survey
from tests.erniekit.conftest import dialogues, write_lines


@pytest.fixture(scope="module")
def folder(tiny) -> Path:
    return tiny("tiny-dense")


@pytest.fixture
def words(folder: Path, tmp_path: Path):
    """A function from a training file and settings to the words of a run."""

    def make(train: Path, **more: object) -> list[str]:
        values = {
            "model_name_or_path": folder,
            "train_dataset_path": train,
            "output_dir": tmp_path / "out",
            "max_seq_len": 96,
            "max_bad_data_share": 1,
        } | more
        return [f"{key}={value}" for key, value in values.items()]

    return make


def found(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out/data/ledger.json").read_text())


def quarantined(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


ROOT = Path(__file__).parents[2]

# --- faults ---

GOOD = b'{"src": ["a"], "tgt": ["b"]}'
# The line, its column (None where none can be named) and words of the reason.
BAD = [
    (b'{"src": ["a", "tgt": ["b"]}', 20, "not a JSON object (Expecting ',' delimiter)"),
    (b'{"src": ["a"], "tgt": ["b"', 27, "not a JSON object"),
    (b"[" * 5000, None, "not a JSON object"),
    (b'{"n": 1' + b"0" * 5000 + b"}", None, "not a JSON object"),
    (b"null", None, "null; expected an object"),
    (b'["a", "b"]', None, "a list; expected an object"),
    (b'{"src": ["caf\xe9"], "tgt": ["b"]}', 14, "not UTF-8 text (byte 13)"),
    ('{"src": ["é"], "tgt": ["\xff"]}'.encode("latin-1"), 11, "not UTF-8 text"),
    ('{"é": 1, "src": ["a"], "tgt": [7]}'.encode(), 32, "tgt[0] is a number"),
    (b'{"src": ["a"], "tgt": ["b"], "src": ["c"]}', None, "the key 'src' is given twice"),
    (b'{"src": ["a"]}', 1, "tgt is missing"),
    (b'{"src": ["a"], "tgt": ["b", "  "]}', 29, "tgt[1] is empty"),
    (b'{"src": ["a"],  "tgt": {"a": 1}}', 24, "tgt is an object"),
    (b'{"src": ["a"], "tgt": ["b"], "label": [2]}', 40, "label[0] is 2; expected 0 or 1"),
    (b'{"src": ["a"], "tgt": ["b"], "label": [0]}', None, "no answer with label 1"),
    (b'{"src": ["a\\ud800"], "tgt": ["b"]}', None, "lone surrogate"),
    (b'{"src": ["' + b"long " * 400_000 + b'"], "tgt": ["b"]}', None, "its last turn is longer"),
]


def test_every_fault_is_told_by_line_and_column_and_kept(words, tmp_path: Path, capsys) -> None:
    path = tmp_path / "train.jsonl"
    lines = [line for bad, _, _ in BAD for line in (GOOD, bad)]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    before = path.read_bytes()
    assert main(["data", *words(path)]) == 0
    told = capsys.readouterr().out
    kept = quarantined(tmp_path / "out/data/train.jsonl.bad.jsonl")
    assert len(kept) == len(BAD)
    for number, (record, (line, column, reason)) in enumerate(zip(kept, BAD)):
        assert record["line"] == 2 * number + 2
        assert (record["column"], reason in record["reason"]) == (column, True), record["reason"]
        assert record["record"] == line.decode("utf-8", "backslashreplace")
        place = f"{path}:{record['line']}" + (f":{column}" if column else "")
        assert f"{place}: {record['reason']}\n" in told
    assert path.read_bytes() == before
    assert found(tmp_path)["train"]["all"]["num_unusable"] == len(BAD)


MESSAGES = [
    ([{"role": "system", "content": "s"}], 1, "the last message is not an answer"),
    ([{"role": "user", "content": "q"}] * 2, 2, "messages[1] is a second user message"),
    (["q", {"role": "assistant", "content": "a"}], 1, "messages[0] is 'q'; expected an object"),
    ([{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}], 2, "has the role 'bot'"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], 1, "is of type 'image_url'"),
    ([{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}], 2, "empty answer"),
    ([{"role": "user", "content": "q"}, {"role": "assistant"}], 2, "messages[1].content is None"),
]


@pytest.mark.parametrize(("messages", "number", "reason"), MESSAGES)
def test_faults_of_messages_point_at_the_message(messages, number, reason, words, tmp_path) -> None:
    path = write_lines(tmp_path / "train.jsonl", [{"messages": messages}])
    assert main(["data", *words(path, train_dataset_type="messages")]) == 0
    (kept,) = quarantined(tmp_path / "out/data/train.jsonl.bad.jsonl")
    assert reason in kept["reason"]
    assert kept["record"][kept["column"] - 1 :].startswith(json.dumps(messages[number - 1]))


def test_too_many_unusable_records_end_with_2_and_few_with_0(words, tmp_path, capsys) -> None:
    path = tmp_path / "train.jsonl"
    write_lines(path, [*dialogues(99), {"src": []}])
    assert main(["data", *words(path, max_bad_data_share=0.01)]) == 0
    assert main(["data", *words(path, max_bad_data_share=0.009)]) == 2
    assert "1 of 100 records cannot be used (src is empty (1))" in capsys.readouterr().err
    assert found(tmp_path)["train"]["all"]["num_unusable"] == 1, (
        "the ledger is written all the same"
    )


def test_a_quarantine_of_before_is_gone_once_the_file_is_good(words, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "train.jsonl", [{"src": []}, *dialogues(3)])
    assert main(["data", *words(path)]) == 0
    write_lines(path, dialogues(3))
    assert main(["data", *words(path)]) == 0
    assert [p.name for p in (tmp_path / "out/data").iterdir()] == ["ledger.json"]


def test_many_faults_are_all_kept_and_the_first_told(words, tmp_path: Path, capsys) -> None:
    path = write_lines(tmp_path / "train.jsonl", [{"src": []}] * 50 + dialogues(1))
    assert main(["data", *words(path)]) == 0
    told = capsys.readouterr().out
    assert told.count("src is empty") == 20
    assert f"... and 30 more, all of them in {tmp_path}/out/data/train.jsonl.bad.jsonl" in told
    assert len(quarantined(tmp_path / "out/data/train.jsonl.bad.jsonl")) == 50


def test_files_of_one_name_have_quarantines_of_their_own(words, tmp_path: Path) -> None:
    paths = [tmp_path / name / "d.jsonl" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        write_lines(path, [{"src": [path.parent.name]}, *dialogues(2)])
    both = {"train_dataset_type": "erniekit,erniekit", "train_dataset_prob": "1,1"}
    assert main(["data", *words(f"{paths[0]},{paths[1]}", **both)]) == 0
    kept = sorted((tmp_path / "out/data").glob("*.bad.jsonl"))
    assert [p.name for p in kept] == ["d.jsonl.bad.jsonl", "train-2-d.jsonl.bad.jsonl"]
    assert [json.loads(quarantined(p)[0]["record"])["src"] for p in kept] == [["a"], ["b"]]


def test_files_that_cannot_be_opened_are_one_sentence(words, tmp_path: Path, capsys) -> None:
    packed = bytearray(gzip.compress(b"".join(b"%d" % random.random() for _ in range(9)) * 999))
    (tmp_path / "cut.gz").write_bytes(packed[:-20])
    packed[30:40] = bytes(10)
    (tmp_path / "flipped.gz").write_bytes(packed)
    for name in ("cut.gz", "flipped.gz", "none.jsonl"):
        assert main(["data", *words(tmp_path / name)]) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1, error
    assert main(["data", *words(tmp_path / "a", stage="OCR-VL-SFT")]) == 2
    assert "use SFT, DPO, UPO, KTO, RM, PT" in capsys.readouterr().err


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.text(max_size=4) | st.floats(0, 1),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text('abé."\\[]', max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
KEYS = (
    "src", "tgt", "label", "system", "is_system", "instruction", "input", "output", "history",
    "messages", "tools", "role", "content", "tool_calls", "prompt", "chosen", "rejected",
    "response", "sort", "question", "conversations", "from", "value",
)  # fmt: skip
RECORDS = st.dictionaries(
    st.sampled_from(KEYS),
    ANY_JSON | st.lists(st.dictionaries(st.sampled_from(KEYS), ANY_JSON | st.sampled_from(
        ["user", "assistant", "system", "tool", "function_call", "observation"]
    ), max_size=4), max_size=4),
    max_size=5,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    record=RECORDS | ANY_JSON, kind=st.sampled_from(["erniekit", "alpaca", "messages", "sharegpt"])
)
def test_any_record_is_read_or_refused(record, kind, folder) -> None:
    for stage in ("SFT", "DPO")[: 1 if kind == "sharegpt" else 2]:
        try:
            samples = fuzzed_stream(folder, stage).encoder.read(record, kind)
        except DataError as error:
            assert "\n" not in str(error)
        else:
            assert all(sample.num_trained for sample in samples)


_streams: dict = {}


def fuzzed_stream(folder: Path, stage: str = "SFT"):
    """A stream whose encoder the fuzzing tests share."""
    if (folder, stage) not in _streams:
        path = write_lines(folder.parent / "shared.jsonl", dialogues(1))
        values = {"model_name_or_path": str(folder), "train_dataset_path": str(path)}
        run = run_from(values | {"max_seq_len": 96, "stage": stage})
        _streams[folder, stage] = stream(run, "train")
    return _streams[folder, stage]


@settings(max_examples=200, deadline=None)
@given(value=ANY_JSON, choices=st.lists(st.integers(0, 2), max_size=4), blanks=st.booleans())
def test_a_column_is_where_the_value_begins(value, choices, blanks) -> None:
    text = json.dumps(value, indent=1 if blanks else None, ensure_ascii=False)
    path, inner = "", value
    for choice in choices:
        if isinstance(inner, list) and inner:
            choice %= len(inner)
            path, inner = f"{path}[{choice}]", inner[choice]
        elif isinstance(inner, dict) and inner:
            key = list(inner)[choice % len(inner)]
            if not key or set(key) & set(".[]"):
                break
            path, inner = f"{path}.{key}".lstrip("."), inner[key]
    column = column_of(text, path)
    if path:
        assert column is not None
        assert json.JSONDecoder().raw_decode(text, column - 1)[0] == inner


# --- the ledger ---

TEXTS = st.sampled_from(["a", "Hello!", "It is sunny.", "今天天气很好", "one and " * 9, "</s>"])
DIALOGUES = st.builds(
    lambda turns, system, labels: {
        "src": [question for question, _ in turns],
        "tgt": [answer for _, answer in turns],
        "label": [labels >> i & 1 for i in range(len(turns))],
        **({"system": system} if system else {}),
    },
    st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5),
    st.none() | TEXTS,
    st.integers(0, 31) | st.just(31),
)
LINES = st.lists(
    DIALOGUES.map(json.dumps) | DIALOGUES.map(lambda d: json.dumps(d)[:-3])
    | RECORDS.map(json.dumps) | st.just("{}") | st.just('{"src": ["a"], "tgt": ["b"]}'),
    min_size=1, max_size=25,
)  # fmt: skip


def expected(records, encoder, *, is_split: bool) -> dict[str, int]:
    """Input, and trained tokens of samples with their repetitions, without the code under test."""
    whole, trained, seen, new = 0, 0, set(), 0
    for i in range(len(records)):
        try:
            dialogue = read_dialogue(records[i], "erniekit")
        except DataError:
            whole += len(encoder.tokenizer.encode(records.text(i)))
            continue
        try:
            samples = encoder.samples(dialogue)
        except DataError:
            samples = None
        if is_split and samples is not None:
            parts = [encoder.encode(part) for part in encoder.parts(dialogue)]
            last = max(i for i, m in enumerate(dialogue.messages) if m.get("label") == 1)
            whole += sum(len(part.token_ids) for part in parts)
            unlabelled = [{**m, "label": 0} for m in dialogue.messages]
            tail = len(encoder.encode(unlabelled).token_ids)
            whole += tail - len(encoder.encode(unlabelled[: last + 1]).token_ids)
        else:
            unlabelled = [{**m, "label": 0} for m in dialogue.messages]
            whole += len(encoder.encode(unlabelled).token_ids)
        for sample in samples or ():
            count = sum(label != UNTRAINED for label in sample.labels)
            key = (tuple(sample.token_ids), tuple(sample.labels))
            trained, new = trained + count, new + count * (key not in seen)
            seen.add(key)
    return {"input": whole, "trained with repetitions": trained, "trained": new}


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lines=LINES,
    max_seq_len=st.sampled_from([24, 48, 200]),
    way=st.sampled_from(["greedy_intokens=true", "greedy_intokens=false", "packing=false"]),
    is_split=st.booleans(),
)
def test_the_ledger_closes_and_agrees_with_training(
    lines, max_seq_len, way, is_split, words, folder, tmp_path
) -> None:
    path = tmp_path / "fuzzed.jsonl"
    path.write_text("\n".join(lines))
    more = {"max_seq_len": max_seq_len, "split_multi_turn": is_split, "random_shuffle": False}
    assert main(["data", *words(path, **more), way]) == 0
    its = found(tmp_path)["train"]
    account = its["all"]
    assert its["files"][0]["tokens"] == account["tokens"]

    run = run_from(dict(word.split("=") for word in (*words(path, **more), way)))
    records = stream(run, "train")
    wanted = expected(open_source(path), records.encoder, is_split=is_split)
    assert sum(account["tokens"].values()) == account["num_tokens"] == wanted["input"]
    assert account["tokens"]["trained"] == wanted["trained"]
    assert account["num_records"] == len(lines)
    try:
        trained = survey(records, 1000)
    except DataError as error:
        assert "none of the" in str(error)
        assert account["num_unusable"] == len(lines)
        return
    assert trained.num_bad == account["num_unusable"]
    assert trained.num_samples == account["num_samples"]
    assert trained.num_trained == wanted["trained with repetitions"]
    epoch = its["epoch"]
    assert (trained.num_rows, trained.num_tokens) == (epoch["num_rows"], epoch["num_tokens"])
    assert epoch["num_free"] == trained.num_rows * max_seq_len - trained.num_tokens


def test_truncated_tokens_are_those_of_the_turns_left_out(words, tmp_path, folder) -> None:
    record = {"src": [f"question {i}?" for i in range(9)], "tgt": ["It is sunny."] * 9}
    path = write_lines(tmp_path / "train.jsonl", [record])
    assert main(["data", *words(path)]) == 0
    encoder = fuzzed_stream(folder).encoder
    (sample,) = encoder.samples(read_dialogue(record, "erniekit"))
    tokens = found(tmp_path)["train"]["all"]["tokens"]
    kept = [m["content"] for m in read_dialogue(record, "erniekit").messages]
    text = encoder.tokenizer.decode(sample.token_ids)
    left_out = next(i for i, content in enumerate(kept) if content in text and i % 2 == 0)
    shorter = read_dialogue(record, "erniekit").messages[:left_out]
    assert tokens["truncated"] == len(encoder.encode(shorter).token_ids) - 1, "all but the first"
    assert tokens["masked"] + tokens["trained"] == len(sample) + 1


def test_samples_seen_before_are_duplicates_but_other_labels_are_not(words, tmp_path) -> None:
    one = {"src": ["a", "b"], "tgt": ["c", "d"]}
    records = [one, {**one, "label": [0, 1]}, {**one, "label": [1, 1]}, one]
    path = write_lines(tmp_path / "train.jsonl", records)
    assert main(["data", *words(path)]) == 0
    account = found(tmp_path)["train"]["all"]
    assert account["num_duplicates"] == 2
    assert account["tokens"]["duplicate"] == account["num_tokens"] // 2


def test_shared_samples_are_warned_of_with_both_places(words, data, tmp_path, capsys) -> None:
    copied = write_lines(tmp_path / "copied.jsonl", [{"src": []}, *dialogues(30)[7:12]])
    more = {"eval_dataset_path": copied, "eval_dataset_type": "erniekit"}
    assert main(["data", *words(data / "train.jsonl", **more)]) == 0
    told = capsys.readouterr().out
    assert "eval: 5 samples are also in the training data" in told
    assert f"{copied}:2 = {data / 'train.jsonl'}:8" in told
    overlap = found(tmp_path)["overlap"]
    assert overlap["count"] == 5 == len(overlap["examples"])


def test_samples_cut_to_nothing_and_near_empty_ones_are_listed(words, tmp_path, capsys) -> None:
    cut = {"src": ["a", "word " * 19], "tgt": ["b", "c"], "label": [1, 0]}
    records = [*dialogues(3), cut, {"src": ["What?"], "tgt": ["a"]}]
    path = write_lines(tmp_path / "train.jsonl", records)
    assert main(["data", *words(path)]) == 0
    its = found(tmp_path)["train"]
    assert its["cut_away"] == [f"{path}:4"]
    assert its["near_empty"] == [f"{path}:5"]
    told = capsys.readouterr().out
    assert (
        f"1 samples have no trained token left after cutting; they are not trained ({path}:4)"
        in told
    )
    assert f"1 samples train at most 2 tokens ({path}:5)" in told


def test_files_of_weight_0_are_dropped_and_do_not_hide_others(words, tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", dialogues(4))
    second = write_lines(tmp_path / "b.jsonl", dialogues(4))
    more = {"train_dataset_type": "erniekit,erniekit", "train_dataset_prob": "0,1"}
    assert main(["data", *words(f"{first},{second}", **more)]) == 0
    unused, used = found(tmp_path)["train"]["files"]
    assert unused["tokens"]["dropped"] == unused["num_tokens"] == used["num_tokens"] > 0
    assert used["num_duplicates"] == 0


def test_padding_is_told_apart(words, data: Path, tmp_path: Path) -> None:
    more = {"padding": True, "batch_size": 4}
    assert main(["data", *words(data / "train.jsonl", **more)]) == 0
    values = dict(word.split("=") for word in words(data / "train.jsonl", **more))
    records = stream(run_from(values), "train")
    batches = list(records.batches(4, end=records.epoch_size))
    padding = sum(len(batch.token_ids_T) - batch.num_tokens for batch in batches)
    assert found(tmp_path)["train"]["epoch"]["num_padding"] == padding > 0


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=6))
def test_shares_add_up(counts) -> None:
    shares = audit.shares_of(counts)
    assert sum(shares) == (1000 if sum(counts) else 0)
    assert all(abs(s - 1000 * n / max(sum(counts), 1)) < 1 for s, n in zip(shares, counts))


def test_what_is_held_does_not_grow_with_the_text(folder, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [
        {"src": [f"{i} " + "word " * 400], "tgt": ["again " * 400]} for i in range(300)
    ])  # fmt: skip
    values = {"model_name_or_path": str(folder), "train_dataset_path": str(path)}
    run = run_from(values | {"max_seq_len": 8192, "output_dir": str(tmp_path)})
    records = stream(run, "train")
    split = audit.Split("train", records, audit.Faults(1.0, 300))
    tracemalloc.start()
    with audit.Chunks({"train": records}, 1) as chunks:
        audit._read(split, chunks, tmp_path, set())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(split.samples) == 300
    assert peak < path.stat().st_size / 3, f"{peak:,} bytes for {path.stat().st_size:,} of text"


@pytest.mark.ranks
def test_several_processes_find_the_same(words, tmp_path: Path) -> None:
    records = [r if i % 7 else {"src": [i]} for i, r in enumerate(dialogues(2 * SIZE + 5))]
    path = write_lines(tmp_path / "train.jsonl", records)
    told = []
    for number in (1, 2):
        assert main(["data", *words(path, preprocessing_num_workers=number)]) == 0
        files = sorted((tmp_path / "out/data").iterdir())
        told.append([p.read_bytes() for p in files])
    assert len(told[0]) == 2 and told[0] == told[1]


# --- pairs ---


def test_pairs_count_their_prompt_once_and_both_answers(words, folder, tmp_path: Path) -> None:
    pair = {"src": ["a?", "b?"], "tgt": ["c."], "response": [["one and two"], ["one"]],
            "sort": [0, 1]}  # fmt: skip
    same = {**pair, "response": [["x"], ["x"]]}
    path = write_lines(tmp_path / "train.jsonl", [pair, same, {**pair, "sort": [1, 1]}])
    more = {"stage": "DPO", "mask_out_eos_token": False}
    assert main(["data", *words(path, **more)]) == 0
    kept = quarantined(tmp_path / "out/data/train.jsonl.bad.jsonl")
    assert [k["reason"].split(";")[0] for k in kept] == [
        "both answers are the same", "sort is [1, 1]",
    ]  # fmt: skip
    encoder = fuzzed_stream(folder).encoder
    prompt = [
        {"role": "user", "content": "a?"}, {"role": "assistant", "content": "c.", "label": 0},
        {"role": "user", "content": "b?"},
    ]  # fmt: skip
    size = len(encoder.template.encode(encoder.tokenizer, prompt).token_ids)
    answers = [
        len(encoder.encode([*prompt, {"role": "assistant", "content": a}]).token_ids) - size
        for a in ("one", "one and two")
    ]
    tokens = found(tmp_path)["train"]["files"][0]["tokens"]
    assert tokens["trained"] == sum(answers)
    assert tokens["masked"] == size


def test_pairs_fill_the_rows_that_training_fills(words, tmp_path: Path) -> None:
    path = ROOT / "examples/data/dpo-train.jsonl"
    more = {"stage": "DPO", "max_seq_len": 256}
    assert main(["data", *words(path, **more)]) == 0
    its = found(tmp_path)["train"]
    trained = survey(
        stream(run_from(dict(w.split("=") for w in words(path, **more))), "train"), 999
    )
    epoch = its["epoch"]
    assert (trained.num_rows, trained.num_tokens) == (epoch["num_rows"], epoch["num_tokens"])
    assert trained.num_trained == its["all"]["tokens"]["trained"]


def test_pairs_that_are_cut_count_the_turns_once(words, tmp_path: Path) -> None:
    pair = {"src": [f"question {i}?" for i in range(6)], "tgt": ["It is sunny."] * 5,
            "response": [["one and two"], ["one"]], "sort": [0, 1]}  # fmt: skip
    path, told = write_lines(tmp_path / "train.jsonl", [pair]), []
    for size in (96, 512):
        more = {"stage": "DPO", "mask_out_eos_token": False, "max_seq_len": size}
        assert main(["data", *words(path, **more)]) == 0
        told.append(found(tmp_path)["train"]["all"])
    cut, whole = told
    assert cut["num_tokens"] == whole["num_tokens"]
    assert cut["tokens"]["truncated"] > 0 == whole["tokens"]["truncated"]
    assert cut["tokens"]["trained"] == whole["tokens"]["trained"]


# --- text stays text ---


@pytest.mark.parametrize(
    "text", ["<|end_of_sentence|>", "</s>", "<|begin_of_sentence|>", "<mask:1>"]
)
@pytest.mark.parametrize("place", ["src", "tgt", "system"])
def test_special_tokens_spelled_in_data_stay_text(text: str, place: str, folder) -> None:
    record = {"src": ["a"], "tgt": ["b"], "system": "s"}
    plain = dict(record)
    for r, t in ((record, f"x {text} y"), (plain, "x y")):
        r[place] = t if place == "system" else [t]
    encoder = fuzzed_stream(folder).encoder
    counts = []
    for r in (record, plain):
        (sample,) = encoder.samples(read_dialogue(r, "erniekit"))
        ids = [*sample.token_ids, sample.labels[-1]]
        counts.append(sum(i in encoder.tokenizer.special_ids for i in ids))
    assert counts[0] == counts[1], "text has become a control token"
    (sample,) = encoder.samples(read_dialogue(record, "erniekit"))
    assert text in encoder.tokenizer.decode(sample.token_ids, skip_special=True)


def test_a_sample_that_is_no_place_is_refused(words, data: Path, capsys) -> None:
    path = data / "train.jsonl"
    for wanted, message in (
        ("train.jsonl", "is not a place; give file:line"),
        ("train.jsonl:41", "train.jsonl has no record in line 41"),
        ("other.jsonl:1", f"other.jsonl is not a file of this run; give one of {path}"),
    ):
        assert main(["data", *words(path, sample=wanted)]) == 2
        assert message in capsys.readouterr().err


def test_no_data_is_refused(folder, capsys) -> None:
    assert main(["data", f"model_name_or_path={folder}"]) == 2
    assert "train_dataset_path is not set" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="show=-1 is too small"):
        run_from({"show": -1})
