"""What does a method change in a model's behaviour on held-out data, beside its loss?

    python benchmarks/behaviour.py [--methods SFT,DPO,KTO,RM,calls] [--seeds 1,2]

The model is SmolLM2-135M-Instruct, trained with the example files of each method; nothing of the
held-out questions is in the training data. Every run is a command that anyone can type; before and
after it the same questions are asked:

    similarity   shared words of a greedy answer and the reference answer (F1 of unigrams)
    words        median length of the answers
    preferred    share of held-out pairs whose chosen answer has the likelier tokens, on average
    reward       share that is rewarded rightly: of pairs by what the policy gained on the start
                 (DPO) or by the model's scores (RM), of single answers by what was gained on the
                 usual answer (KTO); one half where nothing is gained
    calls        share of held-out dialogues that call for a tool where the right ones are called
                 with the right arguments
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from harness import ROOT, smollm2_gguf, write_record

QUESTION = __doc__.splitlines()[0]
CONFIGS = {
    "SFT": "examples/configs/SmolLM2-135M/sft/run_sft_lora.yaml",
    "DPO": "examples/configs/SmolLM2-135M/dpo/run_dpo_lora.yaml",
    "KTO": "examples/configs/SmolLM2-135M/kto/run_kto_lora.yaml",
    "RM": "examples/configs/SmolLM2-135M/rm/run_rm_lora.yaml",
    "calls": "examples/configs/SmolLM2-135M/fc/run_fc_lora.yaml",
}
ANSWERING = ("SFT", "DPO", "KTO")  # the others are measured by what their runs record
CALLS_TEMPLATE = ROOT / "examples/configs/SmolLM2-135M/fc/chat_template.jinja"
QUESTIONS = ROOT / "examples/data/sft-eval.jsonl"
PAIRS = ROOT / "examples/data/dpo-eval.jsonl"
MAX_TOKENS = 96
DPO_POINTS = 15  # of held-out preference accuracy, at least

Numbers = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--methods", default=",".join(CONFIGS))
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--side", help="model folder whose behaviour is printed (for this script)")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(behaviour(args.side)))
        return
    methods, seeds = args.methods.split(","), [int(seed) for seed in args.seeds.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), methods, seeds)


def measure(folder: Path, methods: list[str], seeds: list[int]) -> None:
    """A record of each method: the start and its runs, as numbers of their behaviour."""
    base = folder / "base"
    erniekit("import-gguf", smollm2_gguf(), base)
    shutil.copytree(base, folder / "with-tools")
    shutil.copy(CALLS_TEMPLATE, folder / "with-tools")
    start = [asked(base)] if set(methods) & set(ANSWERING) else []
    for method in methods:
        model = folder / "with-tools" if method == "calls" else base
        results = {"start": start, method: []} if method in ANSWERING else {method: []}
        for seed in seeds:
            output = folder / f"{method}-{seed}"
            words = [f"model_name_or_path={model}", f"output_dir={output}", f"seed={seed}"]
            erniekit("train", CONFIGS[method], *words)
            numbers = held_out(output) | (called(output) if method == "calls" else {})
            if method in ANSWERING:
                erniekit("export", CONFIGS[method], *words)
                numbers |= asked(output / "export")
            results[method].append(numbers)
            print(method, seed, numbers, file=sys.stderr, flush=True)
        report(method, results, seeds)


def erniekit(*words: Any) -> None:
    command = [sys.executable, "-m", "erniekit.cli", *map(str, words)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def asked(model: Path) -> Numbers:
    """`behaviour`, in a process of its own."""
    command = [sys.executable, __file__, "--side", str(model)]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def held_out(output: Path) -> Numbers:
    """The held-out loss and, where there is one, reward accuracy before and after training."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    evaluated = [record for record in map(json.loads, lines) if "eval_loss" in record]
    numbers = {"loss before": evaluated[0]["eval_loss"], "loss": evaluated[-1]["eval_loss"]}
    for name, record in (("reward before", evaluated[0]), ("reward", evaluated[-1])):
        if "eval_rewards_accuracy" in record:
            numbers[name] = record["eval_rewards_accuracy"]
    return numbers


def called(output: Path) -> Numbers:
    """How right the calls of held-out dialogues are, before and after training."""
    records = _records(output / "answers.jsonl")
    first, last = (pick(record["step"] for record in records) for pick in (min, max))
    numbers = {}
    for when, step in ((" before", first), ("", last)):
        for name, score in (
            ("calls", "call_arguments"), ("tools", "call_name"), ("no calls", "no_call"),
        ):  # fmt: skip
            found = [r[score] for r in records if r["step"] == step and score in r]
            numbers[name + when] = mean(found)
    return numbers


