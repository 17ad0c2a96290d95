"""How fast is fine-tuning of the 0.3B shape on this CPU, and in how much memory, beside
transformers and TRL?

    python benchmarks/training.py [--rounds 3]

Random weights of ERNIE-4.5-0.3B. A step is two rows of 512 tokens, of which all but a few dozen are
trained, and one AdamW update. Ours is the real command (`erniekit train`) with its defaults:
packing, clipping, metrics. The peer is the plainest loop around transformers (no clipping, no data
pipeline), in float32 and with bfloat16 autocast, and with adapters by peft; and TRL's SFTTrainer
in float32, full and with peft, on rows of the same size, with its own defaults otherwise.

"lean" is ours with everything that saves memory: 8-bit moments, updates within the backward pass
(so no clipping), blocks computed again, and a smaller chunk of the loss.

Learning from preferences (`training_pairs.py`) is compared with TRL's DPOTrainer.

The floor of a full step is six operations per weight and token at the peak of float32 products.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import training_pairs as pairs
from harness import (
    ROOT,
    machine,
    peak_memory_gb,
    smollm2_gguf,
    take_turns,
    trained,
    words_of,
    write_record,
)

QUESTION = " ".join(__doc__.split("\n\n")[0].split())
ROWS, ROW, STEPS = 2, 512, 4
LORA_RANK = 32
OURS_FULL, OURS_LORA = "ours, full", "ours, LoRA"
OURS_LEAN, OURS_SHORT = "ours, full, lean", "ours, full, bfloat16 products"
SETTINGS: dict[str, dict[str, object]] = {
    OURS_FULL: {"fine_tuning": "Full"},
    OURS_LEAN: {
        "fine_tuning": "Full",
        "optim": "adamw_8bit",
        "optimizer_in_backward": "true",
        "max_grad_norm": 0,
        "recompute": "true",
        "loss_subbatch_seqlen": 64,
    },
    OURS_SHORT: {"fine_tuning": "Full", "cpu_products": "bfloat16"},
    OURS_LORA: {"fine_tuning": "LoRA"},
}
TRL, TRL_PEFT = "TRL float32", "TRL peft LoRA float32"
PLAIN, AUTOCAST, PEFT = (
    "transformers float32",
    "transformers autocast bfloat16",
    "peft LoRA float32",
)
TOKEN_SIDES = (OURS_FULL, PLAIN, TRL, OURS_LEAN, OURS_SHORT, AUTOCAST, OURS_LORA, PEFT, TRL_PEFT)
SIDES = (*TOKEN_SIDES, *pairs.SIDES)


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
    pairs.prepare(folder)


def run_ours(folder: Path, side: str) -> dict[str, float]:
    settings = {
        "model_name_or_path": folder / "model",
        "train_dataset_path": folder / "train.jsonl",
        "lora_rank": LORA_RANK,
        "max_seq_len": ROW,
        "batch_size": ROWS,
        "max_steps": STEPS,
        "save_strategy": "no",
        "do_eval": "false",
        **SETTINGS[side],
    }
    with tempfile.TemporaryDirectory() as output:
        records = trained(words_of({**settings, "output_dir": output}), output)[1:]
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
        from peft import get_peft_model

        model = get_peft_model(model, peft_config())
    seconds, tokens = seconds_of_steps(model, ROWS, STEPS, short=side == AUTOCAST), ROWS * ROW
    return {"tokens_per_s": tokens / seconds, "tokens": tokens, "memory_gb": peak_memory_gb()}


def seconds_of_steps(model: Any, num_rows: int, num_steps: int, *, short: bool = False) -> float:
    """Of one step of the plainest loop around a model of transformers: the median, without the
    first. `short` multiplies in bfloat16.
    """
    import torch

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(num_steps):
        ids = torch.randint(10, 40_000, (num_rows, ROW), generator=generator)
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=short):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def peft_config():
    from peft import LoraConfig

    projections = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    return LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=projections)


def clock():
    """A callback of transformers' trainers that notes the seconds of every step."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            self.seconds.append(time.perf_counter() - self.start)

    return Clock()


def run_trl(folder: Path, side: str) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "model/tokenizer.json"))
    tokenizer.pad_token_id, tokenizer.eos_token_id = 0, 2
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(10, 40_000, (ROWS * STEPS, ROW), generator=generator).tolist()
    with tempfile.TemporaryDirectory() as output:
        config = SFTConfig(
            output_dir=output,
            per_device_train_batch_size=ROWS,
            max_steps=STEPS,
            max_length=ROW,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer,
            callbacks=[timed := clock()],
            peft_config=peft_config() if side == TRL_PEFT else None,
        )
        trainer.train()
    tokens = ROWS * ROW
    return {
        "tokens_per_s": tokens / median(timed.seconds[1:]),
        "tokens": tokens,
        "memory_gb": peak_memory_gb(),
    }


