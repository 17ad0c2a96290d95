"""Runs on pictures: cut into batches or not, resumed or not; who moves when what is frozen;
learning rates by part; batches dealt to ranks by their patches.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ernie
from ernie.adapter_files import PRODUCTS, read_adapter
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.settings import ConfigError, read_yaml
from erniekit.build import still
from erniekit.cli import main
from erniekit.config import run_from
from erniekit.optim import treatments
from erniekit.parallel.deal import deal
from tests.erniekit.conftest import write_lines
from tests.helpers_vision import png


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Twelve questions, of which every third has no picture."""
    folder = tmp_path_factory.mktemp("shapes")
    records: list[dict] = []
    for i in range(12):
        if i % 3 == 2:
            records.append({"src": [f"Say {i}."], "tgt": [f"It is {i}."]})
            continue
        (folder / f"{i}.png").write_bytes(png((20 * i, 90, 10), (60 + 20 * i, 80)))
        question = {"query": f"<image>What is {i}?", "response": "A colour."}
        records.append({**question, "images": [f"{i}.png"]})
    return write_lines(folder / "train.jsonl", records)


@pytest.fixture
def trained(tiny: Callable[[str], Path], shapes: Path, tmp_path: Path):
    """A function from settings to the output folder of a run."""

    def run(name: str, **more: object) -> Path:
        values = {
            "model_name_or_path": tiny("tiny-vl"), "stage": "VL-SFT", "train_dataset_path": shapes,
            "output_dir": tmp_path / name, "max_seq_len": 160, "max_steps": 4, "device": "cpu",
            "learning_rate": 1e-2, "fine_tuning": "Full", "max_pixels": 12544, "min_pixels": 784,
            "save_steps": 2, "amp_master_grad": True, "use_lowprecision_moment": False,
            "lr_scheduler_type": "constant", "disable_tqdm": True, "packing": False,
        } | more  # fmt: skip
        assert main(["train", *(f"{k}={v}" for k, v in values.items())]) == 0
        return tmp_path / name

    return run


LAST = "checkpoint-4"
CONFIGS = Path(__file__).parents[2] / "examples/configs/ERNIE-4.5-VL-28B-A3B/pt"
VISION = re.compile(r"^vision_model\.|resampler|vision_(experts|gate)|e_score_correction_bias")


def weights_of(folder: Path) -> dict[str, Tensor]:
    return dict(ernie.load(folder, dtype=torch.float32).named_parameters())


def steps_of(folder: Path) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "loss" in record]


def test_one_batch_of_four_rows_equals_four_of_one(trained) -> None:
    more = {"learning_rate": 1e-4, "moe_aux_loss_lambda": 0}
    one = steps_of(trained("one", batch_size=4, **more))
    four = steps_of(trained("four", gradient_accumulation_steps=4, **more))
    for key in ("loss", "grad_norm", "moe_max_over_mean", "moe_vision_max_over_mean"):
        for a, b in zip(one, four, strict=True):
            assert a[key] == pytest.approx(b[key], rel=2e-4), f"{key} of step {a['step']}"


@pytest.mark.parametrize("packing", [False, True])
def test_a_resumed_run_is_the_unbroken_one_to_the_bit(trained, packing: bool) -> None:
    more = {"packing": packing, "dataloader_num_workers": int(packing)}
    whole = weights_of(trained("whole", **more))
    trained("broken", stop_after_step=2, **more)
    broken = weights_of(trained("broken", **more))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


# Nothing looks at a picture's tokens behind the last block: its vision experts have no gradient.
PARTS = {
    "tower": "vision_model.", "resampler": "model.resampler_model.", "attention": ".self_attn.",
    "text experts": ".mlp.experts.", "vision experts": ".1.mlp.vision_experts.",
    "text router": ".mlp.gate.", "vision router": ".1.mlp.vision_gate.",
    "embedding": "embed_tokens", "bias": "e_score_correction_bias",
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "still_parts"),
    [
        ({}, set()),
        ({"freeze_config": "freeze_vision"}, {"tower"}),
        (
            {"freeze_config": "freeze_vision freeze_lm"},
            {"tower", "attention", "text experts", "text router", "embedding"},
        ),
        ({"freeze_parameters": "router"}, {"text router", "vision router", "bias"}),
    ],
)
def test_what_is_frozen_stays_and_all_else_moves(trained, tiny, settings, still_parts) -> None:
    before, after = weights_of(tiny("tiny-vl")), weights_of(trained("run", **settings) / LAST)
    for part, mark in PARTS.items():
        names = [name for name in before if mark in name]
        assert names, part
        moved = [name for name in names if not torch.equal(before[name], after[name])]
        if part in still_parts:
            assert not moved, f"{part}: {moved}"
        elif "freeze_lm" not in str(settings) or part != "bias":
            assert len(moved) == len(names), f"{part}: {set(names) - set(moved)}"


