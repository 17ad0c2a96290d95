"""Does training here lower the loss step by step as transformers, peft and torch do?

    python benchmarks/loss_curves.py

A small network of random weights is trained for thirty steps on the example data: supervised, with
adapters and on preferences. Ours is the real command. The peer is the plainest loop around
transformers, peft and torch's AdamW, all in float32: it gets the tokens and labels of the same
steps, but takes every dialogue by itself, where ours packs them into rows. Both begin with the same
weights and adapters.

With float32 sums of gradients and float32 moments nothing but the order of additions differs; the
defaults of a CPU round both to bfloat16, and "lean" the moments to 8 bits. "FP8" rounds what the
products of the blocks multiply, on both ways. A gap is a share of the first loss.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from harness import ROOT, machine, runs_in_turn, smollm2_gguf, trained, write_record

QUESTION = " ".join(__doc__.split("\n\n")[0].split())
STEPS, ROWS, ROW, RANK = 30, 2, 256, 8
FULL: dict[str, object] = {"fine_tuning": "Full", "learning_rate": 5e-4}
LORA: dict[str, object] = {"fine_tuning": "LoRA", "lora_rank": RANK, "learning_rate": 5e-3}
EXACT = {"amp_master_grad": "true", "use_lowprecision_moment": "false"}
LEAN = {
    "optim": "adamw_8bit",
    "optimizer_in_backward": "true",
    "max_grad_norm": 0,
    "recompute": "true",
}
FP8 = {"compute_type": "fp8", "quant_input_grad": "true"}
DPO = {"stage": "DPO", "packing": "false", "normalize_logps": "false"}
# name: settings of ours, and the peer that it is held against.
CASES: dict[str, tuple[dict[str, object], str]] = {
    "full, float32 sums and moments": (FULL | EXACT, "peer, full"),
    "full": (FULL, "peer, full"),
    "full, lean": (FULL | LEAN, "peer, full, no clipping"),
    "full, FP8": (FULL | FP8, "peer, full"),
    "LoRA": (LORA, "peer, LoRA"),
    "DPO, full, float32 sums and moments": (FULL | DPO | EXACT, "peer, DPO, full"),
    "DPO, LoRA": (LORA | DPO, "peer, DPO, LoRA"),
}
PEERS = {peer: settings for settings, peer in reversed(CASES.values())}


def prepare(folder: Path) -> None:
    """A network of 29 million random weights with SmolLM2's tokenizer."""
    from dataclasses import replace

    import ernie
    from ernie.checkpoint.gguf import import_gguf
    from ernie.models import MODELS
    from ernie.tokenizer import Tokenizer

    import_gguf(smollm2_gguf(), folder / "smollm2")
    tokenizer = Tokenizer.from_folder(folder / "smollm2")
    config = replace(
        MODELS["ERNIE-4.5-0.3B"].config, vocab_size=tokenizer.vocab_size, hidden_size=256,
        intermediate_size=768, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2,
        head_dim=32,
    )  # fmt: skip
    model = ernie.ErnieModel(config)
    model.init_weights(seed=0)
    model.tokenizer = tokenizer
    ernie.save(model, folder / "model")


def words_of(folder: Path, settings: dict[str, object], output: str = "unused") -> list[str]:
    kind = "dpo" if "stage" in settings else "sft"
    values = {
        "model_name_or_path": folder / "model",
        "train_dataset_path": ROOT / f"examples/data/{kind}-train.jsonl",
        "output_dir": output,
        "max_seq_len": ROW,
        "batch_size": ROWS,
        "max_steps": STEPS,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        "save_strategy": "no",
        "do_eval": "false",
        **settings,
    }
    return [f"{key}={value}" for key, value in values.items()]


def numbered(losses: list[float]) -> dict[str, float]:
    return {f"{step:02d}": loss for step, loss in enumerate(losses, 1)}


def run_ours(folder: Path, settings: dict[str, object]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as output:
        records = trained(words_of(folder, settings, output), output)
    return numbered([record["loss"] for record in records])


# --- the peer ---


def run_peer(folder: Path, settings: dict[str, object]) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    from erniekit.config import read_run, resolved
    from erniekit.data.stream import stream

    run = resolved(read_run(words_of(folder, settings)), "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).train()
    reference = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    if run.is_lora:
        model = with_adapters(model, run)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if p.dim() > 1],
            "weight_decay": run.optimisation.weight_decay,
        },
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.optimisation.learning_rate)
    losses = []
    for batch in islice(stream(run, "train").batches(ROWS), STEPS):
        if batch.pairs_P4 is None:
            loss = supervised(model, batch)
        else:
            loss = preferred(model, reference, batch, run.preferences.beta)
        loss.backward()
        if run.optimisation.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, run.optimisation.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return numbered(losses)


