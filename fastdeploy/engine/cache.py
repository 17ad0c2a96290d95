"""The paged key/value cache as tensors, its size, and the `attend` that writes and reads it.

Legend: L layers, B blocks of the pool, P positions of a block, G key/value heads, d head width,
T tokens of the flat batch, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ernie import kernels
from ernie.config import ErnieConfig
from ernie.host import cgroup_bytes, memory_bytes
from ernie.model import ErnieModel
from ernie.settings import ConfigError
from fastdeploy.config import EngineConfig
from fastdeploy.engine.batch import Batch
from fastdeploy.engine.ranks import Ranks


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of every layer, each `(L, B, P, G, r)`; uninitialised until written.

    r is the head width d, or with int8 a little more: see `ernie.kernels.write_cache`.

    A drafting MTP block is a layer of its own, after the main ones.
    """

    keys_LBPGr: Tensor
    values_LBPGr: Tensor

    @property
    def block_size(self) -> int:
        return self.keys_LBPGr.shape[2]

    @classmethod
    def allocate(
        cls,
        config: ErnieConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        drafting_layers: int = 0,
        num_ranks: int = 1,
    ) -> KVCache:
        """Room for the heads of one of `num_ranks` ranks."""
        shape = (
            config.num_hidden_layers + drafting_layers,
            num_blocks,
            block_size,
            config.num_key_value_heads // num_ranks,
            kernels.cache_width(config.head_dim, dtype),
        )
        return cls(*(torch.empty(shape, dtype=dtype, device=device) for _ in range(2)))


class PagedAttend:
    """An `ernie.attention.Attend` over the cache: stores the new keys and values, then attends."""

    def __init__(self, cache: KVCache, batch: Batch) -> None:
        self.cache = cache
        self.batch = batch

    def __call__(self, q_THd: Tensor, k_TGd: Tensor, v_TGd: Tensor, *, layer: int) -> Tensor:
        batch = self.batch
        keys_BPGr, values_BPGr = self.cache.keys_LBPGr[layer], self.cache.values_LBPGr[layer]
        scale, new = q_THd.shape[-1] ** -0.5, (k_TGd, v_TGd, batch.slots_T)
        in_one_piece = batch.begins and keys_BPGr.is_cuda and keys_BPGr.dtype == k_TGd.dtype
        if in_one_piece and not kernels.is_batch_invariant():
            # All there is to look at is in the batch, in one piece, which a GPU reads faster.
            kernels.write_cache(k_TGd, v_TGd, keys_BPGr, values_BPGr, batch.slots_T)
            return kernels.attend_packed(q_THd, k_TGd, v_TGd, batch.cu_seqlens_S1, scale)
        return kernels.attend_paged(
            q_THd,
            keys_BPGr,
            values_BPGr,
            batch.tables_SM,
            batch.cu_seqlens_S1,
            batch.lens_S,
            scale,
            new,
        )


def cache_dtype(name: str, model: ErnieModel) -> torch.dtype:
    """The dtype that `kv_cache_dtype` stands for.

    "auto" keeps float32 beside float32 weights. Otherwise it takes two bytes: on a GPU the bfloat16
    of the activations, on a CPU float16, which is as fast and finer. (SmolLM2-135M, 384 tokens,
    relative error of the logits: float16 1.7e-4, bfloat16 1.4e-3, int8 8.0e-3.)
    """
    if name != "auto":
        return getattr(torch, name)
    if model.model.norm.weight.dtype == torch.float32:
        return torch.float32
    return torch.float16 if model.device.type == "cpu" else torch.bfloat16


def block_bytes(
    config: ErnieConfig, block_size: int, dtype: torch.dtype, *, drafting_layers: int = 0
) -> int:
    """Memory of one block: keys and values of all layers."""
    layers = config.num_hidden_layers + drafting_layers
    width = config.num_key_value_heads * kernels.cache_width(config.head_dim, dtype)
    return 2 * layers * block_size * width * dtype.itemsize


def cache_allocator(
    model: ErnieModel, config: EngineConfig, ranks: Ranks | None = None
) -> Callable[[int], KVCache]:
    """What makes a cache of so many blocks, and has the other ranks make theirs. One without blocks
    is made here alone: the others drop theirs when they go to sleep.
    """
    network, device = model.config, model.device  # not the model: its weights may be freed
    dtype, drafting_layers = cache_dtype(config.kv_cache_dtype, model), int(config.has_mtp)

    def allocate(num_blocks: int) -> KVCache:
        if ranks and num_blocks:
            ranks.call(
                "allocate",
                num_blocks=num_blocks,
                block_size=config.block_size,
                dtype=config.kv_cache_dtype,
                drafting_layers=drafting_layers,
            )
        return KVCache.allocate(
            network,
            num_blocks,
            config.block_size,
            dtype,
            device,
            drafting_layers=drafting_layers,
            num_ranks=ranks.size if ranks else 1,
        )

    return allocate


def num_cache_blocks(model: ErnieModel, config: EngineConfig, ranks: Ranks | None = None) -> int:
    """Blocks of the pool: as many as memory allows, but not more than all seats can ever fill.

    Raises ConfigError when they do not hold a single text of max_model_len.
    """
    per_text = -(-config.max_model_len // config.block_size)
    size = block_bytes(
        model.config,
        config.block_size,
        cache_dtype(config.kv_cache_dtype, model),
        drafting_layers=int(config.has_mtp),
    )
    if config.num_gpu_blocks_override is not None:
        num_blocks = config.num_gpu_blocks_override
        advice = f"use num_gpu_blocks_override={per_text} or more, or a smaller max_model_len"
    else:
        free = free_bytes(model.device)
        if ranks and model.device.type == "cuda":  # else all ranks take from the same memory
            free = min(free, *ranks.call("free_bytes")) * ranks.size
        memory = int(free * config.gpu_memory_utilization)
        num_blocks = min(memory // size, config.max_num_seqs * per_text)
        advice = f"free memory ({per_text * size / 2**30:.2f} GiB needed) or lower max_model_len"
    if num_blocks < per_text:
        raise ConfigError(
            f"the cache has {num_blocks} blocks of {config.block_size} tokens, too few for one "
            f"text of max_model_len={config.max_model_len}; {advice}"
        )
    return num_blocks


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now: of the GPU, or of the host within its container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _host_free_bytes()
    limit, used = (cgroup_bytes(name) for name in ("memory.max", "memory.current"))
    return free if limit is None or used is None else min(free, limit - used)


def _host_free_bytes() -> int:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except FileNotFoundError:
        pass  # not Linux: half of what the machine has stands in for what is free
    return memory_bytes() // 2
