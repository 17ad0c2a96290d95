"""How fast is fine-tuning of the 0.3B shape on this CPU, and in how much memory, beside
transformers?

    python benchmarks/training.py [--rounds 3]

Random weights of ERNIE-4.5-0.3B. A step is two rows of 512 tokens, of which all but a few dozen are
trained, and one AdamW update. Ours is the real command (`erniekit train`) with its defaults:
packing, clipping, metrics. The peer is the plainest loop around transformers (no clipping, no data
pipeline), in float32 and with bfloat16 autocast, and with adapters by peft.

The floor of a full step is six operations per weight and token at the peak of float32 products.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median

from harness import ROOT, machine, peak_memory_gb, smollm2_gguf, take_turns, write_record

QUESTION = " ".join(__doc__.split("\n\n")[0].split())
ROWS, ROW, STEPS = 2, 512, 4
LORA_RANK = 32
OURS_FULL, OURS_LORA = "ours, full", "ours, LoRA"
PLAIN, AUTOCAST, PEFT = (
    "transformers float32",
    "transformers autocast bfloat16",
    "peft LoRA float32",
)
SIDES = (OURS_FULL, PLAIN, AUTOCAST, OURS_LORA, PEFT)


def prepare(folder: Path) -> None:
    """The network with a tokenizer (SmolLM2's, which fits its vocabulary), and long dialogues."""
    import ernie
    from ernie.checkpoint.gguf import import_gguf
    from ernie.models import MODELS
    from ernie.tokenizer import Tokenizer

    import_gguf(smollm2_gguf(), folder / "smollm2")
    model = ernie.ErnieModel(MODELS["ERNIE-4.5-0.3B"].config)
    model.init_weights(seed=0)
    model.tokenizer = tokenizer = Tokenizer.from_folder(folder / "smollm2")
    ernie.save(model, folder / "model")

    text = (ROOT / "examples/data/sft-train.jsonl").read_text()
    answers = " ".join(json.loads(line)["tgt"][0] for line in text.splitlines())
    ids = tokenizer.encode(answers)
    frame = 48  # room for the template around question and answer
    pieces = [tokenizer.decode(ids[i : i + ROW - frame]) for i in range(0, len(ids), ROW - frame)]
    lines = [json.dumps({"src": ["Go on."], "tgt": [piece]}) for piece in pieces]
    (folder / "train.jsonl").write_text("\n".join(lines))


def run_ours(folder: Path, method: str) -> dict[str, float]:
    from erniekit.cli import main

    with tempfile.TemporaryDirectory() as output:
        settings = {
            "model_name_or_path": folder / "model",
            "train_dataset_path": folder / "train.jsonl",
            "output_dir": output,
            "fine_tuning": method,
            "lora_rank": LORA_RANK,
            "max_seq_len": ROW,
            "batch_size": ROWS,
            "max_steps": STEPS,
            "save_strategy": "no",
            "do_eval": "false",
        }
        status = main(["train", *(f"{key}={value}" for key, value in settings.items())])
        if status:
            raise SystemExit(status)
        lines = (Path(output) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines][1:]
    return {
        "tokens_per_s": median(r["tokens_per_second"] for r in records),
        "tokens": median(r["num_tokens"] for r in records),
        "memory_gb": max(r["peak_memory_gib"] for r in records) * 2**30 / 1e9,
    }


def run_transformers(folder: Path, side: str) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).train()
    if side == PEFT:
        from peft import LoraConfig, get_peft_model

        projections = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
        config = LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=projections)
        model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(STEPS):
        ids = torch.randint(10, 40_000, (ROWS, ROW), generator=generator)
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=side == AUTOCAST):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    tokens = ROWS * ROW
    return {
        "tokens_per_s": tokens / median(seconds[1:]),
        "tokens": tokens,
        "memory_gb": peak_memory_gb(),
    }


def report(results: dict[str, dict[str, float]]) -> None:
    from ernie.models import MODELS

    config, here = MODELS["ERNIE-4.5-0.3B"].config, machine()
    peak = here["float32_gflop_per_s"] * 1e9
    flops = 3 * config.flops_per_token(ROW // 2)
    table = [["side", "tokens/s", "peak memory GB", "share of float32 products"]]
    for side, n in results.items():
        share = (
            "" if side in (OURS_LORA, PEFT, AUTOCAST) else f"{n['tokens_per_s'] * flops / peak:.0%}"
        )
        table.append([side, f"{n['tokens_per_s']:.1f}", f"{n['memory_gb']:.2f}", share])

    def ratio(ours: str, peer: str, key: str) -> float:
        return results[ours][key] / results[peer][key]

    ratios = {
        f"{key} {ours} / {peer}": ratio(ours, peer, key)
        for ours, peer in ((OURS_FULL, PLAIN), (OURS_FULL, AUTOCAST), (OURS_LORA, PEFT))
        for key in ("tokens_per_s", "memory_gb")
    }
    full, lora = (OURS_FULL, PLAIN), (OURS_LORA, PEFT)
    autocast = ratio(OURS_FULL, AUTOCAST, "tokens_per_s")
    reading = (
        f"Full fine-tuning runs at {ratio(*full, 'tokens_per_s'):.2f}x the speed of transformers "
        f"float32 in {ratio(*full, 'memory_gb'):.0%} of its memory ({autocast:.2f}x its speed with "
        f"bfloat16 autocast, which is fast on processors with AVX512-BF16 and slow elsewhere); "
        f"LoRA at {ratio(*lora, 'tokens_per_s'):.2f}x peft in {ratio(*lora, 'memory_gb'):.0%}."
    )
    write_record(
        "training", QUESTION, "python benchmarks/training.py",
        {"model": "ERNIE-4.5-0.3B shape, random weights", "rows": ROWS, "row_tokens": ROW,
         "steps": STEPS, "lora_rank": LORA_RANK},
        {"sides": results, "ratios": ratios}, table, reading,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.side:
        ours = args.side.startswith("ours")
        method = "Full" if args.side == OURS_FULL else "LoRA"
        run = run_ours(args.folder, method) if ours else run_transformers(args.folder, args.side)
        print(json.dumps(run))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        report(take_turns(__file__, SIDES, args.rounds, ["--folder", folder]))


if __name__ == "__main__":
    main()
