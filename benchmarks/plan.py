"""How near is the memory that `erniekit plan` predicts to what training then takes?

    python benchmarks/plan.py

Twenty short runs of the real command, each a process of its own: networks of random weights with
the sizes of ERNIE-4.5-0.3B in fewer layers and a small mixture of experts, full and LoRA, and every
setting that the plan says changes memory. The measure is the largest resident memory of the
process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median

from harness import machine, runs_in_turn, smollm2_gguf, trained, words_of, write_record

QUESTION = " ".join(__doc__.split("\n\n")[0].split())
STEPS, ROW = 2, 1024
FULL = {"fine_tuning": "Full"}
LORA = {"fine_tuning": "LoRA", "lora_rank": 16}
AGAIN = {"recompute": "true"}
AUTO = AGAIN | {"recompute_granularity": "auto"}
UPO = {
    "stage": "UPO", "reward": "exact", "prompts_per_round": 4, "num_generations": 8,
    "max_completion_length": 64, "dynamic_sampling": "false", "num_mini_batches": 2,
}  # fmt: skip
FP8 = {"compute_type": "fp8", "quant_input_grad": "true"}

# name: layers of which network, and what differs from a row of 1024 tokens a step.
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "full, 4 layers": ("dense4", FULL),
    "full, 8 layers": ("dense8", FULL),
    "full, float32 moments": ("dense4", FULL | {"use_lowprecision_moment": "false"}),
    "full, float32 sums": ("dense4", FULL | {"amp_master_grad": "true"}),
    "full, 2 rows": ("dense4", FULL | {"batch_size": 2}),
    "full, 2 x 1 row": ("dense4", FULL | {"gradient_accumulation_steps": 2}),
    "full, row of 512": ("dense8", FULL | {"max_seq_len": 512}),
    "full, row of 2048": ("dense4", FULL | {"max_seq_len": 2048}),
    "full, recompute full": ("dense8", FULL | AGAIN),
    "full, recompute mlp": ("dense8", FULL | AGAIN | {"recompute_granularity": "mlp"}),
    "full, recompute full_attn": ("dense8", FULL | AGAIN | {"recompute_granularity": "full_attn"}),
    "full, recompute auto": ("dense8", FULL | AUTO | {"plan_memory_gib": 2.78}),
    "full, loss by 512": ("dense4", FULL | {"loss_subbatch_seqlen": 512}),
    "full, FP8": ("dense4", FULL | FP8),
    "LoRA, 8 layers": ("dense8", LORA),
    "LoRA, 2 rows": ("dense8", LORA | {"batch_size": 2}),
    "LoRA, 2 rows, recompute": ("dense8", LORA | AGAIN | {"batch_size": 2}),
    "LoRA, 2 rows, recompute auto": (
        "dense8",
        LORA | AUTO | {"batch_size": 2, "plan_memory_gib": 1.4},
    ),
    "LoRA, rank 64, row of 2048": ("dense8", LORA | {"lora_rank": 64, "max_seq_len": 2048}),
    "LoRA, loss by 1024": ("dense8", LORA | {"loss_subbatch_seqlen": 1024}),
    "UPO, full": ("dense4", FULL | UPO),
    "UPO, LoRA": ("dense4", LORA | UPO),
    "MoE, full": ("moe3", FULL),
    "MoE, full, recompute": ("moe3", FULL | AGAIN),
    "MoE, full, FP8": ("moe3", FULL | FP8),
    "MoE, LoRA, 2 rows": ("moe3", LORA | {"batch_size": 2}),
}


def prepare(folder: Path) -> None:
    """The networks with SmolLM2's tokenizer, which fits their vocabulary, and long dialogues."""
    import ernie
    from ernie.checkpoint.gguf import import_gguf
    from ernie.models import MODELS
    from ernie.tokenizer import Tokenizer

    import_gguf(smollm2_gguf(), folder / "smollm2")
    tokenizer = Tokenizer.from_folder(folder / "smollm2")
    small = MODELS["ERNIE-4.5-0.3B"].config
    moe = replace(
        small, num_hidden_layers=3, moe_num_experts=8, moe_k=2, moe_intermediate_size=1024,
        moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=2,
    )  # fmt: skip
    configs = {f"dense{n}": replace(small, num_hidden_layers=n) for n in (4, 8)} | {"moe3": moe}
    for name, config in configs.items():
        model = ernie.ErnieModel(config)
        model.init_weights(seed=0)
        model.tokenizer = tokenizer
        ernie.save(model, folder / name)
    words = " ".join(f"{i} times {j} is {i * j}." for i in range(60) for j in range(60))
    ids = tokenizer.encode(words)
    for row in (512, 1024, 2048):
        size = row - 40  # room for the template around question and answer
        pieces = [tokenizer.decode(ids[i : i + size]) for i in range(0, 12 * size, size)]
        lines = [json.dumps({"src": ["Go on."], "tgt": [piece]}) for piece in pieces]
        (folder / f"train{row}.jsonl").write_text("\n".join(lines))
    size = ROW - UPO["max_completion_length"] - 40
    pieces = [tokenizer.decode(ids[i : i + size]) for i in range(0, 12 * size, size)]
    lines = [json.dumps({"src": [piece], "tgt": ["Done."]}) for piece in pieces]
    (folder / f"UPO{ROW}.jsonl").write_text("\n".join(lines))


