"""How fast do vision tower and resampler read pictures on this CPU, beside transformers?

    python benchmarks/vision.py [--rounds 2]

The tower of ERNIE-4.5-VL-28B-A3B with 8 of its 32 layers (they are alike), and the resampler; the
same random weights, normalised patches, all cores, nothing kept for gradients. Patches per second
of

    image    one of 448 x 448 pixels: 1,024 patches that see one another
    video    8 frames of 224 x 224 pixels: 2,048 patches, 256 of which see one another

Ceiling: the products of the network at the float32 peak.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from harness import peak_memory_gb, seconds_of, take_turns, write_record

QUESTION = __doc__.splitlines()[0]
DEPTH = 8
PICTURES = {"image": [(1, 32, 32)], "video": [(8, 16, 16)]}
PEERS = {"transformers float32": "float32", "transformers bfloat16": "bfloat16"}
OURS = "ours, bfloat16 weights"


def small_config() -> Any:
    """A multimodal network with the released tower, cut to DEPTH, and a tiny language model."""
    from ernie.models import MODELS, TINY

    released = MODELS["ERNIE-4.5-VL-28B-A3B"].config
    assert released.vision_config is not None
    vision = replace(released.vision_config, depth=DEPTH)
    return replace(TINY["tiny-vl"], hidden_size=released.hidden_size, vision_config=vision)


def make_model(folder: Path) -> None:
    """A folder that both sides read."""
    import ernie

    model = ernie.ErnieModel(small_config())
    model.init_weights(seed=0)
    ernie.save(model, folder, "transformers")


def run_ours(folder: str) -> dict[str, float]:
    import ernie

    model = ernie.load(folder)
    return measure(lambda patches, grids: model.picture_rows(patches, grids))


def run_transformers(folder: str, dtype: str) -> dict[str, float]:
    import torch
    from transformers import Ernie4_5_VLMoeForConditionalGeneration as Peer

    model = Peer.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().model

    def rows(patches, grids):
        grid_thw = torch.tensor(grids)
        seen = model.vision_tower(patches, grid_thw).last_hidden_state
        return model.resampler_model(seen, grid_thw)

    return measure(rows)


def measure(rows) -> dict[str, float]:
    """Patches per second of each kind of picture, by a function of patches and grids."""
    import torch

    from ernie.vision.grids import frame_lengths

    numbers = {}
    with torch.inference_mode():
        for name, grids in PICTURES.items():
            patches = torch.randn(sum(frame_lengths(grids)), 588)
            rows(patches, grids)  # warm-up: kernels compiled, memory touched
            times = [seconds_of(lambda p=patches, g=grids: rows(p, g)) for _ in range(3)]
            numbers[name] = len(patches) / median(times)
    return {**numbers, "memory_gb": peak_memory_gb()}


def flop(name: str) -> float:
    """Operations of one picture: a product is two for each weight and row."""
    from ernie.vision.grids import frame_lengths

    config, frames = small_config(), frame_lengths(PICTURES[name])
    tower, num_patches = config.vision_config, sum(frames)
    wide = 4 * tower.embed_dim
    windows, rows = num_patches // 4, num_patches // (4 if len(frames) == 1 else 8)
    scores = 4 * DEPTH * tower.embed_dim * sum(n * n for n in frames)
    resampler = windows * 2 * wide * wide + rows * (3 * wide * wide + wide * config.hidden_size)
    return 2.0 * (num_patches * tower.num_params + resampler) + scores


def report(results: dict[str, dict[str, float]]) -> None:
    from harness import machine

    from ernie.vision.grids import frame_lengths

    here, ours = machine(), results[OURS]
    ratios = {k: ours[k] / results["transformers float32"][k] for k in PICTURES}
    best = {k: ours[k] / max(results[peer][k] for peer in PEERS) for k in PICTURES}
    shares = {
        k: ours[k] / sum(frame_lengths(PICTURES[k])) * flop(k) / (here["float32_gflop_per_s"] * 1e9)
        for k in PICTURES
    }
    table = [["side", *(f"{k} patches/s" for k in PICTURES), "peak memory GB"]]
    for side, n in results.items():
        table.append([side, *(f"{n[k]:.0f}" for k in PICTURES), f"{n['memory_gb']:.2f}"])
    for words, found in (("float32", ratios), ("best", best)):
        table.append([f"ours / {words} transformers", *(f"{r:.2f}x" for r in found.values()), ""])
    table.append(["ours, share of float32 peak", *(f"{s:.0%}" for s in shares.values()), ""])
    reading = (
        f"Ours reads pictures {ratios['image']:.2f}x (image) and {ratios['video']:.2f}x (video) as "
        f"fast as transformers in float32, {best['image']:.2f}x and {best['video']:.2f}x as fast "
        "as the better of its two dtypes."
    )
    write_record(
        "vision", QUESTION, "python benchmarks/vision.py",
        {"layers": DEPTH, "pictures": PICTURES},
        {"sides": results, "ratios": ratios, "shares": shares}, table, reading,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=QUESTION)
    parser.add_argument("--rounds", type=int, default=2)
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