def run_pairs(folder: Path, side: str) -> dict[str, float]:
    if side in (pairs.TRL, pairs.TRL_PEFT):
        return pairs.run_trl(folder, side, peft_config(), clock())
    return pairs.run_ours(folder, side)


def report(results: dict[str, dict[str, float]], rounds: int) -> None:
    from ernie.models import MODELS

    config, here = MODELS["ERNIE-4.5-0.3B"].config, machine()
    peak = here["float32_gflop_per_s"] * 1e9
    flops = 3 * config.flops_per_token(ROW // 2)
    table = [["side", "tokens/s", "peak memory GB", "share of float32 products"]]
    for side, n in ((side, results[side]) for side in TOKEN_SIDES):
        share = f"{n['tokens_per_s'] * flops / peak:.0%}" if side in (OURS_FULL, PLAIN, TRL) else ""
        table.append([side, f"{n['tokens_per_s']:.1f}", f"{n['memory_gb']:.2f}", share])

    def ratio(ours: str, peer: str, key: str) -> float:
        return results[ours][key] / results[peer][key]

    ratios = {
        f"{key} {ours} / {peer}": ratio(ours, peer, key)
        for ours, peer in (
            (OURS_FULL, PLAIN),
            (OURS_FULL, TRL),
            (OURS_LEAN, PLAIN),
            (OURS_LEAN, TRL),
            (OURS_FULL, AUTOCAST),
            (OURS_SHORT, AUTOCAST),
            (OURS_LORA, PEFT),
            (OURS_LORA, TRL_PEFT),
        )
        for key in ("tokens_per_s", "memory_gb")
    }
    ratios |= {
        f"{key} {ours} / {peer}": ratio(ours, peer, key)
        for ours, peer in ((pairs.OURS_FULL, pairs.TRL), (pairs.OURS_LORA, pairs.TRL_PEFT))
        for key in ("pairs_per_s", "memory_gb")
    }
    full, lora = (OURS_FULL, PLAIN), (OURS_LORA, PEFT)
    autocast = ratio(OURS_FULL, AUTOCAST, "tokens_per_s")
    reading = (
        f"Full fine-tuning runs at {ratio(*full, 'tokens_per_s'):.2f}x the speed of transformers "
        f"float32 in {ratio(*full, 'memory_gb'):.0%} of its memory ({autocast:.2f}x its speed with "
        f"bfloat16 autocast, which is fast on processors with AVX512-BF16 and slow elsewhere); "
        f"LoRA at {ratio(*lora, 'tokens_per_s'):.2f}x peft in {ratio(*lora, 'memory_gb'):.0%}. "
        f"Beside TRL, full runs at {ratio(OURS_FULL, TRL, 'tokens_per_s'):.2f}x its speed in "
        f"{ratio(OURS_FULL, TRL, 'memory_gb'):.0%} of its memory, lean at "
        f"{ratio(OURS_LEAN, TRL, 'tokens_per_s'):.2f}x in "
        f"{ratio(OURS_LEAN, TRL, 'memory_gb'):.0%}, LoRA at "
        f"{ratio(OURS_LORA, TRL_PEFT, 'tokens_per_s'):.2f}x in "
        f"{ratio(OURS_LORA, TRL_PEFT, 'memory_gb'):.0%}; with bfloat16 products full runs at "
        f"{ratio(OURS_SHORT, AUTOCAST, 'tokens_per_s'):.2f}x the speed of autocast. "
        f"Preferences: full at {ratio(pairs.OURS_FULL, pairs.TRL, 'pairs_per_s'):.2f}x the pairs a "
        f"second of TRL in {ratio(pairs.OURS_FULL, pairs.TRL, 'memory_gb'):.0%} of its memory, "
        f"LoRA at {ratio(pairs.OURS_LORA, pairs.TRL_PEFT, 'pairs_per_s'):.2f}x in "
        f"{ratio(pairs.OURS_LORA, pairs.TRL_PEFT, 'memory_gb'):.0%}, the reference included."
    )
    write_record(
        "training", QUESTION, f"python benchmarks/training.py --rounds {rounds}",
        {"model": "ERNIE-4.5-0.3B shape, random weights", "rows": ROWS, "row_tokens": ROW,
         "steps": STEPS, "lora_rank": LORA_RANK, "pairs": pairs.PAIRS,
         "prompt_tokens": pairs.PROMPT, "answer_tokens": pairs.ANSWER},
        {"sides": results, "ratios": ratios}, table, reading,
        pairs.table({side: results[side] for side in pairs.SIDES}),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.side:
        kinds = {"ours": run_ours, "TRL": run_trl}
        kind = args.side.replace(",", " ").split()[0]
        side = run_pairs if args.side in pairs.SIDES else kinds.get(kind, run_transformers)
        print(json.dumps(side(args.folder, args.side)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        report(take_turns(__file__, SIDES, args.rounds, ["--folder", folder]), args.rounds)


if __name__ == "__main__":
    main()
