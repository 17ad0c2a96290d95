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
    Ernie4_5_VLMoeConfig,
    Ernie4_5_VLMoeForConditionalGeneration,
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


VL_TEXT = {
    "hidden_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 72,
    "vocab_size": 211,
    "max_position_embeddings": 512,
    "moe_num_experts": 8,
    "moe_k": 3,
    "moe_intermediate_size": [24, 10],
    "moe_num_shared_experts": 2,
    "mrope_section": [3, 3, 2],
}
VL_TOWER = {"depth": 2, "hidden_size": 48, "intermediate_size": 144, "num_heads": 3}
VL_TOKENS = {
    "image_token_id": 200,
    "image_start_token_id": 201,
    "image_end_token_id": 202,
    "video_start_token_id": 203,
    "video_end_token_id": 204,
    "video_token_id": 205,
}


def hf_dense(seed: int = 0, **sizes: Any) -> Ernie4_5ForCausalLM:
    """A random dense model in float32; `sizes` override `DENSE`."""
    torch.manual_seed(seed)
    return _randomised(Ernie4_5ForCausalLM(Ernie4_5Config(**{**DENSE, **sizes})))


def hf_moe(seed: int = 0, **sizes: Any) -> Ernie4_5_MoeForCausalLM:
    """A random mixture-of-experts model in float32; `sizes` override `MOE`."""
    torch.manual_seed(seed)
    return _randomised(Ernie4_5_MoeForCausalLM(Ernie4_5_MoeConfig(**{**MOE, **sizes})))


def hf_vl(
    seed: int = 0, tower: dict[str, Any] | None = None, tied: bool = True, **text: Any
) -> Ernie4_5_VLMoeForConditionalGeneration:
    """A random multimodal model in float32; `text` overrides `VL_TEXT`, `tower` `VL_TOWER`."""
    torch.manual_seed(seed)
    sizes = {**VL_TEXT, **text}
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    rope["mrope_section"] = sizes.pop("mrope_section")
    config = Ernie4_5_VLMoeConfig(
        text_config={**sizes, "rope_parameters": rope},
        vision_config={**VL_TOWER, **(tower or {})},
        tie_word_embeddings=tied,
        **VL_TOKENS,
    )
    model = Ernie4_5_VLMoeForConditionalGeneration(config)
    model.set_experts_implementation("eager")  # the others want sizes that are multiples of 4
    return _randomised(model)


@torch.no_grad()
def _randomised(model: PreTrainedModel) -> Any:
    for name, parameter in model.named_parameters():
        if "e_score_correction_bias" in name:
            parameter.uniform_(0, 0.1)  # large enough to change which experts are chosen
        elif name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln.weight")):
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