def with_adapters(model: Any, run: Any) -> Any:
    """The model with adapters by peft that begin with the values of ours."""
    import torch
    from peft import LoraConfig, get_peft_model

    from erniekit.build import build_model

    ours = {n: p for n, p in build_model(run, "cpu").named_parameters() if "lora_" in n}
    projections = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    config = LoraConfig(r=RANK, lora_alpha=run.model.lora_alpha, target_modules=projections)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            own = name.removeprefix("base_model.model.").removesuffix(".default.weight")
            with torch.no_grad():
                parameter.copy_(ours.pop(own))
    assert not ours, f"peft has no {min(ours)}"
    return model


def log_probs(model: Any, token_ids: Any, labels: Any) -> Any:
    """Of the labels of a sequence by itself, `(labelled,)`."""
    import torch

    ids, targets = torch.as_tensor(token_ids), torch.as_tensor(labels)
    found = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
    kept = (targets >= 0).nonzero()[:, 0]
    return found[kept, targets[kept]]


def supervised(model: Any, batch: Any) -> Any:
    bounds = batch.cu_seqlens_S1.tolist()
    sums = [
        -log_probs(model, batch.token_ids_T[a:b], batch.labels_T[a:b]).sum()
        for a, b in pairwise(bounds)
    ]
    return sum(sums) / batch.num_trained


def preferred(model: Any, reference: Any, batch: Any, beta: float) -> Any:
    """Direct preference optimisation. Source: Rafailov et al., arXiv:2305.18290, equation 7."""
    import numpy as np
    import torch

    losses = []
    for start, chosen, rejected, end in batch.pairs_P4.tolist():
        gains = []
        for a, b in ((chosen, rejected), (rejected, end)):
            place = np.r_[start:chosen, a:b]
            words = batch.token_ids_T[place], batch.labels_T[place]
            with torch.no_grad():
                before = log_probs(reference, *words).sum()
            gains.append(log_probs(model, *words).sum() - before)
        losses.append(-torch.nn.functional.logsigmoid(beta * (gains[0] - gains[1])))
    return torch.stack(losses).mean()


# --- the record ---


def report(results: dict[str, dict[str, float]]) -> None:
    table = [["training", "first loss", "last, ours", "last, peer", "largest gap", "mean gap"]]
    shown = ["training", *(f"step {step}" for step in (1, 5, 10, 15, 20, 25, 30))]
    details, worst = [shown], {}
    for name, (_, peer) in CASES.items():
        steps = [f"{step:02d}" for step in range(1, STEPS + 1)]
        ours, theirs = ([results[side][step] for step in steps] for side in (name, peer))
        gaps = [(a - b) / theirs[0] for a, b in zip(ours, theirs)]
        worst[name] = max(map(abs, gaps))
        ends = f"{theirs[0]:.4f}", f"{ours[-1]:.4f}", f"{theirs[-1]:.4f}"
        table.append([name, *ends, f"{worst[name]:.1e}", f"{sum(gaps) / len(gaps):+.1e}"])
        for side, losses in ((name, ours), (peer, theirs)):
            details.append([side, *(f"{losses[int(at.split()[1]) - 1]:.4f}" for at in shown[1:])])
    exact = max(gap for name, gap in worst.items() if "float32" in name or "LoRA" in name)
    reading = (
        f"Over {STEPS} steps the losses of float32 and of adapters are those of the peer within "
        f"{exact:.1e} of the first loss; full training with bfloat16 sums and moments is off by "
        f"{worst['full']:.1e} at most, with 8-bit moments by {worst['full, lean']:.1e}, with "
        f"products in FP8 by {worst['full, FP8']:.1e}."
    )
    write_record(
        "loss_curves", QUESTION, "python benchmarks/loss_curves.py",
        {"network": "4 layers of 256, vocabulary of 49152", "steps": STEPS, "rows": ROWS,
         "row_tokens": ROW, "lora_rank": RANK},
        {"losses": results, "largest_gap": worst}, table, reading, details,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--side")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.side:
        if args.side in PEERS:
            losses = run_peer(args.folder, PEERS[args.side])
        else:
            losses = run_ours(args.folder, CASES[args.side][0])
        print(json.dumps(losses))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        machine()
        runs = runs_in_turn(__file__, [*CASES, *PEERS], 1, ["--folder", folder])
        report({name: found[0] for name, found in runs.items()})


if __name__ == "__main__":
    main()
