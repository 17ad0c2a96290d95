"""The inference form of a model: the same network in four or five calls a layer.

    qkv = project(norm(x))      one product for queries, keys and values
    x   = x + project(attend)   the residual is added by the product that ends a sublayer
    x   = x + mlp(norm(x))      a dense feed-forward block is one call, a mixture of experts too

`fuse` swaps the blocks of a model that was loaded or trained, quantising weights on the way if a
scheme says so. Values are those of the plain blocks up to rounding, `attend` is the same seam, and
`ErnieModel.hidden` does not notice. The result cannot be trained, saved or sharded further.

With several ranks each one holds a slice: query heads with their key/value heads, columns of every
feed-forward block, rows of the head. Two sums a layer join them (Source: Megatron-LM,
arXiv:1909.08053).

Where LoRA adapters change rows of a batch, their pairs are added to the products, and a
feed-forward block is taken apart where they change its inside. A batch without adapters pays
nothing for them.

Legend: as in `ernie.kernels`, and N rows of one adapter, K choices of a token, P pairs (row,
choice) sorted by expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ernie import kernels
from ernie.adapters import UNCHANGED, Changes, LayerPairs, Pair
from ernie.attention import Attend
from ernie.config import ErnieConfig
from ernie.kernels import Norm, PackedWeight, QuantTensor
from ernie.kernels.reference import route
from ernie.layers import MLP, Linear, RMSNorm
from ernie.model import Block, ErnieModel
from ernie.moe.experts import Experts
from ernie.moe.layer import MoE, Split
from ernie.moe.router import Router
from ernie.quant.scheme import Scheme
from ernie.rope import Rotary
from ernie.settings import ConfigError

Weight = Tensor | QuantTensor
# What adapters change in the experts of each bank: text, vision.
EXPERT_PRODUCTS = (
    ("experts.gate_up", "experts.down"),
    ("vision_experts.gate_up", "vision_experts.down"),
)
PLAIN = Scheme("none", dense=None, experts=None, vision_experts=None, head=None)


@dataclass(frozen=True, slots=True)
class Shard:
    """Which slice of every weight this process holds, and how the slices' results are joined."""

    rank: int = 0
    size: int = 1
    sum_ranks: Callable[[Tensor], Tensor] = lambda x: x
    join_columns: Callable[[Tensor], Tensor] = lambda x: x  # (R, V / size) of each rank -> (R, V)

    def rows(self, weight: Weight, parts: int = 1) -> Weight:
        """This rank's share of the outputs of `parts` stacked weights `(..., O, I)`."""
        if self.size == 1:
            return weight
        return stacked([w.chunk(self.size, -2)[self.rank] for w in weight.chunk(parts, -2)])

    def columns(self, weight: Weight) -> Weight:
        """This rank's share of the inputs of a weight `(..., O, I)`, in memory of its own."""
        return weight if self.size == 1 else stacked([weight.chunk(self.size, -1)[self.rank]])

    def elements(self, bias_O: Tensor) -> Tensor:
        return bias_O.chunk(self.size)[self.rank]

    def own(self, x: Tensor) -> Tensor | None:
        """The residual, for the one rank that adds it to the sum."""
        return x if self.rank == 0 else None


WHOLE = Shard()


def fuse(model: ErnieModel, scheme: Scheme | None = None, shard: Shard = WHOLE) -> ErnieModel:
    """Swap the blocks and the head of `model` for their inference form, in place; returns it.

    One block at a time, so that both forms of the whole model never exist together. Raises
    ConfigError where a size cannot be shared out among the ranks.
    """
    check_shard(model.config, shard.size)
    trunk = model.model
    for i, block in enumerate(trunk.layers):
        trunk.layers[i] = fused_block(block, scheme, shard)
    for predictor in trunk.mtp:
        predictor.block = fused_block(predictor.block, scheme, shard)
    return fuse_head(model, scheme, shard)


def fused_block(
    block: nn.Module | Tensor, scheme: Scheme | None = None, shard: Shard = WHOLE
) -> FusedBlock:
    """The inference form of one block. `ernie.load` takes it to swap blocks while it reads."""
    assert isinstance(block, Block), f"{type(block).__name__} is not the plain form of a block"
    return FusedBlock(block, scheme or PLAIN, shard)


def fuse_head(model: ErnieModel, scheme: Scheme | None = None, shard: Shard = WHOLE) -> ErnieModel:
    """Swap the head of a model whose blocks are swapped, in place; returns it."""
    packed = pack(shard.rows(model.head_weight), (scheme or PLAIN).head)
    model.fused_head = FusedHead(model.model.norm, packed, shard)
    model.lm_head = None
    return model


