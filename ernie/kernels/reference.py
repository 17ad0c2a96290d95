"""The operations of `ernie.kernels` in plain torch: the definition that every faster twin must
match.

Written to be read, and to run on any device; see `ernie.kernels` for shapes and meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie.kernels.weights import (
    BITS,
    FP8_LEAST,
    FP8_MAX,
    GROUP_SIZE,
    NF4_GROUP,
    NF4_LEVELS,
    ROUNDED_GROUP,
    FP8Tensor,
    PackedWeight,
    QuantTensor,
)
from ernie.recomputed import Function, keep


def linear(x_TI: Tensor, weight_OI: Tensor | QuantTensor, bias_O: Tensor | None = None) -> Tensor:
    bias_O = None if bias_O is None else bias_O.to(x_TI.dtype)
    if isinstance(weight_OI, QuantTensor):
        out_TO = _FrozenProduct.apply(x_TI, weight_OI)
        return out_TO if bias_O is None else out_TO + bias_O
    return F.linear(x_TI, weight_OI.to(x_TI.dtype), bias_O)


class _FrozenProduct(torch.autograd.Function):
    """Rows times a quantised weight, which is dequantised anew in each pass and never kept."""

    @staticmethod
    def forward(ctx, x_TI: Tensor, weight_OI: QuantTensor) -> Tensor:
        ctx.weight_OI = weight_OI
        return x_TI @ weight_OI.dequantized(x_TI.dtype).T

    @staticmethod
    def backward(ctx, grad_TO: Tensor):
        return grad_TO @ ctx.weight_OI.dequantized(grad_TO.dtype), None


def grouped_linear(x_NI: Tensor, weight_EOI: Tensor | QuantTensor, counts_E: Tensor) -> Tensor:
    groups = x_NI.split(counts_E.tolist())
    # Experts without rows are left out: they would only cost a conversion of their weight.
    parts = [linear(rows, weight_EOI[e]) for e, rows in enumerate(groups) if len(rows)]
    return torch.cat(parts or [linear(x_NI, weight_EOI[0])])


def fp8_linear(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, quant_input_grad: bool
) -> Tensor:
    out_TO = _FP8Product.apply(x_TI, weight_OI, None, quant_input_grad)
    return out_TO if bias_O is None else out_TO + bias_O.to(x_TI.dtype)


def fp8_grouped_linear(
    x_NI: Tensor, weight_EOI: Tensor, counts_E: Tensor, *, quant_input_grad: bool
) -> Tensor:
    return _FP8Product.apply(x_NI, weight_EOI, counts_E, quant_input_grad)


def quantize_fp8(x_RC: Tensor) -> FP8Tensor:
    wide_RC = x_RC.float()
    most_R = wide_RC.abs().amax(-1).clamp(min=FP8_LEAST)
    # Quotients of tensors, which all devices round alike: with a number torch takes reciprocals.
    top_R = torch.full_like(most_R, FP8_MAX)
    scaled_RC = wide_RC * (top_R / most_R)[..., None]
    data_RC = scaled_RC.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return FP8Tensor(data_RC.contiguous(), most_R / top_R)


class _FP8Product(Function):
    """Rows times a weight, or times the weights of experts, both rounded anew in each pass."""

    @staticmethod
    def forward(
        ctx, x_NI: Tensor, weight: Tensor, counts_E: Tensor | None, quant_input_grad: bool
    ) -> Tensor:
        ctx.quant_input_grad = quant_input_grad
        keep(ctx, x_NI, weight, counts_E)
        x, w = quantize_fp8(x_NI).dequantized(), quantize_fp8(weight).dequantized()
        out_NO = linear(x, w) if counts_E is None else grouped_linear(x, w, counts_E)
        return out_NO.to(x_NI.dtype)

    @staticmethod
    def backward(ctx, grad_NO: Tensor):
        x_NI, weight, counts_E = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            g, w = grad_NO, weight.mT
            if ctx.quant_input_grad:
                g, w = quantize_fp8(g).dequantized(), quantize_fp8(w).dequantized()
            dx = linear(g, w) if counts_E is None else grouped_linear(g, w, counts_E)
            dx = dx.to(x_NI.dtype)
        if ctx.needs_input_grad[1]:
            counts = [len(x_NI)] if counts_E is None else counts_E.tolist()
            groups = zip(grad_NO.split(counts), x_NI.split(counts))
            parts = [grad.float().T @ rows.float() for grad, rows in groups]
            dw = torch.stack(parts).view(weight.shape).to(weight.dtype)
        return dx, dw, None, None


def rows_gradient(grad_TO: Tensor, weight_OI: Tensor) -> Tensor:
    return grad_TO @ weight_OI.to(grad_TO.dtype)


def add_product_(total_OI: Tensor, left_NO: Tensor, right_NI: Tensor) -> None:
    if left_NO.dtype == total_OI.dtype:
        total_OI.addmm_(left_NO.T, right_NI)
    elif left_NO.is_cuda and total_OI.dtype == torch.float32:
        torch.addmm(total_OI, left_NO.T, right_NI, out_dtype=torch.float32, out=total_OI)
    else:
        total_OI += left_NO.T @ right_NI


def sort_pairs(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    pairs_N = experts_TK.flatten()
    order_N = pairs_N.argsort(stable=True)
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    return order_N, place_N.view(experts_TK.shape), pairs_N.bincount(minlength=num_experts)


def spread(x_TD: Tensor, order_N: Tensor, top_k: int) -> Tensor:
    return x_TD[order_N // top_k]


def combine(rows_ND: Tensor, place_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    out_TD = torch.zeros(len(place_TK), rows_ND.shape[1], device=rows_ND.device)
    for k, place_T in enumerate(place_TK.unbind(1)):
        part_TD = rows_ND[place_T].float()
        out_TD += part_TD if weights_TK is None else part_TD * weights_TK[:, k, None]
    return out_TD.to(rows_ND.dtype)


def combine_backward(
    grad_TD: Tensor, rows_ND: Tensor, weights_TK: Tensor, order_N: Tensor
) -> tuple[Tensor, Tensor]:
    grad_ND = grad_TD[order_N // weights_TK.shape[1]].float()
    dweights_TK = torch.empty_like(weights_TK)
    dweights_TK.view(-1)[order_N] = (grad_ND * rows_ND.float()).sum(-1)
    drows_ND = grad_ND.mul_(weights_TK.flatten()[order_N, None])
    return drows_ND.to(rows_ND.dtype), dweights_TK


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    x = x_TD.float()
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return normed.to(x_TD.dtype) * weight_D.to(x_TD.dtype)


def rotate(x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor, *, halves: bool = False) -> Tensor:
    pair, shape = (-2, (2, -1)) if halves else (-1, (-1, 2))
    first, second = x_THd.float().unflatten(-1, shape).unbind(pair)
    cos, sin = cos_Tp[:, None], sin_Tp[:, None]
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), pair)
    return turned.flatten(-2).to(x_THd.dtype)


def rotate_(x_THd: Tensor, cos_Tp: Tensor, sin_Tp: Tensor) -> None:
    x_THd.copy_(rotate(x_THd, cos_Tp, sin_Tp))


def swiglu(gate_TI: Tensor, up_TI: Tensor) -> Tensor:
    return F.silu(gate_TI) * up_TI


def swiglu_halves(gate_up_Tw: Tensor) -> Tensor:
    return swiglu(*gate_up_Tw.chunk(2, dim=-1))


def quick_gelu(x: Tensor) -> Tensor:
    return _QuickGelu.apply(x)


class _QuickGelu(torch.autograd.Function):
    """Nothing but x is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x * 1.702).sigmoid_().mul_(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate = (x * 1.702).sigmoid_()
        slope = (1 - gate).mul_(x).mul_(1.702).add_(1).mul_(gate)
        return slope.mul_(grad)


def squares(tensors: Sequence[Tensor]) -> Tensor:
    norms: list[Tensor] = [tensors[0]] * len(tensors)
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        places = [n for n, t in enumerate(tensors) if t.dtype == dtype]
        found = torch._foreach_norm([tensors[n] for n in places], 2, dtype=torch.float32)
        for n, norm in zip(places, found):
            norms[n] = norm
    return torch.stack(norms).double().square()


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    x_NV = logits_NV if logits_NV.dtype == torch.float32 else logits_NV.float()
    x_NV -= x_NV.amax(-1, keepdim=True)
    chosen_N1 = x_NV.gather(-1, targets_N[:, None])
    sums_N1 = x_NV.exp_().sum(-1, keepdim=True)
    x_NV *= scale / sums_N1
    x_NV.scatter_add_(-1, targets_N[:, None], torch.full_like(chosen_N1, -scale))
    if x_NV is not logits_NV:
        logits_NV.copy_(x_NV)
    return (sums_N1.log() - chosen_N1)[:, 0], chosen_N1[:, 0] == 0


def attend_packed(
    q_THd: Tensor,
    k_TGd: Tensor,
    v_TGd: Tensor,
    cu_seqlens_S1: Tensor,
    scale: float,
    lengths: Sequence[int] | None = None,
    *,
    causal: bool = True,
) -> Tensor:
    del lengths
    bounds = cu_seqlens_S1.tolist()
    out = [
        attend_one(q_THd[a:b], k_TGd[a:b], v_TGd[a:b], scale, causal)
        for a, b in pairwise(bounds)
        if b > a
    ]
    return torch.cat(out) if out else torch.zeros_like(q_THd)


def attend_paged(
    q_THd: Tensor,
    k_cache_BPGr: Tensor,
    v_cache_BPGr: Tensor,
    tables_SM: Tensor,
    cu_seqlens_S1: Tensor,
    lens_S: Tensor,
    scale: float,
    new: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    if new is not None:
        write_cache(new[0], new[1], k_cache_BPGr, v_cache_BPGr, new[2])
    block_size = k_cache_BPGr.shape[1]
    bounds = cu_seqlens_S1.tolist()
    out = torch.zeros_like(q_THd)
    for table, length, a, b in zip(tables_SM, lens_S.tolist(), bounds, bounds[1:]):
        if b > a:
            blocks = table[: -(-length // block_size)].long()
            keys, values = (
                _cached_values(cache[blocks].flatten(0, 1)[:length])
                for cache in (k_cache_BPGr, v_cache_BPGr)
            )
            out[a:b] = attend_one(q_THd[a:b], keys, values, scale)
    return out


def write_cache(
    k_TGd: Tensor, v_TGd: Tensor, k_cache_BPGr: Tensor, v_cache_BPGr: Tensor, slots_T: Tensor
) -> None:
    kept = slots_T >= 0
    for new, cache in ((k_TGd, k_cache_BPGr), (v_TGd, v_cache_BPGr)):
        cache.flatten(0, 1)[slots_T[kept]] = _cached_rows(new[kept], cache.dtype)


SCALE_BYTES = 4  # of the float32 that ends a row of an int8 cache


def cache_width(head_dim: int, dtype: torch.dtype) -> int:
    """r, the elements of a row: one head of one token in a cache of this dtype."""
    return head_dim + SCALE_BYTES if dtype == torch.int8 else head_dim


def _cached_rows(x_TGd: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as the cache holds them, `(T, G, r)`."""
    if dtype != torch.int8:
        return x_TGd.to(dtype)
    x_TGd = x_TGd.float()
    scale_TG1 = x_TGd.abs().amax(-1, keepdim=True) / 127
    integers_TGd = (x_TGd / _nonzero(scale_TG1)).round().to(torch.int8)
    return torch.cat((integers_TGd, scale_TG1.view(torch.int8)), -1)


def _cached_values(rows_nGr: Tensor) -> Tensor:
    """What rows of the cache stand for, float32 `(n, G, d)`."""
    if rows_nGr.dtype != torch.int8:
        return rows_nGr.float()
    scale_nG1 = rows_nGr[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return rows_nGr[..., :-SCALE_BYTES].float() * scale_nG1


def quantize(weight_OI: Tensor, bits: int) -> QuantTensor:
    weight = weight_OI.float()
    assert bits in BITS, f"weights of {bits} bits"
    in_size = weight.shape[-1]
    if bits == 8:
        scale_O = weight.abs().amax(-1) / 127
        data = (weight / _nonzero(scale_O)[..., None]).round().to(torch.int8)
        return QuantTensor(8, data, scale_O, None, in_size)
    groups_Ogn = F.pad(weight, (0, -in_size % GROUP_SIZE)).unflatten(-1, (-1, GROUP_SIZE))
    best_Og = _group_scales(groups_Ogn, bits)
    channel_O = best_Og.abs().amax(-1) / 127
    group_Og = (best_Og / _nonzero(channel_O)[..., None]).round().to(torch.int8)
    scale_Og = _nonzero(group_Og.float() * channel_O[..., None])
    integers = _nearest(groups_Ogn, scale_Og, bits).flatten(-2)
    if bits == 6:
        data = integers[..., :in_size].to(torch.int8).contiguous()
        return QuantTensor(6, data, channel_O, group_Og, in_size)
    nibbles = (integers + 8).to(torch.uint8)
    data = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4)[..., : -(-in_size // 2)]
    return QuantTensor(4, data.contiguous(), channel_O, group_Og, in_size)


def quantize_nf4(weight_OI: Tensor, *, double: bool = False) -> QuantTensor:
    *outer, in_size = weight_OI.shape
    levels = torch.tensor(NF4_LEVELS, device=weight_OI.device)
    padded = F.pad(weight_OI.float(), (0, -in_size % NF4_GROUP))
    groups_Ogn = padded.unflatten(-1, (-1, NF4_GROUP))
    most_Og = groups_Ogn.abs().amax(-1)
    channel_O = torch.ones(outer, device=weight_OI.device)
    scale_Og = most_Og
    if double:
        channel_O = most_Og.amax(-1) / 255
        least_Og = (most_Og > 0).float()  # a small group beside a large one is not lost
        scale_Og = (most_Og / _nonzero(channel_O)[..., None]).round().maximum(least_Og)
        scale_Og = scale_Og.to(torch.uint8)
        most_Og = scale_Og.float() * channel_O[..., None]
    between = (levels[1:] + levels[:-1]) / 2
    nibbles = torch.bucketize(groups_Ogn / _nonzero(most_Og)[..., None], between).flatten(-2)
    nibbles = nibbles.to(torch.uint8)
    data = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4)[..., : -(-in_size // 2)]
    return QuantTensor(4, data.contiguous(), channel_O, scale_Og, in_size, is_normal=True)


# By bits: the largest value of a group becomes this integer before its scale is fitted.
EXTREMES = {4: (-7.0, -7.5, -8.0, -8.5, -9.0, -9.5, 7.0, 7.5), 6: (-31.0, -32.0, -33.0)}


def _nearest(groups_Ogn: Tensor, scale_Og: Tensor, bits: int) -> Tensor:
    least = -(2 ** (bits - 1))
    return (groups_Ogn / scale_Og[..., None]).round().clamp(least, -least - 1)


def _group_scales(groups_Ogn: Tensor, bits: int) -> Tensor:
    """The scale of each group with the least squared error, of the candidates tried.

    Integers q given, the best scale is `<w, q> / <q, q>`, and it leaves the error `<w, w> - <w,
    q>**2 / <q, q>`.
    """
    place_Og1 = groups_Ogn.abs().argmax(-1, keepdim=True)
    extreme_Og = groups_Ogn.gather(-1, place_Og1)[..., 0]
    best_Og = torch.zeros_like(extreme_Og)
    gain_Og = torch.zeros_like(extreme_Og)
    for target in EXTREMES[bits]:
        q_Ogn = _nearest(groups_Ogn, _nonzero(extreme_Og / target), bits)
        wq_Og, qq_Og = (groups_Ogn * q_Ogn).sum(-1), q_Ogn.square().sum(-1)
        explained_Og = wq_Og.square() / _nonzero(qq_Og)
        better_Og = explained_Og > gain_Og
        best_Og = torch.where(better_Og, wq_Og / _nonzero(qq_Og), best_Og)
        gain_Og = torch.where(better_Og, explained_Og, gain_Og)
    return best_Og


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1.0, x)


def pack(weight: Tensor | QuantTensor, *, parts: int = 1) -> PackedWeight:
    """Kept as it is, under `weight` or as the fields of a QuantTensor."""
    del parts  # stacked weights are sliced where they are used
    if isinstance(weight, Tensor):
        name, size = str(weight.dtype).removeprefix("torch."), weight.element_size()
        return PackedWeight(tuple(weight.shape), name, weight.numel() * size, {"weight": weight})
    tensors = {"data": weight.data, "channel_scale": weight.channel_scale}
    if weight.group_scale is not None:
        tensors["group_scale"] = weight.group_scale
    return PackedWeight(weight.shape, f"int{weight.bits}", weight.num_bytes, tensors)


def expert(weight_EOI: PackedWeight, index: int) -> PackedWeight:
    assert weight_EOI.handle is None, "packed by a back end that lacks `expert`"
    experts, *shape = weight_EOI.shape
    tensors = {name: tensor[index] for name, tensor in weight_EOI.tensors.items()}
    return PackedWeight(tuple(shape), weight_EOI.format, weight_EOI.num_bytes // experts, tensors)


def unpacked(weight: PackedWeight) -> Tensor | QuantTensor:
    """What `pack` was given."""
    t = weight.tensors
    if "weight" in t:
        return t["weight"]
    bits = int(weight.format.removeprefix("int"))
    group_scale = t.get("group_scale")
    return QuantTensor(bits, t["data"], t["channel_scale"], group_scale, weight.shape[-1])


def rounded_rows(x_TI: Tensor) -> Tensor:
    """Rows as a product with integers takes them on a CPU: rounded to 8 bits, `ROUNDED_GROUP`
    columns with one scale, their largest magnitude / 127."""
    width = x_TI.shape[-1]
    groups_Tgn = F.pad(x_TI.float(), (0, -width % ROUNDED_GROUP)).unflatten(-1, (-1, ROUNDED_GROUP))
    most_Tg1 = groups_Tgn.abs().amax(-1, keepdim=True)
    integers_Tgn = (groups_Tgn * (127 / _nonzero(most_Tg1))).round()
    return (integers_Tgn * (most_Tg1 / 127)).flatten(-2)[..., :width]


def _packed_linear(x_TI: Tensor, weight: PackedWeight, expert: int | None = None) -> Tensor:
    """x times the weight (of one expert), in float32 where the weight is of integers."""
    kept = unpacked(weight)
    if isinstance(kept, Tensor):
        return linear(x_TI, kept if expert is None else kept[expert])
    values = kept.dequantized()
    rows = rounded_rows(x_TI) if x_TI.device.type == "cpu" else x_TI.float()
    return (rows @ (values if expert is None else values[expert]).T).to(x_TI.dtype)


def project(
    x_TI: Tensor,
    weight: PackedWeight,
    bias_O: Tensor | None = None,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual_TO: Tensor | None = None,
) -> Tensor:
    out_TO = _packed_linear(x_TI if norm is None else rms_norm(x_TI, *norm), weight)
    if bias_O is not None:
        out_TO = out_TO + bias_O.to(out_TO.dtype)
    return out_TO if residual_TO is None else residual_TO + out_TO


def mlp(
    x_TD: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    *,
    norm: tuple[Tensor, float] | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    out_TD = _feed_forward(x_TD if norm is None else rms_norm(x_TD, *norm), gate_up, down)
    return out_TD if residual_TD is None else residual_TD + out_TD


def _feed_forward(
    x_TD: Tensor, gate_up: PackedWeight, down: PackedWeight, expert: int | None = None
) -> Tensor:
    gate_TM, up_TM = _packed_linear(x_TD, gate_up, expert).chunk(2, dim=-1)
    return _packed_linear(swiglu(gate_TM, up_TM), down, expert)


def moe(
    x_TD: Tensor,
    router_ED: Tensor,
    bias_E: Tensor,
    gate_up: PackedWeight,
    down: PackedWeight,
    shared: tuple[PackedWeight, PackedWeight] | None,
    *,
    top_k: int,
    norm_min: float,
    norm: tuple[Tensor, float] | None = None,
    residual_TD: Tensor | None = None,
) -> Tensor:
    y_TD = x_TD if norm is None else rms_norm(x_TD, *norm)
    experts_TK, weights_TK = route(y_TD, router_ED, bias_E, top_k, norm_min)
    out_TKD = x_TD.new_zeros(*experts_TK.shape, x_TD.shape[-1])
    for expert in experts_TK.unique().tolist():
        token_N, choice_N = (experts_TK == expert).nonzero(as_tuple=True)
        out_TKD[token_N, choice_N] = _feed_forward(y_TD[token_N], gate_up, down, expert)
    out_TD = (out_TKD * weights_TK[..., None]).sum(1)
    if shared is not None:
        out_TD = out_TD + _feed_forward(y_TD, *shared)
    return out_TD if residual_TD is None else residual_TD + out_TD


def route(
    y_TD: Tensor, router_ED: Tensor, bias_E: Tensor, top_k: int, norm_min: float
) -> tuple[Tensor, Tensor]:
    """The chosen experts of normed rows and their weights, both `(T, K)`; see `ernie.moe.router`.

    Weights have the dtype of `y`.
    """
    probs_TE = (y_TD.float() @ router_ED.T).softmax(-1)
    # A stable sort takes the smaller index among equals; topk promises nothing.
    experts_TK = (probs_TE + bias_E).argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    weights_TK = probs_TE.gather(-1, experts_TK)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp(min=norm_min)
    return experts_TK, weights_TK.to(y_TD.dtype)


MOMENT_BLOCK = 256  # weights that share the scales of their 8-bit moments


class AdamWConstants(NamedTuple):
    """The factors of one AdamW step, as its kernels take them."""

    decay: float
    step_size: float
    beta1: float
    rest1: float
    beta2: float
    rest2: float
    root_scale: float
    eps: float
    grad_scale: float


@dataclass(frozen=True)
class AdamWUpdate:
    """What one AdamW step does to a tensor; `step` counts from 1. Give each tensor its own seed."""

    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int
    grad_scale: float = 1.0  # of the gradient, before anything else (for clipping)
    seed: int = 0  # of the random rounding of moments

    @property
    def constants(self) -> AdamWConstants:
        return AdamWConstants(
            decay=1 - self.learning_rate * self.weight_decay,
            step_size=self.learning_rate / (1 - self.beta1**self.step),
            beta1=self.beta1,
            rest1=1 - self.beta1,
            beta2=self.beta2,
            rest2=1 - self.beta2,
            root_scale=(1 - self.beta2**self.step) ** -0.5,
            eps=self.eps,
            grad_scale=self.grad_scale,
        )

    @property
    def rounding_key(self) -> int:
        """32 bits that mix seed and step. Source: the finaliser of SplitMix64."""
        mixed = (self.seed << 32) + self.step * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        return (mixed ^ mixed >> 31) & 0xFFFFFFFF


def float32_sum(total: Tensor, gradient: Tensor) -> Tensor:
    return total.float().add_(gradient)


def adamw_step(
    parameter_N: Tensor,
    gradient_N: Tensor,
    moment_N: Tensor,
    square_N: Tensor,
    update: AdamWUpdate,
    short_N: Tensor | None = None,
) -> None:
    c = update.constants
    # Each operation rounds to float32 by itself and in this order: the twins fuse none of them.
    gradient = gradient_N.float() * c.grad_scale
    moment = moment_N.float() * c.beta1 + gradient * c.rest1
    square = square_N.float() * c.beta2 + gradient * gradient * c.rest2
    root = square.double().sqrt().float()  # torch's float32 root may be off by a last bit
    change = moment * c.step_size / (root * c.root_scale + c.eps)
    parameter_N.copy_(parameter_N * c.decay - change)
    if short_N is not None:
        short_N.copy_(parameter_N)
    if moment_N.dtype == torch.bfloat16:
        bits = _rounding_bits(moment_N.numel(), update.rounding_key).view(moment_N.shape)
        bits = bits.to(moment_N.device)
        moment = _rounded_at_random(moment, bits & 0xFFFF)
        square = _rounded_at_random(square, bits >> 16)
    moment_N.copy_(moment)
    square_N.copy_(square)


def adamw_8bit_step(
    parameter_N: Tensor,
    gradient_N: Tensor,
    moment_N: Tensor,
    square_N: Tensor,
    scales_2B: Tensor,
    update: AdamWUpdate,
    short_N: Tensor | None = None,
) -> None:
    c = update.constants
    size, num_blocks = parameter_N.numel(), scales_2B.shape[1]

    def by_block(flat_N: Tensor) -> Tensor:
        flat = flat_N.float().flatten()
        return torch.nn.functional.pad(flat, (0, num_blocks * MOMENT_BLOCK - size)).view(
            num_blocks, MOMENT_BLOCK
        )

    gradient = by_block(gradient_N) * c.grad_scale
    moment = by_block(moment_N) * scales_2B[0, :, None] * c.beta1 + gradient * c.rest1
    root = by_block(square_N) * scales_2B[1, :, None]
    square = root * root * c.beta2 + gradient * gradient * c.rest2
    root = square.double().sqrt().float()
    change = moment * c.step_size / (root * c.root_scale + c.eps)
    flat_change = change.flatten()[:size].view(parameter_N.shape)
    parameter_N.copy_(parameter_N * c.decay - flat_change)
    if short_N is not None:
        short_N.copy_(parameter_N)

    bits = _rounding_bits(num_blocks * MOMENT_BLOCK, update.rounding_key).view(moment.shape)
    bits = bits.to(moment.device)
    tops = moment.abs().amax(1, keepdim=True), root.amax(1, keepdim=True)
    # Tensors, because by a number torch divides on a GPU, and divides a number everywhere, by way
    # of a reciprocal, which rounds twice.
    mosts = torch.full_like(tops[0], 127.0), torch.full_like(tops[1], 255.0)
    to_moment, to_root = (
        torch.where(top > 1e-30, most / top, 0.0) for most, top in zip(mosts, tops)
    )
    codes = (moment * to_moment + 128 + (bits & 0xFFFF).float() * 2**-16).int().clamp(max=255) - 128
    roots = (root * to_root + (bits >> 16).float() * 2**-16).int().clamp(max=255)
    roots = torch.maximum(roots, (root > 0).int())
    moment_N.copy_(codes.flatten()[:size].view(moment_N.shape))
    square_N.copy_(roots.flatten()[:size].view(square_N.shape))
    scales_2B.copy_(torch.cat([top / most for top, most in zip(tops, mosts)], 1).T)


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


def attend_one(
    q_qHd: Tensor,
    k_nGd: Tensor,
    v_nGd: Tensor,
    scale: float,
    causal: bool = True,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """One sequence: q holds the last `len(q)` of its n tokens; query i sees keys up to its own
    position, or, not `causal`, all of them. `drop` is dropout of the weights, `(H, q, n)`."""
    num_queries, num_heads, _ = q_qHd.shape
    num_keys, num_kv_heads, _ = k_nGd.shape
    group = num_heads // num_kv_heads
    k_nHd, v_nHd = (x.repeat_interleave(group, dim=1) for x in (k_nGd, v_nGd))
    scores_Hqn = torch.einsum("qhd,nhd->hqn", q_qHd.float(), k_nHd.float()) * scale
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_qHd.device).triu(
        num_keys - num_queries + 1
    )
    if causal:
        scores_Hqn = scores_Hqn.masked_fill(hidden, float("-inf"))
    weights_Hqn = scores_Hqn.softmax(-1)
    if drop is not None:
        weights_Hqn = drop(weights_Hqn)
    return torch.einsum("hqn,nhd->qhd", weights_Hqn, v_nHd.float()).to(q_qHd.dtype)


# Of `draw`: a token's probability is an integer, so that sums of probabilities have no order.
SUREST = 2.0**44  # the likeliest token; 2**18 of them add up within 63 bits
WIDEST = 31.5  # nats below the likeliest, where less than one is left of it
NOWHERE = 32.0  # nats, in place of more and of what is not a number
RANKS_PER_NAT = 2.0**23  # tokens that are nearer than that are equally likely, in float32 too
MOST_TOKENS = 2**18  # of a vocabulary


def draw(
    logits_RV: Tensor,
    temperature_R: Tensor,
    min_p_R: Tensor,
    top_k_R: Tensor,
    top_p_R: Tensor,
    uniform_R: Tensor,
) -> Tensor:
    distance_RV, is_row_R = draw_distances(logits_RV, temperature_R, min_p_R)
    masses_RV, ranks_RV = draw_masses(distance_RV), draw_ranks(distance_RV)
    sorted_RV, order_RV = ranks_RV.sort(dim=-1, stable=True)
    sorted_RV = kept_masses(masses_RV.gather(-1, order_RV), masses_RV.sum(-1), top_k_R, top_p_R)
    kept_RV = torch.zeros_like(masses_RV).scatter(-1, order_RV, sorted_RV)
    return invert(kept_RV, uniform_R).where(is_row_R, 0)


def draw_distances(
    logits_RV: Tensor, temperature_R: Tensor, min_p_R: Tensor
) -> tuple[Tensor, Tensor]:
    """How many nats each token is below the likeliest one of its row, float32 `(R, V)`, NOWHERE for
    those that are too far or that `min_p` drops; and which rows are numbers, bool `(R,)`."""
    scale_R1, limit_R1 = (
        x[:, None].to(logits_RV.device) for x in draw_scales(temperature_R, min_p_R)
    )
    logits_RV = logits_RV.float()
    top_R1 = logits_RV.amax(-1, keepdim=True)
    distance_RV = (top_R1 - logits_RV).mul_(scale_R1).clamp_max_(NOWHERE)
    if bool(min_p_R.any()):
        distance_RV.masked_fill_(distance_RV > limit_R1, NOWHERE)
    return distance_RV, top_R1[:, 0].isfinite()


def draw_masses(distance_RV: Tensor) -> Tensor:
    """Probabilities times some number of their row, int64."""
    return distance_RV.neg().exp_().mul_(SUREST).long()


def draw_ranks(distance_RV: Tensor) -> Tensor:
    """What tokens are sorted by, int64."""
    return (distance_RV * RANKS_PER_NAT).long()


def draw_scales(temperature_R: Tensor, min_p_R: Tensor) -> tuple[Tensor, Tensor]:
    """What logits are multiplied by, and how many nats below the likeliest a token may be; float32
    `(R,)`."""
    return (1 / temperature_R).float(), (-min_p_R.log()).clamp_max(WIDEST).float()


def kept_masses(sorted_RK: Tensor, total_R: Tensor, top_k_R: Tensor, top_p_R: Tensor) -> Tensor:
    """Masses of the likeliest tokens, in descending order, without those that `top_k` and `top_p`
    drop; `total` is that of all tokens of a row."""
    device = sorted_RK.device
    top_k_R1, top_p_R = top_k_R[:, None].to(device), top_p_R.to(device)
    rank_K = torch.arange(sorted_RK.shape[-1], device=device)
    sorted_RK = sorted_RK.masked_fill((top_k_R1 > 0) & (rank_K >= top_k_R1), 0)
    whole_R = torch.where(top_k_R1[:, 0] > 0, sorted_RK.sum(-1), total_R)
    before_RK = sorted_RK.cumsum(-1) - sorted_RK
    return sorted_RK.masked_fill(before_RK >= enough_mass(whole_R, top_p_R)[:, None], 0)


def enough_mass(whole_R: Tensor, top_p_R: Tensor) -> Tensor:
    """The share `top_p` of some masses: no token is kept after so much. At least one token is."""
    return (top_p_R * whole_R.double()).ceil().long().clamp_min(1).minimum(whole_R)


def invert(masses_RV: Tensor, uniform_R: Tensor) -> Tensor:
    """Where the cumulated masses pass `uniform` times their sum, `(R,)`; 0 in a row without any."""
    cumulated_RV = masses_RV.cumsum(-1)
    whole_R = cumulated_RV[:, -1]
    target_R = (uniform_R.to(whole_R.device) * whole_R.double()).long().minimum(whole_R - 1)
    places_R1 = torch.searchsorted(cumulated_RV, target_R[:, None], right=True)
    return places_R1[:, 0].clamp_max(masses_RV.shape[-1] - 1)


def argmax(logits_RV: Tensor) -> Tensor:
    return logits_RV.argmax(-1)


def token_logprobs(logits_RV: Tensor, tokens_R: Tensor) -> Tensor:
    own_R = logits_RV.gather(-1, tokens_R[:, None])[:, 0]
    return own_R.float() - logits_RV.float().logsumexp(-1)
