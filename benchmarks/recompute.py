"""What does recomputation cost in time for the memory that it saves, beside peft's?

    python benchmarks/recompute.py [--rounds 1]

LoRA on random weights of ERNIE-4.5-0.3B; a step is four samples of 512 tokens in one packed row.
`auto` is given half of what lies between the plans without and with whole blocks. The peer is the
plainest loop around transformers and peft, with gradient checkpointing of whole blocks and without.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median

import training
from harness import peak_memory_gb, take_turns, trained, words_of, write_record

QUESTION = " ".join(__doc__.split("\n\n")[0].split())
SAMPLES, STEPS = 4, 3
ROW = SAMPLES * training.ROW
NOTHING, AUTO, FULL = "ours, nothing", "ours, auto", "ours, full"
GRANULARITIES = {
    NOTHING: None, "ours, full_attn": "full_attn", "ours, mlp": "mlp", AUTO: "auto", FULL: "full"
}  # fmt: skip
PEFT, PEFT_FULL = "peft, nothing", "peft, whole blocks"
SIDES = (*GRANULARITIES, PEFT, PEFT_FULL)


def settings_of(folder: Path, granularity: str | None) -> dict[str, object]:
    again = {"recompute": True, "recompute_granularity": granularity} if granularity else {}
    return {
        "model_name_or_path": str(folder / "model"),
        "train_dataset_path": str(folder / "train.jsonl"),
        "lora_rank": training.LORA_RANK,
        "max_seq_len": ROW,
        "max_steps": STEPS,
        "save_strategy": "no",
        "do_eval": False,
        "num_answers": 0,
        **again,
    }


def planned(settings: dict[str, object]):
    """The plan of a run on this machine's CPU."""
    from erniekit.config import resolved, run_from
    from erniekit.fit import fitted
    from erniekit.plan import Degrees, plan

    run = fitted(resolved(run_from(settings), "cpu"), "cpu", Degrees())
    return plan(run, "cpu")


def run_ours(folder: Path, side: str) -> dict[str, float]:
    from erniekit.plan import GIB

    granularity = GRANULARITIES[side]
    settings = settings_of(folder, granularity)
    if granularity == "auto":
        ends = [planned(settings_of(folder, end)).peak for end in (None, "full")]
        settings["plan_memory_gib"] = sum(ends) / 2 / GIB
    found = planned(settings)
    with tempfile.TemporaryDirectory() as output:
        records = trained(words_of({**settings, "output_dir": output}), output)[1:]
    return {
        "seconds": median(r["seconds"] for r in records),
        "memory_gb": max(r["peak_memory_gib"] for r in records) * GIB / 1e9,
        "planned_gb": found.peak / 1e9,
        "planned_tflop": found.flops_per_step / 1e12,
    }


def run_peft(folder: Path, side: str) -> dict[str, float]:
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).train()
    if side == PEFT_FULL:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model = get_peft_model(model, training.peft_config())
    seconds = training.seconds_of_steps(model, SAMPLES, STEPS)
    return {"seconds": seconds, "memory_gb": peak_memory_gb()}


def report(results: dict[str, dict[str, float]], rounds: int) -> None:
    table = [["computed again", "s a step", "time", "arithmetic", "peak GB", "planned", "GB saved"]]
    for side, n in results.items():
        base = results[NOTHING if side in GRANULARITIES else PEFT]
        is_ours = side in GRANULARITIES
        table.append([
            side,
            f"{n['seconds']:.2f}",
            f"{n['seconds'] / base['seconds'] - 1:+.0%}",
            f"{n['planned_tflop'] / base['planned_tflop'] - 1:+.0%}" if is_ours else "",
            f"{n['memory_gb']:.2f}",
            f"{n['planned_gb']:.2f}" if is_ours else "",
            f"{base['memory_gb'] - n['memory_gb']:.2f}",
        ])  # fmt: skip

    def costs(side: str, base: str) -> tuple[float, float]:
        more = results[side]["seconds"] / results[base]["seconds"] - 1
        return more, results[base]["memory_gb"] - results[side]["memory_gb"]

    (full, saved), (half, part), (theirs, their_saved) = (
        costs(*pair) for pair in ((FULL, NOTHING), (AUTO, NOTHING), (PEFT_FULL, PEFT))
    )
    reading = (
        f"Whole blocks computed again save {saved:.2f} GB for {full:.0%} more time, where "
        f"gradient checkpointing in peft saves {their_saved:.2f} GB for {theirs:.0%}; `auto`, "
        f"asked for half of it, saves {part:.2f} GB for {half:.0%}. With whole blocks a step is "
        f"{results[PEFT_FULL]['seconds'] / results[FULL]['seconds']:.2f}x as fast as peft's in "
        f"{results[FULL]['memory_gb'] / results[PEFT_FULL]['memory_gb']:.0%} of its memory."
    )
    write_record(
        "recompute", QUESTION, f"python benchmarks/recompute.py --rounds {rounds}",
        {"model": "ERNIE-4.5-0.3B shape, random weights", "row_tokens": ROW,
         "sample_tokens": training.ROW, "steps": STEPS, "lora_rank": training.LORA_RANK},
        {"sides": results}, table, reading,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--side")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.side:
        side = run_ours if args.side in GRANULARITIES else run_peft
        print(json.dumps(side(args.folder, args.side)))
        return
    with tempfile.TemporaryDirectory() as folder:
        training.prepare(Path(folder))
        report(take_turns(__file__, SIDES, args.rounds, ["--folder", folder]), args.rounds)


if __name__ == "__main__":
    main()
