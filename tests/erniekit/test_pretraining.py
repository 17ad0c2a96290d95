"""Documents: to tokens, to rows, to files of token ids and back; runs of stage PT."""

from __future__ import annotations

import gzip
import json
import math
import struct
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ernie
from ernie.settings import ConfigError
from ernie.tokenizer import Tokenizer
from erniekit import checkpoint, losses
from erniekit.cli import main
from erniekit.config import Data, run_from
from erniekit.data.indexed import Indexed, Writer, share
from erniekit.data.sources import DataError, Text, open_source
from erniekit.data.stream import Stream, stream
from erniekit.data.text import TextEncoder, bytes_by_token
from erniekit.device_batch import Flat, to_device
from tests.erniekit.conftest import write_lines


def texts(count: int, salt: str = "") -> list[str]:
    """Documents of 2 to about 200 tokens."""
    return [f"{salt}{i}. " + "It is sunny, my friend. " * (i * i % 23) for i in range(count)]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A folder with train.jsonl (some records of several documents) and eval.jsonl."""
    documents = texts(40)
    records = [{"text": t} for t in documents[:30]]
    records += [{"text": documents[i : i + 2]} for i in range(30, 40, 2)]
    write_lines(tmp_path / "train.jsonl", records)
    write_lines(tmp_path / "eval.jsonl", [{"text": t} for t in texts(6, "Held out ")])
    return tmp_path


@pytest.fixture
def words(tiny, corpus: Path, tmp_path: Path):
    """A function from settings to the words of a short run."""

    def make(**more: object) -> list[str]:
        values = {
            "model_name_or_path": tiny("tiny-moe"),
            "stage": "PT",
            "fine_tuning": "Full",
            "train_dataset_type": "pretrain",
            "train_dataset_path": corpus / "train.jsonl",
            "eval_dataset_type": "erniekit",
            "eval_dataset_path": corpus / "eval.jsonl",
            "output_dir": tmp_path / "out",
            "max_seq_len": 64,
            "batch_size": 2,
            "buffer_size": 7,
            "max_steps": 12,
            "learning_rate": 1e-2,
            "evaluation_strategy": "steps",
            "eval_steps": 6,
            "save_steps": 4,
        } | more
        return [f"{key}={value}" for key, value in values.items() if value is not None]

    return make


@pytest.fixture
def encoder(tiny) -> TextEncoder:
    return TextEncoder(Tokenizer.from_folder(tiny("tiny-dense")), 64)


def run_of(arguments: list[str]):
    return run_from(dict(word.split("=", 1) for word in arguments))


def curve(output: Path) -> list[tuple]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    keys = ("step", "loss", "grad_norm", "total_tokens", "eval_loss", "eval_bits_per_byte")
    return [tuple(json.loads(line).get(key) for key in keys) for line in lines]


# --- documents ---


def test_a_document_is_its_tokens_and_the_end_all_but_the_first_trained(encoder) -> None:
    tokenizer = encoder.tokenizer
    spelled = "Hello</s> <|end_of_sentence|> my friend"
    first, second = encoder.read({"text": [spelled, "It is sunny"]}, "pretrain")
    for sample, text in ((first, spelled), (second, "It is sunny")):
        ids = [*sample.token_ids, sample.labels[-1]]
        assert list(sample.labels) == ids[1:] and sample.num_trained == len(sample)
        assert ids[-1] == tokenizer.eos_id and ids.count(tokenizer.eos_id) == 1
        assert tokenizer.decode(ids[:-1]) == text
    assert encoder.counts["tokens"] == len(first) + len(second)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"txt": "a"}, "text is missing"),
        ({"text": ["a", ""]}, r"text\[1\] is empty"),
        ({"text": 3}, "text is a number"),
        (["a"], "a list; expected an object"),
        ({"text": "a \ud800 b"}, "lone surrogate"),
        (np.array([3, 10**6]), "token 1000000 is not among"),
        (np.array([3, -2]), "token -2 is not among"),
        (np.array([5]), "a document of 1 tokens"),
    ],
)
def test_unusable_documents_say_why(record: object, words: str, encoder) -> None:
    with pytest.raises(DataError, match=words):
        encoder.read(record, "pretrain")


def test_plain_text_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("erniekit.data.sources._STRETCH", 100)
    text = "".join(f"line {i}, 你好\n" * (i % 4) + "\n" for i in range(60)) + "no end"
    for name in ("a.txt", "a.txt.gz"):
        raw = b"\xef\xbb\xbf" + text.encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
        source = open_source(tmp_path / name)
        assert isinstance(source, Text) and len(source) > 5
        parts = [source[i]["text"] for i in range(len(source))]
        assert "".join(parts) == text
        assert all(part.endswith("\n") for part in parts[:-1])
        for i in range(len(source)):
            number = int(source.where(i).rpartition(":")[2])
            assert number == 1 + "".join(parts[:i]).count("\n") == source.number(i)
            assert source.index_of(number) == i
    (tmp_path / "windows.txt").write_bytes(text.replace("\n", "\r\n").encode())
    source = open_source(tmp_path / "windows.txt")
    assert "".join(source[i]["text"] for i in range(len(source))) == text
    (tmp_path / "blank.txt").write_text(" \n\n")
    with pytest.raises(ConfigError, match="holds no text"):
        open_source(tmp_path / "blank.txt")


# --- rows ---


@pytest.mark.parametrize("way", ["full", "greedy", "sequential", "separate"])
@pytest.mark.parametrize("max_seq_len", [16, 50, 4000])
def test_every_token_of_an_epoch_is_trained_once(way, max_seq_len, corpus, encoder) -> None:
    data = Data(
        train_dataset_path=(str(corpus / "train.jsonl"),),
        train_dataset_type=("pretrain",),
        max_seq_len=max_seq_len,
        buffer_size=5,
        truncate_packing=way == "full",
        packing=way != "separate",
        greedy_intokens=way == "greedy",
    )
    source = Stream(data, "train", encoder, seed=3)
    assert source.way == way
    batches = list(source.batches(2, end=source.epoch_size))
    found: Counter[tuple[int, int]] = Counter()
    for batch in batches:
        found.update(zip(batch.token_ids_T.tolist(), batch.labels_T.tolist()))
        starts = set(batch.cu_seqlens_S1.tolist())
        assert all((p == 0) == (i in starts) for i, p in enumerate(batch.positions_T.tolist()))
    wanted: Counter[tuple[int, int]] = Counter()
    for text in texts(40):
        ids = encoder.document(text)
        wanted.update(pairwise(ids))
    assert found == wanted
    if way == "full":
        sizes = Counter(len(batch.token_ids_T) for batch in batches[:-1])
        assert max_seq_len == 4000 or sizes[2 * max_seq_len] >= len(batches) - 2


def test_rows_are_mixed_within_the_buffer_only_in_training(corpus, encoder) -> None:
    def firsts(split: str, **more: object) -> list[tuple]:
        path = {f"{split}_dataset_path": (str(corpus / "train.jsonl"),)}
        data = Data(**path, max_seq_len=8, buffer_size=10, **more)
        source = Stream(data, split, encoder, seed=3)
        return [tuple(row[0].token_ids) for row, _ in islice(source.rows(), 40)]

    straight = firsts("train", random_shuffle=False)
    assert straight == firsts("eval")
    mixed = Stream(
        Data(train_dataset_path=(str(corpus / "train.jsonl"),), max_seq_len=8, buffer_size=10),
        "train",
        encoder,
        seed=3,
    )
    places = [row[0].here for row, _ in islice(mixed.drawn_rows(), 40)]
    for start in range(0, 40, 10):
        block = places[start : start + 10]
        assert block != sorted(block)
        assert start == 0 or min(block) > max(places[:start])


def test_packed_documents_equal_separate_ones(words, tiny) -> None:
    """Loss and gradients of full rows, where documents are cut, and of each piece alone."""
    model = ernie.load(tiny("tiny-moe"), dtype=torch.float32)
    source = stream(run_of(words()), "train")
    rows = [row for row, _ in islice(source.rows(), 3)]
    assert any(len(row) > 1 for row in rows)
    (batch,) = islice(source.batches(3), 1)
    terms = losses.Terms(multi_token=0.3)

    def summed(batches: list[Flat]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        found = [losses.next_token(model, b, scale=1e-2, terms=terms) for b in batches]
        torch.stack([f.total for f in found]).sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return sum(float(f.value) for f in found), {n: g.clone() for n, g in gradients.items()}

    def alone(ids: list[int], labels: list[int]) -> Flat:
        bounds = torch.tensor([0, len(ids)], dtype=torch.int32)
        return Flat(torch.tensor(ids), torch.tensor(labels), torch.arange(len(ids)), bounds)

    packed, gradients = summed([to_device(batch, torch.device("cpu"))])
    pieces = [alone(list(s.token_ids), list(s.labels)) for row in rows for s in row]
    separate, expected = summed(pieces)
    assert packed == pytest.approx(separate, rel=1e-5)
    for name, gradient in expected.items():
        gap = ((gradients[name] - gradient).abs().max() / gradient.abs().max()).item()
        assert gap < 1e-4, f"{name} is off by {gap:.2e}, relative to its largest value"


# --- indexed files ---


def by_specification(prefix: Path) -> list[list[int]]:
    """The documents of a prefix, read number by number."""
    raw = Path(f"{prefix}.idx").read_bytes()
    assert raw[:9] == b"MMIDIDX\x00\x00"
    version, code, sequences, bounds = struct.unpack("<QBQQ", raw[9:34])
    assert version == 1
    kind = {4: "<i", 8: "<H"}[code]
    sizes = struct.unpack(f"<{sequences}i", raw[34 : 34 + 4 * sequences])
    offsets = struct.unpack(f"<{sequences}q", raw[34 + 4 * sequences : 34 + 12 * sequences])
    documents = struct.unpack(f"<{bounds}q", raw[34 + 12 * sequences :])
    tokens = Path(f"{prefix}.bin").read_bytes()
    found = []
    for low, high in pairwise(documents):
        ids: list[int] = []
        for size, offset in list(zip(sizes, offsets))[low:high]:
            end = offset + size * struct.calcsize(kind)
            ids += [i for (i,) in struct.iter_unpack(kind, tokens[offset:end])]
        found.append(ids)
    return found


@pytest.mark.parametrize("vocab_size", [300, 103_424])
def test_indexed_files_come_back_and_are_as_specified(vocab_size: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, vocab_size, n).tolist() for n in (5, 1, 900, 0, 33)]
    with Writer(tmp_path / "d", vocab_size) as writer:
        for ids in documents:
            writer.add(ids)
    source = Indexed(tmp_path / "d")
    assert [source[i].tolist() for i in range(len(source))] == documents
    assert source.size == 939
    assert by_specification(tmp_path / "d") == documents
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.bin", "d.idx"]
    part = Indexed(tmp_path / "d", (2, 4))
    assert [part[i].tolist() for i in range(len(part))] == documents[2:4]
    assert part.where(1).endswith("document 4") and part.index_of(4) == 1 and not part.index_of(2)


def test_documents_of_several_sequences_are_joined(tmp_path: Path) -> None:
    """As Megatron writes them where it splits sentences, here in 8-byte numbers."""
    sizes, bounds = [2, 3, 1, 4], [0, 2, 2, 4]
    offsets = [8 * sum(sizes[:i]) for i in range(4)]
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 5, 4, 4)
    index = struct.pack("<4i", *sizes) + struct.pack("<4q4q", *offsets, *bounds)
    (tmp_path / "d.idx").write_bytes(head + index)
    (tmp_path / "d.bin").write_bytes(struct.pack("<10q", *range(10)))
    source = Indexed(tmp_path / "d")
    assert [source[i].tolist() for i in range(3)] == [[0, 1, 2, 3, 4], [], [5, 6, 7, 8, 9]]


def test_files_that_are_no_indexed_ones_are_refused(tmp_path: Path) -> None:
    with Writer(tmp_path / "d", 300) as writer:
        for n in range(1, 9):
            writer.add(range(n))
    index, tokens = tmp_path / "d.idx", tmp_path / "d.bin"
    whole, data = index.read_bytes(), tokens.read_bytes()
    for broken, words in (
        (whole[:-1], "cut short"),
        (whole[:20], "does not begin with MMIDIDX"),
        (b"", "does not begin with MMIDIDX"),
        (whole[:17] + b"\x06" + whole[18:], "type code 6"),
        (whole[:34] + b"\xff" * 4 + whole[38:], "not the file that"),
        (whole[:-8] + struct.pack("<q", 99), "sequences that it does not have"),
    ):
        index.write_bytes(broken)
        with pytest.raises(ConfigError, match=words):
            Indexed(tmp_path / "d")
    index.write_bytes(whole)
    tokens.write_bytes(data[:-2])
    with pytest.raises(ConfigError, match="cut short"):
        Indexed(tmp_path / "d")
    with pytest.raises(ConfigError, match="there is no data file"):
        Indexed(tmp_path / "e")


def test_a_writer_that_fails_leaves_the_earlier_files(tmp_path: Path) -> None:
    with Writer(tmp_path / "d", 300) as writer:
        writer.add([1, 2])
    with pytest.raises(KeyError), Writer(tmp_path / "d", 300) as writer:
        writer.add([3])
        raise KeyError
    assert Indexed(tmp_path / "d")[0].tolist() == [1, 2]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("shares", [(950.0, 50.0), (998.0, 1.0, 1.0), (1.0,), (2.0, 0.0, 1.0)])
def test_every_document_belongs_to_one_share(shares: tuple[float, ...]) -> None:
    for n in (1, 7, 1000, 12345):
        bounds = [share(n, shares, i) for i in range(len(shares))]
        assert bounds[0][0] == 0 and bounds[-1][1] == n
        assert all(a[1] == b[0] for a, b in pairwise(bounds))
        for (low, high), part in zip(bounds, shares):
            assert abs((high - low) - n * part / sum(shares)) <= 1


def test_token_ids_train_as_their_text(words, corpus: Path, tmp_path: Path, capsys) -> None:
    """The files that `erniekit data` writes, and the text they were made of."""
    folder = tmp_path / "ids"
    assert main(["data", *words(dataset_output_dir=folder)]) == 0
    assert f"input_dir: 1 {folder}/train" in capsys.readouterr().out
    assert main(["data", *words(dataset_output_dir=folder)]) == 2  # they may be another program's
    assert "train.bin is there already; give another" in capsys.readouterr().err
    again = {"dataset_output_dir": folder, "overwrite_output_dir": True, "train_dataset_prob": 0.5}
    assert main(["data", *words(**again)]) == 0
    assert f"input_dir: 0.5 {folder}/train" in capsys.readouterr().out
    more = {"random_shuffle": False, "evaluation_strategy": "no", "save_strategy": "no",
            "max_steps": 5, "mix_strategy": "concat"}  # fmt: skip
    no_files = {"train_dataset_path": None, "eval_dataset_path": None}
    assert main(["train", *words(**more, output_dir=tmp_path / "text")]) == 0
    given = {"input_dir": f"1 {folder}/train", "split": 1, "output_dir": tmp_path / "indexed"}
    assert main(["train", *words(**more, **given, **no_files)]) == 0
    assert curve(tmp_path / "indexed") == curve(tmp_path / "text")


def test_weights_are_shares_of_the_text(words, corpus: Path, tmp_path: Path) -> None:
    """Not of the documents, of which one file has short and one has long ones."""
    write_lines(corpus / "short.jsonl", [{"text": "a " * 20} for _ in range(500)])
    write_lines(corpus / "long.jsonl", [{"text": "b " * 400} for _ in range(500)])
    paths = f"{corpus}/short.jsonl,{corpus}/long.jsonl"
    kinds = {"train_dataset_type": "pretrain,pretrain", "train_dataset_prob": "3,1"}
    source = stream(run_of(words(train_dataset_path=paths, **kinds)), "train")
    drawn = Counter(s for s, _ in islice(source.mix.draws(), 20_000))
    sizes = [len(source.encoder.read(s[0], "pretrain")[0]) + 1 for s in source.sources]
    amount = [drawn[s] * sizes[s] for s in (0, 1)]
    assert amount[0] / sum(amount) == pytest.approx(0.75, abs=0.04)


# --- runs ---


def test_pre_training_from_scratch_learns_and_measures_bits(words, tiny, tmp_path: Path) -> None:
    more = {"continue_training": "false", "num_nextn_predict_layers": 1, "max_steps": 30}
    assert main(["train", *words(**more)]) == 0
    output = tmp_path / "out"
    found = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    held_out = [r["eval_loss"] for r in found if "eval_loss" in r]
    assert held_out[-1] < held_out[0] - 1, held_out
    assert all("mtp_loss" in r for r in found[1:])
    assert not (output / "training_template.json").exists(), "no dialogue was written"

    # Bits per byte by hand, from whole documents (the held-out rows are not cut: they fit).
    model = ernie.load(output, dtype=torch.float32)
    tokenizer = model.tokenizer
    assert tokenizer is not None
    nats, num_bytes = 0.0, 0
    for text in texts(6, "Held out "):
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        logits = model.logits(ids[:-1]).double()
        nats += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]),
                                                        reduction="sum"))  # fmt: skip
        num_bytes += len(text.encode()) - len(tokenizer.join_bytes(ids[:1]))
    assert main(["eval", *words(**more, max_seq_len=400)]) == 0
    results = json.loads((output / "eval_results.json").read_text())
    assert results["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)


@pytest.mark.parametrize("steps", [-1, 60])
def test_whole_documents_overlap_not_the_ends_that_rows_cut_off(
    steps: int, words, tmp_path: Path, capsys
) -> None:
    """Documents with beginnings of their own, which end alike behind where rows cut them."""
    documents = [f"{i} " * 12 + "It is sunny, my friend. " * 4 for i in range(40)]
    write_lines(tmp_path / "train.jsonl", [{"text": text} for text in documents[:38]])
    held_out = [{"text": text} for text in documents[36:]]
    write_lines(tmp_path / "apart.jsonl", held_out[2:])
    write_lines(tmp_path / "both.jsonl", held_out)
    more = {
        "train_dataset_path": tmp_path / "train.jsonl",
        "max_seq_len": 32,
        "max_steps": steps,
        "num_train_epochs": 1,
        "evaluation_strategy": "no",
        "do_eval": "true",
    }
    for name, is_told in (("apart", False), ("both", True)):
        out = {"output_dir": tmp_path / name, "eval_dataset_path": tmp_path / f"{name}.jsonl"}
        assert main(["train", *words(**more, **out)]) == 0
        told = "".join(capsys.readouterr())
        assert ("also in the training data" in told) == is_told
        assert ("2 of 4 evaluation samples" in told) == is_told


def test_bytes_of_tokens_add_up_to_those_of_the_text(encoder) -> None:
    sizes = bytes_by_token(encoder.tokenizer)
    text = "It is sunny, my friend. 你好, naïve </s> \n\n\t 1234"
    ids = encoder.document(text)
    assert sizes[ids].sum() == len(text.encode())


def test_resumed_at_5_equals_unbroken(words, tmp_path: Path) -> None:
    """Within a document that is cut, and within a buffer of rows."""
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert main(["train", *words(output_dir=unbroken)]) == 0
    for last in (5, 12):
        assert main(["train", *words(output_dir=broken, stop_after_step=last)]) == 0
    state = json.loads((broken / "checkpoint-5" / checkpoint.STATE_FILE).read_text())
    assert state["progress"]["cursor"][2] or state["progress"]["cursor"][3]
    assert curve(broken) == curve(unbroken)
    ours, theirs = (
        load_file(f / "checkpoint-12" / "model.safetensors") for f in (broken, unbroken)
    )
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())


def test_the_ledger_of_documents_closes(words, corpus: Path, encoder, tmp_path: Path) -> None:
    with (corpus / "train.jsonl").open("a") as file:
        file.write('{"text": ""}\n{"text": "It is sunny"}\n' + json.dumps({"text": texts(4)[3]}))
    more = {"max_bad_data_share": 0.2, "preprocessing_num_workers": 1}
    assert main(["data", *words(**more)]) == 0
    ledger = json.loads((tmp_path / "out/data/ledger.json").read_text())
    found, tokens = ledger["train"]["all"], ledger["train"]["all"]["tokens"]
    sizes = [len(encoder.document(t)) for t in [*texts(40), "It is sunny"]]
    again = len(encoder.document(texts(4)[3]))
    dropped = len(encoder.tokenizer.encode('{"text": ""}'))
    assert tokens == {
        "trained": sum(sizes) - len(sizes), "masked": len(sizes), "truncated": 0,
        "dropped": dropped, "duplicate": again,
    }  # fmt: skip
    assert found["num_tokens"] == sum(tokens.values())
    epoch = ledger["train"]["epoch"]
    assert epoch["num_rows"] == -(-epoch["num_tokens"] // 64)
    assert epoch["num_free"] < 64


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"input_dir": "0.4 a 0.6"}, "is not a list of weights and prefixes"),
        ({"input_dir": "0.4 a", "stage": "SFT", "train_dataset_type": "erniekit"}, "stage=SFT"),
        ({"input_dir": "1 a", "train_dataset_path": "x.jsonl"}, "leave train_dataset_path"),
        ({"input_dir": "1 a", "split": "0,1"}, "split="),
        ({"train_dataset_type": "alpaca", "train_dataset_path": "x.jsonl"}, "for stage PT"),
        ({"stage": "SFT", "train_dataset_path": "x.jsonl"}, "'pretrain' is not known for stage"),
        ({"stage": "SFT", "train_dataset_type": "erniekit", "train_dataset_path": "x.txt"},
         "plain text, which only stage PT"),
        ({"continue_training": "false", "fine_tuning": "LoRA"}, "use fine_tuning: Full"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_say_why(more: dict, sentence: str, words) -> None:
    values = {"train_dataset_path": None, "eval_dataset_path": None} | more
    with pytest.raises(ConfigError, match=sentence):
        run_of(words(**values))


def test_a_share_without_documents_is_refused(words, tmp_path: Path, capsys) -> None:
    with Writer(tmp_path / "d", 300) as writer:
        for _ in range(5):
            writer.add([3, 4, 2])
    more = {"train_dataset_path": None, "eval_dataset_path": None}
    assert main(["train", *words(**more, input_dir=tmp_path / "d", split="998,1,1")]) == 2
    assert "leaves none of the 5 documents" in capsys.readouterr().err
