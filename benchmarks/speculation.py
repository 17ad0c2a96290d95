"""What does speculation gain on real text: n-gram and MTP drafts on SmolLM2, on this CPU?

    python benchmarks/speculation.py [--folder FOLDER] [--minutes 8] [--rounds 3]

The model is the imported SmolLM2 with an MTP block, which is trained here first (see
`speculation_block.py`). `--folder` keeps the trained model and every round that was measured, and
goes on from there.

Two sets of prompts: answers that copy from the prompt (code to be edited, a text to be repeated),
and free ones. Greedy, one request at a time, then all of a set at once. The sides (the engine
without speculation and with each method) take turns prompt by prompt in one process, and the best
time over the rounds counts, so that a busy machine treats them alike. A side must say the same
tokens as the first; and as a step with drafts computes all that one without computes, a step that
took less time than that is a sign of a busy machine, and no record is written.
"""

from __future__ import annotations

import argparse
import inspect
import json
import shlex
import tempfile
import textwrap
from pathlib import Path
from statistics import mean
from typing import Any

from harness import seconds_of, smollm2_gguf, write_record
from speculation_block import train

QUESTION = __doc__.splitlines()[0]
NUM_TOKENS = 64
BASE = "without"
SIDES: dict[str, dict[str, Any] | None] = {
    BASE: None,
    "n-gram, 3 tokens": {"method": "ngram", "num_speculative_tokens": 3},
    "n-gram, 5 tokens": {"method": "ngram", "num_speculative_tokens": 5},
    "MTP, 1 token": {"method": "mtp", "num_speculative_tokens": 1},
    "MTP, 2 tokens": {"method": "mtp", "num_speculative_tokens": 2},
}


def prompts() -> dict[str, list[str]]:
    code = [textwrap.shorten, textwrap.indent, shlex.join, shlex.quote]
    paragraphs = inspect.getdoc(textwrap.TextWrapper).split("\n\n")  # type: ignore[union-attr]
    return {
        "copying": [
            f"Add type hints to this function:\n\n{inspect.getsource(function)}"
            for function in code
        ]
        + ["Repeat this text, then say what it is about:\n\n" + " ".join(paragraphs[0].split())],
        "free": [
            "What is the capital of France?",
            "Write a short poem about the sea.",
            "Explain how a bicycle stays upright.",
            "Why is the sky blue?",
            "Tell me a story about a dog named Max.",
        ],
    }


def measure(folder: Path) -> dict[str, Any]:
    """One round: by set of prompts and side, seconds of each prompt and of all at once; steps,
    drafts and tokens.
    """
    import torch

    import ernie
    from fastdeploy import LLM, SamplingParams

    model = ernie.load(folder, dtype=torch.bfloat16)
    options = {"max_num_seqs": 8, "max_model_len": 1024, "enable_prefix_caching": False}
    llms = {side: LLM(model, speculative_config=how, **options) for side, how in SIDES.items()}
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    for llm in llms.values():
        llm.generate("Hello", params, use_tqdm=False)  # kernels compiled, memory touched
    results: dict[str, Any] = {}
    for name, texts in prompts().items():
        chats = [[{"role": "user", "content": text}] for text in texts]
        sides: dict[str, Any] = {
            side: {"seconds": [], "steps": 0, "offered": 0, "accepted": 0, "said": []}
            for side in SIDES
        }
        for chat in chats:
            for side, llm in llms.items():
                before = llm.engine.stats()
                (out,) = llm.chat(chat, params, use_tqdm=False)
                after, seen = llm.engine.stats(), sides[side]
                assert out.metrics is not None
                seen["seconds"].append(out.metrics.finished_time - out.metrics.first_token_time)
                seen["steps"] += after.num_steps - before.num_steps - 1  # without the prompt's own
                seen["offered"] += after.num_draft_tokens - before.num_draft_tokens
                seen["accepted"] += after.num_accepted_tokens - before.num_accepted_tokens
                seen["said"].append(out.outputs[0].token_ids)
        for side, llm in llms.items():
            sides[side]["at_once"] = seconds_of(lambda: llm.chat(chats, params, use_tqdm=False))  # noqa: B023
        results[name] = sides
    return results


