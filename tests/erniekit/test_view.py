"""The view of a sample: every token with what happens to it, in colour and without."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ernie.tokenizer import Tokenizer
from erniekit.cli import main
from erniekit.data import view
from erniekit.data.view import Page, texts_of
from tests.erniekit.conftest import dialogues, write_lines
from tests.helpers_tokenizer import byte_level_folder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(tiny, tmp_path: Path, capsys, monkeypatch):
    """A function from records and settings to what is printed for them."""
    monkeypatch.setenv("COLUMNS", "100")

    def make(records: list, **more: object) -> str:
        path = write_lines(tmp_path / "train.jsonl", records)
        values = {
            "model_name_or_path": tiny("tiny-dense"), "train_dataset_path": path,
            "output_dir": tmp_path / "out", "max_seq_len": 96,
        } | more  # fmt: skip
        assert main(["data", *(f"{key}={value}" for key, value in values.items())]) == 0
        assert not (tmp_path / "out").exists(), "looking leaves nothing behind"
        return capsys.readouterr().out

    return make


def lines_of(text: str, mark: str) -> str:
    """The tokens of the lines with a mark, joined."""
    lines = [line for line in text.splitlines() if line.startswith(f"  {mark} ")]
    return "".join(line[4:].replace("│", "") for line in lines[1:])  # the first is the legend


RECORD = {"src": ["What is it?", "And now?"], "tgt": ["It is sunny.", "Rain."], "label": [0, 1]}


def test_only_what_is_trained_has_the_mark(shown) -> None:
    text = shown([RECORD], sample="train.jsonl:1")
    assert lines_of(text, "+") == "Rain.</s>"
    rest = lines_of(text, " ").replace("⏎", "\n")
    assert rest == (
        "<|begin_of_sentence|>User: What is it?\nAssistant: It is sunny.<|end_of_sentence|>"
        "User: And now?\nAssistant: "
    )


def test_where_a_dialogue_goes_on_the_label_is_shown_beside_the_token(shown) -> None:
    text = shown([{**RECORD, "label": [1, 1]}], sample="train.jsonl:1")
    assert lines_of(text, "+") == "It is sunny.<|end_of_sentence|>→</s>Rain.</s>"


def test_turns_that_were_cut_stand_where_they_stood(shown) -> None:
    record = {"src": [f"question {i}?" for i in range(9)], "tgt": ["It is sunny."] * 9,
              "system": "Be nice."}  # fmt: skip
    text = shown([record], sample="train.jsonl:1")
    cut, kept = lines_of(text, "-"), lines_of(text, " ") + lines_of(text, "+")
    number = int(re.search(r"(\d+) cut", text)[1])  # type: ignore[index]
    assert cut.startswith("User: question 0?") and cut.endswith("It is sunny.<|end_of_sentence|>")
    for i in range(9):
        assert (f"question {i}?" in cut) != (f"question {i}?" in kept)
    assert "Be nice." in kept
    bars = [line[4:] for line in text.splitlines() if line.startswith("  - ")][1:]
    assert sum(line.count("│") + 1 for line in bars) == number


def test_rows_show_their_samples_with_borders_and_places(shown, tmp_path: Path) -> None:
    text = shown(dialogues(6), show=6, random_shuffle=False, mix_strategy="concat")
    titles = re.findall(r"^── row (\d+), sample (\d+): (\S+): (\d+) tokens", text, re.M)
    assert len(titles) == 6
    assert sorted(place for _, _, place, _ in titles) == [
        f"{tmp_path}/train.jsonl:{i}" for i in range(1, 7)
    ]
    for row, free in re.findall(r"^── end of row (\d+): .*?, (\d+) of 96 places free", text, re.M):
        used = sum(int(n) - 1 for r, _, _, n in titles if r == row)
        assert used + int(free) == 96


def test_fewer_samples_are_shown_than_are_in_a_row(shown) -> None:
    text = shown(dialogues(6), show=1)
    assert text.count("row 1, sample") == 1
    assert "end of row" not in text


def test_pairs_show_both_dialogues(shown) -> None:
    pair = {"question": "What?", "chosen": "Sunny.", "rejected": "Rain."}
    for wanted in ({"show": 3}, {"sample": "train.jsonl:1"}):
        text = shown([pair], stage="DPO", train_dataset_type="alpaca", **wanted)
        assert ", chosen: " in text and ", rejected: " in text
        assert lines_of(text, "+") == "Sunny.Rain.", "the ends have no loss by default"


def test_each_answer_of_a_split_dialogue_is_a_sample(shown) -> None:
    text = shown([{**RECORD, "label": [1, 1]}], split_multi_turn=True, sample="train.jsonl:1")
    assert "train.jsonl:1, answer 1 of 2" in text and "train.jsonl:1, answer 2 of 2" in text


def test_an_unusable_record_says_why(shown, tmp_path: Path, tiny, capsys) -> None:
    path = write_lines(tmp_path / "bad.jsonl", [{"src": []}])
    words = [f"model_name_or_path={tiny('tiny-dense')}", f"train_dataset_path={path}"]
    assert main(["data", *words, "sample=bad.jsonl:1"]) == 2
    assert f"{path}:1: src is empty" in capsys.readouterr().err


def test_data_cannot_write_on_the_terminal(shown) -> None:
    nasty = "\x1b[2J\x07\r\x00\u202e\u200b\x9b"
    text = shown([{"src": [nasty], "tgt": ["fine\ttabs"]}], sample="train.jsonl:1")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u200b]", text)
    assert "U+001B" in text.replace("│", "") or "1b" in text


# --- bytes ---


def plain(texts: list[str]) -> str:
    """The text behind the view: of bytes in brackets only the character they end counts."""
    joined = "".join(texts)
    joined = re.sub(r"⟨[0-9a-f ]*=(.)⟩", r"\1", joined)
    joined = re.sub(r"⟨[0-9a-f ]+⟩", "", joined)
    return re.sub(r"⟨U\+([0-9A-F]+)⟩", lambda m: chr(int(m[1], 16)), joined)


@pytest.fixture(scope="module")
def tokenizers(tiny, tmp_path_factory) -> list[Tokenizer]:
    folder = byte_level_folder(tmp_path_factory.mktemp("bytes") / "a")
    return [Tokenizer.from_folder(tiny("tiny-dense")), Tokenizer.from_folder(folder)]


@settings(max_examples=200, deadline=None)
@given(text=st.text("aé你好🙂𝔘 今\u0301", max_size=12), which=st.integers(0, 1))
def test_characters_over_several_tokens_are_shown_once_and_whole(text, which, tokenizers) -> None:
    ids = tokenizers[which].encode(text)
    texts = texts_of(ids, tokenizers[which])
    assert len(texts) == len(ids)
    assert plain(texts) == text


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.binary(min_size=1, max_size=5), max_size=6))
def test_any_bytes_are_shown_without_loss(pieces: list[bytes]) -> None:
    pending, shown, told = b"", [], b""
    for piece in pieces:
        text, pending = view._shown(piece, pending)
        shown.append(text)
    for text in shown:
        for part in re.findall(r"⟨[0-9a-f ]+(?:=(?:⟨U\+\w+⟩|.))?⟩|⟨U\+\w+⟩|.", text):
            if part.startswith("⟨U"):
                told += chr(int(part[3:-1], 16)).encode()
            elif part.startswith("⟨"):
                told += bytes.fromhex(part[1:-1].partition("=")[0])
            else:
                told += {"⏎": "\n", "⇥": "\t", "␍": "\r"}.get(part, part).encode()
    assert told == b"".join(pieces)


def test_half_characters_look_like_this() -> None:
    assert view._shown(b"\xe4", b"") == ("⟨e4⟩", b"\xe4")
    assert view._shown(b"\xbd", b"\xe4") == ("⟨bd⟩", b"\xe4\xbd")
    assert view._shown(b"\xa0!", b"\xe4\xbd") == ("⟨a0=你⟩!", b"")
    assert view._shown(b"\xffa", b"\xe4") == ("⟨ff⟩a", b"")


# --- colour ---


def page_of(monkeypatch, **environment: str) -> Page:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Page.on(Terminal())


def test_colour_is_for_terminals_that_want_it(monkeypatch) -> None:
    assert page_of(monkeypatch, TERM="xterm").has_colour
    assert not page_of(monkeypatch, NO_COLOR="1").has_colour
    assert not page_of(monkeypatch, TERM="dumb").has_colour
    assert page_of(monkeypatch, NO_COLOR="").has_colour, "empty means not set"
    assert not Page.on(io.StringIO()).has_colour


def test_colour_adds_nothing_but_colour(tiny, tmp_path: Path, monkeypatch) -> None:
    """Without its escapes the coloured view is the plain one without its bars."""
    path = write_lines(tmp_path / "train.jsonl", [RECORD, {"src": ["你好"], "tgt": ["今天天气"]}])
    words = [f"model_name_or_path={tiny('tiny-dense')}", f"train_dataset_path={path}", "show=2"]
    told = []
    for out in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stdout", out)
        monkeypatch.setenv("COLUMNS", "1000")
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        assert main(["data", *words]) == 0
        told.append(out.getvalue())
    coloured, plain_text = told
    assert "\x1b[" in coloured and "\x1b" not in plain_text
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain_text.replace("│", "")


@pytest.mark.parametrize("width", [30, 80])
def test_lines_keep_to_the_width(width: int, shown, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    record = {"src": ["你好, how are you today? " * 3], "tgt": ["It is sunny."]}
    text = shown([record], sample="train.jsonl:1", max_seq_len=512)
    longest = max(view._columns(line) for line in text.splitlines() if line.startswith("    "))
    assert longest <= width + 2, "a line break and its bar may stand at the end"
