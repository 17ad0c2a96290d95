"""How fast is a step of stage VL-SFT on this CPU, and in how much memory, beside transformers?

    python benchmarks/vl_training.py [--rounds 3]

A multimodal mixture of experts of CONFIG with random weights, the same for all. A step is two
records of equal length: a picture of 448 x 448 pixels (1,024 patches, 256 tokens), a question and a
long answer; all parts are trained, the tower too, with one AdamW update. Ours is the real command
(`erniekit train`): pictures are read from files, gradients are clipped, metrics written. The
peer is the plainest loop around transformers on the same tokens and pixels, read before: float32,
no padding, experts of either of its two kinds. All begin with the same loss, or nothing is written.

"ours, float32 state" keeps sums of gradients and moments in float32 as the peer does; "ours" is the
default for a CPU, where both are bfloat16; "ours, recomputed" forgets activations too; "ours, LoRA"
trains adapters beside frozen weights, without a peer. Beside the memory of each of ours stands what
`erniekit plan` says of the settings, for rows that are all text or all images; here they are half
of each.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from harness import ROOT, machine, peak_memory_gb, take_turns, trained, words_of, write_record

from ernie.config import ErnieConfig
from ernie.vision.config import VisionConfig

sys.path.insert(0, str(ROOT / "examples"))  # for tiny_model

QUESTION = " ".join(__doc__.split("\n\n")[0].split())
ROWS, STEPS, SIDE, ANSWER = 2, 4, 448, 250
CONFIG = ErnieConfig(
    hidden_size=384, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
    head_dim=64, intermediate_size=1024, max_position_embeddings=2048,
    moe_num_experts=(8, 8), moe_k=2, moe_intermediate_size=(384, 128), moe_num_shared_experts=1,
    moe_layer_start_index=(1, 1), moe_layer_end_index=(3, 3),
    rope_3d=True, freq_allocation=10,
    vision_config=VisionConfig(depth=6, embed_dim=256, mlp_ratio=4, num_heads=4),
)  # fmt: skip
OURS, OURS_FLOAT = "ours", "ours, float32 state"
OURS_AGAIN, OURS_LORA = "ours, recomputed", "ours, LoRA"
SETTINGS: dict[str, dict[str, object]] = {
    OURS: {},
    OURS_FLOAT: {"amp_master_grad": "true", "use_lowprecision_moment": "false"},
    OURS_AGAIN: {"recompute": "true"},
    OURS_LORA: {"fine_tuning": "LoRA", "lora_rank": 16},
}
PEERS = {"transformers": None, "transformers, eager experts": "eager"}
SIDES = (OURS, "transformers", OURS_FLOAT, "transformers, eager experts", OURS_AGAIN, OURS_LORA)


def prepare(folder: Path) -> None:
    """The model in both layouts, and records of one length with their pictures."""
    import numpy as np
    import torch
    from PIL import Image
    from tiny_model import save_new, train_tokenizer

    import ernie

    lines = (ROOT / "examples/data/sft-train.jsonl").read_text().splitlines()
    texts = [text for line in lines for part in json.loads(line).values() for text in part]
    (folder / "model").mkdir()
    train_tokenizer(folder / "model", texts, vocab_size=4000, has_vision=True)
    save_new(folder / "model", CONFIG, seed=0)
    model = ernie.load(folder / "model", dtype=torch.float32)
    ernie.save(model, folder / "theirs", layout="transformers")
    tokenizer = model.tokenizer
    assert tokenizer is not None
    ids, rng = tokenizer.encode(" ".join(texts)), random.Random(0)
    records: dict[int, list[str]] = {}
    for number in range(12 * ROWS * STEPS):
        start = rng.randrange(len(ids) - ANSWER)
        answer = tokenizer.decode(ids[start : start + ANSWER])
        record = {"query": "<image>Go on.", "response": answer, "images": [f"{number}.png"]}
        records.setdefault(len(tokenizer.encode(answer)), []).append(json.dumps(record))
    alike = max(records.values(), key=len)[: ROWS * STEPS]
    assert len(alike) == ROWS * STEPS, f"{len(alike)} answers of one length"
    for line in alike:
        pixels = np.random.default_rng(len(line)).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
        Image.fromarray(pixels).save(folder / json.loads(line)["images"][0])
    (folder / "train.jsonl").write_text("\n".join(alike))
    (folder / "row").write_text("2048")
    row = batches(folder)[0]["input_ids"].shape[1]
    (folder / "row").write_text(str(row + 1))  # with the end, which is only a label


def settings(folder: Path, output: str) -> dict[str, object]:
    return {
        "model_name_or_path": folder / "model",
        "stage": "VL-SFT",
        "fine_tuning": "Full",
        "train_dataset_path": folder / "train.jsonl",
        "output_dir": output,
        "max_seq_len": (folder / "row").read_text(),
        "packing": "false",
        "batch_size": ROWS,
        "max_steps": STEPS,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "moe_aux_loss_lambda": 0,
        "moe_use_aux_free_update_coef": 0,
        "save_strategy": "no",
        "do_eval": "false",
    }


def run_ours(folder: Path, side: str) -> dict[str, float]:
    from erniekit.config import resolved, run_from
    from erniekit.plan import plan

    with tempfile.TemporaryDirectory() as output:
        words = settings(folder, output) | SETTINGS[side]
        run = resolved(run_from({key: str(value) for key, value in words.items()}), "cpu")
        records = [r for r in trained(words_of(words), output) if "loss" in r]
    return {
        "step_s": median(r["seconds"] for r in records[1:]),
        "tokens": median(r["num_tokens"] for r in records),
        "memory_gb": peak_memory_gb(),
        "loss": records[0]["loss"],
        "planned_gb": plan(run, "cpu").peak / 1e9,
    }


def batches(folder: Path) -> list[dict[str, Any]]:
    """The batches that `erniekit train` makes, as transformers takes them."""
    import torch

    from ernie.vision.vit import normalised
    from erniekit.config import run_from
    from erniekit.data.stream import stream

    words = {key: str(value) for key, value in settings(folder, "unused").items()}
    found, rows = [], stream(run_from(words), "train").batches(ROWS)
    for _ in range(STEPS):
        batch = next(rows)
        pictures = batch.pictures
        assert pictures is not None
        ids_T, labels_T, kinds_T = map(
            torch.from_numpy, (batch.token_ids_T, batch.labels_T, pictures.modality_T)
        )
        is_place_T = torch.zeros_like(ids_T)
        is_place_T[torch.from_numpy(pictures.places_L)] = 1
        found.append({
            "input_ids": ids_T.view(ROWS, -1), "labels": labels_T,
            "mm_token_type_ids": is_place_T.view(ROWS, -1),
            "moe_mm_token_type_ids": kinds_T.view(ROWS, -1),
            "pixel_values": normalised(torch.from_numpy(pictures.pixel_values_PC)),
            "image_grid_thw": torch.tensor(pictures.grids),
        })  # fmt: skip
    return found


def run_transformers(folder: Path, side: str) -> dict[str, float]:
    import torch
    from transformers import Ernie4_5_VLMoeForConditionalGeneration

    model = Ernie4_5_VLMoeForConditionalGeneration.from_pretrained(
        folder / "theirs", dtype=torch.float32
    ).train()
    if PEERS[side]:
        model.set_experts_implementation(PEERS[side])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    seconds, losses, inputs = [], [], batches(folder)
    for one in inputs:
        labels_T = one.pop("labels")
        start = time.perf_counter()
        logits = model(**one).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, labels_T, ignore_index=-100)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    return {
        "step_s": median(seconds[1:]),
        "tokens": inputs[0]["input_ids"].numel(),
        "memory_gb": peak_memory_gb(),
        "loss": losses[0],
    }


def report(results: dict[str, dict[str, float]], rounds: int) -> None:
    losses = [n["loss"] for side, n in results.items() if side != OURS_LORA]  # bfloat16 weights
    if max(losses) - min(losses) > 1e-3:
        raise SystemExit(f"the sides do not train the same: first losses {losses}")
    peer = min(PEERS, key=lambda side: results[side]["step_s"])
    table = [["side", "s a step", "peak memory GB", "planned GB", "times as fast", "of the memory"]]
    ratios = {}
    for side, n in results.items():
        speed = results[peer]["step_s"] / n["step_s"]
        memory = n["memory_gb"] / results[peer]["memory_gb"]
        ratios[side] = {"speed": speed, "memory": memory}
        planned = f"{n['planned_gb']:.2f}" if "planned_gb" in n else ""
        numbers = f"{n['step_s']:.2f}", f"{n['memory_gb']:.2f}", planned, f"{speed:.2f}"
        table.append([side, *numbers, f"{memory:.0%}"])
    errors = {
        side: n["planned_gb"] / n["memory_gb"] - 1
        for side, n in results.items()
        if "planned_gb" in n
    }
    reading = (
        f"A step is {ratios[OURS]['speed']:.2f}x as fast as that of {peer}, the faster of its two "
        f"kinds, in {ratios[OURS]['memory']:.0%} of its memory; with float32 state "
        f"{ratios[OURS_FLOAT]['speed']:.2f}x in {ratios[OURS_FLOAT]['memory']:.0%}, recomputed "
        f"{ratios[OURS_AGAIN]['speed']:.2f}x in {ratios[OURS_AGAIN]['memory']:.0%}. The "
        "plan, which is for the larger of rows that are all text and rows that are all images, is "
        f"off by {errors[OURS]:+.0%} for ours, whose rows are half of each, and by "
        f"{errors[OURS_LORA]:+.0%} for LoRA, which keeps nothing of the tower."
    )
    write_record(
        "vl_training", QUESTION, f"python benchmarks/vl_training.py --rounds {rounds}",
        {"parameters": CONFIG.num_params(), "rows": ROWS, "tokens": results[OURS]["tokens"],
         "patches": ROWS * (SIDE // 14) ** 2, "steps": STEPS},
        {"sides": results, "ratios": ratios, "plan_errors": errors}, table, reading,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    if args.side:
        run = run_transformers if args.side in PEERS else run_ours
        print(json.dumps(run(args.folder, args.side)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        machine()
        report(take_turns(__file__, SIDES, args.rounds, ["--folder", folder]), args.rounds)


if __name__ == "__main__":
    main()