def best_of(rounds: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """By set and side: figures from the shortest time of each prompt."""
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, texts in prompts().items():
        results[name] = {}
        base = rounds[0][name][BASE]
        for side in SIDES:
            runs = [one[name][side] for one in rounds]
            seconds = sum(map(min, zip(*(run["seconds"] for run in runs))))
            first, num_tokens = runs[0], (NUM_TOKENS - 1) * len(texts)
            results[name][side] = {
                "tokens_per_s": num_tokens / seconds,
                "ms_a_step": 1000 * seconds / first["steps"],
                "tokens_a_step": num_tokens / first["steps"],
                "acceptance": first["accepted"] / first["offered"] if first["offered"] else None,
                "at_once_tokens_per_s": NUM_TOKENS * len(texts) / min(r["at_once"] for r in runs),
                "seconds_by_round": [run["seconds"] for run in runs],
                "same_answers": sum(a == b for a, b in zip(first["said"], base["said"])),
            }
    return results


def report(rounds: list[dict[str, Any]], training: dict[str, float]) -> None:
    results = best_of(rounds)
    table = [["prompts", "side", "drafts accepted", "tokens a step", "ms a step", "tok/s", "ratio",
              "at once tok/s", "ratio", "same answers"]]  # fmt: skip
    for name, sides in results.items():
        base = sides[BASE]
        for side, n in sides.items():
            if n["ms_a_step"] < 0.95 * base["ms_a_step"]:
                raise SystemExit(
                    f"{side}, {name}: a step took {n['ms_a_step']:.1f} ms, and {BASE} speculation "
                    f"{base['ms_a_step']:.1f} ms: the machine is busy; measure more rounds"
                )
            n["ratio"] = n["tokens_per_s"] / base["tokens_per_s"]
            n["at_once_ratio"] = n["at_once_tokens_per_s"] / base["at_once_tokens_per_s"]
            accepted = "" if n["acceptance"] is None else f"{n['acceptance']:.0%}"
            table.append(
                [name, side, accepted, f"{n['tokens_a_step']:.2f}", f"{n['ms_a_step']:.1f}",
                 f"{n['tokens_per_s']:.1f}", f"{n['ratio']:.2f}x",
                 f"{n['at_once_tokens_per_s']:.1f}", f"{n['at_once_ratio']:.2f}x",
                 f"{n['same_answers']} of {len(prompts()[name])}"]
            )  # fmt: skip

    def best(method: str, name: str) -> str:
        sides = {s: n for s, n in results[name].items() if s.startswith(method)}
        side = max(sides, key=lambda s: sides[s]["ratio"])
        return f"{sides[side]['ratio']:.2f}x ({side.partition(', ')[2]})"

    one = {name: sides["MTP, 1 token"] for name, sides in results.items()}
    times = [n["ms_a_step"] / results[name][BASE]["ms_a_step"] for name, n in one.items()]
    accepted = " and ".join(f"{n['acceptance']:.0%}" for n in one.values())
    costs = (
        f"A step with one MTP draft takes {mean(times):.2f}x as long (a second row, the block, and "
        f"the head once more), so it would pay from an acceptance of about {mean(times) - 1:.0%}; "
        f"it has {accepted}."
    )
    reading = (
        f"One request at a time, n-gram drafts give at best {best('n-gram', 'copying')} where the "
        f"answer copies and {best('n-gram', 'free')} where it does not; the MTP block gives "
        f"{best('MTP', 'copying')} and {best('MTP', 'free')}, after {training['seconds']:.0f} s of "
        f"training on {training['text_tokens']:.0f} tokens ({training['tokens']:.0f} with "
        f"repetitions). Its loss on held-out answers fell from {training['loss_before']:.2f} to "
        f"{training['loss_after']:.2f}, and its likeliest token is the trunk's in "
        f"{training['agreement']:.0%} of their places. {costs} Times are the best of "
        f"{len(rounds)} rounds, prompt by prompt; the JSON has them all."
    )
    write_record(
        "speculation", QUESTION, "python benchmarks/speculation.py",
        {"model": "SmolLM2-135M-Instruct, bfloat16, with an MTP block", "tokens": NUM_TOKENS,
         "rounds": len(rounds), "prompts": {name: len(texts) for name, texts in prompts().items()}},
        {"sets": results, "training": training}, table, reading,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--folder", help="keeps the trained model and the rounds, and goes on")
    parser.add_argument("--minutes", type=float, default=8.0, help="of training")
    parser.add_argument("--rounds", type=int, default=3, help="to measure now; 0 reports only")
    parser.add_argument("--only-train", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        model, seen = folder / "model", folder / "rounds.jsonl"
        if not (model / "training.json").exists():
            from ernie.checkpoint.gguf import import_gguf

            import_gguf(smollm2_gguf(), Path(temporary) / "imported")
            train(Path(temporary) / "imported", model, args.minutes)
        training = json.loads((model / "training.json").read_text())
        if args.only_train:
            print(json.dumps(training))
            return
        for _ in range(args.rounds):
            with seen.open("a") as file:
                file.write(json.dumps(measure(model)) + "\n")
        report([json.loads(line) for line in seen.read_text().splitlines()], training)


if __name__ == "__main__":
    main()
