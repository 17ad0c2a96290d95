"""How fast is inference of the 0.3B shape on this CPU, beside transformers on the same weights?

    python benchmarks/inference.py [--rounds 3]

Random weights of ERNIE-4.5-0.3B, greedy, all cores. Three numbers a side:

    prefill     a prompt of 512 tokens until its first token, prompt tokens per second
    decode      the tokens after that, one request, tokens per second
    batch       16 requests of 128 prompt and 64 new tokens, new tokens per second of the whole run

Floors: decode reads every weight once a token (bandwidth), prefill does the model's products
(float32 peak).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from harness import peak_memory_gb, seconds_of, take_turns, write_record

QUESTION = __doc__.splitlines()[0]
PROMPT, NEW = 512, 64
BATCH, BATCH_PROMPT, BATCH_NEW = 16, 128, 64
PEERS = {"transformers float32": "float32", "transformers bfloat16": "bfloat16"}
OURS = "ours, bfloat16 weights"


def make_model(folder: Path) -> None:
    """A folder with the 0.3B network, random weights, no tokenizer."""
    import ernie
    from ernie.models import MODELS

    model = ernie.ErnieModel(MODELS["ERNIE-4.5-0.3B"].config)
    model.init_weights(seed=0)
    ernie.save(model, folder)


def prompts(count: int, length: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(count)
    return torch.randint(10, 100_000, (count, length), generator=generator).tolist()


def run_ours(folder: str) -> dict[str, float]:
    from fastdeploy import LLM, SamplingParams

    llm = LLM(folder, max_model_len=1024, max_num_seqs=BATCH, enable_prefix_caching=False)

    def new_tokens(batch: list[list[int]], count: int) -> None:
        params = SamplingParams(max_tokens=count, temperature=0, ignore_eos=True)
        llm.generate(batch, params, use_tqdm=False)

    return measure(new_tokens)


def run_transformers(folder: str, dtype: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def new_tokens(batch: list[list[int]], count: int) -> None:
        ids = torch.tensor(batch)
        with torch.inference_mode():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                min_new_tokens=count, do_sample=False, pad_token_id=0,
            )  # fmt: skip

    return measure(new_tokens)


def measure(new_tokens) -> dict[str, float]:
    """The three numbers, by a function that makes `count` new tokens for each prompt of a batch."""
    new_tokens(prompts(1, 64), 4)  # warm-up: kernels compiled, memory touched
    one = prompts(1, PROMPT)
    first_s = min(seconds_of(lambda: new_tokens(one, 1)) for _ in range(2))
    whole_s = seconds_of(lambda: new_tokens(one, 1 + NEW))
    batch = prompts(BATCH, BATCH_PROMPT)
    batch_s = seconds_of(lambda: new_tokens(batch, BATCH_NEW))
    return {
        "prefill": PROMPT / first_s,
        "decode": NEW / (whole_s - first_s),
        "batch": BATCH * BATCH_NEW / batch_s,
        "memory_gb": peak_memory_gb(),
    }


def report(results: dict[str, dict[str, float]]) -> None:
    from harness import machine

    from ernie.models import MODELS

    config, here = MODELS["ERNIE-4.5-0.3B"].config, machine()
    ours, base = results[OURS], results["transformers float32"]
    ratios = {k: ours[k] / base[k] for k in ("prefill", "decode", "batch")}
    best = {k: max(results[p][k] for p in PEERS) for k in ratios}
    floor = here["read_gb_per_s"] * 1e9 / (config.num_params() * 2)
    flops = config.flops_per_token(PROMPT // 2) - 2 * config.vocab_size * config.hidden_size
    shares = {
        "decode": ours["decode"] / floor,
        "prefill": ours["prefill"] * flops / (here["float32_gflop_per_s"] * 1e9),
    }
    table = [["side", "prefill tok/s", "decode tok/s", "16 requests tok/s", "peak memory GB"]]
    for side, n in results.items():
        speeds = (f"{n[k]:.1f}" for k in ratios)
        table.append([side, *speeds, f"{n['memory_gb']:.2f}"])
    table.append(["ours / transformers float32", *(f"{r:.2f}x" for r in ratios.values()), ""])
    table.append(["ours / best transformers", *(f"{ours[k] / best[k]:.2f}x" for k in ratios), ""])
    table.append(
        ["ours, share of the ceiling", f"{shares['prefill']:.0%} of float32 products",
         f"{shares['decode']:.0%} of read bandwidth", "", ""]
    )  # fmt: skip
    prefill, decode, batch = ratios.values()
    memory = ours["memory_gb"] / base["memory_gb"]
    reading = (
        f"Ours is {prefill:.2f}x, {decode:.2f}x and {batch:.2f}x transformers float32 in prefill, "
        f"decode and with 16 requests, at {memory:.0%} of its memory."
    )
    write_record(
        "inference", QUESTION, "python benchmarks/inference.py",
        {"model": "ERNIE-4.5-0.3B shape, random weights", "prompt": PROMPT, "new": NEW,
         "batch": [BATCH, BATCH_PROMPT, BATCH_NEW]},
        {"sides": results, "ratios": ratios, "shares": shares}, table, reading,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side")
    parser.add_argument("--folder")
    args = parser.parse_args()
    if args.side:
        ours = args.side == OURS
        run = run_ours(args.folder) if ours else run_transformers(args.folder, PEERS[args.side])
        print(json.dumps(run))
        return
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder))
        report(take_turns(__file__, [OURS, *PEERS], args.rounds, ["--folder", folder]))


if __name__ == "__main__":
    main()
