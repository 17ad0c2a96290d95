"""The operations of `ernie.kernels` in plain torch: the definition that every faster twin must
match.

Written to be read, and to run on any device; see `ernie.kernels` for shapes and meaning.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    return F.linear(
        x_TI, weight_OI.to(x_TI.dtype), None if bias_O is None else bias_O.to(x_TI.dtype)
    )


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor) -> Tensor:
    groups = x_NI.split(counts_E.tolist())
    # Experts without rows are left out: they would only cost a conversion of their weight.
    parts = [linear(rows, weight_EOI[e]) for e, rows in enumerate(groups) if len(rows)]
    return torch.cat(parts or [linear(x_NI, weight_EOI[0])])


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = x_TD.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed.to(x_TD.dtype) * weight_D.to(x_TD.dtype)


def rotate(x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor) -> Tensor:
    even, odd = x_THd.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos_Tp[:, None], sin_Tp[:, None]
    return (
        torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)
        .flatten(-2)
        .to(x_THd.dtype)
    )


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    return F.silu(gate_TI) * up_TI


def attend_packed(
    q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, cu_seqlens_S1: Tensor, scale: float
) -> Tensor:
    bounds = cu_seqlens_S1.tolist()
    out = [
        _attend_one(q_THd[a:b], k_TGd[a:b], v_TGd[a:b], scale) for a, b in pairwise(bounds) if b > a
    ]
    return torch.cat(out) if out else torch.zeros_like(q_THd)


def attend_paged(
    q_THd: Tensor,
    k_cache_BPGd: Tensor,
    v_cache_BPGd: Tensor,
    tables_SM: Tensor,
    cu_seqlens_S1: Tensor,
    lens_S: Tensor,
    scale: float,
) -> Tensor:
    block_size = k_cache_BPGd.shape[1]
    bounds = cu_seqlens_S1.tolist()
    out = torch.zeros_like(q_THd)
    for table, length, a, b in zip(tables_SM, lens_S.tolist(), bounds, bounds[1:]):
        if b > a:
            blocks = table[: -(-length // block_size)].long()
            keys, values = (
                cache[blocks].flatten(0, 1)[:length].to(q_THd.dtype)
                for cache in (k_cache_BPGd, v_cache_BPGd)
            )
            out[a:b] = _attend_one(q_THd[a:b], keys, values, scale)
    return out


def write_cache(
    k_TGd: Tensor, v_TGd: Tensor, k_cache_BPGd: Tensor, v_cache_BPGd: Tensor, slots_T: Tensor
) -> None:
    kept = slots_T >= 0
    for new, cache in ((k_TGd, k_cache_BPGd), (v_TGd, v_cache_BPGd)):
        cache.flatten(0, 1)[slots_T[kept]] = new[kept].to(cache.dtype)


class AdamWConstants(NamedTuple):
    """The factors of one AdamW step."""

    decay: float
    step_size: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    root_scale: float
    eps: float
    grad_scale: float


def adamw_constants(
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
) -> AdamWConstants:
    return AdamWConstants(
        decay=1 - learning_rate * weight_decay,
        step_size=learning_rate / (1 - beta1**step),
        beta1=beta1,
        rest1=1 - beta1,
        beta2=beta2,
        rest2=1 - beta2,
        root_scale=(1 - beta2**step) ** -0.5,
        eps=eps,
        grad_scale=grad_scale,
    )


def adamw_step(
    parameter_N: Tensor,
    gradient_N: Tensor,
    moment_N: Tensor,
    square_N: Tensor,
    *,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    seed: int = 0,
) -> None:
    c = adamw_constants(learning_rate, beta1, beta2, eps, weight_decay, step, grad_scale)
    # Each operation rounds to float32 by itself and in this order: the twins fuse none of them.
    gradient = gradient_N.float() * c.grad_scale
    moment = moment_N.float() * c.beta1 + gradient * c.rest1
    square = square_N.float() * c.beta2 + gradient * gradient * c.rest2
    root = square.double().sqrt().float()  # torch's float32 root may be off by a last bit
    update = moment * c.step_size / (root * c.root_scale + c.eps)
    parameter_N.copy_(parameter_N * c.decay - update)
    if moment_N.dtype == torch.bfloat16:
        bits = _rounding_bits(moment_N.numel(), rounding_key(seed, step)).view(moment_N.shape)
        bits = bits.to(moment_N.device)
        moment = _rounded_at_random(moment, bits & 0xFFFF)
        square = _rounded_at_random(square, bits >> 16)
    moment_N.copy_(moment)
    square_N.copy_(square)


def rounding_key(seed: int, step: int) -> int:
    """32 bits that mix seed and step. Source: the finaliser of SplitMix64."""
    mixed = (seed << 32) + step * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ mixed >> 31) & 0xFFFFFFFF


def _rounding_bits(num_elements: int, key: int) -> Tensor:
    """32 random bits for each element, as int64. Source: the finaliser of MurmurHash3."""
    element = torch.arange(num_elements, dtype=torch.int64)
    bits = (element & 0xFFFFFFFF) * 0x9E3779B1 + (element >> 32) * 0x85EBCA6B + key & 0xFFFFFFFF
    bits = (bits ^ bits >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    bits = (bits ^ bits >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return bits ^ bits >> 16


def _rounded_at_random(x: Tensor, bits: Tensor) -> Tensor:
    """float32 -> bfloat16, away from zero with the probability of the 16 bits that are cut off."""
    raised = x.view(torch.int32) + bits.to(torch.int32)
    return (raised & -0x10000).view(torch.float32).to(torch.bfloat16)


def _attend_one(q_qHd: Tensor, k_nGd: Tensor, v_nGd: Tensor, scale: float) -> Tensor:
    """One sequence: q holds the last `len(q)` of its n tokens; query i sees keys up to its own
    position."""
    num_queries, num_heads, _ = q_qHd.shape
    num_keys, num_kv_heads, _ = k_nGd.shape
    group = num_heads // num_kv_heads
    k_nHd, v_nHd = (x.repeat_interleave(group, dim=1) for x in (k_nGd, v_nGd))
    scores_Hqn = torch.einsum("qhd,nhd->hqn", q_qHd.float(), k_nHd.float()) * scale
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_qHd.device).triu(
        num_keys - num_queries + 1
    )
    weights_Hqn = scores_Hqn.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hqn,nhd->qhd", weights_Hqn, v_nHd.float()).to(q_qHd.dtype)