def run_case(folder: Path, name: str) -> dict[str, float]:
    from erniekit.config import resolved, run_from
    from erniekit.fit import fitted
    from erniekit.plan import GIB, Degrees, plan

    network, changes = CASES[name]
    row = changes.get("max_seq_len", ROW)
    settings = {
        "model_name_or_path": folder / network,
        "train_dataset_path": folder / f"{changes.get('stage', 'train')}{row}.jsonl",
        "max_seq_len": row,
        "max_steps": STEPS,
        "save_strategy": "no",
        "do_eval": "false",
    } | changes
    with tempfile.TemporaryDirectory() as output:
        records = trained(words_of({**settings, "output_dir": output}), output)
    run = resolved(run_from({k: str(v) for k, v in settings.items()}), "cpu")
    found = plan(fitted(run, "cpu", Degrees()), "cpu")
    measured = max(r["peak_memory_gib"] for r in records)
    return {
        "measured_gib": measured,
        "planned_gib": found.peak / GIB,
        "process_gib": found.parts["process"] / GIB,
        "error": found.peak / GIB / measured - 1,
        "seconds": min(r["seconds"] for r in records),
        "tflop": found.flops_per_step / 1e12,
        "full": records[-1]["num_tokens"] / found.tokens_per_step,
    }


def report(results: dict[str, dict[str, float]]) -> None:
    table = [["run", "measured GiB", "planned GiB", "error"]]
    for name, n in results.items():
        gib = f"{n['measured_gib']:.2f}", f"{n['planned_gib']:.2f}"
        table.append([name, *gib, f"{n['error']:+.1%}"])
    errors = [abs(n["error"]) for n in results.values()]
    base = median(n["process_gib"] for n in results.values())
    reading = (
        f"Over {len(errors)} runs the plan is off by {max(errors):.1%} at most and by "
        f"{median(errors):.1%} in the median; {base:.2f} GiB of each is the process itself."
    )
    write_record(
        "plan", QUESTION, "python benchmarks/plan.py",
        {"row_tokens": ROW, "steps": STEPS, "networks": "0.3B shape in 4 and 8 layers; 3 layers of "
         "8 experts"},
        {"runs": results, "max_error": max(errors), "median_error": median(errors)},
        table, reading,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--side")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(run_case(args.folder, args.side)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        machine()
        runs = runs_in_turn(__file__, list(CASES), 1, ["--folder", folder])
        report({name: found[0] for name, found in runs.items()})


if __name__ == "__main__":
    main()