def shallow_copy(model: ErnieModel) -> ErnieModel:
    """A model of its own with the blocks of `model`: fusing it leaves `model` as it is."""
    copied, trunk = copy.copy(model), copy.copy(model.model)
    copied._modules, trunk._modules = dict(model._modules), dict(model.model._modules)
    trunk.layers = nn.ModuleList(model.model.layers)
    trunk.mtp = nn.ModuleList(copy.copy(predictor) for predictor in model.model.mtp)
    for predictor in trunk.mtp:
        predictor._modules = dict(predictor._modules)
    copied.model = trunk
    return copied


def check_shard(config: ErnieConfig, size: int) -> None:
    """Raise ConfigError unless every sliced size is a multiple of `size`."""
    sizes = {
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    if config.moe_k is not None:
        sizes |= {"moe_intermediate_size": config.expert_sizes[0]}
        sizes |= {"moe_intermediate_size of vision": config.expert_sizes[-1]}
    for name, value in sizes.items():
        if value % size:
            raise ConfigError(
                f"tensor_parallel_size={size} does not divide {name}={value}; use one that does"
            )


def pack(weight: Weight, bits: int | None, *, parts: int = 1) -> PackedWeight:
    """A weight as this device's fused operations read it, quantised to `bits` if it is not yet."""
    if isinstance(weight, Tensor):
        weight = weight.detach()
        weight = kernels.quantize(weight, bits) if bits else weight
    return kernels.pack(weight, parts=parts)


def stacked(weights: Sequence[Weight]) -> Weight:
    """Weights `(..., O, I)`, one under another."""
    if isinstance(weights[0], Tensor):
        return torch.cat([w.detach() for w in weights if isinstance(w, Tensor)], -2)
    return QuantTensor.cat([w for w in weights if isinstance(w, QuantTensor)])


class FusedBlock(nn.Module):
    """A `Block` whose products are packed; call it like one."""

    def __init__(self, block: Block, scheme: Scheme, shard: Shard) -> None:
        super().__init__()
        attention = block.self_attn
        self.layer, self.head_dim, self.shard = attention.layer, attention.head_dim, shard
        self.input_norm = _norm(block.input_layernorm)
        self.post_norm = _norm(block.post_attention_layernorm)
        heads = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.qkv = pack(stacked([shard.rows(p.weight) for p in heads]), scheme.dense)
        self.qkv_bias = _stacked_bias(heads, shard)
        self.out = pack(shard.columns(attention.o_proj.weight), scheme.dense)
        self.out_bias = attention.o_proj.bias if shard.rank == 0 else None
        self.num_kv_heads = attention.k_proj.weight.shape[0] // shard.size // self.head_dim
        mlp = block.mlp
        self.mlp = (
            FusedMoE(mlp, scheme, shard) if isinstance(mlp, MoE) else FusedMLP(mlp, scheme, shard)
        )

    def forward(
        self,
        x_TD: Tensor,
        rotary: Rotary,
        attend: Attend,
        changes: Changes = UNCHANGED,
        *,
        split: Split | None = None,
    ) -> tuple[Tensor, None]:
        x_TD = self.self_attention(x_TD, rotary, attend, changes)
        if isinstance(self.mlp, FusedMoE):
            return self.mlp(x_TD, self.post_norm, changes, split), None
        return self.mlp(x_TD, self.post_norm, changes), None

    def self_attention(
        self, x_TD: Tensor, rotary: Rotary, attend: Attend, changes: Changes = UNCHANGED
    ) -> Tensor:
        """The stream after the attention half."""
        qkv_TC = kernels.project(x_TD, self.qkv, self.qkv_bias, norm=self.input_norm)
        changes.add("qkv", qkv_TC, x_TD, self.input_norm)
        heads_TCd = qkv_TC.unflatten(-1, (-1, self.head_dim))
        num_turned = heads_TCd.shape[1] - self.num_kv_heads  # queries and keys, not values
        kernels.rotate_(heads_TCd[:, :num_turned], *rotary)
        num_queries = num_turned - self.num_kv_heads
        q_THd, k_TGd, v_TGd = heads_TCd.split(
            (num_queries, self.num_kv_heads, self.num_kv_heads), 1
        )
        seen_TI = attend(q_THd, k_TGd, v_TGd, layer=self.layer).flatten(-2)
        own_TD = self.shard.own(x_TD)
        out_TD = kernels.project(seen_TI, self.out, self.out_bias, residual_TO=own_TD)
        changes.add("out", out_TD, seen_TI)
        return self.shard.sum_ranks(out_TD)


class FusedMLP(nn.Module):
    """A dense feed-forward block with its norm and its residual."""

    def __init__(self, mlp: MLP, scheme: Scheme, shard: Shard) -> None:
        super().__init__()
        self.shard = shard
        self.gate_up, self.down = _pack_mlp(mlp, scheme.dense, shard)
        self.gate_up_bias = _stacked_bias((mlp.gate_proj, mlp.up_proj), shard)
        self.down_bias = mlp.down_proj.bias if shard.rank == 0 else None

    def forward(self, x_TD: Tensor, norm: Norm, changes: Changes = UNCHANGED) -> Tensor:
        own_TD, weights = self.shard.own(x_TD), (self.gate_up, self.down)
        if self.gate_up_bias is None and not changes.touch("gate_up", "down"):
            out_TD = kernels.mlp(x_TD, *weights, norm=norm, residual_TD=own_TD)
        else:  # no released model has biases: two calls are enough for them
            biases = self.gate_up_bias, self.down_bias
            out_TD = _mlp_apart(x_TD, weights, biases, norm, own_TD, changes)
        return self.shard.sum_ranks(out_TD)


class Bank(NamedTuple):
    """The experts of a modality: router `(E, D)`, correction bias `(E,)`, packed weights."""

    router: Tensor
    bias: Tensor
    gate_up: PackedWeight
    down: PackedWeight


class FusedMoE(nn.Module):
    """A mixture-of-experts block with its norm and its residual."""

    def __init__(self, moe: MoE, scheme: Scheme, shard: Shard) -> None:
        super().__init__()
        self.shard = shard
        self.top_k, self.norm_min = moe.gate.top_k, moe.gate.norm_min
        bias = moe.moe_statics.e_score_correction_bias.detach()
        self.banks = [_pack_bank(moe.gate, bias[0], moe.experts, scheme.experts, shard)]
        if moe.vision_gate is not None and moe.vision_experts is not None:
            bits = scheme.vision_experts
            self.banks.append(_pack_bank(moe.vision_gate, bias[1], moe.vision_experts, bits, shard))
        shared = moe.shared_experts
        if shared is not None and shared.gate_proj.bias is not None:
            raise ConfigError("shared experts with biases have no inference form; use_bias=false")
        self.shared = None if shared is None else _pack_mlp(shared, scheme.dense, shard)

    def forward(
        self, x_TD: Tensor, norm: Norm, changes: Changes = UNCHANGED, split: Split | None = None
    ) -> Tensor:
        """`split` where some tokens are of vision: each bank is one call with its tokens."""
        if split is None:
            return self.shard.sum_ranks(self._rows(x_TD, norm, changes, 0))
        parts = [
            self._rows(rows_XD, norm, own, bank) if len(rows_XD) else rows_XD
            for bank, (rows_XD, own) in enumerate(
                zip(split.apart(x_TD), changes.apart(split.place_T, split.num_text), strict=True)
            )
        ]
        return self.shard.sum_ranks(split.together(*parts))

    def _rows(self, x_TD: Tensor, norm: Norm, changes: Changes, bank: int) -> Tensor:
        """Rows of one modality."""
        own_TD = self.shard.own(x_TD)
        if not changes.touch("gate_up", "down", *EXPERT_PRODUCTS[bank]):
            return self._fused(x_TD, norm, self.shared, own_TD, bank)
        out_TD = self._apart(x_TD, norm, changes, bank)
        # The order of the fused sum: experts, shared experts, residual.
        return out_TD if own_TD is None else own_TD + out_TD

    def _fused(
        self,
        x_TD: Tensor,
        norm: Norm,
        shared: tuple[PackedWeight, PackedWeight] | None,
        residual_TD: Tensor | None,
        bank: int,
    ) -> Tensor:
        return kernels.moe(
            x_TD,
            *self.banks[bank],
            shared,
            top_k=self.top_k,
            norm_min=self.norm_min,
            norm=norm,
            residual_TD=residual_TD,
        )

    def _apart(self, x_TD: Tensor, norm: Norm, changes: Changes, bank: int) -> Tensor:
        """Without the residual. Rows whose experts are changed go through them by themselves."""
        products = EXPERT_PRODUCTS[bank]
        changed = [part for part in changes.parts if not part[1].keys().isdisjoint(products)]
        if changed:
            out_TD, is_other_T = torch.empty_like(x_TD), x_TD.new_ones(len(x_TD), dtype=torch.bool)
            for rows_N, pairs in changed:
                out_TD[rows_N] = self._experts(kernels.rms_norm(x_TD[rows_N], *norm), pairs, bank)
                is_other_T[rows_N] = False
            if sum(len(rows_N) for rows_N, _ in changed) < len(x_TD):
                out_TD[is_other_T] = self._fused(x_TD[is_other_T], norm, None, None, bank)
        else:
            out_TD = self._fused(x_TD, norm, None, None, bank)
        if self.shared is None:
            return out_TD
        return _mlp_apart(x_TD, self.shared, (None, None), norm, out_TD, changes)

    def _experts(self, y_ND: Tensor, pairs: LayerPairs, bank: int) -> Tensor:
        """The routed experts of rows that one adapter changes, `(N, D)`."""
        router, bias, gate_up, down = self.banks[bank]
        gate_up_pair, down_pair = (pairs.get(product) for product in EXPERT_PRODUCTS[bank])
        experts_NK, weights_NK = route(y_ND, router, bias, self.top_k, self.norm_min)
        order = experts_NK.flatten().argsort(stable=True)
        counts_E = torch.bincount(experts_NK.flatten(), minlength=len(router))
        sorted_PD = y_ND[order // self.top_k]
        both_PM = _grouped(sorted_PD, gate_up, counts_E, gate_up_pair)
        hidden_PM = kernels.swiglu(*both_PM.chunk(2, dim=-1))
        out_PD = torch.empty_like(sorted_PD)
        out_PD[order] = _grouped(hidden_PM, down, counts_E, down_pair)
        return (out_PD.unflatten(0, experts_NK.shape) * weights_NK[..., None]).sum(1)


class FusedHead:
    """Final norm and projection to the vocabulary, float32 `(R, V)`."""

    def __init__(self, norm: RMSNorm, weight: PackedWeight, shard: Shard) -> None:
        self.norm, self.weight, self.shard = _norm(norm), weight, shard

    def __call__(self, hidden_RD: Tensor) -> Tensor:
        logits_RV = kernels.project(hidden_RD, self.weight, norm=self.norm).float()
        return self.shard.join_columns(logits_RV)


def _mlp_apart(
    x_TD: Tensor,
    weights: tuple[PackedWeight, PackedWeight],
    biases: tuple[Tensor | None, Tensor | None],
    norm: Norm,
    residual_TD: Tensor | None,
    changes: Changes,
) -> Tensor:
    """`kernels.mlp` in its parts, with biases and adapters."""
    both_TM = kernels.project(x_TD, weights[0], biases[0], norm=norm)
    changes.add("gate_up", both_TM, x_TD, norm)
    hidden_TM = kernels.swiglu(*both_TM.chunk(2, dim=-1))
    out_TD = kernels.project(hidden_TM, weights[1], biases[1], residual_TO=residual_TD)
    changes.add("down", out_TD, hidden_TM)
    return out_TD


def _grouped(x_PI: Tensor, weight_EOI: PackedWeight, counts_E: Tensor, pair: Pair | None) -> Tensor:
    """Rows sorted by expert through their expert's weight and pair."""
    groups = enumerate(x_PI.split(counts_E.tolist()))
    parts = [kernels.project(x, kernels.expert(weight_EOI, e)) for e, x in groups if len(x)]
    out_PO = torch.cat(parts)
    return out_PO if pair is None else out_PO + pair.of_experts(x_PI, counts_E)


def _norm(norm: RMSNorm) -> Norm:
    return norm.weight.detach(), norm.eps


def _stacked_bias(layers: tuple[Linear, ...], shard: Shard) -> Tensor | None:
    biases = [shard.elements(layer.bias.detach()) for layer in layers if layer.bias is not None]
    return torch.cat(biases) if biases else None


def _pack_bank(
    gate: Router, bias_E: Tensor, experts: Experts, bits: int | None, shard: Shard
) -> Bank:
    gate_up = pack(shard.rows(experts.gate_up_proj, parts=2), bits, parts=2)
    down = pack(shard.columns(experts.down_proj), bits)
    return Bank(gate.weight.detach().float(), bias_E, gate_up, down)


def _pack_mlp(mlp: MLP, bits: int | None, shard: Shard) -> tuple[PackedWeight, PackedWeight]:
    gate_up = stacked([shard.rows(p.weight) for p in (mlp.gate_proj, mlp.up_proj)])
    return pack(gate_up, bits, parts=2), pack(shard.columns(mlp.down_proj.weight), bits)
