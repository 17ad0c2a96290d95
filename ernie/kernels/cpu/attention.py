"""`attend_packed`, `attend_paged` and the cache's writes on the CPU, without a matrix of scores.

Legend: r bytes or elements of a row of the cache; see `ernie.kernels` for the other letters.

A query's paged attention depends, to the bit, on its own sequence only: not on the batch, nor on
how many queries come at a time, nor on size and numbering of the blocks.

The kernels take head widths that are multiples of 16 up to 512 (all released models: 128); other
widths run in plain torch.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from ernie.kernels import reference
from ernie.kernels.cpu.build import CACHE_DTYPES, library
from ernie.kernels.dispatch import is_batch_invariant


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
    if not _fits(q_THd):
        return reference.attend_packed(q_THd, k_TGd, v_TGd, cu_seqlens_S1, scale, causal=causal)
    if q_THd.dtype != torch.float32:
        q, k, v = q_THd.float(), k_TGd.float(), v_TGd.float()
        return attend_packed(q, k, v, cu_seqlens_S1, scale, causal=causal).to(q_THd.dtype)
    assert cu_seqlens_S1.dtype == torch.int32 and int(cu_seqlens_S1[-1]) == len(q_THd)
    if torch.is_grad_enabled() and (
        q_THd.requires_grad or k_TGd.requires_grad or v_TGd.requires_grad
    ):
        return _AttendPacked.apply(q_THd, k_TGd, v_TGd, cu_seqlens_S1, scale, causal)
    return _forward(_rows(q_THd), _rows(k_TGd), _rows(v_TGd), cu_seqlens_S1, scale, causal, None)


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
    if not _fits(q_THd):
        if new is not None:
            write_cache(new[0], new[1], k_cache_BPGr, v_cache_BPGr, new[2])
        attend = _one_by_one if is_batch_invariant() else reference.attend_paged
        return attend(q_THd, k_cache_BPGr, v_cache_BPGr, tables_SM, cu_seqlens_S1, lens_S, scale)
    q = _float_rows(q_THd)
    assert tables_SM.dtype == cu_seqlens_S1.dtype == lens_S.dtype == torch.int32
    tables = tables_SM if tables_SM.stride(1) == 1 else tables_SM.contiguous()
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    rows, kept = _new_rows(new)
    library().ernie_attend_paged(
        _CALL.pack(
            q.data_ptr(),
            q.stride()[0],
            *rows,
            *_caches(k_cache_BPGr, v_cache_BPGr),
            tables.data_ptr(),
            tables.stride()[0],
            cu_seqlens_S1.data_ptr(),
            lens_S.data_ptr(),
            lens_S.shape[0],
            *k_cache_BPGr.shape[1:3],
            *q.shape[1:],
            out.data_ptr(),
            torch.get_num_threads(),
            scale,
        )
    )
    del kept  # what the call points at had to live until here
    return out if q_THd.dtype == torch.float32 else out.to(q_THd.dtype)


def write_cache(
    k_TGd: Tensor, v_TGd: Tensor, k_cache_BPGr: Tensor, v_cache_BPGr: Tensor, slots_T: Tensor
) -> None:
    rows, kept = _new_rows((k_TGd, v_TGd, slots_T))
    _, positions, groups, _ = k_cache_BPGr.shape
    nothing = (0,) * 5
    library().ernie_write_cache(
        _CALL.pack(
            *(0, 0),
            *rows,
            *_caches(k_cache_BPGr, v_cache_BPGr),
            *nothing,
            positions,
            groups,
            *(0, k_TGd.shape[2]),
            0,
            torch.get_num_threads(),
            0.0,
        )
    )
    del kept


# struct Call of paged.cpp. One packed argument costs a fifth of twenty converted ones.
_CALL = struct.Struct("=22qd")
_NOTHING_NEW = (0,) * 6


def _new_rows(new: tuple[Tensor, Tensor, Tensor] | None) -> tuple[tuple[int, ...], object]:
    """The fields of `Call` for keys, values and slots, and the tensors they point at."""
    if new is None:
        return _NOTHING_NEW, None
    k, v, slots = _float_rows(new[0]), _float_rows(new[1]), new[2].contiguous()
    count = slots.shape[0]
    assert slots.dtype == torch.int64 and k.shape[0] == count
    pointers = (k.data_ptr(), k.stride()[0], v.data_ptr(), v.stride()[0], slots.data_ptr(), count)
    return pointers, (k, v, slots)


def _caches(k_cache_BPGr: Tensor, v_cache_BPGr: Tensor) -> tuple[int, int, int]:
    assert k_cache_BPGr.is_contiguous() and v_cache_BPGr.is_contiguous()
    code = CACHE_DTYPES[k_cache_BPGr.dtype]
    return k_cache_BPGr.data_ptr(), v_cache_BPGr.data_ptr(), code


def _one_by_one(
    q_THd: Tensor,
    k_cache_BPGr: Tensor,
    v_cache_BPGr: Tensor,
    tables_SM: Tensor,
    cu_seqlens_S1: Tensor,
    lens_S: Tensor,
    scale: float,
) -> Tensor:
    """Plain torch for each query by itself, where torch's order of sums depends on the number of
    queries."""
    queries_S = cu_seqlens_S1.diff()
    sequence_T = torch.arange(len(lens_S)).repeat_interleave(queries_S)
    behind_T = cu_seqlens_S1[1:][sequence_T] - 1 - torch.arange(len(q_THd))
    lens_T = (lens_S[sequence_T] - behind_T).int()
    each_T1 = torch.arange(len(q_THd) + 1, dtype=torch.int32)
    tables_TM = tables_SM[sequence_T]
    return reference.attend_paged(
        q_THd, k_cache_BPGr, v_cache_BPGr, tables_TM, each_T1, lens_T, scale
    )


class _AttendPacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, causal: bool
    ) -> Tensor:
        q, k, v = _rows(q), _rows(k), _rows(v)
        lse_TH = q.new_empty(q.shape[:2])
        out = _forward(q, k, v, bounds, scale, causal, lse_TH)
        ctx.save_for_backward(q, k, v, bounds, out, lse_TH)
        ctx.scale, ctx.causal = scale, causal
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bounds, out, lse_TH = ctx.saved_tensors
        grad = grad.contiguous()
        parts = _parts_of_a_group(bounds, q.shape[1], k.shape[1])
        dq, delta_TH = q.new_empty(q.shape), torch.empty_like(lse_TH)
        dk, dv = k.new_empty(2, parts, *k.shape)
        library().ernie_attend_packed_backward(
            q.data_ptr(),
            q.stride(0),
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            out.data_ptr(),
            grad.data_ptr(),
            lse_TH.data_ptr(),
            bounds.data_ptr(),
            len(bounds) - 1,
            q.shape[1],
            k.shape[1],
            k.shape[2],
            ctx.scale,
            ctx.causal,
            parts,
            delta_TH.data_ptr(),
            dq.data_ptr(),
            dk.data_ptr(),
            dv.data_ptr(),
            torch.get_num_threads(),
        )
        return dq, dk.sum(0), dv.sum(0), None, None, None


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    scale: float,
    causal: bool,
    lse_TH: Tensor | None,
) -> Tensor:
    out = q.new_empty(q.shape)
    library().ernie_attend_packed(
        q.data_ptr(),
        q.stride(0),
        k.data_ptr(),
        k.stride(0),
        v.data_ptr(),
        v.stride(0),
        bounds.data_ptr(),
        len(bounds) - 1,
        q.shape[1],
        k.shape[1],
        k.shape[2],
        scale,
        causal,
        out.data_ptr(),
        None if lse_TH is None else lse_TH.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _parts_of_a_group(bounds: Tensor, heads: int, groups: int) -> int:
    """Into how many parts the backward pass splits the query heads of a group: work for every
    thread.

    One segment and one group are one piece of work unless the longest segment would then be more
    than a thread's fair share. Each part costs memory for its own gradient of keys and values.
    """
    work = bounds.diff().double().square()
    longest_share = float(work.max() / work.sum().clamp(min=1)) / groups
    return heads // groups if longest_share * torch.get_num_threads() > 0.5 else 1


def _fits(q_THd: Tensor) -> bool:
    width = q_THd.shape[2]
    return width % 16 == 0 and 0 < width <= 512


def _float_rows(x_THd: Tensor) -> Tensor:
    return _rows(x_THd if x_THd.dtype == torch.float32 else x_THd.float())


def _rows(x_THd: Tensor) -> Tensor:
    """x itself where each token's heads are contiguous (as in a column slice), else a copy."""
    _, head, element = x_THd.stride()
    return x_THd if element == 1 and head == x_THd.shape[2] else x_THd.contiguous()
