"""lm-eval's tasks on our model: log-likelihoods against transformers, one text at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from transformers import Ernie4_5ForCausalLM

import ernie
from ernie.generate import generate
from erniekit import lm_eval_model
from erniekit.cli import main
from erniekit.lm_eval_model import LanguageModel

ROOT = Path(__file__).parents[2]


def questions(count: int) -> list[dict]:
    """Questions of the example data, each with its own answer among those of the next two."""
    path = ROOT / "examples/data/sft-eval.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()[: count + 2]]
    return [
        {
            "question": records[i]["src"][0],
            "choices": [records[(i + j - i % 3) % len(records)]["tgt"][0] for j in range(3)],
            "answer": i % 3,
        }
        for i in range(count)
    ]


def requests(pairs: list[tuple]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]


@pytest.fixture(scope="module")
def model(tiny) -> ernie.ErnieModel:
    return ernie.load(tiny("tiny-dense"), dtype=torch.float32)


@pytest.fixture(scope="module")
def theirs(tiny) -> Ernie4_5ForCausalLM:
    return Ernie4_5ForCausalLM.from_pretrained(tiny("tiny-dense"), dtype=torch.float32)


@torch.no_grad()
def reference(theirs, ids: list[int], num_scored: int) -> tuple[float, bool]:
    logits = theirs(torch.tensor([ids[:-1]])).logits[0, -num_scored:].double()
    targets = torch.tensor(ids[-num_scored:])
    values = logits.log_softmax(-1).gather(-1, targets[:, None])
    return float(values.sum()), bool((logits.argmax(-1) == targets).all())


def test_loglikelihoods_equal_transformers(model, theirs, monkeypatch) -> None:
    monkeypatch.setattr(lm_eval_model, "_BATCH_TOKENS", 200)  # several batches
    pairs = [(q["question"], " " + choice) for q in questions(8) for choice in q["choices"]]
    pairs += [("", "Return the list."), ("One two ", "three"), ("Same", " a"), ("Same", " b")]
    found = LanguageModel(model, chunk_size=7).loglikelihood(requests(pairs))
    encode = model.tokenizer.encode
    for (context, rest), (value, is_top) in zip(pairs, found, strict=True):
        ids = encode(context + rest) if context else [model.tokenizer.bos_id, *encode(rest)]
        before = len(encode(context.rstrip())) if context else 1
        wanted, wanted_top = reference(theirs, ids, len(ids) - before)
        assert abs(value - wanted) < 1e-3, f"{context!r}, {rest!r}: {value} instead of {wanted}"
        assert is_top == wanted_top


def test_greedy_continuation_is_said_to_be_greedy(model) -> None:
    text = "What does it do?"
    ids = model.tokenizer.encode(text)
    lm = LanguageModel(model, chunk_size=7)
    greedy = list(generate(model, ids, max_tokens=3))
    scored = [lm_eval_model.Scored((*ids, *greedy), 3), lm_eval_model.Scored((*ids, 9, 9), 2)]
    assert [is_top for _, is_top in lm._scores(scored)] == [True, False]


def test_rolling_windows_score_each_token_once(model, theirs) -> None:
    text = " ".join(q["question"] for q in questions(6))
    lm = LanguageModel(model, chunk_size=50)
    ids = model.tokenizer.encode(text)
    (whole,) = lm.loglikelihood_rolling(requests([(text,)]))
    wanted, _ = reference(theirs, [lm.prefix_id, *ids], len(ids))
    assert abs(whole - wanted) < 1e-2, f"{whole} instead of {wanted}"
    lm.max_length = 20
    (cut,) = lm.loglikelihood_rolling(requests([(text,)]))
    # The first window starts at the prefix; the last one reaches back to be a full one.
    wanted = reference(theirs, [lm.prefix_id, *ids[:20]], 20)[0]
    for start in range(20, len(ids), 20):
        scored = ids[start : start + 20]
        context = ids[max(start + len(scored) - 21, 0) : start]
        wanted += reference(theirs, [*context, *scored], len(scored))[0]
    assert abs(cut - wanted) < 1e-2, f"{cut} instead of {wanted}"


def test_generation_ends_before_a_stop_string(model) -> None:
    lm = LanguageModel(model, chunk_size=50)
    (whole,) = lm.generate_until(requests([("What is", {"until": [], "max_gen_toks": 12})]))
    stop = whole[4:6]
    (short,) = lm.generate_until(requests([("What is", {"until": [stop], "max_gen_toks": 12})]))
    assert short == whole[: whole.index(stop)], (whole, short)
    with pytest.raises(ValueError, match="generation_kwargs of a task has top_k"):
        lm.generate_until(requests([("What is", {"until": [], "top_k": 3})]))


def test_eval_runs_tasks_of_ones_own(tiny, theirs, model, tmp_path: Path, capsys) -> None:
    asked = questions(9)
    data, tasks = tmp_path / "questions.jsonl", tmp_path / "tasks"
    data.write_text("".join(json.dumps(q) + "\n" for q in asked))
    tasks.mkdir()
    task = {
        "task": "python_docs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "c")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tasks / "python_docs.yaml").write_text(yaml.safe_dump(task))
    arguments = [
        "eval", f"model_name_or_path={tiny('tiny-dense')}", f"output_dir={tmp_path / 'out'}",
        "lm_eval_tasks=python_docs", f"lm_eval_task_path={tasks}", "fine_tuning=Full",
    ]  # fmt: skip
    assert main(arguments) == 0
    right, encode = 0, model.tokenizer.encode
    for q in asked:
        before = len(encode(q["question"]))
        totals = []
        for choice in q["choices"]:
            ids = encode(f"{q['question']} {choice}")
            totals.append(reference(theirs, ids, len(ids) - before)[0])
        right += totals.index(max(totals)) == q["answer"]
    results = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert results["lm_eval"]["python_docs"]["acc"] == pytest.approx(right / 9)

    held_out = [f"eval_dataset_path={ROOT / 'examples/data/sft-eval.jsonl'}", "num_answers=0",
                "max_seq_len=512", "max_evaluate_steps=1"]  # fmt: skip
    alone = [word for word in arguments if not word.startswith("lm_eval")]
    assert main([*alone, *held_out]) == 0
    kept = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert kept["eval_loss"] > 0 and kept["lm_eval"] == results["lm_eval"]
    assert main([*arguments, "lm_eval_limit=3"]) == 0
    merged = json.loads((tmp_path / "out/eval_results.json").read_text())
    assert merged["eval_loss"] == kept["eval_loss"] and merged["time"] >= kept["time"]

    capsys.readouterr()
    before = (tmp_path / "out/eval_results.json").read_bytes()

    def refused(told: str, *words: str) -> None:
        assert main([*arguments, *held_out, *words]) == 2
        shown = capsys.readouterr()
        assert told in shown.err and "Traceback" not in shown.err, shown.err
        assert "evaluated" not in shown.out  # nothing is computed first

    assert main([*arguments, "lm_eval_num_fewshot=9", "lm_eval_limit=1"]) == 0
    (tmp_path / "out/eval_results.json").write_bytes(before)
    capsys.readouterr()
    refused("=10 is more than the 9 examples that python_docs has", "lm_eval_num_fewshot=10")
    refused(f"lm_eval_task_path={data} is no folder", f"lm_eval_task_path={data}")
    refused("there is no task 'python_doc'; did you mean 'python_docs'?",
            "lm_eval_tasks=python_doc")  # fmt: skip
    data.unlink()
    refused("the data of python_docs cannot be had")
    assert (tmp_path / "out/eval_results.json").read_bytes() == before


def test_what_was_found_is_written_before_lm_eval_runs(tiny, tmp_path: Path, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(lm_eval_model, "known_tasks", lambda reporting: None)
    monkeypatch.setattr(lm_eval_model, "run_tasks", broken)
    with pytest.raises(RuntimeError, match="a defect"):
        main([
            "eval", f"model_name_or_path={tiny('tiny-dense')}", f"output_dir={tmp_path}",
            f"eval_dataset_path={ROOT / 'examples/data/sft-eval.jsonl'}", "num_answers=0",
            "max_seq_len=512", "max_evaluate_steps=1", "lm_eval_tasks=x", "fine_tuning=Full",
        ])  # fmt: skip
    assert json.loads((tmp_path / "eval_results.json").read_text())["eval_loss"] > 0
