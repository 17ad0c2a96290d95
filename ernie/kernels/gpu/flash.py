"""FlashAttention in front of our own attention, where its package is installed (2 or 3).

It takes over what it was made for: bfloat16 and float16, packed rows, and prompts over a paged
cache of the same dtype. Decoding, caches of other dtypes, and blocks that version 2 does not take
(their size must be a multiple of 256) go to our kernels, and so does everything with
`batch_invariant`. FlashInfer is not used: it plans on the
host from lengths that lie on the device here, which would make every layer wait.

Written by the packages' signatures and tested with a stand-in; it has not been run with them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ernie.kernels.dispatch import is_batch_invariant
from ernie.kernels.gpu import ops

# Module, its function for a paged cache, and the argument by which a version gives itself away.
VERSIONS = {
    3: ("flash_attn_interface", "flash_attn_with_kvcache", "page_table"),
    2: ("flash_attn", "flash_attn_varlen_func", "block_table"),
}
BLOCK_MULTIPLE = 256  # of version 2
DECODED = 16  # tokens a sequence, on average, up to which a batch is taken for one that decodes


def available() -> str:
    if reason := ops.available():
        return reason
    if _found() is None:
        return "neither FlashAttention 3 nor 2 is installed with support of paged caches"
    return ""


def detail() -> str:
    version, _, _ = _parts()
    return f"FlashAttention {version}"


@cache
def _found() -> tuple[int, Callable, Callable] | None:
    """The version, its function for packed rows, and that for a paged cache."""
    for version, (name, paged, wanted) in VERSIONS.items():
        if importlib.util.find_spec(name) is None:
            continue
        module = importlib.import_module(name)
        if wanted in inspect.signature(getattr(module, paged)).parameters:
            return version, module.flash_attn_varlen_func, getattr(module, paged)
    return None


def _parts() -> tuple[int, Callable, Callable]:
    found = _found()
    assert found is not None, available()
    return found


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
    version, varlen, _ = _parts()
    fits = q_THd.dtype in (torch.bfloat16, torch.float16) and len(q_THd)
    if version == 2 or not fits:  # torch has version 2 built in, and cuDNN's, which is faster
        return ops.attend_packed(q_THd, k_TGd, v_TGd, cu_seqlens_S1, scale, lengths, causal=causal)
    # Where the longest segment is not known here, a row's length is, and is no less.
    longest = max(lengths) if lengths else len(q_THd)
    return varlen(
        q_THd, k_TGd, v_TGd, cu_seqlens_S1, cu_seqlens_S1, longest, longest,
        softmax_scale=scale, causal=causal,
    )  # fmt: skip


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
    version, _, paged = _parts()
    positions = k_cache_BPGr.shape[1]
    decodes = len(q_THd) <= DECODED * len(lens_S)
    fits = q_THd.dtype in (torch.bfloat16, torch.float16) and k_cache_BPGr.dtype == q_THd.dtype
    is_refused = not fits or (version == 2 and positions % BLOCK_MULTIPLE)
    if decodes or is_refused or is_batch_invariant():
        return ops.attend_paged(
            q_THd, k_cache_BPGr, v_cache_BPGr, tables_SM, cu_seqlens_S1, lens_S, scale, new
        )
    if new is not None:
        ops.write_cache(new[0], new[1], k_cache_BPGr, v_cache_BPGr, new[2])
    caches = (k_cache_BPGr, v_cache_BPGr)
    if version == 3:
        return paged(
            q_THd, *caches, cache_seqlens=lens_S, page_table=tables_SM,
            cu_seqlens_q=cu_seqlens_S1, max_seqlen_q=len(q_THd), softmax_scale=scale, causal=True,
        )  # fmt: skip
    ends_S1 = F.pad(lens_S.cumsum(0, dtype=torch.int32), (1, 0))
    return paged(
        q_THd, *caches, cu_seqlens_S1, ends_S1, len(q_THd), tables_SM.shape[1] * positions,
        softmax_scale=scale, causal=True, block_table=tables_SM,
    )  # fmt: skip