def test_pre_training_moves_the_vision_parts_alone_and_then_everything(trained, tiny) -> None:
    """By the words of the two example files. Vision experts of the last block never move."""
    files = [CONFIGS / "run_vision_8k.yaml", CONFIGS / "run_sft_8k.yaml"]
    words = [read_yaml(path).get("freeze_config", "") for path in files]
    folder = tiny("tiny-vl")
    for number, (frozen, seen) in enumerate(zip(words, (VISION, re.compile("")))):
        before = weights_of(folder)
        folder = trained(str(number), freeze_config=frozen, model_name_or_path=folder) / LAST
        after = weights_of(folder)
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        last = re.compile(r"layers\.2\.mlp\.vision_experts")
        assert moved == {n for n in before if seen.search(n) and not last.search(n)}, files[number]
        for layer in (1, 2):
            name = f"model.layers.{layer}.mlp.moe_statics.e_score_correction_bias"
            steps = [bool((after[name][b] - before[name][b]).any()) for b in (0, 1)]
            assert steps == ([False, True] if number == 0 else [True, True]), name


def test_an_adapter_has_pairs_beside_both_banks_and_goes_on(trained) -> None:
    options = {"fine_tuning": "LoRA", "lora_rank": 2, "lr_scheduler_type": "constant"}
    whole = trained("whole", **options)
    trained("broken", stop_after_step=2, **options)
    broken = trained("broken", **options)
    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (whole, broken))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for bank in ("experts", "vision_experts"):
        changed = [n for n, t in a.items() if f".mlp.{bank}." in n and "lora_B" in n and t.any()]
        assert changed, f"no pair of {bank} moved"
    served = read_adapter(whole, TINY["tiny-vl"], max_rank=2)
    assert {product for pairs in served.layers for product in pairs} == set(PRODUCTS)
    code = main(["export", f"{whole}/run.yaml"])
    assert code == 0
    merged = weights_of(whole / "export")
    assert all(torch.isfinite(weight).all() for weight in merged.values())


def test_records_tell_of_both_banks(trained) -> None:
    steps = steps_of(trained("run"))
    for key in ("moe_max_over_mean", "moe_vision_max_over_mean", "moe_vision_entropy"):
        assert any(record[key] > 0 for record in steps), key


def test_learning_rates_by_part() -> None:
    model = ErnieModel(TINY["tiny-vl"], device="meta")
    run = run_from({"vit_lr_ratio": 0.5, "visual_ld": 0.9, "moe_gate_lr_ratio": 0.01})
    found = treatments(
        dict(model.named_parameters()), run.optimisation, num_layers=3, num_tower_blocks=2
    )
    for name, factor in {
        "vision_model.ln.weight": 0.5,
        "vision_model.blocks.1.mlp.fc1.weight": 0.5 * 0.9,
        "vision_model.blocks.0.attn.qkv.bias": 0.5 * 0.9**2,
        "vision_model.patch_embed.proj.weight": 0.5 * 0.9**3,
        "model.resampler_model.mlp.weight": 1.0,
        "model.layers.1.mlp.gate.weight": 0.01,
        "model.layers.1.mlp.vision_gate.weight": 0.01,
        "model.layers.1.mlp.vision_experts.down_proj": 1.0,
    }.items():
        assert found[name].factor == pytest.approx(factor), name


def test_freezing_a_tower_that_is_not_there_is_refused() -> None:
    names = [name for name, _ in ErnieModel(TINY["tiny-moe"], device="meta").named_parameters()]
    with pytest.raises(ConfigError, match="multimodal models"):
        still(names, run_from({"freeze_config": "freeze_vision", "fine_tuning": "Full"}))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_dealt_batches_are_all_there_once_and_even(size: int) -> None:
    rng = np.random.default_rng(size)
    for count in (size, 4 * size, 4 * size + 1):
        costs = (rng.lognormal(0, 1.2, count) * 1000).astype(int).tolist()
        hands = deal(costs, size)
        assert sorted(n for hand in hands for n in hand) == list(range(count))
        lengths = sorted(map(len, hands))
        assert lengths[-1] - lengths[0] <= 1
        worst = max(sum(costs[n] for n in hand) for hand in hands)
        plain = max(sum(costs[r::size]) for r in range(size))
        assert worst <= plain, (worst, plain)
    assert deal([5] * 6, 3) == [[0, 3], [1, 4], [2, 5]]
    assert deal([0, 0, 0], 2) == [[0, 2], [1]]
