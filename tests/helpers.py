"""Tiny random models of transformers, the oracle of many tests, and folders with them.

Norms, biases and correction biases are random too, so that a mixed-up one shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    Ernie4_5Config,
    Ernie4_5ForCausalLM,
    PreTrainedModel,
)

DENSE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 88,
    "vocab_size": 199,
    "max_position_embeddings": 512,
}
MOE = {
    "hidden_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "intermediate_size": 72,
    "vocab_size": 211,
    "max_position_embeddings": 512,
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_intermediate_size": 24,
    "moe_num_shared_experts": 2,
    "moe_layer_start_index": 1,
}


def hf_dense(seed: int = 0, **sizes: Any) -> Ernie4_5ForCausalLM:
    """A random dense model in float32; `sizes` override `DENSE`."""
    torch.manual_seed(seed)
    return _randomised(Ernie4_5ForCausalLM(Ernie4_5Config(**{**DENSE, **sizes})))


def hf_moe(seed: int = 0, **sizes: Any) -> Ernie4_5_MoeForCausalLM:
    """A random mixture-of-experts model in float32; `sizes` override `MOE`."""
    torch.manual_seed(seed)
    return _randomised(Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**{**MOE, **sizes})))


@torch.no_grad()
def _randomised(model: PreTrainedModel) -> Any:
    for name, parameter in model.named_parameters():
        if "e_score_correction_bias" in name:
            parameter.uniform_(0, 0.1)  # large enough to change which experts are chosen
        elif name.endswith("norm.weight"):
            parameter.uniform_(0.5, 1.5)
        else:
            parameter.normal_(0, 0.08)
    return model.eval()


def saved(model: PreTrainedModel, folder: Path, **options: Any) -> Path:
    """The model as transformers writes it."""
    model.save_pretrained(folder, **options)
    return folder


@torch.no_grad()
def hf_logits(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """Logits `(T, V)` of one sequence."""
    return model(torch.tensor([ids])).logits[0].float()


def some_ids(count: int, vocab_size: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (count,), generator=generator).tolist()
