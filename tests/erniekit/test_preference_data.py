"""Preference records: spellings of one pair, its stretch of tokens, and what cannot be used."""

from __future__ import annotations

import logging
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest

from ernie.chat import UNTRAINED, ChatTemplate
from ernie.tokenizer import Tokenizer
from erniekit.config import Data, run_from
from erniekit.data.batch import batch_of
from erniekit.data.dialogue import Dialogue, Encoder
from erniekit.data.encoders import encoder_of
from erniekit.data.pack import Cursor
from erniekit.data.preference import Pair, PairEncoder, PairSample, read_pair
from erniekit.data.sources import DataError
from erniekit.data.stream import Stream
from erniekit.data.survey import survey
from tests.erniekit.conftest import preferences, write_lines

ERNIEKIT = {"src": ["q"], "tgt": [], "response": ["bad", "good"], "sort": [0, 1]}
LONG = {
    "src": ["What is one?", "And what is two?", "And three?"],
    "tgt": ["It is the first.", "It comes after one."],
    "response": [["Three.", "Sure?", "Yes, three."], "It is the third number, after two."],
    "sort": [1, 0],
    "system": "Be short.",
}


@pytest.fixture(scope="module")
def encoder(tiny):
    """A function from limits to an encoder of the tiny model."""
    folder = tiny("tiny-dense")
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.for_folder(folder, tokenizer)

    def make(max_tokens: int = 512, max_prompt_tokens: int = 512, masks_end: bool = False):
        return PairEncoder(
            tokenizer,
            template,
            max_tokens,
            max_prompt_tokens=max_prompt_tokens,
            masks_end=masks_end,
        )

    return make


def answers(sample: PairSample) -> list[tuple[list[int], list[int], list[int]]]:
    """Token ids, labels and positions of prompt and answer together, for both answers."""
    parts = []
    for start, end in ((sample.chosen, sample.rejected), (sample.rejected, len(sample))):
        kept = [*range(sample.chosen), *range(start, end)]
        columns = (sample.token_ids, sample.labels, sample.positions.tolist())
        parts.append(tuple([column[i] for i in kept] for column in columns))
    return parts


# --- records ---


def test_formats_give_the_same_pair() -> None:
    user = {"role": "user", "content": "q"}
    good, bad = ({"role": "assistant", "content": text} for text in ("good", "bad"))
    alpaca = {"question": "q", "chosen": "good", "rejected": "bad"}
    messages = {"prompt": [user], "chosen": [good], "rejected": [bad]}
    whole = {"chosen": [user, good], "rejected": [user, bad]}
    pair = read_pair(ERNIEKIT, "erniekit")
    assert pair == Pair([user, good], [user, bad], 1)
    assert read_pair(alpaca, "alpaca") == pair
    assert read_pair(messages, "messages") == read_pair(whole, "chatml") == pair


def test_formats_give_the_same_pair_after_system_text_and_earlier_turns() -> None:
    system, first, answer, user, good, bad = (
        {"role": role, "content": text}
        for role, text in (
            ("system", "s"), ("user", "p"), ("assistant", "a"), ("user", "q\nmore"),
            ("assistant", "good"), ("assistant", "bad"),
        )
    )  # fmt: skip
    prompt, beside = [first, answer, user], {"system": "s"}
    erniekit = {**ERNIEKIT, "src": ["p", "q\nmore"], "tgt": ["a"]}
    alpaca = {"question": "q", "input": "more", "chosen": "good", "rejected": "bad"}
    sides = {"chosen": [good], "rejected": [bad]}
    before = [system, first, {**answer, "label": 0}, user]
    wanted = Pair([*before, good], [*before, bad], len(before))
    for kind, record in (
        ("erniekit", erniekit | beside),
        ("alpaca", alpaca | beside | {"history": [["p", "a"]]}),
        ("messages", {"prompt": prompt, **sides, **beside}),
        ("messages", {"prompt": [system, *prompt], **sides}),
        ("messages", {"chosen": [*prompt, good], "rejected": [*prompt, bad], **beside}),
    ):
        assert read_pair(record, kind) == wanted, record
    blank = {"role": "system", "content": " "}
    without = read_pair({"prompt": [blank, *prompt], **sides}, "messages")
    assert without == Pair(wanted.chosen[1:], wanted.rejected[1:], len(prompt))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"sort": [1, 1]}, "expected the larger"),
        ({"response": ["a"]}, "list of two"),
        ({"response": ["a", ["b", "c"]]}, "an odd number"),
        ({"response": ["a", "a"]}, "the same"),
        ({"response": ["a", ""]}, "expected text"),
        ({"src": ["q", "r"]}, "2 src and 0 tgt"),
    ],
)
def test_a_record_that_cannot_be_used_is_one_sentence(change: dict, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        read_pair(ERNIEKIT | change, "erniekit")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ({"prompt": [], "chosen": [{}], "rejected": [{}]}, "prompt is not a list of messages"),
        ({"prompt": "q", "chosen": [{}], "rejected": [{}]}, "prompt is not a list of messages"),
        ({"chosen": [{"role": "user", "content": "q"}]}, "rejected is not a list of messages"),
        ({"chosen": [{"role": "user"}], "rejected": [{"role": "tool"}]}, "no beginning in common"),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}],
                "chosen": [{"role": "assistant", "content": "a"}],
                "rejected": [{"role": "assistant", "content": "b"}],
                "system": "s",
            },
            "is of the system too; expected one of them",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "chosen": [{"role": "assistant", "content": "a"}],
                "rejected": [{"role": "assistant", "content": " "}],
            },
            "is an empty answer; expected text",
        ),
    ],
)
def test_messages_that_cannot_be_used_are_one_sentence(record: dict, told: str) -> None:
    with pytest.raises(DataError, match=told):
        read_pair(record, "messages")


