"""Adapter folders: read whole, or refused with the name of what does not fit."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

import helpers_lora

from ernie.adapter_files import module_shapes, read_adapter
from ernie.checkpoint.folder import CheckpointError
from ernie.model import ErnieModel
from ernie.models import TINY
from ernie.settings import ConfigError
from erniekit import lora, lora_files

PAIR = lora.LoRA(4, 8.0)
MINIMAL = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
Edit = Callable[[dict[str, Tensor], dict[str, Any]], Any]
Saved = dict[str, tuple[dict[str, Tensor], dict[str, Any]]]


@pytest.fixture(scope="module")
def saved() -> Saved:
    """What the trainer writes for each tiny model: tensors and settings."""
    found = {}
    for name, config in TINY.items():
        model = ErnieModel(config, dtype=torch.float32)
        model.init_weights(seed=1)
        wrapped = helpers_lora.trained(model, PAIR, 1)
        settings = json.loads(lora_files.adapter_config(wrapped, PAIR, "a base"))
        found[name] = lora_files.adapter_tensors(wrapped), settings
    return found


def without(suffix: str) -> Edit:
    def edit(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith(suffix)]:
            del tensors[name]

    return edit


def with_tensor(name: str) -> Edit:
    return lambda tensors, _: tensors.update({name: torch.ones(4, 4)})


def with_setting(**values: Any) -> Edit:
    return lambda _, config: config.update(values)


def with_nan(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    name, tensor = next(iter(tensors.items()))
    tensors[name] = torch.full_like(tensor, float("nan"))


def turned(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    name = next(name for name in tensors if "o_proj.lora_A" in name)
    tensors[name] = tensors[name].T.contiguous()


def fewer_experts(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    name = next(name for name in tensors if "experts.gate_up_proj.lora_A" in name)
    tensors[name] = tensors[name][:-1]


PREFIX = "base_model.model.model.layers"
REFUSED: dict[str, tuple[str, Edit, str]] = {
    "half a pair": (
        "tiny-dense",
        without("1.self_attn.k_proj.lora_B.weight"),
        "lacks the other half.*lora_B",
    ),
    "a missing pair": (
        "tiny-dense",
        lambda t, c: [without(f"k_proj.lora_{side}.weight")(t, c) for side in "AB"],
        "names modules without tensors: model.layers.0.self_attn.k_proj",
    ),
    "a layer too many": (
        "tiny-dense",
        with_tensor(f"{PREFIX}.9.mlp.up_proj.lora_A.weight"),
        "layers.9.mlp",
    ),
    "the embedding": (
        "tiny-dense",
        with_tensor("base_model.model.model.embed_tokens.lora_embedding_A"),
        "belong to no projection of this model: .*embed_tokens",
    ),
    "the head": ("tiny-dense", with_tensor("base_model.model.lm_head.lora_A.weight"), "lm_head"),
    "one expert": (
        "tiny-moe",
        with_tensor(f"{PREFIX}.1.mlp.experts.3.up_proj.lora_A.weight"),
        "belong to no projection of this model: .*experts.3.up_proj",
    ),
    "a magnitude": (
        "tiny-dense",
        with_tensor(f"{PREFIX}.0.mlp.up_proj.lora_magnitude_vector"),
        "lora_magnitude_vector",
    ),
    "not a number": ("tiny-dense", with_nan, "no finite numbers"),
    "another rank": (
        "tiny-dense",
        with_setting(r=3),
        r"is \(4, 88\); this model and rank 3 want \(3, 88\)",
    ),
    "too large a rank": (
        "tiny-dense",
        with_setting(r=65),
        "rank 65; max_lora_rank=64 allows no more",
    ),
    "a turned tensor": ("tiny-dense", turned, "o_proj.lora_A"),
    "modules that are not named": (
        "tiny-dense",
        with_setting(target_modules=["q_proj", "k_proj"]),
        "does not name modules with tensors: model.layers.0.mlp.down_proj",
    ),
    "a name of nothing": (
        "tiny-dense",
        with_setting(target_modules=["q_proj", "qkv_proj"]),
        "names what matches no projection .*qkv_proj",
    ),
    "a pattern of less": (
        "tiny-dense",
        with_setting(target_modules=r".*q_proj"),
        "does not name modules",
    ),
    "a bad pattern": (
        "tiny-dense",
        with_setting(target_modules="("),
        "is not a regular expression",
    ),
    "layers left out": (
        "tiny-dense",
        with_setting(layers_to_transform=[0]),
        "does not name .*layers.1",
    ),
    "DoRA": ("tiny-dense", with_setting(use_dora=True), "use_dora=true"),
    "biases": ("tiny-dense", with_setting(bias="lora_only"), 'bias="lora_only"'),
    "biases of pairs": ("tiny-dense", with_setting(lora_bias=True), "lora_bias=true"),
    "trained modules": ("tiny-dense", with_setting(modules_to_save=["lm_head"]), "modules_to_save"),
    "trained tokens": (
        "tiny-dense",
        with_setting(trainable_token_indices=[3]),
        "trainable_token_indices",
    ),
    "parameters": (
        "tiny-dense",
        with_setting(target_parameters=["experts.down_proj"]),
        "target_parameters",
    ),
    "turned weights": ("tiny-dense", with_setting(fan_in_fan_out=True), "fan_in_fan_out"),
    "what is not known": ("tiny-dense", with_setting(use_newest_method=1), "use_newest_method=1"),
    "a moved base": ("tiny-dense", with_setting(init_lora_weights="pissa"), "init_lora_weights"),
    "another method": ("tiny-dense", with_setting(peft_type="LOHA"), "peft_type"),
    "no rank": ("tiny-dense", with_setting(r=0), "r=0 .*a positive integer"),
    "no scale": ("tiny-dense", with_setting(lora_alpha="8"), "lora_alpha=.*a finite number"),
    "no targets": ("tiny-dense", with_setting(target_modules=[]), "target_modules"),
    "a bad rank pattern": (
        "tiny-dense",
        with_setting(rank_pattern={"q_proj": "x"}),
        "rank_pattern",
    ),
    "half a pair of experts": (
        "tiny-moe",
        without("2.mlp.experts.down_proj.lora_A.weight"),
        "lacks the other half.*experts.down_proj.lora_A",
    ),
    "experts too few": ("tiny-moe", fewer_experts, r"is \(7, 4, 40\).* want \(8, 4, 40\)"),
    "a prediction block": (
        "tiny-moe",
        with_tensor("base_model.model.model.mtp.0.block.mlp.up_proj.lora_A.weight"),
        "belong to no projection of this model",
    ),
}


def test_how_a_pair_began_is_no_reason_to_refuse_it(saved: Saved, tmp_path: Path) -> None:
    """As PEFT writes it of EVA, which leaves the base as it was."""
    tensors, config = saved["tiny-dense"]
    begun = {"init_lora_weights": "eva", "eva_config": {"rho": 2.0, "tau": 0.99}}
    path = helpers_lora.write(tmp_path / "eva", tensors, config | begun)
    assert read_adapter(path, TINY["tiny-dense"], max_rank=64).rank


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_by_name(case: str, saved: Saved, tmp_path: Path) -> None:
    name, edit, message = REFUSED[case]
    tensors, config = dict(saved[name][0]), dict(saved[name][1])
    edit(tensors, config)
    path = helpers_lora.write(tmp_path / "wrong", tensors, config)
    with pytest.raises(ConfigError, match=message):
        read_adapter(path, TINY[name], max_rank=64)


@pytest.mark.parametrize("name", TINY)
def test_what_the_trainer_saves_is_read_whole(name: str, saved: Saved, tmp_path: Path) -> None:
    tensors, config = saved[name]
    adapter = read_adapter(
        helpers_lora.write(tmp_path / "a", tensors, config), TINY[name], max_rank=4
    )
    products = {"qkv", "out", "gate_up", "down"}
    banks = ("experts", "vision_experts")[: len(TINY[name].experts_per_bank)]
    experts = {f"{bank}.{product}" for bank in banks for product in ("gate_up", "down")}
    for layer, pairs in enumerate(adapter.layers):
        assert set(pairs) == products | (experts if TINY[name].is_moe_layer(layer) else set())
    assert adapter.rank == 4


def test_folders_without_an_adapter_are_refused(tmp_path: Path) -> None:
    config = TINY["tiny-dense"]
    with pytest.raises(ConfigError, match=r"holds no adapter_config\.json"):
        read_adapter(tmp_path, config, max_rank=8)
    (tmp_path / "adapter_config.json").write_text("[1")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_adapter(tmp_path, config, max_rank=8)
    (tmp_path / "adapter_config.json").write_text(json.dumps(MINIMAL))
    with pytest.raises(ConfigError, match=r"holds no adapter_model\.safetensors"):
        read_adapter(tmp_path, config, max_rank=8)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x09\0\0\0\0\0\0\0{}")
    with pytest.raises(CheckpointError, match="truncated"):
        read_adapter(tmp_path, config, max_rank=8)


def test_patterns_set_rank_and_scale_of_their_modules(tmp_path: Path) -> None:
    """Against B A by hand: two ranks, two scales, two modules of one fused product, one layer."""
    config = TINY["tiny-dense"]
    shapes = module_shapes(config)
    generator = torch.Generator().manual_seed(0)
    ranks, scales = {"q_proj": 3, "v_proj": 5}, {"q_proj": 6 / 3**0.5, "v_proj": 10 / 5**0.5}
    tensors, deltas = {}, {}
    for name, rank in ranks.items():
        module = f"model.layers.1.self_attn.{name}"
        out_size, in_size = shapes[module]
        a, b = (torch.randn(s, generator=generator) for s in ((rank, in_size), (out_size, rank)))
        tensors |= {f"base_model.model.{module}.lora_{side}.weight": t for side, t in
                    (("A", a), ("B", b))}  # fmt: skip
        deltas[name] = scales[name] * b @ a
    settings = {"peft_type": "LORA", "r": 5, "lora_alpha": 10, "use_rslora": True}
    settings |= {"target_modules": ["q_proj", "self_attn.v_proj"], "layers_to_transform": [1]}
    settings |= {"rank_pattern": {r"self_attn\.q_proj": 3}, "alpha_pattern": {"q_proj": 6}}
    path = helpers_lora.write(tmp_path / "one", tensors, settings)
    adapter = read_adapter(path, config, max_rank=8)
    assert [set(pairs) for pairs in adapter.layers] == [set(), {"qkv"}, set()]
    pair = adapter.layers[1]["qkv"]
    middle = torch.zeros(shapes["model.layers.1.self_attn.k_proj"])
    wanted = torch.cat((deltas["q_proj"], middle, deltas["v_proj"]))
    assert float((pair.b_OR @ pair.a_RI - wanted).abs().max()) < 1e-4
    assert adapter.rank == 5
