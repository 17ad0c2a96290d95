"""The sides of `training.py` that learn from preferences: ours and TRL's DPOTrainer.

A step is two pairs: a prompt of about 128 tokens and two answers of about 192, float32, with loss
on the end of an answer. Ours is the real command, a row a pair; what the reference model takes
before training is spread over the pairs and counted. TRL runs with its own defaults otherwise,
without a copy of the model where it trains adapters.
"""

from __future__ import annotations

import json
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from harness import ROOT, peak_memory_gb, trained, words_of

PAIRS, PROMPT, ANSWER, STEPS = 2, 128, 192, 4
LORA_RANK = 32
OURS_FULL, OURS_LORA = "ours, DPO full", "ours, DPO LoRA"
TRL, TRL_PEFT = "TRL DPO float32", "TRL DPO peft LoRA float32"
SIDES = (OURS_FULL, TRL, OURS_LORA, TRL_PEFT)


def prepare(folder: Path) -> None:
    """Pairs of consecutive stretches of text; `folder` has the model with its tokenizer."""
    from ernie.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_folder(folder / "model")
    text = (ROOT / "examples/data/sft-train.jsonl").read_text()
    ids = tokenizer.encode(" ".join(json.loads(line)["tgt"][0] for line in text.splitlines()))
    frame = 10  # room for the template around question and answers
    sizes = {"question": PROMPT - frame, "chosen": ANSWER - 2, "rejected": ANSWER - 2}
    records, start = [], 0
    for _ in range(PAIRS * STEPS):
        record = {}
        for key, size in sizes.items():
            record[key] = tokenizer.decode(ids[start : start + size])
            start += size
        records.append(record)
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))


def run_ours(folder: Path, side: str) -> dict[str, float]:
    from erniekit.config import read_run, resolved
    from erniekit.data.stream import stream
    from erniekit.recipes import preference

    with tempfile.TemporaryDirectory() as output:
        settings = {
            "stage": "DPO",
            "model_name_or_path": folder / "model",
            "train_dataset_path": folder / "pairs.jsonl",
            "train_dataset_type": "alpaca",
            "output_dir": output,
            "fine_tuning": "LoRA" if side == OURS_LORA else "Full",
            "lora_rank": LORA_RANK,
            "packing": "false",
            "max_seq_len": 2 * (PROMPT + 2 * ANSWER),
            "mask_out_eos_token": "false",
            "normalize_logps": "false",
            "batch_size": PAIRS,
            "max_steps": STEPS,
            "save_strategy": "no",
            "do_eval": "false",
        }
        words = words_of(settings)
        run = resolved(read_run(words), "cpu")
        method = preference.method(run, "cpu")
        batches = stream(run, "train").batches(PAIRS)
        start = time.perf_counter()
        method.prepare(islice(batches, STEPS))
        reference_s = (time.perf_counter() - start) / (PAIRS * STEPS)
        records = trained(words, output)[1:]
    step_s = median(r["seconds"] for r in records)
    return {
        "pairs_per_s": 1 / (reference_s + step_s / PAIRS),
        "tokens_of_pair": median(r["num_tokens"] for r in records) / PAIRS,
        "memory_gb": max(r["peak_memory_gib"] for r in records) * 2**30 / 1e9,
        "reference_s": reference_s,
        "step_s": step_s,
    }


def run_trl(folder: Path, side: str, peft_config: Any, clock: Any) -> dict[str, float]:
    """`peft_config` for adapters, `clock` a callback that notes the seconds of steps."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "model/tokenizer.json"))
    tokenizer.pad_token_id, tokenizer.eos_token_id = 0, 2
    records = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    rows = [{"prompt": r["question"], **{k: r[k] for k in ("chosen", "rejected")}} for r in records]
    with tempfile.TemporaryDirectory() as output:
        config = DPOConfig(
            output_dir=output,
            per_device_train_batch_size=PAIRS,
            max_steps=STEPS,
            max_length=None,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[clock],
            peft_config=peft_config if side == TRL_PEFT else None,
        )
        trainer.train()
    row = trainer.train_dataset[0]
    size = 2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"])
    step_s = median(clock.seconds[1:])
    return {
        "pairs_per_s": PAIRS / step_s,
        "tokens_of_pair": size,
        "memory_gb": peak_memory_gb(),
        "reference_s": 0.0,  # within the steps
        "step_s": step_s,
    }


def table(results: dict[str, dict[str, float]]) -> list[list[str]]:
    """Rows of the record: pairs a second, and what stands behind it."""
    head = ["side", "pairs/s", "peak memory GB", "s a step", "reference before, s a pair", "tokens"]
    return [head] + [
        [side, f"{n['pairs_per_s']:.3f}", f"{n['memory_gb']:.2f}", f"{n['step_s']:.1f}",
         f"{n['reference_s']:.2f}", f"{n['tokens_of_pair']:.0f}"]
        for side, n in results.items()
    ]  # fmt: skip