# --- tokens ---


@pytest.mark.parametrize("record", [ERNIEKIT, LONG], ids=["short", "session"])
def test_each_answer_is_the_dialogue_that_supervised_training_reads(record, encoder) -> None:
    """The same ids, labels and positions, up to the last label (after it nothing is learnt)."""
    pairs = encoder()
    plain = Encoder(pairs.tokenizer, pairs.template, 512)
    pair = read_pair(record, "erniekit")
    for messages, found in zip((pair.chosen, pair.rejected), answers(pairs.sample(pair))):
        (whole,) = plain.samples(Dialogue(messages))
        size = len(whole)
        assert found == (whole.token_ids, whole.labels, list(range(size)))


def test_ends_are_masked_and_what_only_led_to_them_is_left_out(encoder) -> None:
    pair = read_pair(LONG, "erniekit")
    with_ends, without = (encoder(masks_end=m).sample(pair) for m in (False, True))
    for (ids, labels, _), (ids_m, labels_m, _) in zip(answers(with_ends), answers(without)):
        assert ids_m == ids[:-1]
        changed = [i for i, label in enumerate(labels_m) if label != labels[i]]
        assert all(labels_m[i] == UNTRAINED for i in changed)
        num_ends = sum(label == encoder().tokenizer.eos_id for label in labels)
        assert len(changed) + 1 == num_ends
        assert labels_m[-1] != UNTRAINED


@pytest.mark.parametrize("name", ["max_tokens", "max_prompt_tokens"])
def test_a_long_prompt_loses_its_oldest_turns_and_no_answer_is_cut(name: str, encoder) -> None:
    pair = read_pair(LONG, "erniekit")
    free = encoder().sample(pair)
    size = len(free) if name == "max_tokens" else free.chosen + 1
    cut = encoder(**{name: size - 1})
    sample = cut.sample(pair)
    assert cut.counts["dialogues cut"] == cut.counts["turns dropped"] == 1
    assert free.token_ids[free.chosen :] == sample.token_ids[sample.chosen :]
    shorter = read_pair({**LONG, "src": LONG["src"][1:], "tgt": LONG["tgt"][1:]}, "erniekit")
    assert sample == encoder().sample(shorter)
    with pytest.raises(DataError, match="max_seq_len is 20" if name == "max_tokens" else "max_pro"):
        encoder(**{name: 20 if name == "max_tokens" else 4}).sample(pair)


@pytest.mark.parametrize(("given", "room"), [(None, 8182), (2048, 2048), (9000, 8182)])
def test_a_prompt_has_the_row_but_for_ten_tokens_unless_told(given, room: int, tiny) -> None:
    values = {"stage": "DPO", "max_seq_len": 8192, "max_prompt_len": given}
    run = run_from(values | {"model_name_or_path": str(tiny("tiny-dense"))})
    tokenizer = Tokenizer.from_folder(tiny("tiny-dense"))
    template = ChatTemplate.for_folder(tiny("tiny-dense"), tokenizer)
    assert encoder_of(run, tokenizer, template).max_prompt_tokens == room