def behaviour(model: str) -> Numbers:
    """What a model folder answers to the held-out questions, and which answers it prefers."""
    from fastdeploy import LLM, SamplingParams

    llm = LLM(model, max_model_len=1024, max_num_seqs=16, enable_logprob=True)
    asked = [(r["src"][0], r["tgt"][0]) for r in _records(QUESTIONS)]
    chats = [[{"role": "user", "content": question}] for question, _ in asked]
    greedy = SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    outs = llm.chat(chats, greedy, use_tqdm=False)
    answers = [out.outputs.text for out in outs]
    records = _records(PAIRS)
    texts = [(record["src"][0], answer) for record in records for answer in _ordered(record)]
    scores = log_probs(llm, texts)
    pairs = list(zip(scores[::2], scores[1::2]))
    return {
        "similarity": mean(similarity(a, reference) for a, (_, reference) in zip(answers, asked)),
        "words": float(median(len(answer.split()) for answer in answers)),
        "preferred": mean(float(chosen > rejected) for chosen, rejected in pairs),
    }


def log_probs(llm: Any, texts: list[tuple[str, str]]) -> list[float]:
    """Mean log-probability of a token of each (question, answer)'s answer, by the model."""
    from fastdeploy import SamplingParams
    from fastdeploy.engine.prompt import chat_prompt

    prompts = [
        chat_prompt(llm.template, llm.tokenizer, [{"role": "user", "content": text}], None, {})
        for text, _ in texts
    ]
    whole = [[*ids, *llm.tokenizer.encode(text)] for ids, (_, text) in zip(prompts, texts)]
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    outs = llm.generate(whole, params, use_tqdm=False)
    return [
        mean(entry[token].logprob for entry, token in zip(out.prompt_logprobs[n:], ids[n:]))
        for out, ids, n in zip(outs, whole, map(len, prompts))
    ]


def similarity(answer: str, reference: str) -> float:
    """F1 of the words that two texts share, each as often as both have it."""
    left, right = (Counter(text.lower().split()) for text in (answer, reference))
    shared = (left & right).total()
    return 2 * shared / (left.total() + right.total()) if shared else 0.0


def _ordered(record: dict[str, Any]) -> list[str]:
    """Chosen and rejected answer of a pair."""
    by_rank = sorted(zip(record["sort"], record["response"]), reverse=True)
    return [answer for _, answer in by_rank]


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def report(method: str, results: dict[str, list[Numbers]], seeds: list[int]) -> None:
    names = ("loss before", "loss", "similarity", "words", "preferred")
    names += ("reward before", "reward", "calls before", "calls")
    shown = [n for n in names if any(n in run for runs in results.values() for run in runs)]
    table = [["model", *shown]]
    for side, runs in results.items():
        cells = [_cell([run[name] for run in runs if name in run]) for name in shown]
        table.append([side, *cells])
    chosen = f"--methods {method} --seeds {','.join(map(str, seeds))}"
    write_record(
        f"behaviour_{method.lower()}", QUESTION, f"python benchmarks/behaviour.py {chosen}",
        {"model": "SmolLM2-135M-Instruct", "config": CONFIGS[method], "seeds": seeds,
         "answers": MAX_TOKENS},
        results, table, " ".join(sentences(results)),
    )  # fmt: skip


def sentences(results: dict[str, list[Numbers]]) -> list[str]:
    """What to read in the table, one sentence about each method."""
    found = []
    start = results["start"][0] if "start" in results else {}
    if "SFT" in results:
        after = mean(run["similarity"] for run in results["SFT"])
        found.append(
            f"SFT: answers share {100 * after:.0f} % of their words with the reference, "
            f"{100 * start['similarity']:.0f} % before."
        )
    if "DPO" in results:
        reward = 100 * (mean(run["reward"] for run in results["DPO"]) - 0.5)
        points = 100 * (mean(run["preferred"] for run in results["DPO"]) - start["preferred"])
        met = "met" if min(reward, points) >= DPO_POINTS else "missed"
        found.append(
            f"DPO: held-out preference accuracy rises by {points:.0f} points (likelier tokens) and "
            f"{reward:.0f} points (rewards); at least {DPO_POINTS}: {met}."
        )
    if "KTO" in results:
        before, after = (_percent(results["KTO"], name) for name in ("reward before", "reward"))
        points = 100 * (mean(run["preferred"] for run in results["KTO"]) - start["preferred"])
        found.append(
            f"KTO: {after} % of the held-out answers are on their side, {before} % before; "
            f"{points:.0f} points more of the pairs are in the right order."
        )
    if "RM" in results:
        before, after = (_percent(results["RM"], name) for name in ("reward before", "reward"))
        found.append(
            f"RM: the preferred answer of held-out pairs scores higher in {after} %, {before} % "
            "before."
        )
    if "calls" in results:
        told = [f"{_percent(results['calls'], name)} %" for name in _CALLS]
        found.append(
            "Calls: right in {} of the held-out dialogues that ask for one, {} before; the right "
            "tools in {}, {} before; none where none is asked for in {}, {} before.".format(*told)
        )
    return found


_CALLS = ("calls", "calls before", "tools", "tools before", "no calls", "no calls before")


def _percent(runs: list[Numbers], name: str) -> str:
    return f"{100 * mean(run[name] for run in runs):.0f}"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{spread}"


if __name__ == "__main__":
    main()
