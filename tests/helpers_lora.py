"""Adapters made by the trainer's own functions, and the same adapters merged into their model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ernie.model import ErnieModel
from erniekit import lora, lora_files


def trained(model: ErnieModel, pair: lora.LoRA, seed: int) -> ErnieModel:
    """A copy of the model with pairs whose both halves are random, as after training."""
    wrapped = copy.deepcopy(model)
    lora.add_lora(wrapped, pair, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if name.endswith("lora_B"):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return wrapped


def save(wrapped: ErnieModel, pair: lora.LoRA, folder: Path) -> Path:
    """The adapter of a wrapped model, as the trainer writes it."""
    config = json.loads(lora_files.adapter_config(wrapped, pair, "a base"))
    return write(folder, lora_files.adapter_tensors(wrapped), config)


def write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merged(wrapped: ErnieModel) -> ErnieModel:
    plain = copy.deepcopy(wrapped)
    lora.merge_lora(plain)
    return plain