def test_equal_pairs_have_equal_keys_and_swapped_ones_do_not(encoder) -> None:
    pair = read_pair(LONG, "erniekit")
    swapped = Pair(pair.rejected, pair.chosen, pair.num_prompt)
    keys = {encoder().sample(p).key for p in (pair, pair, swapped)}
    assert len(keys) == 2


# --- rows ---


def test_a_batch_of_pairs_covers_its_tokens(encoder) -> None:
    samples = [encoder().sample(read_pair(r, "erniekit")) for r in (LONG, ERNIEKIT, LONG)]
    batch = batch_of([samples[:2], samples[2:]], Cursor())
    assert batch.pairs_P4 is not None
    assert batch.pairs_P4[:, 0].tolist() == batch.cu_seqlens_S1[:-1].tolist()
    assert batch.pairs_P4[:, 3].tolist() == batch.cu_seqlens_S1[1:].tolist()
    for (start, chosen, rejected, end), sample in zip(batch.pairs_P4, samples):
        assert batch.token_ids_T[start:end].tolist() == sample.token_ids
        assert batch.positions_T[start:end].tolist() == sample.positions.tolist()
        assert (batch.labels_T[start:chosen] == UNTRAINED).all()
        assert batch.positions_T[chosen] == batch.positions_T[rejected] == chosen - start
        assert batch.token_ids_T[chosen] == batch.token_ids_T[rejected], "the prompt's last token"
    assert batch.keys == tuple(sample.key for sample in samples)


@pytest.mark.parametrize("way", ["greedy", "sequential", "separate"])
def test_rows_lose_and_repeat_no_pair(way: str, encoder, tmp_path: Path) -> None:
    records = preferences(40)
    path = write_lines(tmp_path / "pairs.jsonl", records)
    data = Data(
        train_dataset_path=(str(path),),
        max_seq_len=128,
        packing=way != "separate",
        greedy_intokens=way == "greedy",
        buffer_size=7,
    )
    stream = Stream(data, "train", encoder(128), seed=3)
    batches = list(stream.batches(2, end=stream.epoch_size))
    found = [key for batch in batches for key in batch.keys]
    wanted = [encoder(128).sample(read_pair(record, "erniekit")).key for record in records]
    assert sorted(found) == sorted(wanted)
    for batch in batches:
        assert len(batch.token_ids_T) <= 2 * 128
    # and the stream goes on from any of its cursors with what came next
    for batch, following in pairwise(batches):
        (again,) = islice(stream.batches(2, batch.cursor, stream.epoch_size), 1)
        assert again.keys == following.keys


def test_bad_pairs_are_told_by_line_and_counted(encoder, tmp_path: Path, caplog) -> None:
    bad: list = [{**preferences(1)[0], "sort": [2, 2]}, 7]
    bad.append({**preferences(1)[0], "response": ["yes", "no " * 300]})
    path = write_lines(tmp_path / "pairs.jsonl", [*preferences(5), *bad])
    data = Data(train_dataset_path=(str(path),), max_seq_len=128, max_bad_data_share=0.5)
    stream = Stream(data, "train", encoder(128), seed=0)
    logging.getLogger("erniekit").propagate = True
    with caplog.at_level(logging.WARNING):
        found = survey(stream, 100)
    assert (found.num_bad, found.num_samples) == (3, 5)
    assert f"{path}:6: sort is [2, 2]; expected the larger" in caplog.text
    assert f"{path}:7: a number; expected an object" in caplog.text
    assert f"{path}:8: its last turn and both answers have" in caplog.text
    strict = Data(train_dataset_path=(str(path),), max_seq_len=128, max_bad_data_share=0.3)
    with pytest.raises(DataError, match="3 of 8 records cannot be used"):
        survey(Stream(strict, "train", encoder(128), seed=0), 100)


def test_arrays_have_the_types_that_the_loop_sends_to_a_device(encoder) -> None:
    batch = batch_of([[encoder().sample(read_pair(ERNIEKIT, "erniekit"))]], Cursor())
    arrays = (batch.token_ids_T, batch.labels_T, batch.positions_T, batch.pairs_P4)
    assert [a.dtype for a in arrays if a is not None] == [np.int64] * 4
