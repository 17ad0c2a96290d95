"""A mixture-of-experts checkpoint made from a dense one that, at first, computes the same function.

Legend: I dense intermediate size, M expert size, S shared experts, E routed experts.

A SwiGLU layer is a sum over its intermediate units, so units can be dealt out:

    dense layer    units 0 ............................ I = M (1 + S)
    routed experts units 0 .. M, each expert a copy      their weights sum to 1: one copy's worth
    shared expert            units M ................ I  always added

Attention, norms, embedding and the layers before the first MoE layer stay as they are. The routers
are random, and since different tokens train different copies, the experts drift apart.
Source: Komatsuzaki et al., "Sparse Upcycling", 2023; the split keeps ERNIE's shared experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ernie.checkpoint.folder import CheckpointError
from ernie.checkpoint.io import load, write
from ernie.config import ErnieConfig
from ernie.model import ErnieModel


def upcycle(
    source_folder: str | Path,
    output_folder: str | Path,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    num_shared_experts: int = 2,
    first_moe_layer: int = 1,
    seed: int = 0,
    router_std: float | None = None,
    layout: str = "pt",
) -> None:
    """Write the dense checkpoint `source_folder` as a MoE checkpoint `output_folder`.

    Layers from `first_moe_layer` on get `num_experts` routed experts of which a token meets
    `top_k`, and `num_shared_experts` (counted in expert sizes; 0 for none) that it always meets.
    Router weights are normal with `router_std` (default `sqrt(1 / (3 D))`, as in `init_weights`).
    The dense model is held in memory, the new one is not. Raises CheckpointError if the source has
    experts or biases, or if its intermediate size cannot be dealt out evenly.
    """
    dense = load(source_folder, dtype=None)
    config = _config(dense.config, num_experts, top_k, num_shared_experts, first_moe_layer)
    std = router_std if router_std is not None else (3 * config.hidden_size) ** -0.5
    weights = dict(dense.named_parameters())
    dtype = weights["model.embed_tokens.weight"].dtype
    generator = torch.Generator().manual_seed(seed)
    template = dict(ErnieModel(config, dtype=dtype, device="meta").named_parameters())
    write(
        output_folder,
        config,
        template,
        lambda name: _upcycled(name, template[name], weights, config, generator, std),
        layout=layout,
        tokenizer=dense.tokenizer,
        generation_config=dense.generation_config,
    )


def _config(
    dense: ErnieConfig, num_experts: int, top_k: int, num_shared: int, first: int
) -> ErnieConfig:
    if dense.is_moe or dense.use_bias:
        what = f"moe_num_experts={dense.moe_num_experts}" if dense.is_moe else "use_bias=true"
        raise CheckpointError(
            f"the source has {what}; only a dense model without biases can be upcycled"
        )
    size, parts = dense.intermediate_size, 1 + num_shared
    if num_shared < 0 or size % parts:
        fitting = ", ".join(str(n) for n in range(16) if size % (1 + n) == 0)
        raise CheckpointError(
            f"num_shared_experts={num_shared} asks for {parts} equal parts of intermediate_size="
            f"{size}, which does not divide; use one of {fitting}"
        )
    if not 0 <= first < dense.num_hidden_layers:
        raise CheckpointError(
            f"first_moe_layer={first} is not one of the {dense.num_hidden_layers} layers; use 0 to "
            f"{dense.num_hidden_layers - 1}"
        )
    named = ("model_type", "architectures", "auto_map")  # of the dense model
    return dataclasses.replace(
        dense,
        moe_num_experts=num_experts,
        moe_k=top_k,
        moe_intermediate_size=size // parts,
        moe_num_shared_experts=num_shared,
        moe_layer_start_index=first,
        moe_layer_end_index=dense.num_hidden_layers - 1,
        extra={k: v for k, v in dense.extra.items() if k not in named},
    )


def _upcycled(
    name: str,
    wanted: Tensor,
    dense: Mapping[str, Tensor],
    config: ErnieConfig,
    generator: torch.Generator,
    std: float,
) -> Tensor:
    """One native tensor of the new model; expert copies are views of one tensor."""
    block, _, part = name.partition(".mlp.")
    if name in dense:
        return dense[name]
    if part == "gate.weight":
        return torch.randn(wanted.shape, generator=generator) * std
    if part == "moe_statics.e_score_correction_bias":
        return torch.zeros(wanted.shape)
    gate_ID, up_ID = dense[f"{block}.mlp.gate_proj.weight"], dense[f"{block}.mlp.up_proj.weight"]
    down_DI = dense[f"{block}.mlp.down_proj.weight"]
    cut, copies = config.expert_sizes[0], (config.experts_per_bank[0], -1, -1)
    return {
        "experts.gate_up_proj": torch.cat((gate_ID[:cut], up_ID[:cut])).expand(copies),
        "experts.down_proj": down_DI[:, :cut].expand(copies),
        "shared_experts.gate_proj.weight": gate_ID[cut:],
        "shared_experts.up_proj.weight": up_ID[cut:],
        "shared_experts.down_proj.weight": down_DI[:, cut:],
    }[part]
